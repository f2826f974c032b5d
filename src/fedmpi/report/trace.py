"""Where the time of each rank went, from trace.json."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedmpi import disk
from fedmpi.records import PHASES

FILE = "trace.json"
_EVENT = re.compile(
    rb'\{"name": "(\w+)", "ph": "X", "pid": (\d+), "tid": 0, "ts": ([\d.e+-]+), "dur": ([\d.e+-]+), '
    rb'"args": \{"round": (\d+)\}\}'
)


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


def read_phases(root: Path) -> Phases | None:
    """The phases of a run; None without a readable trace. Damaged lines, such as a last one that is being written, are
    left out."""
    found = Phases()
    try:
        file = open(disk.open_regular(root / FILE), "rb")  # noqa: SIM115
    except OSError:
        return None
    place = {name.encode(): i for i, name in enumerate(PHASES)}
    block: dict[int, np.ndarray] = {}  # of one round, by rank
    seen: set[tuple[int, int]] = set()  # ranks and phases in the block: one that comes again is of another start
    at = 0

    def flush() -> None:
        if block:
            mean = np.mean(list(block.values()), axis=0)
            if at in found.of_round:
                found.repeated_s += float(found.of_round[at].sum())
            found.of_round[at] = mean
            block.clear()
            seen.clear()

    with file:
        for line in file:
            event = _EVENT.match(line)
            if event is None or event[1] not in place:
                continue
            phase, rank, round = place[event[1]], int(event[2]), int(event[5])
            start_s, spent_s = float(event[3]) / 1e6, float(event[4]) / 1e6
            if round != at or (rank, phase) in seen:
                flush()
                at = round
            seen.add((rank, phase))
            found.began_s = min(found.began_s or start_s, start_s)
            found.ended_s = max(found.ended_s, start_s + spent_s)
            block.setdefault(rank, np.zeros(len(PHASES)))[phase] += spent_s
            found.of_rank.setdefault(rank, np.zeros(len(PHASES)))[phase] += spent_s
    flush()
    return found if found.of_rank else None
