"""What a run says of itself: records, timers, the trace, progress on the terminal.

A record is what a round says of itself; it is the same on every rank, and rank 0 writes it as one line of
metrics.jsonl. The trace has every rank's phases and opens in Perfetto (ui.perfetto.dev) or chrome://tracing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import resource
import secrets
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from fedmpi import disk
from fedmpi.comm import launched
from fedmpi.errors import CheckpointError
from fedmpi.metrics.scorers import SILO_MEAN, of_silo
from fedmpi.output import say

log = logging.getLogger("fedmpi")

# In the order of time. A round's row travels in `agree`, so agree and checkpoint are those of the round before.
PHASES = ("agree", "checkpoint", "select", "train", "wait", "exchange", "step", "evaluate")

Record = dict[str, Any]


class Timer:
    """Seconds by phase of one rank's round; phases follow one another, each ends where the next begins."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.started_s = time.time()
        self._last = time.perf_counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def lap(self, phase: str) -> None:
        """What has passed since the last lap was `phase`."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


def peak_rss_bytes() -> int:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StatusTable:
    """Small numbers of a round that everybody must know: a row per rank, a row per silo, and counts, all float64.

    Every rank fills in its own rows; `share` makes them everybody's in one small collective. Sums are then taken in
    silo order on every rank, so a record does not depend on where silos live. Counts are whole numbers that are added
    up over all silos, which is exact in any order.
    """

    def __init__(
        self,
        num_ranks: int,
        rank_columns: Sequence[str],
        num_silos: int,
        silo_columns: Sequence[str],
        num_counts: int = 0,
    ):
        self._rank_columns = {name: i for i, name in enumerate(rank_columns)}
        self._silo_columns = {name: i for i, name in enumerate(silo_columns)}
        self._split = num_ranks * len(rank_columns)
        self._end = self._split + num_silos * len(silo_columns)
        self._values = np.zeros(self._end + num_counts)

    def _view(self, per_rank: bool) -> np.ndarray:
        columns = self._rank_columns if per_rank else self._silo_columns
        part = self._values[: self._split] if per_rank else self._values[self._split : self._end]
        return part.reshape(-1, len(columns))

    @property
    def counts(self) -> np.ndarray:
        """The counts of this rank's silos, to be added to; of all silos once shared."""
        return self._values[self._end :]

    @property
    def num_bytes(self) -> int:
        """What a rank hands to the collective."""
        return self._values.nbytes

    def clear(self) -> None:
        self._values[:] = 0.0

    def set_rank(self, rank: int, **values: float) -> None:
        for name, value in values.items():
            self._view(True)[rank, self._rank_columns[name]] = value

    def set_silo(self, silo: int, **values: float) -> None:
        for name, value in values.items():
            self._view(False)[silo, self._silo_columns[name]] = value

    def rank(self, column: str) -> np.ndarray:
        """One value per rank, [n]."""
        return self._view(True)[:, self._rank_columns[column]]

    def silo(self, column: str) -> np.ndarray:
        """One value per silo, in the federation's order, [K]."""
        return self._view(False)[:, self._silo_columns[column]]

    def share(self, over: Callable[[np.ndarray], np.ndarray]) -> None:
        self._values = over(self._values)


# ---------------------------------------------------------------- figures over silos


def spread(values_K: np.ndarray, maximize: bool) -> dict[str, float] | None:
    """How unequal a metric is over silos, each alike: its standard deviation and the tenth percentile from the worse
    end (`p10` of what is to be high, `p90` of what is to be low). None without a finite figure.

    >>> spread(np.array([0.5, 0.5, 1.0, 1.0]), True)
    {'std': 0.25, 'p10': 0.5}
    """
    finite = values_K[np.isfinite(values_K)]
    if not finite.size:
        return None
    percent = 10 if maximize else 90
    return {"std": float(finite.std()), f"p{percent}": float(np.percentile(finite, percent))}


def gradient_diversity(gram_KK: np.ndarray, silos: Sequence[str] | None = None) -> dict[str, Any]:
    """What the inner products of K deltas say: gradient diversity, sum_k |delta_k|^2 / |sum_k delta_k|^2 (Yin et al.
    2018, Gradient Diversity, Definition 1): 1/K where all are alike, 1 where they are orthogonal; mean and least cosine
    of two of them; and with `silos` all cosines, in their order. None where a delta or the sum is 0.

    >>> gradient_diversity(np.array([[1.0, 0.0], [0.0, 4.0]]))
    {'diversity': 1.0, 'cosine': {'mean': 0.0, 'min': 0.0}}
    """
    norms_K = np.sqrt(np.diag(gram_KK))
    moves = norms_K > 0
    outer = np.outer(norms_K, norms_K)
    cosines_KK = np.divide(gram_KK, outer, out=np.full_like(gram_KK, np.nan), where=outer > 0).clip(-1, 1)
    pairs = cosines_KK[np.triu_indices(len(gram_KK), 1)]
    pairs = pairs[~np.isnan(pairs)]
    whole = float(gram_KK.sum())
    found: dict[str, Any] = {"diversity": float(np.trace(gram_KK)) / whole if moves.any() and whole > 0 else None}
    found["cosine"] = {"mean": float(pairs.mean()), "min": float(pairs.min())} if pairs.size else None
    if silos is not None:
        rows = [[None if math.isnan(value) else value for value in row] for row in cosines_KK.tolist()]
        found["cosines"] = {"silos": list(silos), "rows": rows}
    return found


def plain(value: Any) -> Any:
    """The value with None for what JSON does not know: nan and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


# ---------------------------------------------------------------- files


METRICS = "metrics.jsonl"
_MOST = 1 << 40  # bytes of a file that grows with rounds, silos and ranks: whatever a run has written is read again
_CRC = re.compile(rb', "crc32": "([0-9a-f]{8})"\}$')


def line_of(record: Record) -> bytes:
    """The record as its line of metrics.jsonl; its last field is the CRC-32 of what stands before that field."""
    body = json.dumps(record)[:-1].encode()
    return body + b', "crc32": "%08x"}\n' % zlib.crc32(body)


def read_metrics(root: Path) -> list[Record]:
    """The records in metrics.jsonl, oldest first; lines that are damaged are left out with a warning."""
    try:
        return [record for record, _ in _read(root)[0]]
    except OSError as error:
        log.warning("%s cannot be read: %s", root / METRICS, error.strerror or error)
        return []


def _read(root: Path) -> tuple[list[tuple[Record, bytes]], list[bytes]]:
    """The records with their lines, and the lines that are none. OSError where the file cannot be read."""
    whole: list[tuple[Record, bytes]] = []
    damaged: list[bytes] = []
    path = root / METRICS
    try:
        lines = disk.read_bytes(path, _MOST).split(b"\n")
    except FileNotFoundError:
        return whole, damaged
    sealed = any(_CRC.search(line) for line in lines)  # else it is older than checksums
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        record = _record_in(line, sealed)
        if record is None:
            log.warning("%s, line %d is damaged and left out", path, number)
            damaged.append(line)
        else:
            whole.append((record, line))
    return whole, damaged


def _record_in(line: bytes, sealed: bool) -> Record | None:
    crc = _CRC.search(line)
    if crc is not None:
        line = line[: crc.start()]
        if int(crc[1], 16) != zlib.crc32(line):
            return None
        line += b"}"
    elif sealed:
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("round")) is int else None


class Metrics:
    """metrics.jsonl, cut at the round that the run resumes from. What is cut is kept beside it: damaged lines in
    metrics.bad.jsonl, records of rounds that are done again in metrics.undone.jsonl."""

    def __init__(self, root: Path, resumed_round: int) -> None:
        path = root / METRICS
        try:
            whole, damaged = _read(root)
        except OSError as error:
            _put_aside(path, error)
            whole, damaged = [], []
        if damaged:
            log.warning("%d damaged lines of %s are kept in metrics.bad.jsonl", len(damaged), path)
        _keep_aside(root / "metrics.bad.jsonl", damaged)
        _keep_aside(root / "metrics.undone.jsonl", [line for record, line in whole if record["round"] > resumed_round])
        before = [line + b"\n" for record, line in whole if record["round"] <= resumed_round]
        disk.replace_bytes(path, b"".join(before))
        if missing := sorted(set(range(1, resumed_round + 1)) - {record["round"] for record, _ in whole}):
            text = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            log.warning("%s has no record of round %s; checkpoints have what is needed to go on", path, text)
        self.path = path
        self._file: IO[bytes] = open(path, "ab", buffering=0)  # noqa: SIM115
        self._waiting = b""  # for room on the disk

    def write(self, record: Record, starts_s: np.ndarray, phases: Mapping[str, np.ndarray]) -> None:
        """One line; `starts_s` and `phases` are for the trace. A line that cannot be written waits."""
        full = bool(self._waiting)
        self._waiting += line_of(record)
        try:
            self._write()
        except OSError as error:
            if not full:
                log.warning(
                    "%s cannot be written (%s): records wait for the next checkpoint", self.path, error.strerror
                )

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def sync(self) -> None:
        """The records are on disk: called before a checkpoint that follows them is sealed."""
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._write()
        self._file.close()


def _keep_aside(path: Path, lines: Sequence[bytes]) -> None:
    """Lines at the end of a file; nothing for none."""
    if lines:
        before = disk.read_bytes(path, _MOST) if path.exists() else b""
        disk.replace_bytes(path, before + b"".join(line + b"\n" for line in lines))


def _put_aside(path: Path, error: OSError) -> None:
    """What cannot be read is not written over."""
    aside = path.with_name(f"{path.name}.unread-{secrets.token_hex(4)}")
    os.rename(path, aside)
    log.warning("%s cannot be read (%s) and is now %s", path, error.strerror or error, aside.name)


class Trace:
    """trace.json: one event per phase, rank and round, in the Trace Event format, valid JSON once closed."""

    def __init__(self, root: Path, resumed: bool) -> None:
        path = root / "trace.json"
        events: list[bytes] = []
        lines: list[bytes] = []
        if resumed and path.exists():
            try:
                lines = disk.read_bytes(path, _MOST).splitlines()
            except OSError as error:
                _put_aside(path, error)
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):  # brackets, half an event
                events.append(json.dumps(json.loads(line.rstrip(b","))).encode())
        disk.replace_bytes(path, b"[\n" * bool(events) + b",\n".join(events))
        self._file = open(path, "ab")  # noqa: SIM115
        self._empty = not events

    def write(self, record: Record, starts_s: np.ndarray, phases: Mapping[str, np.ndarray]) -> None:
        """starts_s: when each rank began the round; phases: seconds of each rank, in the order they followed."""
        for rank, start_s in enumerate(starts_s):
            at = start_s
            for name, seconds in phases.items():
                event = {
                    "name": name,
                    "ph": "X",
                    "pid": rank,
                    "tid": 0,
                    "ts": round_us(at),
                    "dur": round_us(seconds[rank]),
                    "args": {"round": record["round"]},
                }
                self._event(json.dumps(event))
                at += seconds[rank]
        self._file.flush()

    def _event(self, text: str) -> None:
        self._file.write((b"[\n" if self._empty else b",\n") + text.encode())
        self._empty = False

    def close(self) -> None:
        self._file.write(b"[\n]\n" if self._empty else b"\n]\n")
        self._file.close()


def round_us(seconds: float) -> float:
    return round(float(seconds) * 1e6, 1)


class TensorBoard:
    """Scalars of every record as TensorBoard events under DIR/tensorboard (package tensorboard, extra `report`)."""

    def __init__(self, root: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(root / "tensorboard"))  # type: ignore[no-untyped-call]

    def write(self, record: Record, starts_s: np.ndarray, phases: Mapping[str, np.ndarray]) -> None:
        """Every number of the record."""
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "round":
                self._writer.add_scalar(name, value, record["round"])
        for name, value in record["seconds"].items():
            self._writer.add_scalar(f"seconds/{name}", value, record["round"])

    def close(self) -> None:
        self._writer.close()


class Files:
    """What rank 0 writes round by round. None of it ends training where it cannot be written: records wait for the next
    checkpoint, which fails without them; a trace or events end there."""

    def __init__(self, root: Path, resumed_round: int, trace: bool, tensorboard: bool) -> None:
        self._metrics = Metrics(root, resumed_round)
        self._others: dict[str, Trace | TensorBoard] = {}
        if trace:
            self._others["trace.json"] = Trace(root, resumed=resumed_round > 0)
        if tensorboard:
            self._others["tensorboard"] = TensorBoard(root)

    def write(self, record: Record, starts_s: np.ndarray, phases: Mapping[str, np.ndarray]) -> None:
        """A round's; see Trace.write."""
        self._metrics.write(record, starts_s, phases)
        for name in list(self._others):
            try:
                self._others[name].write(record, starts_s, phases)
            except OSError as error:
                log.warning("%s cannot be written (%s) and ends here", name, error.strerror)
                self._close(name)

    def sync(self) -> None:
        """The records so far are on disk. Raises CheckpointError where they cannot be."""
        try:
            self._metrics.sync()
        except OSError as error:
            raise CheckpointError(f"cannot write {self._metrics.path}: {error.strerror}") from None

    def close(self) -> None:
        self._metrics.close()
        for name in list(self._others):
            self._close(name)

    def _close(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self._others.pop(name).close()


# ---------------------------------------------------------------- terminal


def on_terminal() -> bool:
    """Does somebody watch standard output? Open MPI's mpirun gives its ranks a terminal of their own even when its
    output goes into a file, so under a launcher it is the parent's output that counts."""
    if sys.stdout is None or not sys.stdout.isatty():
        return False
    if launched() == 0:
        return True
    try:
        return os.readlink(f"/proc/{os.getppid()}/fd/1").startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False


class Progress:
    """A bar on a terminal, plain lines elsewhere; the figures are the same."""

    def __init__(self, rounds: int, done: int, metric: str) -> None:
        self._rounds, self._metric = rounds, metric
        self._bar: Any = None
        if on_terminal():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("round"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )  # fmt: skip
            self._task = self._bar.add_task("", total=rounds, completed=done)
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
        if record["rejected"]:
            parts.append(f"rejected {', '.join(record['rejected'])}")
        if "not_finite" in record:
            parts.append(f"loss not finite: {', '.join(record['not_finite'])}")
        return "  ".join([*parts, f"{record['seconds']['round']:.2f} s"])

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


NO_COLUMNS = ("train_loss", "delta_norm", "personal_loss")  # figures of silos that the table leaves out
MOST_COLUMNS = 6  # of figures


def silo_table(record: Record, metric: str) -> Any:
    """The last record's figures, a row per silo, then those of all silos pooled, and those that are means over silos,
    for rich to print. `metric` comes first; of many metrics the rest is left to the record."""
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
