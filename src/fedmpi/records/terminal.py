"""Progress on standard output, and the final table."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from fedmpi.comm import launched
from fedmpi.metrics.scorers import SILO_MEAN, of_silo
from fedmpi.output import say
from fedmpi.records.record import Record
from fedmpi.records.sink import RunInfo, Sink


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
    """Progress of a run: a bar on a terminal, plain lines elsewhere, with the same figures."""

    _bar: Any = None

    def open(self, run: RunInfo) -> None:
        self._rounds, self._metric = run.rounds, run.metric
        if on_terminal():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("round"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )  # fmt: skip
            self._task = self._bar.add_task("", total=run.rounds, completed=run.resumed)
            self._bar.start()

    def write(self, record: Record) -> None:
        text = self._line(record)
        if self._bar is None:
            say(f"round {record['round']:>{len(str(self._rounds))}}/{self._rounds}  {text}")
        else:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._bar.update(self._task, completed=record["round"], description=text)

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
        return "  ".join([*parts, f"{record['seconds']['round']:.2f} s"])

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()


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
        tests = sum(row.get("num_test", 0) for row in rows.values())
        trains = sum(row["num_train"] for row in rows.values())
        table.add_section()
        figures = [_figure(record[k]) if SILO_MEAN not in k else "-" for k in keys]
        table.add_row("all", "", str(trains), str(tests), *figures)
        if any(SILO_MEAN in k for k in keys):
            table.add_row("mean of silos", "", "", "", *(_figure(record[k]) if SILO_MEAN in k else "-" for k in keys))
    return table
