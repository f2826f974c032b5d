"""One clock for the times of all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from fedmpi.comm import Comm

SAMPLES = 8
_EPOCH_S = time.time() - time.perf_counter()


def unix_s(counter_s: float) -> float:
    """Unix time in seconds, at a value of time.perf_counter()."""
    return _EPOCH_S + counter_s


def clock() -> float:
    """Unix time in seconds, by a clock of this process that never goes back."""
    return unix_s(time.perf_counter())


def offsets(comm: Comm, read: Callable[[], float] = clock) -> tuple[np.ndarray, np.ndarray]:
    """By how many seconds each rank's clock is ahead of rank 0's, [n], and how far that may be wrong, [n]; valid on
    rank 0. Collective: nine small collectives, none if all ranks are on one machine, whose clock they share.

    Like a ping-pong, with all ranks at once. Each rank reads its clock between two collectives: after rank 0 has
    entered the first, and before rank 0 has left the second. So rank 0 knows two bounds of the offset; the best of
    `SAMPLES` counts.
    """
    low, high = np.full(comm.size, -np.inf), np.full(comm.size, np.inf)
    if len(set(comm.machines)) == 1:
        return np.zeros(comm.size), np.zeros(comm.size)
    entered_s = read()
    comm.gather_number(0.0)
    for _ in range(SAMPLES):
        mine_s = read()
        again_s = read()
        theirs_s = comm.gather_number(mine_s)
        low, high = np.maximum(low, theirs_s - read()), np.minimum(high, theirs_s - entered_s)
        entered_s = again_s
    low[0] = high[0] = 0.0
    return (low + high) / 2, np.abs(high - low) / 2
