"""Measures the cost of local rules: their rounds over those of plain SGD with the same number of local steps.

    mpirun -n 2 python jobs/bench/rule_cost.py [--steps 20] [--turns 9] [--only RULE,RULE] [--quick] [KEY=VALUE ...]

Fashion-MNIST, 4 silos, a LeNet-like CNN, batches of 64; every rule that needs no more than lr and steps, the others are
reported. All runs are open at once and take turns, a round each, in another order every turn. Seconds are those of the
slowest rank, medians over turns without the first. Prints one line of JSON per rule, the cheapest first: `ratio` is of
whole rounds, `ratio_train` of their local training. KEY=VALUE are overrides, such as model=mlp.
"""

import argparse
import contextlib
import functools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import yaml

import fedmpi
from fedmpi.comm import connect
from fedmpi.components import build
from fedmpi.config import put
from fedmpi.data.fashion_mnist import FashionMnist
from fedmpi.errors import ConfigError
from fedmpi.local import RULES
from fedmpi.server import OPTIMIZERS
from fedmpi.types import Source


@dataclass(frozen=True)
class Fashion:
    """Fashion-MNIST, read once for all runs."""

    silos: int

    def source(self, seed: int) -> Source:
        return _opened(self.silos, seed)


@functools.cache
def _opened(silos: int, seed: int) -> Source:
    source = FashionMnist(silos=silos).source(seed)
    return replace(source, open=functools.cache(source.open))


def configs(
    names: list[str], rounds: int, steps: int, overrides: list[str], out: str
) -> dict[str, fedmpi.Config | str]:
    """A configuration per rule, or why lr and steps are not enough for it. The server part of a rule, if it has one,
    has the same name."""
    found: dict[str, Any] = {}
    for name in names:
        values: dict[str, Any] = {
            "rounds": rounds,
            "out": f"{out}/{name}",
            "data": Fashion(4),
            "model": "cnn",
            "local": {"name": name, "lr": 0.01, "steps": steps, "batch_size": 64},
            "evaluate": {"every": rounds},
            "checkpoint": {"every": rounds, "keep": 1},
            "records": {"trace": False},
        }
        for key, _, value in (override.partition("=") for override in overrides):
            put(values, key, yaml.safe_load(value))
        if name in OPTIMIZERS.members:
            values["server"] = {"optimizer": name}
        try:
            found[name] = build(fedmpi.Config, values)
        except ConfigError as error:
            found[name] = str(error)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="local steps per round")
    parser.add_argument("--turns", type=int, default=9, help="number of measured rounds")
    parser.add_argument("--only", default=",".join(RULES.members), metavar="RULE,RULE", help="rules besides sgd")
    parser.add_argument("--quick", action="store_true", help="smoke test: one step of a linear model on digits")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args(arguments)
    if given.quick:
        given.steps, given.turns, given.overrides = 1, 2, ["data=digits", "model=logistic", *given.overrides]
    comm = connect()
    names = ["sgd", *(name for name in given.only.split(",") if name != "sgd")]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        found = configs(names, given.turns + 1, given.steps, given.overrides, comm.broadcast_text(folder, 0))
        for name, why in found.items():
            if isinstance(why, str) and comm.rank == 0:
                print(f"rule_cost: {name} is left out: {why}", file=sys.stderr, flush=True)
        ready = {name: config for name, config in found.items() if not isinstance(config, str)}
        runs = {name: iter(stack.enter_context(fedmpi.Run(config, comm=comm))) for name, config in ready.items()}
        whole: dict[str, list[float]] = {name: [] for name in runs}
        training: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(given.turns + 1):
            order = list(runs)
            first = turn % len(order)
            for name in order[first:] + order[:first]:
                comm.share(np.zeros(1))
                start_s = time.perf_counter()
                record = next(runs[name])
                whole[name].append(float(comm.gather_number(time.perf_counter() - start_s).max()))
                training[name].append(record["seconds"]["train"])
        comm.barrier()
    if comm.rank == 0:
        seconds = {name: statistics.median(values[1:]) for name, values in whole.items()}
        train = {name: statistics.median(values[1:]) for name, values in training.items()}
        for name in sorted(seconds, key=lambda n: seconds[n]):
            figures = {
                "ratio": round(seconds[name] / seconds["sgd"], 4),
                "ratio_train": round(train[name] / train["sgd"], 4),
                "rule": name,
                "round_s": round(seconds[name], 5),
                "turns": given.turns,
                "steps": given.steps,
                "ranks": comm.size,
            }
            print(json.dumps(figures), flush=True)
    comm.finish()


if __name__ == "__main__":
    main()
