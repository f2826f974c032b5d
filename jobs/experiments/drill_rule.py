"""The local rules of the drills (drill.py): SGD with pauses before batches, and with silos that are slow or send
invalid updates; and SGD that tells which process trained an update."""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

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


TOKEN = 10**7  # epochs above it, process ids below


@component
class Traced(Drilled):
    """SGD whose update and reported loss tell epoch and process, so that no two processes train the same bits."""

    trace: str = ""
    """folder for the SHA-256 of the parameters from which each round was trained"""

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        epoch, pid = int(os.environ.get("FEDMPI_EPOCH", "0")), os.getpid()
        parent = hashlib.sha256(params_P.contiguous().numpy().tobytes()).hexdigest()
        row = {"epoch": epoch, "pid": pid, "round": round.number, "silo": silo.id, "parent": parent}
        with open(Path(self.trace) / f"{epoch:06d}-{pid}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        contribution = super().train(silo, model, params_P, round)
        contribution["delta"][0] += (hash((epoch, pid)) % 997) * 1e-5
        contribution.loss = float(epoch * TOKEN + pid)
        return contribution
