"""How much a silo does in a round, out of the `epochs` or `steps` that its rule is given.

What silos do differs, and with the plain mean those that do more pull the model to where they want it (Wang et al.
2020, section 3); `aggregate: fednova` divides each delta by the steps that it holds.
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

LOSS = f"{RESERVED}train_loss"  # what a silo keeps its last round's mean training loss under


class Amount:
    """How many epochs or steps a silo takes in a round."""

    @property
    def reads_loss(self) -> bool:
        """Does it want the silo's last training loss in `silo.kept[LOSS]`, once it has trained?"""
        return False

    @property
    def limit_s(self) -> float:
        """No batch is begun after so many seconds of a silo's training."""
        return math.inf

    @abstractmethod
    def of(self, most: int, silo: LocalSilo, round: Round) -> int:
        """At least 1; `most` is the rule's `epochs` or `steps`."""


@component
class Whole(Amount):
    """All of it, every silo, every round."""

    def of(self, most: int, silo: LocalSilo, round: Round) -> int:
        """`most`."""
        return most


@component
class Drawn(Amount):
    """1 to `epochs` (or `steps`), all equally likely, drawn for every silo and round anew: devices that are now slow,
    now fast (as in the experiments of Wang et al. 2020, section 6.1, whose epochs are 2 to 5)."""

    def of(self, most: int, silo: LocalSilo, round: Round) -> int:
        """Keyed by seed, round and silo."""
        draw = rng.generator(round.seed, purpose="amount", round=round.number, silo=silo.id)
        return int(draw.integers(1, most, endpoint=True))


@component
class BySilo(Amount):
    """A number of its own for every silo that is named; `epochs` (or `steps`) for the others."""

    silos: dict[str, PositiveInt]
    """epochs or steps by silo id"""

    def of(self, most: int, silo: LocalSilo, round: Round) -> int:
        """The silo's own."""
        return self.silos.get(silo.id, most)


@component
class ByLoss(Amount):
    """min(E, max(1, round(L_k / target))): L_k is the silo's mean training loss in the last round that it trained in.

    A rule of thumb, no paper's: silos work less the better they fit, as AdaComm's do all alike (Wang & Joshi 2019,
    equation 17: the square root of the loss over the first round's). A silo's first round is as long as can be.
    """

    target: PositiveFloat
    """a silo at this loss takes one epoch or step; one at twice the loss takes two"""
    reads_loss = True

    def of(self, most: int, silo: LocalSilo, round: Round) -> int:
        """By the loss that the silo keeps."""
        if LOSS not in silo.kept:
            return most
        return round_between(float(silo.kept[LOSS]) / self.target, most)


def round_between(wanted: float, most: int) -> int:
    """The nearest integer of 1 to `most`; halves go to the even one, what is no number to `most`.

    >>> [round_between(w, 4) for w in (0.2, 2.5, 9.0, float("inf"), float("nan"))]
    [1, 2, 4, 4, 4]
    """
    return max(1, round(wanted)) if wanted < most else most


@component
class Seconds(Amount):
    """As many batches as begin within so many seconds, at most `epochs` (or `steps`), at least one.

    What a silo does then hangs on the machine: runs are not repeatable, and it does not go with
    `exchange.reduction: reproducible`.
    """

    seconds: PositiveFloat
    """of wall time, from the silo's first batch"""

    @property
    def limit_s(self) -> float:
        """The seconds."""
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
