"""How long the remaining rounds take, from the last ones."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

LAST = 20  # number of rounds that count


class Pace:
    """Estimates the seconds to the last round.

    The estimate is the mean of the last 20 rounds, the longest of them counted as long as the second longest: a round
    with a suspended rank, or the first of a start with its preparations, does not count for many.
    """

    def __init__(self, rounds: int) -> None:
        self._rounds, self._done = rounds, 0
        self._seconds: deque[float] = deque(maxlen=LAST)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take a round's record into account, once if it comes twice."""
        if record["round"] == self._done:
            return
        self._done = int(record["round"])
        took_s = (record.get("seconds") or {}).get("round")
        if isinstance(took_s, (int, float)) and math.isfinite(took_s):
            self._seconds.append(float(took_s))

    @property
    def round_s(self) -> float | None:
        """Seconds of a round; None before two rounds are known."""
        if len(self._seconds) < 2:
            return None
        *others, second, _ = sorted(self._seconds)
        return (sum(others) + 2 * second) / len(self._seconds)

    @property
    def left_s(self) -> float | None:
        """Seconds to the last round; None if it is done, or if less than two rounds are known.

        >>> pace = Pace(rounds=10)
        >>> pace.add({"round": 1, "seconds": {"round": 9.0}})
        >>> pace.left_s
        >>> pace.add({"round": 2, "seconds": {"round": 2.0}})
        >>> pace.left_s
        16.0
        """
        left = self._rounds - self._done
        return left * self.round_s if left > 0 and self.round_s is not None else None


def span(seconds: float) -> str:
    """A duration, rounded to what one wants to know of the future.

    >>> span(0.4), span(59), span(100), span(4000), span(40000), span(200000)
    ('1 s', '59 s', '1 min 40 s', '1 h 6 min', '11 h 6 min', '2 d 7 h')
    """
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    for unit, name, rest, rest_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // rest} {rest_name}"
    raise AssertionError
