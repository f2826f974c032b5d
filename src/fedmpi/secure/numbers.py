"""Small figures in a sum of messages: integers modulo 2^256, each masked as a whole.

A figure is in fixed point, with POINT bits behind the binary point. So the sum is exact up to the rounding of each
figure, says nothing but itself, and does not depend on the order. A figure that is not finite has no such number: it
counts as 0, and how many there are is summed beside it, under masks of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from fedmpi.secure.masks import derive, stream_into

POINT = 74  # bits behind the binary point
LARGEST = 2.0**136  # figures below have a number; sums of 2^13 of them are far from the modulus of session.py
BYTES = 32  # of a number
_ALL = 1 << 8 * BYTES  # the modulus
_FIGURES = "figures"  # label of the keys of numbers' masks


def fixed(value: float) -> int | None:
    """The number in fixed point; None if it has none.

    >>> fixed(-0.5) == -(1 << POINT - 1), fixed(math.inf), fixed(2.0**140)
    (True, None, None)
    """
    if not math.isfinite(value) or abs(value) >= LARGEST:
        return None
    top, bottom = value.as_integer_ratio()
    return (top << POINT) // bottom


def told(figures: Iterable[float]) -> list[int]:
    """The numbers of figures: their values, then for each one whether it is missing."""
    values = [fixed(float(figure)) for figure in figures]
    return [*(value or 0 for value in values), *(int(value is None) for value in values)]


def heard(numbers: Sequence[int]) -> np.ndarray:
    """The sums of the figures from the sums of their numbers; nan where one was missing.

    >>> heard([a + b for a, b in zip(told([0.25, 1.0, -3.0]), told([0.5, math.nan, 1.0]))]).tolist()
    [0.75, nan, -2.0]
    """
    half = len(numbers) // 2
    pairs = zip(numbers[:half], numbers[half:], strict=True)
    return np.array([math.nan if missing else signed(value) / (1 << POINT) for value, missing in pairs])


def signed(number: int) -> int:
    """The number nearest to 0 that is equal modulo 2^256."""
    number %= _ALL
    return number - _ALL * (number >= _ALL // 2)


def add_masks(key: bytes, sign: int, numbers: list[int]) -> None:
    """Add (`sign` 1) or subtract (-1) the masks of a vector's key, in place."""
    words = np.empty(len(numbers) * BYTES // 8, dtype=np.uint64)
    stream_into(derive(key, _FIGURES), words)
    for i, mask in enumerate(unpacked(words.astype("<u8").tobytes())):
        numbers[i] = (numbers[i] + sign * mask) % _ALL


def packed(numbers: Sequence[int]) -> bytes:
    """The numbers as bytes."""
    return b"".join((number % _ALL).to_bytes(BYTES, "little") for number in numbers)


def unpacked(text: bytes) -> list[int]:
    """The numbers that `packed` has made these bytes of.

    >>> unpacked(packed([7, -1])) == [7, _ALL - 1]
    True
    """
    return [int.from_bytes(text[at : at + BYTES], "little") for at in range(0, len(text), BYTES)]
