"""The base class of sinks, which get every record on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmpi.records.record import Record

Timings = tuple[np.ndarray, Mapping[str, np.ndarray]]


def _no_timings() -> Timings:
    return np.zeros(0), {}


@dataclass(frozen=True)
class RunInfo:
    """What a sink may know of its run."""

    root: Path  # the run directory
    resumed: int = 0  # the round that the run resumed from
    rounds: int = 0  # total rounds
    metric: str = ""  # record key that decides the best round
    # For the round being written: start time of each rank (Unix seconds), [n], and seconds per phase, each [n].
    timings: Callable[[], Timings] = _no_timings


class Sink:
    """Writes records somewhere. Your own defines `write`, and `open` and `close` if it needs them. Its constructor's
    arguments are options: `records: {sinks: [{name: "package.module:Class", option: 1}]}`; or pass an instance to
    `Run.add_sink`.

    A sink never ends training: if `write` or `close` raises, the sink is dropped with a warning.
    """

    def open(self, run: RunInfo) -> None:
        """Called before the first round. Raise OSError or ConfigError to refuse the run."""

    def write(self, record: Record) -> None:
        """Write a round's record. Do not change it: it is shared."""
        raise NotImplementedError

    def close(self) -> None:
        """Called after the last round, or when the run ends early. May be called twice."""
