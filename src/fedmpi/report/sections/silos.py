"""How well the model serves each silo."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmpi.report.blocks import Block, Cell, Chart, Grid, Section, Table, Text, label
from fedmpi.report.drawings import sparkline
from fedmpi.report.numbers import number, plural, spelled, thin
from fedmpi.report.reading import RunData

MOST_SMALLS = 60  # small drawings
MOST_NAMES = 40  # silos with their names in the chart
MOST_ROWS = 1000
SMALL_POINTS = 80

HIDDEN = {
    "pooled": "Figures of single silos never left their ranks (disclose: pooled), so there are no charts by silo.",
    "cohort": "Figures of single silos never left their ranks (disclose: cohort), so there are no charts by silo.",
    "secure": "Only sums over silos were ever seen (secure aggregation), so there are no charts by silo.",
}


def hidden(run: RunData) -> str:
    """Why there are no figures of single silos; empty if there are."""
    if run.disclosed == "silo":
        return ""
    return HIDDEN["secure" if run.config.get("secure") is not None else run.disclosed]


def silos(run: RunData) -> Section | None:
    history = run.history
    if not history.silos:
        return None
    blocks: list[Block] = []
    metric = run.metric if np.isfinite(history.of_silos(run.metric)).any() else "loss"
    values = history.of_silos(metric)
    evaluated = np.flatnonzero(np.isfinite(values).any(axis=1))
    if why := hidden(run):
        blocks.append(Text(why, "note"))
    elif not evaluated.size:
        blocks.append(Text("No silo has test figures: no round is evaluated yet, or no silo has test data.", "note"))
    if evaluated.size:
        at = int(evaluated[-1])
        highest = run.maximize if metric == run.metric else False
        order = _order(values[at], highest)
        blocks.append(_last(run, metric, at, order))
        if len(evaluated) > 1:
            blocks.append(_smalls(run, metric, evaluated, order))
    blocks.append(_table(run, metric, evaluated))
    return Section("silos", "Silos", blocks)


def _order(values: np.ndarray, highest: bool) -> np.ndarray:
    """The silos with a value, the worst first."""
    there = np.flatnonzero(np.isfinite(values))
    return there[np.argsort(values[there] if highest else -values[there], kind="stable")]


def _last(run: RunData, metric: str, at: int, order: np.ndarray) -> Chart:
    """Each silo's figure after the last evaluated round, the worst first."""
    history = run.history
    values, tests = history.of_silos(metric)[at, order], history.of_silos("num_test")[at, order]
    names = [history.silos[i] for i in order]
    pooled = history.of(metric)[at]
    without = int(np.isfinite(history.of_silos(metric)).any(axis=0).sum()) - len(order)
    gone = f" {plural(without, 'silo')} had figures before, but none in this round." if without else ""
    dots: dict[str, Any] = {"color": "$c0", "size": 9 if len(order) <= MOST_NAMES else 6, "symbol": "circle"}
    trace: dict[str, Any] = {"type": "scatter", "mode": "markers", "name": "silo", "marker": dots, "showlegend": False}
    trace |= {"text": [label(name) for name in names], "hovertemplate": "%{text}: %{x:.4f}<extra></extra>"}
    layout: dict[str, Any] = {"hovermode": "closest"}
    mark = {"type": "line", "line": {"color": "$muted", "dash": "dash", "width": 1.5}}
    told = {"text": f"all silos {number(pooled)}", "showarrow": False, "font": {"color": "$muted", "size": 12}}
    if len(order) <= MOST_NAMES:
        trace |= {"x": values.tolist(), "y": list(range(len(order)))}
        layout["xaxis"] = {
            "title": {"text": f"{label(spelled(metric))} in round {history.rounds[at]:,}"},
            "showgrid": True,
        }
        ticks = {"tickmode": "array", "tickvals": trace["y"], "ticktext": [label(_short(name)) for name in names]}
        layout["yaxis"] = {"autorange": "reversed", **ticks}
        if np.isfinite(pooled):
            layout["shapes"] = [mark | {"x0": pooled, "x1": pooled, "yref": "paper", "y0": 0, "y1": 1}]
            place = {"x": pooled, "yref": "paper", "y": 1, "yanchor": "bottom", "xanchor": "center"}
            layout["annotations"] = [told | place]
            layout["margin"] = {"l": 90, "r": 20, "t": 26, "b": 46}
        height = 110 + 24 * len(order)
    else:
        trace |= {"x": list(range(1, len(order) + 1)), "y": values.tolist()}
        trace["hovertemplate"] = "%{text}: %{y:.4f}<extra></extra>"
        layout["xaxis"] = {"title": {"text": "Silos, the worst first"}}
        layout["yaxis"] = {"title": {"text": f"{label(spelled(metric))} in round {history.rounds[at]:,}"}}
        if np.isfinite(pooled):
            layout["shapes"] = [mark | {"y0": pooled, "y1": pooled, "xref": "paper", "x0": 0, "x1": 1}]
            place = {"y": pooled, "xref": "paper", "x": 1, "xanchor": "right", "yanchor": "bottom"}
            layout["annotations"] = [told | place]
        height = 340
    rows = [
        [name, value, None if np.isnan(num) else int(num)]
        for name, value, num in zip(names, values.tolist(), tests.tolist(), strict=True)
    ]
    return Chart(
        title=f"{spelled(metric)} of each silo, round {history.rounds[at]:,}",
        alt=f"Dot chart of {metric} of {plural(len(order), 'silo')}, from {number(float(values[0]))} ({names[0]}, the "
        f"worst) to {number(float(values[-1]))} ({names[-1]}).",
        note="The worst first; the dashed line is the figure of all test samples together." + gone,
        traces=[trace],
        layout=layout,
        table=Table(["silo", metric, "test samples"], rows[:MOST_ROWS], folded="Data as a table"),
        height=height,
    )


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _smalls(run: RunData, metric: str, evaluated: np.ndarray, order: np.ndarray) -> Grid:
    history = run.history
    values = history.of_silos(metric)[evaluated]
    pooled = history.of(metric)[evaluated]
    shown = order[:MOST_SMALLS]
    finite = np.concatenate([values[:, shown].ravel(), pooled])
    finite = finite[np.isfinite(finite)]
    low, high = float(finite.min()), float(finite.max())
    rounds = history.rounds[evaluated]
    items = []
    for silo in shown:
        chosen = thin(len(evaluated), values[:, silo], most=SMALL_POINTS)
        end = values[np.flatnonzero(np.isfinite(values[:, silo]))[-1], silo]
        drawn = sparkline(rounds, values[:, silo], pooled, low, high, chosen)
        items.append((history.silos[silo], drawn, f"{number(float(end))} at the end"))
    cut = "" if len(order) <= MOST_SMALLS else f" Shown are the {MOST_SMALLS} worst of {len(order):,} silos."
    picked = thin(len(evaluated), most=40)
    few = shown[:24]
    head = ["round", *(history.silos[i] for i in few)]
    rows = [[int(rounds[i]), *(None if v != v else v for v in values[i, few].tolist())] for i in picked]
    parts = [] if len(few) == len(shown) else [f"the {len(few)} worst silos"]
    parts += [] if len(picked) == len(evaluated) else [f"{len(picked)} of {len(evaluated):,} rounds"]
    folded = f"Data as a table{': ' + ', '.join(parts) if parts else ''}"
    return Grid(
        title=f"{spelled(metric)} by round, silo by silo",
        note=f"Solid: the silo; dotted: all silos. All have the same axes: rounds {rounds[0]:,} to {rounds[-1]:,}, "
        f"{metric} {number(low)} to {number(high)}. The worst at the end come first.{cut}",
        items=items,
        table=Table(head, rows, folded=folded),
    )


def _table(run: RunData, metric: str, evaluated: np.ndarray) -> Table:
    """All silos: size, place, last figures."""
    history = run.history
    at = int(evaluated[-1]) if evaluated.size else history.num - 1
    trained = np.isfinite(history.of_silos("num_samples")).sum(axis=0)
    told = bool(trained.any()) and not hidden(run)
    states = {str(row["id"]): row for row in run.roster}
    names = list(dict.fromkeys([metric, "loss"])) if evaluated.size else []
    head = ["silo", "rank", "training samples", *(["test samples"] if evaluated.size else []), *names]
    head += ["training loss", "rounds trained"] if told else []
    head += ["state"] if states else []
    rows: list[list[Any]] = []
    for i, silo in enumerate(history.silos[:MOST_ROWS]):
        row: list[Any] = [
            silo,
            _whole(_newest(history.of_silos("rank"), i)),
            _whole(_newest(history.of_silos("num_train"), i)),
        ]
        if evaluated.size:
            row += [_whole(history.of_silos("num_test")[at, i])]
            row += [_real(history.of_silos(name)[at, i]) for name in names]
        if told:
            row += [_real(_newest(history.of_silos("train_loss"), i)), int(trained[i])]
        if states:
            about = states.get(silo, {})
            word = str(about.get("state", "unknown"))
            row.append(
                Cell(word + (f", {about['why']}" if about.get("why") else ""), mark="" if word == "active" else "bad")
            )
        rows.append(row)
    cut = f"The first {MOST_ROWS:,} of {len(history.silos):,} silos." if len(history.silos) > MOST_ROWS else ""
    return Table(head, rows, note=cut, folded=f"All silos: size, rank, last figures ({len(history.silos):,})")


def _newest(values: np.ndarray, silo: int) -> float:
    finite = np.flatnonzero(np.isfinite(values[:, silo]))
    return float(values[finite[-1], silo]) if finite.size else np.nan


def _whole(value: float) -> int | None:
    return None if np.isnan(value) else int(value)


def _real(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
