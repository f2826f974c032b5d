"""A robust rule: the mean of the values nearest to the median, per coordinate (Xie et al. 2018, mean around median).

A rule that reads each delta has `needs = "rows"`: it gets K rows of any slice of the coordinates. A rule that needs
distances between whole deltas has `needs = "gram"` and defines `row_weights` (see fedmpi/aggregate/krum.py). Both need
plan `sharded` and `scope: silo`.

    aggregate: {name: "examples.extending.robust_rule:MeanAroundMedian", hostile: 1}
    exchange: {plan: sharded, scope: silo}
"""

from fedmpi.aggregate import Aggregator
from fedmpi.components import NonNegativeInt, component
from fedmpi.errors import ConfigError


@component
class MeanAroundMedian(Aggregator):
    """The mean of the K - hostile values nearest to the median, per coordinate."""

    needs = "rows"

    hostile: NonNegativeInt = 0
    """Number of silos that may send anything; fewer than half."""

    def combine(self, rows_KS, weights):
        middle_S = rows_KS.median(dim=0).values
        nearest = (rows_KS - middle_S).abs().argsort(dim=0)[: len(rows_KS) - self.hostile]
        return rows_KS.gather(0, nearest).mean(dim=0)

    def suits(self, num_silos):
        if num_silos <= 2 * self.hostile:
            raise ConfigError(f"aggregate.hostile: {self.hostile} of {num_silos} silos is not fewer than half")
