"""Attacks: simulate hostile silos, for experiments with robust aggregation. An attack must be enabled twice:

    attack: {name: alie, count: 5}  # the last five silos of the federation; or silos: [a, b]
    experimental: true              # without it a configuration with an attack is refused

An attack changes one of three things; it overrides the method of that name:

    on_data    the data a hostile silo trains on: label_flip
    on_delta   what it sends, computed from its own delta: sign_flip, noise
    on_honest  what it sends, computed from the honest silos' deltas: alie, ipm, mimic (`omniscient`)

In a real federation silos do not see each other's deltas. An omniscient attack therefore runs where all deltas meet
slice by slice, at the rank that owns the slice (plan sharded, scope silo), and replaces the hostile rows there. Until
then hostile silos train like the others, and the norms and losses in records come from that training. All hostile silos
then send the same, and each keeps its weight.

Shapes in names: `P` parameters, `K` silos whose deltas arrived, `H` honest ones among them, `S` a slice of the
coordinates.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import pydantic
import torch

from fedmpi import rng
from fedmpi.components import Family, PositiveFloat, PositiveInt, called, component, did_you_mean
from fedmpi.errors import ConfigError
from fedmpi.local import RULES, LocalRule
from fedmpi.types import Contribution, SiloData, Source

if TYPE_CHECKING:
    from fedmpi.config import Config
    from fedmpi.flat import FlatModel
    from fedmpi.local import LocalSilo, Round


@component
class Attack:
    """Which silos are hostile; subclasses define what they do."""

    omniscient: ClassVar[bool] = False  # whether it reads the honest silos' deltas
    tasks: ClassVar[Collection[str]] = ()  # tasks it is defined for; empty: all

    silos: list[str] | None = None
    """ids of the hostile silos; or give `count`"""
    count: PositiveInt | None = None
    """number of hostile silos: the last ones of the federation"""
    local: Annotated[LocalRule, RULES] | None = None
    """local rule of hostile silos; null: the same as the others"""

    @pydantic.model_validator(mode="after")
    def _one_of_both(self) -> Attack:
        if (self.silos is None) == (self.count is None):
            raise ValueError("give either 'silos' or 'count'")
        return self

    def conflicts(self, config: Config) -> str | None:
        """Why the rest of the configuration is incompatible, in one line; None if it is compatible."""
        why = self._conflicts(config)
        return why and f"attack: {called(self)} {why}"

    def _conflicts(self, config: Config) -> str | None:
        exchange = config.exchange
        if not config.experimental:
            return "makes silos hostile, for experiments only; set experimental: true"
        own, others = (rule.auxiliaries for rule in (self.local or config.local, config.local))
        if own != others:
            return "has a local rule that sends other vectors than the honest silos' rule"
        if not self.omniscient:
            return None
        if self.local is not None:
            return "sends nothing of what hostile silos train; remove attack.local"
        if not exchange.one_by_one or exchange.regions is not None:
            return "reads what honest silos send; it needs exchange: {plan: sharded, scope: silo} and no regions"
        if not exchange.up.plain:
            return "reads what honest silos send, of which a codec sends parts another way; remove exchange.up.codec"
        if config.local.auxiliaries:
            return "reads what honest silos send, and is defined for deltas alone; take a rule that sends nothing else"
        return None

    def hostile(self, ids: Sequence[str]) -> frozenset[str]:
        """The hostile silos among `ids`. Raises ConfigError for an unknown id, and if no or all silos are hostile."""
        chosen = frozenset(ids[len(ids) - min(self.count, len(ids)) :] if self.count else self.silos or ())
        if unknown := sorted(chosen - set(ids)):
            raise ConfigError(f"attack.silos: no silo '{unknown[0]}'{did_you_mean(unknown[0], ids)}")
        if not 0 < len(chosen) < len(ids):
            raise ConfigError(f"attack: {len(chosen)} of {len(ids)} silos are hostile; at least one, and not all")
        return chosen

    def on_data(self, data: SiloData, num_classes: int) -> SiloData:
        """Returns the data that a hostile silo trains on."""
        return data

    def on_delta(self, delta_P: torch.Tensor, key: int) -> None:
        """Overwrites a hostile silo's delta [P] in place; `key` is the random key of this silo and round."""

    def on_honest(self, deltas_HS: torch.Tensor, silos_H: Sequence[str], num_hostile: int) -> torch.Tensor:
        """What every hostile silo sends [S], from the honest silos' deltas [H, S]."""
        raise NotImplementedError


@component
class SignFlip(Attack):
    """Sends -scale * delta (Li et al. 2019, RSA: Byzantine-Robust Stochastic Aggregation Methods, sign-flipping attack
    with sigma = -4; scale 1 is the bit flip of Karimireddy et al. 2022)."""

    scale: PositiveFloat = 1.0
    """factor of the flipped delta"""

    def on_delta(self, delta_P: torch.Tensor, key: int) -> None:
        delta_P.mul_(-self.scale)


@component
class LabelFlip(Attack):
    """Trains on labels C - 1 - y instead of y (Karimireddy et al. 2022, Byzantine-Robust Learning on Heterogeneous
    Datasets via Bucketing, experiments on MNIST: 9 - y; Tolpegin et al. 2020 flip one class into another).

    In that benchmark, hostile silos hold samples of all labels (partition `sorted` with `mixed`) and send gradients
    without momentum (`local`), as in its bit flip.
    """

    tasks: ClassVar[Collection[str]] = ("classification", "binary")

    def on_data(self, data: SiloData, num_classes: int) -> SiloData:
        y = data.y_train
        flipped = max(num_classes, 2) - 1 - y
        return data._replace(y_train=torch.where(y >= 0, flipped, y))  # negative labels, which mean none, stay


@component
class Noise(Attack):
    """Sends Gaussian noise instead of the delta, keyed by seed, round and silo (Blanchard et al. 2017, Machine Learning
    with Adversaries, experiments: mean 0, isotropic, standard deviation 200)."""

    sigma: PositiveFloat
    """standard deviation of every coordinate, in units of the delta"""

    def on_delta(self, delta_P: torch.Tensor, key: int) -> None:
        drawn_P = torch.randn(len(delta_P), generator=torch.Generator().manual_seed(key >> 1))
        delta_P.copy_(drawn_P.mul_(self.sigma))  # drawn on the CPU, so that every device sends the same


@component
class Alie(Attack):
    """A Little Is Enough: sends mean - z * std of the honest deltas, per coordinate (Baruch et al. 2019, Algorithm 3),
    a shift small enough to hide among them.

    With n silos, m of them hostile: Phi(z_max) = (n - m - s) / (n - m), where s = floor(n/2 + 1) - m honest silos
    further from the mean give the hostile ones a majority. std divides by n - m - 1. Deviations: n and m are those of
    the round; the quantile is kept half a silo away from 0 and 1.

    >>> round(Alie.z_max(25, 5), 4)
    0.2533
    """

    omniscient: ClassVar[bool] = True

    z: PositiveFloat | None = None
    """standard deviations from the mean; null: z_max"""

    @staticmethod
    def z_max(num_silos: int, num_hostile: int) -> float:
        """z_max of the paper, from the numbers of all silos and of hostile ones."""
        num_honest = num_silos - num_hostile
        supporters = num_silos // 2 + 1 - num_hostile
        quantile = (num_honest - supporters) / num_honest
        least = 0.5 / num_honest
        return statistics.NormalDist().inv_cdf(min(max(quantile, least), 1 - least))

    def on_honest(self, deltas_HS: torch.Tensor, silos_H: Sequence[str], num_hostile: int) -> torch.Tensor:
        num_honest = len(deltas_HS)
        z = self.z_max(num_honest + num_hostile, num_hostile) if self.z is None else self.z
        std_S, mean_S = torch.std_mean(deltas_HS, dim=0, correction=min(1, num_honest - 1))
        return mean_S - z * std_S


@component
class Ipm(Attack):
    """Inner product manipulation: -epsilon * mean of the honest deltas (Xie et al. 2020, Fall of Empires: Breaking
    Byzantine-Tolerant SGD by Inner Product Manipulation).

    A small epsilon stays near the honest deltas (fools Krum); one above (n - m) / m reverses the mean.
    """

    omniscient: ClassVar[bool] = True

    epsilon: PositiveFloat = 0.1
    """length of the sent delta, in units of the honest mean"""

    def on_honest(self, deltas_HS: torch.Tensor, silos_H: Sequence[str], num_hostile: int) -> torch.Tensor:
        return deltas_HS.mean(dim=0).mul_(-self.epsilon)


@component
class Mimic(Attack):
    """Every hostile silo copies one honest silo, which then gets too much weight if silos differ (Karimireddy et al.
    2022, Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing, mimic attack).

    Deviation: the paper finds the target in a warm-up, along the direction in which honest deltas vary most; here the
    target is given. If it does not answer in a round, the first honest silo that does is copied.
    """

    omniscient: ClassVar[bool] = True

    target: str | None = None
    """id of the honest silo that is copied; null: the first of the federation"""

    def hostile(self, ids: Sequence[str]) -> frozenset[str]:
        chosen = super().hostile(ids)
        if self.target is not None and self.target not in ids:
            raise ConfigError(f"attack.target: no silo '{self.target}'{did_you_mean(self.target, ids)}")
        if self.target in chosen:
            raise ConfigError(f"attack.target: '{self.target}' is hostile itself")
        return chosen

    def on_honest(self, deltas_HS: torch.Tensor, silos_H: Sequence[str], num_hostile: int) -> torch.Tensor:
        return deltas_HS[silos_H.index(self.target) if self.target in silos_H else 0]


ATTACKS = Family(
    "attack",
    {"sign_flip": SignFlip, "label_flip": LabelFlip, "noise": Noise, "alie": Alie, "ipm": Ipm, "mimic": Mimic},
    Attack,
)


# ---------------------------------------------------------------- applying an attack


def poisoned(source: Source, attack: Attack) -> Source:
    """The dataset with hostile silos' data attacked. Raises ConfigError if the attack is not defined for its task."""
    hostile = attack.hostile([silo.id for silo in source.silos])
    if attack.tasks and source.task not in attack.tasks:
        raise ConfigError(f"attack: {ATTACKS.name_of(attack)} is for {' and '.join(attack.tasks)}, not {source.task}")

    def open_silo(silo: str) -> SiloData:
        data = source.open(silo)
        return attack.on_data(data, source.num_classes) if silo in hostile else data

    return replace(source, open=open_silo)


def said(attack: Attack, ids: Sequence[str]) -> str:
    """One line that names the attack and its silos, for records and the log."""
    hostile = attack.hostile(ids)
    return f"attack {ATTACKS.name_of(attack)} by {', '.join(silo for silo in ids if silo in hostile)}"


class HostileRule:
    """A local rule whose hostile silos send something else; every other attribute is the wrapped rule's.

    `__getattr__` passes attributes through, because a user's rule may declare more than `LocalRule` has.
    """

    def __init__(self, rule: LocalRule, attack: Attack, ids: Sequence[str]) -> None:
        self._rule, self._attack, self._hostile = rule, attack, attack.hostile(ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        """The rule's contribution; a hostile silo's delta is attacked, its auxiliary vectors are not."""
        if silo.id not in self._hostile:
            return self._rule.train(silo, model, params_P, round)
        contribution = (self._attack.local or self._rule).train(silo, model, params_P, round)
        key = rng.key(round.seed, purpose="attack", round=round.draw, silo=silo.id)
        self._attack.on_delta(contribution["delta"], key)
        return contribution


Edit = Callable[[torch.Tensor, Sequence[str]], None]


def edit_of(attack: Attack, ids: Sequence[str]) -> Edit:
    """Returns the function that applies an omniscient attack to rows [K, S] of any slice, in place, given their silos.

    Rows stay unchanged if no honest or no hostile silo answered.
    """
    hostile = attack.hostile(ids)

    def edit(rows_KS: torch.Tensor, silos_K: Sequence[str]) -> None:
        honest = [k for k, silo in enumerate(silos_K) if silo not in hostile]
        others = [k for k, silo in enumerate(silos_K) if silo in hostile]
        if honest and others:
            rows_KS[others] = attack.on_honest(rows_KS[honest], [silos_K[k] for k in honest], len(others))

    return edit
