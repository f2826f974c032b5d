"""What checkpoints cost a run of 25 million parameters: the share of their time that rounds wait for them.

    mpirun -n 2 python jobs/checkpoint_cost.py [ROUNDS]

An MLP of 25 M parameters, a checkpoint every 10 rounds. `waited` is what the records say; `ratio` compares the median
round while a checkpoint is being written with the median of the others.
"""

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass

import torch

import fedmpi
from fedmpi.comm import connect
from fedmpi.config import CheckpointSection
from fedmpi.local import Sgd
from fedmpi.models import MLP
from fedmpi.types import Silo, SiloData, Source


@dataclass(frozen=True)
class Noise:
    """Random images: only sizes matter here."""

    def source(self, seed: int) -> Source:
        silos = tuple(Silo(f"silo-{i}", 640) for i in range(2))
        return Source("classification", (784,), 10, silos, self.open)

    def open(self, silo: str) -> SiloData:
        x, y = torch.randn(640, 784), torch.randint(10, (640,))
        return SiloData(x, y, x[:64], y[:64])


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    comm = connect()
    out = comm.say(tempfile.mkdtemp() if comm.rank == 0 else "", 0)
    config = fedmpi.Config(
        rounds=rounds,
        out=out,
        data=Noise(),
        model=MLP(hidden=[4096, 4096, 1120]),
        local=Sgd(lr=0.01, steps=10, batch_size=64),
        checkpoint=CheckpointSection(every=10),
    )
    with fedmpi.Run(config, comm_=comm) as run:
        records = list(run)
    if comm.rank == 0:
        total = sum(r["seconds"]["round"] for r in records)
        busy = [r["seconds"]["round"] for r in records if r["round"] % 10 == 1 and r["round"] > 1]
        idle = [r["seconds"]["round"] for r in records if r["round"] % 10 > 3]
        figures = {
            "waited": round(sum(r["seconds"]["checkpoint"] for r in records) / total, 5),
            "ratio": round(statistics.median(busy) / statistics.median(idle), 4),
            "params": run.params_P.numel(),
            "round_s": round(statistics.median(idle), 3),
            "rounds": rounds,
        }
        print(json.dumps(figures))


main()
