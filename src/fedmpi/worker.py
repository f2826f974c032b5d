"""Background threads, started once at set-up and given one job after the other.

A thread started when memory is exhausted may never signal that it runs, and its starter then waits forever. So no
thread is started during a run.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable

from fedmpi.errors import FedmpiError

START_S = 20.0  # limit for a new thread to begin


class Worker:
    """One thread: `start` gives it a job, `wait` waits for it, `error` holds its exception. Raises FedmpiError if the
    thread cannot be started."""

    def __init__(self, name: str) -> None:
        self.error: BaseException | None = None  # raised by the last job
        self.pending = False  # whether a job was started and not waited for
        self._job: Callable[[], None] | None = None
        self._given, self._busy = _thread.allocate_lock(), _thread.allocate_lock()
        self._closed = False
        self._given.acquire()
        self._busy.acquire()
        # Not threading.Thread, whose `start` waits without a limit.
        try:
            _thread.start_new_thread(self._run, ())
        except (RuntimeError, MemoryError) as error:
            raise FedmpiError(f"cannot start the thread '{name}': {error}; raise ulimit -v or -u") from None
        if not self._busy.acquire(timeout=START_S):
            raise FedmpiError(f"the thread '{name}' does not begin: no memory left? raise ulimit -v")
        self._busy.release()

    def _run(self) -> None:
        self._busy.release()  # it has begun
        while True:
            self._given.acquire()
            if self._job is None:
                self._busy.release()
                return
            try:
                self._job()
            except BaseException as error:
                self.error = error
            self._job = None  # an idle thread holds no tensors
            self._busy.release()

    def start(self, job: Callable[[], None]) -> None:
        """Start `job`, after waiting for the one before."""
        self._busy.acquire()
        self.error, self.pending = None, True
        self._job = job
        self._given.release()

    def wait(self, limit_s: float = -1) -> bool:
        """Wait for the job, at most `limit_s` seconds (negative: no limit). True if it is over."""
        if not self._busy.acquire(timeout=limit_s):
            return False
        self._busy.release()
        self.pending = False
        return True

    def close(self, limit_s: float = -1) -> None:
        """End the thread once its job is over, if that is within `limit_s` seconds (negative: no limit)."""
        if not self._closed and self._busy.acquire(timeout=limit_s):
            self._closed, self.pending = True, False
            self._given.release()
