"""One self-contained HTML page about one or several runs, for `fedmpi report`.

reading     a run directory: its files, none of its code
history     its records as arrays; trace: its times by rank
status      what became of it, what went wrong
sections/   the parts of the page about one run, one file each
several     the parts about several runs; groups: runs that differ in the seed only; grid: those of a grid
blocks      what sections consist of: tables, charts, drawings
page        HTML from sections: page.html, style.css, script.js and plotly.js

    from fedmpi.report import write
    path = write([Path("runs/digits")])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedmpi import disk
from fedmpi.errors import ConfigError
from fedmpi.report.overview import page_of
from fedmpi.report.page import render

REPORT = "report.html"

__all__ = ["REPORT", "write"]


def write(what: Sequence[Path], out: Path | None = None, title: str = "") -> Path:
    """Write the report about run directories, the folder of a grid's runs, or a grid's file; return its path.

    Without `out` the page of one run or of one grid is in its folder, that of several runs in the current one. Raises
    ConfigError where a directory holds no run, or if the page cannot be written.
    """
    page, folder = page_of(what, title)
    path = out if out is not None else folder / REPORT
    try:
        disk.replace_text(path, render(page))
    except OSError as error:
        why = "its folder does not exist" if not path.parent.is_dir() else error.strerror or str(error)
        raise ConfigError(f"cannot write {path}: {why}; --out names another file") from None
    return path
