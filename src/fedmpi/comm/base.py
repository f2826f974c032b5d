"""What ranks say to each other, and one rank by itself.

vectors         blocking collectives on contiguous buffers, in blocks of a few MiB (a 100 MB Allreduce in 4 MiB
                blocks takes half as long as in one piece, and counts beyond 2^31 never reach MPI)
control traffic small things: sums of float64, rows, texts, and notices, point to point
"""

from __future__ import annotations

import hashlib
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from fedmpi.errors import ConfigError, ExchangeError, FedmpiError, agreed

T = TypeVar("T")

BLOCK_BYTES = 4 << 20
_TELL, _TOLD = 8, 2000  # at most so many different texts of ranks make one message, of so many characters each


def blocks(num_elements: int, element_bytes: int) -> Iterator[slice]:
    """Slices of at most BLOCK_BYTES that cover a vector in order; element counts stay far below 2^31.

    >>> [(s.start, s.stop) for s in blocks(3 << 20, 4)]
    [(0, 1048576), (1048576, 2097152), (2097152, 3145728)]
    """
    step = max(1, BLOCK_BYTES // element_bytes)
    for start in range(0, num_elements, step):
        yield slice(start, min(start + step, num_elements))


class Pending(Protocol):
    """A collective that is under way."""

    def Test(self) -> bool: ...


class Over:
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

    def free_parts(self) -> None:
        """Give back what was made of this communicator: duplicates, groups, shared vectors; nobody uses them any more.

        A call of all ranks.
        """

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
        return Over()

    def allgather(self, vector: torch.Tensor, parts: CountsDispls) -> Pending:
        """Begin to send this rank's part of `vector` to all, and to receive theirs into it."""
        return Over()

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
        return Over(), values.copy()

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


def ranks_text(ranks: list[int]) -> str:
    """Their names in a message."""
    head = ", ".join(str(r) for r in ranks[:8])
    return f"rank{'s' if len(ranks) > 1 else ''} {head}{', ...' if len(ranks) > 8 else ''}"
