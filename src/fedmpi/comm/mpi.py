"""The ranks of an MPI job; the only module that imports mpi4py, and only when `library` is called.

world    vectors
control  small things: an Allreduce of float64, once a barrier was waited for politely, and notices
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import functools
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from fedmpi import launcher
from fedmpi.comm.base import Comm, CountsDispls, Over, Pending, blocks
from fedmpi.comm.machine import SHM, SPARE_BYTES, cores, shared_memory
from fedmpi.comm.vigil import Vigil
from fedmpi.errors import ConfigError, ExchangeError, agreed
from fedmpi.output import flush, say

if TYPE_CHECKING:
    from mpi4py import MPI

F = TypeVar("F", bound=Callable[..., Any])

_NOTICE, _LAST, _PULSE = 71, 72, 73  # tags on the control communicator
_AHEAD = 4  # blocks under way where waiting is sleeping


def library() -> Any:
    """mpi4py.MPI; initialises MPI at the first call. Raises ImportError or RuntimeError where there is none."""
    from mpi4py import MPI

    return MPI


def _bounded(call: F) -> F:
    """Whoever is inside it for too long gives up (vigil.py)."""

    @functools.wraps(call)
    def bounded(self: MpiComm, *args: Any, **kwargs: Any) -> Any:
        self.depth += 1
        try:
            self.beat()
            return call(self, *args, **kwargs)
        finally:
            self.depth -= 1
            self.calls += 1

    return bounded  # type: ignore[return-value]


class MpiComm(Comm):
    """All ranks of an MPI job."""

    def __init__(self, mpi: Any, world: Any = None) -> None:
        super().__init__()
        self.depth = self.calls = 0  # for the vigil: calls that this rank is inside of, and those that it has left
        self._vigil: Vigil | None = None
        self._beat_s = math.inf  # when to send the next word
        self._above: MpiComm | None = None  # the communicator that this one was split off
        self._mpi = mpi
        self._world: MPI.Comm = mpi.COMM_WORLD.Dup() if world is None else world
        self._control: MPI.Comm = self._world.Dup()
        self._groups: list[MpiComm] = []  # that were split off
        self._twins: list[MpiComm] = []
        self.rank = self._world.rank
        self.size = self._world.size
        name = socket.gethostname().encode()[:256]
        rows = self.gather(name.ljust(256, b"\0") + (mine := cores())[0])
        self.hosts = tuple(row[:256].rstrip(b"\0").decode() for row in rows)
        self.oversubscribed = sum(row[256:] == mine[0] for row in rows) > mine[1]
        peers = [r for r, host in enumerate(self.hosts) if host == self.hosts[self.rank]]
        self.local_rank, self.local_size = peers.index(self.rank), len(peers)
        self.fatal = (MemoryError, mpi.Exception) if self.size > 1 else ()
        self._worst = 0
        self._passed_on = 0  # rank 0: the worst notice it has relayed
        self._node: MPI.Comm | None = None  # the ranks that share this one's memory; made when somebody asks
        self._windows: list[MPI.Win] = []
        self._sent: list[tuple[Any, np.ndarray]] = []  # requests keep their buffers

    @_bounded
    def split(self, color: int, last: bool = False) -> Comm | None:
        world = self._world.Split(color if color >= 0 else self._mpi.UNDEFINED, self.rank + self.size * last)
        if color < 0:
            return None
        group = MpiComm(self._mpi, world)
        group.oversubscribed = group.oversubscribed or self.oversubscribed
        group._above = self
        if (vigil := self._watching) is not None:
            vigil.lanes.append(group)
        self._groups.append(group)
        return group

    @property
    def _watching(self) -> Vigil | None:
        """What looks at this communicator and its parts, and at theirs."""
        return self._vigil if self._above is None else self._above._watching

    @_bounded
    def dup(self) -> MpiComm:
        self.collectively(self._check_threads)
        twin = copy.copy(self)
        twin._world, twin._control = self._world.Dup(), self._control.Dup()
        twin._node, twin._windows, twin._sent, twin._groups, twin._twins = None, [], [], [], []
        twin.bytes_up = twin.bytes_down = twin.bytes_control = 0
        twin.sleeps_while_waiting = True
        twin.depth, twin._beat_s, twin._above = 0, math.inf, None  # another thread speaks for this rank
        if self._vigil is not None:
            self._vigil.lanes.append(twin)
        self._twins.append(twin)
        return twin

    def _check_threads(self) -> None:
        if self._mpi.Query_thread() < self._mpi.THREAD_MULTIPLE:
            raise ConfigError("exchange.overlap: needs an MPI that threads may call at once (MPI_THREAD_MULTIPLE)")

    def counted(self) -> tuple[int, int, int]:
        own = (self.bytes_up, self.bytes_down, self.bytes_control)
        up, down, control = (sum(some) for some in zip(own, *(group.counted() for group in self._groups), strict=True))
        return up, down, control

    def free_parts(self) -> None:
        """Give back what was made of this communicator; nobody uses it any more. A call of all ranks."""
        for part in (*self._twins, *self._groups):
            part._free()
            if (vigil := self._watching) is not None:
                vigil.lanes.remove(part)
        self._twins.clear()
        self._groups.clear()
        self.free_shared()

    def _free(self) -> None:
        self.free_parts()
        for communicator in (self._node, self._control, self._world):
            if communicator is not None:
                communicator.Free()

    @_bounded
    def one_node(self) -> bool:
        if self._node is None:
            self._node = self._world.Split_type(self._mpi.COMM_TYPE_SHARED)
        return bool(self._node.size == self.size)

    @_bounded
    def node(self) -> int:
        self.one_node()
        assert self._node is not None
        first = np.array([self.rank], dtype=np.int64)
        self._node.Bcast(first, root=0)
        return int(first[0])

    def room(self, num_bytes: int) -> str:
        # One rank that finds none would leave the others waiting for it in the allocation; and where the allocation
        # goes well all the same, a page that is not there kills whoever touches it.
        free, place = shared_memory()
        rows = self.gather(num_bytes.to_bytes(8, "little") + free.to_bytes(8, "little") + place)
        needed: dict[bytes, int] = {}
        for row in rows:
            needed[row[16:]] = needed.get(row[16:], 0) + int.from_bytes(row[:8], "little")
        for host, row in zip(self.hosts, rows, strict=True):
            need, free = needed[row[16:]], int.from_bytes(row[8:16], "little")
            if need and need + SPARE_BYTES > free:
                return (
                    f"{SHM} on {host} has {free / 2**20:.0f} MiB free and its ranks need {need / 2**20:.0f} MiB "
                    "(in a container: --shm-size)"
                )
        return ""

    @_bounded
    def shared(self, num_elements: int, dtype: torch.dtype, owner: int | None = None) -> list[torch.Tensor]:
        if not self.one_node():
            raise agreed(ExchangeError("ranks of several nodes cannot share memory"))
        num_elements = max(1, num_elements)
        num_bytes = num_elements * dtype.itemsize
        window = self._mpi.Win.Allocate_shared(num_bytes if owner in (None, self.rank) else 0, 1, comm=self._node)
        window.Lock_all()
        self._windows.append(window)
        vectors = []
        for rank in range(self.size) if owner is None else (owner,):
            memory, _ = window.Shared_query(rank)
            vectors.append(torch.frombuffer(memory, dtype=dtype, count=num_elements))
        return vectors

    @_bounded
    def free_shared(self, keep: int = 0) -> int:
        while len(self._windows) > keep:
            window = self._windows.pop()
            window.Unlock_all()
            window.Free()
        return len(self._windows)

    def barrier(self) -> None:
        for window in self._windows:
            window.Sync()
        self.wait(self._world.Ibarrier())
        for window in self._windows:
            window.Sync()

    @_bounded
    def reduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        mine, out = _array(send), _array(recv)
        call, begun = self._world.Ireduce if self.sleeps_while_waiting else self._world.Reduce, deque[Pending | None]()
        for part in blocks(len(mine), mine.itemsize):
            self.calls += 1
            self.beat()
            begun.append(call(mine[part], out[part] if self.rank == 0 else None, op=self._mpi.SUM, root=0))
            self._until(begun, _AHEAD)
            self.bytes_up += mine[part].nbytes if self.rank else 0
        self._until(begun)

    @_bounded
    def allreduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        mine, out = _array(send), _array(recv)
        call, begun = (
            self._world.Iallreduce if self.sleeps_while_waiting else self._world.Allreduce,
            deque[Pending | None](),
        )
        for part in blocks(len(mine), mine.itemsize):
            self.calls += 1
            self.beat()
            begun.append(call(mine[part], out[part], op=self._mpi.SUM))
            self._until(begun, _AHEAD)
            self.bytes_up += mine[part].nbytes if self.size > 1 else 0
            self.bytes_down += out[part].nbytes if self.size > 1 else 0
        self._until(begun)

    @_bounded
    def plain_allreduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        self._world.Allreduce(_array(send), _array(recv), op=self._mpi.SUM)

    @_bounded
    def bcast(self, vector: torch.Tensor, root: int = 0) -> None:
        array = _array(vector)
        call, begun = self._world.Ibcast if self.sleeps_while_waiting else self._world.Bcast, deque[Pending | None]()
        for part in blocks(len(array), array.itemsize):
            self.calls += 1
            self.beat()
            begun.append(call(array[part], root=root))
            self._until(begun, _AHEAD)
            self.bytes_down += array[part].nbytes if self.rank != root else 0
        self._until(begun)

    def _until(self, begun: deque[Pending | None], most: int = 0) -> None:
        """Wait until at most `most` are under way; calls that block are over."""
        while len(begun) > most:
            if (oldest := begun.popleft()) is not None:
                self.wait(oldest)

    def alltoall(self, send: torch.Tensor, sent: CountsDispls, recv: torch.Tensor, received: CountsDispls) -> Pending:
        mine, out = _array(send), _array(recv)
        self.bytes_up += mine.itemsize * sum(length for r, (_, length) in enumerate(sent) if r != self.rank)
        request: Pending = self._world.Ialltoallv([mine, _counts(sent)], [out, _counts(received)])
        return request

    def allgather(self, vector: torch.Tensor, parts: CountsDispls) -> Pending:
        array = _array(vector)
        self.bytes_down += array.itemsize * sum(length for r, (_, length) in enumerate(parts) if r != self.rank)
        request: Pending = self._world.Iallgatherv(self._mpi.IN_PLACE, [array, _counts(parts)])
        return request

    def wait(self, pending: Pending) -> None:
        spins, most, pause_s = 0, 20 if self.oversubscribed else 1000, 5e-5
        self.depth += 1
        while not pending.Test():
            spins += 1
            if self.sleeps_while_waiting or spins > most:  # the core may be another rank's too
                self.beat()
                time.sleep(pause_s)
                # To wake costs what others could use; what is on its way fills the sockets meanwhile.
                pause_s = min(2 * pause_s, 4e-4) if self.oversubscribed else pause_s
            elif spins > 100:
                os.sched_yield()
        self.depth -= 1
        self.calls += 1

    def progress(self) -> None:
        self._world.Iprobe()

    def share(self, values: np.ndarray, meanwhile: Callable[[], Any] | None = None) -> np.ndarray:
        values = np.ascontiguousarray(values, dtype=np.float64)
        total = np.empty_like(values)
        self.depth += 1
        request = self._control.Ibarrier()
        pause_s, spins = 2e-5, 0
        # A rank that waits for slower ones gives its core away: they may share it. Only the barrier is waited for like
        # that: what is non-blocking moves on when it is tested, and a sum has many more steps to move on by.
        while not request.Test():
            if meanwhile is not None:
                meanwhile()
            spins += 1
            if spins > 20 or self.sleeps_while_waiting:
                self.beat()
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 1e-3)
        self._control.Allreduce(values, total, op=self._mpi.SUM)
        self.depth -= 1
        self.calls += 1
        self.bytes_control += values.nbytes + total.nbytes if self.size > 1 else 0
        return total

    def ishare(self, values: np.ndarray) -> tuple[Pending, np.ndarray]:
        if (
            self.sleeps_while_waiting
        ):  # beside another thread's calls Open MPI's non-blocking sums come out wrong (5.0.11, seen)
            return Over(), self.share(values)
        values = np.ascontiguousarray(values, dtype=np.float64)
        total = np.empty_like(values)
        self.bytes_control += values.nbytes + total.nbytes if self.size > 1 else 0
        return self._control.Iallreduce(values, total, op=self._mpi.SUM), total

    @_bounded
    def gather(self, row: bytes) -> list[bytes]:
        rows = bytearray(len(row) * self.size)
        self._control.Allgather(bytearray(row), rows)
        return [bytes(rows[i : i + len(row)]) for i in range(0, len(rows), len(row))] if row else [b""] * self.size

    @_bounded
    def broadcast_text(self, text: str, speaker: int) -> str:
        coded = text.encode(errors="surrogatepass")  # a file's name may be no text
        length = np.array([len(coded)], dtype=np.int64)
        self._control.Bcast(length, root=speaker)
        said = bytearray(coded if self.rank == speaker else bytes(int(length[0])))
        self._control.Bcast(said, root=speaker)
        return said.decode(errors="surrogatepass")

    def notify(self, status: int) -> None:
        # Through rank 0: a batch system signals every rank at once, and n to n would be n^2 messages.
        if self.rank:
            self._post(status, 0)
        else:
            self._relay(status)

    def _relay(self, status: int) -> None:
        if status > self._passed_on:
            self._passed_on = status
            for rank in range(1, self.size):
                self._post(status, rank)

    def _post(self, status: int, to: int, tag: int = _NOTICE) -> None:
        buffer = np.array([status], dtype=np.int64)
        self._sent.append((self._control.Isend(buffer, dest=to, tag=tag), buffer))

    def set_up(self, timeout_s: float) -> None:
        if self._vigil is not None:
            self._vigil.set_up(timeout_s)
            self._beat_s, self.depth = 0.0, 0

    def took(self, seconds: float) -> None:
        if self._vigil is not None:
            self._vigil.round(seconds)

    def keep_vigil(self) -> None:
        """From now on no call of this communicator or its parts waits for ever. A call of all ranks."""
        if self.size > 1:
            pids = [int.from_bytes(row, "little") for row in self.gather(os.getpid().to_bytes(8, "little"))]
            try:
                self._vigil = Vigil(self.rank, self.hosts, pids, self._give_up)
            except (RuntimeError, MemoryError) as error:  # the others go on, and would wait for this rank
                self._give_up(f"rank {self.rank} cannot start a thread: {error}; raise ulimit -v or -u")
                return
            self._vigil.lanes.append(self)
            self._beat_s = 0.0

    def beat(self, trains: bool = False) -> None:
        if self._above is not None:
            self._above.beat(trains)
        elif time.monotonic() >= self._beat_s and self._vigil is not None:
            self._beat_s = time.monotonic() + self._vigil.period_s
            self._pulse(self._vigil, trains)

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
        if why := vigil.judge(self):
            self._give_up(why)

    def _give_up(self, why: str) -> None:
        say(f"fedmpi: {why}", error=True)
        launcher.end_later()
        self.abort(1)

    def notices(self) -> int:
        self.beat(trains=not self.depth)
        while self._control.Iprobe(tag=_NOTICE):
            buffer = np.zeros(1, dtype=np.int64)
            self._control.Recv(buffer, tag=_NOTICE)
            self._worst = max(self._worst, int(buffer[0]))
            if self.rank == 0:
                self._relay(int(buffer[0]))
        return self._worst

    @_bounded
    def finish(self) -> None:
        # Notices that nobody has read yet are read now, up to each sender's last word, so that Finalize finds none.
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
        if not self.open_runs:
            self.free_parts()
        self._worst = self._passed_on = 0  # another run may follow
        self._world.Barrier()

    def _drain(self, sender: int) -> None:
        buffer = np.zeros(1, dtype=np.int64)
        status = self._mpi.Status()
        while status.tag != _LAST:
            self._control.Recv(buffer, source=sender, status=status)

    def abort(self, code: int) -> None:
        flush()
        # Should MPI not come back from it: this clock runs even where a call holds the interpreter. It needs memory and
        # a thread, of which there may be no more.
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback_later(10, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
        time.sleep(0.1)  # a launcher hears of the abort by another way than of what was said last, and is to print both
        self._mpi.COMM_WORLD.Abort(code)


def _array(vector: torch.Tensor) -> np.ndarray:
    """The tensor's own memory as an array that MPI may sum; int64 as uint64, whose sums wrap by definition."""
    if vector.device.type != "cpu" or not vector.is_contiguous():
        raise ExchangeError(f"a collective needs contiguous host memory, got {vector.device} {vector.stride()}")
    if vector.dtype not in (torch.float32, torch.float64, torch.int64, torch.uint8):
        # mpi4py hands bfloat16 to MPI as bytes, and the sum is silently wrong.
        raise ExchangeError(f"no collective sums {vector.dtype}")
    array: np.ndarray = vector.detach().numpy()
    return array.view(np.uint64) if vector.dtype == torch.int64 else array


def _counts(spans: CountsDispls) -> tuple[list[int], list[int]]:
    return [length for _, length in spans], [start for start, _ in spans]
