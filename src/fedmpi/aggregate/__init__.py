"""Aggregators: how deltas become one.

    base        what the exchange and the round ask of them, in two phases; inner products and distances
    mean        weighted means: only the sum of deltas crosses ranks
    coordinate  one coordinate after the other: median, trimmed mean, vote of signs
    krum        who is near to whom: Krum, multi-Krum, Bulyan
    centres     a centre near most: geometric median, centered clipping, norm bounding
    mixing      what mixes rows before another rule reads them: bucketing, nearest-neighbour mixing

Those that read each delta (`exchange.scope: silo`) give every silo one vote, whatever its samples. The owner of a piece
sees what all silos sent of it, and nobody holds K whole vectors.
"""

from __future__ import annotations

from fedmpi.aggregate import centres, coordinate, krum, mean, mixing
from fedmpi.aggregate.base import AGGREGATORS, Aggregator, Cohort, CohortSummary
from fedmpi.aggregate.mean import FedNova, Mean

for part in (mean, coordinate, krum, centres, mixing):
    AGGREGATORS.members.update(part.MEMBERS)

__all__ = ["AGGREGATORS", "Aggregator", "Cohort", "CohortSummary", "FedNova", "Mean"]
