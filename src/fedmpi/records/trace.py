"""trace.json: the phases of every rank over time; opens in Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import contextlib
import json
import re

from fedmpi import disk
from fedmpi.records.metrics import MOST_BYTES, put_aside
from fedmpi.records.record import Record
from fedmpi.records.sink import RunInfo, Sink

_NUMBER = rb"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_EVENT = re.compile(  # as `write` writes it: such a line is kept as it is, which is ten times faster than to parse it
    rb'\{"name": "\w+", "ph": "X", "pid": \d+, "tid": 0, "ts": %b, "dur": %b, "args": \{"round": \d+\}\},?'
    % (_NUMBER, _NUMBER)
)


class Trace(Sink):
    """Writes trace.json: one event per phase, rank and round, in the Trace Event format; valid JSON once closed."""

    def open(self, run: RunInfo) -> None:
        self._run = run
        path = run.root / "trace.json"
        events: list[bytes] = []
        lines: list[bytes] = []
        if run.resumed and path.exists():
            try:
                lines = disk.read_bytes(path, MOST_BYTES).splitlines()
            except OSError as error:
                put_aside(path, error)
        for line in lines:
            if _EVENT.fullmatch(line):
                events.append(line.rstrip(b","))
                continue
            with contextlib.suppress(ValueError, RecursionError):  # brackets, or a truncated event
                events.append(json.dumps(json.loads(line.rstrip(b","))).encode())
        disk.replace_bytes(path, b"[\n" * bool(events) + b",\n".join(events))
        self._file = open(path, "ab")  # noqa: SIM115
        self._empty = not events

    def write(self, record: Record) -> None:
        """Write an event for each phase of each rank."""
        starts_s, phases = self._run.timings()
        for rank, start_s in enumerate(starts_s):
            if not start_s:
                continue  # times of a lost rank are unknown
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
        if not self._file.closed:
            self._file.write(b"[\n]\n" if self._empty else b"\n]\n")
            self._file.close()


def round_us(seconds: float) -> float:
    return round(float(seconds) * 1e6, 1)
