"""How long a rank waits for the others, on a clock of its own; and real ranks that fall silent."""

import _thread
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from programs.place import TEN_MINUTES, Place, own_lines

from fedmpi.vigil import SET_UP, Vigil


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still until it is told to move; no thread looks at it."""
    at = SimpleNamespace(now_s=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: at.now_s)
    monkeypatch.setattr(_thread, "start_new_thread", lambda *args: None)
    return at


def waiting(rank, clock, num_ranks=3, timeout_s=10.0):
    watch = Vigil(rank, ["here"] * num_ranks, [os.getpid()] * num_ranks, lambda why: None)
    watch.set_up(timeout_s)
    watch.round(0.0)
    return watch, SimpleNamespace(depth=1, calls=1, patient=False)


def passes(watch, lane, clock, seconds, speak=(), trains=False):
    """The first thing that it has to say within so many seconds, in which these ranks are heard."""
    for _ in range(int(seconds)):
        clock.now_s += 1.0
        watch.pulse(trains=False)
        for rank in speak:
            watch.hear(rank, trains)
        if why := watch.judge(lane):
            return why
    return ""


def test_a_rank_that_falls_silent_is_named(clock):
    watch, lane = waiting(0, clock)
    assert passes(watch, lane, clock, 60, speak=(1, 2), trains=True) == ""
    assert "silent: rank 2 on here" in passes(watch, lane, clock, 12, speak=(1,), trains=True)


def test_others_listen_to_rank_0(clock):
    watch, lane = waiting(1, clock)
    assert passes(watch, lane, clock, 60, speak=(0,), trains=True) == ""
    assert "silent: rank 0 on here" in passes(watch, lane, clock, 12)


def test_ranks_that_wait_for_different_things_do_not_wait_for_ever(clock):
    watch, lane = waiting(0, clock)
    assert passes(watch, lane, clock, 9, speak=(1, 2)) == ""
    assert "nobody trains; every rank is there" in passes(watch, lane, clock, 5, speak=(1, 2))


def test_the_longest_round_and_the_set_up_have_more_time(clock):
    watch, lane = waiting(0, clock)
    watch.round(30.0)
    watch.round(5.0)
    assert watch.limit_s == 40.0
    assert passes(watch, lane, clock, 39, speak=(1,), trains=True) == ""
    watch.set_up(10.0)
    assert watch.limit_s == SET_UP * 10.0


def test_who_did_not_listen_does_not_say_that_others_were_silent(clock):
    """A user's own code between two rounds, on all ranks; or a process that was stopped itself."""
    watch, lane = waiting(0, clock)
    assert passes(watch, lane, clock, 5, speak=(1, 2), trains=True) == ""
    clock.now_s += 1000.0
    assert passes(watch, lane, clock, 5, trains=True) == ""


def test_a_call_that_blocks_is_given_up():
    told, said = threading.Event(), []

    def give_up(why):
        said.append(why)
        told.set()

    watch = Vigil(0, ["here", "here"], [os.getpid(), 2**22 + 1], give_up)
    lane = SimpleNamespace(depth=0, calls=0, patient=False)
    watch.set_up(0.2)
    watch.round(0.0)
    watch.lanes.append(lane)
    assert not told.wait(0.5), said
    lane.depth = 1
    for _ in range(8):  # it moves on
        time.sleep(0.1)
        lane.calls += 1
    for _ in range(8):  # it polls
        time.sleep(0.1)
        watch.pulse(trains=False)
    assert not said
    assert told.wait(10) and "inside one call" in said[0] and "silent: rank 1 on here" in said[0]
    watch.lanes.clear()


@pytest.mark.parametrize("silent", (1, 0))
def test_a_stopped_rank_ends_the_job(place: Place, silent: int) -> None:
    """In the midst of ten minutes of work, of which the others say that they do it."""
    with place.start(3, f"silent-{silent}", "comm.timeout_s=4", **TEN_MINUTES) as job:
        os.kill(place.busy(job, f"silent-{silent}")[silent], signal.SIGSTOP)
        began_s = time.monotonic()
        done = job.wait(90)
    assert time.monotonic() - began_s < 4 * SET_UP + 20  # it may have been stopped before the first round began
    assert done.rc == 1, done.tails
    lines = own_lines(done)
    assert lines and all(f"silent: rank {silent} on " in line for line in lines), done.tails


def test_long_training_is_not_silence(place: Place) -> None:
    """Rank 0 only waits, far longer than it would for one that says nothing."""
    few = ("comm.timeout_s=2", "server.dedicated=true", "rounds=1", "local.steps=40")
    done = place.train(2, "patient", *few, SLEEP_S="0.1")
    assert done.rc == 0 and done.seconds > 16, done.tails
