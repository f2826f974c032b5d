"""Communication between ranks, as two Protocols, and the functions that every implementation shares.

    Control     control traffic: sums of float64, rows of bytes, texts, and notices that need no answer
    Transport   vectors: collectives on contiguous buffers, and shared memory of a node
    Comm        both, with duplicates, groups and the end of a job

An implementation defines all abstract methods in one file (solo.py, threads.py, mpi.py) and passes the contract test
(tests/support/programs/collectives.py). Failures of other ranks are raised as RankLost and CommTimeout.
"""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from fedmpi.comm.staging import Staging
from fedmpi.errors import CommTimeout, ConfigError, ExchangeError, FedmpiError, RankLost, agreed, ranks_text

T = TypeVar("T")

BLOCK_BYTES = 4 << 20
LOST: tuple[type[BaseException], ...] = (MemoryError, RankLost, CommTimeout)  # errors that rule out further agreement
_TELL, _TOLD = 8, 2000  # at most so many different texts in one message, and characters per text

CountsDispls = Sequence[tuple[int, int]]  # (start, length) of each rank's part, in elements; one per rank


class Pending(Protocol):
    """A non-blocking collective in flight."""

    def Test(self) -> bool: ...


class Over:
    """A collective that has completed."""

    def Test(self) -> bool:
        return True


class All:
    """Several requests in flight, as one."""

    def __init__(self, requests: Sequence[Pending]) -> None:
        self._requests = list(requests)

    def Test(self) -> bool:
        while self._requests and self._requests[0].Test():
            self._requests.pop(0)
        return not self._requests


class Control(Protocol):
    """Control traffic; counted in `bytes_control`."""

    rank: int
    size: int
    hosts: tuple[str, ...]  # host name of each rank, for people and for pinned silos
    machines: tuple[bytes, ...]  # identity of each rank's host (machine.host_identity): equal for ranks on one
    fatal: tuple[type[BaseException], ...]  # errors after which a rank cannot agree with the others
    bytes_control: int = 0  # sent and received

    @abstractmethod
    def share(self, values: np.ndarray, meanwhile: Callable[[], Any] | None = None) -> np.ndarray:
        """The sum of a small float64 array over all ranks. Collective.

        If each rank sets its own entries and leaves the others 0, this is an allgather. `meanwhile` is called while
        waiting."""

    @abstractmethod
    def ishare(self, values: np.ndarray) -> tuple[Pending, np.ndarray]:
        """Starts a `share`; the returned array holds the result once the request has completed. Collective."""

    @abstractmethod
    def gather(self, row: bytes) -> list[bytes]:
        """The rows of all ranks, in rank order, on every rank; all rows must have the same length. Collective."""

    @abstractmethod
    def broadcast_text(self, text: str, speaker: int) -> str:
        """The text of rank `speaker`, on every rank. Collective."""

    @abstractmethod
    def wait(self, pending: Pending) -> None:
        """Waits until the request has completed."""

    @abstractmethod
    def set_up(self, timeout_s: float) -> None:
        """Starts the timeouts of a new run; ranks may be silent for `timeout_s` beyond the longest round."""

    @abstractmethod
    def took(self, seconds: float) -> None:
        """Records how long a round took, for the timeouts; 0 when the first one begins."""

    @abstractmethod
    def beat(self, trains: bool = False) -> None:
        """Sends a heartbeat if one is due; `trains` says whether this rank is working on its own.
        Raises CommTimeout if other ranks have been silent for too long."""

    @abstractmethod
    def notify(self, status: int) -> None:
        """Makes every other rank's `notices` return at least `status` soon. Not collective."""

    @abstractmethod
    def notices(self) -> int:
        """The highest status that other ranks have notified so far."""

    @abstractmethod
    def post(self, rank: int, numbers: Sequence[int]) -> None:
        """Send another rank up to three integers. `posted` returns them there."""

    @abstractmethod
    def posted(self) -> list[tuple[int, tuple[int, ...]]]:
        """What has arrived since the last call, as (sender, three integers), in the order sent by each sender."""

    # ------------------------------------------------------------ built on the above

    def gather_number(self, value: float) -> np.ndarray:
        """Every rank's number, in rank order, on every rank. Collective."""
        mine = np.zeros(self.size)
        mine[self.rank] = value
        return self.share(mine)

    def gather_values(self, value: Any) -> list[Any]:
        """The plain values (as JSON has them) of all ranks, in rank order, on every rank. Collective."""
        text = json.dumps(value).encode()
        longest = int(self.gather_number(len(text)).max())
        return [json.loads(row) for row in self.gather(text.ljust(longest))]

    def collectively(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank and returns this rank's result; if it fails on any rank, all raise the same error.

        Set-up steps run through here: a file missing on one rank gives one clear line, not a hang. If several ranks
        raise ConfigError, the line has the text of each. `work` must not call collectives. Errors in `fatal` (no
        memory, a lost rank) are raised unchanged, to end the job. Collective.
        """
        result: T | None = None
        error: BaseException | None = None
        try:
            result = work()
        except self.fatal:
            raise
        except (Exception, SystemExit) as raised:
            error = raised
        code = 0 if error is None else error.exit_code if isinstance(error, FedmpiError) else 1
        codes = self.gather_number(code)
        if len(failed := np.flatnonzero(codes)):
            text = "" if error is None else str(error)
            if error is not None and not isinstance(error, FedmpiError):
                text = "".join(traceback.format_exception(error))
            # A bug is reported by one rank. Input errors are reported by all: the user can then fix them in one go.
            is_input = codes[failed[0]] == ConfigError.exit_code
            if not is_input:
                speaks = f"rank {failed[0]}: " if len(failed) < self.size else ""
                raise agreed(FedmpiError(speaks + self.broadcast_text(text, int(failed[0]))))
            raise agreed(ConfigError(self._told(text, [int(r) for r in failed if codes[r] == ConfigError.exit_code])))
        return result  # type: ignore[return-value]

    def _told(self, text: str, ranks: list[int]) -> str:
        """One line with each distinct text and the ranks that raise it; without ranks if all agree. Collective."""
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
        """Raises `error` on every rank, naming the ranks that differ, unless all digests are equal. Collective."""
        rows = self.gather(digest)
        others = [r for r, row in enumerate(rows) if row != rows[0]]
        if others:
            raise agreed(error(f"{what} differs: rank 0 against {ranks_text(others)}"))

    def alike(self, error: BaseException | None) -> bool:
        """True if all ranks raise this error, so that collectives still work."""
        return self.size == 1 or (isinstance(error, FedmpiError) and error.agreed)


class Transport(Protocol):
    """Collectives on contiguous vectors of the dtypes that `summable` accepts. GPU vectors may be reduced, allreduced
    and broadcast, through page-locked memory of this communicator; all other vectors must be in host memory."""

    rank: int
    size: int
    local_rank: int  # rank among the ranks of this host
    local_size: int
    staging: Staging
    bytes_up: int = 0  # bytes this rank passed to vector collectives
    bytes_down: int = 0  # bytes this rank received from vector collectives
    transfer_s: float = 0.0  # seconds in vector collectives, and in waiting for requests

    def allocate(
        self, num_elements: int, dtype: torch.dtype, device: torch.device | None = None, pinned: bool = False
    ) -> torch.Tensor:
        """A zeroed vector for collectives, in host memory if `device` is None. Use `pinned` (page-locked) memory for
        blocks that are copied to and from a GPU."""
        return torch.zeros(num_elements, dtype=dtype, device=device, pin_memory=pinned)

    def reduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        """Sums all ranks' `send` into rank 0's `recv`; `recv` is unchanged on other ranks. Collective."""
        _sums(send)
        host = self.staging.host(recv, "recv")
        self._timed(self._reduce, self.staging.loaded(send, "send"), host)
        if host is not recv and self.rank == 0:
            recv.copy_(host)

    def allreduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        """Sums all ranks' `send` into every rank's `recv`. Collective."""
        _sums(send)
        host = self.staging.host(recv, "recv")
        self._timed(self._allreduce, self.staging.loaded(send, "send"), host)
        if host is not recv:
            recv.copy_(host)

    def bcast(self, vector: torch.Tensor, root: int = 0) -> None:
        """Copies the vector of `root` to every rank. Collective."""
        host = self.staging.loaded(vector, "recv") if self.rank == root else self.staging.host(vector, "recv")
        self._timed(self._bcast, host, root)
        if host is not vector and self.rank != root:
            vector.copy_(host)

    def _timed(self, call: Callable[..., None], *arguments: Any) -> None:
        began_s, before_s = time.perf_counter(), self.transfer_s
        try:
            call(*arguments)
        finally:
            self.transfer_s = before_s + time.perf_counter() - began_s  # its waits are counted by themselves

    @abstractmethod
    def _reduce(self, send: torch.Tensor, recv: torch.Tensor) -> None: ...

    @abstractmethod
    def _allreduce(self, send: torch.Tensor, recv: torch.Tensor) -> None: ...

    @abstractmethod
    def _bcast(self, vector: torch.Tensor, root: int) -> None: ...

    @abstractmethod
    def plain_allreduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        """`allreduce` in one call on the whole vector, as a baseline for benchmarks; at most 2^31 - 1 elements."""

    @abstractmethod
    def alltoall(self, send: torch.Tensor, sent: CountsDispls, recv: torch.Tensor, received: CountsDispls) -> Pending:
        """Starts to send each rank its part of `send` and to receive each rank's part into `recv`. Collective."""

    @abstractmethod
    def allgather(self, vector: torch.Tensor, parts: CountsDispls) -> Pending:
        """Starts to send this rank's part of `vector` to all ranks and to receive theirs into it. Collective."""

    @abstractmethod
    def isend(self, vector: torch.Tensor, rank: int) -> Pending:
        """Starts to send a vector in host memory to another rank, which receives it with `irecv`. Vectors between two
        ranks arrive in the order in which they were sent. The vector must stay unchanged until the request has
        completed. Not collective."""

    @abstractmethod
    def irecv(self, vector: torch.Tensor, rank: int) -> Pending:
        """Starts to receive a vector of this length and dtype from another rank. Not collective."""

    @abstractmethod
    def wait(self, pending: Pending) -> None:
        """Waits until the request has completed."""

    @abstractmethod
    def progress(self) -> None:
        """Lets MPI make progress on collectives in flight."""

    # ------------------------------------------------------------ shared memory of a node

    @abstractmethod
    def node(self) -> int:
        """The lowest rank that shares memory with this one. Collective."""

    @abstractmethod
    def one_node(self) -> bool:
        """Whether all ranks can share memory. Collective."""

    @abstractmethod
    def room(self, num_bytes: int) -> str:
        """Why some rank cannot get the shared memory it asks for; empty if all can. The same text on every rank.

        `num_bytes` is this rank's request. Collective, on any number of nodes."""

    @abstractmethod
    def shared(self, num_elements: int, dtype: torch.dtype, owner: int | None = None) -> list[torch.Tensor]:
        """Zeroed vectors that all ranks of the node read and write: one per rank in rank order, or only `owner`'s.

        Other ranks see writes after `barrier`. Collective; all ranks must be on one node.
        """

    @abstractmethod
    def free_shared(self, keep: int = 0) -> int:
        """Frees the shared vectors made after the first `keep`; no rank may use them any more. Collective.

        Returns how many are left.
        """

    def discard_shared(self) -> None:
        """Gives the memory of shared vectors back where ranks were lost and `free_shared` would wait for them. Not
        collective. Nobody may use the vectors any more: they read as zeros. By default their last reference frees them.
        """
        return

    @abstractmethod
    def barrier(self) -> None:
        """Waits for all ranks; writes to shared vectors before it are visible to all after it. Collective."""


class Comm(Control, Transport, Protocol):
    """The ranks of a run, seen from one of them."""

    oversubscribed: bool = False  # whether ranks outnumber the cores they run on; waiting ranks then sleep early
    sleeps_while_waiting: bool = False  # True for duplicates, to leave core and interpreter to training
    outlives_ranks: bool = False  # whether the remaining ranks can continue (`shrink`) after one is lost
    _groups: Sequence[Comm] = ()  # made by `split`
    open_runs: int = 0  # runs in progress; a process that ends with any must abort the others

    @abstractmethod
    def dup(self) -> Comm:
        """The same ranks for one more thread, with own communicators, until `finish`, and own counters. Collective.

        Raises ConfigError if MPI does not let two threads call it at once.
        """

    @abstractmethod
    def split(self, color: int, last: bool = False) -> Comm | None:
        """The ranks that pass the same color, in rank order but `last` ones at the end; None for a negative color.

        Collective. Bytes sent in the group count here as well.
        """

    @abstractmethod
    def shrink(self) -> Comm:
        """The remaining ranks after RankLost, in rank order. Collective over these ranks; their pending calls on this
        communicator end with RankLost.

        Raises ConfigError if the remaining ranks cannot continue.
        """

    @abstractmethod
    def free_parts(self) -> None:
        """Frees what was made from this communicator: duplicates, groups, shared vectors; no rank may use them
        any more. Collective.
        """

    @abstractmethod
    def counted(self) -> tuple[int, int, int]:
        """Bytes of vectors up, of vectors down, and of control traffic so far, including groups made by `split`."""

    def transferred_s(self) -> float:
        """`transfer_s` so far, including groups made by `split`."""
        return self.transfer_s + sum(group.transferred_s() for group in self._groups)

    @abstractmethod
    def finish(self) -> None:
        """Waits for all ranks, and drops notices, posts and vectors that nobody has read; the last call of a run, and
        the first one of the next. Collective."""

    @abstractmethod
    def abort(self, code: int) -> None:
        """Ends every rank immediately, with this exit code."""


def blocks(num_elements: int, element_bytes: int) -> Iterator[slice]:
    """Slices of at most BLOCK_BYTES that cover a vector in order; element counts stay far below 2^31.

    >>> [(s.start, s.stop) for s in blocks(3 << 20, 4)]
    [(0, 1048576), (1048576, 2097152), (2097152, 3145728)]
    """
    step = max(1, BLOCK_BYTES // element_bytes)
    for start in range(0, num_elements, step):
        yield slice(start, min(start + step, num_elements))


def _sums(vector: torch.Tensor) -> None:
    """Raise ExchangeError for integers of 16 bits, whose sums saturate in Open MPI, where others wrap around."""
    if vector.dtype == torch.int16:
        raise ExchangeError(f"no collective sums {vector.dtype}")


def summable(vector: torch.Tensor) -> np.ndarray:
    """The tensor's memory as an array for sums; integers as unsigned ones, whose overflow wraps. Else raises
    ExchangeError."""
    if vector.device.type != "cpu" or not vector.is_contiguous():
        raise ExchangeError(f"a collective needs contiguous host memory, got {vector.device} {vector.stride()}")
    if vector.dtype not in (torch.float32, torch.float64, torch.int16, torch.int32, torch.int64, torch.uint8):
        # mpi4py passes bfloat16 to MPI as bytes, and the sum would be silently wrong.
        raise ExchangeError(f"no collective sums {vector.dtype}")
    array: np.ndarray = vector.detach().numpy()
    unsigned = {torch.int16: np.uint16, torch.int32: np.uint32, torch.int64: np.uint64}.get(vector.dtype)
    return array if unsigned is None else array.view(unsigned)
