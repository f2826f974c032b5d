"""Half precision: float32 cast to 16 bits."""

from __future__ import annotations

from typing import Any

from fedmpi.codecs.base import Bare, Codec, run_kernel
from fedmpi.components import component


@component
class BFloat16(Codec):
    """bfloat16: 8-bit significand, the range of float32; rounds to nearest, ties to even."""

    @property
    def largest(self) -> float:
        return float((1 - 2**-9) * 2.0**128)

    def max_bytes(self, num_values: int) -> int:
        return 2 * num_values

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        return int(run_kernel("encode_half", x, scale, residual, into, payload, True))

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        run_kernel("decode_half", payload, out, weight, accumulate, True)


@component
class Float16(Codec):
    """float16: 11-bit significand; rounds to nearest, ties to even; refuses values that would round above 65504."""

    @property
    def largest(self) -> float:
        return 65520.0

    def max_bytes(self, num_values: int) -> int:
        return 2 * num_values

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        return int(run_kernel("encode_half", x, scale, residual, into, payload, False))

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        run_kernel("decode_half", payload, out, weight, accumulate, False)
