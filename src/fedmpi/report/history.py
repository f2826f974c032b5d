"""The records of a run as arrays: one value per round, and one per round and silo."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedmpi.records import Record
from fedmpi.records.record import SENT
from fedmpi.report.numbers import size

# Fields of a record that are no figures of the model.
_OTHER = frozenset(
    (
        *("schema", "round", "cohort", "rejected", "num_rejected", "rejected_by", "not_finite", "num_not_finite"),
        *("deadline_s", "late", "stale", "repeats", "virtual_s", "arrivals", "experiment", "worst", "spread"),
        *("seconds", "epsilon", "delta", "bytes_up", "bytes_down", "bytes_control", "peak_rss_bytes", "silos", "crc32"),
        *("time", "cosine", "cosines", "undefined", "raised", "summed", "given_up", "scored_by", "scores_given_up"),
    )
)
MATRIX = "confusion_matrix"
_LARGE = ("silos", "cosines")  # fields that are not kept as they are


@dataclass
class History:
    """The rounds of a run, in the order of metrics.jsonl, and their silos in the order in which they appear.

    records     without the silos' rows, and with a confusion matrix only in the last one that has one
    silos       ids
    rows        by field of a silo's row: values [rounds, silos], nan where there is none
    member      whether a silo has a row in a round [rounds, silos]
    damaged     number of lines that could not be read
    """

    records: list[Record]
    silos: list[str]
    rows: dict[str, np.ndarray]
    member: np.ndarray
    damaged: int = 0
    matrix: tuple[int, list[list[int]]] | None = None  # the last confusion matrix and its round
    _columns: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def num(self) -> int:
        """Number of rounds."""
        return len(self.records)

    @property
    def rounds(self) -> np.ndarray:
        """Their numbers."""
        return np.array([record["round"] for record in self.records], dtype=int)

    def of(self, *path: str) -> np.ndarray:
        """A field by round, nan where it is absent or null; `of("seconds", "train")` looks inside.

        >>> gather([{"round": 1, "loss": 0.5}, {"round": 2, "loss": None}, {"round": 3}]).of("loss")
        array([0.5, nan, nan])
        """
        key = "/".join(path)
        if key not in self._columns:
            self._columns[key] = np.array([_inside(record, path) for record in self.records], dtype=float)
        return self._columns[key]

    @property
    def sent(self) -> np.ndarray:
        """Bytes of each round, of all ranks together: vectors up and down, and tables. 0 where they are not known."""
        return np.asarray(np.nansum([self.of(field) for field in SENT.values()], axis=0))

    def sent_text(self) -> str:
        """All bytes in one number, with its parts.

        >>> one = {"round": 1, "bytes_up": 3e6, "bytes_down": 3e6, "bytes_control": 500}
        >>> gather([one]).sent_text()
        '6.00 MB of traffic: 3.00 MB up, 3.00 MB down, 500 B tables'
        """
        parts = [f"{size(float(np.nansum(self.of(field))))} {name}" for name, field in SENT.items()]
        return f"{size(float(self.sent.sum()))} of traffic: {', '.join(parts)}"

    def there(self, name: str) -> np.ndarray:
        """Whether a field is there, by round, even if it is null."""
        return np.array([name in record for record in self.records], dtype=bool)

    def of_silos(self, name: str) -> np.ndarray:
        """A field of the silos' rows [rounds, silos]."""
        return self.rows.get(name, np.full(self.member.shape, np.nan))

    @property
    def figures(self) -> list[str]:
        """Names of the figures of all silos: losses, metrics, measurements."""
        names: dict[str, None] = {}
        for record in self.records:
            names |= {k: None for k, v in record.items() if k not in _OTHER and (v is None or _is_number(v))}
        return [name for name in names if np.isfinite(self.of(name)).any() or name in ("loss", "train_loss")]

    def marked(self, name: str) -> np.ndarray:
        """Which silos a record lists under `name` (a list of ids, or an object by id) [rounds, silos]."""
        index = {silo: i for i, silo in enumerate(self.silos)}
        found = np.zeros(self.member.shape, dtype=bool)
        for row, record in zip(found, self.records, strict=True):
            row[[index[silo] for silo in record.get(name) or () if silo in index]] = True
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _inside(record: Mapping[str, Any], path: Iterable[str]) -> float:
    value: Any = record
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if _is_number(value) else math.nan


def gather(lines: Iterable[Record | None]) -> History:
    """The history of records; None stands for a damaged line."""
    records: list[Record] = []
    index: dict[str, int] = {}
    cells: dict[str, tuple[array[int], array[int], array[float]]] = {}  # round, silo, value
    here = array("q"), array("q")
    damaged, matrix = 0, None
    for record in lines:
        if record is None:
            damaged += 1
            continue
        at = len(records)
        for silo, row in (record.get("silos") or {}).items():
            column = index.setdefault(silo, len(index))
            here[0].append(at)
            here[1].append(column)
            for name, value in row.items():
                if _is_number(value):
                    rounds, columns, values = cells.setdefault(name, (array("q"), array("q"), array("d")))
                    rounds.append(at)
                    columns.append(column)
                    values.append(value)
        for name in ("cohort", "late", "stale"):  # silos that have left have no row
            for silo in record.get(name) or ():
                index.setdefault(silo, len(index))
        if record.get(MATRIX):
            matrix = (int(record["round"]), record[MATRIX])
        records.append({k: v for k, v in record.items() if k not in (*_LARGE, MATRIX)})
    shape = (len(records), len(index))
    member = np.zeros(shape, dtype=bool)
    member[np.asarray(here[0]), np.asarray(here[1])] = True
    rows = {}
    for name, (rounds, columns, values) in cells.items():
        rows[name] = np.full(shape, np.nan)
        rows[name][np.asarray(rounds), np.asarray(columns)] = values
    return History(records, list(index), rows, member, damaged, matrix)
