"""Bytes that ranks sent and received."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fedmpi.report.blocks import Block, Cell, Chart, Facts, Section, Table, Text, bars
from fedmpi.report.numbers import size, stretches
from fedmpi.report.reading import RunData

MOST_BARS = 60
WAYS = {
    "bytes_up": ("up", "vectors sent for the sum", 0),
    "bytes_down": ("down", "vectors received as the result", 1),
    "bytes_control": ("tables", "small tables of figures", 2),
}


def traffic(run: RunData) -> Section | None:
    history = run.history
    if not history.num or not np.isfinite(history.of("bytes_up")).any():
        return None
    dense = 4 * int(run.about["params"])
    rows: list[tuple[str, Any]] = [("All bytes", Cell(history.sent_text(), int(history.sent.sum())))]
    for field, (name, what, _) in WAYS.items():
        values = history.of(field)
        total, typical = float(np.nansum(values)), float(np.nanmedian(values))
        rows.append(
            (f"Bytes {name}", Cell(f"{size(total)} in all, {size(typical)} in a median round: {what}", int(total)))
        )
    for way in ("up", "down"):
        rows.append((f"Codec {way}", codec(run, way)))
    rows.append(("A model in float32", Cell(f"{size(dense)}", dense)))
    typical = float(np.nanmedian(history.of("bytes_up")))
    rows.append(
        ("Sent up in a median round", f"as much as {typical / dense:.3g} models in float32, by all ranks together")
    )
    drawn = _chart(run) if history.sent.any() else [Text("Nothing was sent between ranks.", "note")]
    return Section("traffic", "Traffic", [Facts(rows), *drawn])


def codec(run: RunData, way: str) -> str:
    """The codec of a way, with its options."""
    section = (run.config.get("exchange") or {}).get(way) or {}
    about = section.get("codec") or {"name": "identity"}
    options = ", ".join(f"{k} {json.dumps(v)}" for k, v in about.items() if k != "name" and v is not None)
    feedback = "; with feedback" if section.get("feedback") else ""
    return f"{about.get('name')}{f' ({options})' if options else ''}{feedback}"


def _chart(run: RunData) -> list[Block]:
    history = run.history
    groups = stretches(history.num, MOST_BARS)
    x = [float(history.rounds[group].mean()) for group in groups]
    means = {field: [float(np.nanmean(history.of(field)[g])) for g in groups] for field in WAYS}
    traces = [
        bars(f"{name}: {what}", x, np.array(means[field]) / 1e6, slot) for field, (name, what, slot) in WAYS.items()
    ]
    names = [
        f"{history.rounds[g[0]]}" if len(g) == 1 else f"{history.rounds[g[0]]}-{history.rounds[g[-1]]}" for g in groups
    ]
    body = [[name, *(Cell(size(means[field][i]), means[field][i]) for field in WAYS)] for i, name in enumerate(names)]
    note = "All ranks together."
    if len(groups) < history.num:
        note += f" Each bar is the mean of a stretch of rounds: {history.num:,} rounds in {len(groups)} bars."
    chart = Chart(
        title="Megabytes of a round",
        alt=f"Stacked bars of megabytes up, down and in tables over {history.num:,} rounds.",
        note=note,
        traces=traces,
        layout={"xaxis": {"title": {"text": "Round"}}, "yaxis": {"title": {"text": "MB"}}},
        table=Table(["round", *(name for name, *_ in WAYS.values())], body, folded="Data as a table"),
        height=300,
    )
    return [chart]
