"""Small things over MPI: an Allreduce of float64, once a barrier was waited for politely, rows, texts, and notices and
pulses, point to point.

Every call of MPI is made inside `bounded` or `translated`: what MPI says of a lost rank comes out as RankLost.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fedmpi.comm.base import Comm, Over, Pending
from fedmpi.comm.vigil import Vigil
from fedmpi.errors import RankLost

if TYPE_CHECKING:
    from mpi4py import MPI

F = TypeVar("F", bound=Callable[..., Any])

_NOTICE, _LAST, _PULSE = 71, 72, 73  # tags on the control communicator
_LOST = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")  # what an MPI says that can go on without a rank


def bounded(call: F) -> F:
    """Whoever is inside it for too long gives up (vigil.py)."""

    @functools.wraps(call)
    def inside(self: MpiControl, *args: Any, **kwargs: Any) -> Any:
        self.depth += 1
        try:
            self.beat()
            return call(self, *args, **kwargs)
        except self._mpi.Exception as error:
            raise self.meaning(error) from error
        finally:
            self.depth -= 1
            self.calls += 1

    return inside  # type: ignore[return-value]


def translated(call: F) -> F:
    """Raises RankLost where MPI says so."""

    @functools.wraps(call)
    def inside(self: MpiControl, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, *args, **kwargs)
        except self._mpi.Exception as error:
            raise self.meaning(error) from error

    return inside  # type: ignore[return-value]


class MpiControl(Comm):
    """What ranks of an MPI job tell each other, on a communicator of its own."""

    def __init__(self, mpi: Any, world: MPI.Comm) -> None:
        self.depth = self.calls = 0  # for the vigil: calls that this rank is inside of, and those that it has left
        self._vigil: Vigil | None = None
        self._above: MpiControl | None = None  # the communicator that this one was split off
        self._beat_s = math.inf  # when to send the next word
        self._mpi = mpi
        self._control: MPI.Comm = world.Dup()
        self._worst = 0
        self._passed_on = 0  # rank 0: the worst notice it has relayed
        self._sent: list[tuple[Any, np.ndarray]] = []  # requests keep their buffers
        self.rank, self.size = world.rank, world.size

    def meaning(self, error: Exception) -> Exception:
        """RankLost with those that MPI knows, if that is what its error says."""
        if error.Get_error_class() not in [getattr(self._mpi, name, None) for name in _LOST]:  # type: ignore[attr-defined]
            return error
        try:
            ranks = self._control.Get_failed().Translate_ranks(None, self._control.Get_group())
        except (self._mpi.Exception, NotImplementedError):
            ranks = []
        return RankLost(ranks, str(error))

    @translated
    def wait(self, pending: Pending) -> None:
        spins, most, pause_s = 0, 20 if self.oversubscribed else 1000, 5e-5
        self.depth += 1
        try:
            while not pending.Test():
                spins += 1
                if self.sleeps_while_waiting or spins > most:  # the core may be another rank's too
                    self.beat()
                    time.sleep(pause_s)
                    # To wake costs what others could use; what is on its way fills the sockets meanwhile.
                    pause_s = min(2 * pause_s, 4e-4) if self.oversubscribed else pause_s
                elif spins > 100:
                    os.sched_yield()
        finally:
            self.depth -= 1
            self.calls += 1

    @translated
    def share(self, values: np.ndarray, meanwhile: Callable[[], Any] | None = None) -> np.ndarray:
        values = np.ascontiguousarray(values, dtype=np.float64)
        total = np.empty_like(values)
        self.depth += 1
        try:
            request = self._control.Ibarrier()
            pause_s, spins = 2e-5, 0
            # A rank that waits for slower ones gives its core away: they may share it. Only the barrier is waited for
            # like that: what is non-blocking moves on when it is tested, and a sum has many more steps to move on by.
            while not request.Test():
                if meanwhile is not None:
                    meanwhile()
                spins += 1
                if spins > 20 or self.sleeps_while_waiting:
                    self.beat()
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, 1e-3)
            self._control.Allreduce(values, total, op=self._mpi.SUM)
        finally:
            self.depth -= 1
            self.calls += 1
        self.bytes_control += values.nbytes + total.nbytes if self.size > 1 else 0
        return total

    @translated
    def ishare(self, values: np.ndarray) -> tuple[Pending, np.ndarray]:
        if self.sleeps_while_waiting:
            # Beside another thread's calls Open MPI's non-blocking sums come out wrong (5.0.11, seen).
            return Over(), self.share(values)
        values = np.ascontiguousarray(values, dtype=np.float64)
        total = np.empty_like(values)
        self.bytes_control += values.nbytes + total.nbytes if self.size > 1 else 0
        return self._control.Iallreduce(values, total, op=self._mpi.SUM), total

    @bounded
    def gather(self, row: bytes) -> list[bytes]:
        rows = bytearray(len(row) * self.size)
        self._control.Allgather(bytearray(row), rows)
        return [bytes(rows[i : i + len(row)]) for i in range(0, len(rows), len(row))] if row else [b""] * self.size

    @bounded
    def broadcast_text(self, text: str, speaker: int) -> str:
        coded = text.encode(errors="surrogatepass")  # a file's name may be no text
        length = np.array([len(coded)], dtype=np.int64)
        self._control.Bcast(length, root=speaker)
        said = bytearray(coded if self.rank == speaker else bytes(int(length[0])))
        self._control.Bcast(said, root=speaker)
        return said.decode(errors="surrogatepass")

    # ------------------------------------------------------------ notices

    @translated
    def notify(self, status: int) -> None:
        # Through rank 0: a batch system signals every rank at once, and n to n would be n^2 messages.
        if self.rank:
            self._post(status, 0)
        else:
            self._relay(status)

    @translated
    def notices(self) -> int:
        self.beat(trains=not self.depth)
        while self._control.Iprobe(tag=_NOTICE):
            buffer = np.zeros(1, dtype=np.int64)
            self._control.Recv(buffer, tag=_NOTICE)
            self._worst = max(self._worst, int(buffer[0]))
            if self.rank == 0:
                self._relay(int(buffer[0]))
        return self._worst

    def _relay(self, status: int) -> None:
        if status > self._passed_on:
            self._passed_on = status
            for rank in range(1, self.size):
                self._post(status, rank)

    def _post(self, status: int, to: int, tag: int = _NOTICE) -> None:
        buffer = np.array([status], dtype=np.int64)
        self._sent.append((self._control.Isend(buffer, dest=to, tag=tag), buffer))

    def _drain_all(self) -> None:
        """Notices that nobody has read yet are read now, up to each sender's last word, so that none is left."""
        if self.rank:
            self._post(0, 0, _LAST)
            self._drain(0)
        else:
            for rank in range(1, self.size):
                self._drain(rank)
            for rank in range(1, self.size):
                self._post(0, rank, _LAST)
        for request, _ in self._sent:
            request.Wait()
        self._sent.clear()
        self._worst = self._passed_on = 0  # another run may follow

    def _drain(self, sender: int) -> None:
        buffer = np.zeros(1, dtype=np.int64)
        status = self._mpi.Status()
        while status.tag != _LAST:
            self._control.Recv(buffer, source=sender, status=status)

    # ------------------------------------------------------------ pulses

    @property
    def _watching(self) -> Vigil | None:
        """What looks at this communicator and its parts, and at theirs."""
        return self._vigil if self._above is None else self._above._watching

    def set_up(self, timeout_s: float) -> None:
        if self._vigil is not None:
            self._vigil.set_up(timeout_s)
            self._beat_s, self.depth = 0.0, 0

    def took(self, seconds: float) -> None:
        if self._vigil is not None:
            self._vigil.round(seconds)

    def beat(self, trains: bool = False) -> None:
        if self._above is not None:
            self._above.beat(trains)
        elif time.monotonic() >= self._beat_s and self._vigil is not None:
            self._beat_s = time.monotonic() + self._vigil.period_s
            self._pulse(self._vigil, trains)

    @translated
    def _pulse(self, vigil: Vigil, trains: bool) -> None:
        """Through rank 0, as all notices go."""
        anybody = vigil.pulse(trains)
        self._sent = [pair for pair in self._sent if not pair[0].Test()]
        for rank in range(1, self.size) if self.rank == 0 else (0,):
            self._post(int(anybody if self.rank == 0 else trains), rank, _PULSE)
        status, buffer = self._mpi.Status(), np.zeros(1, dtype=np.int64)
        while self._control.Iprobe(tag=_PULSE, status=status):
            self._control.Recv(buffer, source=status.source, tag=_PULSE)
            vigil.hear(status.source, bool(buffer[0]))
        if (error := vigil.judge(self)) is not None:
            raise error
