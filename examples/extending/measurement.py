"""A measurement: the largest norm of a delta in a round, divided by the median norm.

`of` gets the round's outcome, arrays over the silos (fedmpi/outcome.py), and returns fields for the record. `reads`
names the arrays that it reads, so that `disclose` can refuse it; `needs` is {"gram"} if it needs inner products.

    records: {measure: ["examples.extending.measurement:Longest"]}
"""

import numpy as np

from fedmpi.components import component


@component
class Longest:
    """The field `longest`: 1 if all deltas have the same norm."""

    needs = frozenset()
    reads = frozenset({"norm"})

    def of(self, outcome):
        norms_K = outcome.norm_K[np.isfinite(outcome.norm_K)]
        return {"longest": float(norms_K.max() / np.median(norms_K)) if norms_K.size else None}
