"""Settings of local training that single silos have for themselves.

    silos: {clinic-3: {local.lr: 0.01, local.batch_size: 8}}

They follow from the silo's id alone, so they move with the silo and training has the same bits on any number of ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from fedmpi.components import build, called, did_you_mean, hints
from fedmpi.errors import ConfigError
from fedmpi.flat import FlatModel
from fedmpi.local import workload
from fedmpi.local.base import GradientRule, LocalRule, LocalSilo, Round
from fedmpi.local.control_variates import Scaffold
from fedmpi.local.gradient import FedSgd
from fedmpi.types import Contribution

if TYPE_CHECKING:
    from fedmpi.config import Config

KEYS = ("lr", "epochs", "steps", "batch_size", "last_batch", "clip")  # of local, that may differ between silos

Settings = Mapping[str, Mapping[str, Any]]


def rules_of(rule: LocalRule, silos: Settings) -> dict[str, LocalRule]:
    """The local rule of each silo with settings of its own. Raises ConfigError for a key that is not allowed."""
    return {silo: _changed(rule, settings, f"silos.{silo}") for silo, settings in silos.items()}


def combined(rule: LocalRule, silos: Settings) -> LocalRule:
    """The rule, with the settings of single silos."""
    return cast(LocalRule, BySilo(rule, rules_of(rule, silos))) if silos else rule


def conflicts(config: Config) -> str | None:
    """Why silos may not have these settings of their own, in one line; None if they may. Raises ConfigError."""
    rule, rules = config.local, rules_of(config.local, config.silos)
    if config.privacy is not None and config.privacy.of_records:
        return "silos: with privacy: record the account needs the same local settings for all silos"
    if config.aggregate.normalises and any(_lr(own) != _lr(rule) for own in rules.values()):
        return (
            f"silos: aggregate: {called(config.aggregate)} divides deltas by their numbers of gradients, so a silo "
            "with a larger local.lr would weigh more; give all the same"
        )
    if config.aggregate.start_loss and any(_lr(own) != _lr(rule) for own in rules.values()):
        return (
            f"silos: aggregate: {called(config.aggregate)} divides deltas by one learning rate; give all silos the same"
        )
    if isinstance(rule, Scaffold) and rule.variant == "benchmark":
        return "silos: scaffold's variant benchmark needs silos that take equal steps; take variant: paper"
    amount = rule.amount if isinstance(rule, GradientRule) else None
    own_work = [silo for silo, own in rules.items() if _work(own) != _work(rule)]
    if isinstance(amount, workload.BySilo) and (both := sorted({*own_work} & {*amount.silos})):
        return f"silos: '{both[0]}' is in local.amount.silos too; give its epochs or steps in one place"
    if rule.by_delay is not None and own_work:
        return (
            f"silos: '{own_work[0]}' has epochs or steps of its own, and local.amount: by_delay counts those of all "
            "silos against the same number; leave them out"
        )
    return None


def _lr(rule: LocalRule) -> float | None:
    return rule.lr if isinstance(rule, (GradientRule, FedSgd)) else None


def _work(rule: LocalRule) -> tuple[int | None, int | None] | None:
    return (rule.epochs, rule.steps) if isinstance(rule, GradientRule) else None


def _changed(rule: LocalRule, settings: Mapping[str, Any], path: str) -> LocalRule:
    name = called(rule)
    if not dataclasses.is_dataclass(rule) or isinstance(rule, type):
        raise ConfigError(f"{path}: local: {name} is no dataclass, so its fields cannot differ between silos")
    fields = hints(type(rule))
    known = [f"local.{key}" for key in KEYS if key in fields]
    changes: dict[str, Any] = {}
    for key, value in settings.items():
        inner = value if key == "local" and isinstance(value, Mapping) else {key.removeprefix("local."): value}
        for field, given in inner.items():
            if (key != "local" and not key.startswith("local.")) or f"local.{field}" not in known:
                whole = key if key != "local" else f"local.{field}"
                raise ConfigError(f"{path}: '{whole}' cannot differ between silos{did_you_mean(whole, known)}")
            changes[field] = given
    if not changes:
        raise ConfigError(f"{path}: expected keys and values, such as local.lr: 0.01")
    for one, other in (("epochs", "steps"), ("steps", "epochs")):
        if changes.get(one) is not None and other in fields:
            changes.setdefault(other, None)
    values = {field: getattr(rule, field) for field in fields} | changes
    made: LocalRule = build(type(rule), values, f"{path}.local", f"local rule '{name}'")
    return made


class BySilo:
    """A local rule that trains some silos by rules of their own; every other attribute is the common rule's.

    `__getattr__` passes attributes through, because a user's rule may declare more than `LocalRule` has.
    """

    def __init__(self, rule: LocalRule, rules: Mapping[str, LocalRule]) -> None:
        self._rule, self._rules = rule, dict(rules)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._rule, name)

    def of(self, silo: str) -> LocalRule:
        """The silo's rule."""
        return self._rules.get(silo, self._rule)

    def personal(self, silo: LocalSilo, params_P: torch.Tensor) -> torch.Tensor | None:
        """See LocalRule."""
        return self.of(silo.id).personal(silo, params_P)

    def smallest_batch(self, silo: str, num_samples: int, rounds: int) -> int | None:
        """See LocalRule."""
        return self.of(silo).smallest_batch(silo, num_samples, rounds)

    def num_steps(
        self, silo: LocalSilo, number: int, rounds: int, seed: int, order: workload.Order | None = None
    ) -> int:
        """See LocalRule."""
        about = (silo, number, rounds, seed)
        return self.of(silo.id).num_steps(*about) if order is None else self.of(silo.id).num_steps(*about, order)

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        """See LocalRule."""
        return self.of(silo.id).train(silo, model, params_P, round)
