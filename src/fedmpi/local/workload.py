"""How many of its rule's `epochs` or `steps` a silo takes in a round.

When silos take different numbers of steps, the plain mean is biased towards those that take more (Wang et al. 2020,
section 3); `aggregate: fednova` divides each delta by its number of steps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import pydantic

from fedmpi import rng
from fedmpi.components import Family, NonNegativeFloat, PositiveFloat, PositiveFraction, PositiveInt, component
from fedmpi.flat import RESERVED

if TYPE_CHECKING:
    from fedmpi.config import Config
    from fedmpi.local.base import LocalSilo, Round

LOSS = f"{RESERVED}train_loss"  # key of the last round's mean training loss in a silo's kept state


class Delay(NamedTuple):
    """What was measured of a silo's trainings, as means."""

    wait_s: float  # from when its work was handed out until its update arrived, without the training
    unit_s: float  # of an epoch or step of the training


class Order(NamedTuple):
    """What a silo is told of its next training."""

    amount: int  # epochs or steps
    scale: float = 1.0  # factor of its learning rate
    share: float = 1.0  # `amount` as a share of the rule's own number
    latest_s: float = math.inf  # an update that arrives later after its work was handed out does not count


class Amount:
    """How many epochs or steps a silo takes in a round."""

    @property
    def follows_delays(self) -> bool:
        """Whether the engine measures every silo's delays, and gives each training an order (`orders`)."""
        return False

    def mean(self, before: Delay | None, measured: Delay) -> Delay:
        """The means after one more measurement; `before` is None for the first one."""
        raise NotImplementedError

    def orders(self, most: int, delays: Mapping[str, Delay | None]) -> dict[str, Order]:
        """What each silo is told of a training that begins now, from the means of those that train; None for a silo of
        which nothing was measured. The same on every rank."""
        raise NotImplementedError

    def scale(self, round: Round) -> float:
        """Factor of the silo's learning rate."""
        return 1.0

    def conflicts(self, config: Config) -> str | None:
        """Why it does not work with the rest of the configuration, in one line; None if it does."""
        return None

    @property
    def reads_loss(self) -> bool:
        """Whether `silo.kept[LOSS]` must hold the silo's last training loss after its first round."""
        return False

    @property
    def limit_s(self) -> float:
        """Seconds of a silo's training after which no batch starts."""
        return math.inf

    @abstractmethod
    def of(self, most: int, silo: LocalSilo, round: Round) -> int:
        """Epochs or steps of this round, at least 1; `most` is the rule's number."""


@component
class Whole(Amount):
    """All epochs or steps, for every silo in every round."""

    def of(self, most: int, silo: LocalSilo, round: Round) -> int:
        """`most`."""
        return most


@component
class Drawn(Amount):
    """A uniform draw from 1 to `epochs` (or `steps`) for each silo and round: devices whose speed varies (as in the
    experiments of Wang et al. 2020, section 6.1, whose epochs are 2 to 5)."""

    def of(self, most: int, silo: LocalSilo, round: Round) -> int:
        """A draw keyed by seed, round and silo."""
        draw = rng.generator(round.seed, purpose="amount", round=round.draw, silo=silo.id)
        return int(draw.integers(1, most, endpoint=True))


@component
class BySilo(Amount):
    """A number for each named silo; `epochs` (or `steps`) for the others."""

    silos: dict[str, PositiveInt]
    """epochs or steps by silo id"""

    def of(self, most: int, silo: LocalSilo, round: Round) -> int:
        """The silo's number, or `most`."""
        return self.silos.get(silo.id, most)


@component
class ByLoss(Amount):
    """min(E, max(1, round(L_k / target))), where L_k is the silo's mean training loss in its last round.

    A rule of thumb, from no paper: a silo works less the better it fits. AdaComm does so for all silos together (Wang &
    Joshi 2019, equation 17: the square root of the loss over the first round's). A silo's first round takes all of E.
    """

    target: PositiveFloat
    """a silo at this loss takes one epoch or step; one at twice the loss takes two"""
    reads_loss = True

    def of(self, most: int, silo: LocalSilo, round: Round) -> int:
        """From the loss that the silo keeps; `most` before it has one."""
        if LOSS not in silo.kept:
            return most
        return round_between(float(silo.kept[LOSS]) / self.target, most)


def round_between(wanted: float, most: int) -> int:
    """The nearest integer within 1..`most`; halves round to even, nan gives `most`.

    >>> [round_between(w, 4) for w in (0.2, 2.5, 9.0, float("inf"), float("nan"))]
    [1, 2, 4, 4, 4]
    """
    return max(1, round(wanted)) if wanted < most else most


@component
class Seconds(Amount):
    """Batches start for this many seconds, at most `epochs` (or `steps`), at least one batch.

    The amount depends on the machine's speed, so runs are not repeatable; `exchange.reduction: reproducible` refuses
    it.
    """

    seconds: PositiveFloat
    """wall time, from the silo's first batch"""

    @property
    def limit_s(self) -> float:
        """`seconds`."""
        return self.seconds

    def of(self, most: int, silo: LocalSilo, round: Round) -> int:
        """`most`; the clock is read between batches."""
        return most


@component
class ByDelay(Amount):
    """As much as fits into `budget_s` seconds, by what was measured of the silo: E_k = max(1, floor((T - theta - q_k) /
    c_k)), at most E (Li et al. 2026, FedQueue: Queue-Aware Federated Learning for Cross-Facility HPC Training).

    q_k and c_k are exponential means over the silo's trainings so far, also over those whose updates were rejected or
    dropped: q_k of the seconds from when its work was handed out until its update arrived, without those of the
    training (a queue, transfers, other silos of its rank); c_k of the training's seconds for an epoch or step. The
    learning rate is lr E_min / E_k, so that a silo with more work takes shorter steps, and lr times steps is the same
    for all. With `cutoff` an update that takes longer than q_k + cutoff max(T, c_k E_k) is dropped.

    Deviations: E_k is at most the rule's `epochs` or `steps`, and may count epochs; a mean begins with the first
    measurement, in place of a guess; `scale: mean` refers to the mean of all E_k. The cut-off is off by default, and
    measured from when the silo's work was handed out: a late update is stale, and the engine's staleness weight makes
    it count less, where FedQueue counts it in its next round; one that is too late is dropped. It does not drop an
    update whose training alone takes longer than T, as expected.
    """

    budget_s: PositiveFloat
    """T: seconds from when a silo's work is handed out until its update should be there"""
    margin_s: NonNegativeFloat = 0.0
    """theta: seconds of `budget_s` that stay free"""
    beta: PositiveFraction = 0.5
    """weight of the newest measurement in the exponential means"""
    first: PositiveInt | None = None
    """epochs or steps of a silo of which nothing was measured yet; null: all"""
    rates: Literal["fewest", "mean", "equal"] = "fewest"
    """learning rates: fewest: lr E_min / E_k; mean: lr times the mean of all E_k, / E_k; equal: lr"""
    limit: Annotated[float, pydantic.Field(ge=1, allow_inf_nan=False)] = 10.0
    """factors of learning rates lie between 1 / limit and limit"""
    cutoff: Annotated[float, pydantic.Field(ge=1, allow_inf_nan=False)] | None = None
    """updates that take longer than q_k + cutoff max(T, c_k E_k) seconds are dropped; null: none"""
    follows_delays = True

    @pydantic.model_validator(mode="after")
    def _leaves_time(self) -> ByDelay:
        if self.margin_s >= self.budget_s:
            raise ValueError(f"margin_s: {self.margin_s:g} s leave nothing of budget_s, {self.budget_s:g} s")
        return self

    def mean(self, before: Delay | None, measured: Delay) -> Delay:
        if before is None:
            return measured
        return Delay(*((1 - self.beta) * old + self.beta * new for old, new in zip(before, measured, strict=True)))

    def orders(self, most: int, delays: Mapping[str, Delay | None]) -> dict[str, Order]:
        amounts = {silo: self._amount(most, delay) for silo, delay in delays.items()}
        return {silo: self._order(most, amounts, silo, delay) for silo, delay in delays.items()}

    def _amount(self, most: int, delay: Delay | None) -> int:
        """E_k."""
        if delay is None:
            return min(most, self.first or most)
        left_s = self.budget_s - self.margin_s - delay.wait_s
        if delay.unit_s == 0 or left_s >= most * delay.unit_s:
            return most if left_s > 0 else 1
        return max(1, min(most, math.floor(left_s / delay.unit_s + 1e-9)))  # not one less for a rounding error

    def _order(self, most: int, amounts: Mapping[str, int], silo: str, delay: Delay | None) -> Order:
        scale, latest_s, amount = 1.0, math.inf, amounts[silo]
        if self.rates != "equal":
            numbers = amounts.values()
            told = min(numbers) if self.rates == "fewest" else sum(numbers) / len(numbers)
            scale = min(self.limit, max(1 / self.limit, told / amount))
        if self.cutoff is not None and delay is not None:
            latest_s = delay.wait_s + self.cutoff * max(self.budget_s, delay.unit_s * amount)
        return Order(amount, scale, amount / most, latest_s)

    def of(self, most: int, silo: LocalSilo, round: Round) -> int:
        """What the order says; without one (in `fedmpi check`) what a silo's first training takes."""
        return self._amount(most, None) if round.order is None else min(most, round.order.amount)

    def scale(self, round: Round) -> float:
        return 1.0 if round.order is None else round.order.scale

    def conflicts(self, config: Config) -> str | None:
        """Refuses what hides a silo's seconds, needs bits that do not depend on the clock, or divides by steps."""
        who, scales = "local.amount: by_delay", self.rates != "equal"
        if not config.engine.gives_orders:
            return f"{who} needs an engine that measures delays, and this one does not"
        if config.disclosed != "silo":
            return f"{who} tells all ranks every silo's seconds, which disclose: {config.disclosed} hides"
        if config.privacy is not None:
            return f"{who} does not go with privacy: no account covers the seconds of a silo, which it goes by"
        if config.exchange.reduction == "reproducible" and not config.engine.clock.is_virtual:
            return f"exchange.reduction: reproducible does not go with {who}: it goes by the machine's clock"
        if scales and config.aggregate.normalises:
            return (
                f"{who} makes the steps of silos with more work shorter, and the aggregator divides by their number "
                "again; take local.amount.rates: equal, or aggregate: mean"
            )
        if scales and config.aggregate.counts_steps:
            return (
                f"{who} makes the steps of silos with more work shorter, and aggregate.weights: steps counts them in "
                "full; take local.amount.rates: equal, or other weights"
            )
        if self.cutoff is not None and not config.engine.arrivals:
            return "local.amount.cutoff needs engine: buffered; synchronous rounds have engine.policy: deadline"
        return None


WORKLOADS = Family(
    "amount",
    {
        "whole": Whole,
        "drawn": Drawn,
        "by_silo": BySilo,
        "by_loss": ByLoss,
        "seconds": Seconds,
        "by_delay": ByDelay,
    },
    Amount,
    defaults=True,
)
