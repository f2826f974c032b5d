"""Silo runners: how the silos of a rank train.

    for contribution in runner.run(rule, model, silos, begin): ...

A rule knows one silo. Whoever trains several at once (in one batch of models, on several streams) is a member here; it
may hold what `begin` gives and hands contributions out in memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch

from fedmpi.components import Family, component
from fedmpi.flat import FlatModel
from fedmpi.local.base import LocalRule, LocalSilo, Round
from fedmpi.types import Contribution

# Where a silo's training begins, [P], valid until the next silo is asked for; and what its rule may know of the round.
Begin = Callable[[LocalSilo], tuple[torch.Tensor, Round]]


class SiloRunner(Protocol):
    """How the silos of a rank train."""

    def run(
        self, rule: LocalRule, model: FlatModel, silos: Iterable[LocalSilo], begin: Begin
    ) -> Iterator[Contribution]:
        """What each silo contributes, in their order; valid until the next one is asked for. `begin` is called once for
        each, in this order, before it trains. Raises what the rule and `begin` raise."""
        ...


@component
class Sequential:
    """One after the other, in the rank's one model."""

    def run(
        self, rule: LocalRule, model: FlatModel, silos: Iterable[LocalSilo], begin: Begin
    ) -> Iterator[Contribution]:
        for silo in silos:
            params_P, round = begin(silo)
            model.thaw()
            yield rule.train(silo, model, params_P, round)


RUNNERS = Family("silo runner", {"sequential": Sequential}, SiloRunner)
