"""The runs of a report, and the groups of those that differ in their seed only."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmpi.compare.grid import Grid, cells
from fedmpi.compare.table import Curve
from fedmpi.config import CONFIG_FILE
from fedmpi.errors import ConfigError
from fedmpi.metrics.scorers import of_silo
from fedmpi.report.reading import RunData, read_run
from fedmpi.report.status import total_s

DEEPEST = 4  # folders below one that is no run directory, in which runs are looked for


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only. `partition` is empty outside of grids."""

    name: str
    partition: str
    names: list[str]
    runs: list[RunData]


@dataclass(frozen=True)
class Runs:
    """All runs of a report. `grid` says which figure is compared, its target and published values."""

    names: list[str]
    runs: list[RunData]
    groups: list[Group]
    grid: Grid
    folder: Path  # where the page belongs
    missing: list[str]  # cells of the grid without a run

    @property
    def metric(self) -> str:
        """The figure that is compared."""
        return self.grid.figure or self.runs[0].metric

    @property
    def maximize(self) -> bool:
        return self.runs[0].maximize


def runs_of(what: Sequence[Path]) -> Runs:
    """The runs that are meant by run directories, folders of runs, or a grid's file (and the folder of its runs, if it
    is not the one that the file names). Raises ConfigError."""
    if what[0].suffix in (".yaml", ".yml") and what[0].is_file():
        if len(what) > 2:
            raise ConfigError("give a grid's file alone, or with the folder of its runs")
        return _of_grid(what[0], str(what[1]) if len(what) == 2 else None)
    roots = [root for path in what for root in _below(path)]
    roots = [root for n, root in enumerate(roots) if root.resolve() not in {r.resolve() for r in roots[:n]}]
    names = _names(roots)
    runs = [read_run(root) for root in roots]
    is_folder = len(what) == 1 and not (what[0] / CONFIG_FILE).exists()
    by_config: dict[str, list[int]] = {}
    for n, run in enumerate(runs):
        alike = {key: value for key, value in run.flat.items() if key not in ("seed", "out")}
        # In a grid the place of a run says to what it belongs.
        place = os.path.dirname(names[n]) if is_folder and names[n].count("/") == 2 else ""
        by_config.setdefault(json.dumps([place, run.metric, alike], sort_keys=True), []).append(n)
    groups = []
    for some in by_config.values():
        place = os.path.dirname(names[some[0]])
        partition, _, algorithm = place.partition("/")
        if is_folder and names[some[0]].count("/") == 2:
            groups.append(Group(algorithm, partition, [names[n] for n in some], [runs[n] for n in some]))
        else:
            name = names[some[0]] if len(some) == 1 else _common([names[n] for n in some])
            groups.append(Group(name, "", [names[n] for n in some], [runs[n] for n in some]))
    folder = what[0] if len(what) == 1 else Path()
    return Runs(names, runs, groups, Grid(algorithms={}), folder, [])


def _of_grid(file: Path, out: str | None) -> Runs:
    grid, root, all_cells = cells(file, out)
    names, runs, missing = [], [], []
    groups: dict[tuple[str, str], Group] = {}
    for cell in all_cells:
        if not (cell.root / CONFIG_FILE).exists():
            missing.append(cell.name)
            continue
        run = read_run(cell.root)
        names.append(cell.name)
        runs.append(run)
        group = groups.setdefault(cell[:2], Group(cell.algorithm, cell.partition, [], []))
        group.names.append(cell.name)
        group.runs.append(run)
    if not runs:
        raise ConfigError(f"{file}: no run of the grid is in {root}; fedmpi compare trains them")
    return Runs(names, runs, list(groups.values()), grid, root, missing)


def _below(path: Path) -> list[Path]:
    """The run directory itself, or the run directories below a folder. Raises ConfigError if there are none."""
    if (path / CONFIG_FILE).exists():
        return [path]
    found = []
    for depth in range(1, DEEPEST + 1):
        found += [file.parent for file in sorted(path.glob(f"{'*/' * depth}{CONFIG_FILE}"))]
    if not found:
        raise ConfigError(f"{path} is not a run directory, and there is none below it")
    return found


def _names(roots: Sequence[Path]) -> list[str]:
    """Short names of run directories: their paths without what all have in common."""
    shared = os.path.commonpath([root.resolve().parent for root in roots])
    return [root.resolve().relative_to(shared).as_posix() for root in roots]


def _common(names: list[str]) -> str:
    """A name for runs that differ in their seed only.

    >>> _common(["a/0", "a/1"]), _common(["first", "second"])
    ('a', 'first and others')
    """
    prefix = os.path.commonprefix(names)  # noqa: RUF071 - of characters
    prefix = prefix.rstrip("/-_. 0123456789")
    return prefix or f"{names[0]} and others"


def curve(run: RunData, metric: str, over: str) -> Curve:
    """A run's figure by round, as in `fedmpi compare`; `over` as in a grid: samples or silos."""
    history = run.history
    plain = metric.removeprefix("personal_")
    values = np.where(np.isfinite(history.of(metric)), history.of(metric), history.of(plain))
    if over == "silos":
        of_all, of_plain = history.of_silos(of_silo(metric)), history.of_silos(of_silo(plain))
        rows = np.where(np.isfinite(of_all), of_all, of_plain)
        values = np.array([statistics.mean(row[np.isfinite(row)].tolist() or [np.nan]) for row in rows])
    at = np.flatnonzero(np.isfinite(values[: run.goal]))
    megabytes = np.cumsum(history.sent) / 1e6
    spent_s = np.nancumsum(history.of("seconds", "round"))
    ranks = {len(record.get("peak_rss_bytes") or ()) for record in history.records}
    return Curve(
        rounds=[int(history.rounds[i]) for i in at],
        values=[float(values[i]) for i in at],
        megabytes=[float(megabytes[i]) for i in at],
        seconds=[float(spent_s[i]) for i in at],
        ended=run.diverged,
        ranks=ranks,
    )


def mean_s(group: Group) -> float:
    """Mean over the group's runs of the seconds of all rounds."""
    return statistics.mean(total_s(run) for run in group.runs)
