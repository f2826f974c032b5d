"""Measured delays of silos, from which their amount of work follows (`local.amount: by_delay`, local/workload.py).

An update's delay is the time from when its silo's work was handed out until the update arrived. It has two parts: the
seconds of the training, and all others, in which the silo waited: in a queue, for transfers, for other silos of its
rank. Means of both are state of the engine. Every rank has the same ones, because they are made from what all ranks
learn of a round's updates. They are those of the members: a silo that leaves and comes back is measured anew.

A training that begins from version t follows the means after round t. So what a silo is told depends only on the
records of the rounds up to t.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmpi.local import Delay, LocalRule, Order
from fedmpi.records import StatusTable

if TYPE_CHECKING:
    from fedmpi.rounds.queue import Arrival

_IDS, _MEANS = "delay_ids", "delay_means"  # names in the engine's state

# Columns of a silo's row in synchronous rounds in real time: seconds of its training, seconds that it waited, and the
# epochs or steps that it took.
COLUMNS = ("work_s", "wait_s", "units")
Seconds = Callable[[str], tuple[float, float]]


def too_late(delay_s: float, latest_s: float) -> bool:
    """Whether an update does not count; a rounding error does not make it late.

    >>> too_late(0.3, 0.1 + 0.2), too_late(0.1 + 0.2, 0.3), too_late(0.31, 0.3)
    (False, False, True)
    """
    return delay_s > latest_s * (1 + 1e-9)


class Delays:
    """The means of the silos after some round."""

    def __init__(self, rule: LocalRule, means: Mapping[str, Delay | None]) -> None:
        self._rule = rule
        self.means = dict(means)  # by member, None for one of which nothing was measured; empty if nothing follows them

    @classmethod
    def of(cls, state: Mapping[str, np.ndarray], rule: LocalRule, ids: Sequence[str]) -> Delays:
        """The means of the members `ids` in an engine's state."""
        if rule.by_delay is None:
            return cls(rule, {})
        rows = zip(json.loads(state[_IDS].tobytes()), state[_MEANS].tolist(), strict=True) if _IDS in state else ()
        known = {silo: Delay(*row) for silo, row in rows}
        return cls(rule, {silo: known.get(silo) for silo in ids})

    def arrays(self) -> dict[str, np.ndarray]:
        """The means as `of` reads them; nothing as long as there are none."""
        known = {silo: mean for silo, mean in self.means.items() if mean is not None}
        ids = np.frombuffer(json.dumps(list(known)).encode(), dtype=np.uint8).copy()
        return {_IDS: ids, _MEANS: np.array([*known.values()])} if known else {}

    def orders(self, cohort: Iterable[str] | None = None) -> dict[str, Order]:
        """What the silos of a cohort (None: all silos) are told of trainings that begin now; empty if nothing follows
        delays."""
        chosen = self.means if cohort is None else [silo for silo in cohort if silo in self.means]
        return self._rule.orders({silo: self.means[silo] for silo in chosen})

    def measure(self, silo: str, work_s: float, wait_s: float, units: float) -> None:
        """Enter a training of so many epochs or steps, if its silo is a member."""
        if silo in self.means and (amount := self._rule.by_delay) is not None:
            measured = Delay(max(0.0, wait_s), work_s / units)
            self.means[silo] = amount.mean(self.means[silo], measured)

    def hear(self, arrivals: Iterable[Arrival]) -> Delays:
        """Enter the updates of a round, in the order of arrival. Returns these means."""
        for one in arrivals:
            if one.order is not None and one.handed_s is not None:
                self.measure(one.silo, one.work_s, one.at_s - one.handed_s - one.work_s, one.amount)
        return self

    def hear_round(
        self, cohort: Mapping[str, int], ready: StatusTable, orders: Mapping[str, Order], seconds: Seconds | None
    ) -> dict[str, dict[str, Any]]:
        """Enter a synchronous round of a cohort, given as each silo's row in the table. `seconds` gives those of a
        silo's training and transfers under a virtual clock; else they are in the table. Returns what the record says.
        """
        columns = {} if seconds is not None else {name: ready.silo(name).tolist() for name in COLUMNS}
        told: dict[str, dict[str, Any]] = {}
        for silo, row in cohort.items():
            order = orders[silo]
            told[silo] = {"amount": order.amount, "scale": order.scale}
            if seconds is not None:
                work_s, wait_s, units = *seconds(silo), float(order.amount)
            else:
                work_s, wait_s, units = (columns[name][row] for name in COLUMNS)
            if units > 0:
                self.measure(silo, work_s, wait_s, units)
                told[silo] |= {"work_s": work_s, "wait_s": wait_s}
        return told
