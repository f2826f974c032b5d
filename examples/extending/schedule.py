"""A schedule of the learning rate: a polynomial.

A schedule has `lr(eta0, round, rounds)`; rounds count from 1. It works as `local.schedule` and as the schedule of a
server optimizer.

    local: {name: sgd, lr: 0.1, epochs: 1, schedule: {name: "examples.extending.schedule:Polynomial", power: 2.0}}
"""

from fedmpi.components import PositiveFloat, component


@component
class Polynomial:
    """eta0 (1 - (t - 1) / T)^power."""

    power: PositiveFloat = 1.0
    """Exponent; 1 falls linearly."""

    def lr(self, eta0, round, rounds):
        return eta0 * (1 - (round - 1) / max(rounds, round)) ** self.power
