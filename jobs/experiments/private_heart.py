"""Record-level differential privacy on Fed-Heart-Disease, beside FLamby's published accuracies.

    FEDMPI_DATA=... python jobs/experiments/private_heart.py [--quick] [--out FOLDER]

configs/heart.yaml with `data.normalise=fixed` and `privacy: {name: record, clip: 1.1, delta: 1e-4}` for each epsilon
and seed; epsilon is that of each hospital's records after all rounds. The figure is the mean of the hospitals'
accuracies after the last round. One JSON line per epsilon: mean and sample standard deviation over the seeds, and the
published mean (Ogier du Terrail et al. 2022, FLamby, dp_results_fed_heart_disease.csv). `--quick`: one round, one seed,
one epsilon.

FLamby differs: features are normalised by mean and deviation of the training rows, the split looks at labels, and the
noise is that of 15 epochs (strategies/utils.py: `epochs=nrounds`), though 15 rounds of 100 steps are 30 epochs or more.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.config import load

CONFIG = Path(__file__).parents[2] / "configs" / "heart.yaml"
PUBLISHED = {0.1: 0.6056, 1.0: 0.6853, 5.0: 0.7036, 10.0: 0.7004, 50.0: 0.7016}
SEEDS = (42, 43, 44, 45, 46)


def accuracy(epsilon: float, seed: int, out: Path, quick: bool) -> tuple[float, float]:
    """The mean of the hospitals' accuracies, and the epsilon spent."""
    section = json.dumps({"name": "record", "clip": 1.1, "delta": 1e-4, "epsilon": epsilon})
    more = ["rounds=1", "local.steps=5"] if quick else []
    how, _ = load(
        CONFIG,
        [f"out={out}", f"seed={seed}", f"privacy={section}", "data.normalise=fixed", "evaluate.every=1000", *more],
    )
    with fedmpi.Run(how, comm=SoloComm()) as run:
        *_, record = run
    return statistics.fmean(row["accuracy"] for row in record["silos"].values()), record["epsilon"]


def main() -> None:
    """All cells, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or Path(folder)
        for epsilon, published in [(1.0, PUBLISHED[1.0])] if given.quick else PUBLISHED.items():
            seeds = SEEDS[:1] if given.quick else SEEDS
            rows = [accuracy(epsilon, seed, out / f"{epsilon:g}-{seed}", given.quick) for seed in seeds]
            found = [row[0] for row in rows]
            spread = statistics.stdev(found) if len(found) > 1 else None
            spent = max(row[1] for row in rows)
            told = {"epsilon": epsilon, "spent": spent, "accuracy": statistics.fmean(found), "std": spread}
            print(json.dumps({**told, "seeds": len(found), "published": published}), flush=True)


if __name__ == "__main__":
    main()
