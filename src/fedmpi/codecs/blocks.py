"""Block codecs, with one scale per block: integers of 8 or 4 bits, QSGD levels, signs."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import pydantic

from fedmpi.codecs.base import Bare, Codec, Rounding, run_kernel
from fedmpi.components import component

BLOCK = 256  # values per scale
CHUNK = 4096  # signs per scale


def block_bytes(num_values: int, block: int, bits: int) -> int:
    """Payload bytes: a float32 scale per block, then the codes, rounded up to whole bytes."""
    return 4 * -(-num_values // block) + -(-num_values * bits // 8)


@component
class _Integers(Codec):
    bits: ClassVar[int]

    rounding: Rounding = "nearest"
    """stochastic: unbiased, rounds up or down at random"""

    @property
    def unbiased(self) -> bool:
        return self.rounding == "stochastic"

    def max_bytes(self, num_values: int) -> int:
        return block_bytes(num_values, BLOCK, self.bits)

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        if self.rounding == "nearest":
            return int(run_kernel("encode_nearest", x, scale, residual, into, payload, self.bits))
        facts = (key, (1 << (self.bits - 1)) - 1, False, 1.0)
        return int(run_kernel("encode_stochastic", x, scale, residual, into, payload, *facts))

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        run_kernel("decode_blocks", payload, out, weight, accumulate, BLOCK, self.bits)


@component
class Int8(_Integers):
    """8-bit integers, -127 to 127, in blocks of 256 with one float32 scale each: the largest magnitude / 127.

    Steps below 2**-126 become zero. Stochastic rounding needs no damping: omega is 0.004.

    >>> import torch
    >>> x, payload = torch.tensor([1.0, -0.5, 0.1]), torch.zeros(7, dtype=torch.uint8)
    >>> Int8().encode(x, payload, key=0), payload[4:].view(torch.int8).tolist()
    (7, [127, -64, 13])
    """

    bits: ClassVar[int] = 8


@component
class Int4(_Integers):
    """4-bit integers, -7 to 7, in blocks of 256 with one float32 scale each: the largest magnitude / 7.

    Stochastic rounding needs no damping: its mean error is at most 0.75 of a block's squared norm.
    """

    bits: ClassVar[int] = 4


@component
class QSGD(Codec):
    """QSGD (Alistarh et al. 2017, Section 3.1): stochastic rounding to multiples of norm / levels, per bucket of 256.

    omega = min(256 / levels**2, 16 / levels) (Lemma 3.1). Levels take 2, 4 or 8 bits, the narrowest that holds them.
    Deviations: no Elias coding; a signed value is rounded down or up, which has the same distribution as the paper's
    magnitude and sign.
    """

    levels: Annotated[int, pydantic.Field(ge=1, le=127)] = 7
    """s in the paper: steps from 0 to the norm"""

    @property
    def unbiased(self) -> bool:
        return True

    @property
    def _bits(self) -> int:
        return 2 if self.levels == 1 else 4 if self.levels <= 7 else 8

    def damping(self, num_values: int) -> float:
        d = min(num_values, BLOCK)
        return 1 / (1 + min(d / self.levels**2, math.sqrt(d) / self.levels))

    def max_bytes(self, num_values: int) -> int:
        return block_bytes(num_values, BLOCK, self._bits)

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        damping = self.damping(len(x)) if len(into) else 1.0
        facts = (key, self.levels, True, damping)
        return int(run_kernel("encode_stochastic", x, scale, residual, into, payload, *facts))

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        run_kernel("decode_blocks", payload, out, weight, accumulate, BLOCK, self._bits)


@component
class Sign(Codec):
    """Signs times the mean magnitude (Karimireddy et al. 2019, Algorithm 1), one scale per 4096; the sign of 0 is +."""

    def max_bytes(self, num_values: int) -> int:
        return block_bytes(num_values, CHUNK, 1)

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        return int(run_kernel("encode_signs", x, scale, residual, into, payload))

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        run_kernel("decode_blocks", payload, out, weight, accumulate, CHUNK, 1)
