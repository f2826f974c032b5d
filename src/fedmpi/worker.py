"""Threads that work behind training: started once, at set-up, and given one job after the other.

A thread that is started when there is no memory left may never say that it has begun, and its starter waits for ever.
So none is started once a run is under way: what a job needs besides its own work is there.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable

from fedmpi.errors import FedmpiError

START_S = 20.0  # how long a new thread may take to begin


class Worker:
    """One thread; `start` gives it a job, `wait` tells whether it is done, `error` what came of it."""

    def __init__(self, name: str) -> None:
        self.error: BaseException | None = None  # of the last job
        self.pending = False  # was a job given that nobody has waited for yet?
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
        """Begin `job` once the one before is over."""
        self._busy.acquire()
        self.error, self.pending = None, True
        self._job = job
        self._given.release()

    def wait(self, limit_s: float = -1) -> bool:
        """Is the job over, by now or within `limit_s`? Without a limit: once it is."""
        if not self._busy.acquire(timeout=limit_s):
            return False
        self._busy.release()
        self.pending = False
        return True

    def close(self, limit_s: float = -1) -> None:
        """Let the thread end once its job is over, if that is within `limit_s`; it takes no other."""
        if not self._closed and self._busy.acquire(timeout=limit_s):
            self._closed, self.pending = True, False
            self._given.release()
