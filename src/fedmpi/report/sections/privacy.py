"""What was spent of the privacy budget."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmpi.output import at_most
from fedmpi.report.blocks import Block, Cell, Chart, Facts, Section, Table, Text, Trace, line
from fedmpi.report.numbers import thin
from fedmpi.report.reading import RunData
from fedmpi.report.sections.learning import rows, thinned

PROTECTED = {"silo": "whole silos", "record": "single training records, in each silo by itself"}


def privacy(run: RunData) -> Section | None:
    section = run.config.get("privacy")
    if not section:
        return None
    history = run.history
    epsilon = history.of("epsilon")
    known = np.flatnonzero(np.isfinite(epsilon))
    budget = section.get("epsilon")
    facts: list[tuple[str, Any]] = [
        ("Protected", PROTECTED.get(str(section.get("name")), str(section.get("name")))),
        ("Delta", Cell(f"{section.get('delta'):g}", section.get("delta"))),
        ("Budget of epsilon", "none" if budget is None else Cell(f"{budget:g}", budget)),
    ]
    options = {k: v for k, v in section.items() if k not in ("name", "epsilon", "delta") and v is not None}
    facts.append(("Options", ", ".join(f"{k} {v}" for k, v in options.items()) or "none"))
    blocks: list[Block] = [Facts(facts)]
    if known.size:
        spent = float(epsilon[known[-1]])
        share = "" if budget is None else f", {spent / budget:.1%} of the budget"
        facts.append(
            (f"Spent after round {history.rounds[known[-1]]:,}", Cell(f"epsilon {at_most(spent)}{share}", spent))
        )
        chosen = known[thin(len(known), epsilon[known])]
        traces: list[Trace] = [
            line("epsilon spent", {"round": history.rounds[chosen]}, epsilon[chosen], 0, short="spent")
        ]
        layout: dict[str, Any] = {"yaxis": {"title": {"text": "epsilon"}, "rangemode": "tozero"}}
        if budget is not None:
            ends = history.rounds[[known[0], known[-1]]]
            traces.append(line("budget", {"round": ends}, [budget, budget], 1))
        blocks.append(
            Chart(
                title="Epsilon spent by round",
                alt=f"Line chart of epsilon, {at_most(spent)} after the last round.",
                note=thinned(len(chosen), len(known)).strip(),
                traces=traces,
                axes={"round": "Round"},
                layout=layout,
                table=Table(
                    ["round", "epsilon"], rows([history.rounds[chosen], epsilon[chosen]]), folded="Data as a table"
                ),
                height=280,
            )
        )
    told = "The guarantee is about the parameters. Losses, metrics and cohorts on this page carry no noise:"
    blocks.append(Text(f"{told} keep it as you keep the data.", "warning"))
    return Section("privacy", "Privacy spent", blocks)
