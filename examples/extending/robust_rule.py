"""A robust rule: the mean of the values nearest to the median, per coordinate (Xie et al. 2018, mean around median).

A rule that reads single deltas says `needs = "rows"`: it gets K rows of any slice of the coordinates. One that has to
know distances between whole deltas says "gram" and writes `row_weights` (see fedmpi/aggregate/krum.py). Both need plan
`sharded` and `scope: silo`.

    aggregate: {name: "examples.extending.robust_rule:MeanAroundMedian", hostile: 1}
    exchange: {plan: sharded, scope: silo}
"""

from fedmpi.aggregate import Aggregator
from fedmpi.components import NonNegativeInt, component
from fedmpi.errors import ConfigError


@component
class MeanAroundMedian(Aggregator):
    """Of K values the mean of the K - hostile nearest to their median."""

    needs = "rows"

    hostile: NonNegativeInt = 0
    """Silos that may send anything; fewer than half."""

    def combine(self, rows_KS, weights):
        middle_S = rows_KS.median(dim=0).values
        nearest = (rows_KS - middle_S).abs().argsort(dim=0)[: len(rows_KS) - self.hostile]
        return rows_KS.gather(0, nearest).mean(dim=0)

    def suits(self, num_silos):
        if num_silos <= 2 * self.hostile:
            raise ConfigError(f"aggregate.hostile: {self.hostile} of {num_silos} silos is not fewer than half")
