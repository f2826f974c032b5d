"""A workload: silos train one epoch (or step) in the first round and one more in each later round.

The base is `Amount` in fedmpi/local/workload.py; `of` returns a number from 1 to `most`, the rule's epochs or steps.

    local: {name: sgd, lr: 0.1, epochs: 3, amount: {name: "examples.extending.workload:Growing"}}
"""

from fedmpi.components import PositiveInt, component
from fedmpi.local.workload import Amount


@component
class Growing(Amount):
    """1 in the first round, then one more every `every` rounds."""

    every: PositiveInt = 1
    """Rounds between two increases."""

    def of(self, most, silo, round):
        return min(most, 1 + (round.number - 1) // self.every)
