"""`fedmpi run` with a real mpirun: ranks, the launcher and the supervisor itself are killed or stopped."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.mpi import ENVIRONMENT, FAST, FEDMPI, OTHERS, absent, launcher, until
from support.programs.place import Place

from fedmpi import remains, stopping

SLOW = {"SLEEP_S": "0.002"}  # per batch; a round of two silos takes two seconds


@contextlib.contextmanager
def supervised(place: Place, out: str, *overrides: str, grace_s: float = 60.0, ranks: int = 2, **env: str):
    """`fedmpi run` on `ranks` ranks; all its processes are gone when the block ends."""
    if FAST:
        pytest.skip("starts ranks, which FEDMPI_FAST leaves out")
    if not launcher():
        absent("mpi", "no mpirun beside Python nor on PATH")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
    command = [FEDMPI, "run", "--grace", str(grace_s), *place.command(out, *overrides)[2:]]
    with open(place.folder / f"{out}.log", "w+") as log:
        process = subprocess.Popen(
            [*command, "--", *launcher(), "-n", str(ranks)],
            cwd=place.folder,
            env={**clean, **ENVIRONMENT, **env},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.kill()  # the kernel sends its launcher SIGTERM
            process.wait()
            until(lambda: stopping.is_training(place.folder / out) is not True, 20)


def log_of(place: Place, out: str) -> str:
    return (place.folder / f"{out}.log").read_text()


def events(place: Place, out: str) -> list[dict]:
    file = place.folder / out / "supervisor.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def trains(place: Place, out: str) -> dict[int, int]:
    """Process ids by rank, once a round is on disk."""
    until(lambda: max(place.rounds(out), default=0) >= 1, 120, lambda: log_of(place, out))
    return {row["rank"]: row["pid"] for row in json.loads((place.folder / out / "ranks.json").read_text())}


def mpirun_of(pid: int) -> int:
    """The launcher that is the parent of a rank."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    name = Path(f"/proc/{parent}/comm").read_text()
    assert name.startswith(("mpirun", "prterun", "hydra")), name
    return parent


@pytest.mark.parametrize("what", ["rank", "launcher", "hang"])
def test_it_starts_again_from_the_last_commit_with_the_bits_of_an_undisturbed_run(
    place: Place, undisturbed: str, what: str
) -> None:
    out = f"supervised-{what}"
    with supervised(place, out, "checkpoint.every=1", grace_s=3.0, **SLOW) as process:
        ranks = trains(place, out)
        left = remains.ranks_of(place.folder / out)
        if what == "rank":
            os.kill(ranks[1], signal.SIGKILL)
        elif what == "launcher":
            os.kill(mpirun_of(ranks[0]), signal.SIGKILL)
        else:
            os.kill(ranks[1], signal.SIGSTOP)
        assert process.wait(200) == 0, log_of(place, out)
    assert place.sha(out) == undisturbed
    told = [row["event"] for row in events(place, out)]
    ended = "hung" if what == "hang" else "died"
    assert told == ["started", "trains", ended, "restarted", "trains", "ended", "done", "goodput"], told
    assert events(place, out)[3]["round"] >= 1  # a committed round is not trained again
    assert not any(map(remains.alive, left))


def test_a_stop_reaches_the_ranks_and_the_supervisor_says_3(place: Place, undisturbed: str) -> None:
    out = "supervised-stop"
    with supervised(place, out, **SLOW) as process:
        until((place.folder / out / "metrics.jsonl").exists, 90, lambda: log_of(place, out))
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 3, log_of(place, out)
    assert place.rounds(out) and "is on disk; the same command resumes" in log_of(place, out)
    assert [row["event"] for row in events(place, out)] == ["started", "trains", "asked", "ended", "stopped", "goodput"]
    with supervised(place, out) as process:
        assert process.wait(90) == 0, log_of(place, out)
    assert place.sha(out) == undisturbed


def test_ranks_do_not_outlive_a_supervisor_that_is_killed(place: Place) -> None:
    out = "supervised-orphan"
    with supervised(place, out, "checkpoint.every=1", **SLOW) as process:
        trains(place, out)
        ranks = remains.ranks_of(place.folder / out)
        assert len(ranks) == 2 and all(map(remains.alive, ranks))
        process.kill()
        until(lambda: not any(map(remains.alive, ranks)), 20)


def test_a_bad_configuration_is_said_once(place: Place) -> None:
    with supervised(place, "supervised-bad", "local.lrr=1") as process:
        assert process.wait(60) == 2
    assert "did you mean 'lr'?" in log_of(place, "supervised-bad")
    with supervised(place, "supervised-missing", "data.root=nowhere") as process:
        assert process.wait(90) == 2, log_of(place, "supervised-missing")
    told = [row["event"] for row in events(place, "supervised-missing")]
    assert told == ["started", "died", "refused", "goodput"], log_of(place, "supervised-missing")
