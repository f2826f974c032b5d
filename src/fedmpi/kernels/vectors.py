"""Passes over whole vectors in numba, for models whose vectors do not fit into a cache.

A round of a large model costs what memory is read and written. Here each vector is read and written once, where torch
reads it again for every operation. Results have the bits of torch's operations, named in each docstring; the norm is
more exact than torch's.

Compiled at first use, cached on disk; one thread, no lock held. Vectors are one-dimensional, contiguous float32.
"""

from __future__ import annotations

from typing import Any

import numba  # type: ignore[import-untyped,unused-ignore]
import numpy as np

Array = Any

BLOCK = 4096  # elements that are worked on at a time, in the first cache
LANES = 128  # sums of squares side by side
ROWS = 64  # of so many squares each, before they are added up in double precision


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator,unused-ignore]
def subtract(x: Array, w: Array) -> float:
    """x -= w, as torch's `sub_`; returns the sum of squares of the new x, in an order that is the same everywhere."""
    total = 0.0
    lanes = np.zeros(LANES, np.float32)
    size = LANES * ROWS
    for start in range(0, x.size - x.size % size, size):
        lanes[:] = 0
        for row in range(start, start + size, LANES):
            row_x, row_w = x[row : row + LANES], w[row : row + LANES]
            for j in range(LANES):
                d = row_x[j] - row_w[j]
                row_x[j] = d
                lanes[j] += d * d
        for j in range(LANES):
            total += np.float64(lanes[j])
    for i in range(x.size - x.size % size, x.size):
        d = x[i] - w[i]
        x[i] = d
        total += np.float64(d) * np.float64(d)
    return total


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator,unused-ignore]
def distance(x: Array, w: Array) -> float:
    """What `subtract` returns, with x left as it is."""
    total = 0.0
    lanes = np.zeros(LANES, np.float32)
    size = LANES * ROWS
    for start in range(0, x.size - x.size % size, size):
        lanes[:] = 0
        for row in range(start, start + size, LANES):
            row_x, row_w = x[row : row + LANES], w[row : row + LANES]
            for j in range(LANES):
                d = row_x[j] - row_w[j]
                lanes[j] += d * d
        for j in range(LANES):
            total += np.float64(lanes[j])
    for i in range(x.size - x.size % size, x.size):
        d = x[i] - w[i]
        total += np.float64(d) * np.float64(d)
    return total


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator,unused-ignore]
def _difference(x: Array, w: Array, out: Array) -> None:
    for i in range(out.size):
        out[i] = x[i] - w[i]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator,unused-ignore]
def _scaled(x: Array, factor: Any, out: Array) -> None:
    for i in range(out.size):
        out[i] = x[i] * factor


# torch adds a multiple with one rounding where the processor can; so does this.
@numba.njit(cache=True, nogil=True, fastmath={"contract"})  # type: ignore[untyped-decorator,unused-ignore]
def _multiple_added(x: Array, factor: Any, out: Array) -> None:
    for i in range(out.size):
        out[i] += x[i] * factor


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator,unused-ignore]
def step(rows: tuple[Array, ...], factors: Array, kinds: Array, params: Array) -> None:
    """params += sum_k factors[k] delta_k, and rows that silos train in become copies of the new params.

    kinds[k]: row k is a sum (0), the delta of one silo (1), or its trained parameters (2), from which params are
    subtracted first. Rows of kind 1 and 2 are written. The sum is torch's `mul` of the first delta and
    `add_(delta, alpha=factor)` of the others, in their order.
    """
    mean, delta = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for start in range(0, params.size, BLOCK):
        stop = min(start + BLOCK, params.size)
        part, mean_B = params[start:stop], mean[: stop - start]
        for k in range(len(rows)):
            row_B = rows[k][start:stop]
            if kinds[k] == 2:
                _difference(row_B, part, delta[: stop - start])
                row_B = delta[: stop - start]
            if k == 0:
                _scaled(row_B, factors[0], mean_B)
            else:
                _multiple_added(row_B, factors[k], mean_B)
        for i in range(mean_B.size):
            part[i] += mean_B[i]
        for k in range(len(rows)):
            if kinds[k]:
                row_B = rows[k][start:stop]
                for i in range(mean_B.size):
                    row_B[i] = part[i]
