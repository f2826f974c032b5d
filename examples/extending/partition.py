"""A partition of a central dataset: the first silo gets most of the samples.

A partition has `split`, which returns a `Part` (indices of training and test samples) for every silo; each index of
either set is in exactly one part. It gets the labels, so that a partition can depend on them.

    data: {name: digits, silos: 3, partition: {name: "examples.extending.partition:Hub", share: 0.6}}
"""

import numpy as np

from fedmpi.components import PositiveFraction, component
from fedmpi.data.partition import Part


@component
class Hub:
    """One silo has `share` of all samples, the others share the rest equally."""

    share: PositiveFraction = 0.5
    """Share of the samples for the first silo."""

    def split(self, y_train_N, y_test_M, num_silos, rng):
        def cut(number):
            order, hub = rng.permutation(number), round(self.share * number)
            return [np.sort(part) for part in (order[:hub], *np.array_split(order[hub:], num_silos - 1))]

        return [Part(*parts) for parts in zip(cut(len(y_train_N)), cut(len(y_test_M)), strict=True)]
