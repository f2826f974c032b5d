"""Communication between ranks, as two Protocols, and the functions that every implementation shares.

    Control     control traffic: sums of float64, rows of bytes, texts, and notices that need no answer
    Transport   vectors: collectives on contiguous buffers, and shared memory of a node
    Comm        both, with duplicates, groups and the end of a job

An implementation defines all abstract methods in one file (solo.py, threads.py, mpi.py) and passes the contract
(tests/support/programs/collectives.py). Errors of others come out as RankLost and CommTimeout.
"""

from __future__ import annotations

import hashlib
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
LOST: tuple[type[BaseException], ...] = (MemoryError, RankLost, CommTimeout)  # after which a rank agrees with nobody
_TELL, _TOLD = 8, 2000  # at most so many different texts of ranks make one message, of so many characters each

CountsDispls = Sequence[tuple[int, int]]  # where a rank's part begins and how long it is, in elements; one per rank


class Pending(Protocol):
    """A non-blocking collective in flight."""

    def Test(self) -> bool: ...


class Over:
    """A collective that has completed."""

    def Test(self) -> bool:
        return True


class Control(Protocol):
    """Control traffic; counted in `bytes_control`."""

    rank: int
    size: int
    hosts: tuple[str, ...]  # of all ranks
    fatal: tuple[type[BaseException], ...]  # errors after which a rank can agree with nobody upon anything
    bytes_control: int = 0  # both ways

    @abstractmethod
    def share(self, values: np.ndarray, meanwhile: Callable[[], Any] | None = None) -> np.ndarray:
        """The sum over ranks of a small float64 array; with entries that one rank sets and the others leave 0,
        everybody's entries. `meanwhile` is called while others are waited for."""

    @abstractmethod
    def ishare(self, values: np.ndarray) -> tuple[Pending, np.ndarray]:
        """Start a `share`; the array holds the result once it has completed."""

    @abstractmethod
    def gather(self, row: bytes) -> list[bytes]:
        """The rows of all ranks, in rank order, on every rank; rows have one length everywhere."""

    @abstractmethod
    def broadcast_text(self, text: str, speaker: int) -> str:
        """The text of rank `speaker`, on every rank."""

    @abstractmethod
    def wait(self, pending: Pending) -> None:
        """Until it is over."""

    @abstractmethod
    def set_up(self, timeout_s: float) -> None:
        """A run is being put together, whose ranks wait for each other as long as that beyond its longest round."""

    @abstractmethod
    def took(self, seconds: float) -> None:
        """A round took so long; 0 when the first one begins."""

    @abstractmethod
    def beat(self, trains: bool = False) -> None:
        """Let the others know that this rank is there, if it is time to, and whether it does something of its own.
        Raises CommTimeout where others have been silent for too long."""

    @abstractmethod
    def notify(self, status: int) -> None:
        """Let every other rank's `notices` answer at least `status` soon."""

    @abstractmethod
    def notices(self) -> int:
        """The worst notice of other ranks so far."""

    # ------------------------------------------------------------ what follows

    def gather_number(self, value: float) -> np.ndarray:
        """Every rank's number, in rank order, on every rank. Collective."""
        mine = np.zeros(self.size)
        mine[self.rank] = value
        return self.share(mine)

    def collectively(self, work: Callable[[], T]) -> T:
        """This rank's `work()`, once every rank's has come through; otherwise every rank raises the same error.

        The set-up of a run goes through here: a file that is missing on one rank is one clear line, not a hang. Where
        several ranks raise ConfigError, the line has what each says. `work` calls no collective. What is `fatal`
        goes up as it is, for the job to end: no memory, a lost rank.
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


class Transport(Protocol):
    """Collectives on contiguous vectors of the dtypes that `summable` allows. GPU vectors may be reduced, summed and
    broadcast; they pass through page-locked memory of this communicator. All others are in host memory."""

    rank: int
    size: int
    local_rank: int  # among the ranks of this host
    local_size: int
    staging: Staging
    bytes_up: int = 0  # vector payload this rank handed to collectives
    bytes_down: int = 0  # vector payload this rank got from collectives

    def allocate(
        self, num_elements: int, dtype: torch.dtype, device: torch.device | None = None, pinned: bool = False
    ) -> torch.Tensor:
        """A zeroed vector for collectives, in host memory where no device is said; page-locked if `pinned`, for what a
        plan copies to and from a GPU itself, piece by piece."""
        return torch.zeros(num_elements, dtype=dtype, device=device, pin_memory=pinned)

    def reduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        """Rank 0's `recv` becomes the sum of all ranks' `send`; elsewhere `recv` is not touched."""
        host = self.staging.host(recv, "recv")
        self._reduce(self.staging.loaded(send, "send"), host)
        if host is not recv and self.rank == 0:
            recv.copy_(host)

    def allreduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        """Every rank's `recv` becomes the sum of all ranks' `send`."""
        host = self.staging.host(recv, "recv")
        self._allreduce(self.staging.loaded(send, "send"), host)
        if host is not recv:
            recv.copy_(host)

    def bcast(self, vector: torch.Tensor, root: int = 0) -> None:
        """Every rank's `vector` becomes that of `root`."""
        host = self.staging.loaded(vector, "recv") if self.rank == root else self.staging.host(vector, "recv")
        self._bcast(host, root)
        if host is not vector and self.rank != root:
            vector.copy_(host)

    @abstractmethod
    def _reduce(self, send: torch.Tensor, recv: torch.Tensor) -> None: ...

    @abstractmethod
    def _allreduce(self, send: torch.Tensor, recv: torch.Tensor) -> None: ...

    @abstractmethod
    def _bcast(self, vector: torch.Tensor, root: int) -> None: ...

    @abstractmethod
    def plain_allreduce(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        """The same in one call on the whole vector, for benches to compare with; at most 2^31 - 1 elements."""

    @abstractmethod
    def alltoall(self, send: torch.Tensor, sent: CountsDispls, recv: torch.Tensor, received: CountsDispls) -> Pending:
        """Start to send each rank its part of `send` and to receive each rank's part into `recv`."""

    @abstractmethod
    def allgather(self, vector: torch.Tensor, parts: CountsDispls) -> Pending:
        """Start to send this rank's part of `vector` to all ranks and to receive theirs into it."""

    @abstractmethod
    def wait(self, pending: Pending) -> None:
        """Until it is over."""

    @abstractmethod
    def progress(self) -> None:
        """Give collectives in flight the chance to progress."""

    # ------------------------------------------------------------ memory that ranks of a node share

    @abstractmethod
    def node(self) -> int:
        """The first of the ranks that share memory with this one. A call of all ranks."""

    @abstractmethod
    def one_node(self) -> bool:
        """Can all ranks share memory?"""

    @abstractmethod
    def room(self, num_bytes: int) -> str:
        """Why this rank cannot have `num_bytes` of shared memory, and the others what they ask for; empty if all can.
        The same on all ranks. A call of all ranks, on any number of nodes."""

    @abstractmethod
    def shared(self, num_elements: int, dtype: torch.dtype, owner: int | None = None) -> list[torch.Tensor]:
        """Vectors that all ranks of the node read and write: one per rank, in rank order, or only `owner`'s. Zeroed.

        Writes are seen by others after `barrier`. A call of all ranks, which must be on one node.
        """

    @abstractmethod
    def free_shared(self, keep: int = 0) -> int:
        """Give back the shared vectors made after the first `keep`; nobody may hold them any more. How many are left.

        A call of all ranks.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Wait for all ranks; what each wrote into shared vectors before is what all read afterwards."""


class Comm(Control, Transport, Protocol):
    """The ranks of a run, seen from one of them."""

    oversubscribed: bool = False  # do more ranks run on these cores than there are? One that waits then sleeps soon
    sleeps_while_waiting: bool = False  # a duplicate does, so that core and interpreter are free for training
    outlives_ranks: bool = False  # can the ranks that are left go on (`shrink`) where one is lost?
    open_runs: int = 0  # a process that ends with one must not leave the others waiting

    @abstractmethod
    def dup(self) -> Comm:
        """The same ranks for one more thread: own communicators, until `finish`, and own counters. A call of all ranks.

        Raises ConfigError where MPI does not let two threads call it at once.
        """

    @abstractmethod
    def split(self, color: int, last: bool = False) -> Comm | None:
        """Those ranks that give the same color, in rank order but `last` ones behind; None for a negative one.

        A call of all ranks. What is sent among them counts as sent here.
        """

    @abstractmethod
    def shrink(self) -> Comm:
        """The ranks that are left after RankLost, in rank order. A call of all of these: what others of them wait for
        here, they wait for no longer, and get RankLost too.

        Raises ConfigError where the ranks that are left cannot go on.
        """

    @abstractmethod
    def free_parts(self) -> None:
        """Give back what was made of this communicator: duplicates, groups, shared vectors; nobody uses them any more.

        A call of all ranks.
        """

    @abstractmethod
    def counted(self) -> tuple[int, int, int]:
        """Bytes up, down and of small things so far, those of groups that were split off among them."""

    @abstractmethod
    def finish(self) -> None:
        """Wait for all ranks, with no message in flight; the last call of a run. Collective."""

    @abstractmethod
    def abort(self, code: int) -> None:
        """End every rank, now."""


def blocks(num_elements: int, element_bytes: int) -> Iterator[slice]:
    """Slices of at most BLOCK_BYTES that cover a vector in order; element counts stay far below 2^31.

    >>> [(s.start, s.stop) for s in blocks(3 << 20, 4)]
    [(0, 1048576), (1048576, 2097152), (2097152, 3145728)]
    """
    step = max(1, BLOCK_BYTES // element_bytes)
    for start in range(0, num_elements, step):
        yield slice(start, min(start + step, num_elements))


def summable(vector: torch.Tensor) -> np.ndarray:
    """The tensor's own memory as an array that may be summed; int64 as uint64, whose sums wrap by definition."""
    if vector.device.type != "cpu" or not vector.is_contiguous():
        raise ExchangeError(f"a collective needs contiguous host memory, got {vector.device} {vector.stride()}")
    if vector.dtype not in (torch.float32, torch.float64, torch.int64, torch.uint8):
        # mpi4py hands bfloat16 to MPI as bytes, and the sum is silently wrong.
        raise ExchangeError(f"no collective sums {vector.dtype}")
    array: np.ndarray = vector.detach().numpy()
    return array.view(np.uint64) if vector.dtype == torch.int64 else array
