"""Which plan carries out a configuration, and the exchange that it makes.

    plan: NAME      that one, where it can
    plan: auto      by rule, from where ranks are and how long vectors are: the first plan that suits, of those that can
                    carry out the section. The same on every start with the same placement
    plan: measure   the fastest of those that can

A run that goes on keeps the plan that it was begun with, where it can: another one rounds otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from fedmpi.comm import Comm
from fedmpi.errors import ConfigError, agreed
from fedmpi.exchange.autotune import measure
from fedmpi.exchange.base import Exchange, ExchangeContext, Machine
from fedmpi.exchange.config import ExchangeSection
from fedmpi.exchange.cost import Cost, Sizes, Traffic
from fedmpi.exchange.plans import FORMERLY, MEASURE, PLANS
from fedmpi.exchange.progress import Progress
from fedmpi.exchange.regions import Regional

log = logging.getLogger("fedmpi")


@dataclass(frozen=True)
class Choice:
    """The exchange with its plan named."""

    section: ExchangeSection
    why: str = ""  # it is this plan; empty where the configuration names it
    seconds: Mapping[str, float] = field(default_factory=dict)  # of each plan, where they were measured


def make(section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext) -> Exchange:
    """The exchange of a plan that is named. A call of all ranks."""
    if section.regions is not None:
        return Regional(section, comm, params_P, facts)
    if section.goes_on:
        return Progress(section, comm, params_P, facts)
    return section.member(section, comm, params_P, facts)


def cost(section: ExchangeSection, sizes: Sizes) -> Cost:
    """What a round of the exchange that `make` gives sends, and what it keeps in memory.

    >>> cost(ExchangeSection(plan="root"), Sizes(1000, 4, 4)).traffic
    Traffic(up=12072, down=12000, control=0, collectives='Reduce + Bcast')
    """
    plan = Regional if section.regions is not None else Progress if section.goes_on else section.member
    found = plan.cost(section, sizes)
    return found if sizes.num_ranks > 1 else found._replace(traffic=Traffic(0, 0, 0, "none"))


def by_rule(machine: Machine, num_elements: int, refuses: Callable[[str], str]) -> tuple[str, str]:
    """The plan that `auto` takes for vectors so long, and why. `refuses` says why a plan cannot carry out the rest of
    the section; the reason is then that of the plan that would have suited better."""
    passed_over = ""
    for name, plan in PLANS.members.items():
        if suits := plan.suits(machine, num_elements):
            if not (refused := refuses(name)):
                return name, passed_over or suits
            passed_over = passed_over or f"{name} {refused}"
    raise ConfigError(f"exchange.plan: auto finds none, since {passed_over}; name one")


def no_room(
    plan: type[Exchange], section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext
) -> str:
    """Why shared memory has no room for the plan on these ranks' nodes; empty if it has. A call of all ranks."""
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
    """The plan. `plan_before` is rank 0's: the one that the run was begun with, or nothing. A call of all ranks; raises
    ConfigError, alike on every one, where a plan that is named cannot carry out the section."""
    machine = Machine.of(comm, params_P.device)

    def refuses(name: str) -> str:
        plan = PLANS.find(name)
        if why := plan.supports(section, machine):
            return why
        full = no_room(plan, section, comm, params_P, facts)
        if full and section.chosen and comm.rank == 0:
            log.warning("exchange.plan: %s leaves out %s: %s", section.plan, name, full)
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
            return Choice(replace(section, plan=before), "as the run was begun")
    if section.plan == MEASURE and section.regions is None:
        choice = _measured(section, comm, params_P, facts, [name for name in PLANS.members if not refuses(name)])
    else:
        name, why = by_rule(machine, section.at_a_time(len(params_P)), refuses)
        choice = Choice(replace(section, plan=name), why)
    if before and comm.rank == 0:
        now = choice.section.plan
        log.warning("exchange.plan: the run goes on with %s; it was begun with %s, which %s", now, before, why_not)
    return choice


def _measured(
    section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext, able: Sequence[str]
) -> Choice:
    """The fastest."""
    alone = replace(section, overlap=False, verify=False)
    makes = {name: partial(make, replace(alone, plan=name), comm, params_P, facts) for name in able}
    seconds = measure(makes, comm, params_P, facts) if len(able) > 1 else {}
    told = ", ".join(f"{plan} {1e3 * seconds[plan]:.2f} ms" for plan in seconds)
    fastest = min(able, key=lambda plan: seconds.get(plan, 0.0))
    return Choice(replace(section, plan=fastest), f"measured: {told}" if told else "the only one that can", seconds)
