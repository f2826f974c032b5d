"""The results of a grid: one row per algorithm and partition, table.csv, a figure."""

from __future__ import annotations

import csv
import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from fedmpi.compare.grid import DIVERGED, Cell, Grid, is_done
from fedmpi.directory import read_config
from fedmpi.metrics.scorers import of_silo
from fedmpi.records import read_metrics
from fedmpi.records.record import sent_bytes


class Curve(NamedTuple):
    """One run: its figure after each evaluated round, with the bytes and seconds spent up to that round."""

    rounds: list[int]
    values: list[float]
    megabytes: list[float]
    seconds: list[float]
    ended: str  # why it ended early; empty if it did not
    ranks: set[int]  # numbers of ranks that its rounds ran on; the bytes of a round depend on it


def curve(cell: Cell, grid: Grid) -> Curve:
    """Read a run's curve from its records."""
    metric = grid.figure or read_config(cell.root).about["metric"]
    found = Curve([], [], [], [], _text(cell.root / DIVERGED), set())
    sent, spent_s = 0, 0.0
    for record in read_metrics(cell.root)[: cell.config.rounds]:
        sent += sent_bytes(record)
        spent_s += record["seconds"]["round"]
        found.ranks.add(len(record["peak_rss_bytes"]))
        value = figure_of(record, metric)
        if grid.over == "silos":
            each = [v for row in record["silos"].values() if (v := figure_of(row, of_silo(metric))) is not None]
            value = statistics.mean(each) if each else None
        if value is not None:
            found.rounds.append(record["round"])
            found.values.append(value)
            found.megabytes.append(sent / 1e6)
            found.seconds.append(spent_s)
    return found


def figure_of(told: dict[str, Any], name: str) -> float | None:
    """The named figure of a record or of a silo's row; of the global model where there is no personal one."""
    return told[name] if told.get(name) is not None else told.get(name.removeprefix("personal_"))


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def row(partition: str, algorithm: str, curves: list[Curve], grid: Grid, maximize: bool) -> dict[str, Any]:
    """One row of the table: an algorithm on a partition, over its seeds."""
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
    """Write figure.png and figure.svg: one row of plots per partition; means over seeds in a band of their range."""
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
    """The curves, with their bytes removed and a warning printed where the number of ranks differs between rounds."""
    by_ranks: dict[int, list[str]] = {}
    for names, curves in done.items():
        for num_ranks in set().union(*(c.ranks for c in curves)):
            by_ranks.setdefault(num_ranks, []).append("/".join(names))
    if len(by_ranks) < 2:
        return done
    told = "; ".join(
        f"{ranks}: {', '.join(some[:3])}{', ...' if len(some) > 3 else ''}" for ranks, some in sorted(by_ranks.items())
    )
    print(f"compare: no MB: bytes depend on the number of ranks, and runs used {told}", file=sys.stderr, flush=True)
    return {
        names: [c._replace(megabytes=[math.nan] * len(c.megabytes)) for c in curves] for names, curves in done.items()
    }


def tell(grid: Grid, root: Path, all_cells: list[Cell], as_json: bool = False) -> None:
    """Print the table of the finished runs; write table.csv and the figure."""
    done: dict[tuple[str, str], list[Curve]] = {}
    about: dict[str, Any] = {}
    for cell in filter(is_done, all_cells):
        done.setdefault((cell.partition, cell.algorithm), []).append(curve(cell, grid))
        about = read_config(cell.root).about
    if not done:
        print("[]" if as_json else "compare: no run is done yet", flush=True)
        return
    done = comparable(done)
    metric = grid.figure or about["metric"]
    rows = [row(*names, curves, grid, about["maximize"]) for names, curves in done.items()]
    with open(root / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(json.dumps(rows) if as_json else "\n".join(table(rows, grid, metric)), flush=True)
    drawn = {names: some for names, curves in done.items() if (some := [c for c in curves if c.values])}
    try:
        draw(drawn, metric, root)
    except ImportError:
        print("compare: no figure: install matplotlib (fedmpi[report])", file=sys.stderr, flush=True)
