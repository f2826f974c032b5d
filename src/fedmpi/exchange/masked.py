"""A rank's sum under masks: silos' vectors become integers of the ring, masks are added, and sums become means again.

    encode   a silo's vector -> fixed-point words
    fold     the words of several silos -> the rank's sum
    cover    words of the sum -> words with its silos' noise, if there is any, and with this rank's masks: they leave it
    mean     the sum of all ranks' words -> float

A rank with one silo encodes it where `cover` is called, so a block is in the cache from the silo's vector to its last
mask. All sums wrap around, modulo 2^32 or 2^64. Integers of 16 bits travel in pairs, as words of 32 bits: a + 2^16 b.
Sums of such words are sums of pairs, as long as sums of single integers fit into 16 bits, which the ring's room
ensures. Sums of 16-bit words would not do: Open MPI's saturate. In memory the upper half of a word is b - 1 if a is
negative (`_borrow`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from fedmpi import rng
from fedmpi.comm.base import summable
from fedmpi.errors import ExchangeError
from fedmpi.exchange import weights
from fedmpi.exchange.cost import WORDS
from fedmpi.flat import compiled
from fedmpi.secure.masks import CHUNK, Masks
from fedmpi.secure.noise import NoiseStream
from fedmpi.secure.session import BROKEN, VECTOR, Masking

GOLDEN, MIX1, MIX2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # splitmix64


class Masked:
    """The sum of this rank's silos, as integers under masks.

    Attributes: dtype (of integers); sent (of words); pair (integers in a word: 1 or 2); folds (whether the
    round's silos are added up in memory before `cover`).
    """

    def __init__(self, secure: Masking, params_P: torch.Tensor, hosted: Sequence[str] = (), seed: int = 0) -> None:
        """`hosted`: the silos of this rank."""
        self.dtype = WORDS[secure.ring.bits]
        self.sent = torch.int64 if secure.ring.bits == 64 else torch.int32
        self.pair = self.sent.itemsize // self.dtype.itemsize
        self.folds = True
        self._secure, self._hosted, self._seed, self._num = secure, hosted, seed, len(params_P)
        self._cuts = secure.ring.span < math.inf
        self._key: tuple[str, int, int] = ("", 0, 0)  # of the random bits for a silo in a round
        self._there: Sequence[str] = ()  # the silos in the sum
        self._masks = Masks([], 8 * self.sent.itemsize)
        self._waits: tuple[str, torch.Tensor, float] | None = None  # the only silo, its vector and factor
        self._noise: list[NoiseStream] = []  # of this rank's silos in the sum
        self._round, self._per_weight = 0, 1.0
        self._float_B = torch.zeros(CHUNK, dtype=torch.float64)
        self._int_B = torch.zeros(CHUNK, dtype=self.dtype)
        self._compiled = compiled(params_P)
        if self._compiled:
            from fedmpi.kernels import vectors  # noqa: F401 (loaded at set-up: a rank whose numba is broken fails here)

    def begin(self, round: int, num_silos: int, per_weight: float) -> None:
        """Start a round in which this rank adds so many silos; `per_weight` is the share of a silo of weight 1."""
        self._round, self._waits, self.folds, self._per_weight = round, None, num_silos != 1, per_weight

    def meet(self, silos: Sequence[str]) -> None:
        """Say whose vectors are in the sum, once all ranks agree."""
        self._there = silos

    def fold(self, sum_P: torch.Tensor, silo: str, vector_P: torch.Tensor, share: float, empty: bool) -> None:
        """Add a silo's vector, times its share; `empty`: it is the first. A rank's only vector waits unchanged for
        `cover`, and `sum_P` is not touched."""
        factor = share * self._secure.ring.unit
        if not self.folds:
            self._waits = (silo, vector_P, factor)
            return
        for start in range(0, self._num, CHUNK):
            part = slice(start, min(start + CHUNK, self._num))
            words_N = sum_P[part] if empty else self._int_B[: part.stop - start]
            self.encode(silo, vector_P[part], factor, start, words_N)
            if not empty:
                sum_P[part].add_(words_N)

    def encode(self, silo: str, vector_N: torch.Tensor, factor: float, start: int, words_N: torch.Tensor) -> None:
        """Write the elements of a silo's vector from `start` on as fixed-point words: rounded to the nearest integer,
        or cut and rounded at random with 16 bits."""
        if self._cuts:
            self._dither(silo, vector_N, factor, start, words_N)
        elif self._compiled:
            from fedmpi.kernels import vectors

            vectors.quantised(vector_N.numpy(), factor, words_N.numpy())
        else:
            words_N.copy_(self._float_B[: len(words_N)].copy_(vector_N).mul_(factor).round_())

    def _dither(self, silo: str, vector_N: torch.Tensor, factor: float, start: int, words_N: torch.Tensor) -> None:
        """Cut to the span and round at random: down, plus 1 with the probability of the rest. A silo's random bits have
        a key for each round, so they are the same on any rank."""
        if self._key[:2] != (silo, self._round):
            key = rng.key(self._seed, purpose="secure words", round=self._round, silo=silo)
            self._key = (silo, self._round, key)
        limit = abs(factor) * self._secure.ring.span
        if self._compiled:
            from fedmpi.kernels import vectors

            vectors.dithered(vector_N.numpy(), factor, limit, np.uint64(self._key[2]), start, words_N.numpy())
            return
        with np.errstate(over="ignore"):
            z = np.uint64(self._key[2]) + np.arange(start + 1, start + 1 + len(words_N), dtype=np.uint64) * GOLDEN
            z = (z ^ (z >> np.uint64(30))) * MIX1
            z = (z ^ (z >> np.uint64(27))) * MIX2
        uniform = torch.from_numpy(((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53)
        exact = self._float_B[: len(words_N)].copy_(vector_N).mul_(factor).clamp_(-limit, limit)
        words_N.copy_(exact.add_(uniform).floor_())

    def open(self) -> None:
        """Take the masks of this round's sum, and its noise, whose size depends on who is in it. Call once before
        `cover`, on every rank alike."""
        self._masks = self._secure.masks(VECTOR, self._there, 8 * self.sent.itemsize)

        if self._secure.noise is not None:
            factor = self._per_weight * self._secure.ring.unit
            self._noise = self._secure.noise.streams(self._there, self._hosted, self._round, factor)

    def head(self, weight: int, num_silos: int, bits: int, num: int) -> torch.Tensor:
        """What is summed beside the vector: the weight as `num` limbs of `bits` bits, and the number of silos, with the
        masks behind the vector's."""
        start = -(-self._num // self.pair)
        limbs = covered(weight, self._masks, start, bits, num)
        head = torch.tensor([*limbs, num_silos], dtype=self.sent)
        self._masks.add(summable(head[num:]), start + num)
        return head

    def cover(self, sum_N: torch.Tensor, start: int = 0) -> None:
        """Add this rank's masks to the integers of its sum from `start` on, an even number, in place; those of a silo
        that waits are written first. What lies behind the vector's end counts as 0."""
        for low in range(0, len(sum_N), CHUNK):
            part_N, first = sum_N[low : low + CHUNK], start + low
            own_N = part_N[: max(0, self._num - first)]
            part_N[len(own_N) :] = 0
            if self._waits is None:
                self._mask(part_N, first)
                continue
            silo, vector_P, factor = self._waits
            vector_N = vector_P[first : first + len(own_N)]
            if self._compiled and not self._noise and not self._cuts:  # all in one pass
                from fedmpi.kernels import vectors

                words = own_N.numpy()
                streams = self._masks.streams(first, len(words)).view(words.dtype)
                vectors.masked(vector_N.numpy(), factor, streams, self._masks.signs, words)
            else:
                self.encode(silo, vector_N, factor, first, own_N)
                self._mask(part_N, first)

    def _mask(self, part_N: torch.Tensor, start: int) -> None:
        """Add noise and masks to at most CHUNK integers."""
        for share in self._noise:
            share.add(summable(part_N), start, self._num)
        if self.pair == 2:
            if len(part_N) % 2:  # the lower half of a word stands for itself
                word = torch.zeros(2, dtype=self.dtype)
                word[0] = part_N[-1]
                self._mask(part_N[:-1], start)
                self._mask(word, start + len(part_N) - 1)
                part_N[-1] = word[0]
                return
            _borrow(part_N, -1)
            part_N, start = part_N.view(self.sent), start // 2
        if self._compiled:
            from fedmpi.kernels import vectors

            words = part_N.numpy()
            vectors.add_signed(self._masks.streams(start, len(words)).view(words.dtype), self._masks.signs, words)
        else:
            self._masks.add(summable(part_N), start)

    def mean(self, rows_N: Sequence[torch.Tensor], weight: float, mean_N: torch.Tensor, adds: bool = False) -> None:
        """Write the sum of the rows / weight into `mean_N`, or add it there (`adds`); `weight` counts grains
        (weights.py)."""
        factor = weights.GRAIN / self._secure.ring.unit / weight
        if self._compiled and self.pair == 1:
            from fedmpi.kernels import vectors

            vectors.mean_of(tuple(row.numpy() for row in rows_N), factor, mean_N.numpy(), adds)
            return
        for start in range(0, len(mean_N), CHUNK):
            part = slice(start, min(start + CHUNK, len(mean_N)))
            total_B = self._int_B[: part.stop - start].copy_(rows_N[0][part])
            for row_N in rows_N[1:]:
                self._add(row_N[part], total_B)
            if self.pair == 2:
                _borrow(total_B[: len(total_B) // 2 * 2], 1)
            if self._compiled:
                from fedmpi.kernels import vectors

                vectors.mean_of((total_B.numpy(),), factor, mean_N[part].numpy(), adds)
                continue
            mean_B = self._float_B[: part.stop - start].copy_(total_B).mul_(factor)
            if adds:
                mean_N[part].add_(mean_B.to(mean_N.dtype))
            else:
                mean_N[part].copy_(mean_B)

    def _add(self, row_B: torch.Tensor, total_B: torch.Tensor) -> None:
        """Add words to words."""
        whole = len(total_B) // self.pair * self.pair
        total_B[:whole].view(self.sent).add_(row_B[:whole].view(self.sent))
        total_B[whole:].add_(row_B[whole:])

    def require_all(self, num_silos: int) -> None:
        """Raise ExchangeError unless the sum counts the silos that should be in it: else masks did not cancel."""
        if num_silos != len(self._there):
            raise ExchangeError(BROKEN)


def covered(weight: int, masks: Masks, start: int, bits: int, num: int) -> list[int]:
    """The limbs of a weight under a mask, for which the words from `start` on are taken. The weight is masked as a
    whole, before it is cut: so sums of limbs say no more than the sum of weights (weights.modulo)."""
    return weights.cut((weight + masks.number(start, num)) % (1 << bits * num), bits, num)


def _borrow(pairs_N: torch.Tensor, sign: int) -> None:
    """Add `sign` to the upper integer of each pair whose lower one is negative.

    >>> pairs_N = torch.tensor([-1, 5, 3, -7], dtype=torch.int16)
    >>> _borrow(pairs_N, -1)
    >>> pairs_N.view(torch.int32).tolist() == [-1 + 5 * 2**16, 3 - 7 * 2**16]
    True
    """
    lower, upper = pairs_N[0::2], pairs_N[1::2]
    upper.add_(lower.lt(0), alpha=sign)
