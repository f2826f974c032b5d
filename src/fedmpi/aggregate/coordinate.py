"""Coordinate-wise rules."""

from __future__ import annotations

import math
from typing import Annotated

import pydantic
import torch

from fedmpi.aggregate.base import Aggregator, Weights, enough
from fedmpi.components import NonNegativeInt, component
from fedmpi.errors import ConfigError


@component
class Median(Aggregator):
    """Coordinate-wise median; for an even number, the mean of the middle two (Yin et al. 2018, Algorithm 1, Option I).

    Robust if fewer than half of the silos are hostile, whatever they send.

    >>> Median().combine(torch.tensor([[1.0], [9.0], [2.0]]), torch.ones(3))
    tensor([2.])
    """

    needs = "rows"

    def combine(self, rows_KS: torch.Tensor, weights: Weights) -> torch.Tensor:
        """The median of K rows, [S]."""
        ordered = rows_KS.sort(dim=0).values
        k = len(ordered)
        return (ordered[(k - 1) // 2] + ordered[k // 2]) / 2


@component
class TrimmedMean(Aggregator):
    """Coordinate-wise mean without the largest and smallest values (Yin et al. 2018, Algorithm 1, Option II).

    Robust if up to `fraction` of the silos are hostile; floor(fraction K) values are dropped at each end.

    >>> TrimmedMean(fraction=0.25).combine(torch.tensor([[1.0], [2.0], [4.0], [99.0]]), torch.ones(4))
    tensor([3.])
    """

    needs = "rows"

    fraction: Annotated[float, pydantic.Field(ge=0, lt=0.5)] = 0.1
    """beta: share of silos dropped at each end, rounded down"""

    def combine(self, rows_KS: torch.Tensor, weights: Weights) -> torch.Tensor:
        """The trimmed mean of K rows, [S]."""
        out = self._out(len(rows_KS))
        return rows_KS.sort(dim=0).values[out : len(rows_KS) - out].mean(dim=0)

    def suits(self, num_silos: int) -> None:
        """Raises ConfigError if the fraction of so many silos is less than one silo."""
        if self.fraction and not self._out(num_silos):
            raise ConfigError(
                f"aggregate.fraction: {self.fraction:g} of {num_silos} silos is less than one silo: none is left out; "
                f"take {math.ceil(1000 / num_silos) / 1000:g} or more, or 0 for the plain mean"
            )

    def _out(self, num_silos: int) -> int:
        return math.floor(self.fraction * num_silos + 1e-9)


@component
class SignVote(Aggregator):
    """Coordinate-wise majority vote of signs (Bernstein et al. 2019, signSGD with Majority Vote, Algorithm 1): -1, 0 or
    1, so server.optimizer.lr is the step length.

    Robust if fewer than half of the silos are hostile, in coordinates where the honest ones agree. A tie gives 0.
    Deviation: the receiver takes the signs, so the codec decides what is sent; codec `sign` sends one bit per value.

    >>> SignVote().combine(torch.tensor([[1.0, -3.0], [9.0, 0.0], [-2.0, -1.0]]), None)
    tensor([ 1., -1.])
    """

    needs = "rows"
    averages = False

    hostile: NonNegativeInt = 0
    """silos that may send anything; fewer than half"""

    def combine(self, rows_KS: torch.Tensor, weights: Weights) -> torch.Tensor:
        """The majority sign of K rows, [S]."""
        return rows_KS.sign().sum(dim=0).sign()

    def suits(self, num_silos: int) -> None:
        """Raises ConfigError unless most silos are honest."""
        enough("sign_vote", self.hostile, 2 * self.hostile + 1, num_silos)


MEMBERS = {"median": Median, "trimmed_mean": TrimmedMean, "sign_vote": SignVote}
