"""What one slow silo costs: rounds with it, without it, and with `engine.policy: deadline`.

    mpirun -n 4 python jobs/experiments/late_silos.py [--steps 200] [--step-ms 10] [--slower 10] [--lr 0.05] [--quick]

Each rank has one silo of digits whose steps take `--step-ms`, slept and not computed; those of the last silo take
`--slower` times as long in all rounds but the first. The last line is JSON: for each way to treat the late silo the
median round in units of the undisturbed round, and the final test loss and accuracy. The deadline is one undisturbed
round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch

import fedmpi
from fedmpi.comm import connect
from fedmpi.components import NonNegativeFloat, PositiveFloat, build, component
from fedmpi.config import Config
from fedmpi.flat import FlatModel
from fedmpi.local import LocalSilo, Round, Sgd
from fedmpi.types import Contribution

WAYS = ("all", "partial", "drop", "buffer")


@component
class Paced(Sgd):
    """Sleeps before each step."""

    step_s: NonNegativeFloat = 0.0
    """seconds of a step"""
    slow: str = ""
    """the silo that is slower, from round 2 on"""
    slower: PositiveFloat = 10.0
    """how many times"""

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        pause_s = self.step_s * (self.slower if silo.id == self.slow and round.number > 1 else 1.0)

        def check() -> None:
            time.sleep(pause_s)
            round.check()

        return super().train(silo, model, params_P, replace(round, check=check))


def trained(values: dict[str, Any], rule: dict[str, Any], policy: Any, out: str) -> list[dict[str, Any]]:
    """The records of a run."""
    local = Paced(batch_size=16, **rule)
    engine = {"name": "synchronous", "policy": policy}
    with fedmpi.Run(build(Config, values | {"out": out, "engine": engine, "local": local}), comm=connect()) as run:
        return list(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--slower", type=float, default=10.0)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="smoke test: 2 rounds of 20 steps")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rounds = 20, 2
    comm = connect()
    values = {
        "rounds": args.rounds,
        "data": {"name": "digits", "silos": comm.size, "partition": {"name": "dirichlet", "alpha": 0.3}},
        "records": {"trace": False},
        "device": {"name": "cpu"},
        "checkpoint": {"every": 1000},
    }
    rule = {"lr": args.lr, "steps": args.steps, "step_s": args.step_ms / 1e3, "slower": args.slower}
    root = comm.broadcast_text(tempfile.mkdtemp() if comm.rank == 0 else "", 0)
    even = trained(values, rule, "all", f"{root}/even")
    even_s = statistics.median(record["seconds"]["round"] for record in even[1:])
    slow = list(even[0]["silos"])[-1]
    rows: dict[str, Any] = {"even": {"round_s": even_s, "loss": even[-1]["loss"], "accuracy": even[-1]["accuracy"]}}
    for way in WAYS:
        deadline = {"name": "deadline", "deadline_s": even_s, "min_silos": comm.size - 1, "late": way}
        records = trained(values, rule | {"slow": slow}, "all" if way == "all" else deadline, f"{root}/{way}")
        seconds = statistics.median(record["seconds"]["round"] for record in records[1:])
        rows[way] = {"rounds": seconds / even_s, "loss": records[-1]["loss"], "accuracy": records[-1]["accuracy"]}
    if comm.rank == 0:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
