"""MNIST: 60,000 + 10,000 images of 28x28, ten digits (LeCun et al. 1998), partitioned over silos."""

from __future__ import annotations

from typing import ClassVar

from fedmpi.components import component
from fedmpi.data.idx import IdxImages


@component
class Mnist(IdxImages):
    """Grey images of handwritten digits; x is [1, 28, 28], standardised by fixed constants."""

    folder: ClassVar[str] = "mnist"
    mean: ClassVar[float] = 0.1307
    std: ClassVar[float] = 0.3081
