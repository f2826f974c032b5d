"""float32 unchanged."""

from __future__ import annotations

from typing import Any

import torch

from fedmpi.codecs.base import PIECE_CPU, PIECE_DEVICE, Bare, Codec, combine, floats, to_tensor
from fedmpi.components import component


@component
class Identity(Codec):
    """float32 values, unchanged."""

    @property
    def linear(self) -> bool:
        return True

    @property
    def unbiased(self) -> bool:
        return True

    def max_bytes(self, num_values: int) -> int:
        return 4 * num_values

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        x, payload, residual, into = (to_tensor(vector) for vector in (x, payload, residual, into))
        finite = combine(x, scale, residual, floats(payload, x.numel()))
        into.zero_()
        return 4 * x.numel() if finite else -1

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        payload, out = to_tensor(payload), to_tensor(out)
        values = floats(payload, out.numel())
        if not accumulate:
            out.copy_(values)
            return
        piece = PIECE_CPU if out.device.type == "cpu" else PIECE_DEVICE
        scratch = torch.empty_like(out[:piece])
        for start in range(0, out.numel(), piece):
            part = out[start : start + piece]
            part.add_(torch.mul(values[start : start + piece], weight, out=scratch[: part.numel()]))
