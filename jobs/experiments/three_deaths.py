"""A picture of a run that loses three of its four ranks, one after the other, under `mpirun --with-ft ulfm`.

    python jobs/experiments/three_deaths.py [--out runs/three_deaths] [--to docs/assets/three_deaths.svg] [--quick]

Trains the digits as the drills do (drill.py), kills a rank after rounds 3, 6 and 9, and draws the phases of trace.json,
a line per rank of the start. Needs matplotlib. Exit code 1 if the run does not end well. `--quick`: one death, after
round 1 of 3.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from drill_job import RANKS, Job, mpirun, read_events, settings

ROUNDS = 12
Kills = Sequence[tuple[int, int]]
KILLS: Kills = ((3, 2), (6, 0), (9, 3))  # after this round, this rank
LIMIT_S = 120.0
COLOURS = {
    "train": ("#4c78a8", "train"),
    "wait": ("#d0d0d0", "wait for the others"),
    "exchange": ("#54a24b", "exchange, step, evaluate"),
    "checkpoint": ("#f58518", "checkpoint"),
}
SAME = {"step": "exchange", "evaluate": "exchange", "agree": "wait", "select": "wait"}


def train(out: Path, rounds: int, kills: Kills) -> list[float]:
    """Run the job; the times of the kills, seconds since 1970."""
    at_s = []
    with Job(out, settings(rounds), mpirun()) as job:
        for after, rank in kills:
            job.until_round(after, LIMIT_S)
            time.sleep(0.5)  # into the next round's training
            at_s.append(time.time())
            job.signal(signal.SIGKILL, rank)
        if code := job.wait(LIMIT_S):
            sys.exit(f"three_deaths: the job ended with exit code {code}: see {out}.log")
    return at_s


def draw(out: Path, kills: Kills, killed_s: list[float], to: Path) -> None:
    """Draw the run's trace.json."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9})
    losses = list(read_events(out))
    groups = [list(range(RANKS))]  # first numbers of the ranks that are left, after each loss
    for loss in losses:
        groups.append([rank for i, rank in enumerate(groups[-1]) if i not in loss["ranks"]])
    trace = json.loads((out / "trace.json").read_text())
    zero = min(event["ts"] for event in trace)
    figure, axes = plt.subplots(figsize=(9.0, 2.6), layout="constrained")
    for event in trace:
        group = groups[sum(event["args"]["round"] > loss["round"] for loss in losses)]
        phase = SAME.get(event["name"], event["name"])
        if event["dur"] > 2000.0:
            start_s, length_s = (event["ts"] - zero) / 1e6, event["dur"] / 1e6
            axes.broken_barh([(start_s, length_s)], (group[event["pid"]] - 0.35, 0.7), color=COLOURS[phase][0])
    for (_, rank), at_s, loss in zip(kills, killed_s, losses, strict=True):
        x = at_s - zero / 1e6
        axes.plot(x, rank, "x", color="#d62728", markersize=11, markeredgewidth=2.5)
        axes.annotate(f"healed in {loss['seconds']:.2f} s", (x, rank), (8, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(RANKS), [f"rank {rank}" for rank in range(RANKS)])
    axes.invert_yaxis()
    axes.set_xlabel("seconds since the first round began")
    axes.spines[["top", "right"]].set_visible(False)
    for colour, label in COLOURS.values():
        axes.barh(0, 0, color=colour, label=label)
    axes.plot([], [], "x", color="#d62728", markersize=8, markeredgewidth=2, linestyle="", label="killed (SIGKILL)")
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(to, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/three_deaths"))
    parser.add_argument("--to", type=Path, default=Path("docs/assets/three_deaths.svg"))
    parser.add_argument("--quick", action="store_true", help="one death in three rounds")
    args = parser.parse_args()
    rounds, kills = (3, ((1, 2),)) if args.quick else (ROUNDS, KILLS)
    draw(args.out, kills, train(args.out.resolve(), rounds, kills), args.to)


if __name__ == "__main__":
    main()
