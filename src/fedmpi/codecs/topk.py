"""Selected values with their indices: the largest, or those above a threshold."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from fedmpi.codecs.base import Bare, Codec, Tensor, floats, num_chosen, place, run_kernel, to_tensor
from fedmpi.codecs.dense import Values
from fedmpi.codecs.identity import Identity
from fedmpi.components import PositiveFloat, PositiveFraction, component


def index_bytes(num_chosen: int, num_values: int, packed: bool) -> int:
    """Bytes of the indices: int32, or packed in Elias-Fano form (`kernels.plain`), rounded up to a multiple of 4."""
    if not packed or not num_chosen:
        return 4 * num_chosen
    low = (num_values // num_chosen).bit_length() - 1
    upper = ((num_values - 1) >> low) + num_chosen
    return -(-(-(-num_chosen * low // 8) + -(-upper // 8)) // 4) * 4


def _write_chosen(
    index_K: Tensor, packed: bool, values: Codec, x: Tensor, scale: float, into: Tensor, payload: Tensor, key: Any
) -> int:
    """Writes the payload of selected coordinates; `into` holds v and keeps what the values' codec loses."""
    n, k = x.numel(), index_K.numel()
    at = index_bytes(k, n, packed)
    if packed:
        end = run_kernel("pack_sorted", index_K, n, payload)
        payload[end:at] = 0
    else:
        payload[:at].view(torch.int32).copy_(index_K)
    if isinstance(values, Identity) and into.numel():  # selected values are exact
        floats(payload[at:], k).copy_(into.index_select(0, index_K))
        into.index_fill_(0, index_K, 0.0)
        at += 4 * k
    elif into.numel():
        lost_K = torch.empty_like(index_K, dtype=torch.float32)
        at += values.encode(into.index_select(0, index_K), payload[at:], int(key), into_N=lost_K)
        into.index_copy_(0, index_K, lost_K)
    else:
        at += values.encode(x.index_select(0, index_K), payload[at:], int(key), scale)
    return at


def _read_chosen(
    num_chosen: int,
    packed: bool,
    values: Codec,
    payload: Tensor,
    out: Tensor,
    weight: float,
    accumulate: bool,
    key: Any,
) -> int:
    payload, out = to_tensor(payload), to_tensor(out)
    n = out.numel()
    at = index_bytes(num_chosen, n, packed)
    index_K = torch.empty(num_chosen, dtype=torch.int64, device=out.device)
    if payload.numel() < at:
        return -1
    if packed:
        if run_kernel("unpack_sorted", payload, n, index_K) < 0:
            return -1
    else:
        index_K.copy_(payload[:at].view(torch.int32))
        if num_chosen and not bool(((index_K >= 0) & (index_K < n)).all()):
            return -1
    values_K = torch.empty_like(index_K, dtype=torch.float32)
    values.decode(payload[at:], values_K, int(key))
    place(index_K, values_K, out, weight, accumulate)
    return at


@component
class TopK(Codec):
    """Top-k: the largest magnitudes, exactly (Stich et al. 2018, Section 2.1: top_k); on a tie the first.

    Packed indices take about 2 + log2(1 / ratio) bits each (Elias 1974; Fano 1971).
    """

    chooses = True

    ratio: PositiveFraction = 0.01
    """share of values that are sent; at least one value"""
    indices: Literal["packed", "int32"] = "packed"
    """packed: Elias-Fano; int32: 4 bytes each"""
    values: Values = Identity()
    """codec of the selected values: identity, bf16, int8, ..."""

    @property
    def _plain(self) -> bool:
        """Whether fused kernels exist for these settings."""
        return self.indices == "packed" and type(self.values) is Identity

    @property
    def fixed(self) -> bool:
        return self.values.fixed

    @property
    def largest(self) -> float:
        return self.values.largest

    def damping(self, num_values: int) -> float:
        return self.values.damping(num_chosen(self.ratio, num_values))

    def max_bytes(self, num_values: int) -> int:
        k = num_chosen(self.ratio, num_values)
        return index_bytes(k, num_values, self.indices == "packed") + self.values.max_bytes(k)

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        k = num_chosen(self.ratio, len(x))
        if self._plain:
            return int(run_kernel("encode_top", x, scale, residual, into, payload, k))
        x, payload, residual, into = (to_tensor(vector) for vector in (x, payload, residual, into))
        index_K = torch.empty(k, dtype=torch.int64, device=x.device)
        if run_kernel("select", x, scale, residual, into, k, 0, index_K) < 0:
            return -1
        return _write_chosen(index_K, self.indices == "packed", self.values, x, scale, into, payload, key)

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> int:
        k = num_chosen(self.ratio, len(out))
        if self._plain:
            return int(run_kernel("decode_top", payload, out, weight, accumulate, k))
        return _read_chosen(k, self.indices == "packed", self.values, payload, out, weight, accumulate, key)


@component
class Threshold(Codec):
    """Magnitudes of at least `threshold` (Strom 2015; Sahu et al. 2021, hard threshold); the largest if too many.

    Sends the values, not Strom's fixed +-threshold. `max_ratio` bounds the size; if more values qualify, it is `topk`.
    """

    chooses = True

    threshold: PositiveFloat = 1e-3
    """in units of the encoded vector: of weighted deltas, if weights are folded in"""
    max_ratio: PositiveFraction = 0.01
    """largest share of values that may be sent; at least one value"""
    values: Values = Identity()
    """codec of the selected values: identity, bf16, int8, ..."""

    @property
    def fixed(self) -> bool:
        return False

    @property
    def largest(self) -> float:
        return self.values.largest

    def damping(self, num_values: int) -> float:
        return self.values.damping(num_chosen(self.max_ratio, num_values))

    def max_bytes(self, num_values: int) -> int:
        k = num_chosen(self.max_ratio, num_values)
        return 4 + index_bytes(k, num_values, True) + 8 + self.values.max_bytes(k)  # 8: fewer indices may pack worse

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        x, payload, residual, into = (to_tensor(vector) for vector in (x, payload, residual, into))
        k = num_chosen(self.max_ratio, x.numel())
        floor = int(np.float32(self.threshold).view(np.int32))
        index_K = torch.empty(k, dtype=torch.int64, device=x.device)
        found = run_kernel("select", x, scale, residual, into, k, floor, index_K)
        if found < 0:
            return -1
        payload[:4].view(torch.int32).fill_(found)
        return 4 + _write_chosen(index_K[:found], True, self.values, x, scale, into, payload[4:], key)

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> int:
        payload, out = to_tensor(payload), to_tensor(out)
        k = int(payload[:4].view(torch.int32)) if payload.numel() >= 4 else -1
        if not 0 <= k <= num_chosen(self.max_ratio, out.numel()):
            return -1
        return _read_chosen(k, True, self.values, payload[4:], out, weight, accumulate, key)
