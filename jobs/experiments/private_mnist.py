"""Opacus's published MNIST points with fedmpi, and Opacus itself beside: DP-SGD, batches of 240 on average, delta 1e-5.

    FEDMPI_DATA=... python jobs/experiments/private_mnist.py [--point 1.16] [--seeds 10] [--silos 1] [--opacus]
        [--out FOLDER] [--svg FILE] [--minutes M] [--quick]

    point   epochs   lr    sigma   clip   published, ten runs
    6.86      45    0.25    0.7    1.5    97.09 +- 0.17 %
    2.91      60    0.15    1.1    1.0    96.78 +- 0.21 %
    1.16      15    0.25    1.3    1.5    94.63 +- 0.34 %

A point has the name of its published epsilon, by Renyi accounting; the account here is tighter. Without `--point`, all.
One silo holds all data, and the model is that of Opacus's example. With `--silos 4` four silos hold a quarter each,
train an epoch per round, and get the noise that spends the epsilon of the one silo.

One JSON line per point and seed, also in FOLDER/results.jsonl: what stands there is not run again. A run that ends
early, at `--minutes` or by a signal, goes on from its last epoch. `--opacus` trains with Opacus (1.4 or newer) in place
of fedmpi, on the same seeds and data; its runs begin anew. `--quick`: digits in place of MNIST, one epoch.
"""

import argparse
import importlib
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.data import DATASETS
from fedmpi.privacy import Use, epsilon

BATCH, DELTA = 240, 1e-5


class Point(NamedTuple):
    """Settings of a published accuracy."""

    epochs: int
    lr: float
    sigma: float
    clip: float
    published: float
    std: float


POINTS = {
    "6.86": Point(45, 0.25, 0.7, 1.5, 0.9709, 0.0017),
    "2.91": Point(60, 0.15, 1.1, 1.0, 0.9678, 0.0021),
    "1.16": Point(15, 0.25, 1.3, 1.5, 0.9463, 0.0034),
}


def net() -> nn.Module:
    """Opacus's SampleConvNet, 26,010 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1)),
        *(nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1)),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


def train(point: Point, seed: int, silos: int, out: Path, ends_s: float, quick: bool) -> dict[str, Any] | None:
    """Accuracy and epsilon of one run of fedmpi; None if time ends first. Exits if epsilon is spent before."""
    torch.manual_seed(seed)
    noise: dict[str, float] = {"sigma": point.sigma}
    if silos > 1:
        num = 1438 if quick else 60_000
        spent = epsilon({Use(point.sigma, BATCH / num): point.epochs * -(-num // BATCH)}, DELTA)
        noise = {"epsilon": spent}
    values = {
        "out": str(out),
        "seed": seed,
        "rounds": 1 if quick else point.epochs,
        "data": {"name": "digits" if quick else "mnist", "silos": silos},
        "model": "logistic" if quick else net(),
        "local": {"name": "sgd", "lr": point.lr, "epochs": 1, "batch_size": BATCH},
        "privacy": {"name": "record", "clip": point.clip, "delta": DELTA, **noise},
        "evaluate": {"every": 1 if quick else point.epochs},
        "checkpoint": {"every": 1},
        "device": {"name": "cpu"},
    }
    record: dict[str, Any] = {}
    with fedmpi.Run(build(Config, values), comm=SoloComm()) as run:
        for last in run:
            record = last
            if time.monotonic() > ends_s and record["round"] != values["rounds"]:
                return None
    if record.get("round") != values["rounds"]:  # a round that a kill cut short has spent its epsilon too
        sys.exit(f"{out} has spent its epsilon before its last round; delete it and begin anew")
    return {"accuracy": record["accuracy"], "epsilon": record["epsilon"]}


def by_opacus(point: Point, seed: int, quick: bool) -> dict[str, Any]:
    """The same by Opacus's PrivacyEngine."""
    source = DATASETS.build({"name": "digits" if quick else "mnist", "silos": 1}, "data").source(seed)
    data = source.open(source.silos[0].id)
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) if quick else net()
    rows = torch.utils.data.TensorDataset(data.x_train, data.y_train)
    made: Any = importlib.import_module("opacus")
    engine = made.PrivacyEngine(accountant="prv")
    model, optimizer, batches = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=point.lr),
        data_loader=torch.utils.data.DataLoader(rows, batch_size=BATCH),
        noise_multiplier=point.sigma,
        max_grad_norm=point.clip,
    )
    for _ in range(1 if quick else point.epochs):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    with torch.no_grad():
        right = (model.eval()(data.x_test).argmax(1) == data.y_test).double().mean()
    return {"accuracy": float(right), "epsilon": engine.get_epsilon(DELTA)}


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy against epsilon: one marker per run, and the published means with their deviations."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "fedmpi", "svg.fonttype": "none"})  # the same file for the same rows
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    kinds = {"fedmpi, one silo": ("fedmpi", 1), "fedmpi, four silos": ("fedmpi", 4), "Opacus": ("opacus", 1)}
    ordered = sorted(rows, key=lambda row: row["by"] == "fedmpi")  # Opacus's account differs by some thousandths
    seen = {row["point"]: row["epsilon"] for row in ordered if row["silos"] == 1}
    shown = [(epsilon, POINTS[name]) for name, epsilon in seen.items()]
    means, stds = ([100 * getattr(point, field) for _, point in shown] for field in ("published", "std"))
    axes.errorbar([x for x, _ in shown], means, stds, fmt="_", color="black", capsize=6, label="published, ten runs")
    for (label, (by, silos)), marker, aside in zip(kinds.items(), "osx", (0.97, 1.03, 1.06), strict=True):
        cells = [row for row in rows if (row["by"], row["silos"]) == (by, silos)]
        x, y = [aside * row["epsilon"] for row in cells], [100 * row["accuracy"] for row in cells]
        axes.plot(x, y, marker, fillstyle="none", label=label)
    axes.set_xscale("log")
    axes.set_xticks(sorted(seen.values()), [f"{math.ceil(100 * x) / 100:.2f}" for x in sorted(seen.values())])
    axes.minorticks_off()
    axes.set_xlabel("epsilon of a record, delta 1e-5")
    axes.set_ylabel("test accuracy [%]")
    axes.legend()
    figure.savefig(file, format="svg", metadata={"Date": None})


def main() -> None:
    """All points and seeds, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--point", choices=POINTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--silos", type=int, default=1)
    parser.add_argument("--opacus", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.opacus and given.silos > 1:
        parser.error("--opacus knows one silo")
    ends_s = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        results = out / "results.jsonl"
        done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        for name in [given.point] if given.point else POINTS:
            for seed in range(1 if given.quick else given.seeds):
                key = {"point": name, "seed": seed, "silos": given.silos, "by": "opacus" if given.opacus else "fedmpi"}
                if any(key.items() <= row.items() for row in done):
                    continue
                point, started_s = POINTS[name], time.process_time()
                if given.opacus:
                    found: dict[str, Any] | None = by_opacus(point, seed, given.quick)
                else:
                    run = out / f"{name}-{given.silos}-{seed}"
                    found = train(point, seed, given.silos, run, ends_s, given.quick)
                if found is None:
                    sys.exit("time is up; the same command goes on")
                row = {**key, **found, "cpu_s": round(time.process_time() - started_s)}
                done.append({**row, "published": point.published, "published_std": point.std})
                with results.open("a") as lines:
                    print(json.dumps(done[-1]), file=lines)
                print(json.dumps(done[-1]), flush=True)
    if given.svg:
        draw(done, given.svg)
    cells: dict[tuple[Any, ...], list[float]] = {}
    for row in done:
        cells.setdefault((row["point"], row["silos"], row["by"]), []).append(row["accuracy"])
    for (name, silos, by), rows in cells.items():
        if len(rows) > 1:
            mean, std = statistics.fmean(rows), statistics.stdev(rows)
            told = {"point": name, "silos": silos, "by": by, "runs": len(rows), "mean": mean, "std": std}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
