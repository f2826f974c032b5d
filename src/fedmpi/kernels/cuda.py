"""The kernels in torch, for vectors on a device; payloads equal those of `plain` bit for bit.

Every step is an elementwise operation rounded as IEEE 754 says, a fold in a fixed order, or a selection, so device and
processor agree bit for bit. Extra memory: a few temporaries of the vector's length, from torch's caching allocator, so
encode in pieces of a few million elements. `select` and `encode_uniform` wait for the device to learn the length that
they return; the others wait once, to learn whether all values are finite.

Tests run this code on CPU tensors; it has not been run or timed on a GPU. Division by a number uses a tensor, because
on CUDA torch would multiply by a rounded reciprocal.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

Tensor = torch.Tensor
SMALLEST = 2.0**-126
WORD = 0xFFFFFFFF


def _f32(value: float) -> float:
    return float(np.float32(value))


def _load(x: Tensor, scale: float, residual: Tensor, limit: float = float("inf")) -> tuple[Tensor, bool]:
    v = x * _f32(scale)
    if residual.numel():
        v = v.add_(residual)
    return v, bool((v.abs() < limit).all())


def _rest(v: Tensor, decoded: Tensor, into: Tensor) -> None:
    if into.numel():
        torch.sub(v, decoded, out=into)


def _give(decoded: Tensor, out: Tensor, weight: float, accumulate: bool) -> None:
    if accumulate:
        out.add_(decoded.mul_(_f32(weight)))
    else:
        out.copy_(decoded)


def _rows(v: Tensor, block: int) -> Tensor:
    return F.pad(v, (0, -v.numel() % block)).view(-1, block)


def _range(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)


def _bytes(bits: Tensor) -> Tensor:
    """Pack eight bits into a byte, lowest first, along the last dimension."""
    bits = F.pad(bits, (0, -bits.shape[-1] % 8))
    bits = bits.view(*bits.shape[:-1], bits.shape[-1] // 8, 8)
    return (bits << _range(8, bits)).sum(-1).to(torch.uint8)


def _spread(payload: Tensor) -> Tensor:
    return ((payload.unsqueeze(-1).to(torch.int64) >> _range(8, payload)) & 1).flatten(-2)


def pack(codes: Tensor, width: int) -> Tensor:
    """Like `plain.pack`, along the last dimension."""
    return _bytes(((codes.unsqueeze(-1) >> _range(width, codes)) & 1).flatten(-2))


def unpack(payload: Tensor, width: int, num: int) -> Tensor:
    bits = _spread(payload)[..., : num * width].reshape(*payload.shape[:-1], num, width)
    return (bits << _range(width, payload)).sum(-1)


def _shift(z: Tensor, by: int) -> Tensor:
    """Unsigned right shift of 64 bits."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def hashed(key: int, index: Tensor) -> Tensor:
    z = (index + 1) * _signed(0x9E3779B97F4A7C15) + _signed(int(key))
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def uniforms(key: int, n: int, like: Tensor) -> Tensor:
    seeds = _shift(hashed(key, _range((n + 255) // 256, like)), 32)
    h = (seeds[:, None] + _range(256, like) * 0x9E3779B9).flatten()[:n] & WORD
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & WORD
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & WORD
    h = h ^ (h >> 16)
    return (h >> 8).float() * 2.0**-24


def _fold(rows: Tensor) -> Tensor:
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return rows[:, 0]


def _sizes(n: int, block: int, like: Tensor) -> Tensor:
    """How many elements each block has."""
    return torch.clamp(n - block * _range((n + block - 1) // block, like), max=block)


def encode_nearest(x: Tensor, scale: float, residual: Tensor, into: Tensor, payload: Tensor, bits: int) -> int:
    v, finite = _load(x, scale, residual)
    if not finite:
        return -1
    rows = _rows(v, 256)
    s = rows.abs().amax(dim=1) / _levels((1 << (bits - 1)) - 1, x)
    q = _in_steps(rows, s).round_().add_(0.0)  # no negative zero
    return _write_blocks(v, q, s, bits, into, payload)


def encode_stochastic(
    x: Tensor,
    scale: float,
    residual: Tensor,
    into: Tensor,
    payload: Tensor,
    key: int,
    levels: int,
    norm: bool,
    damping: float,
) -> int:
    v, finite = _load(x, scale, residual)
    if not finite:
        return -1
    rows = _rows(v, 256)
    if norm:
        exact = rows.double()
        s = _fold(exact * exact).sqrt().float() / _levels(levels, x)
    else:
        s = rows.abs().amax(dim=1) / _levels(levels, x)
    q = (_in_steps(rows, s) + _rows(uniforms(key, x.numel(), x), 256)).floor_().clamp_(-levels, levels)
    bits = 2 if levels == 1 else 4 if levels <= 7 else 8
    return _write_blocks(v, q, s, bits, into, payload, damping)


def encode_signs(x: Tensor, scale: float, residual: Tensor, into: Tensor, payload: Tensor) -> int:
    v, finite = _load(x, scale, residual)
    if not finite:
        return -1
    rows = _rows(v, 4096)
    s = (_fold(rows.double().abs()) / _sizes(x.numel(), 4096, x)).float()
    return _write_blocks(v, torch.where(rows >= 0, 1.0, -1.0), s, 1, into, payload)


def _levels(levels: int, like: Tensor) -> Tensor:
    """The number as a tensor on the device, so that division by it is rounded as float32."""
    return torch.full((1,), float(levels), device=like.device)


def _in_steps(rows: Tensor, s: Tensor) -> Tensor:
    return rows / torch.where(s < SMALLEST, 1.0, s)[:, None]


def _write_blocks(
    v: Tensor, q: Tensor, s: Tensor, bits: int, into: Tensor, payload: Tensor, damping: float = 1.0
) -> int:
    """Write integers q in steps of s, one block per row, as a payload; `into` receives what they lose of v."""
    n, block = v.numel(), q.shape[1]
    dead = s < SMALLEST
    q.masked_fill_(dead[:, None], 0.0)
    s = torch.where(dead, 0.0, s * _f32(damping))
    _rest(v, (q * s[:, None]).flatten()[:n], into)
    codes = (q > 0 if bits == 1 else q).to(torch.int32)
    at = 4 * s.numel()
    payload[:at] = s.view(torch.uint8)
    whole = n // block
    for part, m in ((codes[:whole], block), (codes[whole:, : n % block], n % block)):
        if m and part.shape[0]:
            parts, span = 8 // bits, -(-m * bits // 8)
            columns = F.pad(part & ((1 << bits) - 1), (0, span * parts - m)).view(-1, parts, span)
            laid = (columns << (bits * _range(parts, v))[:, None]).sum(1).to(torch.uint8)
            payload[at : at + laid.numel()] = laid.flatten()
            at += laid.numel()
    return at


def decode_blocks(payload: Tensor, out: Tensor, weight: float, accumulate: bool, block: int, bits: int) -> None:
    n = out.numel()
    num_blocks, parts, top = -(-n // block), 8 // bits, 1 << (bits - 1)
    s = payload[: 4 * num_blocks].view(torch.float32)
    at, whole = 4 * num_blocks, n // block
    for first, rows, m in ((0, whole, block), (whole * block, 1, n % block)):
        if not m or not rows:
            continue
        span = -(-m * bits // 8)
        laid = payload[at : at + rows * span].view(rows, 1, span).to(torch.int32)
        codes = ((laid >> (bits * _range(parts, out))[:, None]) & ((1 << bits) - 1)).flatten(1)[:, :m]
        q = (2 * codes - 1 if bits == 1 else (codes ^ top) - top).float()
        scales = s[first // block : first // block + rows]
        _give((q * scales[:, None]).flatten(), out[first : first + rows * m], weight, accumulate)
        at += rows * span


def _half(bfloat: bool) -> torch.dtype:
    return torch.bfloat16 if bfloat else torch.float16


def encode_half(x: Tensor, scale: float, residual: Tensor, into: Tensor, payload: Tensor, bfloat: bool) -> int:
    v, finite = _load(x, scale, residual, 3.3961775292304957e38 if bfloat else 65520.0)
    if not finite:
        return -1
    halves = payload[: 2 * x.numel()].view(_half(bfloat))
    halves.copy_(v)
    _rest(v, halves.float(), into)
    return 2 * x.numel()


def decode_half(payload: Tensor, out: Tensor, weight: float, accumulate: bool, bfloat: bool) -> None:
    _give(payload[: 2 * out.numel()].view(_half(bfloat)).float(), out, weight, accumulate)


def encode_uniform(
    x: Tensor, scale: float, residual: Tensor, into: Tensor, payload: Tensor, step: float, max_bits: int
) -> int:
    n = x.numel()
    v, finite = _load(x, scale, residual)
    if not finite:
        return -1
    high = 2 ** (max_bits - 1) - 1
    unit = torch.full((1,), _f32(step), device=x.device)
    t = v.abs() / unit
    whole = t.floor()
    level = (whole + (t - whole >= 0.5)).clamp_(max=high)
    q = (v.sign() * level).to(torch.int64)
    _rest(v, q.float() * unit, into)
    rows = _rows(q, 256)
    powers = 1 << _range(max_bits, x)
    widths = (rows.abs().amax(dim=1, keepdim=True) >= powers).sum(1)
    widths += widths > 0
    at = widths.numel()
    payload[:at] = widths.to(torch.uint8)
    spans = (_sizes(n, 256, x) * widths + 7) // 8
    starts = spans.cumsum(0) - spans + at
    for width in range(1, max_bits + 1):
        chosen = (widths == width).nonzero()[:, 0]
        if chosen.numel():
            _scatter(payload, starts[chosen], spans[chosen], pack(rows[chosen], width))
    return at + int(spans.sum())


def _scatter(payload: Tensor, starts: Tensor, spans: Tensor, packed: Tensor) -> None:
    """Write the first spans[i] bytes of row i of `packed` at starts[i]."""
    columns = _range(packed.shape[1], packed)
    inside = columns < spans[:, None]
    payload[(starts[:, None] + columns)[inside]] = packed[inside]


def decode_uniform(payload: Tensor, out: Tensor, weight: float, accumulate: bool, step: float) -> int:
    n = out.numel()
    at = -(-n // 256)
    widths = payload[:at].to(torch.int64)
    spans = (_sizes(n, 256, out) * widths + 7) // 8
    end = at + int(spans.sum())
    if end > payload.numel() or int(widths.max()) > 16:
        return -1
    starts = spans.cumsum(0) - spans + at
    rows = torch.zeros(at, 256, dtype=torch.int64, device=out.device)
    for width in range(1, 17):
        chosen, top = (widths == width).nonzero()[:, 0], 1 << (width - 1)
        if not chosen.numel():
            continue
        places = starts[chosen][:, None] + _range(32 * width, out)
        codes = unpack(payload[places.clamp_(max=payload.numel() - 1)], width, 256)
        rows[chosen] = (codes ^ top) - top
    unit = torch.full((1,), _f32(step), device=out.device)
    _give(rows.flatten()[:n].float() * unit, out, weight, accumulate)
    return end


def _largest(magnitude: Tensor, k: int, floor: int) -> Tensor:
    """Indices of the k largest not below `floor`, ascending; the first ones among equals."""
    # Not kthvalue: it runs in one thread block and has no deterministic version.
    least = magnitude.topk(k, sorted=False).values.amin().clamp(min=floor)
    above = magnitude > least
    equal = magnitude == least
    first = equal & (equal.cumsum(0) <= k - above.sum())
    return (above | first).nonzero()[:, 0]


def _magnitude(v: Tensor) -> Tensor:
    return v.view(torch.int32) & 0x7FFFFFFF


def encode_chunks(
    x: Tensor, scale: float, residual: Tensor, into: Tensor, payload: Tensor, keep: int, bits: int
) -> int:
    n = x.numel()
    v, finite = _load(x, scale, residual)
    if not finite:
        return -1
    top, num_chunks, whole = 1 << (bits - 1), -(-n // 4096), n // 4096
    ends = payload[: 8 * num_chunks].view(torch.float32).view(-1, 2)
    at, decoded = 8 * num_chunks, torch.zeros_like(v)
    for first, rows, m in ((0, whole, 4096), (whole * 4096, 1, n % 4096)):
        if not m or not rows:
            continue
        chunk = v[first : first + rows * m].view(rows, m)
        k = -(-m * keep // 4096)
        order = _magnitude(chunk).sort(dim=1, descending=True, stable=True).indices
        j = order[:, :k].sort(dim=1).values
        kept = chunk.gather(1, j)
        magnitude = kept.abs()
        low, high = magnitude.aminmax(dim=1, keepdim=True)
        step = (high - low) / torch.full_like(low, float(top - 1))
        flat = step <= 0
        level = ((magnitude - low) / torch.where(flat, 1.0, step)).round_().clamp_(max=top - 1)
        level = level.masked_fill_(flat, 0.0)
        d = low + level * step
        negative = kept < 0
        decoded[first : first + rows * m].view(rows, m).scatter_(1, j, torch.where(negative, -d, d))
        ends[first // 4096 : first // 4096 + rows] = torch.cat([low, step], dim=1)
        packed = pack(j + ((level.to(torch.int64) + top * negative) << 12), 12 + bits)
        payload[at : at + packed.numel()] = packed.flatten()
        at += packed.numel()
    _rest(v, decoded, into)
    return at


def decode_chunks(payload: Tensor, out: Tensor, weight: float, accumulate: bool, keep: int, bits: int) -> None:
    n = out.numel()
    top, num_chunks, whole = 1 << (bits - 1), -(-n // 4096), n // 4096
    ends = payload[: 8 * num_chunks].view(torch.float32).view(-1, 2)
    at = 8 * num_chunks
    for first, rows, m in ((0, whole, 4096), (whole * 4096, 1, n % 4096)):
        if not m or not rows:
            continue
        k = -(-m * keep // 4096)
        span = -(-k * (12 + bits) // 8)
        codes = unpack(payload[at : at + rows * span].view(rows, span), 12 + bits, k)
        pairs = ends[first // 4096 : first // 4096 + rows]
        low, step = pairs[:, :1], pairs[:, 1:]
        code = codes >> 12
        d = low + (code & (top - 1)).float() * step
        d = torch.where((code & top) > 0, -d, d)
        chunk = out[first : first + rows * m].view(rows, m)
        j = (codes & 4095).clamp_(max=m - 1)  # a larger index, from a damaged payload, would be a fatal CUDA error
        chunk.scatter_(1, j, chunk.gather(1, j) + d * _f32(weight)) if accumulate else chunk.zero_().scatter_(1, j, d)
        at += rows * span


def draw(key: int, n: int, indices: Tensor) -> None:
    k = indices.numel()
    j = _range(k, indices)
    start, stop = j * n // max(k, 1), (j + 1) * n // max(k, 1)
    indices.copy_(start + _shift(_shift(hashed(key, j), 32) * (stop - start), 32))


def select(x: Tensor, scale: float, residual: Tensor, into: Tensor, k: int, floor: int, indices: Tensor) -> int:
    v, finite = _load(x, scale, residual)
    if not finite:
        return -1
    if into.numel():
        into.copy_(v)
    chosen = _largest(_magnitude(v), k, floor)
    indices[: chosen.numel()] = chosen
    return chosen.numel()


def _shape(k: int, n: int) -> tuple[int, int, int]:
    low = (n // k).bit_length() - 1
    middle = -(-k * low // 8)
    return low, middle, middle + -(-(((n - 1) >> low) + k) // 8)


def pack_sorted(indices: Tensor, n: int, payload: Tensor) -> int:
    k = indices.numel()
    if k == 0:
        return 0
    low, middle, end = _shape(k, n)
    payload[:middle] = pack(indices, low)
    ones = torch.zeros(8 * (end - middle), dtype=torch.int64, device=indices.device)
    ones[(indices >> low) + _range(k, indices)] = 1
    payload[middle:end] = _bytes(ones)
    return end


def unpack_sorted(payload: Tensor, n: int, indices: Tensor) -> int:
    k = indices.numel()
    if k == 0:
        return 0
    low, middle, end = _shape(k, n)
    places = _spread(payload[middle:end].view(1, -1)).flatten().nonzero()[:, 0]
    if places.numel() < k:
        return -1
    indices.copy_(unpack(payload[:middle], low, k) | ((places[:k] - _range(k, indices)) << low))
    return end if int(indices.max()) < n else -1


def encode_top(x: Tensor, scale: float, residual: Tensor, into: Tensor, payload: Tensor, k: int) -> int:
    v, finite = _load(x, scale, residual)
    if not finite:
        return -1
    chosen = _largest(_magnitude(v), k, 0)
    end = pack_sorted(chosen, x.numel(), payload)
    at = -(-end // 4) * 4
    payload[end:at] = 0
    payload[at : at + 4 * k].view(torch.float32).copy_(v.index_select(0, chosen))
    if into.numel():
        into.copy_(v.index_fill_(0, chosen, 0.0))
    return at + 4 * k


def decode_top(payload: Tensor, out: Tensor, weight: float, accumulate: bool, k: int) -> int:
    chosen = torch.empty(k, dtype=torch.int64, device=out.device)
    end = unpack_sorted(payload, out.numel(), chosen)
    if end < 0:
        return -1
    at = -(-end // 4) * 4
    values = payload[at : at + 4 * k].view(torch.float32)
    if accumulate:
        out.index_add_(0, chosen, values * _f32(weight))
    else:
        out.zero_().index_copy_(0, chosen, values)
    return at + 4 * k
