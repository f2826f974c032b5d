"""The definition of the kernels and payloads, in short numpy code; the oracle for the other versions.

All results equal those of `cpu` bit for bit, residuals and sums included: sums over a block fold in a fixed order, and
no other step depends on an order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = Any
f32 = np.float32
SMALLEST = f32(2.0**-126)


def _load(x: Array, scale: float, residual: Array, limit: float = np.inf) -> tuple[Array, bool]:
    with np.errstate(over="ignore", invalid="ignore"):
        v = x * f32(scale)
        v = v + residual if residual.size else v
    return v, bool((np.abs(v) < limit).all())


def _rest(v: Array, decoded: Array, into: Array) -> None:
    if into.size:
        into[:] = v - decoded


def _give(decoded: Array, out: Array, weight: float, accumulate: bool) -> None:
    out[:] = out + f32(weight) * decoded if accumulate else decoded


def _rows(v: Array, block: int) -> Array:
    """The blocks as rows, [blocks, block]; zeros fill the last one."""
    return np.pad(v, (0, -len(v) % block)).reshape(-1, block)


def _bits(codes: Array, width: int) -> Array:
    """The bits of each code, lowest first, one byte per bit."""
    return (codes[:, None] >> np.arange(width) & 1).astype(np.uint8).ravel()


def pack(codes: Array, width: int) -> Array:
    """The lower `width` bits of each code, packed one after the other, lowest first; zeros fill the last byte."""
    return np.packbits(_bits(codes.astype(np.int64), width), bitorder="little")


def unpack(payload: Array, width: int, num: int) -> Array:
    """The first `num` codes of `width` bits; the inverse of `pack`."""
    bits = np.unpackbits(payload, bitorder="little")[: num * width].reshape(num, width)
    return bits.astype(np.int64) @ (1 << np.arange(width))


def hashed(key: int, index: Array) -> Array:
    """SplitMix64 of a counter (Steele, Lea, Flood 2014)."""
    z = np.uint64(key) + (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(key: int, n: int) -> Array:
    """n float32 random numbers in [0, 1)."""
    seeds = (hashed(key, np.arange((n + 255) // 256)) >> np.uint64(32)).astype(np.uint32)
    h = (seeds[:, None] + np.arange(256, dtype=np.uint32) * np.uint32(0x9E3779B9)).ravel()[:n]
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    h = h ^ (h >> np.uint32(16))
    return (h >> np.uint32(8)).astype(f32) * f32(2.0**-24)


def _fold(rows: Array) -> Array:
    """Sum of each row, adding the upper half to the lower until one number is left."""
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return rows[:, 0]


def encode_nearest(x: Array, scale: float, residual: Array, into: Array, payload: Array, bits: int) -> int:
    """Integers of `bits` bits per value, scaled by the largest magnitude of each 256; nearest, ties to even."""
    v, finite = _load(x, scale, residual)
    if not finite:
        return -1
    rows = _rows(v, 256)
    s = np.abs(rows).max(axis=1, initial=0) / f32((1 << (bits - 1)) - 1)
    q = np.rint(_in_steps(rows, s)) + f32(0)  # no negative zero
    return _write_blocks(v, q, s, bits, into, payload)


def encode_stochastic(
    x: Array,
    scale: float,
    residual: Array,
    into: Array,
    payload: Array,
    key: int,
    levels: int,
    norm: bool,
    damping: float,
) -> int:
    """Random rounding to levels of each 256 values' Euclidean norm, or largest magnitude."""
    v, finite = _load(x, scale, residual)
    if not finite:
        return -1
    rows = _rows(v, 256)
    exact = rows.astype(np.float64)
    size = np.sqrt(_fold(exact * exact)).astype(f32) if norm else np.abs(rows).max(axis=1, initial=0)
    s = size / f32(levels)
    q = np.clip(np.floor(_in_steps(rows, s) + _rows(uniforms(key, len(x)), 256)), -levels, levels)
    bits = 2 if levels == 1 else 4 if levels <= 7 else 8
    return _write_blocks(v, q, s, bits, into, payload, damping)


def encode_signs(x: Array, scale: float, residual: Array, into: Array, payload: Array) -> int:
    """Signs times the mean magnitude of each 4096 values."""
    n = len(x)
    v, finite = _load(x, scale, residual)
    if not finite:
        return -1
    rows = _rows(v, 4096)
    sizes = np.minimum(4096, n - 4096 * np.arange(len(rows)))
    s = (_fold(np.abs(rows.astype(np.float64))) / sizes).astype(f32)
    return _write_blocks(v, np.where(rows >= 0, f32(1), f32(-1)), s, 1, into, payload)


def _in_steps(rows: Array, s: Array) -> Array:
    return rows / np.where(s < SMALLEST, f32(1), s)[:, None]


def _write_blocks(v: Array, q: Array, s: Array, bits: int, into: Array, payload: Array, damping: float = 1.0) -> int:
    """Write integers q in steps of s, one block per row, as a payload; `into` receives what they lose of v."""
    n, block = len(v), q.shape[1]
    dead = s < SMALLEST
    q[dead] = 0
    s = np.where(dead, f32(0), s * f32(damping))
    _rest(v, (q * s[:, None]).ravel()[:n], into)
    codes = (q > 0 if bits == 1 else q).astype(np.int64)
    parts = [_side_by_side(row[: n - block * b], bits) for b, row in enumerate(codes)]
    whole = np.concatenate([s.view(np.uint8), *parts])
    payload[: len(whole)] = whole
    return len(whole)


def _side_by_side(codes: Array, bits: int) -> Array:
    """The block's 8 / bits parts, interleaved: byte j holds code j of each part."""
    parts = 8 // bits
    span = -(-len(codes) // parts)
    columns = np.pad(codes, (0, span * parts - len(codes))).reshape(parts, span)
    return pack(columns.T.ravel(), bits)


def decode_blocks(payload: Array, out: Array, weight: float, accumulate: bool, block: int, bits: int) -> None:
    """Decode the payload of any block format."""
    n = len(out)
    s = payload[: 4 * (-(-n // block))].view(f32)
    at, found = 4 * len(s), []
    for start in range(0, n, block):
        m = min(block, n - start)
        span = -(-m * bits // 8)
        codes = unpack(payload[at : at + span], bits, span * 8 // bits).reshape(span, 8 // bits).T.ravel()[:m]
        found.append(2 * codes - 1 if bits == 1 else (codes ^ 1 << (bits - 1)) - (1 << (bits - 1)))
        at += span
    decoded = np.concatenate([[], *found]).astype(f32) * np.repeat(s, block)[:n]
    _give(decoded, out, weight, accumulate)


def _half(bfloat: bool) -> torch.dtype:
    return torch.bfloat16 if bfloat else torch.float16


def encode_half(x: Array, scale: float, residual: Array, into: Array, payload: Array, bfloat: bool) -> int:
    """bfloat16 or float16, rounded to nearest even."""
    v, finite = _load(x, scale, residual, 3.3961775292304957e38 if bfloat else 65520.0)
    if not finite:
        return -1
    halves = torch.from_numpy(v).to(_half(bfloat))
    payload[: 2 * len(v)] = halves.view(torch.uint8).numpy()
    _rest(v, halves.float().numpy(), into)
    return 2 * len(v)


def decode_half(payload: Array, out: Array, weight: float, accumulate: bool, bfloat: bool) -> None:
    halves = torch.from_numpy(payload[: 2 * len(out)].copy()).view(_half(bfloat))
    _give(halves.float().numpy(), out, weight, accumulate)


def encode_uniform(
    x: Array, scale: float, residual: Array, into: Array, payload: Array, step: float, max_bits: int
) -> int:
    """Integer multiples of `step`, each 256 values with as many bits as their largest needs, at most `max_bits`."""
    v, finite = _load(x, scale, residual)
    if not finite:
        return -1
    with np.errstate(over="ignore", invalid="ignore"):
        t = np.abs(v) / f32(step)
        whole = np.floor(t)
        level = np.minimum(whole + (t - whole >= 0.5), 2 ** (max_bits - 1) - 1)
    q = (np.sign(v) * level).astype(np.int64)
    _rest(v, q.astype(f32) * f32(step), into)
    blocks = [q[start : start + 256] for start in range(0, len(q), 256)]
    largest = [int(np.abs(block).max()) for block in blocks]
    widths = [m.bit_length() + (m > 0) for m in largest]
    packed = [pack(block, width) for block, width in zip(blocks, widths, strict=True)]
    stream = np.concatenate([np.array(widths, np.uint8), *packed])
    payload[: len(stream)] = stream
    return len(stream)


def decode_uniform(payload: Array, out: Array, weight: float, accumulate: bool, step: float) -> int:
    """Decode; returns the bytes read, or -1 if the payload is damaged."""
    n = len(out)
    at = -(-n // 256)
    decoded = np.zeros(n, f32)
    for start in range(0, n, 256):
        m, width = min(256, n - start), int(payload[start // 256])
        span = -(-m * width // 8)
        if at + span > len(payload) or width > 16:
            return -1
        if width:
            top = 1 << (width - 1)
            codes = unpack(payload[at : at + span], width, m)
            decoded[start : start + m] = ((codes ^ top) - top).astype(f32) * f32(step)
        at += span
    _give(decoded, out, weight, accumulate)
    return at


def _largest(v: Array, k: int, floor: int = 0) -> Array:
    """Indices of the k largest magnitudes not below `floor`, ascending; the first ones among equals."""
    magnitude = v.view(np.int32) & 0x7FFFFFFF
    first = np.sort(np.argsort(-magnitude, kind="stable")[:k])
    return first[magnitude[first] >= floor]


def encode_chunks(x: Array, scale: float, residual: Array, into: Array, payload: Array, keep: int, bits: int) -> int:
    """The `keep` largest magnitudes of each 4096 values, quantized between the smallest and largest of them."""
    v, finite = _load(x, scale, residual)
    if not finite:
        return -1
    top = 1 << (bits - 1)
    decoded, ends, packed = np.zeros(len(v), f32), [], []
    for start in range(0, len(v), 4096):
        chunk = v[start : start + 4096]
        chosen = _largest(chunk, -(-len(chunk) * keep // 4096))
        magnitude = np.abs(chunk[chosen])
        low = magnitude.min()
        step = (magnitude.max() - low) / f32(top - 1)
        level = np.minimum(np.rint((magnitude - low) / step), top - 1) if step > 0 else np.zeros(len(chosen), f32)
        d = low + level.astype(f32) * step
        negative = chunk[chosen] < 0
        decoded[start + chosen] = np.where(negative, -d, d)
        ends += [low, step]
        packed.append(pack(chosen + (level.astype(np.int64) + top * negative << 12), 12 + bits))
    whole = np.concatenate([np.array(ends, f32).view(np.uint8), *packed])
    payload[: len(whole)] = whole
    _rest(v, decoded, into)
    return len(whole)


def decode_chunks(payload: Array, out: Array, weight: float, accumulate: bool, keep: int, bits: int) -> None:
    n = len(out)
    ends = payload[: 8 * -(-n // 4096)].view(f32).reshape(-1, 2)
    at, top = ends.nbytes, 1 << (bits - 1)
    for chunk, (low, step) in zip((out[s : s + 4096] for s in range(0, n, 4096)), ends, strict=True):
        k = -(-len(chunk) * keep // 4096)
        span = -(-k * (12 + bits) // 8)
        codes = unpack(payload[at : at + span], 12 + bits, k)
        j, code = codes & 4095, codes >> 12
        d = low + (code & top - 1).astype(f32) * step
        d = np.where(code & top, -d, d)
        if accumulate:
            chunk[j] += f32(weight) * d
        else:
            chunk[:] = 0
            chunk[j] = d
        at += span


def draw(key: int, n: int, indices: Array) -> None:
    """One random index from each of k strata of n: stratum j is [j n // k, (j + 1) n // k)."""
    k = len(indices)
    start, stop = np.arange(k) * n // max(k, 1), (np.arange(k) + 1) * n // max(k, 1)
    word = hashed(key, np.arange(k)) >> np.uint64(32)
    indices[:] = start + ((word * (stop - start).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def select(x: Array, scale: float, residual: Array, into: Array, k: int, floor: int, indices: Array) -> int:
    """Write the indices of `_largest` (`floor` as bits), and return how many there are. `into` receives v."""
    v, finite = _load(x, scale, residual)
    if not finite:
        return -1
    _rest(v, f32(0), into)
    chosen = _largest(v, k, floor)
    indices[: len(chosen)] = chosen
    return len(chosen)


def _shape(k: int, n: int) -> tuple[int, int, int]:
    """Elias-Fano: bits of the lower part of an index, bytes of all lower parts, bytes in total."""
    low = (n // k).bit_length() - 1
    middle = -(-k * low // 8)
    return low, middle, middle + -(-(((n - 1) >> low) + k) // 8)


def pack_sorted(indices: Array, n: int, payload: Array) -> int:
    """Ascending indices below n in Elias-Fano form; returns the number of bytes."""
    k = len(indices)
    if k == 0:
        return 0
    low, middle, end = _shape(k, n)
    payload[:middle] = pack(indices, low)
    ones = np.zeros(8 * (end - middle), np.uint8)
    ones[(indices >> low) + np.arange(k)] = 1
    payload[middle:end] = np.packbits(ones, bitorder="little")
    return end


def unpack_sorted(payload: Array, n: int, indices: Array) -> int:
    """Inverse of `pack_sorted`; returns the bytes read, or -1 if the payload is damaged."""
    k = len(indices)
    if k == 0:
        return 0
    low, middle, end = _shape(k, n)
    places = np.flatnonzero(np.unpackbits(payload[middle:end], bitorder="little"))
    if len(places) < k:
        return -1
    indices[:] = unpack(payload[:middle], low, k) | (places[:k] - np.arange(k)) << low
    return end if k == 0 or indices.max() < n else -1


def encode_top(x: Array, scale: float, residual: Array, into: Array, payload: Array, k: int) -> int:
    """Packed indices of the k largest magnitudes, padded to a multiple of 4 bytes, then the values."""
    v, finite = _load(x, scale, residual)
    if not finite:
        return -1
    chosen = _largest(v, k)
    at = -(-pack_sorted(chosen, len(x), payload) // 4) * 4
    payload[_shape(k, len(x))[2] : at] = 0
    payload[at : at + 4 * k] = v[chosen].view(np.uint8)
    v[chosen] = 0
    _rest(v, f32(0), into)
    return at + 4 * k


def decode_top(payload: Array, out: Array, weight: float, accumulate: bool, k: int) -> int:
    """Decode; returns the bytes read, or -1 if the payload is damaged."""
    chosen = np.zeros(k, np.int64)
    end = unpack_sorted(payload, len(out), chosen)
    if end < 0:
        return -1
    at = -(-end // 4) * 4
    values = payload[at : at + 4 * k].view(f32)
    if not accumulate:
        out[:] = 0
    out[chosen] = out[chosen] + f32(weight) * values if accumulate else values
    return at + 4 * k
