"""Passes over whole vectors in numba, for models whose vectors do not fit into a cache.

A round of a large model costs what memory is read and written. Here each vector is read and written once, where torch
reads it again for every operation. Steps have the bits of torch's operations on processors with fused multiply-add.

Vectors are one-dimensional, contiguous float32; one thread works.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmpi.kernels.jit import jit, jit_with

Array = Any

BLOCK = 1024  # elements that are worked on at a time, in the first cache
LANES = 256  # sums of squares side by side
ROWS = 16  # times 4 squares in each, before they are added up in double precision


@jit
def distance(x: Array, w: Array) -> float:
    """The sum of squares of x - w, in an order that is the same everywhere.

    Four parts are read side by side, which keeps more of memory's requests in flight.
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
def _difference(x: Array, w: Array, out: Array) -> None:
    for i in range(out.size):
        out[i] = x[i] - w[i]


@jit
def _scaled(x: Array, factor: Any, out: Array) -> None:
    for i in range(out.size):
        out[i] = x[i] * factor


# torch adds a multiple with one rounding where the processor can; so does this.
@jit_with(fastmath={"contract"})
def _multiple_added(x: Array, factor: Any, out: Array) -> None:
    for i in range(out.size):
        out[i] += x[i] * factor


@jit
def step(rows: tuple[Array, ...], factors: Array, kinds: Array, params: Array) -> None:
    """params += sum_k factors[k] delta_k, and rows that silos train in become copies of the new params.

    kinds[k]: row k is left out (-1), is a sum (0), the delta of one silo (1), or its trained parameters (2), from which
    params are subtracted first. Rows of kind 1 and 2 are written. The sum is torch's `mul` of the first delta and
    `add_(delta, alpha=factor)` of the others, in their order.
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
