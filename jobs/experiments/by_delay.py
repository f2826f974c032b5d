"""What work by measured delays gains: eight silos of digits with lognormal speeds in virtual time.

    python jobs/experiments/by_delay.py [--seeds 3] [--until 900] [--level 0.85] [--engine buffered] [--quick]

A step takes half a virtual second (lognormal for each training, sigma 0.2), times a lognormal factor of its silo (1),
and transfers take a second. Silos have a Dirichlet mix of classes (0.3). Every seed draws partition, speeds and batches
anew. `whole` is the same number of steps for all silos: 20, which by_delay has as its most, and 5, since by_delay
also makes rounds shorter. Each case trains with all learning rates of RATES; its row has the one that is fastest in the
mean of the seeds. Prints a line of JSON for each case: virtual seconds until the mean of three evaluations is at the
level, by seed and as a mean; the accuracy at the end; and the mean staleness. `--quick`: a smoke test.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

import numpy as np

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.components import build
from fedmpi.config import Config

CLOCK = {
    "name": "virtual",
    "speed": {"name": "lognormal", "median": 1.0, "sigma": 1.0},
    "delay": {"name": "constant", "value": 1.0},
}
STEPS, STEP_S, BUDGET_S = 20, 0.5, 6.0
RATES = (0.3, 0.9, 2.7)
ENGINES: dict[str, dict[str, Any]] = {
    "synchronous": {"name": "synchronous"},
    "buffered": {"name": "buffered", "size": 2},
}
FIXED = {"whole": STEPS, "whole, 5 steps": 5}
AMOUNTS: dict[str, Any] = {
    **dict.fromkeys(FIXED, "whole"),
    "by_delay, fewest": {"name": "by_delay", "budget_s": BUDGET_S},
    "by_delay, mean": {"name": "by_delay", "budget_s": BUDGET_S, "rates": "mean"},
    "by_delay, equal": {"name": "by_delay", "budget_s": BUDGET_S, "rates": "equal"},
}


def settings(engine: str, amount: str, lr: float, seed: int, out: str) -> Config:
    """The configuration of a run."""
    steps = FIXED.get(amount, STEPS)
    compute = {"name": "lognormal", "median": steps * STEP_S, "sigma": 0.2}
    values = {
        "seed": seed,
        "rounds": 100_000,
        "out": out,
        "data": {"name": "digits", "silos": 8, "partition": {"name": "dirichlet", "alpha": 0.3}},
        "model": "logistic",
        "local": {"name": "sgd", "lr": lr, "steps": steps, "batch_size": 16, "amount": AMOUNTS[amount]},
        "aggregate": {"name": "mean", "weights": "uniform"},
        "engine": ENGINES[engine] | {"clock": {**CLOCK, "compute": compute}},
        "evaluate": {"every": 1 if engine == "synchronous" else 4},
        "checkpoint": {"every": 1_000_000},
        "records": {"trace": False},
        "device": {"name": "cpu"},
    }
    return build(Config, values)


def trained(engine: str, amount: str, lr: float, seed: int, until_s: float, level: float) -> dict[str, Any]:
    """Virtual seconds until the level (None: never), the accuracy at the end, and the mean staleness."""
    accuracies: list[float] = []
    stale: list[int] = []
    reached = None
    with (
        tempfile.TemporaryDirectory() as out,
        fedmpi.Run(settings(engine, amount, lr, seed, out), comm=SoloComm()) as run,
    ):
        for record in run:
            stale += [one["staleness"] for one in record.get("arrivals", ())]
            if (accuracy := record.get("accuracy")) is not None:
                accuracies.append(float(accuracy))
                if len(accuracies) > 2 and np.mean(accuracies[-3:]) >= level:
                    reached = record["virtual_s"]
                    break
            if record["virtual_s"] > until_s:
                break
    return {"seconds": reached, "end": round(accuracies[-1], 3), "stale": round(float(np.mean(stale or [0])), 1)}


def of_rate(found: list[dict[str, Any]], until_s: float) -> float:
    """Mean seconds over seeds; twice the time of a run for one that has not reached the level."""
    return float(np.mean([2 * until_s if one["seconds"] is None else one["seconds"] for one in found]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--until", type=float, default=900.0, help="virtual seconds of a run")
    parser.add_argument("--level", type=float, default=0.85)
    parser.add_argument("--engine", choices=ENGINES, help="one of the two; default: both")
    parser.add_argument("--quick", action="store_true", help="one seed, one rate, a few rounds")
    args = parser.parse_args()
    rates = RATES
    if args.quick:
        args.seeds, args.until, args.level, rates = 1, 30.0, 0.3, RATES[:1]
    for engine in ENGINES if args.engine is None else (args.engine,):
        for amount in AMOUNTS:
            runs = {
                lr: [trained(engine, amount, lr, seed, args.until, args.level) for seed in range(args.seeds)]
                for lr in rates
            }
            best = min(runs, key=lambda lr: of_rate(runs[lr], args.until))
            found = runs[best]
            seconds = [one["seconds"] for one in found]
            mean = None if None in seconds else round(of_rate(found, args.until), 1)
            told = {"engine": engine, "amount": amount, "lr": best, "seconds": mean, "by_seed": seconds}
            more = {name: round(float(np.mean([one[name] for one in found])), 3) for name in ("end", "stale")}
            print(json.dumps(told | more), flush=True)


if __name__ == "__main__":
    main()
