"""Ranks as threads of one process: tests exchanges on several ranks, and lost ranks, without MPI.

    on_ranks(3, lambda comm: comm.gather(bytes([comm.rank])))    # results by rank

For tests and experiments only. A whole run needs one process per rank, because signals, the trained module and torch's
random state belong to the process.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from fedmpi.comm.base import LOST, Comm, CountsDispls, Over, Pending, summable
from fedmpi.comm.machine import host_identity
from fedmpi.comm.staging import Staging
from fedmpi.errors import CommTimeout, ExchangeError, RankLost

T = TypeVar("T")

LIMIT_S = 20.0  # time limit of a call, in seconds


def on_ranks(num_ranks: int, work: Callable[[Comm], T], limit_s: float = LIMIT_S) -> list[T]:
    """Runs work(comm) on every rank at once; returns the results in rank order. Raises the first rank's error, RankLost
    last, which only follows from another rank's.

    >>> on_ranks(2, lambda comm: comm.share(np.eye(2)[comm.rank]).tolist())
    [[1.0, 1.0], [1.0, 1.0]]
    """
    meeting = _Meeting(range(num_ranks), limit_s)

    def rank(number: int) -> T:
        try:
            return work(ThreadComm(meeting, number))
        except BaseException:
            meeting.lose(number)
            raise

    with ThreadPoolExecutor(num_ranks) as pool:
        done = [pool.submit(rank, number) for number in range(num_ranks)]
    errors = [error for future in done if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, RankLost)):
        raise error
    return [future.result() for future in done]


class _Meeting:
    """State that the ranks of one communicator share: what each contributed to a call, until all have read it."""

    def __init__(self, ranks: Any, limit_s: float) -> None:
        self.ranks, self.limit_s = list(ranks), limit_s  # numbers of their threads
        self.changed = threading.Condition()
        self.lost: set[int] = set()  # numbers of lost threads
        self.made: dict[Any, Any] = {}  # shared objects, made by the first rank that asks: vectors, groups
        self.notices: dict[int, int] = {}
        self.posted: dict[int, list[tuple[int, tuple[int, ...]]]] = {}  # by receiver
        self.letters: dict[tuple[int, int], deque[np.ndarray]] = {}  # vectors by sender and receiver
        self._brought: dict[Any, dict[int, Any]] = {}  # by call and rank: the contribution
        self._left: dict[Any, int] = {}  # by call: number of ranks that have not read it yet
        self._parts: list[_Meeting] = []

    def lose(self, number: int) -> None:
        """Marks a thread as lost, so that no rank waits for it."""
        with self.changed:
            self.lost.add(number)
            self.changed.notify_all()
            parts = list(self._parts)
        for part in parts:
            part.lose(number)

    def make(self, key: Any, what: Callable[[], T]) -> T:
        """The object under this key; the first rank that asks makes it."""
        with self.changed:
            if key not in self.made:
                self.made[key] = what()
                if isinstance(self.made[key], _Meeting):
                    self.made[key].lost = set(self.lost)
                    self._parts.append(self.made[key])
            found: T = self.made[key]
            return found

    def bring(self, call: Any, rank: int, value: Any) -> None:
        with self.changed:
            self._brought.setdefault(call, {})[rank] = value
            self.changed.notify_all()

    def missing(self, call: Any) -> list[int]:
        """Ranks that have not contributed to the call yet."""
        brought = self._brought.get(call, {})
        return [rank for rank in range(len(self.ranks)) if rank not in brought]

    def is_whole(self, call: Any) -> bool:
        """Whether every rank has contributed. Raises RankLost if a lost rank has not."""
        missing = self.missing(call)
        if gone := [rank for rank in missing if self.ranks[rank] in self.lost]:
            raise RankLost(gone)
        return not missing

    def take(self, call: Any) -> list[Any]:
        """All contributions, in rank order."""
        with self.changed:
            brought = self._brought[call]
            self._left[call] = self._left.get(call, len(self.ranks)) - 1
            if not self._left[call]:
                del self._brought[call], self._left[call]
            return [brought[rank] for rank in range(len(self.ranks))]


class _UnderWay:
    """A non-blocking call in flight; `land` receives the contributions of all ranks."""

    def __init__(self, meeting: _Meeting, call: Any, land: Callable[[list[Any]], None]) -> None:
        self.meeting, self.call = meeting, call
        self._land: Callable[[list[Any]], None] | None = land

    def Test(self) -> bool:
        with self.meeting.changed:
            if self._land is not None and self.meeting.is_whole(self.call):
                land, self._land = self._land, None
                land(self.meeting.take(self.call))
        return self._land is None


class _Letter:
    """A vector that another rank may have sent; `land` receives it."""

    def __init__(self, meeting: _Meeting, way: tuple[int, int], land: Callable[[np.ndarray], None]) -> None:
        self.meeting, self.way = meeting, way
        self._land: Callable[[np.ndarray], None] | None = land

    def Test(self) -> bool:
        with self.meeting.changed:
            if self._land is not None:
                if self.meeting.letters.get(self.way):
                    land, self._land = self._land, None
                    land(self.meeting.letters[self.way].popleft())
                elif self.meeting.ranks[self.way[0]] in self.meeting.lost:
                    raise RankLost([self.way[0]])
        return self._land is None


class ThreadComm(Comm):
    """One thread among several. Vectors and control traffic have separate call counters, like communicators in MPI."""

    fatal = LOST

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self._meeting = meeting
        self.rank = self.local_rank = rank
        self.size = self.local_size = len(meeting.ranks)
        self.hosts, self.machines = (socket.gethostname(),) * self.size, (host_identity(),) * self.size
        self.staging = Staging()
        self._calls: dict[str, int] = {}
        self._groups: list[Comm] = []
        self._vectors: list[Any] = []  # keys of shared vectors

    def _next(self, lane: str) -> tuple[str, int]:
        self._calls[lane] = self._calls.get(lane, 0) + 1
        return lane, self._calls[lane]

    def _begin(self, lane: str, kind: str, value: Any, land: Callable[[list[Any]], None]) -> _UnderWay:
        call = self._next(lane)
        self._meeting.bring(call, self.rank, (kind, value))

        def landed(brought: list[Any]) -> None:
            if len(kinds := {name for name, _ in brought}) > 1:
                raise ExchangeError(f"ranks are in different calls: {', '.join(sorted(kinds))}")
            land([value for _, value in brought])

        return _UnderWay(self._meeting, call, landed)

    def _all(self, lane: str, kind: str, value: Any) -> list[Any]:
        """The contributions of all ranks, in rank order."""
        brought: list[Any] = []
        self.wait(self._begin(lane, kind, value, brought.extend))
        return brought

    def wait(self, pending: Pending) -> None:
        meeting, began_s = self._meeting, time.perf_counter()
        with meeting.changed:
            if not meeting.changed.wait_for(pending.Test, meeting.limit_s):
                missing = meeting.missing(pending.call) if isinstance(pending, _UnderWay) else []
                raise CommTimeout(missing, f"rank {self.rank} has waited for {meeting.limit_s:g} s")
        self.transfer_s += time.perf_counter() - began_s

    # ------------------------------------------------------------ vectors

    def _reduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        mine, out = summable(send), summable(recv)
        total = sum(self._all("vectors", "reduce", mine.copy()))
        if self.rank == 0:
            out[:] = total
        else:
            self.bytes_up += mine.nbytes

    def _allreduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        mine, out = summable(send), summable(recv)
        out[:] = sum(self._all("vectors", "allreduce", mine.copy()))
        if self.size > 1:
            self.bytes_up += mine.nbytes
            self.bytes_down += out.nbytes

    def plain_allreduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        summable(recv)[:] = sum(self._all("vectors", "allreduce", summable(send).copy()))

    def _bcast(self, vector: torch.Tensor, root: int) -> None:
        array = summable(vector)
        array[:] = self._all("vectors", "bcast", array.copy())[root]
        self.bytes_down += array.nbytes if self.rank != root else 0

    def alltoall(self, send: torch.Tensor, sent: CountsDispls, recv: torch.Tensor, received: CountsDispls) -> Pending:
        mine, out = summable(send), summable(recv)
        self.bytes_up += mine.itemsize * sum(length for r, (_, length) in enumerate(sent) if r != self.rank)

        def land(parts: list[list[np.ndarray]]) -> None:
            for rank, (start, length) in enumerate(received):
                part = parts[rank][self.rank]
                if len(part) != length:
                    raise ExchangeError(f"rank {rank} sent {len(part)} elements where {length} are waited for")
                out[start : start + length] = part

        return self._begin("vectors", "alltoall", [mine[s : s + n].copy() for s, n in sent], land)

    def allgather(self, vector: torch.Tensor, parts: CountsDispls) -> Pending:
        array = summable(vector)
        self.bytes_down += array.itemsize * sum(length for r, (_, length) in enumerate(parts) if r != self.rank)

        def land(come: list[np.ndarray]) -> None:
            for part, (start, length) in zip(come, parts, strict=True):
                if len(part) != length:
                    raise ExchangeError(f"{len(part)} elements came where {length} are waited for")
                array[start : start + length] = part

        start, length = parts[self.rank]
        return self._begin("vectors", "allgather", array[start : start + length].copy(), land)

    def isend(self, vector: torch.Tensor, rank: int) -> Pending:
        array = summable(vector)
        self.bytes_up += array.nbytes
        with self._meeting.changed:
            self._meeting.letters.setdefault((self.rank, rank), deque()).append(array.copy())
            self._meeting.changed.notify_all()
        return Over()

    def irecv(self, vector: torch.Tensor, rank: int) -> Pending:
        array = summable(vector)

        def land(sent: np.ndarray) -> None:
            if sent.shape != array.shape or sent.dtype != array.dtype:
                raise ExchangeError(f"{len(sent)} elements came where {len(array)} are waited for")
            array[:] = sent

        return _Letter(self._meeting, (rank, self.rank), land)

    def progress(self) -> None: ...

    def node(self) -> int:
        return 0

    def one_node(self) -> bool:
        return True

    def room(self, num_bytes: int) -> str:
        return ""

    def shared(self, num_elements: int, dtype: torch.dtype, owner: int | None = None) -> list[torch.Tensor]:
        self._all("vectors", "shared", None)
        number = self.size if owner is None else 1
        key = self._next("shared")
        self._vectors.append(key)
        return self._meeting.make(key, lambda: [torch.zeros(num_elements, dtype=dtype) for _ in range(number)])

    def free_shared(self, keep: int = 0) -> int:
        self._all("vectors", "free_shared", None)
        for key in self._vectors[keep:]:
            self._meeting.made.pop(key, None)
        del self._vectors[keep:]
        return len(self._vectors)

    def barrier(self) -> None:
        self._all("vectors", "barrier", None)

    # ------------------------------------------------------------ control traffic

    def share(self, values: np.ndarray, meanwhile: Callable[[], Any] | None = None) -> np.ndarray:
        pending, total = self.ishare(values)
        if meanwhile is not None:
            while not pending.Test():
                meanwhile()
                with self._meeting.changed:
                    self._meeting.changed.wait(1e-3)
        self.wait(pending)
        return total

    def ishare(self, values: np.ndarray) -> tuple[Pending, np.ndarray]:
        total = np.array(values, dtype=np.float64)
        self.bytes_control += 2 * total.nbytes if self.size > 1 else 0

        def land(brought: list[np.ndarray]) -> None:
            total[...] = sum(brought)

        return self._begin("control", "share", total.copy(), land), total

    def gather(self, row: bytes) -> list[bytes]:
        return self._all("control", "gather", bytes(row))

    def broadcast_text(self, text: str, speaker: int) -> str:
        said: str = self._all("control", "broadcast_text", text)[speaker]
        return said

    def set_up(self, timeout_s: float) -> None: ...

    def took(self, seconds: float) -> None: ...

    def beat(self, trains: bool = False) -> None: ...

    def notify(self, status: int) -> None:
        with self._meeting.changed:
            for rank in range(self.size):
                if rank != self.rank:
                    self._meeting.notices[rank] = max(status, self._meeting.notices.get(rank, 0))

    def notices(self) -> int:
        return self._meeting.notices.get(self.rank, 0)

    def post(self, rank: int, numbers: Sequence[int]) -> None:
        with self._meeting.changed:
            self._meeting.posted.setdefault(rank, []).append((self.rank, (*numbers, 0, 0, 0)[:3]))
            self._meeting.changed.notify_all()

    def posted(self) -> list[tuple[int, tuple[int, ...]]]:
        with self._meeting.changed:
            return self._meeting.posted.pop(self.rank, [])

    # ------------------------------------------------------------ ranks

    def dup(self) -> ThreadComm:
        key = self._next("dup")
        ranks = self._meeting.ranks
        return ThreadComm(self._meeting.make(key, lambda: _Meeting(ranks, self._meeting.limit_s)), self.rank)

    def split(self, color: int, last: bool = False) -> Comm | None:
        told = self._all("control", "split", (color, last))
        key = (*self._next("split"), color)
        group = sorted((last, rank) for rank, (its, last) in enumerate(told) if its == color)
        ranks = [self._meeting.ranks[rank] for _, rank in group]
        if color < 0:
            return None
        made = self._meeting.make(key, lambda: _Meeting(ranks, self._meeting.limit_s))
        self._groups.append(part := ThreadComm(made, ranks.index(self._meeting.ranks[self.rank])))
        return part

    def shrink(self) -> Comm:
        with self._meeting.changed:
            ranks = [number for number in self._meeting.ranks if number not in self._meeting.lost]
        made = self._meeting.make(("shrink", *ranks), lambda: _Meeting(ranks, self._meeting.limit_s))
        return ThreadComm(made, ranks.index(self._meeting.ranks[self.rank]))

    def free_parts(self) -> None:
        self._groups.clear()
        self.free_shared()

    def counted(self) -> tuple[int, int, int]:
        own = (self.bytes_up, self.bytes_down, self.bytes_control)
        up, down, control = (sum(some) for some in zip(own, *(group.counted() for group in self._groups), strict=True))
        return up, down, control

    def finish(self) -> None:
        self.barrier()
        self._meeting.notices.pop(self.rank, None)
        self.posted()
        with self._meeting.changed:
            for way in [way for way in self._meeting.letters if way[1] == self.rank]:
                del self._meeting.letters[way]
        self.barrier()

    def abort(self, code: int) -> None:
        os._exit(code)
