"""The kernels in numba: one pass over blocks that stay in cache, on the caller's thread, without the GIL.

No fastmath and no fused multiply-add: every operation is rounded by itself, in
the same order as in `plain`, so payloads and residuals have the same bits on any processor.

All kernels are in one file, because numba invalidates a cached kernel only when its own file changes: a stale copy of a
loop from another file would survive.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmpi.kernels.jit import jit

Array = Any  # one-dimensional and contiguous

SIGN_OFF = np.int32(0x7FFFFFFF)
NOT_FINITE = np.int32(0x7F800000)  # bits of infinity; those of NaN are larger
SMALLEST = np.float32(2.0**-126)  # smallest normal number; smaller steps decode to zero
ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to the nearest integer, ties to even
ONE = np.uint64(1)
EACH_BYTE = np.uint64(0x0101010101010101)
ROW = 256  # elements of a block of 8 or 4 bits. Loops of a constant length cost half as much
SCAN = 512  # elements scanned at a time, of which few are selected
SMALL = 1024  # elements at a time where two scratch blocks are needed
NUM_SAMPLES = 16384  # sample size of `select`
SIDE = 16  # adjacent samples
BLOCK = 4096  # elements processed at a time
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX1 = np.uint64(0xBF58476D1CE4E5B9)
MIX2 = np.uint64(0x94D049BB133111EB)
STEP = np.uint32(0x9E3779B9)
FMIX1 = np.uint32(0x85EBCA6B)
FMIX2 = np.uint32(0xC2B2AE35)
UNIT = np.float32(2.0**-24)
LOW4 = np.uint32(15)


@jit
def _splitmix(key: Any, index: int) -> Any:
    z = key + (np.uint64(index) + ONE) * GOLDEN
    z = (z ^ (z >> np.uint64(30))) * MIX1
    z = (z ^ (z >> np.uint64(27))) * MIX2
    return z ^ (z >> np.uint64(31))


@jit
def _uniforms(key: Any, block: int, u: Array) -> None:
    seed = np.uint32(_splitmix(key, block) >> np.uint64(32))
    for j in range(u.size):
        h = np.uint32(seed + np.uint32(j) * STEP)
        h = np.uint32((h ^ (h >> np.uint32(16))) * FMIX1)
        h = np.uint32((h ^ (h >> np.uint32(13))) * FMIX2)
        h = np.uint32(h ^ (h >> np.uint32(16)))
        u[j] = np.float32(np.int32(h >> np.uint32(8))) * UNIT


@jit
def _load(x: Array, scale: Any, residual: Array, v: Array) -> Any:
    """v = x * scale + residual; returns the bits of the largest magnitude (integers order them; NaN comes last)."""
    bits = v.view(np.int32)
    largest = np.int32(0)
    whole = x.size - x.size % ROW
    for start in range(0, whole, ROW):
        row, row_v, row_bits = x[start : start + ROW], v[start : start + ROW], bits[start : start + ROW]
        if residual.size:
            rest = residual[start : start + ROW]
            for j in range(ROW):
                row_v[j] = row[j] * scale + rest[j]
                largest = np.int32(max(largest, np.int32(row_bits[j] & SIGN_OFF)))
        else:
            for j in range(ROW):
                row_v[j] = row[j] * scale
                largest = np.int32(max(largest, np.int32(row_bits[j] & SIGN_OFF)))
    for j in range(whole, x.size):
        v[j] = x[j] * scale
        if residual.size:
            v[j] += residual[j]
        largest = np.int32(max(largest, np.int32(bits[j] & SIGN_OFF)))
    return largest


@jit
def _part(vector: Array, start: int, stop: int) -> Array:
    """vector[start:stop]; an empty vector stays empty."""
    return vector[start:stop] if vector.size else vector


@jit
def _give(decoded: Array, out: Array, weight: Any, accumulate: bool) -> None:
    if accumulate:
        for j in range(out.size):
            out[j] += weight * decoded[j]
    else:
        for j in range(out.size):
            out[j] = decoded[j]


@jit
def _pack(codes: Array, width: int, payload: Array) -> None:
    """Write the low `width` bits of code i to bits [i width, (i + 1) width), lowest first; zeros fill the last byte."""
    held, num_held, at = np.uint64(0), 0, 0
    mask = (ONE << np.uint64(width)) - ONE
    for i in range(codes.size):
        held |= (np.uint64(codes[i]) & mask) << np.uint64(num_held)
        num_held += width
        while num_held >= 8:
            payload[at] = np.uint8(held & np.uint64(255))
            held >>= np.uint64(8)
            num_held -= 8
            at += 1
    if num_held:
        payload[at] = np.uint8(held & np.uint64(255))


@jit
def _unpack(payload: Array, width: int, codes: Array) -> None:
    held, num_held, at = np.uint64(0), 0, 0
    mask = (ONE << np.uint64(width)) - ONE
    for i in range(codes.size):
        while num_held < width:
            held |= np.uint64(payload[at]) << np.uint64(num_held)
            num_held += 8
            at += 1
        codes[i] = np.int64(held & mask)
        held >>= np.uint64(width)
        num_held -= width


@jit
def _norm(v: Array, spare: Array) -> Any:
    """The Euclidean norm, summed in float64."""
    half = v.size // 2
    for j in range(half):
        spare[j] = np.float64(v[j]) * np.float64(v[j]) + np.float64(v[j + half]) * np.float64(v[j + half])
    return np.float32(np.sqrt(_fold(spare)))


@jit
def _mean(v: Array, m: int, spare: Array) -> Any:
    """The mean magnitude of the first m values, summed in float64; zeros must follow them."""
    half = v.size // 2
    for j in range(half):
        spare[j] = np.float64(abs(v[j])) + np.float64(abs(v[j + half]))
    return np.float32(_fold(spare) / m)


@jit
def _fold(spare: Array) -> Any:
    """The sum, adding the upper half to the lower until one number is left."""
    half = spare.size
    while half > 1:
        half //= 2
        for j in range(half):
            spare[j] += spare[j + half]
    return spare[0]


@jit
def _spread(tail: Array, parts: int, row: Array) -> None:
    """Spread a short block so that its parts start where those of a whole block do; zeros fill the gaps."""
    span, width = (tail.size + parts - 1) // parts, ROW // parts
    row[:] = 0
    for j in range(tail.size):
        row[j // span * width + j % span] = tail[j]


@jit
def _collect(row: Array, parts: int, tail: Array) -> None:
    """The inverse of `_spread`."""
    span, width = (tail.size + parts - 1) // parts, ROW // parts
    for j in range(tail.size):
        tail[j] = row[j // span * width + j % span]


@jit
def _nearest_rows(
    x: Array, scale: Any, residual: Array, into: Array, scales: Array, codes: Array, bits: int, levels: Any
) -> bool:
    """Encode whole rows. One loop does all the work, because passing arrays to a function costs as much as a hundred
    additions.
    """
    width = ROW * bits // 8
    v, t = np.empty(ROW, np.float32), np.empty(ROW, np.float32)  # t: a level plus ROUND; its lowest bits hold the level
    patterns, low_bits = v.view(np.int32), t.view(np.uint32)
    magnitude = np.zeros(1, np.int32)
    largest = magnitude.view(np.float32)
    for b in range(scales.size):
        x_row, codes_row = x[b * ROW : b * ROW + ROW], codes[b * width : b * width + width]
        if residual.size:
            residual_row = residual[b * ROW : b * ROW + ROW]
            for j in range(ROW):
                v[j] = x_row[j] * scale + residual_row[j]
        else:
            for j in range(ROW):
                v[j] = x_row[j] * scale
        highest = np.int32(0)
        for j in range(ROW):
            highest = np.int32(max(highest, np.int32(patterns[j] & SIGN_OFF)))
        if highest >= NOT_FINITE:
            return False
        magnitude[0] = highest
        s = largest[0] / levels
        if s < SMALLEST:
            s = np.float32(0)
            for j in range(ROW):
                t[j] = ROUND
        else:
            for j in range(ROW):
                t[j] = v[j] / s + ROUND
        scales[b] = s
        if into.size:
            into_row = into[b * ROW : b * ROW + ROW]
            for j in range(ROW):
                into_row[j] = v[j] - (t[j] - ROUND) * s
        if bits == 8:
            for j in range(ROW):
                codes_row[j] = np.uint8(low_bits[j])
        else:
            for j in range(ROW // 2):
                upper = (low_bits[j + ROW // 2] & LOW4) << np.uint32(4)
                codes_row[j] = np.uint8((low_bits[j] & LOW4) | upper)
    return True


@jit
def encode_nearest(x: Array, scale: Any, residual: Array, into: Array, payload: Array, bits: int) -> Any:
    """Blocks of one row, in 8 or 4 bits; the largest magnitude is 127 or 7 steps."""
    levels = np.float32((1 << (bits - 1)) - 1)
    num_whole, num_left = x.size // ROW, x.size % ROW
    start, width = num_whole * ROW, ROW * bits // 8
    scales = payload[: 4 * (num_whole + (num_left > 0))].view(np.float32)
    codes = payload[scales.nbytes :]
    if not _nearest_rows(x, scale, residual, into, scales[:num_whole], codes, bits, levels):
        return -1
    if num_left:
        parts = 8 // bits
        last_x, last_lost, last_codes = np.empty(ROW, np.float32), np.empty(ROW, np.float32), np.empty(width, np.uint8)
        _spread(x[start:], parts, last_x)
        _spread(_part(residual, start, x.size), parts, last_lost)
        before = _part(last_lost, 0, ROW if residual.size else 0)  # empty, not zeros: v = -0 stays -0
        if not _nearest_rows(last_x, scale, before, last_lost, scales[num_whole:], last_codes, bits, levels):
            return -1
        for j in range((num_left + parts - 1) // parts):
            codes[num_whole * width + j] = last_codes[j]
        if into.size:
            _collect(last_lost, parts, into[start:])
    return scales.nbytes + (x.size * bits + 7) // 8


@jit
def encode_stochastic(
    x: Array,
    scale: Any,
    residual: Array,
    into: Array,
    payload: Array,
    key: Any,
    levels: int,
    norm: bool,
    damping: Any,
) -> Any:
    """Blocks of one row; a step is the Euclidean norm, or the largest magnitude, divided by `levels`."""
    n, high = x.size, np.float32(levels)
    bits = 2 if levels == 1 else 4 if levels <= 7 else 8
    num_blocks = (n + ROW - 1) // ROW
    scales = payload[: 4 * num_blocks].view(np.float32)
    v, spare, u = np.zeros(ROW, np.float32), np.zeros(ROW // 2, np.float64), np.zeros(ROW, np.float32)
    magnitude, codes, unwanted = np.zeros(1, np.int32), np.zeros(ROW, np.int8), np.zeros(ROW, np.float32)
    parts = 8 // bits
    at = 4 * num_blocks
    for b in range(num_blocks):
        start, stop = b * ROW, min(n, (b + 1) * ROW)
        m = stop - start
        magnitude[0] = _load(x[start:stop], scale, _part(residual, start, stop), v)
        if magnitude[0] >= NOT_FINITE:
            return -1
        v[m:] = 0
        s = (_norm(v, spare) if norm else magnitude.view(np.float32)[0]) / high
        span = (m + parts - 1) // parts
        packed = payload[at : at + span]
        q = packed.view(np.int8) if parts == 1 else codes
        rest = into[start:stop] if into.size else unwanted[:m]
        scales[b] = s * damping
        if s < SMALLEST:
            scales[b] = 0
            for j in range(m):
                q[j] = 0
                rest[j] = v[j]
        else:
            _uniforms(key, b, u)
            for j in range(m):
                r = min(max(np.floor(v[j] / s + u[j]), -high), high)
                rest[j] = v[j] - r * scales[b]
                q[j] = np.int8(np.int32(r))
        if parts > 1:
            q[m:] = 0
            _lay(q, bits, packed)
        at += span
    return at


@jit
def encode_signs(x: Array, scale: Any, residual: Array, into: Array, payload: Array) -> Any:
    """Blocks of 4096; the scale is the mean magnitude."""
    n = x.size
    num_blocks = (n + BLOCK - 1) // BLOCK
    scales = payload[: 4 * num_blocks].view(np.float32)
    v, spare, q = np.zeros(BLOCK, np.float32), np.zeros(BLOCK // 2, np.float64), np.zeros(BLOCK, np.int8)
    unwanted = np.zeros(BLOCK, np.float32)
    at = 4 * num_blocks
    for b in range(num_blocks):
        start, stop = b * BLOCK, min(n, (b + 1) * BLOCK)
        m = stop - start
        if _load(x[start:stop], scale, _part(residual, start, stop), v) >= NOT_FINITE:
            return -1
        v[m:] = 0
        s = _mean(v, m, spare)
        rest = into[start:stop] if into.size else unwanted[:m]
        span = (m + 7) // 8
        q[:] = 0
        if s < SMALLEST:
            scales[b] = 0
            for j in range(m):
                rest[j] = v[j]
        else:
            scales[b] = s
            for j in range(m):
                q[j] = np.int8(v[j] >= 0)
            for j in range(m):
                rest[j] = v[j] - s if v[j] >= 0 else v[j] + s
        _lay(q, 1, payload[at : at + span])
        at += span
    return at


@jit
def _lay(q: Array, bits: int, packed: Array) -> None:
    """Pack codes of fewer than 8 bits: byte j holds codes j, j + span, j + 2 span, ..., lowest first."""
    span = packed.size
    if bits == 4:
        upper = q[span : 2 * span]
        for j in range(span):
            packed[j] = np.uint8((q[j] & np.int8(15)) | np.int8(upper[j] << np.int8(4)))
        return
    mask = (1 << bits) - 1
    for j in range(span):
        packed[j] = np.uint8(q[j] & mask)
    for p in range(1, 8 // bits):
        row = q[p * span : (p + 1) * span]
        for j in range(row.size):
            packed[j] |= np.uint8((row[j] & mask) << (bits * p))


@jit
def decode_blocks(payload: Array, out: Array, weight: Any, accumulate: bool, block: int, bits: int) -> None:
    n = out.size
    num_blocks = (n + block - 1) // block
    scales = payload[: 4 * num_blocks].view(np.float32)
    d = np.zeros(block, np.float32)
    parts = 8 // bits
    mask, top = (1 << bits) - 1, 1 << (bits - 1)
    at = 4 * num_blocks
    for b in range(num_blocks):
        start, stop = b * block, min(n, (b + 1) * block)
        m = stop - start
        s = scales[b]
        span = (m + parts - 1) // parts
        codes8 = payload[at : at + span]
        at += span
        if m == ROW and bits >= 4:
            _give_row(codes8, bits, s, out[start:stop], weight, accumulate)
            continue
        for p in range(parts):
            row = d[p * span : min(m, (p + 1) * span)]
            for j in range(row.size):
                c = (codes8[j] >> (bits * p)) & mask
                row[j] = np.float32(2 * c - 1 if bits == 1 else (c ^ top) - top) * s
        _give(d, out[start:stop], weight, accumulate)


@jit
def _give_row(codes: Array, bits: int, s: Any, out: Array, weight: Any, accumulate: bool) -> None:
    """`_give` for a whole row of 8 or 4 bits."""
    if bits == 8:
        for j in range(ROW):
            d = np.float32(np.int8(codes[j])) * s
            out[j] = out[j] + weight * d if accumulate else d
        return
    upper = out[ROW // 2 :]
    for j in range(ROW // 2):
        d = np.float32(np.int32(np.uint32(codes[j]) << np.uint32(28)) >> np.int32(28)) * s
        out[j] = out[j] + weight * d if accumulate else d
    for j in range(ROW // 2):
        d = np.float32(np.int8(codes[j]) >> np.int8(4)) * s
        upper[j] = upper[j] + weight * d if accumulate else d


@jit
def encode_half(x: Array, scale: Any, residual: Array, into: Array, payload: Array, bfloat: bool) -> Any:
    n = x.size
    halves = payload[: 2 * n].view(np.uint16)
    v, d = np.zeros(SMALL, np.float32), np.zeros(SMALL, np.float32)
    bits, back = v.view(np.uint32), d.view(np.uint32)
    limit = np.int32(0x7F7F8000) if bfloat else np.int32(0x477FF000)  # the first that would round to infinity
    for start in range(0, n, SMALL):
        stop = min(n, start + SMALL)
        m = stop - start
        if _load(x[start:stop], scale, _part(residual, start, stop), v) >= limit:
            return -1
        h = halves[start:stop]
        if bfloat:
            for j in range(m):
                odd = np.uint32(bits[j] >> np.uint32(16)) & np.uint32(1)
                h[j] = np.uint16(np.uint32(bits[j] + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))
        else:
            for j in range(m):
                d[j] = abs(v[j]) + np.float32(0.5)  # the sum's last bit is float16's smallest subnormal
            for j in range(m):
                f = np.uint32(bits[j] & np.uint32(0x7FFFFFFF))
                normal = np.uint32(f + np.uint32(0xC8000FFF) + ((f >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
                small = back[j] - np.uint32(0x3F000000)
                sign = (bits[j] >> np.uint32(16)) & np.uint32(0x8000)
                h[j] = np.uint16((small if f < np.uint32(0x38800000) else normal) | sign)
        if into.size:
            _widen(h, d, bfloat)
            rest = into[start:stop]
            for j in range(m):
                rest[j] = v[j] - d[j]
    return 2 * n


@jit
def _widen(h: Array, d: Array, bfloat: bool) -> None:
    bits = d.view(np.uint32)
    if bfloat:
        for j in range(h.size):
            bits[j] = np.uint32(h[j]) << np.uint32(16)
    else:
        for j in range(h.size):
            c = np.uint32(h[j])
            bits[j] = ((c & np.uint32(0x7FFF)) << np.uint32(13)) | ((c & np.uint32(0x8000)) << np.uint32(16))
        for j in range(h.size):
            d[j] *= np.float32(2.0**112)  # shifts the exponent's bias, also for subnormals


@jit
def decode_half(payload: Array, out: Array, weight: Any, accumulate: bool, bfloat: bool) -> None:
    n = out.size
    halves = payload[: 2 * n].view(np.uint16)
    d = np.zeros(SMALL, np.float32)
    for start in range(0, n, SMALL):
        stop = min(n, start + SMALL)
        _widen(halves[start:stop], d, bfloat)
        _give(d, out[start:stop], weight, accumulate)


@jit
def encode_uniform(x: Array, scale: Any, residual: Array, into: Array, payload: Array, step: Any, max_bits: int) -> Any:
    n = x.size
    num_blocks = (n + 255) // 256
    v, q, magnitude = np.zeros(256, np.float32), np.zeros(256, np.int32), np.zeros(1, np.int32)
    unwanted = np.zeros(256, np.float32)
    high = np.float32((1 << (max_bits - 1)) - 1)
    at = num_blocks
    for b in range(num_blocks):
        start, stop = b * 256, min(n, (b + 1) * 256)
        m = stop - start
        magnitude[0] = _load(x[start:stop], scale, _part(residual, start, stop), v)
        if magnitude[0] >= NOT_FINITE:
            return -1
        largest = np.int32(_level(magnitude.view(np.float32)[0], step, high))
        width = 0
        while largest >> width:
            width += 1
        width += width > 0
        payload[b] = np.uint8(width)
        rest = into[start:stop] if into.size else unwanted
        for j in range(m):
            r = np.copysign(_level(v[j], step, high), v[j])
            q[j] = np.int32(r)
            rest[j] = v[j] - np.float32(q[j]) * step
        span = (m * width + 7) // 8
        _pack(q[:m], width, payload[at : at + span])
        at += span
    return at


@jit
def _level(value: Any, step: Any, high: Any) -> Any:
    """floor(|value| / step + 0.5), at most `high`; compares the fraction with 0.5, since adding 0.5 could round up."""
    t = abs(value) / step
    whole = np.floor(t)
    return min(whole + np.float32(t - whole >= np.float32(0.5)), high)


@jit
def decode_uniform(payload: Array, out: Array, weight: Any, accumulate: bool, step: Any) -> Any:
    n = out.size
    num_blocks = (n + 255) // 256
    q, d = np.zeros(256, np.int64), np.zeros(256, np.float32)
    at = num_blocks
    for b in range(num_blocks):
        start, stop = b * 256, min(n, (b + 1) * 256)
        m = stop - start
        width = int(payload[b])
        span = (m * width + 7) // 8
        if at + span > payload.size or width > 16:
            return -1
        d[:] = 0
        if width:
            _unpack(payload[at : at + span], width, q[:m])
            top = 1 << (width - 1)
            for j in range(m):
                d[j] = np.float32((q[j] ^ top) - top) * step
        _give(d, out[start:stop], weight, accumulate)
        at += span
    return at


@jit
def _kth(bits: Array, k: int, counts: Array) -> tuple[int, int]:
    """The k-th largest of `bits`, and how many of the k largest equal it. Overwrites `bits`."""
    num = bits.size
    for shift in (23, 15, 7, 0):
        counts[:256] = 0
        mask = 127 if shift == 0 else 255
        for i in range(num):
            counts[(bits[i] >> shift) & mask] += 1
        top = mask
        while counts[top] < k:
            k -= counts[top]
            top -= 1
        kept = 0
        for i in range(num):
            if (bits[i] >> shift) & mask == top:
                bits[kept] = bits[i]
                kept += 1
        num = kept
    return bits[0], k


@jit
def encode_chunks(x: Array, scale: Any, residual: Array, into: Array, payload: Array, keep: int, bits: int) -> Any:
    n = x.size
    num_chunks = (n + BLOCK - 1) // BLOCK
    ends = payload[: 8 * num_chunks].view(np.float32)
    v, spare = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.int32)
    counts, codes = np.zeros(256, np.int64), np.zeros(keep, np.int64)
    magnitudes = np.zeros(2, np.int32)
    values = magnitudes.view(np.float32)
    patterns = v.view(np.int32)
    sign = 1 << (bits - 1)
    at = 8 * num_chunks
    for b in range(num_chunks):
        start, stop = b * BLOCK, min(n, (b + 1) * BLOCK)
        m = stop - start
        k = (m * keep + BLOCK - 1) // BLOCK
        magnitudes[1] = _load(x[start:stop], scale, _part(residual, start, stop), v)
        if magnitudes[1] >= NOT_FINITE:
            return -1
        for j in range(m):
            spare[j] = patterns[j] & SIGN_OFF
        least, equal = _kth(spare[:m], k, counts)
        magnitudes[0] = least
        low, high = values[0], values[1]
        step = (high - low) / np.float32(sign - 1)
        rest = into[start:stop] if into.size else v
        if into.size:
            for j in range(m):
                rest[j] = v[j]
        found = 0
        for j in range(m):
            magnitude = np.int64(patterns[j] & SIGN_OFF)
            if magnitude < least or (magnitude == least and equal == 0):
                continue
            equal -= magnitude == least
            level = np.float32(0)
            if step > 0:
                level = min((((abs(v[j]) - low) / step) + ROUND) - ROUND, np.float32(sign - 1))
            d = low + level * step
            negative = v[j] < 0
            codes[found] = j + ((np.int64(level) + sign * negative) << 12)
            found += 1
            if into.size:
                rest[j] = v[j] + d if negative else v[j] - d
        ends[2 * b], ends[2 * b + 1] = low, step
        span = (k * (12 + bits) + 7) // 8
        _pack(codes[:k], 12 + bits, payload[at : at + span])
        at += span
    return at


@jit
def decode_chunks(payload: Array, out: Array, weight: Any, accumulate: bool, keep: int, bits: int) -> None:
    n = out.size
    num_chunks = (n + BLOCK - 1) // BLOCK
    ends = payload[: 8 * num_chunks].view(np.float32)
    codes = np.zeros(keep, np.int64)
    sign = 1 << (bits - 1)
    at = 8 * num_chunks
    for b in range(num_chunks):
        chunk = out[b * BLOCK : min(n, (b + 1) * BLOCK)]
        k = (chunk.size * keep + BLOCK - 1) // BLOCK
        span = (k * (12 + bits) + 7) // 8
        _unpack(payload[at : at + span], 12 + bits, codes[:k])
        if not accumulate:
            chunk[:] = 0
        for i in range(k):
            j, code = codes[i] & 4095, codes[i] >> 12
            d = ends[2 * b] + np.float32(code & (sign - 1)) * ends[2 * b + 1]
            d = -d if code & sign else d
            if j < chunk.size:  # a larger index means a damaged payload
                chunk[j] = chunk[j] + weight * d if accumulate else d
        at += span


@jit
def draw(key: Any, n: int, indices: Array) -> None:
    """One random index from each of k strata of n: stratum j is [j n // k, (j + 1) n // k)."""
    k = indices.size
    for j in range(k):
        start, stop = j * n // k, (j + 1) * n // k
        word = _splitmix(key, j) >> np.uint64(32)
        indices[j] = start + np.int64((word * np.uint64(stop - start)) >> np.uint64(32))


@jit
def select(x: Array, scale: Any, residual: Array, into: Array, k: int, floor: int, indices: Array) -> int:
    """Write the indices of the k largest magnitudes not below `floor` (as bits), ascending; the first ones among
    equals.

    Returns how many there are, or -1 if a value is not finite. `into` receives v.
    """
    return _select(x, scale, residual, into, k, floor, indices, np.empty(0, np.int32))


@jit
def _select(
    x: Array, scale: Any, residual: Array, into: Array, k: int, floor: int, indices: Array, chosen: Array
) -> int:
    """`select`, which also writes the bits of the selected values to `chosen`, unless it is empty.

    A residual needs an `into`. A sample estimates a magnitude that slightly more than k values reach; one pass collects
    these and finds the k-th among them. If the estimate was wrong (many equal values, for example), histograms of the
    whole vector find the k-th.
    """
    n = x.size
    num_samples = min(max(n >> 6, 2048), NUM_SAMPLES)
    stride = SIDE * ((n + num_samples - 1) // num_samples)
    sample = np.zeros(SIDE * ((n + stride - 1) // stride), np.int32)
    v, counts = np.zeros(SCAN, np.float32), np.zeros(2048, np.int64)
    bits = v.view(np.int32)
    taken = 0
    for start in range(0, n, stride):  # adjacent samples share a cache line
        for j in range(start, min(n, start + SIDE)):
            v[0] = x[j] * scale + (residual[j] if residual.size else np.float32(0))
            sample[taken] = bits[0] & SIGN_OFF
            taken += 1
    rank = min(taken, int(1.25 * k * taken / n) + 16)
    room = min(n, 2 * (n // taken + 1) * rank + SCAN)
    low = np.int32(max(_kth(sample[:taken], rank, counts)[0], floor, 1))  # at least 1: zeros come in runs
    near, patterns = np.empty(room + 1, np.int64), np.empty(room + 1, np.int32)  # index and bits of each value
    reached = np.zeros(SCAN, np.int8)
    words = reached.view(np.uint64)
    found = 0
    for start in range(0, n, SCAN):
        m = min(n - start, SCAN)
        row = x[start : start + m]
        largest = np.int32(0)
        if m == SCAN and residual.size:
            rest = residual[start : start + SCAN]
            for j in range(SCAN):
                v[j] = row[j] * scale + rest[j]
        elif m == SCAN:
            for j in range(SCAN):
                v[j] = row[j] * scale
        else:
            _load(row, scale, _part(residual, start, start + m), v)
            v[m:] = 0
        if into.size and m == SCAN:
            target = into[start : start + SCAN]
            for j in range(SCAN):
                target[j] = v[j]
        elif into.size:
            for j in range(m):
                into[start + j] = v[j]
        for j in range(SCAN):
            magnitude = np.int32(bits[j] & SIGN_OFF)
            largest = np.int32(max(largest, magnitude))
            reached[j] = magnitude >= low
        if largest >= NOT_FINITE:
            return -1
        if found + m > room:
            found = room + 1
            continue
        for w in range(SCAN // 8):
            word = words[w]
            while word:
                first = word & (~word + ONE)
                at = 8 * w + np.int64((((first - ONE) & EACH_BYTE) * EACH_BYTE) >> np.uint64(56))  # its lowest set byte
                near[found], patterns[found] = start + at, bits[at]
                found += 1
                word ^= first
    if found > room or (found < k and low > floor):
        if into.size:
            x, scale = into, np.float32(1)
        found = _select_exactly(x, scale, k, floor, indices, counts)
        if chosen.size:
            values = chosen.view(np.float32)
            for i in range(found):
                values[i] = x[indices[i]] * scale
        return found
    magnitudes = patterns[:found] & SIGN_OFF
    least, equal = _kth(magnitudes.copy(), k, counts) if found > k else (0, found)
    taken = 0
    for i in range(found):
        tie = magnitudes[i] == least and equal > 0
        equal -= tie
        if tie or magnitudes[i] > least:
            indices[taken] = near[i]
            if chosen.size:
                chosen[taken] = patterns[i]
            taken += 1
    return taken


@jit
def _select_exactly(x: Array, scale: Any, k: int, floor: int, indices: Array, counts: Array) -> int:
    """`select` in four passes without extra memory, for any values."""
    v, none = np.zeros(BLOCK, np.float32), x[:0]
    bits = v.view(np.int32)
    prefix, equal = 0, k
    for shift, width in ((20, 11), (9, 11), (0, 9)):
        counts[:] = 0
        for start in range(0, x.size, BLOCK):
            chunk = x[start : start + BLOCK]
            _load(chunk, scale, none, v)
            for j in range(chunk.size):
                magnitude = np.int64(bits[j] & SIGN_OFF)
                if magnitude >> (shift + width) == prefix:
                    counts[(magnitude >> shift) & ((1 << width) - 1)] += 1
        top = (1 << width) - 1
        while counts[top] < equal:
            equal -= counts[top]
            top -= 1
        prefix = (prefix << width) | top
    least = prefix
    if least < floor:
        least, equal = floor - 1, 0
    chosen = 0
    for start in range(0, x.size, BLOCK):
        chunk = x[start : start + BLOCK]
        if _load(chunk, scale, none, v) < least:
            continue
        for j in range(chunk.size):
            magnitude = np.int64(bits[j] & SIGN_OFF)
            if magnitude > least or (magnitude == least and equal > 0):
                equal -= magnitude == least
                indices[chosen] = start + j
                chosen += 1
    return chosen


@jit
def _shape(k: int, n: int) -> tuple[int, int, int]:
    """Elias-Fano: bits of the lower part of an index, bytes of all lower parts, bytes in total."""
    low = 0
    while (n // k) >> (low + 1):
        low += 1
    middle = (k * low + 7) // 8
    return low, middle, middle + (((n - 1) >> low) + k + 7) // 8


@jit
def pack_sorted(indices: Array, n: int, payload: Array) -> Any:
    """Ascending indices below n in Elias-Fano form, 2 + log2(n / k) bits each: lower bits, then upper ones in unary."""
    k = indices.size
    if k == 0:
        return 0
    low, middle, end = _shape(k, n)
    _pack(indices, low, payload)
    payload[middle:end] = 0
    for i in range(k):
        at = (indices[i] >> low) + i
        payload[middle + (at >> 3)] |= np.uint8(1 << (at & 7))
    return end


@jit
def unpack_sorted(payload: Array, n: int, indices: Array) -> Any:
    k = indices.size
    if k == 0:
        return 0
    low, middle, end = _shape(k, n)
    if low:
        _unpack(payload, low, indices)
    else:
        indices[:] = 0
    upper = np.empty(k + 8, np.int64)
    found = 0
    for at in range(end - middle):
        ones = np.int64(payload[middle + at])
        for j in range(8):  # branchless: the entry of a zero bit is overwritten
            upper[found] = 8 * at + j - found
            found += int((ones >> j) & 1)
        if found > k:
            break
    if found < k:
        return -1
    for i in range(k):
        indices[i] |= upper[i] << low
        if indices[i] >= n:
            return -1
    return end


@jit
def encode_top(x: Array, scale: Any, residual: Array, into: Array, payload: Array, k: int) -> Any:
    """Packed indices of the k largest magnitudes, padded to a multiple of 4 bytes, then the values; `into` gets the
    others."""
    indices, chosen = np.empty(k, np.int64), np.empty(k, np.int32)
    if _select(x, scale, residual, into, k, 0, indices, chosen) < 0:
        return -1
    end = pack_sorted(indices, x.size, payload)
    at = (end + 3) // 4 * 4
    payload[end:at] = 0
    payload[at : at + 4 * k].view(np.int32)[:] = chosen
    if into.size:
        for i in range(k):
            into[indices[i]] = 0
    return at + 4 * k


@jit
def decode_top(payload: Array, out: Array, weight: Any, accumulate: bool, k: int) -> Any:
    indices = np.empty(k, np.int64)
    end = unpack_sorted(payload, out.size, indices)
    if end < 0:
        return -1
    at = (end + 3) // 4 * 4
    values = payload[at : at + 4 * k].view(np.float32)
    if accumulate:
        for i in range(k):
            out[indices[i]] += weight * values[i]
    else:
        out[:] = 0
        for i in range(k):
            out[indices[i]] = values[i]
    return at + 4 * k
