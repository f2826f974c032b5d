"""Fragments: each round exchanges one part of the shared parameters, in turn, and so sends 1/F of the bytes.

Streaming DiLoCo's partial synchronization (Douillard et al. 2025, Streaming DiLoCo with overlapping communication,
arXiv 2501.18512, Algorithm 2), for any local rule and any server optimizer that steps by coordinates. Round t exchanges
part (t-1) mod F. For this part, silos send their distance from the global parameters since its last exchange, F rounds
of training ago; in the other parts they continue from their own parameters (progress.py). The server's optimizer steps
only this part, with only this part of its state.

Deviations from the paper:

- A part is a run of P/F elements of the flat vector, across tensor borders; the paper takes every F-th transformer
  block. So every round sends the same amount for any model; no step depends on which elements are together.
- Parts are exchanged at the ends of rounds: the paper's H, inner steps between two exchanges of a part, is F times a
  round's local steps.
- With `overlap` the paper's tau is one round. The paper mixes the arriving parameters with the silo's own by alpha;
here
  the silo replaces the update that it had sent by the server's step, and keeps its later progress.

Each part has its own plan and layout. So codecs cut and encode it by itself, feedback keeps its losses until its next
turn, its statistics are sent exactly beside it, and an aggregator that reads deltas decides for each part. In a
checkpoint the server's vectors are whole; state of silos and aggregators is stored by part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from fedmpi.comm import Comm
from fedmpi.errors import ConfigError, agreed
from fedmpi.exchange.base import Exchange, ExchangeContext, Lap
from fedmpi.exchange.cost import Cost, Sizes
from fedmpi.records.timer import Spent
from fedmpi.server import OnMean, Server
from fedmpi.state import Key, StateTensor, under, within
from fedmpi.types import Contribution

if TYPE_CHECKING:
    from fedmpi.exchange.config import ExchangeSection

WHOLE = "whole"  # first part of the keys of state that is concatenated over all parts


def parts(num_elements: int, num_parts: int) -> list[slice]:
    """Slices that cut a vector into parts whose lengths differ by at most 1. Raises ConfigError if some would be empty.

    >>> parts(10, 4)
    [slice(0, 2, None), slice(2, 5, None), slice(5, 7, None), slice(7, 10, None)]
    """
    if num_parts > num_elements:
        raise agreed(ConfigError(f"exchange.fragments: {num_parts}, but only {num_elements} parameters are shared"))
    cuts = [num_elements * number // num_parts for number in range(num_parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def turn(round: int, num_parts: int) -> int:
    """The number of the part that a round exchanges."""
    return (round - 1) % num_parts


class Parts(Exchange):
    """One plan per part; each round uses one of them. Contributions hold only that part, [S]; parameters and the
    server's state are whole.
    """

    @classmethod
    def cost(cls, section: ExchangeSection, sizes: Sizes) -> Cost:
        """The cost of a round with the longest part."""
        length = section.at_a_time(sizes.num_elements)
        traffic, memory = section.member.cost(section, replace(sizes, num_elements=length, num_stepped=length))
        return Cost(traffic, {name: section.fragments * num_bytes for name, num_bytes in memory.items()})

    def __init__(self, section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext) -> None:
        super().__init__(section, comm, params_P, facts)
        self.parts = parts(self.num_params, section.fragments)
        self._layouts = [self.layout.part(part) for part in self.parts]
        self._plans = [
            section.member(replace(section, verify=False), comm, params_P[part], facts._replace(layout=layout))
            for part, layout in zip(self.parts, self._layouts, strict=True)
        ]
        self.params_placement = self._plans[0].params_placement
        pairs = zip(self._plans, self.parts, strict=True)
        lengths = [len(plan.shard(torch.empty(part.stop - part.start, device="meta"))) for plan, part in pairs]
        ends = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
        self._kept = [slice(start, stop) for start, stop in pairwise(ends)]  # each part in this rank's shard
        self.holders["parts"] = _OfParts(self._plans, self._kept)

    # ------------------------------------------------------------ memory and state

    def shard(self, vector_P: torch.Tensor) -> torch.Tensor:
        return torch.cat([plan.shard(vector_P[part]) for plan, part in zip(self._plans, self.parts, strict=True)])

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return torch.cat([plan.gather(part[kept]) for plan, kept in zip(self._plans, self._kept, strict=True)])

    def scatter(self, whole_P: torch.Tensor | None, part: torch.Tensor) -> None:
        for plan, there, kept in zip(self._plans, self.parts, self._kept, strict=True):
            plan.scatter(None if whole_P is None else whole_P[there], part[kept])

    def home(self, params_P: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        return self._plans[0].home(params_P, state)  # every plan does this for vectors of any length

    def set_params(self, params_P: torch.Tensor, new_P: torch.Tensor | None) -> None:
        self._plans[0].set_params(params_P, new_P)

    # ------------------------------------------------------------ a round

    def begin(self, round: int = 0, num_contributions: int = 2, near: float = 1.0) -> None:
        super().begin(round, num_contributions, near)
        self._plans[turn(round, len(self._plans))].begin(round, num_contributions, near)

    def add(self, contribution: Contribution) -> None:
        self._plans[turn(self.round, len(self._plans))].add(contribution)

    def spent(self) -> Spent:
        inside = Spent.together(plan.spent() for plan in self._plans)
        return Spent(inside.encode, self.comm.transferred_s(), inside.decode)  # they share a communicator

    def meet(self, silos: Sequence[str]) -> None:
        self._plans[turn(self.round, len(self._plans))].meet(silos)

    def finish(
        self, params_P: torch.Tensor, server: Server, state: Any, lap: Lap = lambda phase: None
    ) -> tuple[torch.Tensor, Any]:
        number = turn(self.round, len(self._plans))
        part, kept, on_mean = self.parts[number], self._kept[number], None
        if server.on_mean is not None:
            on_mean = _moved(server.on_mean, part.start)
        there = replace(server, layout=self._layouts[number], on_mean=on_mean)
        of_part = type(state)(*(tensor[kept] for tensor in state))
        self._plans[number].finish(params_P[part], there, of_part, lap)  # changes both in place
        self.verify(params_P)
        return params_P, state


def _moved(on_mean: OnMean, by: int) -> OnMean:
    """`on_mean` for a part whose elements are counted from `by`."""
    return lambda mean_S, start: on_mean(mean_S, start + by)


class _OfParts:
    """The state of all parts' plans: sharded vectors concatenated, everything else by part."""

    def __init__(self, plans: Sequence[Exchange], kept: Sequence[slice]) -> None:
        self._plans, self._kept = plans, kept

    def state(self) -> Iterator[StateTensor]:
        """The state of all parts."""
        whole: dict[Key, list[torch.Tensor]] = {}
        for number, plan in enumerate(self._plans):
            for one in plan.holders.state():
                if one.placement == "sharded":
                    whole.setdefault(one.key, []).append(one.tensor)
                else:
                    yield one._replace(key=(str(number), *one.key))
        sharded = (StateTensor(key, torch.cat(tensors), "sharded") for key, tensors in whole.items())
        yield from under(WHOLE, sharded)

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Give each plan its part's state."""
        sharded = within(WHOLE, stored)
        for number, (plan, kept) in enumerate(zip(self._plans, self._kept, strict=True)):
            own = [one._replace(tensor=one.tensor[kept]) for one in sharded]
            plan.holders.restore([*own, *within(str(number), stored)])
