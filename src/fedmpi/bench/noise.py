"""Silos of random images, and an MLP of any size for them: work for benchmarks that train."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedmpi.types import Silo, SiloData, Source

_FEATURES, _CLASSES, _SAMPLES = 784, 10, 640


@dataclass(frozen=True)
class Noise:
    """Random images; only sizes matter here."""

    num_silos: int = 2

    def source(self, seed: int) -> Source:
        """Silos of equal size."""
        silos = tuple(Silo(f"silo-{i}", _SAMPLES) for i in range(self.num_silos))
        return Source("classification", (_FEATURES,), _CLASSES, silos, self.open)

    def open(self, silo: str) -> SiloData:
        """A silo's samples."""
        draw = torch.Generator().manual_seed(int(silo.removeprefix("silo-")))
        x = torch.randn(_SAMPLES, _FEATURES, generator=draw)
        y = torch.randint(_CLASSES, (_SAMPLES,), generator=draw)
        return SiloData(x, y, x[:64], y[:64])


def width(num_params: int) -> int:
    """Width of two hidden layers that give about `num_params` parameters: h^2 + (784 + 10 + 2) h + 10.

    >>> width(25_000_000), width(1)
    (4617, 1)
    """
    half = (_FEATURES + _CLASSES + 2) / 2
    return max(1, int(math.sqrt(half * half + max(0, num_params - _CLASSES)) - half))
