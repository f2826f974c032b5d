"""A run directory as a report reads it: its files, and none of its code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmpi import checkpoint, disk, roster, stopping
from fedmpi.compare.grid import DIVERGED
from fedmpi.config import flatten
from fedmpi.directory import read_config
from fedmpi.errors import CheckpointError, ConfigError, FedmpiError
from fedmpi.flat import sha256
from fedmpi.records.metrics import METRICS, each_record
from fedmpi.report.history import History, gather
from fedmpi.report.trace import Phases, read_phases
from fedmpi.results import newest
from fedmpi.supervisor import EVENTS

MOST_BYTES = 1 << 30
MODEL = "model.safetensors"


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk."""

    round: int
    score: float | None  # of the run's metric, higher is better
    bytes: int
    resumable: bool  # False: kept for evaluation only
    trouble: str = ""  # why it cannot be read


@dataclass(frozen=True)
class RunData:
    """What a run directory tells. `sha` is that of the newest whole checkpoint's parameters, of round `sha_round`."""

    root: Path
    config: dict[str, Any]
    about: dict[str, Any]
    history: History
    events: list[dict[str, Any]]  # of events.jsonl
    supervised: list[dict[str, Any]]  # of supervisor.jsonl
    ranks: list[dict[str, Any]]  # of ranks.json
    roster: list[dict[str, Any]]  # rows of silos.json
    saved: list[Saved]
    phases: Phases | None
    sha: str
    sha_round: int
    has_model: bool
    diverged: str  # the reason, which a grid writes; empty if it did not, or if the run is no run of a grid
    training: bool | None  # whether a job trains in it; None if this machine cannot tell
    changed_s: float  # Unix time of the last record; 0 without one

    @property
    def metric(self) -> str:
        """The metric that decides the best round."""
        return str(self.about["metric"])

    @property
    def maximize(self) -> bool:
        return bool(self.about["maximize"])

    @property
    def disclosed(self) -> str:
        """Which figures of single silos the records hold: silo, cohort or pooled."""
        return "pooled" if self.config.get("secure") is not None else str(self.config.get("disclose") or "silo")

    @property
    def in_jobs(self) -> bool:
        """Whether silos are jobs of their own, so that ranks and times are those of the server's job."""
        return bool(self.value("transport", "mpi") == "files")

    @property
    def goal(self) -> int:
        """Number of rounds that the configuration asks for."""
        return int(self.config["rounds"])

    @property
    def flat(self) -> dict[str, Any]:
        """The configuration with dotted keys."""
        return flatten(self.config)

    @property
    def num_silos(self) -> int:
        """Number of silos that the records or silos.json name."""
        return len(self.history.silos) or len(self.roster)

    def value(self, key: str, default: Any = None) -> Any:
        """A value of the configuration, by dotted key; of a component its name."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, dict) and "name" in value:
            value = value["name"]
        return default if value is None else value


def read_run(root: Path) -> RunData:
    """Everything that a run directory tells. Raises ConfigError if it is none."""
    begun = read_config(root)
    sha, sha_round = _parameters(root, int(begun.about["params"]))
    path = root / METRICS
    return RunData(
        root=root,
        config=begun.config,
        about=begun.about,
        history=gather(each_record(root)),
        events=json_lines(root / stopping.EVENTS_FILE),
        supervised=json_lines(root / EVENTS),
        ranks=json_rows(root / "ranks.json"),
        roster=_roster(root),
        saved=_checkpoints(root),
        phases=read_phases(root),
        sha=sha,
        sha_round=sha_round,
        has_model=(root / MODEL).exists(),
        diverged=(root / DIVERGED).read_text().strip() if (root / DIVERGED).exists() else "",
        training=stopping.is_training(root),
        changed_s=path.stat().st_mtime if path.exists() else 0.0,
    )


def _parameters(root: Path, num: int) -> tuple[str, int]:
    """SHA-256 of the newest parameters and their round; empty and -1 if there is no whole checkpoint."""
    try:
        round = newest(root)
        return sha256(checkpoint.read_server(root, round)[checkpoint.PARAMS][:num]), round
    except FedmpiError:
        return "", -1


def _checkpoints(root: Path) -> list[Saved]:
    found = []
    for best in (True, False):
        for round in checkpoint.sealed_rounds(root, best):
            try:
                about = checkpoint.manifest(root, round, best)
            except CheckpointError as error:
                found.append(Saved(round, None, 0, not best, str(error)))
                continue
            found.append(Saved(round, about.score, sum(file.bytes for file in about.files.values()), not best))
    return sorted(found, key=lambda one: one.round)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines; lines that are none are left out."""
    try:
        text = disk.read_bytes(path, MOST_BYTES)
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list; empty if the file holds none."""
    try:
        value = json.loads(disk.read_bytes(path, MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return []
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _roster(root: Path) -> list[dict[str, Any]]:
    try:
        return list(roster.read(root)["silos"])
    except ConfigError:
        return []
