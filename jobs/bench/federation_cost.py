"""Measures the overhead of federation: rounds of `fedmpi.Run` over a plain torch loop with the same local work.

    mpirun -n 2 python jobs/bench/federation_cost.py [ROUNDS] [--quick] [--config FILE] [KEY=VALUE ...]

On every rank, both train each silo of the rank from the global parameters for its local epochs, and evaluate it on its
test data; they alternate. The plain loop has no exchange: it is what one would write in torch without fedmpi. Times are
medians over rounds of the slowest rank; the ratio comes first.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fedmpi
from fedmpi.comm import connect

CONFIGS = Path(__file__).parents[2] / "configs"


def plain_round(module: torch.nn.Module, silos: dict[str, Any], work: Any, batch: int) -> None:
    """The same epochs over the same silos, as plain torch code."""
    for silo in silos.values():
        local = copy.deepcopy(module)
        local.train()
        optimizer = torch.optim.SGD(local.parameters(), lr=work.lr, **work.optimizer.arguments)
        x, y = silo.data.x_train, silo.data.y_train
        for _ in range(work.epochs):
            order = torch.randperm(len(x))
            for start in range(0, len(x), work.batch_size):
                rows = order[start : start + work.batch_size]
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(local(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        local.eval()
        with torch.no_grad():
            for start in range(0, len(silo.data.x_test), batch):
                outputs = local(silo.data.x_test[start : start + batch])
                (outputs.argmax(1) == silo.data.y_test[start : start + batch]).sum().item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke test: 3 rounds on digits")
    parser.add_argument("--config", type=Path, help="default: configs/fashion.yaml")
    parser.add_argument("rest", nargs="*", metavar="ROUNDS or KEY=VALUE", help="default: 8 rounds")
    given = parser.parse_args(arguments)
    overrides = [word for word in given.rest if "=" in word]
    rounds = next((int(word) for word in given.rest if "=" not in word), 3 if given.quick else 8)
    config_file = given.config or CONFIGS / ("digits.yaml" if given.quick else "fashion.yaml")
    comm = connect()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"rounds={rounds}", f"out={comm.broadcast_text(folder, 0)}/run", "local.epochs=1", *overrides]
        seconds: dict[str, list[float]] = {"fedmpi": [], "plain": []}
        phases: dict[str, float] = {}
        with fedmpi.Run(config_file, *overrides, comm=comm) as run:
            config, silos = run.config, run.federation.silos
            plain = copy.deepcopy(run.model)
            records = iter(run)

            def ours() -> None:
                phases.update(next(records)["seconds"])

            def theirs() -> None:
                plain_round(plain, silos, config.local, config.evaluate.batch_size)

            work: dict[str, Callable[[], None]] = {"fedmpi": ours, "plain": theirs}
            for number in range(rounds):
                for name in sorted(work, reverse=bool(number % 2)):
                    comm.share(np.zeros(1))
                    start = time.perf_counter()
                    work[name]()
                    seconds[name].append(float(comm.gather_number(time.perf_counter() - start).max()))
        comm.barrier()
    if comm.rank == 0:
        median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        figures = {
            "ratio": round(median["fedmpi"] / median["plain"], 4),
            "fedmpi_s": round(median["fedmpi"], 4),
            "plain_s": round(median["plain"], 4),
            "rounds": rounds - 1,
            "ranks": comm.size,
            "last_round_s": {k: round(v, 5) for k, v in phases.items()},
        }
        print(json.dumps(figures), flush=True)
    comm.finish()


if __name__ == "__main__":
    main()
