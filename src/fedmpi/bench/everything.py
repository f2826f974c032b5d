"""All benchmarks in a given time, as one page and one file about a system."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedmpi.bench import checkpoint, codecs, exchange, figures, quality, scaling
from fedmpi.bench.figures import Figure
from fedmpi.bench.timing import Row, table
from fedmpi.comm import Comm
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.doctor import examine, lines

TARGET = 0.9  # accuracy on digits
SHARES = {"codecs": 0.15, "exchange": 0.35, "scaling": 0.2}  # of the time; the other parts take what they need
COLUMNS = {
    "codecs": codecs.COLUMNS,
    "exchange": exchange.COLUMNS,
    "checkpoint": ["waited", "ratio", "params", "round_s", "write_s", "resume_s"],
    "scaling": scaling.COLUMNS,
    "quality": quality.COLUMNS,
}


def everything(comm: Comm, num_params: int, minutes: float, out: Path) -> dict[str, Any]:
    """The result, with `doctor` and the results of `parts` beside the common keys. Collective.

    About `minutes` long: repeats end when a part's share of the time is over. `out`: a folder for runs, which are
    removed.
    """
    started_s, limit_s = time.time(), 60 * minutes
    rounds = 11 if minutes < 3 else 30

    def alone(work: Callable[[], list[Row]]) -> list[Row]:
        return comm.collectively(lambda: work() if comm.rank == 0 else [])

    def trains() -> list[Row]:
        config = build(Config, {"rounds": 100, "data": {"name": "digits", "silos": comm.size}, "out": str(out / "run")})
        return quality.quality(comm, config, TARGET, quality.RUNS)[0]

    some = [exchange.channel(name) for name in ("identity", "int8")]
    parts: dict[str, tuple[Callable[[], list[Row]], Callable[[list[Row], float], list[Figure]]]] = {
        "codecs": (
            lambda: alone(lambda: codecs.codecs(num_params, limit_s=SHARES["codecs"] * limit_s)),
            lambda rows, _: codecs.figures(rows),
        ),
        "exchange": (
            lambda: exchange.exchange(comm, num_params, limit_s=SHARES["exchange"] * limit_s),
            lambda rows, _: exchange.figures(rows),
        ),
        "checkpoint": (
            lambda: [checkpoint.checkpoint(comm, num_params, rounds)],
            lambda rows, _: checkpoint.figures(rows[0]),
        ),
        "scaling": (
            lambda: scaling.scaling(comm, [num_params], some, rounds=3, limit_s=SHARES["scaling"] * limit_s),
            lambda rows, _: scaling.figures(rows),
        ),
        "quality": (trains, quality.figures),
    }
    doctor = examine(comm, out)
    results = {}
    for name, (work, told) in parts.items():
        start_s = time.time()
        rows = work()
        settings = {"params": num_params} if name != "quality" else {"data": "digits", "target": TARGET}
        found = told(rows, time.time() - start_s) if rows else []
        results[name] = figures.result(comm, name, settings, rows, found, start_s)
    found = [Figure(**one) for part in results.values() for one in part["figures"]]
    whole = figures.result(comm, "all", {"params": num_params, "minutes": minutes}, [], found, started_s)
    return {**whole, "doctor": doctor, "parts": results}


def page(result: Mapping[str, Any]) -> str:
    """The result as text: the system, then a table for each benchmark, then all figures of merit."""
    system = result["system"]
    hosts = f"{system['ranks']} ranks on {', '.join(system['hosts'])}"
    text = [f"fedmpi bench all: {hosts}, {system['cpu']}, {result['started']}, {result['seconds']:.0f} s", ""]
    text += lines(result["doctor"])
    for name, part in result["parts"].items():
        text += ["", f"{name} ({part['seconds']:.0f} s)", table(part["rows"], COLUMNS[name])]
    return "\n".join([*text, "", *(str(Figure(**one)) for one in result["figures"])])
