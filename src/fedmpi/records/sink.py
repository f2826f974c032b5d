"""The base class of sinks, which get every record on rank 0."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedmpi import disk
from fedmpi.errors import ConfigError
from fedmpi.records.record import Record

log = logging.getLogger("fedmpi")


class Timings(NamedTuple):
    """What ranks did in a round; arrays have a value per rank, [n].

    starts_s    when each rank began, Unix time by its own clock (records/clock.py); 0: not known
    phases      seconds by phase, in order of time
    parts       seconds by phase and part of the exchange (records/timer.py)
    tracks      exchanges of another thread: round, start, seconds, and seconds by part; round 0: none
    ranks       the rows of ranks.json
    """

    starts_s: np.ndarray = np.zeros(0)
    phases: Mapping[str, np.ndarray] = {}
    parts: Mapping[tuple[str, str], np.ndarray] = {}
    tracks: Sequence[Mapping[str, np.ndarray]] = ()
    ranks: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class RunInfo:
    """What a sink may know of its run."""

    root: Path  # the run directory
    resumed: int = 0  # the round that the run resumed from
    rounds: int = 0  # total rounds
    metric: str = ""  # record key that decides the best round
    timings: Callable[[], Timings] = Timings  # of the round that is being written


class Sink:
    """Writes records somewhere. Your own defines `write`, and `open` and `close` if it needs them. Its constructor's
    arguments are options: `records: {sinks: [{name: "package.module:Class", option: 1}]}`; or pass an instance to
    `Run.add_sink`.

    A sink never ends training: if `write` or `close` raises, the sink is dropped with a warning.
    """

    def require(self) -> None:
        """Raise ConfigError if a package is missing. `fedmpi check` calls it too."""

    def open(self, run: RunInfo) -> None:
        """Called before the first round. Raise OSError or ConfigError to refuse the run."""

    def write(self, record: Record) -> None:
        """Write a round's record. Do not change it: it is shared."""
        raise NotImplementedError

    def close(self) -> None:
        """Called after the last round, or when the run ends early. May be called twice."""


class Tracker(Sink):
    """A sink that writes to a tracking service, which may be away: then a warning is printed, and the run goes on.

    A resumed run goes on with the service's run, whose id is in OUT/`file`. Another run begins a new one.
    """

    file = ""  # of the id, in the run directory
    id = ""  # of the service's run; empty if there is none, or if it has been ended

    @abstractmethod
    def begin(self, run: RunInfo, before: str) -> str:
        """Begin the service's run, or go on with the one whose id is `before`; returns its id."""

    @abstractmethod
    def tell(self, record: Record) -> None:
        """Send a record's numbers."""

    @abstractmethod
    def end(self) -> None:
        """End the service's run."""

    def open(self, run: RunInfo) -> None:
        self.require()
        before = _id_in(run.root / self.file) if run.resumed else ""
        try:
            self.id = self.begin(run, before)
        except ConfigError:
            raise
        except Exception as error:
            name = type(self).__name__
            log.warning("%s cannot begin (%s: %s); it gets no records", name, type(error).__name__, error)
            return
        disk.replace_text(run.root / self.file, json.dumps({"id": self.id}))

    def write(self, record: Record) -> None:
        if self.id:
            self.tell(record)

    def close(self) -> None:
        if self.id:
            try:
                self.end()
            finally:
                self.id = ""


def _id_in(path: Path) -> str:
    """The id that an earlier start has written; empty if there is none."""
    try:
        found = json.loads(disk.read_bytes(path))["id"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return found if isinstance(found, str) else ""


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record by name, phases as `seconds/PHASE`. Without the rows of silos.

    >>> scalars({"schema": 1, "round": 3, "loss": 0.5, "accuracy": None, "seconds": {"train": 2.0}, "silos": {}})
    {'loss': 0.5, 'seconds/train': 2.0}
    """
    found = {name: value for name, value in record.items() if name not in ("round", "schema")}
    found |= {f"seconds/{name}": value for name, value in (record.get("seconds") or {}).items()}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}
