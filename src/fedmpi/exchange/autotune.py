"""Seconds of a round's exchange under each plan, measured once on vectors of the real length."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from fedmpi.comm import Comm
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.choose import make
from fedmpi.exchange.config import ExchangeSection, PlanName
from fedmpi.server import FedAvg, Server
from fedmpi.types import Contribution


def measure(
    section: ExchangeSection,
    comm: Comm,
    params_P: torch.Tensor,
    facts: ExchangeContext,
    able: Sequence[PlanName],
    repeats: int = 3,
) -> dict[str, float]:
    """Seconds of a round's exchange under each candidate, the median of the slowest rank's; the same on every rank."""
    found: dict[str, float] = {}
    for plan in able:
        kept = comm.free_shared(1 << 30)
        tried = make(replace(section, plan=plan, overlap=False, verify=False), comm, params_P, facts)
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
            mine = np.zeros(comm.size)
            mine[comm.rank] = time.perf_counter() - start_s
            times.append(float(comm.share(mine).max()))
        found[plan] = median(times[1:])
        del tried, work_P, delta_P, state
        comm.free_shared(kept)
    return found
