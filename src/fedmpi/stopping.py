"""Ending early without a hang: signals, `fedmpi stop`, a silo that raised elsewhere.

A signal may reach one rank only, and a round may last an hour. So every rank looks, between batches, at three things:
its own signal flag, the file that `fedmpi stop DIR` writes (rank 0), and notices from other ranks. A notice only
hastens: whether the round goes on is decided by all ranks together, in the small collective that every rank enters at
the end of its training, whole or broken off. That is why nobody can be left waiting.

Handlers belong to a run: when it is over, the ones before are back and what it got is forgotten. The command's own
process does nothing else, so there they stay until its end.

This module imports nothing heavy: handlers must stand before MPI and torch are imported, because a batch system may
signal a job while it starts.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmpi.comm import Comm

STOP_FILE = "stop"  # in the run directory
LOCK_FILE = ".lock"  # there too; the job that trains holds its lock

# What a rank says of its part of a round, and what a notice says; the larger one wins.
READY, STOP, FAILED = 0, 1, 2

ASKS = (signal.SIGUSR1, signal.SIGTERM)  # what asks a run to stop; Ctrl-C too, once rounds could be lost by it
LAUNCHER_S = 1.0  # Open MPI's mpirun sends SIGCONT, SIGTERM and SIGKILL, a quarter of a second between each

Handler = Callable[[int, FrameType | None], Any] | int | None

_received: list[str] = []  # names of the stop signals this process got and no run has answered
_before: dict[int, Handler] = {}  # the handlers that were there before ours
_listening = 0  # runs that are open
_owned = False  # does this process do nothing but one run?
_woken_s = -math.inf  # when the last SIGCONT came
_last_words = ""  # what is said when a launcher is about to kill this process; empty where nothing is to be said


def own_process() -> None:
    """Take SIGUSR1 and SIGTERM as requests to stop at the next safe point, from now until the process is gone."""
    global _owned
    _owned = True
    _take(ASKS)
    atexit.register(ignore)


def listen() -> None:
    """Take SIGUSR1 and SIGTERM as requests to stop, for a run; for each call `forget` is called once. In another thread
    than the main one nothing can be listened to."""
    global _listening
    if threading.current_thread() is threading.main_thread():
        _take(ASKS)
    _listening += 1


def mind_interrupts() -> None:
    """Take Ctrl-C as a request to stop too, until `forget`; pressed once more it interrupts as ever. Where somebody
    else has taken SIGINT already, or it is ignored as in a background job, that stays."""
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            _take((signal.SIGINT,))
        if signal.getsignal(signal.SIGCONT) == signal.SIG_DFL:
            _take((signal.SIGCONT,))


def forget(stopped: bool = False) -> None:
    """A run is over: its handlers go, and the signals that it got. `stopped`: it ended because of one, and the process
    is probably about to."""
    global _listening, _last_words
    _listening -= 1
    if _listening:
        return
    _received.clear()
    _last_words = ""
    if stopped and not _owned:
        atexit.unregister(ignore)
        atexit.register(ignore)
    if threading.current_thread() is threading.main_thread():
        for number in [number for number in _before if not _owned or number not in ASKS]:
            before = _before.pop(number)
            if signal.getsignal(number) in (_note, _wake):  # else somebody else has taken it meanwhile
                signal.signal(number, signal.SIG_DFL if before is None else before)


def ignore() -> None:
    """The exit code is settled: a batch system that asks again must not change it. Python itself would put back what
    kills a process long before MPI is through with finalizing."""
    if threading.current_thread() is threading.main_thread():
        for number in ASKS:
            signal.signal(number, signal.SIG_IGN)


def last_words(text: str) -> None:
    """What the launcher's standard error gets should it be about to kill this process."""
    global _last_words
    _last_words = text


def received() -> str | None:
    """The first stop signal this process got, if any."""
    return _received[0] if _received else None


def _take(numbers: Iterable[int]) -> None:
    if not _before:
        os.register_at_fork(after_in_child=_spare_child)
    for number in numbers:
        if number not in _before:
            _before[number] = signal.signal(number, _wake if number == signal.SIGCONT else _note)


def _spare_child() -> None:
    """A worker that somebody forks is no rank: it ends when it is told to."""
    for number in _before:
        signal.signal(number, signal.SIG_DFL)


def _note(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if number == signal.SIGINT:
        if name in _received:
            signal.default_int_handler(number, frame)
        if os.isatty(2):
            os.write(2, b"\nfedmpi: stops at the next batch and saves; Ctrl-C once more ends at once\n")
    elif number == signal.SIGTERM and _last_words and time.monotonic() - _woken_s < LAUNCHER_S:
        # It no longer passes on what its ranks say.
        with contextlib.suppress(OSError):
            # Where nobody reads the launcher's output a full pipe must not keep the process here.
            flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY
            launcher = os.open(f"/proc/{os.getppid()}/fd/2", flags)
            os.write(launcher, f"{_last_words}\n".encode())
            os.close(launcher)
    _received.append(name)


def _wake(number: int, frame: FrameType | None) -> None:
    global _woken_s
    _woken_s = time.monotonic()


def is_training(root: Path) -> bool | None:
    """Does a job train there now? None where that cannot be told from here."""
    try:
        descriptor = os.open(root / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    try:  # locks may be known on the host that took them alone
        host = json.loads((root / "ranks.json").read_text())[0]["host"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return False if host == socket.gethostname() else None


class BrokenOff(Exception):
    """Raised between two batches: this rank leaves the round. `status` says why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Watch:
    """What a rank looks at between batches."""

    def __init__(self, comm: Comm, folder: Path | None = None) -> None:
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
