"""One rank by itself: every collective is trivial. Needs no MPI."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fedmpi.comm.base import Comm, CountsDispls, Over, Pending, summable
from fedmpi.comm.machine import host_identity
from fedmpi.comm.staging import Staging
from fedmpi.errors import ExchangeError


class SoloComm(Comm):
    """A single rank; needs no MPI.

    >>> comm = SoloComm()
    >>> comm.allocate(3, torch.float32), comm.share(np.ones(2)), comm.room(1 << 40)
    (tensor([0., 0., 0.]), array([1., 1.]), '')
    """

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1
    fatal = ()

    def __init__(self) -> None:
        self.hosts, self.machines, self.staging = (socket.gethostname(),), (host_identity(),), Staging()

    def dup(self) -> SoloComm:
        return SoloComm()

    def split(self, color: int, last: bool = False) -> Comm | None:
        return None if color < 0 else self

    def shrink(self) -> Comm:
        return self

    def free_parts(self) -> None: ...

    def counted(self) -> tuple[int, int, int]:
        return self.bytes_up, self.bytes_down, self.bytes_control

    # ------------------------------------------------------------ vectors

    def _reduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        self._allreduce(send, recv)

    def _allreduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        summable(send), summable(recv)
        recv.copy_(send)

    def plain_allreduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        self._allreduce(send, recv)

    def _bcast(self, vector: torch.Tensor, root: int) -> None:
        summable(vector)

    def alltoall(self, send: torch.Tensor, sent: CountsDispls, recv: torch.Tensor, received: CountsDispls) -> Pending:
        [(start, length)], [(place, _)] = sent, received
        summable(recv)[place : place + length] = summable(send)[start : start + length]
        return Over()

    def allgather(self, vector: torch.Tensor, parts: CountsDispls) -> Pending:
        return Over()

    def isend(self, vector: torch.Tensor, rank: int) -> Pending:
        raise ExchangeError("a single rank has nobody to send to")

    def irecv(self, vector: torch.Tensor, rank: int) -> Pending:
        raise ExchangeError("a single rank receives from nobody")

    def wait(self, pending: Pending) -> None: ...

    def progress(self) -> None: ...

    def node(self) -> int:
        return 0

    def one_node(self) -> bool:
        return True

    def room(self, num_bytes: int) -> str:
        return ""

    def shared(self, num_elements: int, dtype: torch.dtype, owner: int | None = None) -> list[torch.Tensor]:
        return [torch.zeros(num_elements, dtype=dtype)]

    def free_shared(self, keep: int = 0) -> int:
        return 0

    def barrier(self) -> None: ...

    # ------------------------------------------------------------ control traffic

    def share(self, values: np.ndarray, meanwhile: Callable[[], Any] | None = None) -> np.ndarray:
        return np.array(values, dtype=np.float64)

    def ishare(self, values: np.ndarray) -> tuple[Pending, np.ndarray]:
        return Over(), self.share(values)

    def gather(self, row: bytes) -> list[bytes]:
        return [row]

    def broadcast_text(self, text: str, speaker: int) -> str:
        return text

    def set_up(self, timeout_s: float) -> None: ...

    def took(self, seconds: float) -> None: ...

    def beat(self, trains: bool = False) -> None: ...

    def notify(self, status: int) -> None: ...

    def notices(self) -> int:
        return 0

    def post(self, rank: int, numbers: Sequence[int]) -> None: ...

    def posted(self) -> list[tuple[int, tuple[int, ...]]]:
        return []

    def finish(self) -> None: ...

    def abort(self, code: int) -> None:
        os._exit(code)
