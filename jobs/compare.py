"""A grid of runs, partition x algorithm x seed: one table, one figure.

    mpirun -n 2 python jobs/compare.py configs/compare_heart.yaml [--out DIR] [--only NAME,NAME] [--quick]

    base: heart.yaml                            # a configuration beside this file, or its keys
    algorithms:                                 # what each changes, as on the command line of `fedmpi train`
      fedavg: {local.lr: 0.001}
      fedprox: {local.name: fedprox, local.mu: 0.01}
    partitions: {iid: {data.partition: iid}, skewed: {data.partition: {name: dirichlet, alpha: 0.1}}}
    seeds: [0, 1, 2]
    target: 0.8                                 # of the metric: how many rounds does it take?
    published: {iid: {fedavg: 0.85}}            # printed beside what was found

Every run has its directory, OUT/PARTITION/ALGORITHM/SEED. One that is done is not run again, one that was broken off
goes on where it was: start the grid again after a stop. `--only` runs the cells of those algorithms, partitions and
seeds (`--only iid,fedavg`: that one cell, of each seed); the table is of all that are done. A run that diverges is a
row that says so, and the grid goes on.

Figures of a row are means over seeds, with the least and the most. Bytes depend on the number of ranks: where runs
were made on different ones, there are none. OUT/table.csv has them all, OUT/figure.png (and
.svg) the metric by round, by bytes and by seconds; it needs matplotlib (`pip install fedmpi[report]`).
"""

import argparse
import copy
import csv
import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fedmpi
from fedmpi import checkpoint, disk
from fedmpi.comm import connect, is_first
from fedmpi.components import NonNegativeInt, build, component, did_you_mean
from fedmpi.config import differences, put, read
from fedmpi.directory import read_config
from fedmpi.errors import ConfigError, Diverged, FedmpiError
from fedmpi.metrics.scorers import of_silo
from fedmpi.plan import plan
from fedmpi.records import read_metrics

Changes = dict[str, dict[str, Any]]
DIVERGED = "diverged.txt"  # in the directory of a run that did: why


@component
class Grid:
    """What is compared."""

    algorithms: Changes
    """name: {key: value}"""
    base: str | dict[str, Any] = ""
    """what they change: a configuration's file, or its keys"""
    partitions: Changes | None = None
    """name: {key: value}; null: one, as the base has it"""
    seeds: list[NonNegativeInt] | None = None
    """null: the base's"""
    out: str | None = None
    """null: runs/ and the name of the grid's file"""
    figure: str | None = None
    """of a record, to be compared; null: the run's metric; personal_accuracy: of what silos would use, which is the
    global model where they have none of their own"""
    over: Literal["samples", "silos"] = "samples"
    """pooled over all test samples, or the mean of the silos' figures"""
    target: float | None = None
    """of that figure"""
    published: dict[str, dict[str, float]] | None = None
    """partition: {algorithm: figure}"""


class Cell(NamedTuple):
    """One run."""

    partition: str
    algorithm: str
    seed: int
    config: fedmpi.Config

    @property
    def name(self) -> str:
        return f"{self.partition}/{self.algorithm}/{self.seed}"

    @property
    def root(self) -> Path:
        return Path(self.config.out)


class Curve(NamedTuple):
    """What one run came to: its figure after every round that was evaluated, and what had been spent by then."""

    rounds: list[int]
    values: list[float]
    megabytes: list[float]
    seconds: list[float]
    ended: str  # empty, or why it ended early
    ranks: set[int]  # on how many its rounds were made; the bytes of a round depend on it


# ---------------------------------------------------------------- the grid


def cells(file: Path, out: str | None, quick: bool = False) -> tuple[Grid, Path, list[Cell]]:
    """The grid in a file, where its runs lie, and the runs; every configuration is built. Raises ConfigError."""
    grid = build(Grid, read(file)[0], "", "grid")
    base: dict[str, Any] = grid.base if isinstance(grid.base, dict) else {}
    if isinstance(grid.base, str) and grid.base:
        base = read(file.parent / grid.base)[0]
    partitions = grid.partitions or {"as_given": {}}
    seeds = grid.seeds if grid.seeds is not None else [base.get("seed", 0)]
    if not grid.algorithms or not seeds:
        raise ConfigError("nothing to compare: give algorithms, and at least one seed")
    for name in (*partitions, *grid.algorithms):
        if not re.fullmatch(r"[\w.+-]+", name) or name in (".", ".."):
            raise ConfigError(f"'{name}' is to be the name of a folder: letters, digits and . _ + - only")
    for partition, known in (grid.published or {}).items():
        if partition not in partitions:
            raise ConfigError(f"published: no partition '{partition}'{did_you_mean(partition, partitions)}")
        for name in known:
            if name not in grid.algorithms:
                raise ConfigError(f"published.{partition}: no algorithm '{name}'{did_you_mean(name, grid.algorithms)}")
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
            found.append(Cell(partition, algorithm, seed, build(fedmpi.Config, values)))
        except ConfigError as error:
            raise ConfigError(f"{partition}, {algorithm}: {error}") from None
    return grid, root, found


def is_done(cell: Cell) -> bool:
    """Are all its rounds behind it? ConfigError when its directory holds another run."""
    rounds = checkpoint.sealed_rounds(cell.root)
    if not rounds:
        return False
    if changed := differences(read_config(cell.root).config, cell.config):
        raise ConfigError(f"{cell.root} holds another run: {changed[0]}; choose another --out")
    whole = rounds[-1] >= cell.config.rounds and (cell.root / "model.safetensors").exists()
    return whole or (cell.root / DIVERGED).exists()


def to_run(all_cells: list[Cell], only: list[str], num_ranks: int) -> list[int]:
    """The numbers of the cells that are still to be run; what can be seen to be wrong with them is said now."""
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
    """The rest of a run; a note in its directory when it diverges."""
    try:
        with fedmpi.Run(cell.config, comm=comm) as run:
            for _ in run:
                pass
    except Diverged as error:
        if comm.rank == 0:
            disk.replace_text(cell.root / DIVERGED, f"{error}\n")


# ---------------------------------------------------------------- what came of it


def curve(cell: Cell, grid: Grid) -> Curve:
    """A run's figures."""
    metric = grid.figure or read_config(cell.root).about["metric"]
    found = Curve([], [], [], [], _text(cell.root / DIVERGED), set())
    sent, spent_s = 0, 0.0
    for record in read_metrics(cell.root)[: cell.config.rounds]:
        sent += record["bytes_up"] + record["bytes_down"]
        spent_s += record["seconds"]["round"]
        found.ranks.add(len(record["peak_rss_bytes"]))
        value = _figure(record, metric)
        if grid.over == "silos":
            each = [v for row in record["silos"].values() if (v := _figure(row, of_silo(metric))) is not None]
            value = statistics.mean(each) if each else None
        if value is not None:
            found.rounds.append(record["round"])
            found.values.append(value)
            found.megabytes.append(sent / 1e6)
            found.seconds.append(spent_s)
    return found


def _figure(told: dict[str, Any], name: str) -> float | None:
    """Of a record, or of a silo's row in it."""
    return told[name] if told.get(name) is not None else told.get(name.removeprefix("personal_"))


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def row(partition: str, algorithm: str, curves: list[Curve], grid: Grid, maximize: bool) -> dict[str, Any]:
    """One line of the table: an algorithm on a partition, over its seeds."""
    best = max if maximize else min
    told: dict[str, Any] = {"partition": partition, "algorithm": algorithm, "seeds": len(curves)}
    scored = [c for c in curves if c.values]
    for name, values in (("final", [c.values[-1] for c in scored]), ("best", [best(c.values) for c in scored])):
        told[name] = statistics.mean(values) if values else None
        told[f"{name}_least"], told[f"{name}_most"] = (min(values), max(values)) if values else (None, None)
    told["published"] = (grid.published or {}).get(partition, {}).get(algorithm)
    if grid.target is not None:
        reached = []
        for c in scored:
            there = (n for n, v in zip(c.rounds, c.values, strict=True) if (v >= grid.target) == maximize)
            reached += [n for n in itertools.islice(there, 1)]
        told["rounds_to_target"] = statistics.mean(reached) if reached else None
        told["reached"] = len(reached)
    sent = [c.megabytes[-1] for c in scored if not math.isnan(c.megabytes[-1])]
    told["megabytes"] = statistics.mean(sent) if sent else None
    told["seconds"] = statistics.mean(c.seconds[-1] for c in scored) if scored else None
    told["ranks"] = " ".join(map(str, sorted(set().union(*(c.ranks for c in curves)))))
    told["diverged"] = sum(bool(c.ended) for c in curves)
    return told


def table(rows: list[dict[str, Any]], grid: Grid, metric: str) -> list[str]:
    """The lines to print."""
    head = [metric, "seeds", "final (least to most)", "best (least to most)", "published"]
    head += [f"rounds to {grid.target:g}"] if grid.target is not None else []
    lines = [[*head, "MB", "s", ""]]
    for partition, some in itertools.groupby(rows, lambda told: told["partition"]):
        lines.append([partition])
        for told in some:
            line = [f"  {told['algorithm']}", str(told["seeds"])]
            for name in ("final", "best"):
                span = f"({_number(told[f'{name}_least'])} to {_number(told[f'{name}_most'])})"
                line.append(f"{_number(told[name])}  {span}" if told["seeds"] > 1 else _number(told[name]))
            line.append(_number(told["published"]))
            if grid.target is not None:
                some_only = f" ({told['reached']} of {told['seeds']})" if 0 < told["reached"] < told["seeds"] else ""
                line.append(_number(told["rounds_to_target"], 1) + some_only)
            line += [_number(told["megabytes"], 2), _number(told["seconds"], 1)]
            lines.append([*line, f"{told['diverged']} diverged" if told["diverged"] else ""])
    widths = [max(len(line[n]) for line in lines if n < len(line)) for n in range(len(lines[0]))]
    return ["  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=False)).rstrip() for line in lines]


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def draw(done: dict[tuple[str, str], list[Curve]], metric: str, root: Path) -> None:
    """figure.png and figure.svg: a row of pictures a partition; means over seeds in a band from least to most."""
    from matplotlib.figure import Figure

    partitions = list(dict.fromkeys(partition for partition, _ in done))
    figure = Figure(figsize=(13, 3.6 * len(partitions)), layout="constrained")
    axes = figure.subplots(len(partitions), 3, squeeze=False, sharey="row")
    colors = {name: f"C{n % 10}" for n, name in enumerate(dict.fromkeys(name for _, name in done))}
    for (partition, algorithm), curves in done.items():
        columns = zip(axes[partitions.index(partition)], ("rounds", "megabytes", "seconds"), strict=True)
        most = max(curves, key=lambda c: len(c.values))
        for axis, what in columns:
            by_point = [[c for c in curves if n < len(c.values)] for n in range(len(most.values))]
            x = [statistics.mean(getattr(c, what)[n] for c in some) for n, some in enumerate(by_point)]
            values = [[c.values[n] for c in some] for n, some in enumerate(by_point)]
            axis.plot(x, [statistics.mean(v) for v in values], color=colors[algorithm], label=algorithm, lw=1.3)
            axis.fill_between(
                x, *([pick(v) for v in values] for pick in (min, max)), color=colors[algorithm], alpha=0.15
            )
            axis.set(xlabel=what, title=partition)
            axis.grid(alpha=0.3)
    for line in axes:
        line[0].set_ylabel(metric)
    axes[0][0].legend(fontsize="small")
    for kind in ("png", "svg"):
        figure.savefig(root / f"figure.{kind}", dpi=120)


def comparable(done: dict[tuple[str, str], list[Curve]]) -> dict[tuple[str, str], list[Curve]]:
    """The same without bytes, and a line that says so, where not all rounds were made on as many ranks."""
    by_ranks: dict[int, list[str]] = {}
    for names, curves in done.items():
        for num_ranks in set().union(*(c.ranks for c in curves)):
            by_ranks.setdefault(num_ranks, []).append("/".join(names))
    if len(by_ranks) < 2:
        return done
    told = "; ".join(
        f"{ranks}: {', '.join(some[:3])}{', ...' if len(some) > 3 else ''}" for ranks, some in sorted(by_ranks.items())
    )
    print(f"compare: no MB, which depend on the number of ranks; runs were made on {told}", file=sys.stderr, flush=True)
    return {
        names: [c._replace(megabytes=[math.nan] * len(c.megabytes)) for c in curves] for names, curves in done.items()
    }


def tell(grid: Grid, root: Path, all_cells: list[Cell]) -> None:
    """Table and figure of the runs that are done."""
    done: dict[tuple[str, str], list[Curve]] = {}
    about: dict[str, Any] = {}
    for cell in filter(is_done, all_cells):
        done.setdefault((cell.partition, cell.algorithm), []).append(curve(cell, grid))
        about = read_config(cell.root).about
    if not done:
        print("compare: no run is done yet", flush=True)
        return
    done = comparable(done)
    metric = grid.figure or about["metric"]
    rows = [row(*names, curves, grid, about["maximize"]) for names, curves in done.items()]
    with open(root / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(*table(rows, grid, metric), sep="\n", flush=True)
    drawn = {names: some for names, curves in done.items() if (some := [c for c in curves if c.values])}
    try:
        draw(drawn, metric, root)
    except ImportError:
        print("compare: no figure: it needs the package matplotlib (fedmpi[report])", file=sys.stderr, flush=True)


def compare(file: Path, out: str | None, only: list[str], quick: bool, comm: Any) -> None:
    """Run what is missing, then tell. A call of all ranks."""
    grid, root, all_cells = comm.collectively(lambda: cells(file, out, quick))
    first = comm.collectively(lambda: to_run(all_cells, only, comm.size) if comm.rank == 0 else [])
    waiting = json.loads(comm.broadcast_text(json.dumps(first), 0))
    for number, n in enumerate(waiting, start=1):
        if comm.rank == 0:
            print(f"compare: {number} of {len(waiting)}: {all_cells[n].name}", file=sys.stderr, flush=True)
        train(all_cells[n], comm)
    comm.collectively(lambda: tell(grid, root, all_cells) if comm.rank == 0 else None)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--out", help="where the runs lie, the table and the figure")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="algorithms, partitions or seeds")
    parser.add_argument(
        "--quick", action="store_true", help="two rounds of each cell with the first seed: does it run?"
    )
    given = parser.parse_args(arguments)
    comm = None
    try:
        comm = connect()
        compare(given.config, given.out, [name for name in given.only.split(",") if name], given.quick, comm)
        comm.finish()
    except FedmpiError as error:  # raised on every rank alike
        if comm.rank == 0 if comm is not None else is_first():
            print(f"compare: {error}", file=sys.stderr, flush=True)
        if comm is not None:
            comm.finish()
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
