"""Stops a run early without a hang: on a signal, on `fedmpi stop`, or when a silo raises on another rank.

A signal may reach one rank only, and a round may last an hour. So between batches every rank checks its own signal
flag, the file that `fedmpi stop DIR` writes (on rank 0), and notices from other ranks. A notice only saves time: all
ranks decide together whether the round goes on, in the small collective that every rank enters at the end of its
training, complete or not. So no rank is left waiting.

Signal handlers belong to a run: when it is over, the earlier handlers are restored and received signals are forgotten.
The process of the `fedmpi` command keeps them until it ends.

This module imports nothing heavy: handlers must be installed before MPI and torch are imported, because a batch system
may signal a job while it starts.
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

from fedmpi import disk, requests

if TYPE_CHECKING:
    from fedmpi.comm import Comm
    from fedmpi.watchdog import Watchdog

STOP_FILE = "stop"  # in the run directory; may hold who asks for the stop, empty: `fedmpi stop`
EVENTS_FILE = "events.jsonl"  # in the run directory; has a line with STOPPED if a request ended the run
STOPPED = "stopped"
ENDED = "ended"  # a run that diverged, or had no silo to train; `why` says so
ENDED_FILE = "ended.json"  # in the run directory of a run that a metric has ended: {"round": ..., "why": ...}
LOCK_FILE = ".lock"  # in the run directory; locked by the job that trains

# A rank's status in a round, and the content of a notice; the larger one wins.
READY, STOP, FAILED = 0, 1, 2

ASKS = (signal.SIGUSR1, signal.SIGTERM)  # signals that ask a run to stop; SIGINT too, after `mind_interrupts`
NEAR_S = 3600  # a signal so long before a job's time limit is told as one because of it
LAUNCHER_S = 1.0  # Open MPI's mpirun sends SIGCONT, SIGTERM and SIGKILL, a quarter of a second between each

Handler = Callable[[int, FrameType | None], Any] | int | None

_received: list[str] = []  # names of the stop signals that this process received and no run has handled
_before: dict[int, Handler] = {}  # the handlers before ours
_listening = 0  # number of open runs
_owned = False  # whether this process is the `fedmpi` command's
_woken_s = -math.inf  # time of the last SIGCONT
_last_words = ""  # message to print when the launcher is about to kill this process; empty: none


def own_process() -> None:
    """Treat SIGUSR1 and SIGTERM as requests to stop at the next safe point, until the process ends."""
    global _owned
    _owned = True
    _take(ASKS)
    atexit.register(ignore)


def listen() -> None:
    """Treat SIGUSR1 and SIGTERM as requests to stop, for a run. Call `forget` once for each call. Outside the main
    thread no handler is installed."""
    global _listening
    if threading.current_thread() is threading.main_thread():
        _take(ASKS)
    _listening += 1


def mind_interrupts() -> None:
    """Treat Ctrl-C as a request to stop too, until `forget`; a second Ctrl-C raises KeyboardInterrupt. Another handler
    of SIGINT stays, and so does an ignored SIGINT, as in a background job."""
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            _take((signal.SIGINT,))
        if signal.getsignal(signal.SIGCONT) == signal.SIG_DFL:
            _take((signal.SIGCONT,))


def forget(stopped: bool = False) -> None:
    """End a run: restore the earlier handlers and forget received signals. `stopped`: the run ended because of a
    signal, and the process will probably end too."""
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
            if signal.getsignal(number) in (_note, _wake):  # else other code replaced our handler
                signal.signal(number, signal.SIG_DFL if before is None else before)


def ignore() -> None:
    """Ignore stop signals from now on, so that a repeated signal does not change the exit code. Python would restore
    the default handlers, which kill the process, long before MPI has finalized."""
    if threading.current_thread() is threading.main_thread():
        for number in ASKS:
            signal.signal(number, signal.SIG_IGN)


def cause(name: str) -> str:
    """The signal as text, with the seconds to the job's time limit if SLURM tells them."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    left_s = int(end) - time.time() if end.isdecimal() else math.inf
    return name + (f", {left_s:.0f} s before the job's time limit" if 0 <= left_s <= NEAR_S else "")


def _asked_by(path: Path) -> str:
    """Who asks for the stop, by the content of the stop file."""
    text = ""
    with contextlib.suppress(OSError):
        text = " ".join(disk.read_bytes(path, 200).decode(errors="replace").split())
    return text if text and text.isprintable() else "fedmpi stop"


def last_words(text: str) -> None:
    """Set the message for the launcher's standard error, printed when the launcher is about to kill this process."""
    global _last_words
    _last_words = text


def received() -> str | None:
    """The name of the first stop signal received, or None."""
    return _received[0] if _received else None


def _take(numbers: Iterable[int]) -> None:
    if not _before:
        os.register_at_fork(after_in_child=_spare_child)
    for number in numbers:
        if number not in _before:
            _before[number] = signal.signal(number, _wake if number == signal.SIGCONT else _note)


def _spare_child() -> None:
    """Restore default handlers in a forked child: it is not a rank and must end on SIGTERM."""
    for number in _before:
        signal.signal(number, signal.SIG_DFL)


def _note(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if number == signal.SIGINT:
        if name in _received:
            signal.default_int_handler(number, frame)
        if os.isatty(2):
            os.write(2, b"\nfedmpi: stopping after this batch, with a checkpoint; Ctrl-C again ends at once\n")
    elif number == signal.SIGTERM and _last_words and time.monotonic() - _woken_s < LAUNCHER_S:
        # The launcher no longer forwards its ranks' output, so write to its standard error directly.
        with contextlib.suppress(OSError):
            # Non-blocking: a full pipe without a reader must not hold the process.
            flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY
            launcher = os.open(f"/proc/{os.getppid()}/fd/2", flags)
            os.write(launcher, f"{_last_words}\n".encode())
            os.close(launcher)
    _received.append(name)


def _wake(number: int, frame: FrameType | None) -> None:
    global _woken_s
    _woken_s = time.monotonic()


def is_training(root: Path) -> bool | None:
    """Whether a job is training in this run directory; None if that cannot be told from this host."""
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
    try:  # a lock may be visible on its own host only
        host = json.loads((root / "ranks.json").read_text())[0]["host"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return False if host == socket.gethostname() else None


def ended(root: Path) -> tuple[int, str]:
    """The round after which a metric has ended the run in this directory, and why; (-1, "") if none has."""
    try:
        if ENDED_FILE in os.listdir(root):  # listed: an NFS client remembers for a while that a name does not exist
            found = json.loads((root / ENDED_FILE).read_text())
            return int(found["round"]), str(found["why"])
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return -1, ""


class BrokenOff(Exception):
    """Raised between two batches to leave the round. `status`: STOP or FAILED."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Watch:
    """Checks for stop requests and failures between batches."""

    def __init__(self, comm: Comm, folder: Path | None = None, watchdog: Watchdog | None = None) -> None:
        self.comm = comm
        self._folder = folder if comm.rank == 0 else None
        self.watchdog = watchdog  # None: a silo may take as long as it likes for a batch
        self.file = folder / STOP_FILE if folder is not None and comm.rank == 0 else None
        self.status = READY
        self.reason = ""  # why this rank asked for a stop; empty on the others
        self._next_s = 0.0

    def look(self) -> int:
        """The highest status so far, READY, STOP or FAILED. Tells the other ranks of a new one on this rank."""
        if received() and self.status < STOP:
            self.tell(STOP, cause(received() or ""))
        now_s = time.monotonic()
        if now_s >= self._next_s:  # a probe or a stat per batch would slow down batches of microseconds
            self._next_s = now_s + 0.05
            self.status = max(self.status, self.comm.notices())
            if self.file is not None and self.status < STOP and os.path.exists(self.file):
                self.tell(STOP, _asked_by(self.file))
        return self.status

    def asked(self) -> bool:
        """Does the run directory hold a request about members? Rank 0 looks; False on other ranks."""
        return self._folder is not None and requests.there(self._folder)

    def check(self) -> None:
        """A safe point. Raises BrokenOff if this rank should leave the round."""
        if self.watchdog is not None:
            self.watchdog.beat()
        if self.look() != READY:
            raise BrokenOff(self.status)

    def begin(self, what: str) -> None:
        """A silo begins to train; `rest` says that none does."""
        if self.watchdog is not None:
            self.watchdog.begin(what)

    def rest(self) -> None:
        """No silo of this rank trains."""
        if self.watchdog is not None:
            self.watchdog.rest()

    def tell(self, status: int, reason: str) -> None:
        """Notify all other ranks, once per status."""
        if status > self.status:
            self.status, self.reason = status, reason
            self.comm.notify(status)
