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

from fedmpi.compare.grid import Cell, cells, is_done, line_of, to_run, train
from fedmpi.compare.runs import compare_runs
from fedmpi.compare.table import tell
from fedmpi.errors import FedmpiError

__all__ = ["compare_grid", "compare_runs", "gather", "list_lines", "train_line"]

_SHOWN = 5  # most lines in a message


def train_line(file: Path, out: str | None, quick: bool, line: int, comm: Any) -> None:
    """Train one line of a grid, counted from 1, unless it is done. Prints no table: other lines may be training.
    Collective."""

    def chosen() -> tuple[Cell, bool]:
        cell = line_of(cells(file, out, quick)[2], line)
        return cell, comm.rank == 0 and bool(to_run([cell], [], comm.size))

    cell, waits = comm.collectively(chosen)
    if int(comm.broadcast_text(str(int(waits)), 0)):
        train(cell, comm)
    if comm.rank == 0:
        print(f"compare: line {line} is done", file=sys.stderr, flush=True)
    comm.finish()


def list_lines(file: Path, out: str | None, quick: bool) -> None:
    """Print the lines of a grid: number, run, `done` or `waiting`."""
    for number, cell in enumerate(cells(file, out, quick)[2], start=1):
        print(f"{number}\t{cell.name}\t{'done' if is_done(cell) else 'waiting'}")


def gather(file: Path, out: str | None, quick: bool, as_json: bool) -> None:
    """Print the table of the lines that are done; train nothing. Raises FedmpiError if some are not."""
    grid, root, all_cells = cells(file, out, quick)
    tell(grid, root, all_cells, as_json)
    if left := [f"{number} ({cell.name})" for number, cell in enumerate(all_cells, start=1) if not is_done(cell)]:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        raise FedmpiError(f"{len(left)} of {len(all_cells)} lines are not done: {', '.join(left[:_SHOWN])}{more}")


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
