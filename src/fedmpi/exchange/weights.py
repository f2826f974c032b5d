"""The exact weight that a sum is divided by: an integer, so the order of addition does not matter.

A silo's share of the weight is counted in units of 2^-100. To send a weight, it is split into limbs, lowest first.
Limbs behind a vector are added by MPI, so they have only as many bits as the vector's type sums exactly: 18 of the 24
bits of a float32 on 64 ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

GRAIN = 2.0**100  # units per 1.0
BITS, LIMBS = 50, 3  # of a weight that is sent alone, in float64
_HOLDS = {  # bits of an exact sum
    torch.float32: 24,
    torch.float64: 53,
    torch.int16: 15,
    torch.int32: 31,
    torch.int64: 63,
}
_MOST = 128  # bits of a weight behind a vector


def counted(share: float) -> int:
    """A share in units of 1/GRAIN.

    >>> counted(1 / 3) * 3 / GRAIN, counted(1e-9) / GRAIN
    (1.0, 1e-09)
    """
    return int(share * GRAIN)


def cut(weight: int, bits: int = BITS, num: int = LIMBS) -> list[int]:
    """Split a weight into limbs.

    >>> whole(cut(counted(0.1))) == counted(0.1)
    True
    """
    return [*(weight >> bits * i & (1 << bits) - 1 for i in range(num - 1)), weight >> bits * (num - 1)]


def whole(limbs: Sequence[float], bits: int = BITS) -> int:
    """The weight from its limbs, or the sum of weights from the sums of their limbs."""
    return sum(int(limb) << bits * i for i, limb in enumerate(limbs))


def modulo(weight: int, bits: int = BITS, num: int = LIMBS) -> int:
    """The number nearest to 0 that equals the weight modulo 2^(bits num): sums under masks are known up to that.

    >>> modulo(5 + (1 << 150)), modulo((1 << 150) - 5)
    (5, -5)
    """
    most = 1 << bits * num
    weight %= most
    return weight - most * (weight >= most // 2)


def behind(num_ranks: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bits per limb and number of limbs behind a vector.

    >>> behind(64, torch.float32)
    (18, 8)
    """
    bits = _HOLDS[dtype] - (num_ranks - 1).bit_length()
    return bits, -(-_MOST // bits)


def nearness(share: float) -> float:
    """The power of two that scales a cohort's share into (1/2, 1] of all weight; 1 if the share is larger.

    >>> nearness(1.0), nearness(0.4), nearness(3.0), 0.5 < nearness(1e-15) * 1e-15 <= 1
    (1.0, 2.0, 1.0, True)
    """
    return float(2.0 ** max(0, int(np.frexp(1 / share)[1]) - 1))
