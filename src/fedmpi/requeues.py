"""Whether a batch job may requeue itself: not without end when its time limit is too short for a round.

    python -m fedmpi.requeues 3 CONFIG [key=value ...]                     # exit code 1, and why, if it may not
    python -m fedmpi.requeues 3 GRID [--out DIR] [--quick] --task K        # for a line of a grid

Counts in the run directory's file `requeues`, which slurm/train.sbatch writes, too: how many requeues in a row brought
no newer checkpoint, the job, the newest checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fedmpi import checkpoint, disk
from fedmpi.compare.grid import cells, line_of
from fedmpi.config import load, run_directory
from fedmpi.errors import FedmpiError
from fedmpi.trust import confined

FILE = "requeues"  # in the run directory


def may(root: Path, most: int, job: str) -> bool:
    """Whether the job may requeue itself, which is then counted: at most `most` times in a row without a newer
    checkpoint.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> [may(root, 2, "7") for _ in range(4)], may(root, 2, "8")
    ([True, True, True, False], True)
    """
    newest = f"{job} {max(checkpoint.sealed_rounds(root), default=0)}"
    count, _, seen = "", "", ""
    if (root / FILE).exists():
        count, _, seen = (root / FILE).read_text().strip().partition(" ")
    num = int(count) + 1 if seen == newest and count.isdigit() else 0
    if num > most:
        return False
    root.mkdir(parents=True, exist_ok=True)
    disk.replace_text(root / FILE, f"{num} {newest}\n")
    return True


def main(words: list[str]) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m fedmpi.requeues")
    parser.add_argument("most", type=int)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--allow", action="append", default=[])
    parser.add_argument("--task", type=int)
    parser.add_argument("--out")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_intermixed_args(words)
    try:
        with confined(run_directory(Path(given.config)), given.allow):
            if given.task is None:
                root = Path(load(given.config, given.overrides)[0].out)
            else:
                root = line_of(cells(Path(given.config), given.out, given.quick)[2], given.task).root
        job = os.environ.get("SLURM_JOB_ID") or os.environ.get("PBS_JOBNAME", "")
        if may(root, given.most, job):
            return 0
    except FedmpiError as error:
        print(f"fedmpi: not requeued: {error}", file=sys.stderr)
        return error.exit_code
    print(f"fedmpi: not requeued again: the last {given.most} requeues brought no new checkpoint", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
