"""How many of its rule's `epochs` or `steps` a silo takes in a round.

When silos take different numbers of steps, the plain mean is biased towards those that take more (Wang et al. 2020,
section 3); `aggregate: fednova` divides each delta by its number of steps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

from fedmpi import rng
from fedmpi.components import Family, PositiveFloat, PositiveInt, component
from fedmpi.flat import RESERVED

if TYPE_CHECKING:
    from fedmpi.local.base import LocalSilo, Round

LOSS = f"{RESERVED}train_loss"  # key of the last round's mean training loss in a silo's kept state


class Amount:
    """How many epochs or steps a silo takes in a round."""

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


WORKLOADS = Family(
    "amount",
    {"whole": Whole, "drawn": Drawn, "by_silo": BySilo, "by_loss": ByLoss, "seconds": Seconds},
    Amount,
    defaults=True,
)
