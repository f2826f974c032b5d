"""Run directories side by side: figures, bytes, seconds, and the keys in which their configurations differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmpi.components import to_dict, written
from fedmpi.config import flatten
from fedmpi.directory import read_config
from fedmpi.errors import ConfigError
from fedmpi.records import read_metrics
from fedmpi.records.record import sent_bytes


def compare_runs(roots: Sequence[Path]) -> list[dict[str, Any]]:
    """One row per run directory, read from its files alone.

    `last` and `best` are of the run's metric, None before the first evaluation. `megabytes` (all traffic of all ranks)
    and `seconds` are sums over all rounds. `differs` holds the keys that do not have the same value in all runs, except
    `out`; None where a run lacks the key. Raises ConfigError where a directory holds no run.
    """
    for root in roots:
        if not (root / "config.yaml").exists():
            raise ConfigError(f"{root} is not a run directory")
    begun = [read_config(root) for root in roots]
    flat = [flatten(values) if isinstance(values := to_dict(one.config), dict) else {} for one in begun]
    differ = differing(flat)
    rows = []
    for root, one, values in zip(roots, begun, flat, strict=True):
        records = read_metrics(root)
        metric, maximize = one.about["metric"], one.about["maximize"]
        scores = [record[metric] for record in records if record.get(metric) is not None]
        rows.append(
            {
                "run": str(root),
                "rounds": len(records),
                "metric": metric,
                "last": scores[-1] if scores else None,
                "best": (max if maximize else min)(scores) if scores else None,
                "megabytes": sum(map(sent_bytes, records)) / 1e6,
                "seconds": sum(r["seconds"]["round"] for r in records),
                "differs": {key: values.get(key) for key in differ},
            }
        )
    return rows


def differing(flat: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that do not have the same value in all flattened configurations, except `out`.

    >>> differing([{"rounds": 2, "out": "a"}, {"rounds": 2, "out": "b", "seed": 1}])
    ['seed']
    """
    keys = dict.fromkeys(key for values in flat for key in values)
    return [key for key in keys if key != "out" and any(v.get(key) != flat[0].get(key) for v in flat)]


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table to print: a line per run, then a line per key that differs."""
    told = [["run", "rounds", "metric", "last", "best", "MB", "s"]]
    for row in rows:
        figures = ("-" if row[name] is None else f"{row[name]:.4f}" for name in ("last", "best"))
        spent = (f"{row['megabytes']:.2f}", f"{row['seconds']:.1f}")
        told.append([row["run"], str(row["rounds"]), row["metric"], *figures, *spent])
    differ = [[key, *(written(row["differs"][key]) for row in rows)] for key in rows[0]["differs"]]
    heads = [["differs", *(row["run"] for row in rows)]] if differ else []
    return [*_aligned(told), *_aligned([*heads, *differ])]


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]
