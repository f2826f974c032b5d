"""A rank's sum under masks: silos' vectors become integers of the ring, masks are added, and sums become means again.

    encode   a silo's vector -> fixed-point words
    fold     the words of several silos -> the rank's sum
    cover    words of the sum -> words with its silos' noise, if there is any, and with this rank's masks: they leave it
    mean     the sum of all ranks' words -> float

A rank with one silo encodes it where `cover` is called, so a block is in the cache from the silo's vector to its last
mask. All sums wrap around, modulo 2^32 or 2^64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedmpi.comm.base import summable
from fedmpi.errors import ExchangeError
from fedmpi.exchange import weights
from fedmpi.flat import compiled
from fedmpi.secure.masks import CHUNK, Masks
from fedmpi.secure.noise import NoiseStream
from fedmpi.secure.session import BROKEN, VECTOR, Session


class Masked:
    """The sum of this rank's silos, as integers under masks.

    Attributes: dtype (of words); folds (whether the round's silos are added up in memory before `cover`).
    """

    def __init__(self, secure: Session, params_P: torch.Tensor, hosted: Sequence[str] = ()) -> None:
        """`hosted`: the silos of this rank."""
        self.dtype = torch.int32 if secure.ring.bits == 32 else torch.int64
        self.folds = True
        self._secure, self._hosted, self._num = secure, hosted, len(params_P)
        self._there: Sequence[str] = ()  # the silos in the sum
        self._masks = Masks([], secure.ring.bits)
        self._noise: list[NoiseStream] = []  # of this rank's silos in the sum
        self._waits: tuple[torch.Tensor, float] | None = None  # the only silo's vector, and its factor
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

    def fold(self, sum_P: torch.Tensor, vector_P: torch.Tensor, share: float, empty: bool) -> None:
        """Add a silo's vector, times its share; `empty`: it is the first. A rank's only vector waits unchanged for
        `cover`, and `sum_P` is not touched."""
        factor = share * self._secure.ring.unit
        if not self.folds:
            self._waits = (vector_P, factor)
            return
        for start in range(0, self._num, CHUNK):
            part = slice(start, min(start + CHUNK, self._num))
            words_N = sum_P[part] if empty else self._int_B[: part.stop - start]
            self.encode(vector_P[part], factor, words_N)
            if not empty:
                sum_P[part].add_(words_N)

    def encode(self, vector_N: torch.Tensor, factor: float, words_N: torch.Tensor) -> None:
        """Write elements of a silo's vector as fixed-point words: rounded to the nearest integer."""
        if self._compiled:
            from fedmpi.kernels import vectors

            vectors.quantised(vector_N.numpy(), factor, words_N.numpy())
        else:
            words_N.copy_(self._float_B[: len(words_N)].copy_(vector_N).mul_(factor).round_())

    def open(self) -> None:
        """Take the masks of this round's sum, and its noise, whose size depends on who is in it. Call once before
        `cover`, on every rank alike."""
        self._masks = self._secure.masks(VECTOR, self._there, self._secure.ring.bits)
        if self._secure.noise is not None:
            factor = self._per_weight * self._secure.ring.unit
            self._noise = self._secure.noise.streams(self._there, self._hosted, self._round, factor)

    def cover(self, sum_N: torch.Tensor, start: int = 0) -> None:
        """Add this rank's masks to the words of its sum from `start` on, in place; words of a silo that waits are
        written first."""
        for low in range(0, len(sum_N), CHUNK):
            part_N, first = sum_N[low : low + CHUNK], start + low
            if self._waits is not None and first < self._num:
                self._write(part_N[: self._num - first], first, *self._waits)
                part_N, first = part_N[self._num - first :], self._num
            if len(part_N):
                self._mask(part_N, first)

    def _write(self, words_N: torch.Tensor, start: int, vector_P: torch.Tensor, factor: float) -> None:
        """Write masked words of a silo; at most CHUNK."""
        vector_N = vector_P[start : start + len(words_N)]
        if self._compiled and not self._noise:  # all in one pass
            from fedmpi.kernels import vectors

            words = words_N.numpy()
            streams = self._masks.streams(start, len(words)).view(words.dtype)
            vectors.masked(vector_N.numpy(), factor, streams, self._masks.signs, words)
        else:
            self.encode(vector_N, factor, words_N)
            self._mask(words_N, start)

    def _mask(self, words_N: torch.Tensor, start: int) -> None:
        """Add noise and masks to at most CHUNK words."""
        for share in self._noise:
            share.add(summable(words_N), start, self._num)
        if self._compiled:
            from fedmpi.kernels import vectors

            words = words_N.numpy()
            vectors.add_signed(self._masks.streams(start, len(words)).view(words.dtype), self._masks.signs, words)
        else:
            self._masks.add(summable(words_N), start)

    def mean(self, rows_N: Sequence[torch.Tensor], weight: float, mean_N: torch.Tensor, adds: bool = False) -> None:
        """Write the sum of the rows / weight into `mean_N`, or add it there (`adds`); `weight` counts grains
        (weights.py)."""
        factor = weights.GRAIN / self._secure.ring.unit / weight
        if self._compiled:
            from fedmpi.kernels import vectors

            vectors.mean_of(tuple(row.numpy() for row in rows_N), factor, mean_N.numpy(), adds)
            return
        for start in range(0, len(mean_N), CHUNK):
            part = slice(start, min(start + CHUNK, len(mean_N)))
            total_B = self._int_B[: part.stop - start].copy_(rows_N[0][part])
            for row_N in rows_N[1:]:
                total_B.add_(row_N[part])
            mean_B = self._float_B[: part.stop - start].copy_(total_B).mul_(factor)
            if adds:
                mean_N[part].add_(mean_B.to(mean_N.dtype))
            else:
                mean_N[part].copy_(mean_B)

    def require_all(self, num_silos: int) -> None:
        """Raise ExchangeError unless the sum counts the silos that should be in it: else masks did not cancel."""
        if num_silos != len(self._there):
            raise ExchangeError(BROKEN)
