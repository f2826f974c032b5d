"""The largest values of every chunk, in a payload of fixed length."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from fedmpi.codecs.base import Bare, Codec, run_kernel
from fedmpi.components import component

CHUNK = 4096


@component
class ChunkTopK(Codec):
    """The `keep` largest magnitudes of every 4096, with 12-bit indices and values of 4 or 2 bits; fixed payload size.

    As in SparseLoCo (Sarfi et al. 2025). A value is a sign and the nearest of 8 or 2 magnitudes, evenly spaced between
    the chunk's smallest and largest selected one, which are sent as float32. No value's error exceeds its magnitude.
    """

    keep: Annotated[int, pydantic.Field(ge=1, le=CHUNK)] = 64
    """values kept of 4096; in the last chunk in proportion, rounded up"""
    bits: Literal[4, 2] = 4
    """bits per value, sign included"""

    def max_bytes(self, num_values: int) -> int:
        whole, rest = divmod(num_values, CHUNK)
        chosen = -(-rest * self.keep // CHUNK)
        width = 12 + self.bits
        return whole * (8 + -(-self.keep * width // 8)) + (8 + -(-chosen * width // 8) if rest else 0)

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        return int(run_kernel("encode_chunks", x, scale, residual, into, payload, self.keep, self.bits))

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        run_kernel("decode_chunks", payload, out, weight, accumulate, self.keep, self.bits)
