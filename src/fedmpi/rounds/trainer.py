"""A thread that trains one silo at a time and gives way at safe points.

Only one of the two threads runs at any time: the main thread calls `turn` and waits; the training runs until it has
lasted `PACE_S` at a safe point, or until it ends. So all calls of MPI stay in the main thread, which can, between two
batches, commit a round, evaluate and write records while a silo trains. The global random generators belong
to the training while it runs, and are restored when it goes on.
"""

from __future__ import annotations

import _thread
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from fedmpi import rng
from fedmpi.errors import FedmpiError

T = TypeVar("T")

PACE_S = 0.01  # between two looks of the main thread
ENDS_S = 10.0  # how long `end` waits for a batch


class _Ended(Exception):
    """Raised at a safe point of a training that is given up."""


class Trainer(Generic[T]):
    """One training at a time, in a thread of its own."""

    def __init__(self, device: torch.device | None = None) -> None:
        """`device`: of the model that it trains."""
        self._device = device
        self._goes, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._work: Callable[[], T] | None = None
        self._result: T | None = None
        self._error: BaseException | None = None
        self._ends, self._over = False, threading.Event()
        self._turned_s = 0.0
        try:
            _thread.start_new_thread(self._run, ())
        except (RuntimeError, MemoryError) as error:
            raise FedmpiError(f"cannot start a thread: {error}; raise ulimit -v or -u") from None

    @property
    def busy(self) -> bool:
        """Whether a training is under way."""
        return self._work is not None

    def start(self, work: Callable[[], T]) -> None:
        """Begin a training; it runs in `turn`."""
        assert self._work is None
        self._work = work

    def turn(self) -> T | None:
        """Let the training run until it gives way or ends. Returns its result once it has ended; raises its error."""
        self._turned_s = time.monotonic()
        self._goes.release()
        self._waits.acquire()
        if self._work is not None:
            return None
        error, result, self._error, self._result = self._error, self._result, None, None
        if error is not None:
            raise error
        return result

    def pause(self) -> None:
        """A safe point, called by the training: gives way if its turn has lasted long enough."""
        if self._ends or time.monotonic() - self._turned_s >= PACE_S:
            restore = rng.kept()
            self._waits.release()
            self._goes.acquire()
            if self._ends:
                raise _Ended
            restore()

    def end(self) -> None:
        """Give the training up and end the thread."""
        if not self._ends:
            self._ends = True
            self._goes.release()
            self._over.wait(ENDS_S)

    def _run(self) -> None:
        on_device = False
        while True:
            self._goes.acquire()
            if self._ends or self._work is None:
                break
            try:
                if not on_device and self._device is not None and self._device.type == "cuda":
                    torch.cuda.set_device(self._device)  # each thread begins on the first GPU
                    on_device = True
                self._result = self._work()
            except _Ended:
                break
            except BaseException as error:
                self._error = error
            self._work = None
            self._waits.release()
        with contextlib.suppress(Exception):
            self._over.set()
