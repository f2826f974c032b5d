"""How old updates were when they arrived, under `engine: buffered`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from fedmpi.report.blocks import Block, Cell, Chart, Facts, Section, Table, bars
from fedmpi.report.numbers import number, plural
from fedmpi.report.reading import RunData


def staleness(run: RunData) -> Section | None:
    arrivals = [a for record in run.history.records for a in record.get("arrivals") or ()]
    if not arrivals:
        return None
    counted = Counter(int(a["staleness"]) for a in arrivals if not a.get("dropped"))
    dropped = Counter(int(a["staleness"]) for a in arrivals if a.get("dropped"))
    every = sorted({*counted, *dropped})
    ages = [int(a["staleness"]) for a in arrivals]
    rows: list[tuple[str, Any]] = [
        ("Updates that arrived", len(arrivals)),
        ("Too old to count", sum(dropped.values())),
        ("Mean staleness", Cell(f"{number(float(np.mean(ages)), 2)} server steps", float(np.mean(ages)))),
        ("Largest staleness", Cell(plural(max(ages), "server step"), max(ages))),
    ]
    traces = [bars("counted", every, [counted[s] for s in every], 0)]
    if dropped:
        traces.append(bars("too old, dropped", every, [dropped[s] for s in every], 1))
    body = [[str(s), counted[s], dropped[s]] for s in every]
    chart = Chart(
        title="Updates by staleness",
        alt=f"Bars of the number of updates by staleness, from {every[0]} to {every[-1]} server steps.",
        note="Staleness: the server's steps from the parameters that a silo started from to the arrival of its update.",
        traces=traces,
        layout={
            "xaxis": {"title": {"text": "Server steps missed"}, "dtick": max(1, len(every) // 15)},
            "yaxis": {"title": {"text": "Updates"}},
        },
        table=Table(["staleness", "counted", "dropped"], body, folded="Data as a table"),
        height=280,
    )
    blocks: list[Block] = [Facts(rows), chart, _by_silo(run, arrivals)]
    return Section("staleness", "Staleness", blocks)


def _by_silo(run: RunData, arrivals: list[dict[str, Any]]) -> Table:
    by_silo: dict[str, list[dict[str, Any]]] = {}
    for arrival in arrivals:
        by_silo.setdefault(str(arrival["silo"]), []).append(arrival)
    rows = []
    for silo in sorted(by_silo, key=lambda silo: -len(by_silo[silo])):
        ages = [int(a["staleness"]) for a in by_silo[silo]]
        lost = sum(bool(a.get("dropped")) for a in by_silo[silo])
        rows.append([silo, len(ages), lost, float(np.mean(ages)), max(ages)])
    return Table(["silo", "updates", "dropped", "mean staleness", "largest"], rows[:1000], caption="Staleness by silo")
