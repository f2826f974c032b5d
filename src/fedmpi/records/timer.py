"""Where the time and the memory of one rank go."""

from __future__ import annotations

import resource
import time

# In the order of time. A round's row travels in `agree`, so agree and checkpoint are those of the round before.
PHASES = ("agree", "checkpoint", "select", "train", "wait", "exchange", "step", "evaluate")


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
