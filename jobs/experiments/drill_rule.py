"""The local rule of the drills (drill.py): SGD with pauses before batches, and with silos that are slow or send invalid
updates."""

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
    """pause before every batch, in seconds"""
    slow: str = ""
    """id of a silo that pauses `factor` times as long; empty: none"""
    factor: PositiveFloat = 10.0
    """how many times longer a slow silo pauses"""
    nan: str = ""
    """id of a silo that sends NaN; empty: none"""
    huge: str = ""
    """id of a silo that sends 1e30; empty: none"""
    first: PositiveInt = 1
    """first round in which silos are slow or send invalid updates"""

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
