"""How ranks learn that a round closes while some silos still train.

    a rank     posts to rank 0 how many of its silos have finished
    rank 0     counts them; after the deadline it posts its verdict to all ranks
    all ranks  look for the verdict at safe points: between two batches, and while they wait for other ranks

A verdict only saves time. The small collective that every rank enters after training tells all ranks which silos were
late, so no rank branches on its own clock. Rank 0 decides at its own safe points; a round cannot end before rank 0 has
finished anyway.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import numpy as np

from fedmpi.comm import Comm
from fedmpi.records import StatusTable
from fedmpi.stopping import Watch

OPEN, CLOSED, BROKEN = range(3)  # verdicts; BROKEN: too few silos had finished at the deadline
POLL_S = 0.01  # between two looks; a look per batch would slow down batches of microseconds

# Columns of a silo's row, in this order: index in outcome.LATE; seconds from the round's start to the silo's end; its
# weight times the part r_k of the work that it did; the weight of its delta before the division by r_k; the staleness
# of its buffered update, in rounds.
COLUMNS = ("late", "seconds", "done", "plain", "stale")


class Late(Exception):
    """Raised at a safe point when the round is over: this silo and its rank's remaining silos contribute nothing."""


class Closing:
    """Decides when one round closes, seen from one rank."""

    def __init__(
        self,
        comm: Comm,
        watch: Watch,
        key: tuple[int, int],
        limit_s: float,
        quorum: int,
        waits: bool,
        partial: bool,
        buffers: bool = False,
    ) -> None:
        """`key` is (round, repetition), `limit_s` the deadline in seconds from now. If fewer than `quorum` silos have
        finished by then, the round waits for more if `waits`, else it is broken. With `partial`, a silo that has done a
        step ends after its current step instead of raising Late; `buffers` says that its update waits for the next
        round."""
        self.limit_s, self.buffers = limit_s, buffers
        self._comm, self._watch, self._key, self._quorum, self._waits = comm, watch, key, quorum, waits
        self._partial, self._stepped = partial, False
        self._verdict = OPEN
        self._began_s, self._next_s = time.monotonic(), 0.0
        self._through = {comm.rank: 0}  # finished silos by rank; only rank 0 knows other ranks'

    @property
    def is_broken(self) -> bool:
        """Whether the round is void: too few silos had finished at the deadline."""
        return self._verdict == BROKEN

    @property
    def seconds(self) -> float:
        """Seconds since the round's training began on this rank."""
        return time.monotonic() - self._began_s

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.limit_s - self.seconds

    # ------------------------------------------------------------ what training calls

    def takes(self, silo: str) -> bool:
        """Whether the silo trains, as far as is known before."""
        return True

    def in_time(self, silo: str) -> bool:
        """Whether a silo that does not train would have finished in time, because the round is void."""
        return False

    def begin(self, silo: str) -> None:
        """Call before a silo trains. Raises Late if the round is over, BrokenOff if this rank should leave it."""
        self._stepped = False
        self.check()

    def check(self) -> None:
        """A safe point between two batches. Raises as `begin` does; with `partial`, a silo that did a step does not
        get Late when the round closes: `over` ends it."""
        self._watch.check()
        verdict = self._look()
        if verdict == BROKEN or (verdict == CLOSED and not (self._partial and self._stepped)):
            raise Late

    def over(self) -> bool:
        """Call after a step; True if it is the silo's last one."""
        self._stepped = True
        return self._partial and self._look() == CLOSED

    def through(self) -> float:
        """Count one more finished silo of this rank and tell rank 0. Returns the seconds since the round began."""
        self._through[self._comm.rank] += 1
        if self._comm.rank:
            self._comm.post(0, (*self._key, self._through[self._comm.rank]))
        return self.seconds

    def wait(self) -> None:
        """Call now and then while this rank waits for others. Does not raise Late or BrokenOff."""
        self._watch.look()
        self._look()

    # ------------------------------------------------------------

    def _look(self) -> int:
        now_s = time.monotonic()
        if self._verdict == OPEN and now_s >= self._next_s:
            self._next_s = now_s + POLL_S
            for sender, (*key, number) in self._comm.posted():
                if tuple(key) != self._key:  # of an earlier round, which ended without this message
                    continue
                if self._comm.rank:
                    self._verdict = number
                else:
                    self._through[sender] = number
            if self._comm.rank == 0 and now_s - self._began_s >= self.limit_s:
                self._decide()
        return self._verdict

    def _decide(self) -> None:
        if sum(self._through.values()) >= self._quorum:
            self._verdict = CLOSED
        elif not self._waits:
            self._verdict = BROKEN
        if self._verdict != OPEN:
            for rank in range(1, self._comm.size):
                self._comm.post(rank, (*self._key, self._verdict))


class VirtualClosing(Closing):
    """A round under a virtual clock: when it closes, and who is late, is known before anybody trains.

    A late silo has done the steps that fit into the time until the round closes, less its transfers, at an even pace.
    """

    def __init__(
        self,
        watch: Watch,
        times: Mapping[str, tuple[float, float]],
        planned: Callable[[str], int],
        limit_s: float,
        quorum: int,
        waits: bool,
        partial: bool,
        buffers: bool = False,
    ) -> None:
        """`times`: by silo of the cohort, its seconds of training and of transfers. `planned`: how many steps a silo of
        this rank plans. The others: as for Closing."""
        self.limit_s, self.buffers = limit_s, buffers
        self._watch, self._partial, self._planned, self._times = watch, partial, planned, times
        self._ends = {silo: float(f"{sum(parts):.12g}") for silo, parts in times.items()}
        ends = sorted(self._ends.values())
        through = sum(end <= limit_s for end in ends)
        self._verdict = CLOSED if through >= quorum or waits else BROKEN
        self._closes_s = limit_s if through >= quorum or not waits else ends[quorum - 1]
        self.lasts_s = min(self._closes_s, ends[-1])  # virtual seconds of the round
        self._silo, self._steps = "", 0

    @property
    def seconds(self) -> float:
        return self._ends[self._silo]

    def takes(self, silo: str) -> bool:
        return not self.is_broken and (self.in_time(silo) or (self._partial and self._num_steps(silo) > 0))

    def begin(self, silo: str) -> None:
        self._silo, self._steps = silo, 0
        self.check()

    def check(self) -> None:
        self._watch.check()

    def over(self) -> bool:
        self._steps += 1
        return not self.in_time(self._silo) and self._steps >= self._num_steps(self._silo)

    def through(self) -> float:
        return self.seconds

    def wait(self) -> None:
        self._watch.look()

    def in_time(self, silo: str) -> bool:
        return self._ends[silo] <= self._closes_s

    def _num_steps(self, silo: str) -> int:
        """Steps of a late silo."""
        (compute_s, delay_s), planned = self._times[silo], self._planned(silo)
        done = (self._closes_s - delay_s) / compute_s if compute_s else 0.0
        return max(0, min(planned - 1, math.floor(done * planned + 1e-9)))


def normalised(ready: StatusTable) -> float:
    """Factor for the weighted mean if weights of late silos were divided by the part r_k of the work that they did.

    It is tau_eff of FedNova (Wang et al. 2020, equation 9) in units of the planned steps, sum_k w_k r_k / sum_k w_k,
    times sum_k (w_k / r_k) / sum_k w_k, because the mean divides by the sent weights w_k / r_k. Exactly 1 if no silo
    was late.
    """
    taken = ready.silo("taken") > 0
    weight, sent, done, plain = (float(np.sum(ready.silo(n)[taken])) for n in ("weight", "sent", "done", "plain"))
    return done / weight * (sent / plain)
