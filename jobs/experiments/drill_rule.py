"""The local rule of the drills (drill.py): SGD whose batches take longer than the digits need, and whose silos can be
slow or send what no update may be."""

import math
import time
from collections.abc import Iterator

import torch

from fedmpi.components import NonNegativeFloat, PositiveFloat, PositiveInt, component
from fedmpi.flat import FlatModel
from fedmpi.local import LocalSilo, Round, Sgd
from fedmpi.types import Contribution

POISON = {"nan": math.nan, "huge": 1e30}


@component
class Drilled(Sgd):
    """SGD with a pause before every batch."""

    pause_s: NonNegativeFloat = 0.0
    """before every batch"""
    slow: str = ""
    """id of a silo that pauses `factor` times as long; empty: none"""
    factor: PositiveFloat = 10.0
    """see `slow`"""
    nan: str = ""
    """id of a silo that sends NaN; empty: none"""
    huge: str = ""
    """id of a silo that sends 1e30; empty: none"""
    first: PositiveInt = 1
    """the round from which silos are slow or send such updates"""

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        contribution = super().train(silo, model, params_P, round)
        for what, value in POISON.items():
            if silo.id == getattr(self, what) and round.number >= self.first:
                contribution["delta"].fill_(value)
        return contribution

    def batches(
        self, silo: LocalSilo, seed: int, amount: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        is_slow = silo.id == self.slow and silo.cursor >= (self.first - 1) * (self.epochs or 0) * len(silo.data.x_train)
        for batch in super().batches(silo, seed, amount):
            time.sleep(self.pause_s * (self.factor if is_slow else 1.0))
            yield batch
