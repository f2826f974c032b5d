"""Control traffic over MPI: float64 sums, rows and texts as collectives; notices and heartbeats point to point.

Every MPI call runs inside `bounded` or `translated`, which turn MPI's errors about lost ranks into RankLost.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fedmpi.comm.base import Comm, Over, Pending
from fedmpi.comm.vigil import Vigil
from fedmpi.errors import RankLost

if TYPE_CHECKING:
    from mpi4py import MPI

F = TypeVar("F", bound=Callable[..., Any])

_NOTICE, _LAST, _PULSE, _POST = 71, 72, 73, 74  # tags on the control communicator
_LOST = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")  # error classes that mean a lost rank

# Seconds until every rank has made a communicator that one of them has: revoking it meanwhile crashes Open MPI 5.0.11.
MADE_S = 0.25


def tolerant() -> bool:
    """Whether this job was started to survive lost ranks, as by `mpirun --with-ft ulfm`."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable", "0") in ("1", "true", "yes")  # noqa: SIM112


@contextlib.contextmanager
def revoked_on_loss(mpi: Any, *communicators: Any) -> Iterator[None]:
    """Revokes new communicators if a call inside fails, because ranks whose calls have not failed would wait in them
    for this one."""
    try:
        yield
    except (mpi.Exception, RankLost):
        if tolerant():
            time.sleep(MADE_S)
            for communicator in communicators:
                communicator.Revoke()
        raise


def bounded(call: F) -> F:
    """Puts a call under the timeouts of vigil.py, and raises RankLost if MPI reports a lost rank."""

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
    """Raises RankLost if MPI reports a lost rank."""

    @functools.wraps(call)
    def inside(self: MpiControl, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, *args, **kwargs)
        except self._mpi.Exception as error:
            raise self.meaning(error) from error

    return inside  # type: ignore[return-value]


class MpiControl(Comm):
    """Control traffic between the ranks of an MPI job, on its own communicator."""

    def __init__(self, mpi: Any, world: MPI.Comm, control: MPI.Comm) -> None:
        self.depth = self.calls = 0  # for the timeouts: calls in progress, and calls completed
        self._vigil: Vigil | None = None
        self._above: MpiControl | None = None  # the communicator that this one was split from
        self._beat_s = math.inf  # time of the next heartbeat
        self._mpi = mpi
        self._control = control
        self._worst = 0
        self._passed_on = 0  # rank 0: the highest notice it has relayed
        self._sent: list[tuple[Any, np.ndarray]] = []  # requests keep their buffers
        self.rank, self.size = world.rank, world.size

    def meaning(self, error: Exception) -> Exception:
        """RankLost with the ranks that MPI knows to have failed, if the error means that; else the error itself."""
        if error.Get_error_class() not in [getattr(self._mpi, name, None) for name in _LOST]:  # type: ignore[attr-defined]
            return error
        try:
            ranks = self._control.Get_failed().Translate_ranks(None, self._control.Get_group())
        except (self._mpi.Exception, NotImplementedError):
            ranks = []
        return RankLost(ranks, str(error))

    @translated
    def wait(self, pending: Pending) -> None:
        spins, most, pause_s, began_s = 0, 20 if self.oversubscribed else 1000, 5e-5, time.perf_counter()
        self.depth += 1
        try:
            while not pending.Test():
                spins += 1
                if self.sleeps_while_waiting or spins > most:  # another rank may need this core
                    self.beat()
                    time.sleep(pause_s)
                    # Waking up takes time from other ranks; incoming data fills the sockets meanwhile.
                    pause_s = min(2 * pause_s, 4e-4) if self.oversubscribed else pause_s
                elif spins > 100:
                    os.sched_yield()
        finally:
            self.transfer_s += time.perf_counter() - began_s
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
            # Ranks may share cores, so a waiting rank sleeps. Only the barrier is awaited like this: non-blocking calls
            # progress only when they are tested, and a sum has many more steps than a barrier.
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
            # Open MPI's non-blocking sums give wrong results beside another thread's calls (seen in 5.0.11).
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
        coded = text.encode(errors="surrogatepass")  # file names need not be valid text
        length = np.array([len(coded)], dtype=np.int64)
        self._control.Bcast(length, root=speaker)
        said = bytearray(coded if self.rank == speaker else bytes(int(length[0])))
        self._control.Bcast(said, root=speaker)
        return said.decode(errors="surrogatepass")

    # ------------------------------------------------------------ notices

    @translated
    def notify(self, status: int) -> None:
        # Relayed by rank 0: a batch system signals every rank at once, and all-to-all would take n^2 messages.
        if self.rank:
            self._post(status, 0)
        else:
            self._relay(status)

    @translated
    def notices(self) -> int:
        self.beat(trains=not self.depth)
        status, buffer = self._mpi.Status(), np.zeros(1, dtype=np.int64)
        while self._control.Iprobe(tag=_NOTICE, status=status):
            self._control.Recv(buffer, source=status.source, tag=_NOTICE)
            self._worst = max(self._worst, int(buffer[0]))
            if self.rank == 0:
                self._relay(int(buffer[0]))
        return self._worst

    @translated
    def post(self, rank: int, numbers: Sequence[int]) -> None:
        buffer = np.array((*numbers, 0, 0, 0)[:3], dtype=np.int64)
        self._sent.append((self._control.Isend(buffer, dest=rank, tag=_POST), buffer))

    @translated
    def posted(self) -> list[tuple[int, tuple[int, ...]]]:
        found, status, buffer = [], self._mpi.Status(), np.zeros(3, dtype=np.int64)
        while self._control.Iprobe(tag=_POST, status=status):
            self._control.Recv(buffer, source=status.source, tag=_POST)
            found.append((int(status.source), tuple(int(number) for number in buffer)))
        return found

    def _relay(self, status: int) -> None:
        if status > self._passed_on:
            self._passed_on = status
            for rank in range(1, self.size):
                self._post(status, rank)

    def _post(self, status: int, to: int, tag: int = _NOTICE) -> None:
        buffer = np.array([status], dtype=np.int64)
        self._sent.append((self._control.Isend(buffer, dest=to, tag=tag), buffer))

    def _drain_all(self) -> None:
        """Reads all unread notices, up to each sender's last one, so that no message is left."""
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
        buffer = np.zeros(3, dtype=np.int64)  # the longest message
        status = self._mpi.Status()
        while status.tag != _LAST:
            self._control.Recv(buffer, source=sender, status=status)

    # ------------------------------------------------------------ heartbeats

    @property
    def _watching(self) -> Vigil | None:
        """The vigil of this communicator, or of the one it was split from."""
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
        """Sends and reads heartbeats, relayed by rank 0 like all notices. Raises CommTimeout."""
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
