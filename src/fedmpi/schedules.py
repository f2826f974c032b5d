"""Learning rate schedules over rounds.

    lr = schedule.lr(eta0, round, rounds)

Rounds t are counted from 1 to T. All silos of a round train at the same rate. During the first `warmup` rounds the rate
is eta0 t / warmup; afterwards it is the schedule's value at t, not at t - warmup.

T is the schedule's `rounds`, or the run's. Set the schedule's own if you may extend the run later: the rates of earlier
rounds then stay the same, and later rounds use the last rate.
"""

from __future__ import annotations

import math
from typing import Protocol

from fedmpi.components import Family, Fraction, NonNegativeInt, PositiveFraction, PositiveInt, component


class Schedule(Protocol):
    """Gives the learning rate of each round."""

    def lr(self, eta0: float, round: int, rounds: int) -> float:
        """The rate of round `round`, counted from 1, of `rounds`."""
        ...


@component
class Constant:
    """eta0 in every round.

    >>> Constant(warmup=2).lr(0.1, 1, 10)
    0.05
    """

    warmup: NonNegativeInt = 0
    """first rounds, during which the rate rises to eta0 in equal steps"""

    def lr(self, eta0: float, round: int, rounds: int) -> float:
        """The rate of round `round`, counted from 1, of `rounds`."""
        return _rising(eta0, round, self.warmup) if round <= self.warmup else eta0


@component
class Linear:
    """eta0 max(floor, (T - t) / T): falls to eta0 floor in equal steps.

    >>> [Linear().lr(1.0, t, 10) for t in (1, 5, 10)]
    [0.9, 0.5, 0.1]
    """

    floor: Fraction = 0.1
    """smallest rate, as a share of eta0"""
    warmup: NonNegativeInt = 0
    """first rounds, during which the rate rises to eta0 in equal steps"""
    rounds: PositiveInt | None = None
    """T; null: the rounds of the run"""

    def lr(self, eta0: float, round: int, rounds: int) -> float:
        """The rate of round `round`, counted from 1, of `rounds`."""
        if round <= self.warmup:
            return _rising(eta0, round, self.warmup)
        last = self.rounds or rounds
        return eta0 * max(self.floor, (last - round) / last)


@component
class Step:
    """eta0 factor^floor((t - 1) / every): constant for `every` rounds, then multiplied by `factor`.

    >>> [Step(every=2, factor=0.5).lr(1.0, t, 5) for t in (1, 2, 3, 5)]
    [1.0, 1.0, 0.5, 0.25]
    """

    every: PositiveInt = 10
    """rounds at the same rate"""
    factor: PositiveFraction = 0.1
    """factor of the rate after each of these"""
    warmup: NonNegativeInt = 0
    """first rounds, during which the rate rises to eta0 in equal steps"""

    def lr(self, eta0: float, round: int, rounds: int) -> float:
        """The rate of round `round`, counted from 1, of `rounds`."""
        if round <= self.warmup:
            return _rising(eta0, round, self.warmup)
        return float(eta0 * self.factor ** ((round - 1) // self.every))


@component
class Cosine:
    """eta0 (floor + (1 - floor) (1 + cos(pi (t - 1) / T)) / 2): half a cosine wave (Loshchilov & Hutter 2017, equation
    5, whose T_cur = t - 1 counts from 0).

    No restarts. The first round has rate eta0, the last one is a step above eta0 floor.

    >>> [Cosine().lr(1.0, t, 4) for t in (1, 3)]
    [1.0, 0.5]
    """

    floor: Fraction = 0.0
    """rate that it falls towards, as a share of eta0"""
    warmup: NonNegativeInt = 0
    """first rounds, during which the rate rises to eta0 in equal steps"""
    rounds: PositiveInt | None = None
    """T; null: the rounds of the run"""

    def lr(self, eta0: float, round: int, rounds: int) -> float:
        """The rate of round `round`, counted from 1, of `rounds`."""
        if round <= self.warmup:
            return _rising(eta0, round, self.warmup)
        last = self.rounds or rounds
        done = min(round - 1, last) / last
        return eta0 * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2)


def _rising(eta0: float, round: int, warmup: int) -> float:
    return eta0 * round / warmup


SCHEDULES = Family("schedule", {"constant": Constant, "linear": Linear, "cosine": Cosine, "step": Step}, Schedule)
