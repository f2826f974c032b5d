"""Aggregators: combine the silos' deltas into one vector.

    base        the interface that the exchange and the round use; inner products and distances
    mean        weighted means: only the sum of deltas crosses ranks
    coordinate  coordinate-wise rules: median, trimmed mean, majority vote of signs
    krum        selection by distance: Krum, multi-Krum, Bulyan
    centres     a robust centre: geometric median, centered clipping, norm bounding
    mixing      mix rows before another rule reads them: bucketing, nearest-neighbour mixing

Aggregators that read each delta (`exchange.scope: silo`) give every silo one vote, whatever its number of samples. Each
rank sees all silos' values for its own slice of the coordinates; no rank holds K whole vectors.
"""

from __future__ import annotations

from fedmpi.aggregate import centres, coordinate, krum, mean, mixing
from fedmpi.aggregate.base import AGGREGATORS, Aggregator, Cohort, CohortSummary
from fedmpi.aggregate.mean import FedNova, Mean

for part in (mean, coordinate, krum, centres, mixing):
    AGGREGATORS.members.update(part.MEMBERS)

__all__ = ["AGGREGATORS", "Aggregator", "Cohort", "CohortSummary", "FedNova", "Mean"]
