"""A selector: the silos take part in blocks, one block after the other (Eichner et al. 2019, Semi-Cyclic SGD).

The base is `Selector` in fedmpi/selection/base.py. `select` returns the cohort in the federation's order and the new
state, a dict of arrays that is saved in checkpoints. It is called on every rank with the same arguments, so it may use
only `rng` for random numbers.

    select: {name: "examples.extending.selector:Blocks", blocks: 2, rounds: 1}
"""

from fedmpi.components import PositiveInt, component
from fedmpi.selection.base import Selector


@component
class Blocks(Selector):
    """Every `rounds` rounds the next block of silos."""

    reads = frozenset()  # only the number of the last round

    blocks: PositiveInt = 2
    """Number of blocks; silos are assigned to them in turn."""
    rounds: PositiveInt = 1
    """Rounds before the next block takes over."""

    def init(self, num_train):
        return {}

    def least(self, ids, rounds):
        return len(ids) // self.blocks

    def select(self, ids, state, outcome, rng):
        done = 0 if outcome is None else outcome.round
        block = done // self.rounds % self.blocks
        return list(ids[block :: self.blocks]), state
