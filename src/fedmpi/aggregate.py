"""Aggregators: how deltas become one.

The mean needs only the sum of weighted deltas, so ranks fold their silos before anything is sent.
"""

from __future__ import annotations

from typing import Literal, Protocol

from fedmpi.components import Family, component


class Aggregator(Protocol):
    """How deltas become one."""

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


AGGREGATORS = Family("aggregator", {"mean": Mean})
