"""Comparing runs.

grid     reads a grid's file, trains the runs that are missing
table    the results of a grid: rows, table.csv, a figure
runs     run directories side by side
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fedmpi.compare.grid import cells, to_run, train
from fedmpi.compare.runs import compare_runs
from fedmpi.compare.table import tell

__all__ = ["compare_grid", "compare_runs"]


def compare_grid(file: Path, out: str | None, only: list[str], quick: bool, as_json: bool, comm: Any) -> None:
    """Train the missing runs of a grid, then print its table. Collective: all ranks call it."""
    grid, root, all_cells = comm.collectively(lambda: cells(file, out, quick))
    first = comm.collectively(lambda: to_run(all_cells, only, comm.size) if comm.rank == 0 else [])
    waiting = json.loads(comm.broadcast_text(json.dumps(first), 0))
    for number, n in enumerate(waiting, start=1):
        if comm.rank == 0:
            print(f"compare: {number} of {len(waiting)}: {all_cells[n].name}", file=sys.stderr, flush=True)
        train(all_cells[n], comm)
    comm.collectively(lambda: tell(grid, root, all_cells, as_json) if comm.rank == 0 else None)
    comm.finish()
