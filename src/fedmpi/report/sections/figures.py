"""Metrics of all silos together, and the confusion matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmpi.metrics.scorers import SILO_MEAN, WITHIN
from fedmpi.report.blocks import Block, Cell, Chart, Matrix, Section, Table, Text, line
from fedmpi.report.numbers import listed, number, spelled, thin
from fedmpi.report.reading import RunData
from fedmpi.report.sections.learning import rows, thinned
from fedmpi.report.status import Scored

MOST_CLASSES = 24
MOST_LINES = 7
MOST_CHARTS = 4


def figures(run: RunData) -> Section | None:
    history = run.history
    names = [name for name in history.figures if not name.endswith(WITHIN)]
    if not history.num or not names:
        return None
    blocks: list[Block] = [_table(run, names)]
    others = [n for n in names if n not in (run.metric, f"personal_{run.metric}") and not n.endswith("loss")]
    shares = [n for n in others if _within(history.of(n), 0.0, 1.0)]
    if shares:
        blocks.append(_chart(run, shares[:MOST_LINES], "Other metrics by round", "Value, 0 to 1"))
    rest = [n for n in others if n not in shares]
    for name in rest[:MOST_CHARTS]:
        blocks.append(_chart(run, [name], f"{spelled(name)} by round", spelled(name)))
    if left := [*shares[MOST_LINES:], *rest[MOST_CHARTS:]]:
        blocks.append(Text(f"Without a chart, only in the table: {listed(left, 20)}.", "note"))
    if any(name.startswith((SILO_MEAN, f"personal_{SILO_MEAN}")) for name in names):
        blocks.append(
            Text(
                f"{SILO_MEAN}...: the unweighted mean of the silos' figures; all others are of pooled samples.", "note"
            )
        )
    if history.matrix is not None:
        blocks.append(_matrix(*history.matrix))
    return Section("figures", "Figures of all silos together", blocks)


def _within(values: np.ndarray, low: float, high: float) -> bool:
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() >= low and finite.max() <= high)


def _table(run: RunData, names: list[str]) -> Table:
    history = run.history
    body: list[list[Any]] = []
    for name in names:
        values = history.of(name)
        finite = np.flatnonzero(np.isfinite(values))
        if not finite.size:
            body.append([name, None, None, None, None])
            continue

        def at(i: int, values: np.ndarray = values) -> Scored:
            return Scored(int(history.rounds[i]), float(values[i]))

        end = at(finite[-1])
        within = history.of(f"{name}{WITHIN}")[finite[-1]]
        bound = f" ± {within:.1g}" if np.isfinite(within) else ""
        row: list[Any] = [name, Cell(f"{number(end.value)}{bound}", end.value), end.round]
        for one in (at(finite[values[finite].argmin()]), at(finite[values[finite].argmax()])):
            row.append(Cell(f"{number(one.value)} (round {one.round:,})", one.value))
        body.append(row)
    return Table(["figure", "last", "of round", "lowest", "highest"], body)


def _chart(run: RunData, names: list[str], title: str, axis: str) -> Chart:
    history = run.history
    there = np.flatnonzero(np.any([history.there(name) for name in names], axis=0))
    chosen = there[thin(len(there), *(history.of(name)[there] for name in names))]
    traces = []
    for slot, name in enumerate(names):
        at = np.array([i for i in chosen if history.there(name)[i]], dtype=int)
        traces.append(line(name, {"round": history.rounds[at]}, history.of(name)[at], slot))
    columns = [history.rounds[chosen], *(history.of(name)[chosen] for name in names)]
    return Chart(
        title=title,
        alt=f"Line chart of {', '.join(names)} over {len(there)} rounds.",
        note=thinned(len(chosen), len(there)).strip(),
        traces=traces,
        axes={"round": "Round"},
        layout={"yaxis": {"title": {"text": axis}}},
        table=Table(["round", *names], rows(columns), folded="Data as a table"),
        height=300,
    )


def _matrix(round: int, counts: list[list[int]]) -> Block:
    """The confusion matrix as a shaded table; for many classes, the most frequent confusions."""
    matrix = np.array(counts, dtype=np.int64)
    classes = len(matrix)
    of_class, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
    note = f"Test samples of all silos by true class (rows) and predicted class (columns), after round {round:,}."
    if classes > MOST_CLASSES:
        wrong = matrix.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:20]
        body: list[list[Any]] = []
        for true, taken in zip(*np.unravel_index(order, wrong.shape), strict=True):
            if wrong[true, taken]:
                share = wrong[true, taken] / of_class[true]
                body.append(
                    [f"class {true}", f"class {taken}", int(wrong[true, taken]), Cell(f"{share:.1%}", float(share))]
                )
        head = ["true", "predicted", "samples", "of the true class"]
        return Table(
            head, body, caption=f"The most frequent of all confusions among {classes} classes, round {round:,}"
        )
    body = []
    for true, row in enumerate(matrix):
        cells: list[Any] = [f"true {true}"]
        for taken, count in enumerate(row.tolist()):
            share = count / of_class[true] if of_class[true] else 0.0
            mark = "share hit" if true == taken else "wrong" if count else "zero"
            cells.append(Cell(f"{count:,}", count, mark, share))
        recall = matrix[true, true] / of_class[true] if of_class[true] else None
        cells += [int(of_class[true]), Cell("-" if recall is None else f"{recall:.1%}", recall)]
        body.append(cells)
    last: list[Any] = ["precision"]
    for taken in range(classes):
        share = matrix[taken, taken] / predicted[taken] if predicted[taken] else None
        last.append(Cell("-" if share is None else f"{share:.0%}", share))
    total, right = int(matrix.sum()), int(np.trace(matrix))
    last += [total, Cell("-" if not total else f"{right / total:.1%}", right / total if total else None)]
    head = ["", *(f"{c}" for c in range(classes)), "samples", "recall"]
    note += " Framed: right. The darker a cell, the larger its share of the row."
    return Matrix("Confusion matrix", note, Table(head, [*body, last]))
