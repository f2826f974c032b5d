"""Aggregators: how deltas become one.

The mean needs only the sum of weighted deltas, so ranks fold their silos before anything is sent. The others read each
delta (`exchange.scope: silo`), coordinate by coordinate: where the plan is sharded, the owner of a piece sees what all
silos sent of it, and nobody holds K whole vectors. They give every silo one vote, whatever its samples.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Protocol

import pydantic
import torch

from fedmpi.components import Family, component


class Aggregator(Protocol):
    """How deltas become one. One that reads each has a method `combine(rows_KS, weights_K) -> row_S` besides, over
    any slice S of the coordinates."""

    def weight(self, num_samples: int) -> float:
        """What a silo's delta counts, given its number of training samples (however many it visited)."""
        ...


@component
class Mean:
    """The weighted mean: sum_k (n_k/n) delta_k over the cohort (McMahan et al. 2017, Algorithm 1).

    Algorithm 1 as first printed divides by the samples of all silos; like its later version and everybody's code this
    divides by the cohort's.

    >>> Mean(weights="samples").weight(200), Mean(weights="uniform").weight(200)
    (200.0, 1.0)
    """

    weights: Literal["samples", "uniform"] = "samples"  # n_k, or every silo the same

    def weight(self, num_samples: int) -> float:
        return float(num_samples) if self.weights == "samples" else 1.0


@component
class Median:
    """The coordinate-wise median; of an even number the middle two's mean (Yin et al. 2018, Algorithm 1, Option I).

    Holds against less than half of the silos sending anything at all.

    >>> Median().combine(torch.tensor([[1.0], [9.0], [2.0]]), torch.ones(3))
    tensor([2.])
    """

    def weight(self, num_samples: int) -> float:
        """One vote."""
        return 1.0

    def combine(self, rows_KS: torch.Tensor, weights_K: torch.Tensor) -> torch.Tensor:
        """Of K rows one."""
        ordered = rows_KS.sort(dim=0).values
        k = len(ordered)
        return (ordered[(k - 1) // 2] + ordered[k // 2]) / 2


@component
class TrimmedMean:
    """The coordinate-wise mean without the largest and the smallest (Yin et al. 2018, Algorithm 1, Option II).

    Holds against up to `fraction` of the silos sending anything at all; floor(fraction K) are left out at each end.

    >>> TrimmedMean(fraction=0.25).combine(torch.tensor([[1.0], [2.0], [4.0], [99.0]]), torch.ones(4))
    tensor([3.])
    """

    fraction: Annotated[float, pydantic.Field(ge=0, lt=0.5)] = 0.1  # beta: of the silos, left out at each end

    def weight(self, num_samples: int) -> float:
        """One vote."""
        return 1.0

    def combine(self, rows_KS: torch.Tensor, weights_K: torch.Tensor) -> torch.Tensor:
        """Of K rows one."""
        out = math.floor(self.fraction * len(rows_KS))
        return rows_KS.sort(dim=0).values[out : len(rows_KS) - out].mean(dim=0)


AGGREGATORS = Family("aggregator", {"mean": Mean, "median": Median, "trimmed_mean": TrimmedMean})
