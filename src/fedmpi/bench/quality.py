"""Time to quality: how long runs with different seeds take until the metric reaches a target.

    to_target_s    from before the data are opened until a round that reaches the target is committed: what MLPerf HPC
                   calls the time to train, data staging included
    time           of `RUNS` or more runs, the fastest and the slowest dropped, the mean of the others
    models         runs that reached the target / minute, over all runs: they follow each other on the same ranks

Source: MLPerf HPC training rules, section on the strong-scaling result. Deviation: the runs follow each other in one
job, so the interpreter's start and imports are not counted.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fedmpi.bench.figures import Event, Figure
from fedmpi.bench.timing import Row
from fedmpi.comm import Comm
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.train import Run

RUNS = 3  # the fewest of which fastest and slowest can be dropped
COLUMNS = ["seed", "reached", "rounds", "metric", "value", "to_target_s"]


def quality(comm: Comm, config: Config, target: float, num_runs: int = 5) -> tuple[list[Row], list[Event]]:
    """A row for each run, with seeds `config.seed`, `config.seed` + 1 ..., and the events of an MLPerf log. Collective.

    The runs write into a temporary folder inside `config.out`'s folder and are removed. Raises ConfigError.
    """
    if num_runs < RUNS:
        raise ConfigError(f"--runs {num_runs}: fastest and slowest are dropped, so give {RUNS} or more")
    if not math.isfinite(target):
        raise ConfigError(f"--target {target}: give a number, such as 0.95")
    parent = Path(config.out).absolute().parent

    def folder() -> str:
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix="fedmpi-quality-", dir=parent)

    root = Path(comm.broadcast_text(comm.collectively(lambda: folder() if comm.rank == 0 else ""), 0))
    rows: list[Row] = []
    events = [Event(time.time(), "POINT_IN_TIME", "submission_benchmark", "fedmpi", {})]
    try:
        for index in range(num_runs):
            seeded = dataclasses.replace(config, seed=config.seed + index, out=str(root / str(index)))
            comm.barrier()
            row, told = _timed(comm, seeded, target)
            rows.append(row)
            events += told
    finally:
        comm.barrier()
        if comm.rank == 0:
            shutil.rmtree(root, ignore_errors=True)
    return rows, events


def _timed(comm: Comm, config: Config, target: float) -> tuple[Row, list[Event]]:
    about = {"seed": config.seed}
    start_s, began_s = time.perf_counter(), time.time()
    events = [
        Event(began_s, "POINT_IN_TIME", "seed", config.seed, about),
        Event(began_s, "INTERVAL_START", "run_start", None, about),
    ]
    value, rounds, reached = math.nan, 0, False
    with Run(config, comm=comm) as run:
        metric, ahead = run.metric, 1.0 if run.maximize else -1.0
        for record in run:
            rounds = record["round"]
            if record.get(metric) is None:  # a round without evaluation
                continue
            value = float(record[metric])
            to_target_s = time.perf_counter() - start_s
            events.append(
                Event(
                    time.time(), "POINT_IN_TIME", "eval_accuracy", value, {**about, "epoch_num": rounds, "name": metric}
                )
            )
            if ahead * value >= ahead * target:
                reached = True
                break
        else:
            to_target_s = math.nan
    to_target_s = float(comm.gather_number(to_target_s).max())
    status = {**about, "status": "success" if reached else "aborted"}
    events.append(Event(time.time(), "INTERVAL_END", "run_stop", None, status))
    row: Row = {
        **about,
        "reached": reached,
        "rounds": rounds,
        "metric": metric,
        "value": value,
        "to_target_s": to_target_s if reached else None,
    }
    return row, events


def figures(rows: Sequence[Row], seconds: float) -> list[Figure]:
    """Time to quality, NaN unless every run reached the target; models per minute; the share of runs that did.

    `seconds`: of all runs.

    >>> rows = [{"reached": True, "to_target_s": s, "rounds": 4} for s in (9.0, 2.0, 3.0, 5.0, 4.0)]
    >>> for one in figures(rows, 30.0):
    ...     print(one)
    FOM quality.time 4 s
    FOM quality.models 10 models/min
    FOM quality.reached 1 share
    FOM quality.rounds 4 rounds
    """
    reached = [row for row in rows if row["reached"]]
    times = sorted(row["to_target_s"] for row in reached)
    all_did = len(reached) == len(rows)
    return [
        Figure("quality.time", statistics.fmean(times[1:-1]) if all_did else math.nan, "s"),
        Figure("quality.models", len(reached) / seconds * 60, "models/min"),
        Figure("quality.reached", len(reached) / len(rows), "share"),
        Figure("quality.rounds", statistics.median([row["rounds"] for row in rows]), "rounds"),
    ]
