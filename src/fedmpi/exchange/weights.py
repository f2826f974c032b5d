"""The weight that a sum is divided by, exactly: an integer, so that it is the same in whatever order it is added up.

A silo's share of the weight is counted in units of 2^-100. Where weights travel they are cut into limbs, lowest first.
Behind a vector, where MPI adds them up, limbs have as many bits as the vector's type holds sums of: the 24 of a float32
are 18 on each of 64 ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

GRAIN = 2.0**100  # units per 1.0
BITS, LIMBS = 50, 3  # of a weight that travels alone, in float64
_HOLDS = {torch.float32: 24, torch.float64: 53, torch.int64: 63}  # bits of an exact sum
_MOST = 128  # bits of a weight behind a vector


def counted(share: float) -> int:
    """A share in units.

    >>> counted(1 / 3) * 3 / GRAIN, counted(1e-9) / GRAIN
    (1.0, 1e-09)
    """
    return int(share * GRAIN)


def cut(weight: int, bits: int = BITS, num: int = LIMBS) -> list[int]:
    """Its limbs.

    >>> whole(cut(counted(0.1))) == counted(0.1)
    True
    """
    return [*(weight >> bits * i & (1 << bits) - 1 for i in range(num - 1)), weight >> bits * (num - 1)]


def whole(limbs: Sequence[float], bits: int = BITS) -> int:
    """The weight whose limbs these are, or the sum of those whose limbs were added up."""
    return sum(int(limb) << bits * i for i, limb in enumerate(limbs))


def behind(num_ranks: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bits and number of the limbs behind a vector.

    >>> behind(64, torch.float32)
    (18, 8)
    """
    bits = _HOLDS[dtype] - (num_ranks - 1).bit_length()
    return bits, -(-_MOST // bits)


def nearness(share: float) -> float:
    """The power of two that brings the share of a cohort between half of all weight and all of it; 1 if it is more.

    >>> nearness(1.0), nearness(0.4), nearness(3.0), 0.5 < nearness(1e-15) * 1e-15 <= 1
    (1.0, 2.0, 1.0, True)
    """
    return float(2.0 ** max(0, int(np.frexp(1 / share)[1]) - 1))
