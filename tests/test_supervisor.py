"""The supervisor with a simulated launcher: what it trusts, what it ends, when it starts again."""

import fcntl
import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.mpi import PROGRAMS
from typer.testing import CliRunner

from fedmpi import checkpoint, fencing, launcher, remains, stopping, supervisor
from fedmpi.cli import app
from fedmpi.comm import SoloComm
from fedmpi.config import Config
from fedmpi.errors import ConfigError, FedmpiError, Stopped
from fedmpi.launchline import LaunchLine
from fedmpi.supervisor import Options, Progress, Supervisor, supervise

FAKE = PROGRAMS / "fake_launcher.py"
ROUNDS = 6


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Milliseconds where people wait seconds; a fake checkpoint has only a manifest."""
    for name, value in {"POLL_S": 0.02, "BACK_OFF_S": 0.0, "LEAVE_S": 0.1, "FREE_S": 0.1, "ONCE_S": 0.1}.items():
        monkeypatch.setattr(supervisor, name, value)
    monkeypatch.setattr(remains, "TERM_S", 0.2)
    monkeypatch.setattr(checkpoint, "newest", lambda root, silos: max(checkpoint.sealed_rounds(root), default=-1))


def supervised(out, words, **options):
    options = {"grace_s": 1.0, **options}
    line = [sys.executable, "-IS", str(FAKE), str(out), words]
    return Supervisor(Config(rounds=ROUNDS, out=str(out)), ["true"], line, Options(**options))


def events(out, *names):
    rows = [json.loads(line) for line in (out / "supervisor.jsonl").read_text().splitlines()]
    return [row for row in rows if not names or row["event"] in names]


def kinds(out):
    """Without the event for which a fast launcher may leave no time."""
    return [row["event"] for row in events(out) if row["event"] != "trains"]


def ask(out, number, times=1):
    """Send this process, the supervisor, a signal once the first start has come so far."""

    def work():
        for sent in range(times):
            while not (out / "pid-1").exists() or (sent and "asked" not in kinds(out)):
                time.sleep(0.02)
            time.sleep(0.2 * sent)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def gone(pid_file):
    """Or its parent has not yet reaped it."""
    pid = int(pid_file.read_text())
    return not remains.alive(remains.Rank(0, "", pid, launcher.born(pid)))


def test_it_ends_when_all_rounds_are_on_disk(tmp_path, capfd):
    supervised(tmp_path, "6:0").run()
    assert kinds(tmp_path) == ["started", "ended", "done", "no model", "goodput"]
    (told,) = events(tmp_path, "goodput")
    assert told["useful_s"] == pytest.approx(0.06)
    assert told["goodput"] == pytest.approx(0.06 / told["seconds"], rel=0.02)  # the file has milliseconds
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) in (5, 6) and all(line.startswith("fedmpi run: ") for line in lines)
    supervised(tmp_path, "unused,0:0").run()  # once more: the ranks say that there is nothing to do
    with pytest.raises(ConfigError, match="refuse"):  # or that it is another run's directory
        supervised(tmp_path, "unused,unused,0:2").run()


def test_a_quiet_one_prints_warnings_only(tmp_path, capfd, monkeypatch):
    logged = []
    monkeypatch.setattr("fedmpi.output.note", logged.append)
    monkeypatch.setattr("fedmpi.supervisor.note", logged.append)
    supervised(tmp_path, "2+3:0,4:0", shown=("--quiet",)).run()
    first, last = capfd.readouterr().err.splitlines()
    assert "lost 3 rounds and the one under way" in first and "model.safetensors is missing" in last
    assert logged == [f"fedmpi run: {row['text']}" for row in events(tmp_path)]


def test_exit_0_is_not_believed_and_another_code_is_no_failure_after_the_last_commit(tmp_path):
    supervised(tmp_path, "2+3:0,4:1").run()
    first, second = events(tmp_path, "died", "ended")
    assert (first["event"], first["code"], first["lost"], first["round"]) == ("died", 0, 3, 2)
    assert (second["event"], second["code"], second["round"]) == ("ended", 1, 6)
    assert [row["text"].partition(" (")[0] for row in events(tmp_path, "started", "restarted")] == [
        "started from the beginning",
        "restarted from round 2",
    ]
    assert "lost 3 rounds and the one under way" in first["text"]


@pytest.mark.parametrize("how", ["hang", "deaf"])
def test_a_start_that_makes_no_progress_is_ended(tmp_path, how):
    supervised(tmp_path, f"2:{how},4:0").run()
    (hung,) = events(tmp_path, "hung")
    assert hung["code"] is None and hung["round"] == 2 and gone(tmp_path / "pid-1")


def test_a_start_has_longer_before_its_first_round(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "SET_UP", 3)
    began_s = time.monotonic()
    supervised(tmp_path, "0:hang,6:0", grace_s=0.2).run()
    assert time.monotonic() - began_s > 0.6 and kinds(tmp_path)[:2] == ["started", "hung"]
    assert "trains" in [row["event"] for row in events(tmp_path)]  # which is no round yet


def test_a_launcher_that_does_not_end_after_the_last_round_is_ended(tmp_path):
    supervised(tmp_path, "6:finalize", grace_s=60.0).run()
    assert kinds(tmp_path) == ["started", "hung", "done", "goodput"] and gone(tmp_path / "pid-1")


def test_what_a_launcher_leaves_behind_is_ended(tmp_path):
    supervised(tmp_path, "2:child,4:0").run()
    assert gone(tmp_path / "child")
    assert events(tmp_path, "died")[0]["behind"] == 1


def test_a_launcher_that_is_killed_is_started_again(tmp_path):
    supervised(tmp_path, "3:kill,3:0").run()
    assert events(tmp_path, "died")[0]["code"] == -signal.SIGKILL


def test_it_gives_up_after_so_many_starts_without_a_newer_checkpoint(tmp_path):
    with pytest.raises(
        FedmpiError, match=r"2 starts in a row brought no newer checkpoint; round 3 is on disk"
    ) as error:
        supervised(tmp_path, "1:1,0+2:1,2:1,0:1,0:1,3:0", starts=2).run()
    assert error.value.exit_code == 1 and fencing.highest(tmp_path) == 5
    assert kinds(tmp_path)[-2:] == ["gave up", "goodput"]


def test_a_wait_before_a_start_doubles_with_starts_without_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "BACK_OFF_S", 60.0)
    waits = []
    monkeypatch.setattr(Supervisor, "_rest", lambda self, seconds: waits.append(seconds))
    supervised(tmp_path, "1:1,0:1,0:1,0:1,1:1,4:0").run()
    assert waits == [0, 0, 1, 2, 4, 0]


def test_a_bad_configuration_is_not_tried_again(tmp_path):
    with pytest.raises(ConfigError, match="the ranks refuse the configuration"):
        supervised(tmp_path, "0:2,6:0").run()
    assert fencing.highest(tmp_path) == 1
    supervised(tmp_path, "unused,2:2,4:0").run()  # a start that made progress had none


def test_a_stop_is_passed_on_and_final(tmp_path):
    ask(tmp_path, signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=r"^stopped on request \(SIGTERM\); round 2 is on disk; the same") as error:
        supervised(tmp_path, "2:asked,4:0", grace_s=30.0).run()
    assert error.value.exit_code == 3 and signal.getsignal(signal.SIGTERM) == before
    assert fencing.highest(tmp_path) == 1 and (tmp_path / "stop").read_text() == "fedmpi run received SIGTERM"
    assert events(tmp_path, "asked")[0]["text"].startswith("SIGTERM: the ranks stop at the next batch; a second")
    watch = stopping.Watch(SoloComm(), tmp_path)
    assert watch.look() == stopping.STOP and watch.reason == "fedmpi run received SIGTERM"
    assert kinds(tmp_path) == ["started", "asked", "ended", "stopped", "goodput"]


def test_a_second_stop_ends_the_ranks_at_once_and_one_without_a_checkpoint_is_a_failure(tmp_path):
    asking = ask(tmp_path, signal.SIGINT, times=2)
    with pytest.raises(FedmpiError, match="no round is on disk") as error:
        supervised(tmp_path, "0:deaf", grace_s=30.0).run()
    asking.join(20)
    assert error.value.exit_code == 1 and gone(tmp_path / "pid-1")
    assert "ended at once" in events(tmp_path, "ended")[0]["text"]


def test_a_launcher_in_a_shell_script_gets_the_stop_and_the_script_lives(tmp_path):
    script = tmp_path / "launch.sh"
    script.write_text(f"#!/bin/sh\n{sys.executable} -IS {FAKE} {tmp_path} 2:asked,4:0\ncode=$?\nexit $code\n")
    script.chmod(0o755)
    run = supervised(tmp_path, "unused", grace_s=30.0)
    run._line = LaunchLine.of([str(script)])
    thread = ask(tmp_path, signal.SIGTERM)
    with pytest.raises(Stopped):
        run.run()
    thread.join()
    assert events(tmp_path, "ended")[0]["code"] == 3


def test_a_stop_that_somebody_else_asked_for_is_final_too(tmp_path):
    with pytest.raises(Stopped):
        supervised(tmp_path, "2:3,4:0").run()


def test_a_stop_is_final_if_the_launcher_has_another_exit_code(tmp_path, monkeypatch):
    file, watch, told = tmp_path / "events.jsonl", Supervisor._watch, '{"event": "stopped", "round": 2}\n'
    file.write_text(told)  # of an earlier start
    supervised(tmp_path, f"2:137,{ROUNDS}:0").run()
    assert fencing.highest(tmp_path) == 2

    def stopped(self, *args):
        file.write_text(file.read_text() + told)
        return watch(self, *args)

    monkeypatch.setattr(Supervisor, "_watch", stopped)
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "events.jsonl"
    file.write_text("")
    with pytest.raises(Stopped):
        supervised(tmp_path / "out", f"2:137,{ROUNDS}:0").run()


def test_a_directory_has_one_supervisor_and_no_other_job(tmp_path):
    first = supervised(tmp_path, "6:0")
    with first._locked(), pytest.raises(ConfigError, match="another supervisor runs"):
        supervised(tmp_path, "6:0").run()
    with supervised(tmp_path, "")._locked():
        pass
    with open(tmp_path / ".lock", "w") as job:
        fcntl.flock(job, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another job is training"):
            supervised(tmp_path, "6:0").run()
    assert fencing.highest(tmp_path) == 0


def test_a_supervisor_that_was_overtaken_starts_nothing_more(tmp_path, monkeypatch):
    """On a file system without locks."""
    started = Supervisor._one_start

    def overtaken(self):
        code = started(self)
        fencing.raise_epoch(tmp_path, {})
        return code

    monkeypatch.setattr(Supervisor, "_one_start", overtaken)
    with pytest.raises(ConfigError, match="another supervisor has taken over"):
        supervised(tmp_path, "1:1,5:0").run()


# ---------------------------------------------------------------- hosts


def test_hosts_that_do_not_answer_are_left_out_until_they_do(tmp_path, monkeypatch):
    answering = itertools.chain([{"a"}], itertools.repeat({"a", "b"}))
    now: set[str] = set()
    asked = []

    def lost(self):
        asked.append(1)
        now.clear()
        now.update(next(answering))
        return set(self._line.slots) - now

    monkeypatch.setattr(Supervisor, "_lost_hosts", lost)
    run = supervised(tmp_path, "2:1,4:0")
    run._line = LaunchLine.of([*run._line.words, "-n", "4", "--host", "a:2,b:2"])
    run.run()
    first, second = (row["text"] for row in events(tmp_path, "started", "restarted"))
    assert " -n 2 --host a:2 " in first and " -n 4 --host a:2,b:2 " in second
    assert events(tmp_path, "hosts")[0]["hosts"] == ["b"]
    assert len(asked) <= 3  # a start takes the answers that came while the one before was ended


def test_fewer_ranks_than_wanted_are_not_started(tmp_path, monkeypatch):
    monkeypatch.setattr(remains, "answers", lambda host, port: host == "a")
    run = supervised(tmp_path, "6:0", starts=3, min_ranks=3)
    run._line = LaunchLine.of([*run._line.words, "-n", "4", "--host", "a:2,b:2"])
    with pytest.raises(FedmpiError, match="3 starts in a row"):
        run.run()
    assert fencing.highest(tmp_path) == 0 and kinds(tmp_path).count("too few") == 3


def test_a_hostfile_is_written_anew(tmp_path):
    (tmp_path / "all").write_text("# ours\na\tslots=3\nb slots=1 max_slots=2\nc\n")
    line = LaunchLine.of(["mpirun", "-np", "5", "--hostfile", str(tmp_path / "all")])
    assert line.slots == {"a": 3, "b": 1, "c": 1}
    words, num_ranks = line.without({"b"}, tmp_path / "left")
    assert words == ["mpirun", "-np", "4", "--hostfile", str(tmp_path / "left")] and num_ranks == 4
    assert (tmp_path / "left").read_text() == "a\tslots=3\nc\n"
    assert line.without(set(), tmp_path / "unused") == (list(line.words), 5) and not (tmp_path / "unused").exists()
    assert LaunchLine.of(["mpirun", "--host=a,b"]).without({"a"}, tmp_path)[0] == ["mpirun", "--host=b"]
    with pytest.raises(ConfigError, match="hostfile nowhere"):
        LaunchLine.of(["mpirun", "--hostfile", "nowhere"])


# ---------------------------------------------------------------- ending leftover processes


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def write_ranks(root, *rows):
    names = ("rank", "host", "pid", "born")
    (root / "ranks.json").write_text(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))


def over():
    """A launcher that has ended."""
    child = subprocess.Popen(["true"], start_new_session=True)
    child.wait()
    return child


def test_a_rank_of_this_host_is_ended_by_its_number_and_start_time(tmp_path, sleeper):
    here, born = socket.gethostname(), launcher.born(sleeper.pid)
    write_ranks(tmp_path, (0, here, sleeper.pid, born + 1))
    assert remains.end(over(), remains.ranks_of(tmp_path)) == []
    assert sleeper.poll() is None  # another process has that number by now
    write_ranks(tmp_path, (0, here, sleeper.pid, born))
    child = over()
    assert remains.left_here(child, remains.ranks_of(tmp_path)) == 1
    threading.Thread(target=sleeper.wait).start()  # its parent reaps it
    assert remains.end(child, remains.ranks_of(tmp_path)) == [] and sleeper.wait() == -signal.SIGKILL


@pytest.mark.parametrize("way", ["ssh", "srun", "my-ssh"])
def test_ranks_of_other_hosts_are_ended_from_here(tmp_path, monkeypatch, sleeper, way):
    """Through a fake command that runs here."""
    script = tmp_path / way
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nfor last; do :; done\nexec sh -c "$last"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if way == "srun":
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    if way == "my-ssh":
        monkeypatch.setenv("FEDMPI_SSH", "my-ssh -p 2222")
    born = launcher.born(sleeper.pid)
    write_ranks(tmp_path, (0, "far", sleeper.pid, born + 1), (1, "farther", sleeper.pid, born + 1))
    assert remains.end(over(), remains.ranks_of(tmp_path)) == [] and sleeper.poll() is None
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
    write_ranks(tmp_path, (0, "far", sleeper.pid, born + 1), (1, "far", sleeper.pid, born))
    assert remains.end(over(), remains.ranks_of(tmp_path)) == [] and sleeper.wait(10) == -signal.SIGKILL
    call = shlex.split((tmp_path / "calls").read_text().splitlines()[-1].partition(" for p")[0])
    assert {"ssh": "far", "srun": "--nodelist=far", "my-ssh": "2222"}[way] in call


def test_a_host_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    (tmp_path / "ssh").write_text("#!/bin/sh\nexit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    write_ranks(tmp_path, (0, socket.gethostname(), 1, 1), (3, "far", 1, 1))
    assert [rank.rank for rank in remains.end(over(), remains.ranks_of(tmp_path))] == [3]


def test_hosts_are_asked_at_once_and_a_silent_one_is_not_waited_for(tmp_path, monkeypatch):
    together = threading.Barrier(4, timeout=20)

    def answers(host, port):
        together.wait()
        return (host, port) == ("near", 9)

    monkeypatch.setattr(remains, "answers", answers)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(remains, "_reach", lambda host, line: ["true"] if host == "near" else ["sleep", "600"])
    write_ranks(tmp_path, (0, "near", 1, 1), (1, "silent", 1, 1), (2, "near", 2, 1))
    assert [rank.rank for rank in remains.end(over(), remains.ranks_of(tmp_path))] == [1]


# ---------------------------------------------------------------- its input, and the command


def test_progress_is_what_is_new_in_the_directory(tmp_path):
    progress = Progress(tmp_path)
    assert not progress.look() and progress.commit == -1
    records = tmp_path / "metrics.jsonl"
    records.write_text('{"round": 1, "seconds": {"round": 2.5}}\n{"round": 2, "sec')
    assert progress.look() and not progress.look()
    assert (progress.record, progress.longest_s) == (1, 2.5)
    with open(records, "a") as file:
        file.write('onds": {"round": 0.5}}\n')
    assert progress.look() and (progress.record, progress.longest_s) == (2, 2.5)
    (tmp_path / "checkpoints" / "round-000002").mkdir(parents=True)
    assert not progress.look()  # unfinished
    (tmp_path / "checkpoints" / "round-000002" / "manifest.json").touch()
    assert progress.look() and progress.commit == 2
    (tmp_path / "new").write_text('{"round": 1, "seconds": {"round": 0.5}}\n')
    os.replace(tmp_path / "new", records)
    assert progress.look() and progress.record == 1
    assert progress.useful_s(0) == 0.5 and progress.useful_s(1) == 0.0


def test_a_line_of_its_own_trains_what_is_watched(tmp_path):
    (tmp_path / "c.yaml").write_text("rounds: 1\n")
    config = str(tmp_path / "c.yaml")
    with pytest.raises(
        ConfigError, match=r"the launcher line trains '.*c.yaml rounds=3', but fedmpi run was given '.*c.yaml'"
    ):
        supervise(config, [], ["mpirun", "fedmpi", "train", config, "rounds=3"], Options())
    with pytest.raises(ConfigError, match="'nowhere' is no command here"):
        supervise(config, [], ["nowhere", "-n", "2"], Options())
    with pytest.raises(ConfigError, match="cannot read"):
        supervise(str(tmp_path / "none.yaml"), [], ["mpirun"], Options())


def test_what_train_prints_is_passed_on(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("rounds: 1\n")
    config, log, commands = str(tmp_path / "c.yaml"), str(tmp_path / "log"), []
    monkeypatch.setattr(Supervisor, "run", lambda self: commands.append(self._command))
    monkeypatch.setattr("fedmpi.cli.training.keep_log", lambda path: commands.append(path))
    options = ["--quiet", "--json", "--progress", "minute", "--log-file", log]
    done = CliRunner().invoke(app, ["run", config, *options, "rounds=2", "--allow", "mine", "--", sys.executable])
    assert done.exit_code == 0, done.output
    words = ["train", "--progress", "minute", "--quiet", "--json", "--log-file", log, "--allow", "mine", config]
    assert commands[0] == Path(log) and commands[1][-len(words) - 1 :] == [*words, "rounds=2"]
    line = [sys.executable, "fedmpi", "train", "--quiet", f"--log-file={log}", "--progress", "minute", config]
    supervise(config, [], line, Options())
    assert commands[2] == []
    with pytest.raises(ConfigError, match="--json: the launcher line has its own command; give the option to that"):
        supervise(config, [], line, Options(shown=("--json",)))


@pytest.mark.parametrize("as_is", [False, True])
def test_the_command_is_appended_with_its_epoch_unless_the_line_has_one(tmp_path, as_is):
    supervised(tmp_path, "6:0", as_is=as_is).run()
    (started,) = events(tmp_path, "started")
    assert started["text"].endswith(" 6:0" if as_is else " 6:0 env FEDMPI_EPOCH=1 true")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("srun --mpi=pmix", "srun --nodelist=n1,n3 --nodes=2 --ntasks=3 --mpi=pmix"),
        ("srun -n 5 x", "srun --nodelist=n1,n3 --nodes=2 --ntasks=3 -n 3 x"),
        ("srun -N3 -n5 x", "srun --nodelist=n1,n3 --nodes=2 --ntasks=3 -N2 -n3 x"),
        ("srun --nodes=3 -N 3 x", "srun --nodelist=n1,n3 --nodes=2 --ntasks=3 --nodes=2 -N 2 x"),
        ("mpirun", "mpirun --host n1:2,n3:1"),
        ("/opt/bin/mpiexec -n 5", "/opt/bin/mpiexec -machinefile left -n 3"),
    ],
)
def test_nodes_of_a_slurm_job_can_be_left_out(tmp_path, monkeypatch, line, expected):
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$3" = "n[1-3]" ] && printf "n1\\nn2\\nn3\\n"\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2(x2),1")
    found = LaunchLine.of(line.split())
    assert found.of_job and found.slots == {"n1": 2, "n2": 2, "n3": 1} and found.num_ranks == 5
    monkeypatch.chdir(tmp_path)
    assert found.without({"n2"}, Path("left")) == (expected.split(), 3)
    assert "machinefile" not in expected or Path("left").read_text() == "n1:2\nn3:1\n"
    assert found.without((), tmp_path) == (line.split(), 5)
    assert not LaunchLine.of(["mpirun", "--host", "a:2"]).of_job and not LaunchLine.of(["env", "srun"]).of_job
    monkeypatch.setenv("SLURM_HET_SIZE", "2")
    assert not LaunchLine.of(line.split()).of_job


def test_a_node_answers_by_its_probe(tmp_path, monkeypatch):
    (tmp_path / "srun").write_text('#!/bin/sh\nfor w; do [ $w != --nodelist=n2 ] || exit 1; done\neval "$8"\n')
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert remains.answering(["n1", "n2", "n3"]) == {"n1", "n3"}
    monkeypatch.setenv("FEDMPI_PROBE", "false")
    assert remains.answering(["n1", "n2"]) == {"n1", "n2"}  # none: srun itself is at fault
