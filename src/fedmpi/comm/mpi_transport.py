"""Vectors over MPI: collectives in blocks of a few MiB, and shared-memory windows of a node.

Blocks: a 100 MB Allreduce takes half as long in 4 MiB blocks as in one call, and counts stay below 2^31."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedmpi.comm import machine
from fedmpi.comm.base import All, CountsDispls, Pending, blocks, summable
from fedmpi.comm.mpi_control import MpiControl, bounded, revoked_on_loss, translated
from fedmpi.comm.staging import Staging
from fedmpi.errors import ExchangeError, agreed

if TYPE_CHECKING:
    from mpi4py import MPI

_VECTOR = 75  # tag of vectors between two ranks
_AHEAD = 4  # blocks in flight where waiting means sleeping


class MpiTransport(MpiControl):
    """Vector collectives between the ranks of an MPI job."""

    def __init__(self, mpi: Any, world: MPI.Comm, control: MPI.Comm) -> None:
        super().__init__(mpi, world, control)
        self.staging = Staging()
        self._world = world
        self._node: MPI.Comm | None = None  # ranks that share memory with this one; created on first use
        self._windows: list[MPI.Win] = []
        self._num_sent = np.zeros(self.size)  # messages of vectors to each rank
        self._num_taken = 0  # messages of vectors that this rank has received, or begun to
        self._sending: list[All] = []  # keeps their memory, whoever gives them up

    @bounded
    def _reduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        mine, out = summable(send), summable(recv)
        call, begun = self._world.Ireduce if self.sleeps_while_waiting else self._world.Reduce, deque[Pending | None]()
        for part in blocks(len(mine), mine.itemsize):
            self.calls += 1
            self.beat()
            begun.append(call(mine[part], out[part] if self.rank == 0 else None, op=self._mpi.SUM, root=0))
            self._until(begun, _AHEAD)
            self.bytes_up += mine[part].nbytes if self.rank else 0
        self._until(begun)

    @bounded
    def _allreduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        mine, out = summable(send), summable(recv)
        world, begun = self._world, deque[Pending | None]()
        call = world.Iallreduce if self.sleeps_while_waiting else world.Allreduce
        for part in blocks(len(mine), mine.itemsize):
            self.calls += 1
            self.beat()
            begun.append(call(mine[part], out[part], op=self._mpi.SUM))
            self._until(begun, _AHEAD)
            self.bytes_up += mine[part].nbytes if self.size > 1 else 0
            self.bytes_down += out[part].nbytes if self.size > 1 else 0
        self._until(begun)

    @bounded
    def plain_allreduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        self._world.Allreduce(summable(send), summable(recv), op=self._mpi.SUM)

    @bounded
    def _bcast(self, vector: torch.Tensor, root: int) -> None:
        array = summable(vector)
        call, begun = self._world.Ibcast if self.sleeps_while_waiting else self._world.Bcast, deque[Pending | None]()
        for part in blocks(len(array), array.itemsize):
            self.calls += 1
            self.beat()
            begun.append(call(array[part], root=root))
            self._until(begun, _AHEAD)
            self.bytes_down += array[part].nbytes if self.rank != root else 0
        self._until(begun)

    def _until(self, begun: deque[Pending | None], most: int = 0) -> None:
        """Waits until at most `most` requests are in flight; blocking calls (None) have completed."""
        while len(begun) > most:
            if (oldest := begun.popleft()) is not None:
                self.wait(oldest)

    @translated
    def alltoall(self, send: torch.Tensor, sent: CountsDispls, recv: torch.Tensor, received: CountsDispls) -> Pending:
        mine, out = summable(send), summable(recv)
        self.bytes_up += mine.itemsize * sum(length for r, (_, length) in enumerate(sent) if r != self.rank)
        request: Pending = self._world.Ialltoallv([mine, _counts(sent)], [out, _counts(received)])
        return request

    @translated
    def allgather(self, vector: torch.Tensor, parts: CountsDispls) -> Pending:
        array = summable(vector)
        self.bytes_down += array.itemsize * sum(length for r, (_, length) in enumerate(parts) if r != self.rank)
        request: Pending = self._world.Iallgatherv(self._mpi.IN_PLACE, [array, _counts(parts)])
        return request

    @translated
    def isend(self, vector: torch.Tensor, rank: int) -> Pending:
        array = summable(vector)
        self.bytes_up += array.nbytes
        parts = [self._world.Isend(array[part], dest=rank, tag=_VECTOR) for part in blocks(len(array), array.itemsize)]
        self._num_sent[rank] += len(parts)
        self._sending = [one for one in self._sending if not one.Test()]
        self._sending.append(request := All(parts))
        return request

    @translated
    def irecv(self, vector: torch.Tensor, rank: int) -> Pending:
        array = summable(vector)
        parts = [
            self._world.Irecv(array[part], source=rank, tag=_VECTOR) for part in blocks(len(array), array.itemsize)
        ]
        self._num_taken += len(parts)
        return All(parts)

    def _forget_vectors(self) -> None:
        """Count the vectors between two ranks anew."""
        self._num_sent, self._num_taken, self._sending = np.zeros(self.size), 0, []

    def _drop_vectors(self) -> None:
        """Receive the vectors that nobody took, and throw them away: a later run would take them. Collective."""
        come, status = int(self.share(self._num_sent)[self.rank]), self._mpi.Status()
        while self._num_taken < come:
            if self._world.Iprobe(tag=_VECTOR, status=status):
                memory = bytearray(status.Get_count(self._mpi.BYTE))
                self._world.Recv([memory, self._mpi.BYTE], source=status.source, tag=_VECTOR)
                self._num_taken += 1
            else:
                self.beat()
                time.sleep(1e-4)
        for request in self._sending:
            self.wait(request)
        self._forget_vectors()

    @translated
    def progress(self) -> None:
        self._world.Iprobe()

    # ------------------------------------------------------------ shared memory of a node

    @bounded
    def one_node(self) -> bool:
        if self._node is None:
            node = self._world.Split_type(self._mpi.COMM_TYPE_SHARED)
            with revoked_on_loss(self._mpi, node):
                self.wait(self._world.Ibarrier())  # now every rank has its node's, and can revoke it
            self._node = node
        return bool(self._node.size == self.size)

    @bounded
    def node(self) -> int:
        self.one_node()
        assert self._node is not None
        first = np.array([self.rank], dtype=np.int64)
        self._node.Bcast(first, root=0)
        return int(first[0])

    def room(self, num_bytes: int) -> str:
        return machine.room(self, num_bytes)

    @bounded
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
        # For a single rank, Open MPI hands out used memory. The pages of a new segment are zero already, and should be
        # placed near the rank that touches them first.
        if self.size == 1:
            vectors[0].zero_()
        return vectors

    @bounded
    def free_shared(self, keep: int = 0) -> int:
        while len(self._windows) > keep:
            window = self._windows.pop()
            window.Unlock_all()
            window.Free()
        return len(self._windows)

    def discard_shared(self) -> None:
        for window in self._windows:
            assert self._node is not None
            for rank in range(self._node.size):
                memory, _ = window.Shared_query(rank)
                machine.discard(memory.address, memory.nbytes)
        self._windows.clear()
        machine.trim()  # what the lost federation leaves on the heap, several times its parameters

    @translated
    def barrier(self) -> None:
        for window in self._windows:
            window.Sync()
        self.wait(self._world.Ibarrier())
        for window in self._windows:
            window.Sync()


def _counts(spans: CountsDispls) -> tuple[list[int], list[int]]:
    return [length for _, length in spans], [start for start, _ in spans]
