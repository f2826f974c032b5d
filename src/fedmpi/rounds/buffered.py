"""Updates of late silos that wait for the next round (`engine.policy: {name: deadline, late: buffer}`).

A buffered update is part of its silo's state (`LocalSilo.kept`), so it is in checkpoints and moves with the silo. It
enters the sum of the next round before that round's own updates, even if the silo is not in the cohort. Its weight is
multiplied by (1 + s)^(-1/2), where s is its staleness in rounds, as in FedBuff (Nguyen et al. 2022, Federated Learning
with Buffered Asynchronous Aggregation, section 5). Deviation: FedBuff divides the sum by the number of updates; this
divides it by the sum of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fedmpi.flat import RESERVED
from fedmpi.local import LocalSilo
from fedmpi.records import StatusTable
from fedmpi.types import Contribution

UPDATE, ABOUT = f"{RESERVED}late_update", f"{RESERVED}late_about"  # names in LocalSilo.kept


@dataclass(frozen=True)
class Buffered:
    """A silo's update from an earlier round. `of` gives the weights of that round, `entering` those with staleness."""

    contribution: Contribution  # its weight: the sent weight, already divided by the part done
    weight: float  # the silo's base weight
    done: float  # base weight times the part done
    plain: float  # sent weight without the division by the part done

    @classmethod
    def of(cls, silo: LocalSilo, device: torch.device) -> Buffered | None:
        """The silo's buffered update, on `device`; None if it has none."""
        if UPDATE not in silo.kept:
            return None
        round, sent, weight, done, plain, gradients, norm = silo.kept[ABOUT].tolist()
        vector_Q = silo.kept[UPDATE].to(device, copy=True)  # a copy: an exchange may blank parts of it
        update = Contribution(silo.id, int(round), sent, vector_Q, 0.0, 0, 1, normalizer=gradients, norm=norm)
        return cls(update, weight, done, plain)

    def keep(self, silo: LocalSilo) -> None:
        """Store the update in the silo's state, where `of` reads it."""
        one = self.contribution
        about = (one.round, one.weight, self.weight, self.done, self.plain, one.num_gradients, one.norm)
        silo.kept[UPDATE] = one.vector_Q.clone()
        silo.kept[ABOUT] = torch.tensor(about, dtype=torch.float64)

    def entering(self, round: int) -> Buffered:
        """The update with its weights in a later round, reduced by its staleness.

        >>> late = Buffered(Contribution("a", 4, 8.0, torch.ones(1), 0.0, 0, 1), weight=4.0, done=2.0, plain=4.0)
        >>> late.entering(7).contribution.weight, late.entering(7).weight
        (4.0, 2.0)
        """
        factor = (1 + round - self.contribution.round) ** -0.5
        update = replace(self.contribution, weight=self.contribution.weight * factor)
        return Buffered(update, self.weight * factor, self.done * factor, self.plain * factor)


def without(silo: LocalSilo) -> LocalSilo:
    """A copy of the silo without its buffered update."""
    return replace(silo, kept={name: tensor for name, tensor in silo.kept.items() if name not in (UPDATE, ABOUT)})


def add_rows(ready: StatusTable, entered: Iterable[tuple[int, int, Buffered]]) -> None:
    """Add buffered updates, given as (row of the silo, staleness in rounds, update), to the silos' rows of this round.

    A row may then describe two updates. This is safe because only sums over silos use these columns.
    """
    for row, stale, one in entered:
        fresh = bool(ready.silo("taken")[row])
        names = ("weight", "sent", "done", "plain", "normalizer", "norm")
        before = {name: float(ready.silo(name)[row]) if fresh else 0.0 for name in names}
        weight = before["weight"] + one.weight
        gradients = before["normalizer"] * before["weight"] + one.contribution.num_gradients * one.weight
        ready.set_silo(
            row,
            taken=True,
            stale=stale,
            weight=weight,
            sent=before["sent"] + one.contribution.weight,
            done=before["done"] + one.done,
            plain=before["plain"] + one.plain,
            normalizer=gradients / weight,
            norm=before["norm"] if fresh else one.contribution.norm,
        )
