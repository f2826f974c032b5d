"""The threads behind a run: one each, started at set-up."""

import _thread
import threading
import time

import pytest

from fedmpi import worker
from fedmpi.errors import FedmpiError
from fedmpi.worker import Worker


def test_jobs_are_done_one_after_the_other_by_one_thread():
    behind, done = Worker("jobs"), []
    for number in range(3):
        behind.start(lambda number=number: done.append((number, threading.get_ident())))
    assert behind.wait() and not behind.pending
    behind.close()
    assert [number for number, _ in done] == [0, 1, 2]
    assert len({ident for _, ident in done}) == 1 and done[0][1] != threading.get_ident()


def test_what_a_job_raises_is_kept_until_the_next_one():
    behind, go = Worker("errors"), threading.Event()

    def fails():
        go.wait(20)
        raise MemoryError("none left")

    behind.start(fails)
    assert behind.pending and not behind.wait(0.01)
    go.set()
    assert behind.wait() and isinstance(behind.error, MemoryError)
    behind.start(lambda: None)
    assert behind.wait() and behind.error is None
    behind.close()


@pytest.mark.parametrize("how", ("does not begin", "cannot be started"))
def test_a_thread_without_memory_is_an_error_and_no_hang(monkeypatch, how):
    """Simulates RLIMIT_AS: the thread is created and dies before it reports, or is not created."""

    def no_thread(function, arguments):
        if how == "cannot be started":
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", no_thread)
    monkeypatch.setattr(worker, "START_S", 0.05)
    began_s = time.monotonic()
    with pytest.raises(FedmpiError, match="thread 'checkpoint'"):
        Worker("checkpoint")
    assert time.monotonic() - began_s < 5
