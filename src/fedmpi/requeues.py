"""Whether a batch job may requeue itself: not without end when its time limit is too short for a round.

    python -m fedmpi.requeues where CONFIG [key=value ...]                   # prints the run directory
    python -m fedmpi.requeues where GRID [--out DIR] [--quick] --task K      # that of a line of a grid
    python -m fedmpi.requeues may 3 DIR                                      # exit code 1, and why, if it may not

Scripts ask `where` before they start ranks, and `may` after the stop, when little time is left: `may` imports nothing
heavy. Counts in the run directory's file `requeues`: how many requeues in a row brought no newer checkpoint, the job,
the newest checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fedmpi import disk
from fedmpi.errors import FedmpiError
from fedmpi.sealed import folder_of, newest_first

FILE = "requeues"  # in the run directory


def may(root: Path, most: int, job: str, file: str = FILE) -> bool:
    """Whether the job may requeue itself, which is then counted: at most `most` times in a row without a newer
    checkpoint.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> [may(root, 2, "7") for _ in range(4)], may(root, 2, "8")
    ([True, True, True, False], True)
    """
    newest = f"{job} {next((folder_of(root, round).name for round in newest_first(root)), '')}"
    count, _, seen = "", "", ""
    if (root / file).exists():
        count, _, seen = (root / file).read_text().strip().partition(" ")
    num = int(count) + 1 if seen == newest.strip() and count.isdigit() else 0
    if num > most:
        return False
    disk.replace_text(root / file, f"{num} {newest}\n")
    return True


def where(words: Sequence[str]) -> Path:
    """The run directory of a configuration or of a line of a grid, as a script's words name it. Raises FedmpiError."""
    import argparse

    from fedmpi.compare.grid import cells, line_of
    from fedmpi.config import load, run_directory
    from fedmpi.trust import confined

    parser = argparse.ArgumentParser(prog="python -m fedmpi.requeues where")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--allow", action="append", default=[])
    parser.add_argument("--task", type=int)
    parser.add_argument("--out")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_intermixed_args(list(words))
    with confined(run_directory(Path(given.config)), given.allow):
        if given.task is None:
            return Path(load(given.config, given.overrides)[0].out)
        return line_of(cells(Path(given.config), given.out, given.quick)[2], given.task).root


def main(words: Sequence[str]) -> int:
    """The exit code."""
    if words[0] == "where":
        try:
            print(where(words[1:]))
        except FedmpiError as error:
            print(f"fedmpi: {error}", file=sys.stderr)
            return error.exit_code
        return 0
    _, most, root, *file = words
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("PBS_JOBNAME", "")
    try:
        if may(Path(root), int(most), job, *file):
            return 0
        why = f"the last {most} requeues brought no new checkpoint"
    except OSError as error:  # a full disk: the next start would write no checkpoint either
        why = f"{root}: {error.strerror or error}"
    print(f"fedmpi: not requeued again: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
