"""metrics.jsonl: one line per round with a checksum; truncated at the round that a run resumes from."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from fedmpi import disk
from fedmpi.records.record import Record
from fedmpi.records.sink import RunInfo, Sink

log = logging.getLogger("fedmpi")

METRICS = "metrics.jsonl"
MOST_BYTES = 1 << 40  # read limit; high, because the file grows with rounds, silos and ranks
_CRC = re.compile(rb', "crc32": "([0-9a-f]{8})"\}$')


def line_of(record: Record) -> bytes:
    """The record's line of metrics.jsonl. Its last field is the CRC-32 of the text before that field."""
    body = json.dumps(record)[:-1].encode()
    return body + b', "crc32": "%08x"}\n' % zlib.crc32(body)


def read_metrics(root: Path) -> list[Record]:
    """The records in metrics.jsonl, oldest first. Damaged lines are skipped with a warning; raises nothing."""
    try:
        return [record for record, _ in _read(root)[0]]
    except OSError as error:
        log.warning("%s cannot be read: %s", root / METRICS, error.strerror or error)
        return []


def each_record(root: Path) -> Iterator[Record | None]:
    """The records in metrics.jsonl one by one, oldest first, and None for a damaged line. A last line that is not
    complete is one that a job is writing, and left out. Yields nothing if the file cannot be read."""
    try:
        file = open(disk.open_regular(root / METRICS), "rb")  # noqa: SIM115
    except OSError:
        return
    with file:
        sealed = any(_CRC.search(line.rstrip(b"\n")) for line in file)
        file.seek(0)
        for line in file:
            if line.endswith(b"\n") and line != b"\n":
                yield record_in(line[:-1], sealed)


def last_round(root: Path) -> int:
    """The round of the last line of metrics.jsonl, 0 if there is none. Reads only the end of the file."""
    try:
        with open(disk.open_regular(root / METRICS), "rb") as file:
            total, size = file.seek(0, os.SEEK_END), 1 << 16
            while True:
                file.seek(max(0, total - size))
                _, newline, line = file.read().rstrip(b"\n").rpartition(b"\n")
                if newline or size >= total:
                    break
                size *= 4
    except OSError:
        return 0
    record = record_in(line, sealed=False)
    return 0 if record is None else int(record["round"])


def _read(root: Path) -> tuple[list[tuple[Record, bytes]], list[bytes]]:
    """The records with their lines, and the damaged lines. Raises OSError if the file cannot be read."""
    whole: list[tuple[Record, bytes]] = []
    damaged: list[bytes] = []
    path = root / METRICS
    try:
        lines = disk.read_bytes(path, MOST_BYTES).split(b"\n")
    except FileNotFoundError:
        return whole, damaged
    sealed = any(_CRC.search(line) for line in lines)  # files of old versions have no checksums
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        record = record_in(line, sealed)
        if record is None:
            log.warning("%s, line %d is damaged and left out", path, number)
            damaged.append(line)
        else:
            whole.append((record, line))
    return whole, damaged


def record_in(line: bytes, sealed: bool) -> Record | None:
    """The record of a line without its end, None if it is damaged. `sealed`: a line without a checksum is damaged."""
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


class Metrics(Sink):
    """Writes metrics.jsonl, truncated at the round that the run resumes from. Removed lines are kept: damaged ones in
    metrics.bad.jsonl, records of rounds to be repeated in metrics.undone.jsonl."""

    def open(self, run: RunInfo) -> None:
        root, resumed_round = run.root, run.resumed
        path = root / METRICS
        try:
            whole, damaged = _read(root)
        except OSError as error:
            put_aside(path, error)
            whole, damaged = [], []
        if damaged:
            log.warning("%d damaged lines of %s are kept in metrics.bad.jsonl", len(damaged), path)
        _keep_aside(root / "metrics.bad.jsonl", damaged)
        _keep_aside(root / "metrics.undone.jsonl", [line for record, line in whole if record["round"] > resumed_round])
        before = [line + b"\n" for record, line in whole if record["round"] <= resumed_round]
        disk.replace_bytes(path, b"".join(before))
        if missing := sorted(set(range(1, resumed_round + 1)) - {record["round"] for record, _ in whole}):
            text = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            log.warning("%s has no record of round %s; training resumes from the checkpoint all the same", path, text)
        self.path = path
        self._file: IO[bytes] = open(path, "ab", buffering=0)  # noqa: SIM115
        self._waiting = b""  # lines not written yet, for example on a full disk

    def write(self, record: Record) -> None:
        """Write one line; if it cannot be written, keep it for the next `write` or `sync`."""
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
        """Write all records to disk, before the checkpoint of their round is sealed. Raises OSError."""
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._write()
        self._file.close()


def _keep_aside(path: Path, lines: Sequence[bytes]) -> None:
    """Append lines to a file; no lines, no file."""
    if lines:
        before = disk.read_bytes(path, MOST_BYTES) if path.exists() else b""
        disk.replace_bytes(path, before + b"".join(line + b"\n" for line in lines))


def put_aside(path: Path, error: OSError) -> None:
    """Rename a file that cannot be read, so that it is not overwritten."""
    aside = path.with_name(f"{path.name}.unread-{secrets.token_hex(4)}")
    os.rename(path, aside)
    log.warning("%s cannot be read (%s) and is now %s", path, error.strerror or error, aside.name)
