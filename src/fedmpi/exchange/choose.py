"""Chooses the plan for a configuration, and builds its exchange.

    plan: NAME      this plan, if it can
    plan: auto      by rule, from the placement of ranks and the length of vectors: the first plan that suits and can
                    carry out the section; the same on every start with the same placement
    plan: measure   the fastest of those that can

A resumed run keeps its first plan if possible, because another one rounds differently.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from fedmpi.comm import Comm
from fedmpi.errors import ConfigError, agreed
from fedmpi.exchange.arrivals import Arrivals
from fedmpi.exchange.autotune import measure
from fedmpi.exchange.base import Exchange, ExchangeContext, Machine
from fedmpi.exchange.config import ExchangeSection
from fedmpi.exchange.cost import Cost, Sizes, Traffic
from fedmpi.exchange.dense import Root
from fedmpi.exchange.plans import FORMERLY, MEASURE, PLANS
from fedmpi.exchange.progress import Progress
from fedmpi.exchange.regions import Regional

UNMASKED = "does not sum under masks"  # why a plan cannot serve `secure`
BY_ARRIVAL = "updates go to rank 0 as they arrive"  # why, under engine: buffered

log = logging.getLogger("fedmpi")


@dataclass(frozen=True)
class Choice:
    """The exchange section with its plan filled in."""

    section: ExchangeSection
    why: str = ""  # the reason for the plan; empty if the configuration names it
    seconds: Mapping[str, float] = field(default_factory=dict)  # by plan, if they were measured


def by_arrival(section: ExchangeSection) -> ExchangeSection:
    """The section of an engine whose updates go to rank 0 one by one. Its plan is called root, unless the rest of the
    section is what only they can carry out."""
    return section if Root.supports(section, Machine()) else replace(section, plan="root")


def make(section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext) -> Exchange:
    """The exchange for a section whose plan is named. Collective."""
    if facts.arrivals:
        return Arrivals(section, comm, params_P, facts)
    if section.regions is not None:
        return Regional(section, comm, params_P, facts)
    if section.goes_on:
        return Progress(section, comm, params_P, facts)
    return section.member(section, comm, params_P, facts)


def cost(section: ExchangeSection, sizes: Sizes) -> Cost:
    """The bytes that a round of `make`'s exchange sends, and the memory that it keeps.

    >>> cost(ExchangeSection(plan="root"), Sizes(1000, 4, 4)).traffic
    Traffic(up=12072, down=12000, control=0, collectives='Reduce + Bcast')
    """
    if sizes.arrivals:  # whatever the section's plan is called
        plan: type[Exchange] = Arrivals
    else:
        plan = Regional if section.regions is not None else Progress if section.goes_on else section.member
    found = plan.cost(section, sizes)
    return found if sizes.num_ranks > 1 else found._replace(traffic=Traffic(0, 0, 0, "none"))


def by_rule(machine: Machine, num_elements: int, refuses: Callable[[str], str]) -> tuple[str, str]:
    """The plan that `auto` chooses for vectors of `num_elements`, and the reason.

    `refuses` returns why a plan cannot carry out the rest of the section. If a plan that suits better refuses, the
    reason is its refusal. Raises ConfigError if no plan remains.
    """
    passed_over = ""
    for name, plan in PLANS.members.items():
        if suits := plan.suits(machine, num_elements):
            if not (refused := refuses(name)):
                return name, passed_over or suits
            passed_over = passed_over or f"{name} {refused}"
    raise ConfigError(f"exchange.plan: auto finds no plan, because {passed_over}; name a plan")


def no_room(
    plan: type[Exchange], section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext
) -> str:
    """Why the plan does not fit into the shared memory of these ranks' nodes; empty if it does. Collective."""
    if not plan.in_shared_memory:
        return ""
    return comm.room(plan.shared_bytes(section, params_P, facts.states, comm.node() == comm.rank))


def choose(
    section: ExchangeSection,
    comm: Comm,
    params_P: torch.Tensor,
    facts: ExchangeContext,
    plan_before: Callable[[], str] = str,
) -> Choice:
    """The chosen plan. `plan_before` is called on rank 0 and returns the plan of the run's start, or "".

    Collective. Raises ConfigError on every rank if the named plan cannot carry out the section.
    """
    if facts.arrivals:
        return Choice(by_arrival(section), BY_ARRIVAL)
    machine = Machine.of(comm, params_P.device)

    def refuses(name: str) -> str:
        plan = PLANS.find(name)
        if facts.secure is not None and not plan.masks_itself():
            return UNMASKED
        if why := plan.supports(section, machine):
            return why
        full = no_room(plan, section, comm, params_P, facts)
        if full and section.chosen and comm.rank == 0:
            log.warning("exchange.plan: %s skips %s: %s", section.plan, name, full)
        return f"has no room: {full}" if full else ""

    if not section.chosen:
        if why := refuses(section.plan):
            able = [name for name in PLANS.members if name != section.plan and not refuses(name)]
            raise agreed(ConfigError(f"exchange.plan: {section.plan} {why}; take {', '.join(able)} or auto"))
        return Choice(section)
    before = comm.broadcast_text(comm.collectively(lambda: plan_before() if comm.rank == 0 else ""), 0)
    before = FORMERLY.get(before, before)
    why_not = ""
    if before:
        comm.collectively(lambda: PLANS.find(before))
        if not (why_not := refuses(before)):
            return Choice(replace(section, plan=before), "as when the run started")
    if section.plan == MEASURE and section.regions is None:
        choice = _measured(section, comm, params_P, facts, [name for name in PLANS.members if not refuses(name)])
    else:
        name, why = by_rule(machine, section.at_a_time(len(params_P)), refuses)
        choice = Choice(replace(section, plan=name), why)
    if before and comm.rank == 0:
        now = choice.section.plan
        log.warning("exchange.plan: the run continues with %s; it started with %s, which %s", now, before, why_not)
    return choice


def _measured(
    section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext, able: Sequence[str]
) -> Choice:
    """The fastest of the `able` plans."""
    alone = replace(section, overlap=False, verify=False)
    makes = {name: partial(make, replace(alone, plan=name), comm, params_P, facts) for name in able}
    seconds = measure(makes, comm, params_P, facts) if len(able) > 1 else {}
    told = ", ".join(f"{plan} {1e3 * seconds[plan]:.2f} ms" for plan in seconds)
    fastest = min(able, key=lambda plan: seconds.get(plan, 0.0))
    return Choice(replace(section, plan=fastest), f"measured: {told}" if told else "the only one that can", seconds)
