"""Modules that do to their tensors and to random numbers what a flat vector and a keyed run have to live with."""

import random

import numpy as np
import torch
from torch import nn

from fedmpi.components import component
from fedmpi.types import Silo, SiloData, Source


@component
class Drifts:
    """A regression whose silos differ: the inputs of silo k have mean k + 1."""

    silos: int = 4
    tests: int = 8

    def source(self, seed):
        def opened(name):
            generator = torch.Generator().manual_seed(int(name[1:]))
            x = torch.randn(32 + self.tests, 3, generator=generator) + int(name[1:]) + 1
            y = x.sum(1)
            return SiloData(x[:32], y[:32], x[32:], y[32:])

        return Source("regression", (3,), 1, tuple(Silo(f"s{k}") for k in range(self.silos)), opened)


@component
class Drawn:
    """Samples drawn from generators that nobody seeded."""

    def source(self, seed):
        shift = random.random()

        def opened(name):
            x = torch.from_numpy(np.random.randn(24, 3)).float() + torch.rand(1) + shift
            return SiloData(x[:16], x[:16].sum(1), x[16:], x[16:].sum(1))

        return Source("regression", (3,), 1, tuple(Silo(f"s{k}") for k in range(2)), opened)


class Jitter(nn.Module):
    """Noise from numpy's, Python's and torch's own generators, in training or always; first weights from numpy's."""

    def __init__(self, always=False):
        super().__init__()
        self.always, self.linear = always, nn.Linear(3, 1)
        self.linear.weight.data = torch.from_numpy(np.random.randn(1, 3)).float() * random.random()

    def forward(self, x):
        if self.training or self.always:
            x = x + 0.1 * torch.from_numpy(np.random.randn(*x.shape)).float() + random.gauss(0, 0.1)
            x = x * torch.rand(x.shape[0], 1)
        return self.linear(x).squeeze(-1)


class Cast(nn.Module):
    """Logistic regression in another dtype."""

    def __init__(self, dtype, inputs=64, classes=10):
        super().__init__()
        self.linear = nn.Linear(inputs, classes).to(getattr(torch, dtype))

    def forward(self, x):
        return self.linear(x.flatten(1).to(self.linear.weight.dtype)).float()
