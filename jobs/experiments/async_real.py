"""Asynchronous against synchronous rounds in real time, with one silo of four five times slower.

    mpirun -n 4 python jobs/experiments/async_real.py [--step-ms 20] [--slower 5] [--level 0.8] [--replays 10] [--quick]

Each rank has one silo of Fashion-MNIST whose steps take `--step-ms`, slept besides what they take to compute; those of
the last silo take `--slower` times as long. The last line is JSON: for each engine the real seconds of training until
the test accuracy is `--level`, server steps, and updates; and how many replays of the asynchronous run had its SHA-256.
`--quick`: a smoke test with digits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch

import fedmpi
from fedmpi.comm import SoloComm, connect
from fedmpi.components import NonNegativeFloat, PositiveFloat, build, component
from fedmpi.config import Config
from fedmpi.flat import FlatModel, sha256
from fedmpi.local import LocalSilo, Round, Sgd
from fedmpi.types import Contribution


@component
class Paced(Sgd):
    """Sleeps before each step."""

    step_s: NonNegativeFloat = 0.0
    """seconds of a step"""
    slow: str = ""
    """the silo that is slower"""
    slower: PositiveFloat = 5.0
    """how many times"""

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        pause_s = self.step_s * (self.slower if silo.id == self.slow else 1.0)

        def check() -> None:
            time.sleep(pause_s)
            round.check()

        return super().train(silo, model, params_P, replace(round, check=check))


def settings(args: argparse.Namespace, engine: dict[str, Any], out: str, paced: bool) -> Config:
    """The configuration of a run."""
    pace = {"step_s": args.step_ms / 1e3 * paced, "slower": args.slower, "slow": "silo-3"}
    data = {"name": "digits" if args.quick else "fashion_mnist", "silos": 4}
    values = {
        "rounds": args.rounds,
        "out": out,
        "data": data | {"partition": {"name": "dirichlet", "alpha": 0.5}},
        "model": {"name": "mlp", "hidden": [64]},
        "aggregate": {"name": "mean", "weights": "uniform"},
        "engine": engine,
        "checkpoint": {"every": 1_000_000},
        "records": {"trace": False},
        "device": {"name": "cpu"},
    }
    return build(Config, values | {"local": Paced(lr=0.05, steps=args.steps, batch_size=64, **pace)})


def trained(config: Config, comm: Any, level: float) -> tuple[dict[str, Any], str]:
    """Seconds, server steps and updates until the accuracy is `level`, and the SHA-256 of the parameters then."""
    updates = 0
    with fedmpi.Run(config, comm=comm) as run:
        began_s = time.monotonic()
        for record in run:
            updates += len(record["arrivals"]) if "arrivals" in record else len(record["cohort"])
            if record.get("accuracy", 0.0) >= level:
                break
        told = {"seconds": round(time.monotonic() - began_s, 1), "server_steps": record["round"], "updates": updates}
        return told | {"accuracy": round(record["accuracy"], 3)}, sha256(run.parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--slower", type=float, default=5.0)
    parser.add_argument("--level", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=200, help="the most server steps")
    parser.add_argument("--replays", type=int, default=10)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.step_ms, args.steps, args.rounds, args.replays, args.level = 1.0, 5, 4, 2, 0.99
    comm = connect()
    root = comm.broadcast_text(tempfile.mkdtemp() if comm.rank == 0 else "", 0)
    buffered = {"name": "buffered", "size": 2, "max_staleness": 20}
    found: dict[str, Any] = {}
    found["synchronous"], _ = trained(settings(args, {"name": "synchronous"}, f"{root}/same", True), comm, args.level)
    found["buffered"], wanted = trained(settings(args, buffered, f"{root}/real", True), comm, args.level)
    if comm.rank == 0:
        again = buffered | {"clock": {"name": "replay", "run": f"{root}/real"}}
        args.rounds = found["buffered"]["server_steps"]
        for number in range(args.replays):
            _, bits = trained(settings(args, again, f"{root}/again-{number}", False), SoloComm(), 2.0)
            found["same_bits"] = found.get("same_bits", 0) + (bits == wanted)
        found["replays"] = args.replays
        print(json.dumps(found), flush=True)
    comm.barrier()


if __name__ == "__main__":
    main()
