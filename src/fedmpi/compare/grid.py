"""A grid of runs, partition x algorithm x seed: one table, one figure.

    mpirun -n 2 fedmpi compare configs/compare_heart.yaml [--out DIR] [--only NAME,NAME] [--quick]

    base: heart.yaml                            # a configuration beside this file, or its keys
    algorithms:                                 # keys that each sets, as on the command line of `fedmpi train`
      fedavg: {local.lr: 0.001}
      fedprox: {local.name: fedprox, local.mu: 0.01}
    partitions: {iid: {data.partition: iid}, skewed: {data.partition: {name: dirichlet, alpha: 0.1}}}
    seeds: [0, 1, 2]
    target: 0.8                                 # of the metric; the table counts the rounds to reach it
    published: {iid: {fedavg: 0.85}}            # printed beside the measured figures

Each run has its directory, OUT/PARTITION/ALGORITHM/SEED. Start the grid again after a stop: finished runs are skipped,
an interrupted run resumes. `--only` trains the cells of the given algorithms, partitions and seeds (`--only
iid,fedavg`: that cell, for each seed); the table shows all finished runs. When a run diverges, its row says so and the
grid continues.

A row holds means over seeds, with minimum and maximum. Bytes depend on the number of ranks: the table leaves them out
where that number differs between runs. OUT/table.csv holds all rows; OUT/figure.png and figure.svg show the metric by
round, by bytes and by seconds, and need matplotlib (`pip install fedmpi[report]`).
"""

from __future__ import annotations

import copy
import itertools
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedmpi import checkpoint, disk, stopping
from fedmpi.components import NonNegativeInt, build, component, did_you_mean, to_dict
from fedmpi.config import Config, put
from fedmpi.differences import differences
from fedmpi.directory import read_config
from fedmpi.errors import ConfigError, Diverged
from fedmpi.plan import plan
from fedmpi.train import Run
from fedmpi.yamlfile import read

Changes = dict[str, dict[str, Any]]
DIVERGED = "diverged.txt"  # in the directory of a run that diverged; holds the reason


@component
class Grid:
    """The configurations to compare."""

    algorithms: Changes
    """name: {key: value}"""
    base: str | dict[str, Any] = ""
    """the configuration that they change: its file, or its keys"""
    partitions: Changes | None = None
    """name: {key: value}; null: the base's partition alone"""
    seeds: list[NonNegativeInt] | None = None
    """null: the base's seed"""
    out: str | None = None
    """folder of the runs; null: runs/ and the name of the grid's file"""
    figure: str | None = None
    """the figure of a record to compare; null: the run's metric. personal_accuracy scores the model that a silo uses:
    its own, or the global model where it has none"""
    over: Literal["samples", "silos"] = "samples"
    """samples: pooled over all test samples; silos: the mean of the silos' figures"""
    target: float | None = None
    """of the figure; the table counts the rounds to reach it"""
    published: dict[str, dict[str, float]] | None = None
    """partition: {algorithm: figure}"""


class Cell(NamedTuple):
    """One run."""

    partition: str
    algorithm: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return f"{self.partition}/{self.algorithm}/{self.seed}"

    @property
    def root(self) -> Path:
        return Path(self.config.out)


def cells(file: Path, out: str | None, quick: bool = False) -> tuple[Grid, Path, list[Cell]]:
    """The grid in a file, the folder of its runs, and the runs with their built configurations. Raises ConfigError."""
    grid = build(Grid, read(file)[0], "", "grid")
    base: dict[str, Any] = grid.base if isinstance(grid.base, dict) else {}
    if isinstance(grid.base, str) and grid.base:
        base = read(file.parent / grid.base)[0]
    partitions = grid.partitions or {"as_given": {}}
    seeds = grid.seeds if grid.seeds is not None else [base.get("seed", 0)]
    if not grid.algorithms or not seeds:
        raise ConfigError("nothing to compare: give algorithms, and at least one seed")
    if twice := [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]:
        raise ConfigError(f"seeds: {twice[0]} appears twice; both would be one run, in one folder")
    for name in (*partitions, *grid.algorithms):
        if not re.fullmatch(r"[\w.+-]+", name) or name in (".", ".."):
            raise ConfigError(f"'{name}' names a folder: use letters, digits and . _ + - only")
    for partition, known in (grid.published or {}).items():
        if partition not in partitions:
            raise ConfigError(f"published: no partition '{partition}'{did_you_mean(partition, partitions)}")
        for name in known:
            if name not in grid.algorithms:
                raise ConfigError(f"published.{partition}: no algorithm '{name}'{did_you_mean(name, grid.algorithms)}")
    for section, named in (("algorithms", grid.algorithms), ("partitions", partitions)):
        for name, changes in named.items():
            if own := [key for key in changes if key in ("seed", "out")]:
                instead = "seeds: [0, 1, 2]" if own[0] == "seed" else "the grid's out, or --out"
                raise ConfigError(f"{section}.{name}: {own[0]} is the grid's: each run has its own; take {instead}")
    root = Path(out or (grid.out or f"runs/{file.stem}") + ("-quick" if quick else ""))
    if quick:
        seeds = seeds[:1]
    found = []
    for (partition, one), (algorithm, other), seed in itertools.product(
        partitions.items(), grid.algorithms.items(), seeds
    ):
        values = copy.deepcopy(base)
        for key, value in [*one.items(), *other.items()]:
            put(values, key, copy.deepcopy(value))
        values |= {"seed": seed, "out": str(root / partition / algorithm / str(seed))}
        if quick:
            values["rounds"] = 2
        try:
            found.append(Cell(partition, algorithm, seed, build(Config, values)))
        except ConfigError as error:
            raise ConfigError(f"{partition}, {algorithm}: {error}") from None
    return grid, root, found


def is_done(cell: Cell) -> bool:
    """True if the run has finished or diverged. Raises ConfigError if its directory holds another run."""
    rounds = checkpoint.sealed_rounds(cell.root)
    if not rounds:
        return False
    stored = read_config(cell.root).config
    if changed := differences(stored, cell.config):
        raise ConfigError(f"{cell.root} holds another run: {changed[0]}; choose another --out")
    same = (stored.get("stop") or {}).get("early") == to_dict(cell.config)["stop"]["early"]  # another may let it go on
    last = same and 0 < stopping.ended(cell.root)[0] <= rounds[-1]
    whole = (last or rounds[-1] >= cell.config.rounds) and (cell.root / "model.safetensors").exists()
    return whole or (cell.root / DIVERGED).exists()


def line_of(all_cells: list[Cell], line: int) -> Cell:
    """A line of the grid, counted from 1. Raises ConfigError if there is none."""
    if not 1 <= line <= len(all_cells):
        raise ConfigError(
            f"--task {line}: the grid has lines 1 to {len(all_cells)}; `fedmpi compare GRID --tasks` lists them"
        )
    return all_cells[line - 1]


def to_run(all_cells: list[Cell], only: list[str], num_ranks: int) -> list[int]:
    """Indices of the cells still to train. Raises ConfigError if `plan` rejects one of them, before any is trained."""
    names = {str(part) for cell in all_cells for part in cell[:3]}
    for name in only:
        if name not in names:
            raise ConfigError(f"--only: no '{name}' in the grid{did_you_mean(name, names)}")
    kinds = [{str(cell[kind]) for cell in all_cells} & set(only) for kind in range(3)]
    fits = [all(not kind or str(part) in kind for part, kind in zip(cell, kinds, strict=False)) for cell in all_cells]
    wanted = [n for n, fit in enumerate(fits) if fit]
    done = [is_done(cell) for cell in all_cells]
    waiting = [n for n in wanted if not done[n]]
    looked_at = set()
    for cell in (all_cells[n] for n in waiting):
        if cell[:2] not in looked_at:
            looked_at.add(cell[:2])
            try:
                plan(cell.config, {}, num_ranks)
            except ConfigError as error:
                raise ConfigError(f"{cell.partition}, {cell.algorithm}: {error}") from None
    return waiting


def train(cell: Cell, comm: Any) -> None:
    """Train the rest of a run; leave a note in its directory when it diverges."""
    try:
        with Run(cell.config, comm=comm) as run:
            for _ in run:
                pass
    except Diverged as error:
        if comm.rank == 0:
            disk.replace_text(cell.root / DIVERGED, f"{error}\n")
