"""Time by phase and peak memory of one rank."""

from __future__ import annotations

import resource
import time

# In order of time. A round's times are sent in `agree`, so its agree and checkpoint are those of the round before.
PHASES = ("agree", "checkpoint", "select", "train", "wait", "exchange", "step", "evaluate")


class Timer:
    """Seconds by phase of one rank's round. Each phase begins where the one before ends."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.started_s = time.time()
        self._last = time.perf_counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def lap(self, phase: str) -> None:
        """Count the time since the last lap as `phase`."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
