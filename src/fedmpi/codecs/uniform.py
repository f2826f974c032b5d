"""A grid of one step for all values, in as many bits as they need."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic

from fedmpi.codecs.base import Bare, Codec, run_kernel
from fedmpi.components import PositiveFloat, component

BLOCK = 256  # values that take equally many bits


@component
class Uniform(Codec):
    """The grid sign(w) step floor(|w| / step + 0.5), bit-packed.

    Every 256 values take as many bits as their largest needs (a byte says how many): none where all are below half a
    step. Values beyond `max_bits`, that is beyond (2**(max_bits - 1) - 1) steps, are cut to that, and only feedback
    brings the rest across.
    """

    step: PositiveFloat = 1e-4
    """s, in units of what is encoded: of weighted deltas, where weights are folded in"""
    max_bits: Annotated[int, pydantic.Field(ge=2, le=16)] = 16
    """sign included"""

    @property
    def fixed(self) -> bool:
        return False

    def max_bytes(self, num_values: int) -> int:
        return -(-num_values // BLOCK) + -(-num_values * self.max_bits // 8)

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        return int(run_kernel("encode_uniform", x, scale, residual, into, payload, self.step, self.max_bits))

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> int:
        return int(run_kernel("decode_uniform", payload, out, weight, accumulate, self.step))
