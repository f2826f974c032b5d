"""Silo runners: how a rank trains its silos.

    for contribution in runner.run(rule, model, silos, begin): ...

A rule trains one silo. A runner that trains several at once (as a batch of models, on several streams) would be a
member of this family, with its own memory for start parameters and contributions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch

from fedmpi.components import Family, component
from fedmpi.flat import FlatModel
from fedmpi.local.base import LocalRule, LocalSilo, Round
from fedmpi.types import Contribution

# Start parameters of a silo [P], valid until the next call, and what its rule knows of the round.
Begin = Callable[[LocalSilo], tuple[torch.Tensor, Round]]


class SiloRunner(Protocol):
    """Trains the silos of a rank."""

    def run(
        self, rule: LocalRule, model: FlatModel, silos: Iterable[LocalSilo], begin: Begin
    ) -> Iterator[Contribution]:
        """Yield each silo's contribution, in order; each is valid until the next. `begin` is called once per silo, in
        order, before it trains. Raises what the rule and `begin` raise."""
        ...


@component
class Sequential:
    """Trains one silo after the other, in the rank's only model."""

    def run(
        self, rule: LocalRule, model: FlatModel, silos: Iterable[LocalSilo], begin: Begin
    ) -> Iterator[Contribution]:
        for silo in silos:
            params_P, round = begin(silo)
            model.thaw()
            yield rule.train(silo, model, params_P, round)


RUNNERS = Family("silo runner", {"sequential": Sequential}, SiloRunner)
