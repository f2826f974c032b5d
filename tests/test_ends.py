"""How a run and its process end: signals, restored handlers, closed output, and the exit code in each case."""

import contextlib
import errno
import faulthandler
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from types import SimpleNamespace

import pytest
import yaml
from support.mpi import ENVIRONMENT, until
from support.runs import OWN, config, everything, put_back, run  # noqa: F401

import fedmpi
from fedmpi import checkpoint, output, results, stopping
from fedmpi.cli import app
from fedmpi.comm import MpiComm, SoloComm, process
from fedmpi.components import to_dict
from fedmpi.errors import ConfigError, FedmpiError, SiloError, Stopped, agreed
from fedmpi.records import metrics, read_metrics, trace

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGCONT)
EVENTFUL = {"local": {"sampler": OWN + "Eventful"}}


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("sent", SIGNALS[:3])
def test_a_stop_saves_the_round_before_and_the_next_run_of_the_process_knows_nothing_of_it(tmp_path, sent):
    """Ctrl-C also works in a single process."""
    before = handlers()
    how, said = config(tmp_path, 6, checkpoint={"every": 9}), rf"{sent.name} \(rank 0\); round 3 is on disk; the same"
    with pytest.raises(Stopped, match=rf"{said} command resumes$"), fedmpi.Run(how, comm=SoloComm()) as halted:
        for record in halted:
            if record["round"] == 3:
                os.kill(os.getpid(), sent)
    assert results.newest(tmp_path) == 3 and handlers() == before
    assert [record["round"] for record in run(how)[0]] == [4, 5, 6]


def test_a_signal_that_comes_when_all_is_done_is_forgotten(tmp_path):
    how = config(tmp_path / "a", 2)
    with fedmpi.Run(how, comm=SoloComm()) as first:
        list(first)
        os.kill(os.getpid(), signal.SIGTERM)
    assert len(run(config(tmp_path / "b", 2))[0]) == 2


@pytest.mark.parametrize("end", ["done", "left", "refused", "silo", "body"])
def test_handlers_are_put_back_however_a_run_ends(tmp_path, monkeypatch, end):
    mine = [lambda number, frame, n=n: None for n in range(2)]
    before = [signal.signal(number, handler) for number, handler in zip(SIGNALS, mine, strict=False)]
    try:
        monkeypatch.setenv("EPOCH", "1" if end == "silo" else "none")
        monkeypatch.setenv("EVENT", "raise")
        how = config(tmp_path, data={"shape": [5 if end == "refused" else 4]}, **EVENTFUL)
        expected = {"refused": ConfigError, "silo": SiloError, "body": LookupError}.get(end)
        with pytest.raises(expected or SystemExit):
            with fedmpi.Run(how, comm=SoloComm()) as started:
                for _ in started:
                    if end == "body":
                        raise LookupError
                    if end == "left":
                        break
            raise SystemExit
        assert handlers()[:2] == mine
    finally:
        for number, handler in zip(SIGNALS, before, strict=False):
            signal.signal(number, handler)


def test_the_second_ctrl_c_interrupts_as_ever(tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught, fedmpi.Run(config(tmp_path), comm=SoloComm()) as started:
        for _ in started:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.__notes__ == [f"no round is on disk in {tmp_path} yet; the same command starts again"]


def test_a_ctrl_c_that_is_ignored_or_somebody_elses_stays_so(tmp_path):
    for handler in (signal.SIG_IGN, lambda number, frame: None):
        before = signal.signal(signal.SIGINT, handler)
        try:
            with fedmpi.Run(config(tmp_path), comm=SoloComm()) as started:
                for _ in started:
                    assert signal.getsignal(signal.SIGINT) is handler
                    break
        finally:
            signal.signal(signal.SIGINT, before)


def test_what_ends_a_run_early_says_what_remains(tmp_path, monkeypatch):
    monkeypatch.setenv("EPOCH", "2")
    monkeypatch.setenv("EVENT", "raise")
    with pytest.raises(SiloError) as caught:
        run(config(tmp_path, checkpoint={"every": 1}, **EVENTFUL))
    assert caught.value.__notes__ == ["round 2 is on disk; the same command resumes"]
    assert everything(tmp_path)[0] == 2


# ---------------------------------------------------------------- the process


@pytest.fixture
def hook(monkeypatch):
    """What an uncaught exception leads to in a connected process of one rank, and what Python's own hook received."""
    given = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: given.append(error))
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)  # so that the process survives
    process.abort_on_uncaught(SoloComm())
    return sys.excepthook, given


@pytest.mark.parametrize("error", [LookupError("odd"), KeyboardInterrupt()])
def test_an_exception_in_one_process_alone_is_pythons_own_affair(hook, error):
    caught, given = hook
    caught(type(error), error, None)
    assert given == [error]


def test_what_fedmpi_says_no_to_is_one_line_and_its_exit_code_in_a_program_of_ones_own(hook, capsys):
    caught, given = hook
    with pytest.raises(SystemExit) as ended:
        caught(Stopped, Stopped("stopped in round 2"), None)
    assert (ended.value.code, given, capsys.readouterr().err) == (3, [], "fedmpi: stopped in round 2\n")


def test_where_somebody_types_signals_are_as_they_were_and_python_goes_on(hook, monkeypatch, capsys):
    caught, _ = hook
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    monkeypatch.setattr(signal, "signal", lambda *arguments: pytest.fail(f"signal.signal{arguments}"))
    caught(Stopped, Stopped("stopped in round 2"), None)
    assert capsys.readouterr().err == "fedmpi: stopped in round 2\n"


class Pair(SoloComm):
    """One of two ranks; the end of their job is only recorded."""

    size = 2

    def __init__(self):
        super().__init__()
        self.codes = []

    def abort(self, code):
        self.codes.append(code)

    def finish(self):
        pass


def nothing_left(*arguments, **options):
    raise MemoryError


def test_a_rank_without_memory_to_say_why_ends_the_job_all_the_same(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    process.abort_on_uncaught(pair := Pair())
    monkeypatch.setattr(traceback, "format_exception", nothing_left)
    with pytest.raises(MemoryError):
        sys.excepthook(LookupError, LookupError(), None)
    assert pair.codes == [1]


@pytest.mark.parametrize("error", [RuntimeError("unable to start watchdog thread"), MemoryError()])
def test_a_job_ends_where_no_thread_can_be_started_to_watch_its_end(monkeypatch, error):
    def refuses(*arguments, **options):
        raise error

    codes = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", refuses)
    world = SimpleNamespace(COMM_WORLD=SimpleNamespace(Abort=codes.append))
    MpiComm.abort(SimpleNamespace(_mpi=world, is_extended=False), 3)
    assert codes == [3]


@pytest.mark.parametrize("late", [False, True])
def test_ranks_that_end_alike_do_not_wait_for_one_that_does_not_come(monkeypatch, late):
    pair = Pair()
    if late:
        monkeypatch.setattr(process, "LATE_S", 0.05)
        monkeypatch.setattr(pair, "finish", lambda: until(lambda: pair.codes, 10))
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(threading, "Thread", nothing_left)  # its `start` may wait for ever
    process.leave(pair, agreed(Stopped("stopped")))
    assert pair.codes == [3] * late


def test_last_words_do_not_wait_for_a_launcher_whose_output_nobody_reads(monkeypatch):
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writes, bytes(1 << 12))
    with subprocess.Popen(["sleep", "60"], stderr=writes) as launcher:
        try:
            monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
            monkeypatch.setattr(stopping, "_last_words", "round 3 is on disk")
            monkeypatch.setattr(stopping, "_received", received := [])
            stopping._wake(signal.SIGCONT, None)
            said = threading.Thread(target=stopping._note, args=(signal.SIGTERM, None), daemon=True)
            said.start()
            said.join(10)
            assert received == ["SIGTERM"]
        finally:
            launcher.kill()
            os.close(reads)
            os.close(writes)


PROGRAM = """
import atexit, os, signal, threading, time
import fedmpi
atexit.register(print, "atexit has run")
with fedmpi.Run("config.yaml", "out=own", "rounds=200") as run:
    for record in run:
        if record["round"] == 2:
            def again():
                while True:
                    os.kill(os.getpid(), signal.SIGUSR1)
                    time.sleep(0.002)
            threading.Thread(target=again, daemon=True).start()
"""


def place(tmp_path):
    how = to_dict(config("out", 3, checkpoint={"every": 9}))
    how = {name: how[name] for name in ("rounds", "model", "local", "checkpoint", "device")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(how | {"data": {"name": "digits", "silos": 4}}))


def shell(tmp_path, line, **more):
    command = [sys.executable, "-m", "fedmpi"]
    line = re.sub(r"^fedmpi\b", " ".join(command), line)
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | ENVIRONMENT | more
    return subprocess.Popen(["bash", "-c", line], cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True)


def test_output_that_nobody_takes_and_a_home_that_is_not_there_end_no_run(tmp_path):
    """Endless signals after the stop was agreed, in a user's own program, do not change its exit code."""
    place(tmp_path)
    (tmp_path / "own.py").write_text(PROGRAM)
    lines = {
        "full": "fedmpi train config.yaml out=full > /dev/full",
        "closed": "fedmpi train config.yaml out=closed <&- >&- 2>&-",
        "head": "fedmpi train config.yaml out=head | head -1; exit ${PIPESTATUS[0]}",
        "refused": "fedmpi train config.yaml rounds=x >/dev/full 2>/dev/full",
        "own": f"{sys.executable} own.py",
    }
    started = {name: shell(tmp_path, line) for name, line in lines.items()}
    ended = {name: (*process.communicate(timeout=120), process.returncode) for name, process in started.items()}
    codes = {name: code for name, (_, _, code) in ended.items()}
    assert codes == {"full": 0, "closed": 0, "head": 0, "refused": 2, "own": 3}, ended
    for name in ("full", "closed", "head"):
        assert results.inspect(tmp_path / name)["rounds"] == 3 and (tmp_path / name / "model.safetensors").exists()
        assert "Traceback" not in ended[name][1] and "xception" not in ended[name][1], ended[name]
    assert ended["head"][0].count("\n") == 1
    out, err, _ = ended["own"]
    assert out == "atexit has run\n" and err.startswith("fedmpi: stopped in round ") and err.count("\n") == 1, ended


def test_an_answer_that_cannot_be_written_is_a_failure(tmp_path):
    run(config(tmp_path / "a", 1))
    process = shell(tmp_path, "fedmpi inspect a > /dev/full")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "fedmpi: cannot write the answer: No space left on device\n")


@pytest.mark.parametrize(
    "why", [OSError(errno.ENOSPC, "full"), BrokenPipeError(errno.EPIPE, "gone"), ValueError("closed")]
)
def test_a_line_that_cannot_be_written_raises_nothing(monkeypatch, why):
    class Stream(io.StringIO):
        def flush(self):
            raise why

    monkeypatch.setattr(sys, "stdout", stream := Stream())
    output.say("a line")
    output.flush()
    assert stream.getvalue() == "a line\n"
    monkeypatch.setattr(sys, "stdout", None)
    output.say("a line")


def test_a_line_that_the_locale_has_no_letters_for_is_written_all_the_same(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    output.say("silo Zürich")
    assert raw.getvalue() == b"silo Z\\xfcrich\n"


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def full(monkeypatch):
    """While this is True, rank 0's writes fail for lack of room."""
    state = {"full": False}

    def guarded(write):
        def attempt(self, *arguments):
            if state["full"]:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(self, *arguments)

        return attempt

    monkeypatch.setattr(trace.Trace, "write", guarded(trace.Trace.write))
    monkeypatch.setattr(metrics.Metrics, "_write", guarded(metrics.Metrics._write))
    return state


def test_records_that_find_no_room_wait_and_training_goes_on(tmp_path, full, caplog):
    with fedmpi.Run(how := config(tmp_path / "a", 6, checkpoint={"every": 6}), comm=SoloComm()) as started:
        for record in started:
            full["full"] = record["round"] in (1, 2)  # so rounds 2 and 3 cannot be written
    assert [record["round"] for record in read_metrics(tmp_path / "a")] == [1, 2, 3, 4, 5, 6]
    assert [" ".join(r.getMessage().split()[1:]) for r in caplog.records] == [
        "cannot be written (No space left on device): records wait for the next checkpoint",
        "cannot be written (No space left on device); it gets no more records",
    ]
    events = json.loads((tmp_path / "a" / "trace.json").read_text())
    assert {event["args"]["round"] for event in events if event["ph"] == "X"} == {1}
    run(config(tmp_path / "b", 6, checkpoint=vars(how.checkpoint)))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_no_checkpoint_is_sealed_without_its_records(tmp_path, full):
    how = config(tmp_path, 4, checkpoint={"every": 2})
    with (
        pytest.raises(FedmpiError, match=r"cannot write .*metrics.jsonl: No space"),
        fedmpi.Run(how, comm=SoloComm()) as started,
    ):
        for record in started:
            full["full"] = record["round"] >= 2
    assert checkpoint.sealed_rounds(tmp_path) in ([], [2])
    full["full"] = False
    run(how)
    assert [record["round"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


# ---------------------------------------------------------------- commands


def command(capsys, *arguments):
    """Its exit code, standard output and standard error."""
    try:
        code = app(list(arguments), standalone_mode=False)
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    return code or 0, said.out, said.err


def test_stop_says_when_nobody_is_there_to_be_stopped(tmp_path, capsys):
    with fedmpi.Run(config(tmp_path, 2), comm=SoloComm()) as started:
        next(iter(started))
        assert command(capsys, "stop", str(tmp_path)) == (0, f"asked the job in {tmp_path} to stop\n", "")
        assert (tmp_path / "stop").exists()
    code, out, err = command(capsys, "stop", str(tmp_path))
    assert (code, out, err) == (2, "", f"fedmpi: no job is training in {tmp_path}\n")
    assert not (tmp_path / "stop").exists()
    ranks = json.loads((tmp_path / "ranks.json").read_text())
    (tmp_path / "ranks.json").write_text(json.dumps([ranks[0] | {"host": "elsewhere"}]))
    code, out, _ = command(capsys, "stop", str(tmp_path))
    assert code == 0 and out.endswith("to stop, if there is one: that cannot be seen from this host\n")


def test_a_directory_tells_of_what_was_trained_in_it_whatever_is_asked_for_later(tmp_path, capsys):
    run(config(tmp_path, 4))
    before = {
        name: (tmp_path / name).read_bytes() for name in ("config.yaml", "ranks.json", "silos.json", "metrics.jsonl")
    }
    for rounds in (2, 4):
        assert run(config(tmp_path, rounds))[0] == []
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert (
        "\nnothing to do: 4 rounds are done; set rounds=N to train more\n" in command(capsys, "train", str(tmp_path))[1]
    )
    out = command(capsys, "train", str(tmp_path), "rounds=2")[1]
    assert "\nrounds=2 is below the 4 rounds that are done; set rounds above 4 to train more\n" in out
    assert command(capsys, "inspect", str(tmp_path))[1].startswith("rounds         4 of 4\n")
    run(config(tmp_path, 6), rounds=1)
    assert command(capsys, "inspect", str(tmp_path))[1].startswith("rounds         5 of 6\n")
    code, out, err = command(capsys, "inspect", str(tmp_path), "--done")
    assert code == 1 and not out and "has 5 of 6 rounds" in err
    run(config(tmp_path, 5))  # the memory suffices after all
    code, out, _ = command(capsys, "inspect", str(tmp_path), "--done")
    assert code == 0 and out.startswith("rounds         5 of 5\n")


@pytest.mark.parametrize(
    "text", [b"a: [b", b"", b"\xff\xfe", b"- 1", b"3: 4", b"about: 5", b"rounds: 4", b"a: !!python/name:os.system x"]
)
def test_a_damaged_configuration_is_one_line_in_every_command(tmp_path, capsys, text):
    run(config(tmp_path, 1))
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    for arguments in (["inspect"], ["eval"], ["export", "--to", str(tmp_path / "m.pt")]):
        code, out, err = command(capsys, arguments[0], str(tmp_path), *arguments[1:])
        assert (code, out, err.count("\n")) == (2, "", 1) and f"{path} is damaged; put it back" in err, err


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors", "other"])
def test_export_to_a_folder_is_one_line(tmp_path, capsys, name):
    run(config(tmp_path / "a", 1))
    (tmp_path / name).mkdir()
    code, out, err = command(capsys, "export", str(tmp_path / "a"), "--to", str(tmp_path / name))
    assert (code, out, err.count("\n")) == (2, "", 1) and f"--to {tmp_path / name}: " in err
    assert list((tmp_path / name).iterdir()) == []
