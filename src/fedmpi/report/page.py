"""The page: one file of HTML that loads nothing, from sections of blocks."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

import fedmpi
from fedmpi.report.blocks import Chart, Section, Table, cell

HERE = Path(__file__).parent
LIBRARY = "plotly-basic.min.js"  # plotly.js, basic bundle, MIT licence


@dataclass(frozen=True)
class Answer:
    """A question at the top of the page, with a short answer and more lines."""

    question: str
    short: str
    lines: Sequence[str] = ()
    mark: str = ""  # good or bad


@dataclass(frozen=True)
class Page:
    """All of a report."""

    title: str
    headline: str
    answers: Sequence[Answer]
    sections: Sequence[Section]
    footer: str


@functools.cache
def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """How a page's security policy names a script; the browser runs no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _numeric(table: Table) -> set[int]:
    """The columns of a table that hold numbers, without the first."""
    return {n for row in table.rows[:100] for n, value in enumerate(row) if n and cell(value).value is not None}


def render(page: Page) -> str:
    """The page as HTML."""
    library, script = _file(LIBRARY), _file("script.js")
    charts: dict[str, Any] = {}

    def chart_id(chart: Chart) -> str:
        name = f"chart-{len(charts) + 1}"
        charts[name] = {"traces": chart.traces, "layout": chart.layout, "axes": chart.axes}
        return name

    def chart_data() -> str:  # called at the end of the page, once all charts have been seen
        return json.dumps(charts, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"cell": cell, "chart_id": chart_id, "numeric": _numeric}
    return environment.from_string(_file("page.html")).render(
        page=page,
        charts=chart_data,
        hashes=f"{_hash(library)} {_hash(script)}",
        library=library,
        script=script,
        style=_file("style.css"),
        version=fedmpi.__version__,
    )
