"""Accuracy against epsilon at silo level: Fashion-MNIST at 50 silos, with three kinds of noise.

    FEDMPI_DATA=... python jobs/experiments/private_fashion.py [--seeds 2] [--out FOLDER] [--svg FILE] [--quick]

    gaussian     a fixed clip, independent noise
    adaptive     the clip follows the median of the norms (Andrew et al. 2021)
    correlated   a fixed clip, noise correlated over 5 rounds (Kalinin & Lampert 2024)

A softmax regression; ten silos per round in turn (`select: round_robin`), 50 rounds, so that each silo has 10 turns;
ten local steps of 64 samples. Epsilon is that of the whole run at delta 1e-3. One JSON line per kind, epsilon and
seed: the test accuracy after the last round. With `--out` runs are kept in FOLDER/results.jsonl and not run again.
`--svg` draws the means over the seeds. `--quick`: digits in place of Fashion-MNIST, ten rounds, one epsilon, one seed.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.components import build
from fedmpi.config import Config

EPSILONS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
KINDS: dict[str, dict[str, Any]] = {"gaussian": {}, "adaptive": {"quantile": 0.5}, "correlated": {"bands": 5}}
CLIP, DELTA, SILOS, TURNS = 0.3, 1e-3, 50, 5


def accuracy(kind: str, epsilon: float | None, seed: int, out: Path, quick: bool) -> dict[str, Any]:
    """One run; epsilon None: without privacy."""
    private: dict[str, Any] = {"name": "silo", "clip": CLIP, "epsilon": epsilon, "delta": DELTA, **KINDS.get(kind, {})}
    values = {
        "out": str(out),
        "seed": seed,
        "rounds": 10 if quick else 50,
        "data": {"name": "digits" if quick else "fashion_mnist", "silos": SILOS},
        "model": "logistic",
        "local": {"name": "sgd", "lr": 0.05, "steps": 10, "batch_size": 8 if quick else 64},
        "select": {"name": "round_robin", "count": SILOS // TURNS},
        "aggregate": {"name": "mean", "weights": "uniform"},
        "privacy": None if epsilon is None else private,
        "evaluate": {"every": 10 if quick else 50},
        "checkpoint": {"every": 1000},
        "device": {"name": "cpu"},
    }
    with fedmpi.Run(build(Config, values), comm=SoloComm()) as run:
        *_, record = run
    return {"kind": kind, "epsilon": epsilon, "seed": seed, "accuracy": record["accuracy"]}


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """The means over the seeds, one line per kind."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fedmpi"  # the same file for the same table
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    for kind in KINDS:
        cells = [[r["accuracy"] for r in rows if (r["kind"], r["epsilon"]) == (kind, e)] for e in EPSILONS]
        means = [100 * statistics.fmean(cell) if cell else math.nan for cell in cells]
        axes.plot(EPSILONS, means, marker="o", label=kind)
    if none := [r["accuracy"] for r in rows if r["kind"] == "none"]:
        axes.axhline(100 * statistics.fmean(none), color="grey", linestyle="--", label="without privacy")
    axes.set_xscale("log", base=2)
    axes.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
    axes.set_xlabel("epsilon of a silo, delta 0.001")
    axes.set_ylabel("test accuracy [%]")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, format="svg", metadata={"Date": None})


def main() -> None:
    """All cells, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        results = out / "results.jsonl"
        rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        cells: list[tuple[str, float | None]] = [
            ("none", None),
            *((kind, e) for e in (EPSILONS[1:2] if given.quick else EPSILONS) for kind in KINDS),
        ]
        for seed in range(1 if given.quick else given.seeds):
            for kind, epsilon in cells:
                key = {"kind": kind, "epsilon": epsilon, "seed": seed}
                if any(key.items() <= row.items() for row in rows):
                    continue
                run = Path(folder) / f"{kind}-{epsilon}-{seed}"
                rows.append(accuracy(kind, epsilon, seed, run, given.quick))
                with results.open("a") as lines:
                    print(json.dumps(rows[-1]), file=lines)
                print(json.dumps(rows[-1]), flush=True)
    if given.svg:
        draw(rows, given.svg)


if __name__ == "__main__":
    main()
