"""Record-level differential privacy on Fed-Heart-Disease, beside FLamby's published accuracies.

    FEDMPI_DATA=... python jobs/experiments/private_heart.py [--lr 0.001] [--out FOLDER] [--quick]

configs/heart.yaml with `data.normalise=fixed` and `privacy: {name: record, clip: 1.1, delta: 1e-4}` for each epsilon
and seed; epsilon is that of each hospital's records after all rounds. The figure is the mean of the hospitals'
accuracies after the last round. One JSON line per epsilon: mean and sample standard deviation over the seeds, and the
published mean (Ogier du Terrail et al. 2022, FLamby, dp_results_fed_heart_disease.csv). With `--out` single runs are
kept in FOLDER/results.jsonl, and not run again. `--quick`: one round, one seed, one epsilon.

Without `--lr` the learning rate follows from epsilon by a rule that looks at no data: that of noisy SGD for convex
losses (Bassily, Smith & Thakurta 2014, Algorithm 1),

    lr = R / sqrt(T (C^2 + d s^2)),   s = sigma C / B

with T steps, C the clip, d parameters, s the standard deviation of the noise on a mean of B samples (s^2 the mean over
the hospitals), and R = 1 as the distance from the first parameters to the best.

FLamby differs: features are normalised by mean and deviation of the training rows, the split looks at labels, and the
noise is that of 15 epochs (strategies/utils.py: `epochs=nrounds`), though 15 rounds of 100 steps are 30 epochs or more.
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
from fedmpi.config import Config, load
from fedmpi.data.heart_disease import HOSPITALS
from fedmpi.local.gradient import Sgd
from fedmpi.privacy import RecordPrivacy

CONFIG = Path(__file__).parents[2] / "configs" / "heart.yaml"
PUBLISHED = {0.1: 0.6056, 1.0: 0.6853, 5.0: 0.7036, 10.0: 0.7004, 50.0: 0.7016}
SEEDS = (42, 43, 44, 45, 46)
PARAMETERS, DISTANCE = 14, 1.0


def configured(epsilon: float, seed: int, out: Path, more: list[str]) -> Config:
    """The configuration of a run."""
    section = json.dumps({"name": "record", "clip": 1.1, "delta": 1e-4, "epsilon": epsilon})
    given = [f"out={out}", f"seed={seed}", f"privacy={section}", "data.normalise=fixed", "evaluate.every=1000"]
    return load(CONFIG, [*given, *more])[0]


def rule(how: Config) -> float:
    """The learning rate, from the noise that the account asks for."""
    section, local = how.privacy, how.local
    assert isinstance(section, RecordPrivacy) and isinstance(local, Sgd) and local.steps and local.batch_size
    sigmas = section.sigmas(how, {name: num for name, (_, num) in HOSPITALS.items()})
    noise = statistics.fmean((sigma * section.clip / local.batch_size) ** 2 for sigma in sigmas.values())
    return DISTANCE / math.sqrt(how.rounds * local.steps * (section.clip**2 + PARAMETERS * noise))


def one(epsilon: float, seed: int, lr: float | None, out: Path, quick: bool) -> dict[str, Any]:
    """The mean of the hospitals' accuracies, and the epsilon spent."""
    more = ["rounds=1", "local.steps=5"] if quick else []
    lr = rule(configured(epsilon, seed, out, more)) if lr is None else lr
    with fedmpi.Run(configured(epsilon, seed, out, [*more, f"local.lr={lr}"]), comm=SoloComm()) as run:
        *_, record = run
    accuracy = statistics.fmean(row["accuracy"] for row in record["silos"].values())
    return {"epsilon": epsilon, "seed": seed, "lr": lr, "accuracy": accuracy, "spent": record["epsilon"]}


def main() -> None:
    """All cells, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        results = out / "results.jsonl"
        done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        for epsilon, published in [(1.0, PUBLISHED[1.0])] if given.quick else PUBLISHED.items():
            rows = []
            for seed in SEEDS[:1] if given.quick else SEEDS:
                key = {"epsilon": epsilon, "seed": seed, "rule": given.lr is None}
                key |= {} if given.lr is None else {"lr": given.lr}
                kept = [row for row in done if key.items() <= row.items()]
                if not kept:
                    run = Path(folder) / f"{epsilon:g}-{seed}"
                    kept = [one(epsilon, seed, given.lr, run, given.quick) | {"rule": given.lr is None}]
                    with results.open("a") as lines:
                        print(json.dumps(kept[0]), file=lines)
                rows.append(kept[0])
            found = [row["accuracy"] for row in rows]
            spread = statistics.stdev(found) if len(found) > 1 else None
            told = {"epsilon": epsilon, "lr": rows[0]["lr"], "spent": max(row["spent"] for row in rows)}
            told |= {"accuracy": statistics.fmean(found), "std": spread}
            print(json.dumps({**told, "seeds": len(found), "published": published}), flush=True)


if __name__ == "__main__":
    main()
