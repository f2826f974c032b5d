"""The cost of checkpoints: the share of time that rounds wait for them.

    waited   seconds that rounds waited for checkpoints / seconds that rounds took
    ratio    median time of rounds while a checkpoint is being written / median of the others

Two silos train an MLP on random images, ten batches of 64 per round, with a checkpoint every ten rounds. Checkpoints go
to TMPDIR, which all ranks should see, and are removed afterwards.
"""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
from dataclasses import dataclass

import torch

from fedmpi.bench.timing import Row
from fedmpi.comm import Comm
from fedmpi.config import CheckpointSection, Config
from fedmpi.local import Sgd
from fedmpi.models import MLP
from fedmpi.train import Run
from fedmpi.types import Silo, SiloData, Source

EVERY = 10  # rounds between checkpoints
_BUSY = 3  # of EVERY: rounds in which a checkpoint may still be being written
_FEATURES, _CLASSES, _SAMPLES = 784, 10, 640


@dataclass(frozen=True)
class Noise:
    """Random images; only sizes matter here."""

    def source(self, seed: int) -> Source:
        """Two silos."""
        silos = tuple(Silo(f"silo-{i}", _SAMPLES) for i in range(2))
        return Source("classification", (_FEATURES,), _CLASSES, silos, self.open)

    def open(self, silo: str) -> SiloData:
        """A silo's samples."""
        x, y = torch.randn(_SAMPLES, _FEATURES), torch.randint(_CLASSES, (_SAMPLES,))
        return SiloData(x, y, x[:64], y[:64])


def checkpoint(comm: Comm, num_params: int, rounds: int = 30) -> Row:
    """Figures of one run with about `num_params` parameters. Collective."""
    out = comm.broadcast_text(tempfile.mkdtemp(prefix="fedmpi-bench-") if comm.rank == 0 else "", 0)
    config = Config(
        rounds=rounds,
        out=out,
        data=Noise(),
        model=MLP(hidden=(width(num_params),) * 2),
        local=Sgd(lr=0.01, steps=10, batch_size=64),
        checkpoint=CheckpointSection(every=EVERY),
    )
    try:
        with Run(config, comm=comm) as run:
            seconds = {record["round"]: record["seconds"] for record in run}
            found = run.parameters.numel()
        comm.barrier()
    finally:
        if comm.local_rank == 0:
            shutil.rmtree(out, ignore_errors=True)
    behind = [s["round"] for round, s in seconds.items() if round % EVERY == 1 and round > EVERY]
    without = [s["round"] for round, s in seconds.items() if round % EVERY > _BUSY]
    return {
        "waited": sum(s["checkpoint"] for s in seconds.values()) / sum(s["round"] for s in seconds.values()),
        "ratio": statistics.median(behind) / statistics.median(without),
        "params": found,
        "round_s": statistics.median(without),
        "rounds": rounds,
    }


def width(num_params: int) -> int:
    """Width of two hidden layers that give about `num_params` parameters: h^2 + (784 + 10 + 2) h + 10.

    >>> width(25_000_000), width(1)
    (4617, 1)
    """
    half = (_FEATURES + _CLASSES + 2) / 2
    return max(1, int(math.sqrt(half * half + max(0, num_params - _CLASSES)) - half))
