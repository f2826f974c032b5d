"""A user's own model and selector, with faults on request. Tests copy it beside a configuration.

The environment selects the fault, so that the configuration stays the same when the run resumes:

    AFTER    batches that a silo trains normally, counted per process and silo
    SLEEP_S  then every batch sleeps this long
    RAISE    then these silos raise
    EXIT     then this silo's process exits without a word
    ODD      the rank whose selector raises in round 2
    SAYS_NO  the rank whose selector raises a rejection in round 2, marked as raised by all ranks
    STEP_S   seconds that the server's step takes
    STEP_ODD the rank on which the step raises
    STEP_NO  the rank on which it raises a rejection in round 2, marked as raised by all ranks
    SLOW_S   seconds that every file of a checkpoint takes
    NO_ROOM  the rank on which the selector finds no memory at the start
"""

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from fedmpi import checkpoint
from fedmpi.errors import FedmpiError
from fedmpi.server import FedAvg

AFTER = int(os.environ.get("AFTER", "0"))
SLEEP_S = float(os.environ.get("SLEEP_S", "0"))
steps = [0]  # of the server
batches: Counter[tuple[int, str]] = Counter()  # by model and silo; an attribute would restart in every round
RANK = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0"))


if SLOW_S := float(os.environ.get("SLOW_S", "0")):
    write_file = checkpoint.write_file

    def slow_file(*args):
        time.sleep(SLOW_S)
        return write_file(*args)

    checkpoint.write_file = slow_file


class Net(torch.nn.Linear):
    """Logits; x[0] of every sample is the number of its silo."""

    def __init__(self) -> None:
        super().__init__(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            silo = "abcd"[int(x[0, 0])]
            batches[id(self), silo] += 1
            if batches[id(self), silo] > AFTER:
                happen(silo)
        return super().forward(x)


def happen(silo: str) -> None:
    """Trigger the fault that the environment names for this silo."""
    if silo in os.environ.get("RAISE", ""):
        Path(f"raised-{os.getpid()}").touch()
        raise RuntimeError(f"boom in {silo}")
    if os.environ.get("EXIT") == silo:
        os._exit(1)
    if SLEEP_S:
        Path(f"busy-{os.getpid()}").touch()
        time.sleep(SLEEP_S)


@dataclass(frozen=True)
class Odd:
    """A selector of all silos that fails on one rank only, outside of the silos' work."""

    def init(self, num_silos):
        if os.environ.get("NO_ROOM") == RANK:
            raise MemoryError("no room")
        return {}

    def select(self, ids, state, outcome, rng):
        if os.environ.get("ODD") == RANK and outcome is not None:
            raise LookupError("odd")
        if os.environ.get("SAYS_NO") == RANK and outcome is not None:
            raise FedmpiError("no silo suits me")
        return list(ids), state


@dataclass(frozen=True)
class Late(FedAvg):
    """A server whose step is slow, or fails on one rank only."""

    def step(self, params_P, mean_P, state):
        time.sleep(float(os.environ.get("STEP_S", "0")))
        if os.environ.get("STEP_ODD") == RANK:
            raise LookupError("odd step")
        steps[0] += 1
        if os.environ.get("STEP_NO") == RANK and steps[0] > 1:
            raise FedmpiError("no such step")
        return super().step(params_P, mean_P, state)
