"""A million operations on a faulty shared folder, in virtual time: what must hold of the files transport, holds.

    python jobs/experiments/files_faults.py [--operations 1000000] [--silos 8] [--to files_faults.svg] [--quick]

A server and silos as jobs that are killed, suspended and submitted again, over a folder that shows names late, fails
with and without effect, loses replies, tears files and fills up (tests/support/faulty_folder.py). Checked at every
commit: no update is counted twice, none is lost after its commit, there is one line of commits, every reader sees a
beginning of it, an old server commits nothing after a new one has read the line. Checked at the end, when faults have
ended: commits are made, every silo is answered, and the number of files is bounded. The last line is JSON. Exit code 1
if something does not hold. `--to` draws the first two hours of one course; needs matplotlib. `--quick`: 40,000
operations.
"""

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from support.faulty_folder import HARSH, Faults, World
from support.simulated_jobs import Broken, Jobs, survive

PROFILES = {
    "usual": Faults(),
    "harsh": HARSH,
    "zombies": replace(HARSH, suspend_link=0.3, suspend_s=400.0, skew_s=1e5),
    "stale listings": replace(HARSH, stale_listing_s=60.0),
}
PIECE = 50_000  # operations of one course; 10,000 with --quick
SEED = 7  # of the course that is drawn


def courses(num_operations: int, num_silos: int) -> dict[str, Any]:
    """Figures over so many operations; raises Broken with the profile and seed."""
    piece = PIECE if num_operations > 4 * PIECE else 10_000
    total: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    begun_s, seed = time.monotonic(), 0
    while total["operations"] < num_operations:
        for name, profile in PROFILES.items():
            world = World(seed, profile, most_operations=piece)
            try:
                truth = survive(world, num_silos)
            except Broken as broken:
                raise Broken(f"{name}, seed {seed}: {broken}") from None
            total["operations"] += world.num_operations
            total["commits"] += len(truth.line)
            total["updates"] += len(truth.answered)
            total["epochs"] += max(commit.epoch for commit in truth.line)
            total["seconds"] += round(world.now_s)
            total["most_files"] = max(total["most_files"], truth.most_files)
            faults.update(world.counts)
        seed += 1
    took_s = round(time.monotonic() - begun_s, 1)
    hours = round(total.pop("seconds") / 3600, 1)
    return {**total, "virtual_hours": hours, "took_s": took_s, "faults": dict(sorted(faults.items()))}


def draw(num_silos: int, to: Path, num_operations: int = 60_000) -> None:
    """Draw the server jobs and commits of one course."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9})
    faults = replace(Faults(), kill=0.001, suspend=0.001, suspend_link=0.06, suspend_s=1500.0)
    world, kept = World(SEED, faults, most_operations=num_operations), []
    truth = survive(world, num_silos, prepare=kept.append)
    jobs: Jobs = kept[0]
    hours = 2.0
    figure, axes = plt.subplots(figsize=(8, 3.4))
    last = max(c.epoch for c, at_s in zip(truth.line, truth.times_s, strict=True) if at_s < hours * 3600)
    row = {job: -epoch for epoch, job in jobs.servers.items() if epoch <= last}
    for job, what, from_s, until_s in jobs.course:
        if job in row:
            colour, height = {"runs": ("#d5e3f0", 0.8), "suspended": ("#f58518", 0.25)}[what]
            width = (until_s - from_s) / 3600
            axes.barh(row[job], width, height, from_s / 3600, color=colour, zorder=1 + (what == "suspended"))
    for commit, at_s in zip(truth.line, truth.times_s, strict=True):
        if commit.epoch <= last:
            axes.plot([at_s / 3600] * 2, [-commit.epoch - 0.4, -commit.epoch + 0.4], color="#2f5f8f", linewidth=0.7)
    axes.set_yticks([-epoch for epoch in range(1, last + 1)], [str(epoch) for epoch in range(1, last + 1)])
    axes.set_ylabel("server job, by epoch")
    axes.set_xlim(0, hours)
    axes.set_xlabel("virtual hours")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.tight_layout()
    figure.savefig(to, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--silos", type=int, default=8)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    try:
        figures = courses(40_000 if args.quick else args.operations, args.silos)
    except Broken as broken:
        sys.exit(f"files_faults: {broken}")
    if args.to is not None:
        draw(args.silos, args.to, 15_000 if args.quick else 60_000)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
