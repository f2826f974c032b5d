"""Which silos took part in which round, and what became of their updates."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmpi.outcome import LATE
from fedmpi.report.blocks import Block, Cell, Drawing, Section, Table, Text
from fedmpi.report.drawings import sample, strip
from fedmpi.report.numbers import plural, stretches
from fedmpi.report.reading import RunData
from fedmpi.report.sections.silos import hidden

MOST_CELLS = 180
MOST_SILOS = 200

# In the order in which a stretch of rounds shows them: the rarest first.
MEANINGS = {
    "rejected": "its update was rejected",
    "dropped": "late or too old, its work did not count",
    "buffered": "late, its work counts in a later round",
    "partial": "late, its work so far counts",
    "stale": "only an older update of it came in",
    "full": "took part",
    "away": "no member",
}
# The state of each word in `late` of a record.
_LATE = dict(zip(LATE[1:], ("partial", "dropped", "buffered", "dropped"), strict=True))


def states(run: RunData) -> dict[str, np.ndarray]:
    """By state, whether a silo was in it in a round [rounds, silos]; the first of MEANINGS that holds is the state."""
    history = run.history
    index = {silo: i for i, silo in enumerate(history.silos)}
    found = {state: np.zeros(history.member.shape, dtype=bool) for state in MEANINGS}
    for i, record in enumerate(history.records):
        for silo in record.get("cohort") or ():
            found["full"][i, index[silo]] = True
        for silo, what in (record.get("late") or {}).items():
            found[_LATE.get(what, "dropped")][i, index[silo]] = True
        for silo in record.get("stale") or ():
            found["stale"][i, index[silo]] = True
        for silo in record.get("rejected") or ():
            if silo in index:
                found["rejected"][i, index[silo]] = True
        for arrival in record.get("arrivals") or ():
            if arrival.get("dropped") and arrival["silo"] in index:
                found["dropped"][i, index[arrival["silo"]]] = True
    found["stale"] &= ~found["full"]
    found["away"] = ~history.member & ~found["full"]
    return found


def participation(run: RunData) -> Section | None:
    history = run.history
    if not history.num or not history.silos:
        return None
    blocks: list[Block] = []
    if (why := hidden(run)) and run.disclosed == "pooled":
        blocks.append(Text("Known is who was selected, not whose update counted. " + why.split(",")[0] + ".", "note"))
    by_state = states(run)
    order = list(MEANINGS)
    code = np.full(history.member.shape, -1)
    for n in reversed(range(len(order))):
        code[by_state[order[n]]] = n
    shown = np.arange(len(history.silos))
    note = "A row for each silo, a cell for each round; shape and colour say the same."
    if len(shown) > MOST_SILOS:
        trouble = sum(by_state[name].sum(axis=0) for name in ("rejected", "dropped", "buffered", "partial", "away"))
        shown = np.sort(np.argsort(-np.asarray(trouble), kind="stable")[:MOST_SILOS])
        note += f" Shown are the {MOST_SILOS} of {len(history.silos):,} silos with most trouble."
    groups = stretches(history.num, MOST_CELLS)
    if len(groups) < history.num:
        note += (
            f" {history.num:,} rounds in {len(groups)} cells: a cell shows the rarest that happened in its rounds, in "
            "the order of the legend."
        )
    columns = []
    for group in groups:
        part = np.where(code[group] < 0, len(order), code[group]).min(axis=0)
        columns.append(part)
    cells = np.array(columns)[:, shown].T
    drawn = [[order[c] if c < len(order) else "" for c in row] for row in cells.tolist()]
    there = [name for n, name in enumerate(order) if (code == n).any()]
    legend = [(sample(name), _meaning(run, name)) for name in there]
    if (code < 0).any():
        legend.append(
            (
                sample("away").replace('class="s-away"', 'class="frame"'),
                "not selected" if run.config["engine"]["name"] != "buffered" else "no update came in",
            )
        )
    blocks.append(
        Drawing(
            title="Silo by round",
            alt=f"A strip of {plural(len(shown), 'silo')} by {plural(history.num, 'round')}; counts are in its table.",
            note=note,
            svg=strip([history.silos[i] for i in shown], [int(history.rounds[g[0]]) for g in groups], drawn),
            legend=legend,
            table=_table(run, by_state),
        )
    )
    return Section("participation", "Participation", blocks)


def _meaning(run: RunData, state: str) -> str:
    if state == "full" and run.config["engine"]["name"] == "buffered":
        return "an update of it came in"
    return "was selected" if state == "full" and run.disclosed == "pooled" else MEANINGS[state]


def _table(run: RunData, by_state: dict[str, np.ndarray]) -> Table:
    history = run.history
    there = [s for s in ("partial", "dropped", "buffered", "stale", "rejected", "away") if by_state[s].any()]
    head = ["silo", "rounds selected", "share of rounds", *there]
    names = {"away": "no member", "stale": "older update only", "dropped": "did not count"}
    rows: list[list[Any]] = []
    for i, silo in enumerate(history.silos[:1000]):
        chosen = int(by_state["full"][:, i].sum())
        share = chosen / history.num
        rows.append([silo, chosen, Cell(f"{share:.0%}", share), *(int(by_state[s][:, i].sum()) for s in there)])
    return Table([names.get(name, name) for name in head], rows, folded="Counts by silo")
