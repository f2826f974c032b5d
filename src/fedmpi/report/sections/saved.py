"""Checkpoints on disk."""

from __future__ import annotations

from typing import Any

from fedmpi.report.blocks import Cell, Section, Table, Text
from fedmpi.report.numbers import number, size
from fedmpi.report.reading import RunData


def saved(run: RunData) -> Section:
    if not run.saved:
        return Section("checkpoints", "Checkpoints", [Text("There is no checkpoint with a manifest.", "note")])
    scored = [one.score for one in run.saved if one.score is not None]
    top = min(one.round for one in run.saved if one.score == max(scored)) if scored else None
    rows: list[list[Any]] = []
    for one in run.saved:
        value = None if one.score is None else one.score if run.maximize else -one.score
        use = "resume, eval, export" if one.resumable else "eval, export"
        marks = "the best" if one.round == top else ""
        state: Any = Cell(one.trouble, mark="bad") if one.trouble else marks or "-"
        shown = "-" if value is None else number(value)
        rows.append([f"round {one.round:,}", Cell(shown, value), Cell(size(one.bytes), one.bytes), use, state])
    every, keep = run.value("checkpoint.every", "?"), run.value("checkpoint.keep", "?")
    note = f"A checkpoint every {every} rounds, the newest {keep} are kept, and the best. fedmpi inspect checks them."
    return Section(
        "checkpoints", "Checkpoints", [Table(["checkpoint", run.metric, "size", "usable for", ""], rows, note=note)]
    )
