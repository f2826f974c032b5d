"""The ring: weighted updates as integers modulo 2^16, 2^32 or 2^64, which masks make uniform. Sums cannot overflow.

Each silo's update has a norm of at most C, from `updates: clip`. Shares of the weight add up to at most 1 (the exchange
scales them so), hence no coordinate of the sum exceeds C. The ring holds 4 C for each round of progress in an update:
weights may grow beyond the base weights (counts of steps, factors of a selector). An update that would grow further is
rejected. A coordinate is rounded to a multiple of 1/unit, so the sum of K silos is off by at most K / (2 unit).

With 16 bits a norm would leave too few steps for a coordinate. So coordinates are cut to a magnitude, `span`, which
takes C's place, and are rounded at random, up or down, with the value as their expectation: the sum is off by less than
K / unit, and by nothing on average. Two of them travel in a word of 32 bits.

Noise that silos add to their words (noise.py) has room beyond that: TAIL standard deviations of its sum.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fedmpi.errors import ConfigError

GROWS = 4  # times C that fit
SAFE = 1 - 2.0**-10  # of the ring is used; norms are rounded
TAIL = 12.0  # standard deviations of noise that fit; beyond them is a coordinate with probability 4e-33
LEAST, MOST = 16, 1 << 24  # standard deviation of a silo's noise, in integers: enough to be like a Gaussian; no finer


class Spread(NamedTuple):
    """Standard deviations of noise in the ring, in units of the sum."""

    sum: float  # of the sum's noise, at most
    share: float  # of a silo's, at most
    least: float  # of a silo's, at least


class Ring(NamedTuple):
    """Integers of `bits` bits, `unit` of them per 1.0.

    >>> ring = Ring.of(32, bound=1.0, num_silos=8)
    >>> ring.unit == 2**28, ring.largest, ring.error(8) < 2e-8
    (True, 4.0, True)
    """

    bits: int
    unit: float
    bound: float  # C, of the norm of one silo's update
    largest: float  # sums up to this fit; of norms, if there is no span
    span: float = math.inf  # magnitude to which coordinates are cut before they are rounded at random; 16 bits only

    @classmethod
    def of(
        cls,
        bits: int,
        bound: float,
        num_silos: int,
        rounds_held: int = 1,
        noise: Spread | None = None,
        span: float = math.inf,
    ) -> Ring:
        """The finest ring that holds the sum of these silos. `rounds_held`: rounds of progress in one update; `noise`
        of the silos; `span`: for 16 bits, the bound of the norm if that is less. Raises ConfigError if not even the
        rounding fits, or if noise would be too coarse."""
        if bits == 16:
            span = min(span, bound)
        largest = GROWS * min(bound, span) * rounds_held
        room = (2.0 ** (bits - 1) - num_silos) * SAFE
        if room < 1 or not math.isfinite(largest):
            raise ConfigError(f"secure: {bits} bits have no room for updates of norm {bound:g} of {num_silos} silos")
        if noise is None:
            unit = 2.0 ** math.floor(math.log2(room / largest))
            return cls(bits, unit, bound, GROWS * bound * rounds_held, span)
        unit = 2.0 ** math.floor(math.log2(min(room / (largest + TAIL * noise.sum), MOST / noise.share)))
        if unit * noise.least < LEAST:
            raise ConfigError(
                f"secure: in {bits} bits a silo's noise would be {unit * noise.least:.2g} integers wide, and its "
                f"account needs {LEAST}; take secure.bits: 64, or more noise"
            )
        return cls(bits, unit, bound, largest)

    def error(self, num_silos: int, share: float = 1.0) -> float:
        """The largest error of a coordinate of the mean of these silos, which hold `share` of the weight."""
        return num_silos / ((2 if self.span == math.inf else 1) * self.unit * share)
