"""Vectors in pieces: the grid that cuts them, the batches that are sent, and a channel's codec over pieces.

The grid depends only on the vector's length, and each piece is encoded by itself with its own key. So the payload of a
vector depends neither on the number of ranks nor on how pieces are sent. Codecs that choose values (`topk`) choose
within a piece of 65,536 to 262,144 values; a shorter vector is one piece.
"""

from __future__ import annotations

import time
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
_GRAIN = 4096  # elements: a multiple of the codecs' blocks and chunks
SHORTEST = 1 << 16  # elements: for shorter pieces, calls cost more than their work and `topk` has less choice
_AT_LEAST = 32  # pieces, if the vector is long enough: several in flight, and all ranks own some
MESSAGE_BYTES = 1 << 17  # shorter messages cost mostly latency
_ALL = 0xFFFFFFFFFFFFFFFF
OF_RANK = "rank"  # first part of the keys of state that a rank stores under one of its silos


class Grid:
    """Cuts a vector into pieces of equal length (the last may be shorter). Each rank owns one piece per stripe of
    `num_ranks` pieces.

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
        """The piece's place in the vector."""
        return slice(piece * self.length, min((piece + 1) * self.length, self.num_elements))

    def size(self, piece: int) -> int:
        """Elements of a piece; 0 if there is no such piece."""
        return max(0, min(self.length, self.num_elements - piece * self.length))

    def __iter__(self) -> Iterator[slice]:
        return (self.part(piece) for piece in range(self.num_pieces))

    def owned(self, rank: int) -> range:
        """The pieces that a rank owns, one of each stripe."""
        return range(rank, self.num_pieces, self.num_ranks)

    def kept(self, piece: int) -> slice:
        """The piece's place in its owner's shard."""
        start = piece // self.num_ranks * self.length
        return slice(start, start + self.size(piece))

    def num_owned(self, rank: int) -> int:
        """Elements of a rank's pieces."""
        return sum(self.size(piece) for piece in self.owned(rank))


def stripes_per_batch(grid: Grid, up: Channel, down: Channel) -> int:
    """How many stripes one message to each owner holds: more than one where payloads are short.

    The payloads of a message are adjacent, so they must have one size, a multiple of 4 bytes. Values without a codec
    are sent from where they lie, one stripe at a time.
    """
    if up.plain or down.plain:
        return 1
    sizes = [way.codec.max_bytes(grid.length) for way in (up, down)]
    fixed = up.codec.fixed and down.codec.fixed and not any(size % 4 for size in sizes)
    return max(1, min(MESSAGE_BYTES // max(sizes), grid.num_stripes)) if fixed else 1


class Batches:
    """The stripes of a grid in batches of `depth`: one message from each rank to each owner.

    >>> batches = Batches(Grid(300_000, 2), 2)  # five pieces in three stripes
    >>> batches.num, batches.pieces(0), batches.pieces(0, owner=1), [batches.offset(piece) for piece in range(5)]
    (2, range(0, 4), range(1, 4, 2), [0, 2, 1, 3, 4])
    """

    def __init__(self, grid: Grid, depth: int) -> None:
        self.grid, self.depth, self.num_ranks = grid, depth, grid.num_ranks
        self.num = -(-grid.num_stripes // depth)
        self.width = depth * grid.num_ranks  # pieces in a batch
        self.num_offsets = self.num * self.width

    def pieces(self, batch: int, owner: int | None = None) -> range:
        """The pieces of a batch, or only those of one owner."""
        first, stop = batch * self.width, min((batch + 1) * self.width, self.grid.num_pieces)
        return range(first, stop) if owner is None else range(first + owner, stop, self.num_ranks)

    def offset(self, piece: int) -> int:
        """Index of a piece's payload among all payloads, ordered by batch, then owner, then stripe."""
        stripe, owner = divmod(piece, self.num_ranks)
        batch, stripe = divmod(stripe, self.depth)
        return (batch * self.num_ranks + owner) * self.depth + stripe

    def length(self, batch: int, owner: int, sizes: Sequence[int] | np.ndarray, stride: int) -> int:
        """Length of an owner's part of a message: payloads `stride` apart, `sizes` by piece; 0 if nothing is sent."""
        pieces = self.pieces(batch, owner)
        last = int(sizes[pieces[-1]]) if pieces else 0
        return (len(pieces) - 1) * stride + last if last else 0


def stride(codec: codecs.Codec, grid: Grid) -> int:
    """Bytes between the starts of two adjacent payloads."""
    return -(-codec.max_bytes(grid.length) // 4) * 4


class Coder:
    """A channel's codec over the pieces of a vector. Payloads of all pieces lie `stride` bytes apart.

    Vectors and payloads are tensors, or `codecs.bare` of them. Payloads are in host memory, where MPI reads them.
    Vectors on a GPU are encoded and decoded there, and their payloads are copied.
    """

    def __init__(self, channel: Channel, grid: Grid, seed: int, device: torch.device, way: str) -> None:
        self.channel, self.codec, self.grid, self._seed, self._way = channel, channel.codec, grid, seed, way
        self.stride = stride(self.codec, grid)
        sizes = (0, grid.length, grid.size(grid.num_pieces - 1))
        self._num_bytes = {size: self.codec.max_bytes(size) for size in sizes}
        self._key = 0
        self.round = 0
        self.encode_s = self.decode_s = 0.0  # seconds spent so far
        self.failed: ExchangeError | None = None  # the first value of this round that the codec refused
        on_device = torch.device(device).type != "cpu"
        self._there_B = torch.zeros(self.stride, dtype=torch.uint8, device=device) if on_device else None
        codecs.warm(self.codec, device)

    def start(self, round: int, who: str = "") -> None:
        """Set the round and the sender of the next vector, which key the random bits. Linear codecs use one key for
        all."""
        self.round, self.failed = round, None
        self._key = rng.key(
            self._seed, purpose=f"encode {self._way}", round=round, silo="" if self.codec.linear else who
        )

    def _of(self, piece: int) -> int:
        # Codecs count up from their key, so the keys of two pieces must not be close in a way that matters to them.
        z = (self._key ^ (piece * 0xD1B54A32D192ED03)) & _ALL
        z = ((z ^ (z >> 33)) * 0xFF51AFD7ED558CCD) & _ALL
        z = ((z ^ (z >> 33)) * 0xC4CEB9FE1A85EC53) & _ALL
        return z ^ (z >> 33)

    def slot(self, payloads: Any, place: int) -> Any:
        """The payload memory at this index."""
        return payloads[place * self.stride : (place + 1) * self.stride]

    def num_bytes(self, piece: int) -> int:
        """Bytes of a piece's longest payload; the exact size for codecs of fixed size."""
        return self._num_bytes[self.grid.size(piece)]

    def encode(self, x_N: Any, payload_B: Any, piece: int, scale: float, residual_N: Any) -> int:
        """Encode a piece, [N], and return the payload's bytes.

        The residual, if any, is multiplied by `decay`, added to the values, and becomes what encoding loses. Raises
        ExchangeError if the codec refuses a value.
        """
        began_s = time.perf_counter()
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
        finally:
            self.encode_s += time.perf_counter() - began_s

    def decode(self, payload_B: Any, out_N: Any, piece: int) -> None:
        """Decode a payload of this round into `out_N`."""
        began_s = time.perf_counter()
        self.codec.decode(self._arrived(payload_B), out_N, self._of(piece))
        self.decode_s += time.perf_counter() - began_s

    def add(self, payload_B: Any, sum_N: Any, piece: int, weight: float) -> None:
        """Add `weight` times the decoded payload to `sum_N`."""
        began_s = time.perf_counter()
        self.codec.add(self._arrived(payload_B), sum_N, self._of(piece), weight)
        self.decode_s += time.perf_counter() - began_s

    def encode_or_note(self, x_N: Any, payload_B: Any, piece: int, scale: float, residual_N: Any) -> int:
        """Like `encode`, but a refused value sets `failed` and sends zeros, because other ranks wait for a payload."""
        try:
            return self.encode(x_N, payload_B, piece, scale, residual_N)
        except ExchangeError as error:
            self.failed = self.failed or error
            payload_B[:] = 0
            return self.num_bytes(piece) if self.codec.fixed else 0

    def add_or_note(self, payload_B: Any, sum_N: Any, piece: int, weight: float) -> None:
        """Like `add`, but a payload that cannot be decoded sets `failed` and adds nothing."""
        try:
            self.add(payload_B, sum_N, piece, weight)
        except ExchangeError as error:
            self.failed = self.failed or error

    def raise_failed(self) -> None:
        """Raise the codec's first refusal since `start`, if any."""
        if self.failed is not None:
            raise self.failed

    def _arrived(self, payload_B: Any) -> Any:
        """The payload on the vectors' device."""
        if self._there_B is None:
            return payload_B
        return self._there_B[: len(payload_B)].copy_(torch.as_tensor(payload_B))


class RankResidual:
    """The feedback residual of a rank's sum, in weighted units.

    It is stored under the rank's first silo and moves with that silo; a rank adds up the residuals that it finds.
    """

    def __init__(self, channel: Channel, params_P: torch.Tensor, facts: ExchangeContext) -> None:
        self._silo = facts.hosted[0] if facts.hosted else None
        self._total_weight = facts.total_weight
        used = channel.feedback and self._silo is not None
        self.residual_P = torch.zeros_like(params_P) if used else None
        self._bare_P = None if self.residual_P is None else codecs.bare(self.residual_P)

    def part(self, part: slice) -> Any:
        """The part for the codec; None without feedback."""
        return None if self._bare_P is None else self._bare_P[part]

    def state(self) -> Iterator[StateTensor]:
        """The residual, if any, and the total weight that its units refer to."""
        if self.residual_P is not None and self._silo is not None:
            yield StateTensor((OF_RANK, "feedback"), self.residual_P, "per_silo", self._silo)
            total = torch.tensor(self._total_weight, dtype=torch.float64)
            yield StateTensor((OF_RANK, "weight"), total, "per_silo", self._silo)

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Add up the residuals stored under this rank's silos, converted to units of the current total weight."""
        if self.residual_P is None:
            return
        self.residual_P.zero_()
        weights = {one.silo: float(one.tensor) for one in stored if one.key[1] == "weight"}
        for one in (one for one in stored if one.key[1] == "feedback"):
            part_P, before = one.tensor.to(self.residual_P.device), weights[one.silo]
            self.residual_P.add_(part_P if before == self._total_weight else part_P * (before / self._total_weight))


class SiloResiduals:
    """The feedback residual of each silo. It changes only once the round's vectors have been sent."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[str, torch.Tensor] = {}
        self._next: dict[str, torch.Tensor] = {}  # drafts of this round
        self._spare: list[torch.Tensor] = []

    def begin(self) -> None:
        """Forget the drafts of an interrupted round."""
        self._spare.extend(self._next.values())
        self._next.clear()

    def draft(self, silo: str, like_P: torch.Tensor) -> torch.Tensor:
        """A copy of the silo's residual for the codec to overwrite; zeros at first."""
        residual_P = self._spare.pop() if self._spare else torch.zeros_like(like_P)
        before = self._kept.get(silo)
        self._next[silo] = residual_P.copy_(before) if before is not None else residual_P.zero_()
        return residual_P

    def commit(self) -> None:
        """Make the drafts the residuals."""
        for silo, residual_P in self._next.items():
            if silo in self._kept:
                self._spare.append(self._kept[silo])
            self._kept[silo] = residual_P
        self._next.clear()

    def drafted(self) -> Iterator[StateTensor]:
        """The drafts of this round."""
        return (StateTensor(("feedback",), tensor, "per_silo", silo) for silo, tensor in self._next.items())

    def state(self) -> Iterator[StateTensor]:
        """The residual of each silo."""
        return (StateTensor(("feedback",), tensor, "per_silo", silo) for silo, tensor in self._kept.items())

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Restore the residuals of the silos that this rank hosts now."""
        self._kept = {one.silo: one.tensor.to(self._device) for one in stored}
