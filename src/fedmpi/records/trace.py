"""trace.json: what every rank did over time, on one clock; opens in Perfetto (ui.perfetto.dev) or chrome://tracing.

A process is a rank, and its threads are the rounds and, with `exchange.overlap`, the exchange behind them. A round is a
slice, its phases are slices in it, and what an exchange did is in its phase: encode, transfer and decode. These come in
many small pieces that take turns, so the trace has their sums, one after the other.

Times are microseconds of Unix time by rank 0's clock (records/clock.py).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Mapping
from typing import Any

from fedmpi import disk
from fedmpi.records.metrics import MOST_BYTES, put_aside
from fedmpi.records.record import Record
from fedmpi.records.sink import RunInfo, Sink, Timings

FILE = "trace.json"
MAIN, BEHIND = 0, 1  # thread numbers: what a rank does in its rounds, and the exchange that runs behind them
ROUND = "round"  # name of the slice around a round's phases
MOST_SILOS = 8  # that a process names
_NUMBER = rb"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
# An event as `write` writes it, which reads ten times faster than by parsing: name, rank, thread, start and duration in
# microseconds, round.
EVENT = re.compile(
    rb'\{"name": "(\w+)", "ph": "X", "pid": (\d+), "tid": (\d+), "ts": (%b), "dur": (%b), '
    rb'"args": \{"round": (\d+)\}\},?' % (_NUMBER, _NUMBER)
)


class Trace(Sink):
    """Writes trace.json: one slice per phase, rank and round, in the Trace Event Format; valid JSON once closed."""

    def open(self, run: RunInfo) -> None:
        self._run = run
        self._named: dict[int, Any] = {}  # by rank: what its process was named after
        self._ended_us: dict[tuple[int, int], int] = {}  # by rank and thread: the end of its last slice
        path = run.root / FILE
        events: list[bytes] = []
        lines: list[bytes] = []
        if run.resumed and path.exists():
            try:
                lines = disk.read_bytes(path, MOST_BYTES).splitlines()
            except OSError as error:
                put_aside(path, error)
        for line in lines:
            if EVENT.fullmatch(line):
                events.append(line.rstrip(b","))
                continue
            with contextlib.suppress(ValueError, RecursionError):  # brackets, or a truncated event
                events.append(json.dumps(json.loads(line.rstrip(b","))).encode())
        disk.replace_bytes(path, b"[\n" * bool(events) + b",\n".join(events))
        self._file = open(path, "ab")  # noqa: SIM115
        self._empty = not events

    def write(self, record: Record) -> None:
        """Write what each rank did in the round."""
        timings, round = self._run.timings(), record["round"]
        for rank, start_s in enumerate(timings.starts_s.tolist()):
            if not start_s:
                continue  # times of a lost rank are unknown
            row = timings.ranks[rank] if rank < len(timings.ranks) else {"rank": rank}
            self._name(rank, row, bool(timings.tracks))
            ahead_s = float(row.get("clock_ahead_s", 0.0))
            self._round(rank, start_s - ahead_s, timings, round)
            for track in timings.tracks:
                of_round, began_s, lasted_s, *parts = (float(values[rank]) for values in track.values())
                if of_round:
                    names = [*track][-len(parts) :]
                    begin, end = round_us(began_s - ahead_s), round_us(began_s - ahead_s + lasted_s)
                    begin, end = self._slice("exchange", rank, BEHIND, begin, end, int(of_round))
                    self._inside(dict(zip(names, parts, strict=True)), rank, BEHIND, begin, end, int(of_round))
        self._file.flush()

    def _round(self, rank: int, start_s: float, timings: Timings, round: int) -> None:
        """A round's slice, its phases, and their parts."""
        start_s = max(start_s, self._ended_us.get((rank, MAIN), 0) / 1e6)  # clocks may have been compared anew
        seconds = [0.0, *(float(values[rank]) for values in timings.phases.values())]
        ends = [round_us(start_s + spent_s) for spent_s in itertools.accumulate(seconds)]
        self._slice(ROUND, rank, MAIN, ends[0], ends[-1], round)
        for phase, (begin, end) in zip(timings.phases, itertools.pairwise(ends), strict=True):
            if end > begin:
                self._event(slice_of(phase, rank, MAIN, begin, end, round))
                parts = {part: float(v[rank]) for (of, part), v in timings.parts.items() if of == phase}
                self._inside(parts, rank, MAIN, begin, end, round)

    def _inside(self, parts: Mapping[str, float], rank: int, thread: int, at: int, end: int, round: int) -> None:
        """Slices of the parts inside of one from `at` to `end`."""
        for part, seconds in parts.items():
            upto = min(end, at + round_us(seconds))
            if upto > at:
                self._event(slice_of(part, rank, thread, at, upto, round))
                at = upto

    def _slice(self, name: str, rank: int, thread: int, begin: int, end: int, round: int) -> tuple[int, int]:
        """A slice that lies in no other. It does not begin before the last one has ended; returns begin and end."""
        begin = max(begin, self._ended_us.get((rank, thread), 0))
        end = max(begin, end)
        self._ended_us[rank, thread] = end
        self._event(slice_of(name, rank, thread, begin, end, round))
        return begin, end

    def _name(self, rank: int, row: Mapping[str, Any], has_thread: bool) -> None:
        """Name a rank's process and threads, if they are not named like that yet."""
        silos = [str(silo) for silo in row.get("silos", ())]
        facts = (row.get("host"), silos, row.get("clock_ahead_s"), has_thread)
        if self._named.get(rank) == facts:
            return
        self._named[rank] = facts
        more = f" and {len(silos) - MOST_SILOS} more" if len(silos) > MOST_SILOS else ""
        labels = [f"silos {', '.join(silos[:MOST_SILOS])}{more}" if silos else "no silo"]
        if "clock_ahead_s" in row:
            labels.append(f"clock {row['clock_ahead_s']:+.6f} s, error up to {row['clock_error_s']:.6f} s")
        where = f" on {row['host']}" if row.get("host") else ""
        self._about("process_name", rank, MAIN, "name", f"rank {rank}{where}")
        self._about("process_labels", rank, MAIN, "labels", "; ".join(labels))
        self._about("process_sort_index", rank, MAIN, "sort_index", rank)
        self._about("thread_name", rank, MAIN, "name", "rounds")
        if has_thread:
            self._about("thread_name", rank, BEHIND, "name", "exchange")

    def _about(self, what: str, rank: int, thread: int, key: str, value: str | int) -> None:
        self._event({"name": what, "ph": "M", "pid": rank, "tid": thread, "args": {key: value}})

    def _event(self, event: Mapping[str, Any]) -> None:
        self._file.write((b"[\n" if self._empty else b",\n") + json.dumps(event).encode())
        self._empty = False

    def close(self) -> None:
        if not self._file.closed:
            self._file.write(b"[\n]\n" if self._empty else b"\n]\n")
            self._file.close()


def slice_of(name: str, rank: int, thread: int, begin: int, end: int, round: int) -> dict[str, Any]:
    """A complete event, as `EVENT` reads it."""
    where = {"name": name, "ph": "X", "pid": rank, "tid": thread}
    return {**where, "ts": begin, "dur": end - begin, "args": {"round": round}}


def round_us(seconds: float) -> int:
    """Whole microseconds, so that ends and beginnings meet."""
    return round(seconds * 1e6)
