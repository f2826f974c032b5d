"""Runs on least-squares silos with models, layers or statistics of their own."""

import torch
from torch import nn

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.components import build
from fedmpi.config import Config
from support.equations import BATCH

TUNE = {"name": "sgd", "lr": 0.02, "epochs": 2, "batch_size": BATCH, "sampler": "in_order"}


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm = nn.Linear(3, 4, dtype=torch.float64), nn.BatchNorm1d(4, dtype=torch.float64)
        self.head = nn.Linear(4, 1, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).tanh()).squeeze(-1)


def config(out, local=None, rounds=3, **other):
    values = {
        "rounds": rounds,
        "out": str(out),
        "data": "support.equations:Quadratics",
        "model": "support.equations:linear",
        "device": {"name": "cpu"},
        **other,
        "local": {"lr": 0.05, "batch_size": BATCH, **(local or {"name": "sgd", "epochs": 1})},
    }
    return build(Config, values)


def done(config):
    """The records, and the finished run."""
    with fedmpi.Run(config, comm=SoloComm()) as run:
        records = list(run)
        run.final_P = run.parameters.clone()  # type: ignore[attr-defined]
        run.silos = dict(run.federation.silos)  # type: ignore[attr-defined]
    return records, run
