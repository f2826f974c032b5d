"""Regions: groups of ranks that aggregate inside first (a node, a site, a continent), level by level.

    level 0      the ranks of a region compute the mean of their silos' deltas; on a node, through shared memory
    level 1...   the first ranks of those regions do the same with the regions' means, and so on
    across       the first ranks of the outermost regions exchange their regions' deltas, with the section's own plan
                 and codecs and the server's step; then all ranks get the new parameters

A slow link is thus crossed once per region, not once per rank; n ranks in regions of m need log_m(n) levels. A region
passes on its mean and the sum of its weights, so with `every: 1` the result is the mean over all silos.

With `every: E` only each E-th round goes across: hierarchical federated averaging (Liu et al. 2020, Algorithm 1,
HierFAVG, with kappa_1 local steps and kappa_2 = E). In the rounds between, silos train from their region's parameters
and are evaluated on them. Deviation: a region's weight is the sum of its silos' weights over the E rounds. The paper
uses the region's number of samples, which is the same if all silos take part.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedmpi.comm import Comm
from fedmpi.errors import ConfigError, agreed
from fedmpi.exchange.base import PARAMS, Exchange, ExchangeContext, Lap
from fedmpi.exchange.config import ExchangeSection, Level
from fedmpi.exchange.cost import Cost, Sizes
from fedmpi.exchange.sharded import Sharded
from fedmpi.exchange.shared_memory import SharedMemory
from fedmpi.records.timer import Spent
from fedmpi.server import FedAvg, NoState, Server
from fedmpi.state import StateTensor, handed_over
from fedmpi.types import Contribution

log = logging.getLogger("fedmpi")

REGION, SINCE = ("region", "params"), ("region", "weight")  # in a checkpoint between two exchanges across


class Regional(Exchange):
    """One exchange in each region of each level, and one across."""

    @classmethod
    def cost(cls, section: ExchangeSection, sizes: Sizes) -> Cost:
        """The cost of a rank that leads a region. Bytes sent are those if each rank were its own region."""
        assert section.regions is not None
        num_levels = len(section.regions.levels)
        traffic, memory = section.member.cost(replace(section, regions=None), replace(sizes, hosted=1, vectors=()))
        return Cost(traffic, memory | {"regions": (1 + 3 + (num_levels > 2)) * sizes.vector_bytes})

    def __init__(self, section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext) -> None:
        super().__init__(section, comm, params_P, facts)
        assert section.regions is not None
        self.every = section.regions.every
        comm.collectively(lambda: _leads(comm, facts))
        table = _table(section.regions.levels, comm, facts)  # [ranks, levels]
        mine = table[comm.rank]
        # A rank without silos never leads: a region's feedback residual is stored under one of its leader's silos.
        idle = not facts.hosted
        region = comm.split(int(mine[-1]), idle)
        assert region is not None
        self._region = region
        self._inside: list[Exchange] = []  # one for each level that this rank takes part in
        there: Comm | None = comm
        for number, level in enumerate(section.regions.levels):
            if there is None:
                break
            group = there.split(int(mine[number]), idle)
            assert group is not None
            in_memory = number == 0 and _in_memory(level, comm, group, params_P)
            self._inside.append(_inside(level, group, params_P, facts, in_memory))
            there = there.split(0 if group.rank == 0 else -1, idle)
        self._depth = len(section.regions.levels)
        self._across: Exchange | None = None
        self._delta_P = self._start_P = self._mean_P = self._global_P = params_P[:0]
        if there is not None:
            outer = replace(section, regions=None, verify=False)  # `verify` compares the result later, on all ranks
            self._across = section.member(outer, there, params_P, facts)
            self._global_P = params_P.clone()
        if self._across is not None or len(self._inside) > 1:
            self._delta_P = torch.zeros_like(params_P)
        if len(self._inside) > 1:
            self._start_P = params_P.clone()  # where this rank's outermost region started the round
            self._mean_P = self._start_P if len(self._inside) == 2 else params_P.clone()
        self._lossy = section.lossy
        for number, exchange in enumerate(self._exchanges()):
            exchange.asks = False  # an error on a few ranks would leave the others waiting for them
            self.holders[f"level {number}"] = exchange.holders
        self._done = 0  # last round exchanged; a round that has begun may still be dropped
        self._weight = 0.0  # of this rank's silos this round
        self._since = 0.0  # of this rank's region since the last exchange across

    # ------------------------------------------------------------ memory and state

    def delta(self) -> torch.Tensor:
        return self._inside[0].delta()

    def shard(self, vector_P: torch.Tensor) -> torch.Tensor:
        return vector_P[:0] if self._across is None else self._across.shard(vector_P)

    def home(self, params_P: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        if len(self._start_P):
            self._start_P.copy_(params_P)
        if self._across is not None:
            self._global_P.copy_(params_P)
        return self._inside[0].home(params_P, NoState())[0], state

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return part if self._across is None else self._across.gather(part)

    def scatter(self, whole_P: torch.Tensor | None, part: torch.Tensor) -> None:
        if self._across is not None:
            self._across.scatter(whole_P, part)

    def set_params(self, params_P: torch.Tensor, new_P: torch.Tensor | None) -> None:
        assert new_P is not None
        if self._across is not None:
            self._global_P.copy_(new_P)
        self._begin_from(params_P, new_P)

    def _begin_from(self, params_P: torch.Tensor, from_P: torch.Tensor) -> None:
        if len(self._start_P):
            self._start_P.copy_(from_P)
        self._inside[0].set_params(params_P, from_P)

    def _exchanges(self) -> list[Exchange]:
        """The exchanges that this rank takes part in, innermost first."""
        return self._inside if self._across is None else [*self._inside, self._across]

    def spent(self) -> Spent:
        inside = Spent.together(exchange.spent() for exchange in self._exchanges())
        return Spent(inside.encode, self.comm.transferred_s(), inside.decode)

    def raise_failed(self) -> None:
        for exchange in self._exchanges():
            exchange.raise_failed()

    def state(self, params_P: torch.Tensor) -> Iterator[StateTensor]:
        """The parameters, each level's residuals and, between two exchanges across, this region's parameters and
        weight."""
        yield from super().state(params_P if self._across is None else self._global_P)
        if self._done % self.every and self._region.rank == 0 and self.facts.hosted:
            since = torch.tensor([self._since], dtype=torch.float64)
            for key, tensor in ((REGION, params_P), (SINCE, since)):
                yield StateTensor(key, tensor, "per_silo", self.facts.hosted[0])

    def restore(self, params_P: torch.Tensor, round: int, stored: Sequence[StateTensor]) -> None:
        here = [one for one in stored if one.key[0] in (PARAMS, *self.holders)]
        # A silo may have moved to a rank that leads no region. Its region's state then goes to a rank that leads
        # one; residuals add up.
        others = [one for one in stored if one.silo and one.key[0] not in (REGION[0], *self.holders)]
        super().restore(params_P, round, here + handed_over(others, self.comm))
        self._done = round
        if round % self.every == 0:
            return
        rows, weights = ([one.tensor for one in stored if one.key == key] for key in (REGION, SINCE))
        found = np.zeros(self._region.size)
        found[self._region.rank] = len(rows)
        found = self._region.share(found)
        self.comm.collectively(lambda: _one_row(found))
        owner = int(np.argmax(found))
        region_P = rows[0].clone() if rows else torch.zeros(self.num_params, dtype=self.dtype)
        since = weights[0].clone() if weights else torch.zeros(1, dtype=torch.float64)
        self._region.bcast(region_P, owner)
        self._region.bcast(since, owner)
        self._since = float(since)
        self._begin_from(params_P, region_P)

    # ------------------------------------------------------------ a round

    def begin(self, round: int = 0, num_contributions: int = 2, near: float = 1.0) -> None:
        super().begin(round, num_contributions, near)
        self._inside[0].begin(round, num_contributions, near)
        self._weight = 0.0

    def add(self, contribution: Contribution) -> None:
        self._weight += contribution.weight
        self._inside[0].add(contribution)

    def finish(
        self, params_P: torch.Tensor, server: Server, state: Any, lap: Lap = lambda phase: None
    ) -> tuple[torch.Tensor, Any]:
        weight, crosses = self._weight, self.round % self.every == 0
        result_P = params_P  # the newest result that this rank has
        for number, exchange in enumerate(self._inside):
            if number:
                exchange.begin(self.round, int(weight > 0))
                if weight > 0:
                    torch.sub(result_P, self._start_P, out=self._delta_P)
                    exchange.add(self._as_one(weight, self._delta_P))
                result_P = self._mean_P.copy_(self._start_P)
            weight = float(exchange.comm.gather_number(weight).sum())
            if weight > 0:
                exchange.finish(result_P, Server(FedAvg(), self.layout.as_delta()), NoState())
        self._since += weight
        lap("exchange")
        if crosses and self._across is not None:
            self._across.begin(self.round, int(self._since > 0))
            if self._since > 0:
                torch.sub(result_P, self._global_P, out=self._delta_P)
                self._across.add(self._as_one(self._since, self._delta_P))
            self._global_P, state = self._across.finish(self._global_P, server, state, lap)
            result_P = self._global_P
        if crosses:
            self._since = 0.0
        for number in reversed(range(len(self._inside))):
            if crosses or number < self._depth - 1:
                inner = result_P if number else params_P
                self._give(self._inside[number], inner, result_P)
                result_P = inner
        if len(self._start_P):
            self._start_P.copy_(params_P)
        if self._lossy:
            self.ask()
        if crosses:
            self.verify(params_P)
        self._done = self.round
        lap("exchange")
        return params_P, state

    def _as_one(self, weight: float, delta_P: torch.Tensor) -> Contribution:
        """A region's mean, as a contribution to the level above."""
        first = self.facts.hosted[0] if self.facts.hosted else ""
        return Contribution(first, self.round, weight, delta_P, 0.0, 1, 1)

    def _give(self, exchange: Exchange, target_P: torch.Tensor, result_P: torch.Tensor) -> None:
        """Copy the result of a region's first rank to all its ranks."""
        if exchange.comm.rank == 0 and target_P is not result_P:
            target_P.copy_(result_P)
        if exchange.in_shared_memory:
            exchange.comm.barrier()
        else:
            exchange.comm.bcast(target_P)


def _in_memory(level: Level, comm: Comm, group: Comm, params_P: torch.Tensor) -> bool:
    """Whether the innermost regions can exchange through shared memory: it is there, and values are sent without a
    codec.

    Collective over `comm`; `group` is this rank's region.
    """
    able = level.up.plain and level.down.plain and group.one_node() and params_P.device.type == "cpu"
    needed = (
        SharedMemory.shared_bytes(ExchangeSection(plan="shared_memory"), params_P, 0, group.rank == 0) if able else 0
    )
    if full := comm.room(needed):
        if comm.rank == 0:
            log.warning("exchange.regions: cannot use shared memory: %s", full)
        return False
    return able


def _inside(level: Level, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext, in_memory: bool) -> Exchange:
    """The exchange of one region."""
    if in_memory:
        return SharedMemory(ExchangeSection(plan="shared_memory"), comm, params_P, facts)
    return Sharded(ExchangeSection(plan="sharded", up=level.up, down=level.down), comm, params_P, facts)


def _leads(comm: Comm, facts: ExchangeContext) -> None:
    if comm.rank == 0 and not facts.hosted:
        raise ConfigError("exchange.regions: rank 0 leads its region, so it has to host a silo")


def _one_row(found: np.ndarray) -> None:
    if found.sum() != 1:
        raise ConfigError(
            "exchange.regions: the checkpoint lies between two exchanges across regions, and this run has others; "
            "resume on ranks and hosts that give the same regions"
        )


def _table(levels: Sequence[Level], comm: Comm, facts: ExchangeContext) -> np.ndarray:
    """The region of every rank on every level, [ranks, levels]. Raises ConfigError unless regions are nested.
    Collective."""
    node = comm.node()
    mine = comm.collectively(lambda: [node if lv.by == "node" else _of_rank(lv.by, comm, facts) for lv in levels])
    table = np.zeros((comm.size, len(levels)))
    table[comm.rank] = mine
    table = comm.share(table.reshape(-1)).reshape(table.shape).astype(np.int64)
    for number in range(1, len(levels)):
        for region in np.unique(table[:, number - 1]):
            if len(np.unique(table[table[:, number - 1] == region, number])) > 1:
                raise agreed(
                    ConfigError(
                        f"exchange.regions.levels.{number}: divides a region of the level before it; list levels "
                        "from the inside out"
                    )
                )
    return table


def _of_rank(by: Mapping[str, Sequence[str]], comm: Comm, facts: ExchangeContext) -> int:
    """The number of the region of this rank's host or silos."""
    host = comm.hosts[comm.rank]
    names = {host, host.partition(".")[0], *facts.hosted}
    known = {member for members in by.values() for member in members}
    if unknown := known - set(facts.ids) - {h for full in comm.hosts for h in (full, full.partition(".")[0])}:
        hosts = ", ".join(sorted(set(comm.hosts)))
        raise ConfigError(
            f"exchange.regions: '{min(unknown)}' is no silo and no host of this run: ranks are on {hosts}"
        )
    found = [number for number, members in enumerate(by.values()) if names.intersection(members)]
    if len(found) > 1:
        regions = " and ".join(list(by)[n] for n in found)
        raise ConfigError(f"exchange.regions: rank {comm.rank} on {host} belongs to {regions}; place its silos apart")
    if not found:
        raise ConfigError(f"exchange.regions: rank {comm.rank} on {host} belongs to no region; name its host or silos")
    return found[0]
