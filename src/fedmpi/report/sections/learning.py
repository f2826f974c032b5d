"""The metric and the losses by round, seconds and bytes."""

from __future__ import annotations

import numpy as np

from fedmpi.report.blocks import Block, Chart, Section, Switch, Table, Text, Trace, band, label, line, numbers
from fedmpi.report.numbers import listed, number, spelled, thin
from fedmpi.report.reading import RunData
from fedmpi.report.status import best, last, resumed, worst

AXES = {
    "round": ("Rounds", "Round"),
    "seconds": ("Seconds", "Seconds of training, each round as long as its slowest rank"),
    "bytes": ("Megabytes", "MB of traffic, all ranks: up, down and tables"),
    "virtual": ("Virtual time", "Virtual seconds"),
}


def axes_of(run: RunData) -> dict[str, np.ndarray]:
    """The values of each horizontal axis, by round."""
    history = run.history
    found = {
        "round": history.rounds.astype(float),
        "seconds": np.nancumsum(history.of("seconds", "round")),
        "bytes": np.cumsum(history.sent) / 1e6,
    }
    if np.isfinite(history.of("virtual_s")).any():
        found["virtual"] = history.of("virtual_s")
    return found


def spread(run: RunData, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The 10th and the 90th percentile of a figure over silos, by round; None if fewer than three silos have it."""
    values = run.history.of_silos(name)
    several = np.isfinite(values).sum(axis=1) >= 3
    if not several.any():
        return None
    low, high = np.full(len(values), np.nan), np.full(len(values), np.nan)
    low[several], high[several] = np.nanpercentile(values[several], [10, 90], axis=1)
    return low, high


def _offered(over: dict[str, np.ndarray]) -> list[str]:
    """The axes to choose from: bytes only if something was sent."""
    return [name for name, values in over.items() if name != "bytes" or values.any()]


def learning(run: RunData) -> Section:
    history, metric = run.history, run.metric
    if not history.num:
        return Section("learning", "Learning", [Text("No round is recorded yet.", "note")])
    blocks: list[Block] = []
    over = axes_of(run)
    if history.num > 1:
        blocks.append(Switch("learning", [(name, AXES[name][0]) for name in _offered(over)]))
    if metric not in ("loss", "train_loss") and history.there(metric).any():
        blocks.append(_metric(run, over))
    blocks.append(_losses(run, over))
    if not history.there(metric).any():
        every = run.value("evaluate.every", 1)
        blocks.insert(0, Text(f"No round is evaluated yet (evaluate.every: {every}).", "note"))
    return Section("learning", "Learning", blocks)


def _metric(run: RunData, over: dict[str, np.ndarray]) -> Chart:
    history, metric = run.history, run.metric
    evaluated = np.flatnonzero(history.there(metric))
    values, personal = history.of(metric)[evaluated], history.of(f"personal_{metric}")[evaluated]
    lowest = np.array([(r.get("worst") or {}).get(metric, np.nan) for r in history.records], dtype=float)[evaluated]
    chosen = thin(len(evaluated), values, lowest)
    at = evaluated[chosen]
    x = {name: axis[at] for name, axis in over.items()}
    traces: list[Trace] = []
    head = ["round", *([] if len(over) < 2 else ["seconds", "MB"]), metric]
    columns = [history.rounds[at], over["seconds"][at], over["bytes"][at], values[chosen]]
    note = "The figure of all silos' test samples together"
    if (edges := spread(run, metric)) is not None:
        low, high = edges[0][at], edges[1][at]
        traces += band("the middle 80 % of silos", x, low, high)
        head += ["10th percentile of silos", "90th percentile of silos"]
        columns += [low, high]
        note += ", the middle 80 % of silos (shaded)"
    if np.isfinite(lowest).any():
        traces.append(line("worst silo", x, lowest[chosen], 1))
        head += ["worst silo", "which"]
        names = [str((history.records[i].get("worst") or {}).get("silo", "-")) for i in at]
        columns += [lowest[chosen], names]
        note += ", and the worst silo of each round"
    traces.append(line("all silos", x, values[chosen], 0, wide=True))
    if np.isfinite(personal).any():
        traces.append(line("personal models", x, personal[chosen], 2))
        head.append(f"personal_{metric}")
        columns.append(personal[chosen])
        note += ", and the silos' personal models"
    traces += _breaks(run, evaluated, over)
    top, end = best(run), last(run, metric)
    if top is not None:
        place = int(np.flatnonzero(history.rounds == top.round)[0])
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"best: {number(top.value)} in round {top.round:,}",
                "y": [top.value],
                "over": {name: [float(axis[place])] for name, axis in over.items()},
                "marker": {"symbol": "star", "size": 14, "color": "$c4", "line": {"color": "$ink", "width": 1}},
            }
        )
    said = "" if top is None or end is None else f" It ends at {number(end.value)}; its best is {number(top.value)}."
    if (low_silo := worst(run)) is not None:
        said += f" The worst silo at the end is {low_silo[0]} with {number(low_silo[1])}."
    return Chart(
        title=f"{spelled(metric)} by round",
        alt=f"Line chart of {metric} over {len(evaluated)} evaluated rounds.{said}",
        note=note + "." + thinned(len(at), len(evaluated)),
        traces=traces,
        axes={name: AXES[name][1] for name in _offered(over)},
        layout={"yaxis": {"title": {"text": label(spelled(metric))}}},
        table=Table(head, rows(columns), folded="Data as a table"),
    )


def _breaks(run: RunData, evaluated: np.ndarray, over: dict[str, np.ndarray]) -> list[Trace]:
    """Marks on the line where ranks were lost and where the run was resumed: at the next evaluated round."""
    history = run.history
    lost = [int(e["round"]) + 1 for e in run.events if e.get("event") == "lost" and "round" in e]
    found: list[Trace] = []
    for name, rounds, symbol in (("after a rank was lost", lost, "x"), ("resumed", resumed(run), "triangle-up-open")):
        after = [evaluated[history.rounds[evaluated] >= round] for round in rounds]
        at = np.array(sorted({int(some[0]) for some in after if some.size}), dtype=int)
        if at.size:
            marker = {"symbol": symbol, "size": 13, "color": "$ink", "line": {"width": 2}}
            trace: Trace = {"type": "scatter", "mode": "markers", "name": name, "marker": marker}
            trace |= {"y": numbers(history.of(run.metric)[at]), "over": {k: numbers(v[at]) for k, v in over.items()}}
            found.append(trace)
    return found


def _losses(run: RunData, over: dict[str, np.ndarray]) -> Chart:
    history = run.history
    names = [n for n in ("loss", "train_loss", "personal_loss") if history.there(n).any()]
    titles = {"loss": "test loss", "train_loss": "training loss", "personal_loss": "test loss of personal models"}
    values = {name: history.of(name) for name in names}
    chosen = thin(history.num, *values.values())
    traces = []
    for slot, name in enumerate(names):
        at = np.array([i for i in chosen if history.there(name)[i]], dtype=int)
        x = {axis: v[at] for axis, v in over.items()}
        traces.append(line(titles[name], x, values[name][at], slot, wide=name == "loss"))
    finite = np.concatenate([v[np.isfinite(v)] for v in values.values()] or [np.zeros(0)])
    logs = bool(finite.size and finite.min() > 0 and finite.max() > 50 * finite.min())
    blank = [titles[n] for n in names if (history.there(n) & ~np.isfinite(values[n])).any()]
    note = "Training loss is the mean over what the silos visited; test loss is that of the new global model."
    if blank:
        note += f" Gaps: {listed(blank)} was not finite or not told there."
    axis = {"title": {"text": "Loss, logarithmic" if logs else "Loss"}, "type": "log" if logs else "linear"}
    columns = [history.rounds[chosen], *(values[name][chosen] for name in names)]
    return Chart(
        title="Loss by round",
        alt=f"Line chart of {listed([titles[n] for n in names])} over {history.num} rounds.",
        note=note + thinned(len(chosen), history.num),
        traces=traces,
        axes={name: AXES[name][1] for name in _offered(over)},
        layout={"yaxis": axis},
        table=Table(["round", *names], rows(columns), folded="Data as a table"),
    )


def rows(columns: list[np.ndarray] | list[list[str]]) -> list[list[object]]:
    """The rows of a table from its columns; nan becomes None."""
    listed_columns = [column.tolist() if isinstance(column, np.ndarray) else column for column in columns]
    return [[None if v != v else v for v in row] for row in zip(*listed_columns, strict=True)]


def thinned(shown: int, num: int) -> str:
    """A sentence that says that a chart shows a part of the rounds; empty if it shows all."""
    if shown >= num:
        return ""
    return (
        f" Shown are {shown:,} of {num:,} rounds, with the highest and lowest of each stretch; metrics.jsonl has all."
    )
