"""Which plan carries out a configuration; `plan: auto` measures the candidates once, on vectors of the real length."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from fedmpi.comm import Comm
from fedmpi.exchange.base import Exchange, ExchangeContext
from fedmpi.exchange.config import ExchangeSection, PlanName
from fedmpi.exchange.dense import Replicated, Root
from fedmpi.exchange.overlap import Behind
from fedmpi.exchange.regions import Regional
from fedmpi.exchange.sharded import Sharded
from fedmpi.exchange.shared_memory import Window
from fedmpi.server import FedAvg, Server
from fedmpi.types import Contribution

MEMBERS: dict[PlanName, type[Exchange]] = {
    "root": Root,
    "replicated": Replicated,
    "sharded": Sharded,
    "window": Window,
}


def make(section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext) -> Exchange:
    """The exchange of a plan that is named. A call of all ranks."""
    if section.regions is not None:
        return Regional(section, comm, params_P, facts)
    if section.overlap:
        return Behind(MEMBERS[section.plan](section, comm.dup(), params_P, facts), comm, params_P)
    return MEMBERS[section.plan](section, comm, params_P, facts)


def candidates(section: ExchangeSection, comm: Comm, device: torch.device) -> list[PlanName]:
    """The plans that can carry out the section on these ranks. A call of all ranks."""
    shared = comm.one_node() and device.type == "cpu"
    return [plan for plan in section.candidates if plan != "window" or shared]


def no_room(section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext) -> str:
    """Why plan window has no room on these ranks' nodes; empty if it has. A call of all ranks."""
    return comm.room(Window.shared_bytes(section, params_P, facts.states, comm.node() == comm.rank))


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
