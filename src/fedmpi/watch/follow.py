"""A run directory that is read again and again: only what is new of metrics.jsonl and trace.json."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmpi import disk, roster, stopping
from fedmpi.compare.grid import DIVERGED
from fedmpi.directory import Begun, read_config
from fedmpi.errors import ConfigError
from fedmpi.records import Record
from fedmpi.records.metrics import METRICS, record_in
from fedmpi.report.history import gather
from fedmpi.report.reading import MODEL, RunData, json_lines, json_rows
from fedmpi.report.trace import last_phases
from fedmpi.supervisor import EVENTS
from fedmpi.watch.jobs import Jobs, jobs_of

MOST_BYTES = 1 << 28
PROBE_S = 10.0  # shortest time between two looks at the lock of a run that writes no records
_LARGE = ("silos", "cosines", "confusion_matrix", "cohort", "arrivals")  # fields kept of the last record only


class Records:
    """The records of metrics.jsonl so far; `look` reads those that are new.

    A start of the run may replace or cut the file: then another file has its name, it is shorter, or the bytes before
    the place that was read last are others. In each case it is read from its beginning. A last line without an end is
    read once it has one.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / METRICS
        self._reset()
        self.changed_s = 0.0  # Unix time of the last change, by the file's server
        self._inode = 0

    def _reset(self) -> None:
        self.rows: list[Record | None] = []  # without large fields; None for a damaged line
        self.last: Record | None = None  # complete
        self._offset, self._before, self._sealed = 0, b"", False

    def look(self) -> bool:
        """Read what is new; True if there was anything. Raises nothing."""
        try:
            with open(disk.open_regular(self._path), "rb") as file:
                about = os.fstat(file.fileno())
                file.seek(max(0, self._offset - len(self._before)))
                same = about.st_size >= self._offset and file.read(len(self._before)) == self._before
                anew = about.st_ino != self._inode or not same
                if anew:
                    self._reset()
                self._inode, self.changed_s = about.st_ino, about.st_mtime
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:  # not there yet, or a server that is away for a moment
            return False
        for line in whole.split(b"\n") if newline else ():
            if line:
                self._take(line)
        if newline:
            self._offset += len(whole) + 1
            self._before = (self._before + whole + newline)[-64:]
        return bool(newline) or anew

    def _take(self, line: bytes) -> None:
        record = record_in(line, self._sealed)
        if record is None:
            self.rows.append(None)
            return
        self._sealed = self._sealed or "crc32" in record or line.endswith(b'"}')
        self.last = record
        self.rows.append({name: value for name, value in record.items() if name not in _LARGE})


@dataclass
class Seen:
    """What a look at a run directory gave. `run` is None before the run has begun."""

    root: Path
    run: RunData | None = None
    trouble: str = ""  # why the directory cannot be read
    last: Record | None = None  # the last record, complete
    phases: dict[int, dict[str, float]] = field(default_factory=dict)  # of the last round in trace.json, by rank
    stop_asked: bool = False
    waiting: list[str] = field(default_factory=list)  # silos with a request that waits
    jobs: dict[str, str] = field(default_factory=dict)  # of silos in jobs of their own: what each and the server do
    now_s: float = 0.0


class Follower:
    """Reads a run directory; call `look` every now and then."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._records = Records(root)
        self._config: tuple[tuple[int, int, int], Begun] | None = None
        self._probed_s = -PROBE_S
        self._training: bool | None = None
        self._jobs: Jobs | None = None

    def look(self) -> Seen:
        """The run as it stands. Raises nothing that a file may cause."""
        seen = Seen(self.root, now_s=time.time())
        try:
            begun = self._begun()
        except ConfigError as error:
            there = (self.root / "config.yaml").exists()
            seen.trouble = str(error) if there else ""
            return seen
        except FileNotFoundError:
            return seen
        fresh = self._records.look()
        seen.last = self._records.last
        found = _rows(self.root / roster.FILE)
        seen.run = RunData(
            root=self.root,
            config=begun.config,
            about=begun.about,
            history=gather(self._records.rows),
            events=json_lines(self.root / stopping.EVENTS_FILE),
            supervised=json_lines(self.root / EVENTS),
            ranks=json_rows(self.root / "ranks.json"),
            roster=found,
            saved=[],
            phases=None,
            sha="",
            sha_round=-1,
            has_model=(self.root / MODEL).exists(),
            diverged=_text(self.root / DIVERGED),
            training=self._trains(fresh),
            changed_s=self._records.changed_s,
        )
        seen.phases = last_phases(self.root, max(1, len(seen.run.ranks)))
        seen.stop_asked = (self.root / stopping.STOP_FILE).exists()
        seen.waiting = [str(row["id"]) for row in found if str(row.get("why") or "").startswith("asked to")]
        if self._jobs is not None:
            seen.jobs = self._jobs.look([str(row["id"]) for row in found])
        return seen

    def _begun(self) -> Begun:
        """The configuration, parsed again only if its file is another one."""
        about = os.stat(self.root / "config.yaml")
        stamp = (about.st_ino, about.st_mtime_ns, about.st_size)
        if self._config is None or self._config[0] != stamp:
            self._config = (stamp, read_config(self.root))
            self._jobs = jobs_of(self._config[1].config)
        return self._config[1]

    def _trains(self, fresh: bool) -> bool | None:
        """Whether a job trains. The lock is probed seldom: a job that starts in that moment has to try twice."""
        now_s = time.monotonic()
        if now_s - self._probed_s >= PROBE_S or (self._training is False and fresh):
            self._probed_s, self._training = now_s, stopping.is_training(self.root)
        return self._training


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return list(roster.tell(path.parent)["silos"])
    except ConfigError:
        return []


def _text(path: Path) -> str:
    try:
        return disk.read_bytes(path, MOST_BYTES).decode(errors="replace").strip()
    except OSError:
        return ""
