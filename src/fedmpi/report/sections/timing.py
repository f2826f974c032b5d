"""Where the time went: phases by rank and by round."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmpi.records import PHASES
from fedmpi.report.blocks import Block, Cell, Chart, Facts, Section, Table, Text, Trace, bars, label
from fedmpi.report.numbers import plural, seconds, size, stretches
from fedmpi.report.reading import RunData
from fedmpi.report.status import total_s

MOST_RANKS = 24
MOST_BARS = 60

# In the order of the stack, with colour and pattern. Waiting is hatched.
LOOKS = {
    "train": (0, ""),
    "wait": (4, "/"),
    "exchange": (1, "\\"),
    "step": (3, "x"),
    "evaluate": (2, "."),
    "agree": (5, "-"),
    "checkpoint": (6, "|"),
    "select": (7, "+"),
}
MEANINGS = {
    "train": "local training",
    "wait": "waiting for the slowest rank",
    "exchange": "exchange of the vectors",
    "step": "the server's step",
    "evaluate": "evaluation",
    "agree": "the last small collective",
    "checkpoint": "between two rounds: records, checkpoints",
    "select": "selection",
}


def timing(run: RunData) -> Section | None:
    history = run.history
    if not history.num or not np.isfinite(history.of("seconds", "round")).any():
        return None
    each = history.of("seconds", "round")
    longest = int(np.nanargmax(each))
    rows: list[tuple[str, Any]] = [
        ("All rounds", Cell(seconds(total_s(run)), total_s(run))),
        ("Median round", Cell(seconds(float(np.nanmedian(each))), float(np.nanmedian(each)))),
        (
            "Longest round",
            Cell(f"{seconds(float(each[longest]))} (round {history.rounds[longest]:,})", float(each[longest])),
        ),
    ]
    virtual = history.of("virtual_s")
    if np.isfinite(virtual).any():
        end = float(virtual[np.flatnonzero(np.isfinite(virtual))[-1]])
        rows.append(("Virtual time", Cell(f"{seconds(end)}, by the clock of the configuration", end)))
    memory = [max(r["peak_rss_bytes"]) for r in history.records if r.get("peak_rss_bytes")]
    if memory:
        rows.append(("Peak memory of a rank", Cell(size(max(memory)), max(memory))))
    blocks: list[Block] = [Facts(rows)]
    if run.phases is not None:
        total = sum(run.phases.of_rank.values())
        spent, waited = float(np.sum(total)), float(np.asarray(total)[PHASES.index("wait")])
        share = waited / spent if spent else 0.0
        idle = run.phases.idle_s
        rows.append(("Share of waiting", Cell(f"{share:.1%} of all ranks' time", share)))
        if idle > max(1.0, 0.05 * (run.phases.ended_s - run.phases.began_s)):
            rows.append(("Not in rounds", Cell(f"{seconds(idle)} besides: stops, starts, lost ranks", idle)))
        blocks += [_by_rank(run), _by_round(run)]
    else:
        blocks.append(
            Text("There is no trace.json, so times by rank are not known: below are maxima over ranks.", "note")
        )
        blocks.append(_maxima(run))
    overlapped = history.of("seconds", "overlapped")
    if np.isfinite(overlapped).any():
        rows.append(
            ("Exchange during training", Cell(seconds(float(np.nansum(overlapped))), float(np.nansum(overlapped))))
        )
    return Section("timing", "Where the time went", blocks)


def _by_rank(run: RunData) -> Chart:
    phases = run.phases
    assert phases is not None
    ranks = phases.ranks
    waits = {rank: phases.of_rank[rank][PHASES.index("wait")] for rank in ranks}
    note = "All that a rank did, also rounds that were trained again. Hatched amber: waiting for the slowest rank."
    if run.in_jobs:
        note += " It is the server's job only: train is the time until the silos' updates were there."
    if any(event.get("event") == "lost" for event in run.events):
        note += " Ranks are numbered anew after a loss, so a row may be of two processes."
    if len(ranks) > MOST_RANKS:
        by_wait = sorted(ranks, key=lambda rank: waits[rank])
        ranks = sorted(by_wait[: MOST_RANKS // 2] + by_wait[-MOST_RANKS // 2 :])
        note += f" Shown are the {MOST_RANKS // 2} ranks that wait least and most, of {len(phases.of_rank):,}."
    names = [f"rank {rank}" for rank in ranks]
    traces = [
        styled(name, bars(name, names, [phases.of_rank[r][PHASES.index(name)] for r in ranks], 0, horizontal=True))
        for name in LOOKS
    ]
    head = ["rank", *(f"{name}, s" for name in LOOKS), "sum, s"]
    rows = [
        [f"rank {r}", *(float(phases.of_rank[r][PHASES.index(name)]) for name in LOOKS), float(phases.of_rank[r].sum())]
        for r in ranks
    ]
    most = max(ranks, key=lambda rank: waits[rank])
    return Chart(
        title="Seconds of each rank by phase",
        alt=f"Stacked bars of seconds by phase for {plural(len(ranks), 'rank')}. Rank {most} waits longest, "
        f"{seconds(float(waits[most]))}.",
        note=note,
        traces=traces,
        layout={
            "xaxis": {"title": {"text": "Seconds"}, "showgrid": True},
            "yaxis": {"autorange": "reversed", "showgrid": False},
            "hovermode": "y unified",
        },
        table=Table(head, rows, folded="Data as a table"),
        height=120 + 26 * len(ranks),
    )


def styled(name: str, trace: Trace) -> Trace:
    slot, pattern = LOOKS[name]
    trace["name"] = label(f"{name}: {MEANINGS[name]}" if name == "wait" else name)
    trace["marker"]["color"] = f"$c{slot}" if slot < 7 else "$muted"
    trace["marker"]["pattern"]["shape"] = pattern
    return trace


def _by_round(run: RunData) -> Chart:
    """Mean over ranks, whose phases add up to the round."""
    phases = run.phases
    assert phases is not None
    known = sorted(phases.of_round)
    values = np.array([phases.of_round[round] for round in known])
    groups = stretches(len(known), MOST_BARS)
    means = np.array([values[group].mean(axis=0) for group in groups])
    names = [str(known[g[0]]) if len(g) == 1 else f"{known[g[0]]}-{known[g[-1]]}" for g in groups]
    x: list[Any] = [float(np.mean([known[i] for i in g])) for g in groups]
    note = "Mean over ranks, so the parts add up."
    if len(groups) < len(known):
        note += f" Each bar is the mean of a stretch of rounds: {len(known):,} rounds in {len(groups)} bars."
    order = list(LOOKS)
    rows = [
        [name, *(float(row[PHASES.index(phase)]) for phase in order), float(row.sum())]
        for name, row in zip(names, means, strict=True)
    ]
    return Chart(
        title="Seconds of a round by phase",
        alt=f"Stacked bars of the mean seconds by phase over {len(known):,} rounds.",
        note=note,
        traces=[styled(phase, bars(phase, x, means[:, PHASES.index(phase)], 0)) for phase in order],
        layout={"xaxis": {"title": {"text": "Round"}}, "yaxis": {"title": {"text": "Seconds, mean over ranks"}}},
        table=Table(["round", *(f"{phase}, s" for phase in order), "sum, s"], rows, folded="Data as a table"),
    )


def _maxima(run: RunData) -> Chart:
    """Maxima over ranks, side by side because they do not add up."""
    history = run.history
    totals = {name: float(np.nansum(history.of("seconds", name))) for name in LOOKS}
    trace = bars("seconds", list(totals), list(totals.values()), 0, pattern="")
    rows = [[name, MEANINGS[name], value] for name, value in totals.items()]
    return Chart(
        title="Seconds by phase, maxima over ranks",
        alt="Bars of the seconds of each phase, summed over rounds.",
        note="Sums over rounds of the slowest rank of each phase. They do not add up to the time of the run.",
        traces=[trace],
        layout={"yaxis": {"title": {"text": "Seconds"}}, "showlegend": False},
        table=Table(["phase", "what", "seconds"], rows, folded="Data as a table"),
        height=300,
    )
