"""How ranks learn that a round is over for the silos that still train.

    a rank     posts to rank 0 how many of its silos are through
    rank 0     counts; once the deadline has passed, it posts its verdict to all ranks
    all ranks  look for it at safe points: between two batches, and while they wait for others

A verdict only hastens. The small collective that every rank enters after training tells all ranks which silos were
late, so no rank branches on a clock of its own. Rank 0 decides at its own safe points; a round cannot end before rank 0
is through anyway.
"""

from __future__ import annotations

import time

import numpy as np

from fedmpi.comm import Comm
from fedmpi.records import StatusTable
from fedmpi.stopping import Watch

OPEN, CLOSED, BROKEN = range(3)  # verdicts: broken is a round that too few silos were through with at the deadline
POLL_S = 0.01  # between two looks; one per batch would cost too much where batches take microseconds

# Of a silo's row: number in outcome.LATE; seconds to its end; its weight times the part that it has done; the weight
# that its delta would have been sent with had it not been divided by that part; rounds since its update that entered.
COLUMNS = ("late", "seconds", "done", "plain", "stale")


class Late(Exception):
    """Raised at a safe point: the silo, and those of its rank that have not begun, contribute nothing to the round."""


class Closing:
    """When one round ends, seen from one rank."""

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
        """`key` is the number of the round and of its repetition, `limit_s` the deadline in seconds from now. If fewer
        than `quorum` silos are through by then, the round `waits` for more or breaks. If `partial`, silos that have
        taken a step stop after one, in place of raising Late; `buffers` says that their updates wait for the next
        round."""
        self.limit_s, self.buffers = limit_s, buffers
        self._comm, self._watch, self._key, self._quorum, self._waits = comm, watch, key, quorum, waits
        self._partial, self._stepped = partial, False
        self._verdict = OPEN
        self._began_s, self._next_s = time.monotonic(), 0.0
        self._through = {comm.rank: 0}  # silos by rank; on rank 0 of all ranks

    @property
    def is_broken(self) -> bool:
        """Does the round come to nothing?"""
        return self._verdict == BROKEN

    @property
    def seconds(self) -> float:
        """Since the round's training began on this rank."""
        return time.monotonic() - self._began_s

    # ------------------------------------------------------------ what training calls

    def begin(self) -> None:
        """Before a silo trains. Raises Late where the round is over, and BrokenOff as a safe point does."""
        self._stepped = False
        self.check()

    def check(self) -> None:
        """A safe point."""
        self._watch.check()
        verdict = self._look()
        if verdict == BROKEN or (verdict == CLOSED and not (self._partial and self._stepped)):
            raise Late

    def over(self) -> bool:
        """After a step: is it the silo's last one?"""
        self._stepped = True
        return self._partial and self._look() == CLOSED

    def through(self) -> float:
        """One more silo of this rank has done all that it was to do. Returns its seconds since the round began."""
        self._through[self._comm.rank] += 1
        if self._comm.rank:
            self._comm.post(0, (*self._key, self._through[self._comm.rank]))
        return self.seconds

    def wait(self) -> None:
        """What a rank does now and then while it waits for others."""
        self._watch.look()
        self._look()

    # ------------------------------------------------------------

    def _look(self) -> int:
        now_s = time.monotonic()
        if self._verdict == OPEN and now_s >= self._next_s:
            self._next_s = now_s + POLL_S
            for sender, (*key, number) in self._comm.posted():
                if tuple(key) != self._key:  # of a round that has ended without it
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


def normalised(ready: StatusTable) -> float:
    """What the weighted mean is multiplied with once late silos' weights were divided by the part r_k that they did.

    tau_eff of FedNova (Wang et al. 2020, equation 9) in units of the planned steps, sum_k w_k r_k / sum_k w_k, times
    what turns the mean under the weights w_k / r_k into their sum. Exactly 1 where no silo was late.
    """
    taken = ready.silo("taken") > 0
    weight, sent, done, plain = (float(np.sum(ready.silo(n)[taken])) for n in ("weight", "sent", "done", "plain"))
    return done / weight * (sent / plain)
