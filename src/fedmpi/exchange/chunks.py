"""Vectors in pieces: the grid on which they are cut, the batches in which pieces travel, a channel's codec over them.

The grid depends on the vector's length alone, and every piece is encoded by itself, with a key of its own. So what a
vector's payload is does not depend on how many ranks there are, nor on how pieces travel. Codecs that choose values
(`topk`) choose them piece by piece, of 65,536 to 262,144 values; shorter vectors are one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedmpi import codecs, rng
from fedmpi.errors import ExchangeError
from fedmpi.exchange.base import ExchangeContext
from fedmpi.state import StateTensor

if TYPE_CHECKING:
    from fedmpi.exchange.config import Channel

LONGEST = 1 << 18  # elements: 1 MiB of float32
_GRAIN = 4096  # elements: codecs' blocks and chunks divide it
SHORTEST = 1 << 16  # elements: below that calls cost more than what they do, and `topk` has less to choose from
_AT_LEAST = 32  # pieces, where they can be had: enough to keep several under way and to share among ranks
MESSAGE_BYTES = 1 << 17  # shorter ones cost latency, and far shorter ones more than what is in them
_ALL = 0xFFFFFFFFFFFFFFFF
OF_RANK = "rank"  # begins the keys of what is filed under one of a rank's silos for all of them


class Grid:
    """Pieces of equal length, the last one what is left; of every stripe of `num_ranks` pieces each rank owns one.

    >>> grid = Grid(300_000, 2)
    >>> grid.length, grid.num_pieces, grid.num_stripes, list(grid.owned(1)), grid.part(4)
    (65536, 5, 3, [1, 3], slice(262144, 300000, None))
    """

    def __init__(self, num_elements: int, num_ranks: int) -> None:
        self.num_elements, self.num_ranks = num_elements, num_ranks
        even = -(-num_elements // _AT_LEAST)
        self.length = min(LONGEST, max(SHORTEST, -(-even // _GRAIN) * _GRAIN))
        self.num_pieces = -(-num_elements // self.length)
        self.num_stripes = -(-self.num_pieces // num_ranks)

    def part(self, piece: int) -> slice:
        """Where a piece lies in the vector."""
        return slice(piece * self.length, min((piece + 1) * self.length, self.num_elements))

    def size(self, piece: int) -> int:
        """Elements of a piece; 0 of one that is not there."""
        return max(0, min(self.length, self.num_elements - piece * self.length))

    def __iter__(self) -> Iterator[slice]:
        return (self.part(piece) for piece in range(self.num_pieces))

    def owned(self, rank: int) -> range:
        """The pieces of a rank, one of each stripe."""
        return range(rank, self.num_pieces, self.num_ranks)

    def kept(self, piece: int) -> slice:
        """Where a piece lies among those of its owner."""
        start = piece // self.num_ranks * self.length
        return slice(start, start + self.size(piece))

    def num_owned(self, rank: int) -> int:
        """Elements of a rank's pieces."""
        return sum(self.size(piece) for piece in self.owned(rank))


def stripes_per_batch(grid: Grid, up: Channel, down: Channel) -> int:
    """Stripes whose pieces travel in one message to each owner: as many as make it worth sending, where they are short.

    Payloads of one message lie side by side, so they have to be of one size, and a multiple of 4 bytes; values that
    travel as they are lie where they are.
    """
    if up.plain or down.plain:
        return 1
    sizes = [way.codec.max_bytes(grid.length) for way in (up, down)]
    fixed = up.codec.fixed and down.codec.fixed and not any(size % 4 for size in sizes)
    return max(1, min(MESSAGE_BYTES // max(sizes), grid.num_stripes)) if fixed else 1


class Batches:
    """The stripes of a grid, `depth` of them to a batch: one message from each rank to each owner.

    >>> batches = Batches(Grid(300_000, 2), 2)  # five pieces in three stripes
    >>> batches.num, batches.pieces(0), batches.pieces(0, owner=1), [batches.offset(piece) for piece in range(5)]
    (2, range(0, 4), range(1, 4, 2), [0, 2, 1, 3, 4])
    """

    def __init__(self, grid: Grid, depth: int) -> None:
        self.grid, self.depth, self.num_ranks = grid, depth, grid.num_ranks
        self.num = -(-grid.num_stripes // depth)
        self.width = depth * grid.num_ranks  # pieces of a batch
        self.num_offsets = self.num * self.width

    def pieces(self, batch: int, owner: int | None = None) -> range:
        """The pieces of a batch; of these an owner's."""
        first, stop = batch * self.width, min((batch + 1) * self.width, self.grid.num_pieces)
        return range(first, stop) if owner is None else range(first + owner, stop, self.num_ranks)

    def offset(self, piece: int) -> int:
        """Where a piece's payload lies among those of all: by batches, in these by owners, with these by stripes."""
        stripe, owner = divmod(piece, self.num_ranks)
        batch, stripe = divmod(stripe, self.depth)
        return (batch * self.num_ranks + owner) * self.depth + stripe

    def length(self, batch: int, owner: int, sizes: Sequence[int] | np.ndarray, stride: int) -> int:
        """Of the payloads of an owner's pieces, `stride` apart, given the sizes of all; 0 where nothing is sent."""
        pieces = self.pieces(batch, owner)
        last = int(sizes[pieces[-1]]) if pieces else 0
        return (len(pieces) - 1) * stride + last if last else 0


def stride(codec: codecs.Codec, grid: Grid) -> int:
    """Bytes from the payload of a piece to that of the next."""
    return -(-codec.max_bytes(grid.length) // 4) * 4


class Coder:
    """A channel's codec over the pieces of a vector. Payloads of all pieces lie `stride` bytes apart.

    Vectors and payloads are tensors, or `codecs.bare` of them. Payloads are in host memory, which MPI reads; vectors on
    a GPU are encoded there first, and decoded out of the same memory there.
    """

    def __init__(self, channel: Channel, grid: Grid, seed: int, device: torch.device, way: str) -> None:
        self.channel, self.codec, self.grid, self._seed, self._way = channel, channel.codec, grid, seed, way
        self.stride = stride(self.codec, grid)
        sizes = (0, grid.length, grid.size(grid.num_pieces - 1))
        self._num_bytes = {size: self.codec.max_bytes(size) for size in sizes}
        self._key = 0
        self.round = 0
        self.failed: ExchangeError | None = None  # the first value of this round that the codec refused
        on_device = torch.device(device).type != "cpu"
        self._there_B = torch.zeros(self.stride, dtype=torch.uint8, device=device) if on_device else None
        codecs.warm(self.codec, device)

    def start(self, round: int, who: str = "") -> None:
        """The round, and whose vector comes next: random bits depend on both. Linear codecs have one key for all."""
        self.round, self.failed = round, None
        self._key = rng.key(
            self._seed, purpose=f"encode {self._way}", round=round, silo="" if self.codec.linear else who
        )

    def _of(self, piece: int) -> int:
        # Codecs count on from a key, so the keys of two pieces must not lie at a distance that means something to them.
        z = (self._key ^ (piece * 0xD1B54A32D192ED03)) & _ALL
        z = ((z ^ (z >> 33)) * 0xFF51AFD7ED558CCD) & _ALL
        z = ((z ^ (z >> 33)) * 0xC4CEB9FE1A85EC53) & _ALL
        return z ^ (z >> 33)

    def slot(self, payloads: Any, place: int) -> Any:
        """The room of the payload that lies at this place among those of all."""
        return payloads[place * self.stride : (place + 1) * self.stride]

    def num_bytes(self, piece: int) -> int:
        """The longest payload of a piece; of codecs of fixed size every payload of it."""
        return self._num_bytes[self.grid.size(piece)]

    def encode(self, x_N: Any, payload_B: Any, piece: int, scale: float, residual_N: Any) -> int:
        """Bytes written; the residual, if there is one, becomes what is lost, once its decay is taken off."""
        if residual_N is not None and self.channel.decay != 1.0:
            residual_N *= np.float32(self.channel.decay)
        try:
            if self._there_B is None:
                return self.codec.encode(x_N, payload_B, self._of(piece), scale, residual_N)
            num_bytes = self.codec.encode(x_N, self._there_B, self._of(piece), scale, residual_N)
            torch.as_tensor(payload_B)[:num_bytes].copy_(self._there_B[:num_bytes])
            return num_bytes
        except ExchangeError as error:
            part = self.grid.part(piece)
            raise ExchangeError(f"exchange.{self._way}: values {part.start} to {part.stop}: {error}") from None

    def decode(self, payload_B: Any, out_N: Any, piece: int) -> None:
        """What a payload of this round says of the piece."""
        self.codec.decode(self._arrived(payload_B), out_N, self._of(piece))

    def add(self, payload_B: Any, sum_N: Any, piece: int, weight: float) -> None:
        """The same, times weight, added."""
        self.codec.add(self._arrived(payload_B), sum_N, self._of(piece), weight)

    def encode_or_note(self, x_N: Any, payload_B: Any, piece: int, scale: float, residual_N: Any) -> int:
        """As `encode`, but where the codec refuses a value zeros travel, since other ranks wait for something, and
        `failed` has the error."""
        try:
            return self.encode(x_N, payload_B, piece, scale, residual_N)
        except ExchangeError as error:
            self.failed = self.failed or error
            payload_B[:] = 0
            return self.num_bytes(piece) if self.codec.fixed else 0

    def add_or_note(self, payload_B: Any, sum_N: Any, piece: int, weight: float) -> None:
        """As `add`, but what cannot be decoded is left out and `failed` has the error."""
        try:
            self.add(payload_B, sum_N, piece, weight)
        except ExchangeError as error:
            self.failed = self.failed or error

    def raise_failed(self) -> None:
        """What the codec refused since the round was started."""
        if self.failed is not None:
            raise self.failed

    def _arrived(self, payload_B: Any) -> Any:
        """A payload where the vectors are."""
        if self._there_B is None:
            return payload_B
        return self._there_B[: len(payload_B)].copy_(torch.as_tensor(payload_B))


class RankResidual:
    """What feedback keeps of a rank's sum, in weighted units. It is filed under the first silo that the rank hosts, so
    that it moves with that silo; ranks add up what they find with theirs."""

    def __init__(self, channel: Channel, params_P: torch.Tensor, facts: ExchangeContext) -> None:
        self._silo = facts.hosted[0] if facts.hosted else None
        self._total_weight = facts.total_weight
        used = channel.feedback and self._silo is not None
        self.residual_P = torch.zeros_like(params_P) if used else None
        self._bare_P = None if self.residual_P is None else codecs.bare(self.residual_P)

    def part(self, part: slice) -> Any:
        """As codecs take it; None without feedback."""
        return None if self._bare_P is None else self._bare_P[part]

    def state(self) -> Iterator[StateTensor]:
        """The residual, if there is one, and the weight that its units go by."""
        if self.residual_P is not None and self._silo is not None:
            yield StateTensor((OF_RANK, "feedback"), self.residual_P, "per_silo", self._silo)
            total = torch.tensor(self._total_weight, dtype=torch.float64)
            yield StateTensor((OF_RANK, "weight"), total, "per_silo", self._silo)

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """The sum of what is filed under this rank's silos, in units of the weight that all silos have now."""
        if self.residual_P is None:
            return
        self.residual_P.zero_()
        weights = {one.silo: float(one.tensor) for one in stored if one.key[1] == "weight"}
        for one in (one for one in stored if one.key[1] == "feedback"):
            part_P, before = one.tensor.to(self.residual_P.device), weights[one.silo]
            self.residual_P.add_(part_P if before == self._total_weight else part_P * (before / self._total_weight))


class SiloResiduals:
    """What feedback keeps of each silo. It changes when the round's vectors have travelled, and not before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[str, torch.Tensor] = {}
        self._next: dict[str, torch.Tensor] = {}  # once this round's vectors have travelled
        self._spare: list[torch.Tensor] = []

    def begin(self) -> None:
        """Forget the drafts of a round that was broken off."""
        self._spare.extend(self._next.values())
        self._next.clear()

    def draft(self, silo: str, like_P: torch.Tensor) -> torch.Tensor:
        """A copy of the silo's, to be written to."""
        residual_P = self._spare.pop() if self._spare else torch.zeros_like(like_P)
        before = self._kept.get(silo)
        self._next[silo] = residual_P.copy_(before) if before is not None else residual_P.zero_()
        return residual_P

    def commit(self) -> None:
        """The drafts become what is kept."""
        for silo, residual_P in self._next.items():
            if silo in self._kept:
                self._spare.append(self._kept[silo])
            self._kept[silo] = residual_P
        self._next.clear()

    def state(self) -> Iterator[StateTensor]:
        """What is kept of each."""
        return (StateTensor(("feedback",), tensor, "per_silo", silo) for silo, tensor in self._kept.items())

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """That of the silos that this rank hosts now."""
        self._kept = {one.silo: one.tensor.to(self._device) for one in stored}
