"""How a run and its process end: signals, what is put back, output that nobody takes, the exit code in all of it."""

import errno
import io
import os
import signal
import subprocess
import sys

import pytest
import yaml
from mpi import ENVIRONMENT
from runs import OWN, config, everything, put_back, run  # noqa: F401

import fedmpi
from fedmpi import comm, output, results
from fedmpi.comm import Solo
from fedmpi.components import to_dict
from fedmpi.errors import ConfigError, SiloError, Stopped

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGCONT)
EVENTFUL = {"local": {"sampler": OWN + "Eventful"}}


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("sent", SIGNALS[:3])
def test_a_stop_saves_the_round_before_and_the_next_run_of_the_process_knows_nothing_of_it(tmp_path, sent):
    """Ctrl-C in one process too."""
    before = handlers()
    how, said = config(tmp_path, 6, checkpoint={"every": 9}), rf"{sent.name} \(rank 0\); round 3 is on disk; the same"
    with pytest.raises(Stopped, match=rf"{said} command resumes$"), fedmpi.Run(how, comm_=Solo()) as halted:
        for record in halted:
            if record["round"] == 3:
                os.kill(os.getpid(), sent)
    assert results.newest(tmp_path) == 3 and handlers() == before
    assert [record["round"] for record in run(how)[0]] == [4, 5, 6]


def test_a_signal_that_comes_when_all_is_done_is_forgotten(tmp_path):
    how = config(tmp_path / "a", 2)
    with fedmpi.Run(how, comm_=Solo()) as first:
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
            with fedmpi.Run(how, comm_=Solo()) as started:
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
    with pytest.raises(KeyboardInterrupt) as caught, fedmpi.Run(config(tmp_path), comm_=Solo()) as started:
        for _ in started:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.__notes__ == [f"no round is on disk in {tmp_path} yet; the same command starts again"]


def test_a_ctrl_c_that_is_ignored_or_somebody_elses_stays_so(tmp_path):
    for handler in (signal.SIG_IGN, lambda number, frame: None):
        before = signal.signal(signal.SIGINT, handler)
        try:
            with fedmpi.Run(config(tmp_path), comm_=Solo()) as started:
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
    """What an exception that nobody catches comes to in a process of one rank that has connected; and what Python's own
    hook was given."""
    given = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: given.append(error))
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)  # the process goes on after all
    comm._abort_on_uncaught(Solo())
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
    line = line.replace("fedmpi", " ".join(command))
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | ENVIRONMENT | more
    return subprocess.Popen(["bash", "-c", line], cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True)


def test_output_that_nobody_takes_and_a_home_that_is_not_there_end_no_run(tmp_path):
    """And signals without end after the stop was agreed, in a program of one's own, do not change its exit code."""
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
