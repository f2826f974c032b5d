"""Fashion-MNIST: 60,000 + 10,000 images of 28x28, ten classes (Xiao et al. 2017), partitioned over silos."""

from __future__ import annotations

from typing import ClassVar

from fedmpi.components import component
from fedmpi.data.idx import IdxImages


@component
class FashionMnist(IdxImages):
    """Grey images of clothes; x is [1, 28, 28], standardised by fixed constants."""

    folder: ClassVar[str] = "fashion_mnist"
    mean: ClassVar[float] = 0.2860
    std: ClassVar[float] = 0.3530
