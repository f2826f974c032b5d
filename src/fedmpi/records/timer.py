"""Time by phase and peak memory of one rank."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fedmpi.records.clock import unix_s

# In order of time. A round's times are sent in `agree`, so its agree and checkpoint are those of the round before.
PHASES = ("agree", "checkpoint", "select", "train", "wait", "exchange", "step", "evaluate")


class Spent(NamedTuple):
    """Seconds of an exchange, by what it did."""

    encode: float = 0.0  # in codecs
    transfer: float = 0.0  # in collectives on vectors and waiting for them
    decode: float = 0.0  # in codecs, adding included

    @classmethod
    def of(cls, coders: Iterable[Any], transfer_s: float) -> Spent:
        """With the seconds of codecs (exchange/chunks.Coder)."""
        coders = list(coders)
        return cls(sum(one.encode_s for one in coders), transfer_s, sum(one.decode_s for one in coders))

    @classmethod
    def together(cls, several: Iterable[Spent]) -> Spent:
        """Their sum."""
        return cls(*(sum(some) for some in zip(cls(), *several, strict=True)))

    def since(self, before: Spent) -> Spent:
        """What was spent since then; none of it is negative, even if counters began anew."""
        return Spent(*(max(0.0, now - then) for now, then in zip(self, before, strict=True)))


# What a phase may contain of an exchange; other phases contain none.
PARTS = (
    *(("train", "encode"), ("exchange", "encode"), ("exchange", "transfer"), ("exchange", "decode")),
    ("step", "decode"),
)


def column(phase: str, part: str) -> str:
    """The name of a part of a phase in the table of a round."""
    return f"{phase}_{part}"


class Timer:
    """Seconds by phase of one rank's round. Each phase begins where the one before ends. `spent` tells how much the
    exchange has spent so far."""

    def __init__(self, spent: Callable[[], Spent] = Spent) -> None:
        self.spent = spent
        self.reset()

    def reset(self) -> None:
        self._last = time.perf_counter()
        self.started_s = unix_s(self._last)
        self._before = self.spent()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.parts = {column(*one): 0.0 for one in PARTS}

    def lap(self, phase: str) -> None:
        """Count the time since the last lap as `phase`."""
        now, spent = time.perf_counter(), self.spent()
        self.seconds[phase] += now - self._last
        for part, seconds in spent.since(self._before)._asdict().items():
            if (name := column(phase, part)) in self.parts:
                self.parts[name] += seconds
        self._last, self._before = now, spent


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
