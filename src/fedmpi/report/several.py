"""The parts of a page about several runs: results, what differs, curves, cost, and each run behind a heading."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from fedmpi.compare.runs import differing
from fedmpi.compare.table import Curve, row
from fedmpi.components import written
from fedmpi.records import PHASES
from fedmpi.records.record import SENT
from fedmpi.report.blocks import (
    Block,
    Cell,
    Chart,
    Fold,
    Section,
    Switch,
    Table,
    Text,
    Trace,
    band,
    bars,
    label,
    line,
    look,
)
from fedmpi.report.groups import Group, Runs, curve
from fedmpi.report.numbers import number, plural, seconds, size, spelled, thin
from fedmpi.report.sections import sections
from fedmpi.report.sections.learning import AXES
from fedmpi.report.sections.timing import LOOKS, styled
from fedmpi.report.status import best, last, status, total_s, worst

MOST_DETAILS = 12  # runs that are shown in full
MOST_LINES = 14  # groups in one chart


def parts(runs: Runs) -> list[Section]:
    curves = {id(run): curve(run, runs.metric, runs.grid.over) for run in runs.runs}
    found = [_results(runs, curves), _differences(runs), _curves(runs, curves), _cost(runs)]
    if len(runs.runs) <= MOST_DETAILS:
        folds: list[Block] = [
            Fold(name, sections(run, f"run{n}-"))
            for n, (name, run) in enumerate(zip(runs.names, runs.runs, strict=True), start=1)
        ]
        found.append(Section("single", "Single runs", [Text("Open a run for all of its report.", "note"), *folds]))
    else:
        why = f"With more than {MOST_DETAILS} runs they are left out here: fedmpi report DIR shows one."
        found.append(Section("single", "Single runs", [Text(why, "note")]))
    return found


# ---------------------------------------------------------------- results


def _results(runs: Runs, curves: dict[int, Curve]) -> Section:
    blocks: list[Block] = []
    grouped = any(len(group.runs) > 1 for group in runs.groups) or bool(runs.grid.published)
    if grouped:
        blocks.append(_group_table(runs, curves))
    if len(runs.runs) > 1:
        blocks.append(_finals(runs, curves))
    table = _run_table(runs)
    blocks.append(Table(table.head, table.rows, folded=f"All {len(runs.runs)} runs") if grouped else table)
    others = [f"{name}: its metric is {r.metric}" for name, r in zip(runs.names, runs.runs, strict=True)]
    others = [text for text, r in zip(others, runs.runs, strict=True) if r.metric != runs.runs[0].metric]
    if others:
        blocks.append(Text(f"Compared is {runs.metric}, the metric of {runs.names[0]}. {'; '.join(others)}.", "note"))
    if runs.missing:
        blocks.append(Text(f"{plural(len(runs.missing), 'run')} of the grid not trained yet.", "note"))
    return Section("results", "Results", blocks)


def _run_table(runs: Runs) -> Table:
    tops = [best(run, runs.metric) for run in runs.runs]
    values = [top.value for top in tops if top is not None]
    first = (max if runs.maximize else min)(values) if values else None
    rows: list[list[Any]] = []
    for name, run, top in zip(runs.names, runs.runs, tops, strict=True):
        state, end, low = status(run), last(run, runs.metric), worst(run)
        sent = float(run.history.sent.sum())
        good = top is not None and top.value == first
        rows.append(
            [
                name,
                Cell(state.word, mark={True: "", False: "bad", None: ""}[state.good]),
                run.history.num,
                None if end is None else end.value,
                Cell("-") if top is None else Cell(_best(top, good), top.value, "good" if good else ""),
                Cell("-") if low is None else Cell(f"{number(low[1])} ({low[0]})", low[1]),
                Cell(seconds(total_s(run)), total_s(run)),
                Cell(size(sent), int(sent)),
            ]
        )
    metric = runs.metric
    head = ["run", "state", "rounds", f"last {metric}", f"best {metric}", "worst silo", "time", "traffic"]
    return Table(head, rows)


def _best(top: Any, first: bool) -> str:
    return f"{'★ ' if first else ''}{number(top.value)} (round {top.round:,})"


def _of(group: Group, curves: dict[int, Curve]) -> list[Curve]:
    return [curves[id(run)] for run in group.runs]


def _group_table(runs: Runs, curves: dict[int, Curve]) -> Table:
    """As `fedmpi compare` prints it."""
    partitions = len({group.partition for group in runs.groups}) > 1
    published, target = runs.grid.published is not None, runs.grid.target
    head = [*(["partition"] if partitions else []), "runs", "seeds"]
    head += ["last, mean", "least to most", "best, mean"]
    head += (["published"] if published else []) + ([f"rounds to {target:g}"] if target is not None else [])
    rows: list[list[Any]] = []
    for group in runs.groups:
        found = row(group.partition, group.name, _of(group, curves), runs.grid, runs.maximize)
        span = "-" if found["final"] is None else f"{number(found['final_least'])} to {number(found['final_most'])}"
        line = [group.name, found["seeds"], found["final"], Cell(span, mark="span"), found["best"]]
        line += [found["published"]] if published else []
        if target is not None:
            part = f" ({found['reached']} of {found['seeds']})" if 0 < found["reached"] < found["seeds"] else ""
            line.append(Cell(number(found["rounds_to_target"], 1) + part, found["rounds_to_target"]))
        rows.append(([group.partition or "-"] if partitions else []) + line)
    over = {"samples": "of all test samples together", "silos": "the mean of the silos' figures"}[runs.grid.over]
    return Table(
        [*head, "s", "MB"],
        [[*r, *_spent(g, _alike(curves))] for r, g in zip(rows, runs.groups, strict=True)],
        note=f"Runs that differ in the seed only are one row. Values: {runs.metric}, {over}.",
    )


def _alike(curves: dict[int, Curve]) -> bool:
    """Whether all rounds ran on the same number of ranks, on which bytes depend."""
    return len(set().union(*(c.ranks for c in curves.values()))) < 2


def _spent(group: Group, alike: bool) -> list[Any]:
    taken = statistics.mean(total_s(run) for run in group.runs)
    sent = statistics.mean(float(run.history.sent.sum()) for run in group.runs)
    return [Cell(f"{taken:.1f}", taken), Cell(f"{sent / 1e6:.2f}", sent / 1e6) if alike else None]


def _titled(runs: Runs, group: Group) -> str:
    return f"{group.partition}: {group.name}" if len({g.partition for g in runs.groups}) > 1 else group.name


def _finals(runs: Runs, curves: dict[int, Curve]) -> Chart:
    """The last figure of each run, in a row per group, with the mean and the published figure."""
    groups = runs.groups
    body: list[list[Any]] = []
    dots: dict[str, list[Any]] = {"x": [], "y": [], "text": []}
    means: dict[str, list[Any]] = {"x": [], "y": []}
    papers: dict[str, list[Any]] = {"x": [], "y": []}
    for at, group in enumerate(groups):
        ends = [(name, c.values[-1]) for name, c in zip(group.names, _of(group, curves), strict=True) if c.values]
        for name, value in ends:
            dots["x"].append(value)
            dots["y"].append(at)
            dots["text"].append(label(name))
            body.append([name, value])
        if len(ends) > 1:
            means["x"].append(statistics.mean(value for _, value in ends))
            means["y"].append(at)
        if (known := (runs.grid.published or {}).get(group.partition, {}).get(group.name)) is not None:
            papers["x"].append(known)
            papers["y"].append(at)
    base = {"type": "scatter", "mode": "markers"}
    dot = {"color": "$c0", "size": 9, "opacity": 0.75}
    traces: list[Trace] = [
        base | dots | {"name": "a run", "marker": dot, "hovertemplate": "%{text}: %{x:.4f}<extra></extra>"}
    ]
    bar = {"symbol": "line-ns-open", "size": 20, "color": "$ink", "line": {"width": 2}}
    traces += [base | means | {"name": "mean over seeds", "marker": bar}] if means["x"] else []
    paper = {"symbol": "diamond-open", "size": 12, "color": "$c1", "line": {"width": 2}}
    traces += [base | papers | {"name": "published", "marker": paper}] if papers["x"] else []
    titles = [label(_titled(runs, group)) for group in groups]
    return Chart(
        title=f"Last {spelled(runs.metric, first=False)} of each run",
        alt=f"Dot chart of the last {runs.metric} of {plural(len(runs.runs), 'run')} in {plural(len(groups), 'row')}.",
        traces=traces,
        layout={
            "hovermode": "closest",
            "xaxis": {"title": {"text": label(spelled(runs.metric))}, "showgrid": True},
            "yaxis": {
                "autorange": "reversed",
                "tickmode": "array",
                "tickvals": list(range(len(groups))),
                "ticktext": titles,
            },
        },
        table=Table(["run", f"last {runs.metric}"], body, folded="Data as a table"),
        height=110 + 26 * len(groups),
    )


# ---------------------------------------------------------------- what differs


def _differences(runs: Runs) -> Section:
    flat = [group.runs[0].flat for group in runs.groups]
    keys = [key for key in differing(flat) if key != "seed"]
    blocks: list[Block] = []
    if not keys:
        blocks.append(Text("The configurations have the same values, apart from seed and out.", "note"))
    else:
        titles = [_titled(runs, group) for group in runs.groups]
        if len(titles) <= 8:
            head, body = ["key", *titles], [[k, *(written(v[k]) if k in v else "-" for v in flat)] for k in keys]
        else:
            head = ["run", *keys]
            body = [[t, *(written(v[k]) if k in v else "-" for k in keys)] for t, v in zip(titles, flat, strict=True)]
        blocks.append(Table(head, body, note="All other keys have the same value. -: the run has no such key."))
    seeds = {_titled(runs, g): sorted({int(run.config.get("seed", 0)) for run in g.runs}) for g in runs.groups}
    if any(len(found) > 1 for found in seeds.values()):
        body = [[title, ", ".join(map(str, found))] for title, found in seeds.items()]
        blocks.append(Table(["runs", "seeds"], body, folded="Seeds"))
    return Section("differences", "What differs", blocks)


# ---------------------------------------------------------------- curves


def _curves(runs: Runs, curves: dict[int, Curve]) -> Section:
    axes = {name: AXES[name][1] for name in ("round", "seconds", "bytes")}
    blocks: list[Block] = []
    if not _alike(curves):
        del axes["bytes"]
        blocks.append(Text("No axis of bytes: they depend on the number of ranks, which differs between runs.", "note"))
    elif not any(run.history.sent.any() for run in runs.runs):
        del axes["bytes"]
    blocks.insert(0, Switch("curves", [(name, AXES[name][0]) for name in axes]))
    for partition in dict.fromkeys(group.partition for group in runs.groups):
        some = [group for group in runs.groups if group.partition == partition]
        title = f"{spelled(runs.metric)} by round" + (f": {partition}" if partition else "")
        blocks.append(_curve_chart(runs, some, [_of(g, curves) for g in some], title, runs.metric, axes))
        if runs.metric != "loss":
            losses = [[curve(run, "loss", "samples") for run in g.runs] for g in some]
            title = "Test loss by round" + (f": {partition}" if partition else "")
            blocks.append(_curve_chart(runs, some, losses, title, "loss", axes))
    return Section("curves", "Learning", blocks)


def _curve_chart(
    runs: Runs, groups: list[Group], of_groups: list[list[Curve]], title: str, metric: str, axes: dict[str, str]
) -> Chart:
    """A line per group: the mean over seeds at each evaluated round, in a band of their range."""
    traces: list[Trace] = []
    body: list[list[Any]] = []
    seeds = max(len(group.runs) for group in groups)
    for slot, (group, some) in enumerate(zip(groups[:MOST_LINES], of_groups, strict=False)):
        length = max((len(c.values) for c in some), default=0)
        there = [[c for c in some if n < len(c.values)] for n in range(length)]
        values = np.array([statistics.mean(c.values[n] for c in part) for n, part in enumerate(there)])
        low = np.array([min(c.values[n] for c in part) for n, part in enumerate(there)])
        high = np.array([max(c.values[n] for c in part) for n, part in enumerate(there)])
        x = {
            axis: np.array([statistics.mean(getattr(c, field)[n] for c in part) for n, part in enumerate(there)])
            for axis, field in (("round", "rounds"), ("seconds", "seconds"), ("bytes", "megabytes"))
            if axis in axes
        }
        chosen = thin(length, low, high)
        at = {axis: v[chosen] for axis, v in x.items()}
        if len(some) > 1:
            traces += _edges(group, at, low[chosen], high[chosen], slot)
        traces.append(line(group.name, at, values[chosen], slot))
        picked = chosen if len(chosen) <= 60 else chosen[:: max(1, len(chosen) // 60)]
        body += [
            [group.name, int(x["round"][i]), float(values[i]), float(low[i]), float(high[i]), len(there[i])]
            for i in picked
        ]
    note = (
        "" if seeds == 1 else "Lines: the mean over seeds. Shaded: their range. Where a run ended early, of the others."
    )
    if metric == runs.metric:
        known = (runs.grid.published or {}).get(groups[0].partition, {})
        traces += _published(groups, known, axes, of_groups)
        if known:
            note += " Diamonds at the end: published figures."
    if len(groups) > MOST_LINES:
        note += f" Shown are the first {MOST_LINES} of {len(groups)}."
    finite = np.array([r[2] for r in body])
    logs = metric == "loss" and finite.size and finite.min() > 0 and finite.max() > 50 * finite.min()
    text = f"{spelled(metric)}, logarithmic" if logs else spelled(metric)
    return Chart(
        title=title,
        alt=f"Line chart of {metric} for {plural(len(groups), 'line')}; the table below has the values.",
        note=note.strip(),
        traces=traces,
        axes=axes,
        layout={"yaxis": {"title": {"text": label(text)}, "type": "log" if logs else "linear"}},
        table=Table(["runs", "round", "mean", "least", "most", "runs there"], body, folded="Data as a table"),
        height=380,
    )


def _edges(group: Group, x: dict[str, np.ndarray], low: np.ndarray, high: np.ndarray, slot: int) -> list[Trace]:
    return [trace | {"showlegend": False} for trace in band(group.name, x, low, high, slot)]


def _published(
    groups: list[Group], known: dict[str, float], axes: dict[str, str], of_groups: list[list[Curve]]
) -> list[Trace]:
    """A diamond at the end of a group's line for its published figure."""
    found: list[Trace] = []
    for slot, (group, some) in enumerate(zip(groups[:MOST_LINES], of_groups, strict=False)):
        ends = [c for c in some if c.values]
        if group.name not in known or not ends:
            continue
        fields = {"round": "rounds", "seconds": "seconds", "bytes": "megabytes"}
        over = {axis: [statistics.mean(getattr(c, fields[axis])[-1] for c in ends)] for axis in axes}
        marker = {"symbol": "diamond-open", "size": 12, "color": look(slot)[0], "line": {"width": 2}}
        trace = {"type": "scatter", "mode": "markers", "y": [known[group.name]], "over": over, "marker": marker}
        found.append(trace | {"name": label(f"{group.name}, published"), "showlegend": False})
    return found


# ---------------------------------------------------------------- cost


def _cost(runs: Runs) -> Section:
    titles = [_titled(runs, group) for group in runs.groups]
    traced = all(run.phases is not None for run in runs.runs)
    order = list(LOOKS)
    means = np.zeros((len(runs.groups), len(order)))
    for g, group in enumerate(runs.groups):
        for run in group.runs:
            if run.phases is not None:
                of_run = np.mean(list(run.phases.of_rank.values()), axis=0)
                means[g] += [of_run[PHASES.index(name)] / len(group.runs) for name in order]
    taken = [statistics.mean(total_s(run) for run in group.runs) for group in runs.groups]
    if traced:
        traces = [styled(name, bars(name, titles, means[:, i], 0, horizontal=True)) for i, name in enumerate(order)]
        note = "Mean over ranks and seeds, with rounds that were trained again. Hatched amber: waiting."
        body = [[t, *map(float, row), float(row.sum())] for t, row in zip(titles, means, strict=True)]
        table = Table(["runs", *(f"{name}, s" for name in order), "sum, s"], body, folded="Data as a table")
    else:
        traces = [bars("seconds", titles, taken, 0, horizontal=True)]
        note = "Mean over seeds of the time of all rounds. Not all runs have a trace.json with phases."
        table = Table(
            ["runs", "seconds"], [[t, s] for t, s in zip(titles, taken, strict=True)], folded="Data as a table"
        )
    axis = {"autorange": "reversed", "showgrid": False}
    height = 110 + 26 * len(titles)
    time = Chart(
        title="Seconds by phase" if traced else "Seconds",
        alt=f"Bars of seconds for {plural(len(titles), 'row')}.",
        note=note,
        traces=traces,
        layout={"xaxis": {"title": {"text": "Seconds"}, "showgrid": True}, "yaxis": axis, "hovermode": "y unified"},
        table=table,
        height=height,
    )
    sent = {
        name: [statistics.mean(float(np.nansum(run.history.of(field))) for run in g.runs) for g in runs.groups]
        for name, field in SENT.items()
    }
    body = [[t, *(Cell(size(sent[name][i]), sent[name][i]) for name in SENT)] for i, t in enumerate(titles)]
    traffic = Chart(
        title="Megabytes, all rounds and ranks",
        alt=f"Bars of megabytes up, down and in tables for {plural(len(titles), 'row')}.",
        note="Vectors up and down, and small tables of figures. Mean over seeds.",
        traces=[bars(name, titles, np.array(sent[name]) / 1e6, i, horizontal=True) for i, name in enumerate(SENT)],
        layout={"xaxis": {"title": {"text": "MB"}, "showgrid": True}, "yaxis": axis, "hovermode": "y unified"},
        table=Table(["runs", *SENT], body, folded="Data as a table"),
        height=height,
    )
    nothing = Text("Nothing was sent between ranks.", "note")
    return Section("cost", "Time and traffic", [time, traffic if any(map(any, sent.values())) else nothing])
