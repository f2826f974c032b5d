"""What `fedmpi watch` shows: lines that fit a terminal, the most important first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import wrap
from typing import Any

import numpy as np
from rich.text import Text

from fedmpi.output import at_most
from fedmpi.records import PHASES
from fedmpi.records.pace import Pace, span
from fedmpi.records.record import SENT
from fedmpi.report.events import after, sentence, supervised
from fedmpi.report.numbers import listed, moment, number, plural, seconds, size
from fedmpi.report.reading import RunData
from fedmpi.report.status import best, last, resumed, status, worst
from fedmpi.watch.follow import Seen

BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", "_.:-=+*#"  # of a sparkline; PLAIN where the terminal has no Unicode
LETTERS = {
    "train": "T", "wait": "w", "exchange": "x", "step": "s", "evaluate": "e", "checkpoint": "c", "agree": "a",
    "select": "l",
}  # fmt: skip
COLORS = {
    "train": "green", "wait": "yellow", "exchange": "blue", "step": "magenta", "evaluate": "cyan", "checkpoint": "red",
    "agree": "white", "select": "white",
}  # fmt: skip
MOST_RANKS, MOST_EVENTS, MOST_JOBS = 8, 5, 8
LABEL = 11  # width of the names of lines
STATES = {True: "green", False: "red", None: "cyan"}


def frame(seen: Seen, width: int = 80, height: int = 24, unicode: bool = True) -> list[Text]:
    """The lines of a frame, at most `height`, each at most `width` wide."""
    head, run = Text(str(seen.root), style="bold"), seen.run
    if run is None:
        told = seen.trouble or "no run has begun here: there is no config.yaml"
        style = "red" if seen.trouble else "cyan"
        return _fitted([head, *(Text(part, style=style) for part in wrap(told, width))], [], [], width, height)
    lines = [*_progress(seen, run, width, unicode), *_figures(run, width, unicode), *_silos(seen, run, width)]
    return _fitted([head, *lines], _phases(seen, run, width), _events(seen, run), width, height)


def _fitted(
    lines: Sequence[Text], phases: Sequence[Text], events: Sequence[Text], width: int, height: int
) -> list[Text]:
    """All lines if there is room; else first fewer events, then fewer ranks."""
    room = max(0, height - len(lines))
    shown = min(len(phases), max(0, room - min(len(events), 3)))
    lines = [*lines, *phases[:shown], *events[: max(0, room - shown)]][:height]
    for line in lines:
        line.truncate(width, overflow="crop")
        line.no_wrap = True
    return lines


def _line(name: str, *parts: str | Text) -> Text:
    return Text(f"{name:<{LABEL}}", style="dim").append_text(Text("", style="not dim").join(map(_as_text, parts)))


def _as_text(part: str | Text) -> Text:
    return part if isinstance(part, Text) else Text(part, style="not dim")


# ------------------------------------------------------------ progress


def pace_of(run: RunData) -> Pace:
    """The pace of the last start, as `train` prints it."""
    records = run.history.records
    begun = max((i for i, r in enumerate(records) if (r.get("seconds") or {}).get("agree") == 0.0), default=0)
    pace = Pace(run.goal)
    for record in records[begun:]:
        pace.add(record)
    return pace


def _progress(seen: Seen, run: RunData, width: int, unicode: bool) -> list[Text]:
    done = int(run.history.rounds[-1]) if run.history.num else 0
    pace, state = pace_of(run), status(run)
    text = Text(state.word if run.training is not True else "running", style=STATES[state.good])
    if run.training is True:
        text.append(f"   round {done:,} of {run.goal:,}", style="default")
        if (left_s := pace.left_s) is not None:
            text.append(f"   ETA {span(left_s)}", style="default")
    else:
        text.append(f"   {state.text}", style="default")
    share = min(1.0, done / run.goal) if run.goal else 1.0
    cells = max(10, min(width - 60, 40))
    full = int(share * cells)
    bar = ("█" * full + "░" * (cells - full)) if unicode else f"[{'#' * full}{'-' * (cells - full)}]"
    told = f"{bar} {int(100 * share)} %"
    if pace.round_s is not None:
        told += f"   {seconds(pace.round_s)} a round"
    lines = [text]
    if run.history.num:
        age_s = max(0.0, seen.now_s - run.changed_s)
        told += f"   last record {span(age_s)} ago" if age_s < 86400 else f"   last record {moment(run.changed_s)}"
        lines.append(Text(told))
        if run.training is True and pace.round_s is not None and age_s > max(30.0, 3 * pace.round_s):
            lines.append(Text(f"no record for {span(age_s)}: more than three rounds", style="yellow"))
    elif run.training is True:
        lines.append(Text("the first round is under way"))
    if seen.stop_asked and run.training is not False:
        lines.append(Text("a stop was requested", style="yellow"))
    return lines


# ------------------------------------------------------------ figures


def spark(values: np.ndarray, cells: int, unicode: bool = True) -> str:
    """A line of marks from the lowest to the highest value; each stands for equally many rounds and shows their last
    finite value, a space if there is none.

    >>> spark(np.array([0.0, 0.5, np.nan, 1.0]), 10)
    '▁▅ █'
    """
    marks = BLOCKS if unicode else PLAIN
    parts = np.array_split(values, min(cells, len(values))) if len(values) else []
    ends = [next((float(v) for v in part[::-1] if math.isfinite(v)), math.nan) for part in parts]
    known = [v for v in ends if math.isfinite(v)]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(marks) - 1) / (high - low) if high > low else 0.0
    return "".join(marks[int((v - low) * scale + 0.5)] if math.isfinite(v) else " " for v in ends)


def _figures(run: RunData, width: int, unicode: bool) -> list[Text]:
    lines = []
    name = run.metric
    now, top = last(run, name), best(run)
    if now is not None and top is not None:
        told = f"{number(now.value)}   best {number(top.value)} in round {top.round:,}"
        if (poor := worst(run)) is not None:
            told += f"   worst silo {poor[0]} {number(poor[1])}"
        elif run.disclosed != "silo":
            told += "   single silos are not told"
        lines.append(_line(name[: LABEL - 1], told))
        values = run.history.of(name)
        drawn = spark(values[np.isfinite(values)], max(10, width - LABEL - 1), unicode)
        lines.append(_line("", Text(drawn, style="not dim green")))
    loss, train = last(run, "loss"), last(run, "train_loss")
    losses = [f"{what} {number(one.value)}" for what, one in (("test", loss), ("training", train)) if one is not None]
    lines += [_line("loss", "   ".join(losses))] if losses and name != "loss" else []
    sent = run.history.sent
    if sent.any():
        parts = [f"{size(run.history.of(field)[-1])} {name}" for name, field in SENT.items()]
        lines.append(_line("bytes", f"{size(sent[-1])} a round: {', '.join(parts)}; all {size(float(sent.sum()))}"))
    if (spent := last(run, "epsilon")) is not None:
        delta, budget = last(run, "delta"), (run.config.get("privacy") or {}).get("epsilon")
        of = f" of {number(float(budget))}" if isinstance(budget, (int, float)) else ""
        told_delta = f", delta {delta.value:g}" if delta is not None else ""
        lines.append(_line("privacy", f"epsilon {at_most(spent.value)}{of}{told_delta} spent"))
    return lines


def _silos(seen: Seen, run: RunData, width: int) -> list[Text]:
    """Who is late, missing, or waits."""
    lines = []
    record: dict[str, Any] = seen.last or {}
    if late := record.get("late"):
        lines.append(_line("late", Text(listed([f"{s} ({what})" for s, what in late.items()]), style="yellow")))
    for key in ("rejected", "not_finite"):
        who = listed(list(record.get(key) or ())) or str(record.get(f"num_{key}") or "")
        lines += [_line(key.replace("_", " ")[: LABEL - 1], Text(who, style="yellow"))] if who else []
    gone = [f"{row['id']} ({row['why'] or row['state']})" for row in run.roster if row.get("state") == "lost"]
    lines += [_line("missing", Text(listed(gone, 3), style="red"))] if gone else []
    lines += [_line("requests", listed(seen.waiting))] if seen.waiting else []
    jobs = listed([f"{who} {what}" for who, what in seen.jobs.items()], MOST_JOBS)
    lines += [_line("" if i else "jobs", part) for i, part in enumerate(wrap(jobs, max(20, width - LABEL)))]
    return lines


# ------------------------------------------------------------ phases


def _phases(seen: Seen, run: RunData, width: int) -> list[Text]:
    """A bar per rank: the shares of the phases in the last round."""
    rows = {f"rank {rank}": (phases, rank) for rank, phases in sorted(seen.phases.items())}
    if not rows and seen.last is not None:  # without trace.json
        told = seen.last.get("seconds") or {}
        rows = {"slowest": ({name: told.get(name) or 0.0 for name in PHASES}, -1)}
    if not rows:
        return []
    longest_s = max(sum(phases.values()) for phases, _ in rows.values())
    cells = max(10, min(40, width - LABEL - 25))
    bars = {name: bar(phases, cells, longest_s) for name, (phases, _) in [*rows.items()][:MOST_RANKS]}
    drawn = {letter for one in bars.values() for letter in one.plain}
    key = "  ".join(f"{letter} {name}" for name, letter in LETTERS.items() if letter in drawn)
    lines = [Text(""), _line("last round", key)]
    for name, (phases, rank) in [*rows.items()][:MOST_RANKS]:
        line = _line(name, bars[name])
        line.append(f"  {seconds(sum(phases.values()))}", style="not dim")
        about = next((row for row in run.ranks if row.get("rank") == rank), {})
        line.append(f"  {about.get('host', '')} {listed([str(s) for s in about.get('silos', ())], 3)}", style="dim")
        lines.append(line)
    if len(rows) > MOST_RANKS:
        lines.append(_line("", f"and {plural(len(rows) - MOST_RANKS, 'rank')} more"))
    return lines


def bar(phases: dict[str, float], cells: int, longest_s: float) -> Text:
    """A letter per cell for the phase that the cell's time belongs to; the longest rank fills all cells.

    >>> bar({"train": 2.0, "wait": 1.0, "exchange": 1.0}, 8, 4.0).plain
    'TTTTwwxx'
    """
    text = Text()
    at_s, drawn = 0.0, 0
    for name in sorted(phases, key=lambda name: PHASES.index(name) if name in PHASES else len(PHASES)):
        at_s += phases[name]
        end = round(cells * at_s / longest_s) if longest_s > 0 else 0
        text.append(LETTERS.get(name, "?") * (end - drawn), style=f"not dim black on {COLORS.get(name, 'white')}")
        drawn = end
    return text.append(" " * (cells - drawn))


# ------------------------------------------------------------ events


def _events(seen: Seen, run: RunData) -> list[Text]:
    """The newest events, the last one first."""
    rows: list[tuple[int, str]] = [(after(e), sentence(e)) for e in run.events]
    rows += [(after(e), supervised(e)) for e in run.supervised]
    rows += [(round - 1, f"Training went on with round {round:,}.") for round in resumed(run)]
    if not rows:
        return []
    rows.sort(key=lambda row: row[0])  # stable: events of a round stay in their order
    return [Text(""), *(_line(f"after {round:,}", told) for round, told in reversed(rows[-MOST_EVENTS:]))]
