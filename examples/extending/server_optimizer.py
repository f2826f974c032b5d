"""A server optimizer: Lion (Chen et al. 2023, Algorithm 2, without weight decay) on the mean delta.

The base is `ServerOptimizer` in fedmpi/server.py. `step` must be elementwise, because plans step slices of the vector.
It reuses the memory of `mean_P` and of `state` and must not write `params_P`.

    server: {optimizer: {name: "examples.extending.server_optimizer:Lion", lr: 0.03}}
"""

from typing import NamedTuple

import torch

from fedmpi.components import Decay, PositiveFloat, component
from fedmpi.server import ServerOptimizer


class LionState(NamedTuple):
    """The running mean of deltas."""

    m_P: torch.Tensor


@component
class Lion(ServerOptimizer):
    """w + lr sign(beta1 m + (1 - beta1) delta), then m = beta2 m + (1 - beta2) delta."""

    lr: PositiveFloat = 1e-3
    """Step size in each coordinate."""
    beta1: Decay = 0.9
    """Share of the running mean in a step."""
    beta2: Decay = 0.99
    """Decay of the running mean."""

    def init(self, params_P):
        return LionState(torch.zeros_like(params_P))

    def step(self, params_P, mean_P, state):
        direction_P = (self.beta1 * state.m_P + (1 - self.beta1) * mean_P).sign_()
        state.m_P.mul_(self.beta2).add_(mean_P, alpha=1 - self.beta2)
        torch.add(params_P, direction_P, alpha=self.lr, out=mean_P)
        return mean_P, state
