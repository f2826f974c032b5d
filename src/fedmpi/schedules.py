"""How the silos' learning rate changes from round to round.

    lr = schedule.lr(eta0, round, rounds)

The round is counted from 1: the first is 1, the last is T. All silos of a round train at the same rate. During the
first `warmup` rounds the rate is eta0 t / warmup; from then on it is the schedule's own value at t, not at t - warmup.

T is the run's `rounds`, unless the schedule has `rounds` of its own: with them a run that is given more rounds keeps
the schedule that it began with, and stays at its end afterwards.
"""

from __future__ import annotations

import math
from typing import Protocol

from fedmpi.components import Family, Fraction, NonNegativeInt, PositiveInt, component


class Schedule(Protocol):
    """A learning rate for every round."""

    def lr(self, eta0: float, round: int, rounds: int) -> float:
        """The rate in round `round` of 1 to `rounds`."""
        ...


@component
class Constant:
    """eta0 in every round.

    >>> Constant(warmup=2).lr(0.1, 1, 10)
    0.05
    """

    warmup: NonNegativeInt = 0
    """rounds that rise to eta0 in equal steps"""

    def lr(self, eta0: float, round: int, rounds: int) -> float:
        """The rate in round `round` of 1 to `rounds`."""
        return _rising(eta0, round, self.warmup) if round <= self.warmup else eta0


@component
class Linear:
    """eta0 max(floor, (T - t) / T): down to eta0 floor in equal steps.

    >>> [Linear().lr(1.0, t, 10) for t in (1, 5, 10)]
    [0.9, 0.5, 0.1]
    """

    floor: Fraction = 0.1
    """share of eta0 below which the rate never falls"""
    warmup: NonNegativeInt = 0
    """rounds that rise to eta0 in equal steps"""
    rounds: PositiveInt | None = None
    """T; null: those of the run"""

    def lr(self, eta0: float, round: int, rounds: int) -> float:
        """The rate in round `round` of 1 to `rounds`."""
        if round <= self.warmup:
            return _rising(eta0, round, self.warmup)
        last = self.rounds or rounds
        return eta0 * max(self.floor, (last - round) / last)


@component
class Cosine:
    """eta0 (floor + (1 - floor) (1 + cos(pi (t - 1) / T)) / 2): half a cosine wave (Loshchilov & Hutter 2017, equation
    5, whose T_cur = t - 1 counts from 0).

    No restarts. The first round trains at eta0, the last one a step above eta0 floor.

    >>> [Cosine().lr(1.0, t, 4) for t in (1, 3)]
    [1.0, 0.5]
    """

    floor: Fraction = 0.0
    """share of eta0 that the rate falls towards"""
    warmup: NonNegativeInt = 0
    """rounds that rise to eta0 in equal steps"""
    rounds: PositiveInt | None = None
    """T; null: those of the run"""

    def lr(self, eta0: float, round: int, rounds: int) -> float:
        """The rate in round `round` of 1 to `rounds`."""
        if round <= self.warmup:
            return _rising(eta0, round, self.warmup)
        last = self.rounds or rounds
        done = min(round - 1, last) / last
        return eta0 * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2)


def _rising(eta0: float, round: int, warmup: int) -> float:
    return eta0 * round / warmup


SCHEDULES = Family("schedule", {"constant": Constant, "linear": Linear, "cosine": Cosine}, Schedule)
