"""A sampler: FlipFlop (Rajput et al. 2022), every second epoch reverses the order of the one before.

The base is `Sampler` in fedmpi/local/samplers.py. An order must depend on the arguments only, or a resumed run would
differ; `rng.generator` gives keyed random numbers.

    local: {name: sgd, lr: 0.1, epochs: 2, sampler: {name: "examples.extending.sampler:FlipFlop"}}
"""

from fedmpi import rng
from fedmpi.components import component
from fedmpi.local.samplers import Sampler


@component
class FlipFlop(Sampler):
    """A new permutation every second epoch, its reverse in the epochs between."""

    def order(self, seed, silo, epoch, num_samples):
        order_N = rng.generator(seed, purpose="order", silo=silo, epoch=epoch // 2).permutation(num_samples)
        return order_N[::-1] if epoch % 2 else order_N
