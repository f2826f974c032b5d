"""Noise under masks: every silo adds a share of the sum's noise to its words, so that nobody sees a sum with less noise
(Kairouz, Liu & Steinke 2021, The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
Aggregation).

A share is a discrete Gaussian in the integers of the ring, from the exact sampler of kernels/discrete.py. It is added
after the update became integers, and before the masks. Who is in the sum is agreed by then, so shares are as large as
the silos that are really in it require: with n of them, of which c collude (they know their own shares), each share has
the standard deviation

    s = ceil(z D / sqrt(n - c)),    D = unit * bound + sqrt(d) / 2

z is the noise multiplier, `bound` that of the norm of a weighted update, D the norm of such an update of d elements
after rounding to integers. The sum of n - c shares then has z D or more. By their Theorem 1 the sum of m shares of
scale s is as good as one Gaussian of scale s sqrt(m), up to tau = 10 sum_{k<m} exp(-2 pi^2 s^2 k/(k+1)): with s of
LEAST or more that is below 10^-1000, nothing. A number beyond the ring would wrap; the ring has room for TAIL standard
deviations.

A share is the stream of a key that its silo alone has: AES-128-CTR, and a new key from the operating system for every
sum. Only runs that promise to repeat their noise derive it from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np

from fedmpi.errors import ConfigError, agreed
from fedmpi.layout import Layout, joined, within
from fedmpi.secure.masks import stream_into
from fedmpi.secure.ring import LEAST, MOST, SAFE, TAIL, Ring

BLOCK = 1 << 12  # values that are drawn together
STRIDE = 1 << 40  # words of a key's stream between two blocks


class NoiseShares:
    """The noise of this rank's silos, as long as the federation lasts.

    Attributes: multiplier (z, standard deviation / norm of one update); bound (of the norm of a weighted update);
    colluding (silos whose noise does not count).
    """

    def __init__(
        self, multiplier: float, bound: float, colluding: int, key_of: Callable[[str, int], bytes], layout: Layout
    ) -> None:
        """`key_of` gives a silo's key of a round, 16 bytes."""
        from fedmpi.kernels.discrete import ready  # compiled at set-up: a rank whose numba is broken fails here

        ready()
        self.multiplier, self.bound, self.colluding = multiplier, bound, colluding
        self._key_of = key_of
        self._still = joined((*layout.still, *layout.averaged))
        num_still = sum(part.stop - part.start for part in self._still)
        self._num = layout.size - num_still  # elements that get noise

    def scale(self, num_silos: int, factor: float) -> int:
        """The standard deviation of a share, in integers; `factor` turns a weighted update into integers. Raises
        ConfigError, alike on every rank, if too few silos or bits are left."""
        if (honest := num_silos - self.colluding) < 1:
            raise agreed(ConfigError(f"privacy.colluding: {self.colluding}, and only {num_silos} silos are in the sum"))
        norm = factor * self.bound + math.sqrt(self._num) / 2
        found = math.ceil(self.multiplier * norm / math.sqrt(honest))
        if not LEAST <= found <= 2 * MOST:
            raise agreed(ConfigError(f"privacy: noise of {found} integers of the ring has no exact sampler or account"))
        return found

    def fits(self, ring: Ring, fewest: int, most: int, factor: float) -> None:
        """Raise ConfigError, alike on every rank, if sums of `fewest` to `most` silos could leave the ring, or if their
        shares are not of a size that is accounted for."""
        for num in (fewest, most):
            reach = ring.largest * ring.unit + TAIL * self.scale(num, factor) * math.sqrt(num) + num
            if reach * SAFE > 2.0 ** (ring.bits - 1):
                raise agreed(ConfigError(f"secure: {ring.bits} bits have no room for the noise of {num} silos"))

    def streams(self, there: Collection[str], hosted: Sequence[str], number: int, factor: float) -> list[NoiseStream]:
        """The shares of this rank's silos that are in the sum of round `number`."""
        scale = self.scale(len(there), factor)
        return [NoiseStream(self._key_of(silo, number), scale, self._still) for silo in hosted if silo in there]


class NoiseStream:
    """A silo's share, added to the pieces of a vector. Every piece gets the same numbers, whatever the pieces are."""

    def __init__(self, key: bytes, scale: int, still: Sequence[slice] = ()) -> None:
        from fedmpi.kernels import discrete  # numba takes a second to load

        self._draw = discrete.discrete_gaussian
        self._key, self._scale, self._still = key, scale, still
        self._words = np.empty(discrete.WORDS * BLOCK, np.uint64)
        self._block = -1
        self._drawn = np.empty(BLOCK, np.int64)

    def add(self, words: np.ndarray, start: int, num: int) -> None:
        """Add to the words of a vector of `num` elements from element `start` on, in place, modulo 2^32 or 2^64. Words
        beyond the elements, and frozen elements, stay as they are."""
        stop = min(start + len(words), num)
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            first = block * BLOCK
            low, high = max(start, first), min(stop, first + BLOCK)
            drawn = self._of(block)[low - first : high - first].copy()
            for there in within(self._still, low, high - low):
                drawn[there] = 0
            part = words[low - start : high - start]
            np.add(part, drawn.astype(words.dtype), out=part)

    def _of(self, block: int) -> np.ndarray:
        if block != self._block:
            words = self._words
            stream_into(self._key, words, block * STRIDE)
            while not self._draw(self._scale, words, self._drawn):
                words = np.empty(2 * len(words), np.uint64)  # the same stream, longer
                stream_into(self._key, words, block * STRIDE)
            self._block = block
        return self._drawn
