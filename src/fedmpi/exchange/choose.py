"""Which plan carries out a configuration, and the exchange that it makes."""

from __future__ import annotations

import torch

from fedmpi.comm import Comm
from fedmpi.exchange.base import Exchange, ExchangeContext
from fedmpi.exchange.config import ExchangeSection, PlanName
from fedmpi.exchange.dense import Replicated, Root
from fedmpi.exchange.overlap import Behind
from fedmpi.exchange.regions import Regional
from fedmpi.exchange.sharded import Sharded
from fedmpi.exchange.shared_memory import SharedMemory

MEMBERS: dict[PlanName, type[Exchange]] = {
    "root": Root,
    "replicated": Replicated,
    "sharded": Sharded,
    "window": SharedMemory,
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
    """Why shared memory has no room on these ranks' nodes; empty if it has. A call of all ranks."""
    return comm.room(SharedMemory.shared_bytes(section, params_P, facts.states, comm.node() == comm.rank))
