"""The top of the page: which runs it is about, and the answers to a reader's first questions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import fedmpi
from fedmpi.report.groups import Runs, curve, runs_of
from fedmpi.report.numbers import listed, moment, number, plural, seconds, spelled
from fedmpi.report.page import Answer, Page
from fedmpi.report.reading import RunData
from fedmpi.report.sections import sections
from fedmpi.report.several import parts
from fedmpi.report.status import Scored, best, last, status, total_s, troubles, worst


def page_of(what: Sequence[Path], title: str) -> tuple[Page, Path]:
    """The page about these runs, and the folder where it belongs. Raises ConfigError."""
    runs = runs_of(what)
    if len(runs.runs) == 1 and not runs.missing:
        return _of_one(runs.runs[0], title), runs.folder
    name = runs.folder.resolve().name if len(what) == 1 else listed(runs.names, 4)
    page = Page(title or name, headline_of(runs), answers_of(runs), parts(runs), footer())
    return page, runs.folder


def headline_of(runs: Runs) -> str:
    """What happened in several runs, in a sentence or two."""
    done = sum(status(run).good is True for run in runs.runs)
    groups = f" in {plural(len(runs.groups), 'group')}" if len(runs.groups) < len(runs.runs) else ""
    first = f"{plural(len(runs.runs), 'run')}{groups}, {done} finished."
    ranked = _ranked(runs)
    if not ranked:
        return f"{first} None has a value of {runs.metric}."
    tops = {partition: (value, name) for value, partition, name, _ in reversed(ranked)}  # the best of each
    parts_of = [f"{name}, {number(value)}{f' ({p})' if len(tops) > 1 else ''}" for p, (value, name) in tops.items()]
    return f"{first} The best {spelled(runs.metric, first=False)} at the end is that of {'; '.join(parts_of[::-1])}."


def _ranked(runs: Runs) -> list[tuple[float, str, str, str]]:
    """The groups by their last figure (mean over seeds), the best first: figure, partition, name, range over seeds."""
    found = []
    for group in runs.groups:
        ends = [c.values[-1] for run in group.runs if (c := curve(run, runs.metric, runs.grid.over)).values]
        if ends:
            span = f" ({number(min(ends))} to {number(max(ends))})" if len(ends) > 1 else ""
            found.append((statistics.mean(ends), group.partition, group.name, span))
    return sorted(found, key=lambda one: -one[0] if runs.maximize else one[0])


def answers_of(runs: Runs) -> list[Answer]:
    """The answers for several runs."""
    states = [(name, status(run)) for name, run in zip(runs.names, runs.runs, strict=True)]
    done = sum(state.good is True for _, state in states)
    others = [f"{name}: {state.word}" for name, state in states if state.good is not True]
    ranked = _ranked(runs)
    times = [total_s(run) for run in runs.runs]
    wrong = [(name, found) for name, run in zip(runs.names, runs.runs, strict=True) if (found := troubles(run))]
    lines = [f"{name}: {found[0]}" + (f" And {len(found) - 1} more." if found[1:] else "") for name, found in wrong]
    if runs.missing:
        lines.insert(0, f"{plural(len(runs.missing), 'run')} of the grid not trained yet.")
    good = done == len(runs.runs)
    return [
        Answer(
            "Did they work?",
            f"{'✓' if good else '✗'} {done} of {plural(len(runs.runs), 'run')}",
            others[:5] + _more(others, 5),
            "good" if good else "bad",
        ),
        Answer(
            f"How good are they? ({spelled(runs.metric, first=False)})",
            number(ranked[0][0]) if ranked else "-",
            [f"{f'{p}, ' if p else ''}{name}: {number(value)}{span}" for value, p, name, span in ranked[:4]]
            + _more(ranked, 4),
        ),
        Answer(
            "How long did they take?",
            seconds(sum(times)),
            [f"{seconds(min(times))} to {seconds(max(times))} each"],
        ),
        Answer(
            "What went wrong?",
            "Nothing" if not lines else f"{plural(len(wrong), 'run')} to look at",
            lines[:5] + _more(lines, 5),
        ),
    ]


def footer() -> str:
    return (
        f"Made by fedmpi {fedmpi.__version__} on {moment(time.time())}. The page loads nothing from a network. It "
        "holds what the run directories tell, also about single silos: pass it on as you would pass on these."
    )


def _of_one(run: RunData, title: str) -> Page:
    name = run.root.resolve().name
    return Page(title or name, headline(run), answers(run), sections(run), footer())


def scored_text(run: RunData, value: Scored | None) -> str:
    return "-" if value is None else f"{number(value.value)} (round {value.round:,})"


def headline(run: RunData) -> str:
    """What happened, in a sentence or two."""
    state, end, top = status(run), last(run, run.metric), best(run)
    done = int(run.history.rounds[-1]) if run.history.num else 0
    ranks = len(run.ranks) or int(run.about.get("ranks", 1))
    place = "in jobs of their own" if run.in_jobs else f"on {plural(ranks, 'rank')}"
    first = (
        f"{plural(run.num_silos, 'silo')} {place}, {done:,} of {plural(run.goal, 'round')} in "
        f"{seconds(total_s(run))}: {state.word}."
    )
    if end is None:
        return f"{first} No round has a value of {run.metric}."
    same = top is not None and top.value == end.value
    rest = ", its best" if same else f"; best {scored_text(run, top)}"
    return f"{first} After round {end.round:,} {spelled(run.metric, first=False)} is {number(end.value)}{rest}."


def answers(run: RunData) -> list[Answer]:
    """Did it work, how good is it, how long did it take, what went wrong."""
    history, state = run.history, status(run)
    end, top, low = last(run, run.metric), best(run), worst(run)
    good = []
    if top is not None:
        good.append(f"best {scored_text(run, top)}")
    if low is not None:
        good.append(f"worst silo {low[0]}: {number(low[1])}")
    if run.metric != "loss" and (loss := last(run, "loss")) is not None:
        good.append(f"loss {number(loss.value)}")
    rounds = history.of("seconds", "round")
    times = []
    if history.num:
        times = [f"{seconds(float(np.nanmedian(rounds)))} a round (median)", history.sent_text()]
        virtual = history.of("virtual_s")
        times += [f"{seconds(float(np.nanmax(virtual)))} of virtual time"] if np.isfinite(virtual).any() else []
    wrong = troubles(run)
    mark = {True: "good", False: "bad", None: ""}[state.good]
    sign = {True: "✓ ", False: "✗ ", None: "… "}[state.good]
    return [
        Answer("Did it work?", f"{sign}{state.word}", [state.text], mark),
        Answer(
            f"How good is it? ({spelled(run.metric, first=False)})", "-" if end is None else number(end.value), good
        ),
        Answer("How long did it take?", seconds(total_s(run)) if history.num else "-", times),
        Answer(
            "What went wrong?", "Nothing" if not wrong else plural(len(wrong), "finding"), wrong[:6] + _more(wrong, 6)
        ),
    ]


def _more(texts: Sequence[object], most: int) -> list[str]:
    return [f"and {len(texts) - most} more"] if len(texts) > most else []
