"""Ending early without a hang: signals, `fedmpi stop`, a silo that raised elsewhere.

A signal may reach one rank only, and a round may last an hour. So every rank looks, between batches, at three things:
its own signal flag, the file that `fedmpi stop DIR` writes (rank 0), and notices from other ranks. A notice only
hastens: whether the round goes on is decided by all ranks together, in the small collective that every rank enters at
the end of its training, whole or broken off. That is why nobody can be left waiting.

This module imports nothing heavy: handlers must stand before MPI and torch are imported, because a batch system may
signal a job while it starts.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmpi.comm import Solo

STOP_FILE = "stop"  # in the run directory

# What a rank says of its part of a round, and what a notice says; the larger one wins.
READY, STOP, FAILED = 0, 1, 2

_received: list[str] = []  # names of the stop signals this process got


def listen() -> None:
    """Take SIGUSR1 and SIGTERM as requests to stop at the next safe point."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)


def received() -> str | None:
    """The first stop signal this process got, if any."""
    return _received[0] if _received else None


class BrokenOff(Exception):
    """Raised between two batches: this rank leaves the round. `status` says why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Watch:
    """What a rank looks at between batches."""

    def __init__(self, comm: Solo, folder: Path | None = None) -> None:
        self.comm = comm
        self.file = folder / STOP_FILE if folder is not None and comm.rank == 0 else None
        self.status = READY
        self.reason = ""  # why this rank asked for a stop; empty on the others
        self._next_s = 0.0

    def look(self) -> int:
        """The worst news so far; passes news of this rank on to the others."""
        if received() and self.status < STOP:
            self.tell(STOP, received() or "")
        now_s = time.monotonic()
        if now_s >= self._next_s:  # a probe or a stat per batch would be felt where batches take microseconds
            self._next_s = now_s + 0.05
            self.status = max(self.status, self.comm.notices())
            if self.file is not None and self.status < STOP and os.path.exists(self.file):
                self.tell(STOP, "fedmpi stop")
        return self.status

    def check(self) -> None:
        """A safe point. Raises BrokenOff when this rank should leave the round."""
        if self.look() != READY:
            raise BrokenOff(self.status)

    def tell(self, status: int, reason: str) -> None:
        """Notice all other ranks, once for each kind of news."""
        if status > self.status:
            self.status, self.reason = status, reason
            self.comm.notify(status)
