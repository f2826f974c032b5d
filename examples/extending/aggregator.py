"""An aggregator of sums: a weighted mean; a silo's weight is the square root of its number of samples.

The base is `Aggregator` in fedmpi/aggregate/base.py. `needs` is "sum" by default: ranks add up weighted deltas before
they send anything, so the cost does not grow with the number of silos.

    aggregate: {name: "examples.extending.aggregator:RootSamples", power: 0.5}
"""

from fedmpi.aggregate import Aggregator
from fedmpi.components import Fraction, component


@component
class RootSamples(Aggregator):
    """Weights n_k^power: 0 gives every silo the same weight, 1 is FedAvg's."""

    reads = frozenset()  # no per-silo figures, so it also works under `disclose: pooled`
    refuses_factors = ""  # a selector may weight silos by 1/probability

    power: Fraction = 0.5
    """Exponent of the number of samples."""

    def base(self, silo, num_samples):
        return float(num_samples) ** self.power

    def weight(self, contribution):
        return contribution.weight

    def scale(self, heard):
        return float(heard.weights.sum()) / heard.total
