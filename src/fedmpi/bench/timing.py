"""Interleaved timing: each repeat runs every candidate once, on all ranks together, so noise affects all alike.

A time is that of the slowest rank; medians are compared. Ratios come first, seconds after.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from fedmpi.comm import Comm
from fedmpi.errors import ConfigError

Row = dict[str, Any]
Candidates = dict[str, Callable[[], object]]


def in_turns(comm: Comm, candidates: Candidates, repeats: int, limit_s: float = math.inf) -> dict[str, list[float]]:
    """Seconds of every repeat, by candidate, after one warm-up that is not counted.

    After `limit_s` seconds no further repeat begins, once there is one. Collective.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    begun_s = time.perf_counter()
    for repeat in range(repeats + 1):
        if repeat > 1 and float(comm.gather_number(time.perf_counter() - begun_s).max()) > limit_s:
            break
        for name, run in candidates.items():
            comm.barrier()
            start_s = time.perf_counter()
            run()
            comm.barrier()
            slowest_s = float(comm.gather_number(time.perf_counter() - start_s).max())
            if repeat:
                seconds[name].append(slowest_s)
    return seconds


def table(rows: list[Row], columns: list[str]) -> str:
    """Rows as a text table, in the style of the OSU benchmarks.

    >>> print(table([{"plan": "root", "feedback": False, "x_tcp": None, "seconds": {"median": 0.25}}],
    ...             ["plan", "feedback", "x_tcp", "median_s"]))
    #   plan  feedback   x_tcp  median_s
        root        no       -    0.2500
    """
    cells = [columns, *([_cell(row, column) for column in columns] for row in rows)]
    widths = [max(6, *(len(line[i]) for line in cells)) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(("# " if i == 0 else "  ") + line for i, line in enumerate(lines))


def _cell(row: Row, column: str) -> str:
    value = row.get(column)
    if column in ("median_s", "min_s", "max_s"):
        value = row["seconds"].get(column[:-2])
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def check_params(text: str) -> int:
    """Parses 25e6 or 25000000 as an integer. Raises ConfigError unless it is positive."""
    try:
        value = int(float(text))
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise ConfigError(f"--params {text}: give a positive number, such as 25e6")
    return value
