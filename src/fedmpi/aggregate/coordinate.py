"""Rules that look at one coordinate after the other."""

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
    """The coordinate-wise median; of an even number the middle two's mean (Yin et al. 2018, Algorithm 1, Option I).

    Holds against less than half of the silos sending anything at all.

    >>> Median().combine(torch.tensor([[1.0], [9.0], [2.0]]), torch.ones(3))
    tensor([2.])
    """

    needs = "rows"

    def combine(self, rows_KS: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Of K rows one."""
        ordered = rows_KS.sort(dim=0).values
        k = len(ordered)
        return (ordered[(k - 1) // 2] + ordered[k // 2]) / 2


@component
class TrimmedMean(Aggregator):
    """The coordinate-wise mean without the largest and the smallest (Yin et al. 2018, Algorithm 1, Option II).

    Holds against up to `fraction` of the silos sending anything at all; floor(fraction K) are left out at each end.

    >>> TrimmedMean(fraction=0.25).combine(torch.tensor([[1.0], [2.0], [4.0], [99.0]]), torch.ones(4))
    tensor([3.])
    """

    needs = "rows"

    fraction: Annotated[float, pydantic.Field(ge=0, lt=0.5)] = 0.1
    """beta: of the silos, left out at each end, rounded down"""

    def combine(self, rows_KS: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Of K rows one."""
        out = self._out(len(rows_KS))
        return rows_KS.sort(dim=0).values[out : len(rows_KS) - out].mean(dim=0)

    def suits(self, num_silos: int) -> None:
        """ConfigError where so many silos are too few for anything to be left out."""
        if self.fraction and not self._out(num_silos):
            raise ConfigError(
                f"aggregate.fraction: {self.fraction:g} of {num_silos} silos is less than one silo: none is left out; "
                f"take {math.ceil(1000 / num_silos) / 1000:g} or more, or 0 for the plain mean"
            )

    def _out(self, num_silos: int) -> int:
        return math.floor(self.fraction * num_silos + 1e-9)


@component
class SignVote(Aggregator):
    """The sign that most silos' values have, coordinate by coordinate (Bernstein et al. 2019, signSGD with Majority
    Vote, Algorithm 1): -1, 0 or 1, so that server.optimizer.lr is the length of the step.

    Holds against less than half of the silos, in each coordinate in which the honest agree. A tie moves nothing.
    Deviation: signs are taken of deltas where they arrive, so what travels is the codec's; `sign` sends a bit a value.

    >>> SignVote().combine(torch.tensor([[1.0, -3.0], [9.0, 0.0], [-2.0, -1.0]]), None)
    tensor([ 1., -1.])
    """

    needs = "rows"
    averages = False

    hostile: NonNegativeInt = 0
    """silos that may send anything; fewer than half"""

    def combine(self, rows_KS: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Of K rows one."""
        return rows_KS.sign().sum(dim=0).sign()

    def suits(self, num_silos: int) -> None:
        """ConfigError where so many silos are not the more."""
        enough("sign_vote", self.hostile, 2 * self.hostile + 1, num_silos)


MEMBERS = {"median": Median, "trimmed_mean": TrimmedMean, "sign_vote": SignVote}
