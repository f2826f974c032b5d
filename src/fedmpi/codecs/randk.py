"""Values at random indices, drawn from the key."""

from __future__ import annotations

from typing import Any

import torch

from fedmpi.codecs.base import Bare, Codec, Tensor, combine, floats, num_chosen, place, run_kernel, to_tensor
from fedmpi.components import PositiveFraction, component


@component
class RandK(Codec):
    """Random-k: float32 values at indices drawn from the key, which both sides have, so no indices are sent.

    Random-k sparsification (Konecny et al. 2016, random mask; Stich et al. 2018, rand_k), but stratified: one index in
    each of k equal runs of the vector, so every value has the same probability, up to the rounding of n / k. Values are
    scaled by n / k: unbiased with omega = n / k - 1; with feedback they are sent unscaled. MPI may sum the payloads.
    """

    ratio: PositiveFraction = 0.01
    """share of values that are sent; at least one value"""

    @property
    def linear(self) -> bool:
        return True

    @property
    def unbiased(self) -> bool:
        return True

    def damping(self, num_values: int) -> float:
        return 1 / max(1, -(-num_values // max(1, num_chosen(self.ratio, num_values))))

    def max_bytes(self, num_values: int) -> int:
        return 4 * num_chosen(self.ratio, num_values)

    def _places(self, n: int, key: Any, like: Tensor) -> Tensor:
        index_K = torch.empty(num_chosen(self.ratio, n), dtype=torch.int64, device=like.device)
        run_kernel("draw", key, n, index_K)
        return index_K

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        x, payload, residual, into = (to_tensor(vector) for vector in (x, payload, residual, into))
        n, index_K = x.numel(), self._places(x.numel(), key, x)
        k = index_K.numel()
        if not combine(x, scale, residual, into):
            return -1
        values_K = floats(payload, k)
        if into.numel():
            values_K.copy_(into.index_select(0, index_K))
            into.index_fill_(0, index_K, 0.0)
        else:
            j = torch.arange(k, device=x.device)
            values_K.copy_(x.index_select(0, index_K)).mul_(scale).mul_((j + 1) * n // k - j * n // k)
            if not bool(values_K.isfinite().all()):
                return -1
        return 4 * k

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        payload, out = to_tensor(payload), to_tensor(out)
        index_K = self._places(out.numel(), key, out)
        place(index_K, floats(payload, index_K.numel()).clone(), out, weight, accumulate)
