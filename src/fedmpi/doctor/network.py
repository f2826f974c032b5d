"""Clocks of the hosts, and latency and bandwidth between them, measured within about two seconds."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch

from fedmpi.comm import Comm

BUDGET_S = 2.0  # of all pairs together
PINGS = 20  # there and back, 8 bytes
BLOCK_BYTES = 1 << 20
MOST_PAIRS = 28  # all pairs of 8 hosts; beyond that, neighbours only


def clocks(comm: Comm) -> dict[str, Any]:
    """Seconds by which each rank's clock is ahead of rank 0's, and how exact that is. Collective."""
    readings = []
    for _ in range(7):
        began_s = time.monotonic()
        comm.barrier()
        now = time.time()
        readings.append(comm.gather_values([now, time.monotonic() - began_s]))
    ahead = [statistics.median(row[rank][0] - row[0][0] for row in readings) for rank in range(comm.size)]
    exact = max(
        statistics.median(abs(row[rank][0] - row[0][0] - ahead[rank]) for row in readings) for rank in range(comm.size)
    )
    return {"ahead_s": ahead, "exact_s": exact}


def pairs(comm: Comm) -> list[tuple[int, int]]:
    """The ranks that are measured: the first of each host, or all of a single host; all pairs of few, else neighbours.

    The same on every rank."""
    firsts = [comm.machines.index(machine) for machine in dict.fromkeys(comm.machines)]
    ranks = firsts if len(firsts) > 1 else list(range(comm.size))
    every = list(itertools.combinations(ranks, 2))
    return every if len(every) <= MOST_PAIRS else list(itertools.pairwise(ranks))[:MOST_PAIRS]


def table(comm: Comm) -> list[dict[str, Any]]:
    """A row per pair: microseconds one way, and MB/s of 1 MiB messages there and back. Collective: other ranks wait."""
    chosen = pairs(comm)
    rows = []
    for a, b in chosen:
        ping_s = _there_and_back(comm, a, b, 8, PINGS)
        once_s = _there_and_back(comm, a, b, BLOCK_BYTES, 2)
        # All ranks take the count from rank a's figure.
        slow_s = float(comm.gather_number(once_s if comm.rank == a else 0.0)[a])
        num = max(1, min(100, int(BUDGET_S / len(chosen) / max(slow_s, 1e-6))))
        took_s = _there_and_back(comm, a, b, BLOCK_BYTES, num)
        figures = comm.share(torch.tensor([ping_s, took_s] if comm.rank == a else [0.0, 0.0]).double().numpy())
        rows.append(
            {
                "ranks": [a, b],
                "hosts": [comm.hosts[a], comm.hosts[b]],
                "latency_us": float(figures[0]) / 2 * 1e6,
                "mb_per_s": 2 * BLOCK_BYTES / 1e6 / float(figures[1]),
            }
        )
    return rows


def _there_and_back(comm: Comm, a: int, b: int, num_bytes: int, num: int) -> float:
    """Mean seconds of a message to the other rank and back, on ranks a and b; 0 on the others. Collective."""
    comm.barrier()
    if comm.rank not in (a, b):
        return 0.0
    other = b if comm.rank == a else a
    send, recv = (comm.allocate(num_bytes, torch.uint8) for _ in range(2))
    began_s = time.perf_counter()
    for _ in range(num):
        for sends in (comm.rank == a, comm.rank == b):
            comm.wait(comm.isend(send, other) if sends else comm.irecv(recv, other))
    return (time.perf_counter() - began_s) / num
