"""Stops, signals, kills and torn files: nothing is lost, and the bits are those of the undisturbed run."""

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress

import pytest
from support.mpi import FEDMPI, cpu_seconds, until
from support.programs.place import STEPS, TEN_MINUTES, Place, own_lines

from fedmpi import sealed

# ---------------------------------------------------------------- stops: exit 3, the last whole round on disk


@pytest.mark.parametrize(("how", "rank", "whole"), (("SIGUSR1", 1, 1), ("SIGTERM", 0, 0)))
def test_signal_in_a_ten_minute_round(place: Place, undisturbed: str, how: str, rank: int, whole: int) -> None:
    """One rank gets the signal, again and again until it is gone; all end during the round after `whole`."""
    with place.start(2, how, **TEN_MINUTES, AFTER=str(whole * STEPS)) as job:
        pid = place.busy(job, how)[rank]
        with suppress(ProcessLookupError):
            while job.process.poll() is None:
                os.kill(pid, getattr(signal, how))
                time.sleep(0.02)
        done = job.wait(20)
    assert done.rc == 3, done.tails
    on_disk = f"round {whole} is on disk; the same command resumes"
    stopped = f"fedmpi: stopped in round {whole + 1}: {how} (rank {rank}); {on_disk}"
    assert own_lines(done) == [stopped], done.tails
    assert place.rounds(how) == [whole]
    done = place.train(3, how)
    assert done.rc == 0 and (f"resumed after round {whole}" in done.out) == (whole > 0), done.tails
    assert place.sha(how) == undisturbed


def test_fedmpi_stop_in_a_ten_minute_round(place: Place, undisturbed: str) -> None:
    """Rank 0, which must see the file, only waits; meanwhile no second job gets the directory."""
    dedicated = "server.dedicated=true"
    with place.start(3, "stop", dedicated, **TEN_MINUTES, AFTER=str(STEPS)) as job:
        place.busy(job, "stop", idle=1)
        second = place.train(1, "stop")
        assert second.rc == 2, second.tails
        assert own_lines(second) == ["fedmpi: out: another job is training in stop"], second.tails
        subprocess.run([FEDMPI, "stop", "stop"], cwd=place.folder, check=True, timeout=30, capture_output=True)
        done = job.wait(20)
    assert done.rc == 3, done.tails
    on_disk = "round 1 is on disk; the same command resumes"
    assert own_lines(done) == [f"fedmpi: stopped in round 2: fedmpi stop (rank 0); {on_disk}"], done.tails
    assert place.rounds("stop") == [1]
    assert place.train(2, "stop", dedicated).rc == 0
    assert place.sha("stop") == undisturbed


def test_ctrl_c_at_mpirun_says_what_remains(place: Place) -> None:
    """The launcher gives its ranks half a second, and passes on none of their output in it."""
    slow = 'server.optimizer={name: "mine:Late"}'  # ranks wait for a checkpoint for a share of the round
    with place.start(2, "interrupted", "checkpoint.every=1", slow, STEP_S="5", **TEN_MINUTES, AFTER=str(STEPS)) as job:
        place.busy(job, "interrupted")
        until(lambda: place.rounds("interrupted") == [1], 60)
        os.kill(job.process.pid, signal.SIGINT)
        done = job.wait(20)
    assert own_lines(done) == ["fedmpi: ended by the launcher: round 1 is on disk; the same command resumes"], (
        done.tails
    )
    assert place.rounds("interrupted") == [1]


@pytest.mark.parametrize("moment_s", (0.2, 0.6, 1.2))
def test_signalled_while_it_starts(place: Place, moment_s: float) -> None:
    """A batch system may signal every process of a job that has just begun to import."""
    out = f"early-{moment_s}"
    with place.start(2, out, **TEN_MINUTES) as job:
        until(lambda: len(job.ranks()) == 2, 20)
        waiting = set(job.ranks().values())
        deadline = time.monotonic() + 60
        while waiting and time.monotonic() < deadline:
            for pid in [pid for pid in waiting if cpu_seconds(pid) >= moment_s]:
                os.kill(pid, signal.SIGUSR1)
                waiting.remove(pid)
            time.sleep(0.005)
        done = job.wait(40)
    assert done.rc == 3, done.tails
    assert own_lines(done)[0].startswith("fedmpi: stopped in round 1: SIGUSR1"), done.tails
    assert place.rounds(out) == [0]


# ---------------------------------------------------------------- nothing is lost


def test_killed_at_any_moment(place: Place, undisturbed: str) -> None:
    """kill -9 of the whole job, three times over one run: the bits are those of the undisturbed one."""
    moments = random.Random(4)
    seen = []
    for _ in range(3):
        with place.start(2, "killed", "checkpoint.every=1", SLEEP_S="0.0005") as job:
            began = time.time()
            ranks = place.folder / "killed" / "ranks.json"
            until(lambda: ranks.exists() and ranks.stat().st_mtime > began, 60, lambda: job.so_far().tails)  # noqa: B023
            time.sleep(moments.uniform(0.0, 2.5))
            job.kill()
        seen.append(place.rounds("killed"))
    done = place.train(3, "killed", "checkpoint.every=1")
    assert (done.rc, place.sha("killed")) == (0, undisturbed), (seen, done.tails)


@pytest.mark.parametrize(("what", "name"), (("torn", "rank-0001.h5"), ("corrupt", "server.h5")))
def test_a_bad_checkpoint_is_skipped(place: Place, undisturbed: str, what: str, name: str) -> None:
    shutil.copytree(place.folder / "undisturbed", place.folder / what)
    with open(sealed.folder_of(place.folder / what, 4) / name, "r+b") as file:
        if what == "torn":
            file.truncate(100)
        else:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
    done = place.train(2, what, "checkpoint.every=1")
    assert done.rc == 0 and "resumed after round 3" in done.out, done.tails
    lines = own_lines(done)
    assert len(lines) == 1 and "skipped checkpoint of round 4" in lines[0] and what in lines[0], done.tails
    assert place.sha(what) == undisturbed
