"""Forty silos of Fashion-MNIST with lognormal speeds in virtual time: accuracy of four engines by seconds and bytes.

    python jobs/experiments/async_40.py [--out runs/async_40] [--to docs/assets/async_40.svg] [--seeds 3] [--quick]

A training takes a lognormal time (sigma 0.4) around 10 virtual seconds, times a lognormal factor of its silo (sigma 1),
and its transfers take a second. Silos have a Dirichlet mix of classes (0.3) and at most 120 images. Every seed draws
partition, speeds and batches anew. Bytes are those of a model down and an update up for each training that was begun.
Needs matplotlib. The last line is JSON: per engine the means over seeds. `--quick`: a smoke test of 40
virtual seconds.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.components import PositiveInt, build, component
from fedmpi.config import Config
from fedmpi.data.fashion_mnist import FashionMnist
from fedmpi.types import SiloData, Source

SILOS = 40
CLOCK = {
    "name": "virtual",
    "compute": {"name": "lognormal", "median": 10.0, "sigma": 0.4},
    "speed": {"name": "lognormal", "median": 1.0, "sigma": 1.0},
    "delay": {"name": "constant", "value": 1.0},
}
DEADLINE = {"name": "deadline", "deadline_s": 16.0, "late": "partial"}
STALENESS = {"name": "polynomial", "a": 0.5}
# By engine: its section, the server's learning rate, and rounds between two evaluations.
ENGINES: dict[str, tuple[dict[str, Any], float, int]] = {
    "synchronous": ({"name": "synchronous"}, 1.0, 1),
    "deadline": ({"name": "synchronous", "policy": DEADLINE}, 1.0, 2),
    "FedAsync": ({"name": "buffered", "size": 1, "staleness": STALENESS}, 0.2, 60),
    "FedBuff": ({"name": "buffered", "size": 10, "staleness": STALENESS}, 1.0, 6),
}
COLOURS = {"synchronous": "#4c78a8", "deadline": "#54a24b", "FedAsync": "#f58518", "FedBuff": "#b279a2"}
LEVELS = (0.6, 0.7, 0.75)


@component
class Few(FashionMnist):
    """Fashion-MNIST with at most so many images to a silo."""

    most: PositiveInt = 120
    """training images; a third of it for tests"""

    def source(self, seed: int) -> Source:
        whole = super().source(seed)

        def opened(silo: str) -> SiloData:
            x, y, x_test, y_test = whole.open(silo)
            num = self.most // 3
            return SiloData(x[: self.most], y[: self.most], x_test[:num], y_test[:num])

        return replace(whole, open=opened, silos=tuple(replace(silo, num_samples=None) for silo in whole.silos))


def settings(engine: str, seed: int, out: str) -> Config:
    """The configuration of a run."""
    section, lr, every = ENGINES[engine]
    data = Few(silos=SILOS, partition=build(FashionMnist, {"partition": {"name": "dirichlet", "alpha": 0.3}}).partition)
    values = {
        "seed": seed,
        "rounds": 100_000,
        "out": out,
        "data": data,
        "model": {"name": "mlp", "hidden": [32]},
        "local": {"name": "sgd", "lr": 0.05, "steps": 10, "batch_size": 20},
        "aggregate": {"name": "mean", "weights": "uniform"},
        "server": {"optimizer": {"name": "fedavg", "lr": lr}},
        "engine": section | {"clock": CLOCK},
        "evaluate": {"every": every},
        "checkpoint": {"every": 1_000_000},
        "records": {"trace": False},
        "device": {"name": "cpu"},
    }
    return build(Config, values)


def trained(engine: str, seed: int, until_s: float) -> list[tuple[float, float, float]]:
    """After each evaluation of a run: virtual seconds, megabytes and accuracy."""
    found, begun = [], 0
    with (
        tempfile.TemporaryDirectory() as out,
        fedmpi.Run(settings(engine, seed, f"{out}/run"), comm=SoloComm()) as run,
    ):
        vector_mb = 4e-6 * len(run.parameters)
        for record in run:
            begun += len(record["arrivals"]) if "arrivals" in record else len(record["cohort"])
            if record["virtual_s"] > until_s:
                break
            if (accuracy := record.get("accuracy")) is not None:
                found.append((record["virtual_s"], 2 * vector_mb * begun, float(accuracy)))
    return found


def first_at(rows: list[tuple[float, float, float]], column: int, level: float) -> float | None:
    """Seconds (column 0) or megabytes (1) when the mean of three evaluations first reaches the level; None: never."""
    if len(rows) < 3:
        return None
    accuracies = np.array([row[2] for row in rows])
    smooth = np.convolve(accuracies, np.ones(3) / 3, "valid")
    reached = np.flatnonzero(smooth >= level)
    return rows[int(reached[0]) + 2][column] if len(reached) else None


def mean(values: list[float | None]) -> float | None:
    """The mean, or None if one is missing."""
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 1) if len(known) == len(values) else None


def summary(results: dict[str, list[list[tuple[float, float, float]]]]) -> dict[str, Any]:
    """Per engine: means over seeds of seconds and megabytes to each level, and of the last three accuracies."""
    told: dict[str, Any] = {}
    for engine, runs in results.items():
        last = [row[2] for rows in runs for row in rows[-3:]]
        told[engine] = {"accuracy": round(float(np.mean(last)), 3) if last else None}
        for level in LEVELS:
            told[engine][f"seconds to {level}"] = mean([first_at(rows, 0, level) for rows in runs])
            told[engine][f"megabytes to {level}"] = mean([first_at(rows, 1, level) for rows in runs])
    return told


def draw(results: dict[str, list[list[tuple[float, float, float]]]], to: Path) -> None:
    """Draw accuracy against seconds and against bytes: a thin line per seed, a thick one for their mean."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9})
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.2), layout="constrained", sharey=True)
    for engine, runs in results.items():
        for column, axis in enumerate(axes):
            stop = min(rows[-1][column] for rows in runs)
            grid = np.linspace(max(rows[0][column] for rows in runs), stop, 60)
            lines = [np.interp(grid, [row[column] for row in rows], [row[2] for row in rows]) for rows in runs]
            for line in lines:
                axis.plot(grid, line, color=COLOURS[engine], linewidth=0.5, alpha=0.5)
            axis.plot(grid, np.mean(lines, axis=0), color=COLOURS[engine], linewidth=2, label=engine)
    axes[0].set_ylabel("test accuracy")
    axes[0].set_xlabel("virtual seconds")
    axes[1].set_xlabel("megabytes, down and up")
    axes[1].set_xscale("log")
    axes[0].legend(frameon=False, loc="lower right")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/async_40"))
    parser.add_argument("--to", type=Path, default=Path("docs/assets/async_40.svg"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--until", type=float, default=800.0, help="virtual seconds")
    parser.add_argument("--quick", action="store_true", help="one seed, 40 virtual seconds, no figure")
    args = parser.parse_args()
    seeds, until_s = (1, 40.0) if args.quick else (args.seeds, args.until)
    results = {engine: [trained(engine, seed, until_s) for seed in range(seeds)] for engine in ENGINES}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results))
    if not args.quick:
        draw(results, args.to)
    print(json.dumps(summary(results)))


if __name__ == "__main__":
    main()
