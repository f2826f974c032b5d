"""Measures the seconds of a round's exchange under several plans, on vectors of the real length."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

from fedmpi.comm import Comm
from fedmpi.exchange.base import Exchange, ExchangeContext
from fedmpi.server import FedAvg, Server
from fedmpi.types import Contribution


def measure(
    makes: Mapping[str, Callable[[], Exchange]],
    comm: Comm,
    params_P: torch.Tensor,
    facts: ExchangeContext,
    repeats: int = 3,
) -> dict[str, float]:
    """Seconds by plan: the median over `repeats` rounds of the slowest rank's time; equal on all ranks. Collective."""
    seconds: dict[str, float] = {}
    for plan, make in makes.items():
        kept = comm.free_shared(1 << 30)
        tried = make()
        work_P, delta_P = params_P.clone(), tried.delta()
        work_P, state = tried.home(work_P, FedAvg().init(work_P))
        silo = facts.hosted[0] if facts.hosted else (facts.ids[0] if facts.ids else "")
        times = []
        for round in range(repeats + 1):
            comm.barrier()
            start_s = time.perf_counter()
            tried.begin(round, 1)
            tried.add(Contribution(silo, round, 1.0, delta_P, 0.0, 1, 1))
            tried.finish(work_P, Server(FedAvg()), state)
            times.append(float(comm.gather_number(time.perf_counter() - start_s).max()))
        seconds[plan] = median(times[1:])
        del tried, work_P, delta_P, state
        comm.free_shared(kept)
    return seconds
