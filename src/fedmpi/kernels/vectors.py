"""Kernels in numba that pass over whole vectors once, for models whose vectors do not fit into a cache.

Memory traffic bounds a round of a large model. These kernels read and write each vector once; torch reads it again for
every operation. On processors with fused multiply-add, `step` gives the same bits as torch's operations.

Vectors are contiguous arrays [n], of float32 if nothing else is said. Each kernel uses one thread.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmpi.kernels.jit import jit, jit_with

Array = Any

BLOCK = 1024  # elements per block, so that a block stays in the L1 cache
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX1 = np.uint64(0xBF58476D1CE4E5B9)
MIX2 = np.uint64(0x94D049BB133111EB)
LANES = 256  # independent partial sums of squares
ROWS = 16  # each partial sum takes 4 * ROWS squares before it is added to the total in float64


@jit
def distance(x: Array, w: Array) -> float:
    """The squared Euclidean distance of x and w, both [n]. The order of the sum is the same on every machine.

    Reads four parts of the vectors interleaved, which keeps more memory requests in flight.
    """
    total = 0.0
    lanes = np.zeros(LANES, np.float32)
    quarter = x.size // (4 * LANES * ROWS) * LANES * ROWS
    for start in range(0, quarter, LANES * ROWS):
        lanes[:] = 0
        for row in range(start, start + LANES * ROWS, LANES):
            for part in range(4):
                first = part * quarter + row
                row_x, row_w = x[first : first + LANES], w[first : first + LANES]
                for j in range(LANES):
                    d = row_x[j] - row_w[j]
                    lanes[j] += d * d
        for j in range(LANES):
            total += np.float64(lanes[j])
    for i in range(4 * quarter, x.size):
        d = x[i] - w[i]
        total += np.float64(d) * np.float64(d)
    return total


@jit
def squares(rows: Array, out: Array) -> None:
    """out = the squared norm of each row of `rows` [n, m], in float64, out [n]. The order of the sum is the same on
    every machine."""
    lanes = np.zeros(ROWS, np.float64)
    for i in range(out.size):
        row = rows[i]
        whole = row.size - row.size % ROWS
        lanes[:] = 0
        for start in range(0, whole, ROWS):
            part = row[start : start + ROWS]
            for j in range(ROWS):
                lanes[j] += np.float64(part[j]) * np.float64(part[j])
        total = 0.0
        for j in range(ROWS):
            total += lanes[j]
        for j in range(whole, row.size):
            total += np.float64(row[j]) * np.float64(row[j])
        out[i] = total


@jit
def _difference(x: Array, w: Array, out: Array) -> None:
    for i in range(out.size):
        out[i] = x[i] - w[i]


@jit
def _scaled(x: Array, factor: Any, out: Array) -> None:
    for i in range(out.size):
        out[i] = x[i] * factor


# Fused multiply-add rounds once, as in torch where the processor has it.
@jit_with(fastmath={"contract"})
def _multiple_added(x: Array, factor: Any, out: Array) -> None:
    for i in range(out.size):
        out[i] += x[i] * factor


@jit
def step(rows: tuple[Array, ...], factors: Array, kinds: Array, params: Array) -> None:
    """Compute params += sum_k factors[k] delta_k in place, and copy the new params into the rows that silos train in.

    `params` and each of the K rows: float32 [n]; `factors`: float32 [K]; `kinds`: int [K]. kinds[k] says what row k
    holds: nothing to add (-1), a sum (0), a silo's delta (1), or a silo's trained parameters (2), from which params are
    subtracted first. Rows of kind 1 and 2 get the copy. The sum equals torch's `mul` of the first delta, then
    `add_(delta, alpha=factor)` of the others in order.
    """
    mean, delta = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for start in range(0, params.size, BLOCK):
        stop = min(start + BLOCK, params.size)
        part, mean_B = params[start:stop], mean[: stop - start]
        empty = True
        for k in range(len(rows)):
            if kinds[k] < 0:
                continue
            row_B = rows[k][start:stop]
            if kinds[k] == 2:
                _difference(row_B, part, delta[: stop - start])
                row_B = delta[: stop - start]
            if empty:
                _scaled(row_B, factors[k], mean_B)
                empty = False
            else:
                _multiple_added(row_B, factors[k], mean_B)
        for i in range(mean_B.size):
            part[i] += mean_B[i]
        for k in range(len(rows)):
            if kinds[k] > 0:
                row_B = rows[k][start:stop]
                for i in range(mean_B.size):
                    row_B[i] = part[i]


@jit
def quantised(x: Array, factor: float, out: Array) -> None:
    """Write x * factor, rounded to the nearest integer, to even ones in between, into `out`, int32 or int64 [n]."""
    for i in range(out.size):
        out[i] = np.rint(np.float64(x[i]) * factor)


@jit
def dithered(x: Array, factor: float, limit: float, key: Any, start: int, out: Array) -> None:
    """Write x * factor, cut to the limit and rounded at random, into `out`, int16 [n]: down, plus 1 with the
    probability of the rest. The random bits of element i are splitmix64(key, start + i)."""
    for i in range(out.size):
        z = key + np.uint64(start + i + 1) * GOLDEN
        z = (z ^ (z >> np.uint64(30))) * MIX1
        z = (z ^ (z >> np.uint64(27))) * MIX2
        uniform = np.float64(np.int64((z ^ (z >> np.uint64(31))) >> np.uint64(11))) * 2.0**-53
        out[i] = np.floor(min(max(np.float64(x[i]) * factor, -limit), limit) + uniform)


@jit
def masked(x: Array, factor: float, streams: Array, signs: Array, out: Array) -> None:
    """Write `quantised` x, plus the streams with sign 1, minus the others, into `out`, int32 or int64 [n]; `streams` is
    contiguous, [K, n or more], of the type of `out`, and sums wrap."""
    for start in range(0, out.size, BLOCK):
        stop = min(start + BLOCK, out.size)
        x_B, out_B = x[start:stop], out[start:stop]
        for i in range(out_B.size):
            out_B[i] = np.rint(np.float64(x_B[i]) * factor)
        _add_signed(streams, signs, start, out_B)


@jit
def add_signed(streams: Array, signs: Array, out: Array) -> None:
    """Add the streams with sign 1 to `out` and subtract the others, as in `masked`."""
    for start in range(0, out.size, BLOCK):
        stop = min(start + BLOCK, out.size)
        _add_signed(streams, signs, start, out[start:stop])


@jit
def _add_signed(streams: Array, signs: Array, start: int, out: Array) -> None:
    for k in range(signs.size):
        stream = streams[k][start : start + out.size]
        if signs[k] > 0:
            for i in range(out.size):
                out[i] += stream[i]
        else:
            for i in range(out.size):
                out[i] -= stream[i]


@jit
def mean_of(rows: tuple[Array, ...], factor: float, out: Array, adds: bool) -> None:
    """Write the rows' sum times the factor, computed in float64, into `out`, float32 [n], or add it there (`adds`). The
    rows are int32 or int64 [n], and their sum wraps."""
    total = np.empty(BLOCK, rows[0].dtype)
    for start in range(0, out.size, BLOCK):
        stop = min(start + BLOCK, out.size)
        total_B, out_B = total[: stop - start], out[start:stop]
        if len(rows) == 1:
            total_B = rows[0][start:stop]
        else:
            _add_rows(rows, start, total_B)
        if adds:
            for i in range(total_B.size):
                out_B[i] += np.float32(np.float64(total_B[i]) * factor)
        else:
            for i in range(total_B.size):
                out_B[i] = np.float32(np.float64(total_B[i]) * factor)


@jit
def _add_rows(rows: tuple[Array, ...], start: int, total: Array) -> None:
    """The sum of the rows' elements from `start` on."""
    total[:] = rows[0][start : start + total.size]
    for k in range(1, len(rows)):
        row = rows[k][start : start + total.size]
        for i in range(total.size):
            total[i] += row[i]
