"""Figures of merit, and what a benchmark prints: a table and FOM lines, one JSON object, or MLPerf-style log lines.

    FOM exchange.sharded.int8.bandwidth 2.31 GB/s

The JSON object has the same keys for every benchmark: `schema`, `benchmark`, `started`, `seconds`, `system`,
`settings`, `figures` (name, value, unit) and `rows`, which differ by benchmark.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from fedmpi.bench.timing import Row, table
from fedmpi.comm import Comm
from fedmpi.doctor import library
from fedmpi.errors import ConfigError
from fedmpi.parts import versions

SCHEMA = "fedmpi-bench/1"


class Style(StrEnum):
    """How a result is printed."""

    TEXT = "text"
    JSON = "json"
    MLLOG = "mllog"

    @classmethod
    def of(cls, as_json: bool, as_mllog: bool) -> Style:
        """The style of two options. Raises ConfigError for both."""
        if as_json and as_mllog:
            raise ConfigError("--json and --mllog exclude each other")
        return cls.JSON if as_json else cls.MLLOG if as_mllog else cls.TEXT


@dataclass(frozen=True)
class Figure:
    """One figure of merit."""

    name: str  # words joined by dots, without spaces; the same in every run of a benchmark
    value: float
    unit: str  # s, GB/s, ratio, share, bytes/param, models/min

    def __str__(self) -> str:
        """
        >>> print(Figure("exchange.root.seconds", 0.25, "s"))
        FOM exchange.root.seconds 0.25 s
        """
        return f"FOM {self.name} {self.value:.6g} {self.unit}"


class Event(NamedTuple):
    """A line of an MLPerf log."""

    time_s: float  # since 1970
    kind: str  # INTERVAL_START, INTERVAL_END or POINT_IN_TIME
    key: str
    value: Any
    metadata: Mapping[str, Any]


def word(text: str) -> str:
    """A part of a figure's name.

    >>> word("{name: topk, ratio: 0.02}"), word("int8"), word("north/silo 1")
    ('topk-ratio-0.02', 'int8', 'north-silo-1')
    """
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text.replace("name: ", "")).strip("-")


def result(
    comm: Comm,
    benchmark: str,
    settings: Mapping[str, Any],
    rows: Iterable[Row],
    figures: Iterable[Figure],
    started_s: float,
) -> dict[str, Any]:
    """The result of a benchmark, equal on every rank except for seconds. Collective.

    `started_s`: seconds since 1970. Figures that could not be measured (NaN) are left out.
    """
    hosts = [row.decode().strip() for row in comm.gather(socket.gethostname().encode().ljust(64)[:64])]
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started_s)),
        "seconds": time.time() - started_s,
        "system": {
            "ranks": comm.size,
            "hosts": sorted(set(hosts)),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "mpi": library.look(comm)["library"] if comm.size > 1 else None,
            "versions": versions(),
        },
        "settings": dict(settings),
        "figures": [asdict(one) for one in figures if math.isfinite(one.value)],
        "rows": list(rows),
    }


def _cpu() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def text(found: Mapping[str, Any], columns: list[str], style: Style, events: Iterable[Event] = ()) -> str:
    """The result as it is printed; `columns` are those of the table."""
    figures = [Figure(**one) for one in found["figures"]]
    if style is Style.JSON:
        return json.dumps(found)
    if style is Style.MLLOG:
        end_s = time.time()
        points = [Event(end_s, "POINT_IN_TIME", one.name, one.value, {"unit": one.unit}) for one in figures]
        return "\n".join(map(mllog, [*events, *points]))
    return "\n".join([table(found["rows"], columns), "", *map(str, figures)])


def mllog(event: Event) -> str:
    """A line in the format of MLPerf's logging.

    >>> print(mllog(Event(1.5, "POINT_IN_TIME", "x", 3, {})))
    :::MLLOG {"namespace": "", "time_ms": 1500, "event_type": "POINT_IN_TIME", "key": "x", "value": 3, "metadata": {}}
    """
    fields = {
        "namespace": "",
        "time_ms": round(event.time_s * 1000),
        "event_type": event.kind,
        "key": event.key,
        "value": event.value,
        "metadata": dict(event.metadata),
    }
    return f":::MLLOG {json.dumps(fields)}"
