"""Where the time of each rank went, from trace.json."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedmpi import disk
from fedmpi.records import PHASES
from fedmpi.records.trace import EVENT, FILE, MAIN, ROUND

TAIL_BYTES = 1 << 12  # of trace.json, per rank: more than a rank writes in a round
LEAST_BYTES = 1 << 16


@dataclass
class Phases:
    """Seconds by phase.

    of_rank     of every rank, over all that it did, rounds that were trained again included
    of_round    the mean over ranks, of the last time that a round was trained
    """

    of_rank: dict[int, np.ndarray] = field(default_factory=dict)
    of_round: dict[int, np.ndarray] = field(default_factory=dict)
    began_s: float = 0.0  # Unix time
    ended_s: float = 0.0
    repeated_s: float = 0.0  # mean over ranks of the time of rounds that were trained again

    @property
    def idle_s(self) -> float:
        """Seconds between the first and the last round in which no round was trained."""
        rounds_s = sum(float(row.sum()) for row in self.of_round.values()) + self.repeated_s
        return max(0.0, self.ended_s - self.began_s - rounds_s)

    @property
    def ranks(self) -> list[int]:
        return sorted(self.of_rank)


@dataclass
class _Block:
    """The phases of one round that was trained once, on all ranks."""

    round: int
    rows: dict[int, np.ndarray] = field(default_factory=dict)  # by rank
    began_s: float = 0.0
    ended_s: float = 0.0


def _blocks(lines: Iterable[bytes]) -> Iterator[_Block]:
    """The rounds of a trace in the order in which they were trained. Other events and damaged lines, such as a last one
    that is being written, are left out."""
    place = {name.encode(): i for i, name in enumerate(PHASES)}
    whole = ROUND.encode()
    block: _Block | None = None
    seen: set[tuple[int, bytes]] = set()  # ranks and slices in the block: one that comes again is of another start
    for line in lines:
        event = EVENT.match(line)
        if event is None or (event[1] not in place and event[1] != whole) or int(event[3]) != MAIN:
            continue
        rank, round = int(event[2]), int(event[6])
        start_s, spent_s = float(event[4]) / 1e6, float(event[5]) / 1e6
        if block is None or round != block.round or (rank, event[1]) in seen:
            if block is not None and block.rows:
                yield block
            block = _Block(round, began_s=start_s)
            seen.clear()
        seen.add((rank, event[1]))
        block.began_s = min(block.began_s, start_s)
        block.ended_s = max(block.ended_s, start_s + spent_s)
        if event[1] != whole:
            block.rows.setdefault(rank, np.zeros(len(PHASES)))[place[event[1]]] += spent_s
    if block is not None and block.rows:
        yield block


def read_phases(root: Path) -> Phases | None:
    """The phases of a run; None without a readable trace."""
    found = Phases()
    try:
        file = open(disk.open_regular(root / FILE), "rb")  # noqa: SIM115
    except OSError:
        return None
    with file:
        for block in _blocks(file):
            if block.round in found.of_round:
                found.repeated_s += float(found.of_round[block.round].sum())
            found.of_round[block.round] = np.mean(list(block.rows.values()), axis=0)
            found.began_s = min(found.began_s or block.began_s, block.began_s)
            found.ended_s = max(found.ended_s, block.ended_s)
            for rank, row in block.rows.items():
                found.of_rank[rank] = found.of_rank.get(rank, 0.0) + row
    return found if found.of_rank else None


def last_phases(root: Path, num_ranks: int) -> dict[int, dict[str, float]]:
    """Seconds by rank and phase of the last round in the trace, from the end of the file."""
    try:
        with open(disk.open_regular(root / FILE), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - max(LEAST_BYTES, TAIL_BYTES * num_ranks)))
            blocks = list(_blocks(file.read().splitlines()))
    except OSError:
        return {}
    rows = blocks[-1].rows if blocks else {}
    return {rank: {name: float(row[i]) for i, name in enumerate(PHASES) if row[i]} for rank, row in rows.items()}
