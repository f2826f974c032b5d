"""Fed-Heart-Disease from the published initial weights and batch orders: several seeds and methods in one launch.

Arguments: FOLDER PLAN SEEDS [METHOD ...]; seeds separated by commas, or all; all methods by default. Rank 0 prints one
JSON line per run: the largest distance from the published final weights, and each hospital's accuracy with the
published one.
"""

import csv
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import fedmpi
from fedmpi.comm import connect
from fedmpi.config import CheckpointSection, EvaluateSection, ServerSection
from fedmpi.data.heart_disease import HeartDisease
from fedmpi.exchange.config import ExchangeSection
from fedmpi.local import Sgd
from fedmpi.local.control_variates import Scaffold
from fedmpi.local.gradient import FedProx
from fedmpi.models import Logistic
from fedmpi.server import FedAdagrad, FedAdam, FedAvg, FedYogi

SILOS = ("cleveland", "hungary", "switzerland", "longbeach")
SEEDS = (42, 43, 44, 45, 46)
ADAPTIVE = {"tau": 1e-8, "v0": 0.0, "beta1": 0.9}
METHODS = {  # rule, its arguments, server
    "FedAvg100": (Sgd, {"lr": 0.001}, FedAvg()),
    "FedProx100": (FedProx, {"lr": 0.001, "mu": 0.01}, FedAvg()),
    "Scaffold100": (Scaffold, {"lr": 0.001, "variant": "benchmark"}, FedAvg()),
    "FedAdam100": (Sgd, {"lr": 0.01}, FedAdam(lr=0.01, beta2=0.999, **ADAPTIVE)),
    "FedYogi100": (Sgd, {"lr": 0.003162}, FedYogi(lr=0.01, beta2=0.999, **ADAPTIVE)),
    "FedAdagrad100": (Sgd, {"lr": 0.003162}, FedAdagrad(lr=0.316228, **ADAPTIVE)),
}


@dataclass(frozen=True)
class Published:
    """The order of samples in which the benchmark's run visited them."""

    traces: str
    key: str

    def order(self, seed: int, silo: str, epoch: int, num_samples: int) -> np.ndarray:
        whole = _stored(self.traces)[f"{self.key}|order{SILOS.index(silo)}"]
        return whole[epoch * num_samples : (epoch + 1) * num_samples].astype(np.int64)


_loaded: dict[str, dict[str, np.ndarray]] = {}


def _stored(path: str) -> dict[str, np.ndarray]:
    if path not in _loaded:
        with np.load(path) as file:
            _loaded[path] = {name: file[name] for name in file.files}
    return _loaded[path]


def published_accuracies(folder: Path, seed: int, method: str) -> list[float]:
    """Accuracies of the four hospitals, in the order of SILOS."""
    with open(folder / f"heart_seed{seed}.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["Method"] == method]
    return [next(float(row["Metric"]) for row in rows if row["Test"] == f"client_test_{silo}") for silo in range(4)]


def main() -> None:
    root = Path(sys.argv[1])
    plan = sys.argv[2]
    seeds = SEEDS if sys.argv[3] == "all" else tuple(int(seed) for seed in sys.argv[3].split(","))
    methods = {name: METHODS[name] for name in sys.argv[4:] or METHODS}
    folder = root / "flamby_heart"
    traces = str(folder / "heart_traces.npz")
    comm = connect()
    scratch = Path(comm.broadcast_text(tempfile.mkdtemp() if comm.rank == 0 else "", 0))
    for seed in seeds:
        init = _stored(traces)[f"{seed}|init"]
        weight, bias = torch.from_numpy(init[None, :13].copy()), torch.from_numpy(init[13:].copy())
        start = scratch / f"{seed}-{comm.rank}.safetensors"
        save_file({"linear.weight": weight, "linear.bias": bias}, start)
        for method, (rule, takes, optimizer) in methods.items():
            config = fedmpi.Config(
                rounds=15,
                out=str(scratch / f"{seed}-{method}"),
                init=str(start),
                data=HeartDisease(root=root),
                model=Logistic(),
                local=rule(**takes, steps=100, batch_size=4, sampler=Published(traces, f"{seed}|FedAvg100")),
                server=ServerSection(optimizer=optimizer),
                exchange=ExchangeSection(plan=plan),
                evaluate=EvaluateSection(every=15),
                checkpoint=CheckpointSection(every=15),
            )
            with fedmpi.Run(config, comm=comm) as run:
                for _ in run:
                    pass
                stored = _stored(traces)[f"{seed}|{method}|w"]
                distance = float(np.abs(run.parameters.numpy() - stored).max())
                ours = [run.record["silos"][silo]["accuracy"] for silo in SILOS]
            if comm.rank == 0:
                theirs = published_accuracies(folder, seed, method)
                row = {"seed": seed, "method": method, "distance": distance, "ours": ours, "published": theirs}
                print(json.dumps(row), flush=True)


main()
