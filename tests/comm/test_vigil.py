"""How long a rank waits for the others, with a simulated clock; and real ranks that fall silent."""

import _thread
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from support.programs.place import TEN_MINUTES, Place, own_lines

from fedmpi.comm import MpiComm, vigil
from fedmpi.comm.vigil import SET_UP, Vigil


@pytest.fixture
def clock(monkeypatch):
    """Time that moves only on command; no thread watches it."""
    at = SimpleNamespace(now_s=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: at.now_s)
    monkeypatch.setattr(_thread, "start_new_thread", lambda *args: None)
    return at


def waiting(rank, clock, num_ranks=3, timeout_s=10.0):
    watch = Vigil(rank, ["here"] * num_ranks, [os.getpid()] * num_ranks, lambda why: None)
    watch.set_up(timeout_s)
    watch.round(0.0)
    return watch, SimpleNamespace(depth=1, calls=1, sleeps_while_waiting=False)


def passes(watch, lane, clock, seconds, speak=(), trains=False, named=[]):  # noqa: B006
    """The first message within so many seconds in which these ranks are heard."""
    for _ in range(int(seconds)):
        clock.now_s += 1.0
        watch.pulse(trains=False)
        for rank in speak:
            watch.hear(rank, trains)
        if (late := watch.judge(lane)) is not None:
            named.append(late.ranks)
            return str(late)
    return ""


def test_a_rank_that_falls_silent_is_named(clock):
    watch, lane = waiting(0, clock)
    assert passes(watch, lane, clock, 60, speak=(1, 2), trains=True) == ""
    assert "silent: rank 2 on here" in passes(watch, lane, clock, 12, speak=(1,), trains=True, named=(ranks := []))
    assert ranks == [(2,)]


def test_a_process_of_another_host_with_the_same_name_is_not_looked_for_here(monkeypatch):
    monkeypatch.setattr(vigil, "answers", lambda host: True)
    monkeypatch.setattr(_thread, "start_new_thread", lambda *args: None)
    pids = [os.getpid(), 2**22 + 1]  # the second runs on no host like this
    assert Vigil(0, ["node"] * 2, pids, lambda why: None, [b"a", b"a"])._gone() == [1]
    assert Vigil(0, ["node"] * 2, pids, lambda why: None, [b"a", b"b"])._gone() == []


def test_others_listen_to_rank_0(clock):
    watch, lane = waiting(1, clock)
    assert passes(watch, lane, clock, 60, speak=(0,), trains=True) == ""
    assert "silent: rank 0 on here" in passes(watch, lane, clock, 12)


def test_ranks_that_wait_for_different_things_do_not_wait_for_ever(clock):
    watch, lane = waiting(0, clock)
    assert passes(watch, lane, clock, 9, speak=(1, 2)) == ""
    assert "nobody trains; every rank responds" in passes(watch, lane, clock, 5, speak=(1, 2))


def test_the_longest_round_and_the_set_up_have_more_time(clock):
    watch, lane = waiting(0, clock)
    watch.round(30.0)
    watch.round(5.0)
    assert watch.limit_s == 40.0
    assert passes(watch, lane, clock, 39, speak=(1,), trains=True) == ""
    watch.set_up(10.0)
    assert watch.limit_s == SET_UP * 10.0


def test_who_did_not_listen_does_not_say_that_others_were_silent(clock):
    """A user's slow code between two rounds, on all ranks; or a process that was stopped itself."""
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
    lane = SimpleNamespace(depth=0, calls=0, sleeps_while_waiting=False)
    watch.set_up(0.2)
    watch.round(0.0)
    watch.lanes.append(lane)
    assert not told.wait(0.5), said
    lane.depth = 1
    for _ in range(8):  # it makes progress
        time.sleep(0.1)
        lane.calls += 1
    for _ in range(8):  # it polls
        time.sleep(0.1)
        watch.pulse(trains=False)
    assert not said
    assert told.wait(10) and "inside one call" in str(said[0]) and "silent: rank 1 on here" in str(said[0])
    assert said[0].ranks == (1,)
    watch.lanes.clear()


def test_hosts_that_do_not_answer_do_not_hold_up_the_end(clock, monkeypatch):
    asked = []

    def answers(host):
        asked.append(host)
        clock.now_s += 6.0  # while its name is looked up
        return False

    monkeypatch.setattr(vigil, "answers", answers)
    told = []
    watch = Vigil(0, ["here", *(f"far-{n}" for n in range(99))], [os.getpid()] * 100, told.append)
    assert "silent: rank 1 on far-0, rank 2 on far-1" in str(watch._timeout("has waited", []))
    assert asked == ["far-0", "far-1"]


def test_a_rank_that_cannot_watch_ends_the_job_before_others_wait_for_it(monkeypatch):
    def refuses(*arguments):
        raise RuntimeError("can't start new thread")

    said = []
    monkeypatch.setattr(_thread, "start_new_thread", refuses)
    rank = SimpleNamespace(size=2, rank=1, hosts=("a", "a"), machines=(b"a", b"a"))
    vars(rank).update(gather=lambda row: [row, row], _give_up=said.append)
    MpiComm.keep_vigil(rank)
    assert [str(error) for error in said] == [
        "rank 1 cannot start a thread: can't start new thread; raise ulimit -v or -u"
    ]


def test_a_part_that_is_given_back_is_watched_no_longer():
    """A group of regions of regions is watched until then."""
    whole, region, across = (MpiComm.__new__(MpiComm) for _ in range(3))
    watch = SimpleNamespace(lanes=[whole, region, across])
    for one, above, groups in ((whole, None, [region]), (region, whole, [across]), (across, region, [])):
        made = {"_world": (freed := SimpleNamespace(Free=lambda: None)), "_control": freed, "_node": None}
        made |= {"_above": above, "_groups": groups, "_twins": [], "_windows": [], "depth": 0, "calls": 0}
        vars(one).update(made, _vigil=None if above else watch, _beat_s=1e9)
        assert one._watching is watch
    whole.free_parts()
    assert watch.lanes == [whole] and (whole._groups, region._groups) == ([], [])


@pytest.mark.parametrize("silent", (1, 0))
def test_a_stopped_rank_ends_the_job(place: Place, silent: int) -> None:
    """Inside ten minutes of work, of which the others report that they do it. A rank judges nobody after a pause of 0.3
    timeouts, which busy cores must not make."""
    with place.start(3, f"silent-{silent}", "comm.timeout_s=3", **TEN_MINUTES) as job:
        os.kill(place.busy(job, f"silent-{silent}")[silent], signal.SIGSTOP)
        began_s = time.monotonic()
        done = job.wait(90)
    assert time.monotonic() - began_s < 3 * SET_UP + 20  # it may have been stopped before the first round began
    assert done.rc == 1, done.tails
    lines = [line for line in own_lines(done) if not line.startswith("no round is on disk in ")]  # how to resume
    assert lines and all(f"silent: rank {silent} on " in line for line in lines), done.tails


def test_long_training_is_not_silence(place: Place) -> None:
    """Rank 0 only waits, far longer than it would for a silent rank."""
    few = ("comm.timeout_s=1", "server.dedicated=true", "rounds=1", "local.steps=40")
    done = place.train(2, "patient", *few, SLEEP_S="0.1")
    assert done.rc == 0 and done.seconds > 4 * 40 * 0.1 > 1.5 * SET_UP, done.tails
