"""What a sink is: one class that is given every record, on rank 0."""

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
    """What a sink may know of the run whose records it gets."""

    root: Path  # the run directory
    resumed: int = 0  # the round that the run goes on from
    rounds: int = 0  # to have done at the end
    metric: str = ""  # which figure tells the best round
    # When each rank began the round that is being written, [n], and the seconds of each in its phases, in their order.
    timings: Callable[[], Timings] = _no_timings


class Sink:
    """Where records go. Your own has `write` and, where it needs them, the others; what its constructor takes are
    options: `records: {sinks: [{name: "package.module:Class", option: 1}]}`, or an instance for `Run.add_sink`.

    A sink never ends training: after an error it is left out, with a warning.
    """

    def open(self, run: RunInfo) -> None:
        """Before the first round. Raises OSError or ConfigError where it cannot begin."""

    def write(self, record: Record) -> None:
        """A round's record, which is everybody's: not to be changed."""
        raise NotImplementedError

    def close(self) -> None:
        """After the last, or where the run ends early. May come twice."""
