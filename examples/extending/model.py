"""A model: any function or class that returns a torch module, or a component that sees the data's shapes.

A function gets the configuration's values as arguments. A component has `build(source)`: `source.shape` is the shape of
one sample, `source.num_classes` the number of classes, or of targets of a regression.

    model: {name: "examples.extending.model:Residual", width: 32, blocks: 2}
"""

import math

from torch import nn

from fedmpi.components import PositiveInt, component


class Block(nn.Module):
    """x + f(x)."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x):
        return x + self.inner(x)


@component
class Residual:
    """A residual network of linear layers."""

    width: PositiveInt = 32
    """Units of every layer."""
    blocks: PositiveInt = 2
    """Residual blocks."""

    def build(self, source):
        inputs = nn.Linear(math.prod(source.shape), self.width)
        blocks = [Block(self.width) for _ in range(self.blocks)]
        return nn.Sequential(nn.Flatten(), inputs, *blocks, nn.Linear(self.width, source.num_classes))


def perceptron(width=16):
    """For digits: `model: {name: "examples.extending.model:perceptron", width: 16}`."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
