"""Progress on standard output, as lines for people or as JSON for programs, and the final table."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

from fedmpi.comm import launched
from fedmpi.metrics.scorers import SILO_MEAN, of_silo
from fedmpi.output import give, keep_log, note, say
from fedmpi.records.pace import Pace, span
from fedmpi.records.record import Record, now
from fedmpi.records.sink import RunInfo, Sink
from fedmpi.stopping import EVENTS_FILE

MINUTE_S = 60.0  # shortest time between two lines of `minute`


def on_terminal() -> bool:
    """Whether standard output is a terminal. Open MPI's mpirun gives its ranks a terminal even when its own output goes
    to a file, so under a launcher the parent's output decides."""
    if sys.stdout is None or not sys.stdout.isatty():
        return False
    if launched() == 0:
        return True
    try:
        return os.readlink(f"/proc/{os.getppid()}/fd/1").startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False


class Progress(Sink):
    """Progress of a run: a bar on a terminal, plain lines elsewhere, with the same figures.

    `lines`: `rounds`, a line per round; `minute`, at most one a minute, with the first and the last round; `none`. The
    log has a line per round in any case; a rank that becomes rank 0 goes on with it."""

    _bar: Any = None

    def __init__(self, lines: Literal["rounds", "minute", "none"] = "rounds", log: Path | None = None) -> None:
        self._lines, self._log = lines, log
        self._next_s = 0.0

    def open(self, run: RunInfo) -> None:
        self._rounds, self._metric = run.rounds, run.metric
        self._pace = Pace(run.rounds)
        if self._log is not None:
            with contextlib.suppress(OSError):
                keep_log(self._log)
        if self._lines != "none" and on_terminal():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("round"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
            )  # fmt: skip
            self._task = self._bar.add_task("", total=run.rounds, completed=run.resumed)
            self._bar.start()

    def write(self, record: Record) -> None:
        self._pace.add(record)
        text, number = self._line(record), record["round"]
        line = f"round {number:>{len(str(self._rounds))}}/{self._rounds}  {text}"
        if self._bar is not None:
            note(line)
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._bar.update(self._task, completed=number, description=text)
        elif self._lines == "rounds" or (self._lines == "minute" and self._is_due(number)):
            say(line)
        else:
            note(line)

    def _is_due(self, number: int) -> bool:
        now_s = time.monotonic()
        if now_s < self._next_s and number < self._rounds:
            return False
        self._next_s = now_s + MINUTE_S
        return True

    def _line(self, record: Record) -> str:
        parts = [f"train {_figure(record['train_loss'])}"]
        if "loss" in record:
            parts += [f"loss {_figure(record['loss'])}", f"{self._metric} {_figure(record.get(self._metric))}"]
        if (personal := f"personal_{self._metric}") in record:
            parts.append(f"personal {_figure(record[personal])}")
        for key, what in (("rejected", "rejected "), ("not_finite", "loss not finite: ")):
            who = ", ".join(record.get(key, ())) or record.get(f"num_{key}")
            parts += [f"{what}{who}"] if who else []
        if late := ", ".join(f"{silo} ({what})" for silo, what in record.get("late", {}).items()):
            parts.append(f"late {late}")
        parts.append(f"{record['seconds']['round']:.2f} s")
        if (left_s := self._pace.left_s) is not None:
            parts.append(f"ETA {span(left_s)}")
        return "  ".join(parts)

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()


class JsonLines(Sink):
    """Every record and event as a line of JSON on the standard output that is kept for them.

    Records are those of metrics.jsonl; what has the key `event` is an event: `begin`, then those that are
    added to events.jsonl from now on."""

    def __init__(self, root: Path) -> None:
        self._events = root / EVENTS_FILE
        try:
            self._offset = self._events.stat().st_size
        except OSError:
            self._offset = 0

    def begin(self, **facts: Any) -> None:
        """Tell that training begins."""
        give(json.dumps({"event": "begin", "time": now(), **facts}))

    def write(self, record: Record) -> None:
        self._tell_events()
        give(json.dumps(record))

    def close(self) -> None:
        self._tell_events()

    def _tell_events(self) -> None:
        try:
            with open(self._events, "rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                give(json.dumps(json.loads(line)))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


NO_COLUMNS = ("train_loss", "delta_norm", "personal_loss")  # figures not in the table
MOST_COLUMNS = 6  # most figures in the table


def silo_table(record: Record, metric: str) -> Any:
    """A rich table of a record's figures: a row per silo, then a row pooled over silos, then a row of means over silos.
    `metric` comes first; at most six figures are shown."""
    from rich.table import Table

    rows = record["silos"]
    keys = [k for k in record if k not in NO_COLUMNS and any(of_silo(k) in row for row in rows.values())]
    first = ("loss", metric, f"personal_{metric}")
    keys = keys or [k for k in dict.fromkeys(("loss", metric)) if record.get(k) is not None]  # only sums were told
    keys = sorted(keys, key=lambda k: first.index(k) if k in first else len(first))[:MOST_COLUMNS]
    table = Table(title=f"after round {record['round']}")
    for name in ("silo", "rank", "train samples", "test samples", *map(of_silo, keys)):
        table.add_column(name.replace("_", " "), justify="left" if name == "silo" else "right")
    for silo, row in rows.items():
        table.add_row(
            silo, str(row["rank"]), str(row["num_train"]), str(row.get("num_test", "-")),
            *(_figure(row.get(of_silo(key))) for key in keys),
        )  # fmt: skip
    if keys:
        tests = sum(row["num_test"] for row in rows.values() if "num_test" in row) or "-"
        trains = sum(row["num_train"] for row in rows.values())
        table.add_section()
        figures = [_figure(record[k]) if SILO_MEAN not in k else "-" for k in keys]
        table.add_row("all", "", str(trains), str(tests), *figures)
        if any(SILO_MEAN in k for k in keys):
            table.add_row("mean of silos", "", "", "", *(_figure(record[k]) if SILO_MEAN in k else "-" for k in keys))
    return table
