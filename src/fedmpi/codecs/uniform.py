"""A uniform grid with one step for all values, bit-packed."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic

from fedmpi.codecs.base import Bare, Codec, run_kernel
from fedmpi.components import PositiveFloat, component

BLOCK = 256  # values that share a bit width


@component
class Uniform(Codec):
    """Uniform quantization: sign(w) step floor(|w| / step + 0.5), bit-packed.

    Every block of 256 values uses the bits that its largest needs (one byte states how many); none if all are below
    half a step. Values beyond `max_bits`, that is beyond (2**(max_bits - 1) - 1) steps, are clipped; only feedback
    sends the rest later.
    """

    step: PositiveFloat = 1e-4
    """step, in units of the encoded vector: of weighted deltas, if weights are folded in"""
    max_bits: Annotated[int, pydantic.Field(ge=2, le=16)] = 16
    """largest width in bits, sign included"""

    @property
    def fixed(self) -> bool:
        return False

    def max_bytes(self, num_values: int) -> int:
        return -(-num_values // BLOCK) + -(-num_values * self.max_bits // 8)

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        return int(run_kernel("encode_uniform", x, scale, residual, into, payload, self.step, self.max_bits))

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> int:
        return int(run_kernel("decode_uniform", payload, out, weight, accumulate, self.step))
