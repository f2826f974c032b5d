"""Ends a rank whose silo has stopped making progress (`comm.grace_s`).

The vigil (comm/vigil.py) watches ranks from outside and names those without a heartbeat. The watchdog watches from
inside: a thread of the rank notices when a silo that trains starts no new batch. It prints where the silo hangs and
ends the process. Then the other ranks heal, or the supervisor restarts the job.

A call that holds the interpreter lock stops this thread too; only the vigil of the other ranks notices that.
"""

from __future__ import annotations

import _thread
import contextlib
import faulthandler
import os
import signal
import time

from fedmpi.comm import Comm
from fedmpi.output import flush, say

TICK_S = 1.0  # longest time between two checks


class Watchdog:
    """Watches this rank's training. The thread starts at once and runs until `end`."""

    def __init__(self, grace_s: float, comm: Comm, heals: bool) -> None:
        """`grace_s`: longest time without a batch, in seconds. `heals`: the run goes on without lost ranks, if
        MPI can."""
        self.comm = comm  # of the remaining ranks
        self._grace_s, self._heals = grace_s, heals
        self._what = ""  # the silo that trains, for the message; empty: none
        self._beats = 0
        self._over = False
        _thread.start_new_thread(self._run, ())

    def begin(self, what: str) -> None:
        """Call when a silo starts to train; `what` names it in the message."""
        self._what, self._beats = what, self._beats + 1

    def beat(self) -> None:
        """Call when a batch starts."""
        self._beats += 1

    def rest(self) -> None:
        """Call when no silo trains any more."""
        self._what = ""

    def end(self) -> None:
        """Stop the thread."""
        self._over, self._what = True, ""

    def _run(self) -> None:
        tick_s = min(TICK_S, self._grace_s / 10)
        seen, silent_s, before_s = -1, 0.0, time.monotonic()
        while not self._over:
            time.sleep(tick_s)
            now_s = time.monotonic()
            passed_s, before_s = min(now_s - before_s, 2 * tick_s), now_s  # time while suspended does not count
            what, beats = self._what, self._beats
            silent_s = silent_s + passed_s if what and beats == seen else 0.0
            seen = beats
            if silent_s > self._grace_s:
                self._bite(what)

    def _bite(self, what: str) -> None:
        rank, host = self.comm.rank, self.comm.hosts[self.comm.rank]
        say(f"fedmpi: rank {rank} on {host}: {what}: no batch for {self._grace_s:g} s (comm.grace_s)", error=True)
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(file=2)
        flush()
        if self._heals and self.comm.outlives_ranks:
            os.kill(os.getpid(), signal.SIGKILL)
        self.comm.abort(1)
