"""Weights of stale updates: s(t - tau), where t - tau is the number of server steps since the silo fetched its
parameters; 0 for an update that nothing overtook.

Xie et al. count the step that applies the update as well, so their t - tau is larger by 1.
"""

from __future__ import annotations

from abc import abstractmethod

from fedmpi.components import Family, NonNegativeFloat, PositiveFloat, component


class Staleness:
    """How much an update counts, by its staleness."""

    @abstractmethod
    def weight(self, staleness: int) -> float:
        """s(staleness), the factor of the update."""


@component
class Constant(Staleness):
    """s = 1: every update counts in full (Xie et al. 2019, Asynchronous Federated Optimization, section 5.2)."""

    def weight(self, staleness: int) -> float:
        return 1.0


@component
class Hinge(Staleness):
    """s(x) = 1 up to x = b, then 1 / (a (x - b) + 1) (Xie et al. 2019, Asynchronous Federated Optimization, section
    5.2).

    >>> Hinge(a=0.5, b=2).weight(2), Hinge(a=0.5, b=2).weight(4)
    (1.0, 0.5)
    """

    a: PositiveFloat = 10.0
    """how fast the weight falls"""
    b: NonNegativeFloat = 4.0
    """largest staleness that counts in full"""

    def weight(self, staleness: int) -> float:
        return 1.0 if staleness <= self.b else 1.0 / (self.a * (staleness - self.b) + 1.0)


@component
class Polynomial(Staleness):
    """s(x) = (x + 1)^-a (Xie et al. 2019, Asynchronous Federated Optimization, section 5.2; with a = 1/2, Nguyen et al.
    2022, Federated Learning with Buffered Asynchronous Aggregation, section 5).

    >>> Polynomial(a=0.5).weight(0), Polynomial(a=0.5).weight(3)
    (1.0, 0.5)
    """

    a: PositiveFloat = 0.5
    """exponent"""

    def weight(self, staleness: int) -> float:
        return float((staleness + 1.0) ** -self.a)


@component
class Inverse(Staleness):
    """s(x) = 1 / (1 + beta x).

    >>> Inverse(beta=0.25).weight(4)
    0.5
    """

    beta: PositiveFloat = 1.0
    """how fast the weight falls"""

    def weight(self, staleness: int) -> float:
        return 1.0 / (1.0 + self.beta * staleness)


STALENESS = Family(
    "staleness weight",
    {"constant": Constant, "hinge": Hinge, "polynomial": Polynomial, "inverse": Inverse},
    Staleness,
    defaults=True,
)
