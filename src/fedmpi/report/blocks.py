"""What a report consists of: sections of blocks. The page's template knows how each kind of block looks.

Texts are plain text, which the template escapes; only `Drawing.svg` is markup. In charts a colour is a name, `$c0` to
`$c7`, `$ink`, `$muted`, `$line` or such with an opacity, `$c0/0.2`; the page's script replaces it by that of the theme.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fedmpi.report.numbers import number

Trace = dict[str, Any]
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
COLOURS = 7  # $c0 to $c6
FEW = 60  # a line of at most so many points shows them


class Cell(NamedTuple):
    """A cell of a table whose text is not simply its value."""

    text: str
    value: Any = None  # the number behind it
    mark: str = ""  # a class: good, bad, share
    share: float | None = None  # 0 to 1, shades the cell


@dataclass(frozen=True)
class Table:
    """Rows of numbers, texts and cells. The first column heads its row."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    note: str = ""
    folded: str = ""  # the text of a switch that shows the table; empty: the table is always shown
    mark: str = ""  # a class. stack: on a phone the cells of a row stand below each other
    kind: str = "table"


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    rows: Sequence[tuple[str, Any]]
    kind: str = "facts"


@dataclass(frozen=True)
class Text:
    """A paragraph. `mark`: note, warning."""

    text: str
    mark: str = ""
    kind: str = "text"


@dataclass(frozen=True)
class Chart:
    """A chart, what it shows in a sentence, and its data."""

    title: str
    alt: str
    traces: Sequence[Trace]
    table: Table
    layout: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    axes: Mapping[str, str] = field(default_factory=dict)  # titles of the horizontal axis, by the names in `over`
    height: int = 340
    kind: str = "chart"


@dataclass(frozen=True)
class Drawing:
    """SVG that is part of the page."""

    title: str
    alt: str
    svg: str  # markup
    table: Table
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()  # markup of a sample, and what it means
    kind: str = "drawing"


@dataclass(frozen=True)
class Matrix:
    """A table whose cells are shaded."""

    title: str
    note: str
    table: Table
    kind: str = "matrix"


@dataclass(frozen=True)
class Switch:
    """A choice of the horizontal axis, for all charts of a section that have these axes."""

    id: str
    choices: Sequence[tuple[str, str]]
    kind: str = "switch"


@dataclass(frozen=True)
class Grid:
    """Small drawings beside each other."""

    title: str
    items: Sequence[tuple[str, str, str]]  # heading, markup, a line of text
    table: Table
    note: str = ""
    kind: str = "grid"


@dataclass(frozen=True)
class Fold:
    """Sections behind a heading that opens."""

    title: str
    sections: Sequence[Section]
    kind: str = "fold"


Block = Table | Facts | Text | Chart | Drawing | Matrix | Switch | Grid | Fold


@dataclass(frozen=True)
class Section:
    """A part of the page. `id` is unique in its run."""

    id: str
    title: str
    blocks: Sequence[Block]


def label(text: str) -> str:
    """Text for a chart, whose library reads markup in names."""
    return html.escape(text, quote=False)


def numbers(values: Any) -> list[float | int | None]:
    """Values for JSON: None in place of nan and infinity.

    >>> numbers(np.array([1.0, np.nan]))
    [1.0, None]
    """
    return [v if isinstance(v, int) or np.isfinite(v) else None for v in np.asarray(values).tolist()]


def look(slot: int) -> tuple[str, str, str]:
    """Colour, dash and marker of the line in a slot; each differs from its neighbours in all three."""
    turn = slot // COLOURS
    return f"$c{slot % COLOURS}", DASHES[(slot + turn) % len(DASHES)], SYMBOLS[(slot + turn) % len(SYMBOLS)]


def line(
    name: str, over: Mapping[str, Any], y: Any, slot: int = 0, *, wide: bool = False, short: str = "", **more: Any
) -> Trace:
    """A line with its values over one or more horizontal axes. It is labelled at its end, with `short` if given."""
    colour, dash, symbol = look(slot)
    values = numbers(y)
    few = len(values) <= FEW
    trace: Trace = {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "name": label(name),
        "y": values,
        "over": {axis: numbers(x) for axis, x in over.items()},
        "label": label(short or name),
        "line": {"color": colour, "dash": dash, "width": 3 if wide else 2},
        "marker": {"color": colour, "symbol": symbol, "size": 7},
    }
    if not few:  # a marker now and then tells the lines apart
        step = max(1, len(values) // 12)
        trace |= {"mode": "lines+markers"}
        trace["marker"] |= {"size": [8 if i % step == step // 2 else 0 for i in range(len(values))]}
    return trace | more


def band(name: str, over: Mapping[str, Any], low: Any, high: Any, slot: int = 0) -> list[Trace]:
    """The area between two lines, over the points where both are finite."""
    keep = np.isfinite(low) & np.isfinite(high)
    edge: Trace = {
        "type": "scatter",
        "mode": "lines",
        "line": {"width": 0, "color": f"$c{slot % COLOURS}"},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    over = {axis: numbers(np.asarray(x, dtype=float)[keep]) for axis, x in over.items()}
    name = label(name)
    return [
        edge | {"name": name, "y": numbers(np.asarray(low)[keep]), "over": over},
        edge
        | {"name": name, "y": numbers(np.asarray(high)[keep]), "over": over, "showlegend": True}
        | {"fill": "tonexty", "fillcolor": f"$c{slot % COLOURS}/0.18"},
    ]


PATTERNS = ("", "/", "\\", "x", "-", "|", "+", ".")


def bars(name: str, x: Sequence[Any], y: Any, slot: int, horizontal: bool = False, pattern: str | None = None) -> Trace:
    """Bars, told apart by colour and pattern."""
    shape = PATTERNS[slot % len(PATTERNS)] if pattern is None else pattern
    places, values = [label(v) if isinstance(v, str) else v for v in x], numbers(y)
    return {
        "type": "bar",
        "name": label(name),
        "x": values if horizontal else places,
        "y": places if horizontal else values,
        "orientation": "h" if horizontal else "v",
        "marker": {
            "color": f"$c{slot % COLOURS}" if slot < COLOURS else "$muted",
            "pattern": {"shape": shape, "size": 6, "solidity": 0.3, "fgcolor": "$paper", "fillmode": "overlay"},
            "line": {"width": 0.5, "color": "$paper"},
        },
    }


def cell(value: Any) -> Cell:
    """How a table shows a value."""
    if isinstance(value, Cell):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (bool, str)) or value is None:
        return Cell("-" if value is None else str(value))
    return Cell(number(value), value)
