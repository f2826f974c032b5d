"""Shamir's secret sharing over a prime field (Shamir 1979, How to share a secret).

A secret is the constant term of a random polynomial of degree t-1, and a share its value at a point that is not 0. Any
t shares give the secret; fewer say nothing about it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

PRIME = (1 << 521) - 1  # a Mersenne prime; secrets are 32 bytes
SHARE_BYTES = 66


def evaluate(coefficients: Sequence[int], x: int, prime: int = PRIME) -> int:
    """The polynomial's value at x; the constant term comes first.

    >>> [evaluate([1234, 166, 94], x, 1613) for x in (1, 2, 3)]
    [1494, 329, 965]
    """
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % prime
    return value


def split(secret: bytes, threshold: int, points: Sequence[int]) -> dict[int, bytes]:
    """A share for each point; `threshold` of them give the secret. Raises ValueError if that is impossible."""
    number = int.from_bytes(secret, "big")
    if not 1 <= threshold <= len(set(points)) or any(not 0 < x < PRIME for x in points) or number >= PRIME:
        raise ValueError(f"no {threshold} of {len(points)} shares of {len(secret)} bytes")
    polynomial = [number, *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {x: evaluate(polynomial, x).to_bytes(SHARE_BYTES, "big") for x in points}


def at_zero(points: Mapping[int, int], prime: int = PRIME) -> int:
    """The value at 0 of the polynomial through these points (Lagrange's interpolation).

    >>> at_zero({2: 329, 4: 176, 5: 1188}, 1613)
    1234
    """
    total = 0
    for x, y in points.items():
        above = below = 1
        for other in points:
            if other != x:
                above = above * other % prime
                below = below * (other - x) % prime
        total += y * above * pow(below, -1, prime)
    return total % prime


def join(shares: Mapping[int, bytes], threshold: int, num_bytes: int = 32) -> bytes:
    """The secret from at least `threshold` shares by point. Raises ValueError if there are fewer, or if the shares are
    not of one secret of `num_bytes`, as far as that shows."""
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares, and {threshold} are needed")
    chosen = {x: int.from_bytes(shares[x], "big") for x in sorted(shares)[:threshold]}
    try:
        return at_zero(chosen).to_bytes(num_bytes, "big")
    except OverflowError:
        raise ValueError("the shares are not of one secret") from None
