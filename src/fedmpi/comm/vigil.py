"""Timeouts: how long a rank waits for the others, and which ranks it names when it gives up.

    heartbeats  every rank sends rank 0 a message now and then, from its safe points and while it waits; rank 0 sends
                one to all. Each says whether some rank is training. A rank that is silent for too long is named
    the clock   a thread watches every communicator of this rank and gives up a call that blocks for too long, since a
                rank that blocks inside MPI cannot send heartbeats

A round may take an hour: while ranks report that they train, the others wait. The time limit is `limit_s`: the
configured timeout plus the longest round so far. Before the first round, when data are read and ranks cannot send
heartbeats, it is ten times the timeout.
"""

from __future__ import annotations

import _thread
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedmpi.errors import CommTimeout

SET_UP = 10  # factor of the timeout before the first round
PROBE_S = 2.0  # time limit for a host to answer
PROBES_S = 10.0  # and for all hosts together: an unresolvable name can take as long alone


class Lane(Protocol):
    """A communicator, as the clock thread sees it."""

    depth: int  # number of nested calls in progress
    calls: int  # number of completed calls
    sleeps_while_waiting: bool  # whether it is used by another thread than the one that sends heartbeats


class Vigil:
    """What one rank knows of the others. `give_up` must abort the job, because the clock thread cannot raise."""

    def __init__(
        self,
        rank: int,
        hosts: Sequence[str],
        pids: Sequence[int],
        give_up: Callable[[CommTimeout], None],
        machines: Sequence[Any] | None = None,
    ) -> None:
        self.rank = rank
        self.lanes: list[Lane] = []
        self._over = False
        self._hosts, self._pids, self._give_up = hosts, pids, give_up
        self._machines = hosts if machines is None else machines
        self._heard_s = [0.0] * len(hosts)
        self._trained_s = 0.0  # time of the last report that some rank trains
        self._entered_s, self._calls = 0.0, -1  # start of the call in progress, and its number
        self._pulse_s, self._pulses = 0.0, 0  # time of the last heartbeat, and how many were sent
        self.set_up(300.0)
        _thread.start_new_thread(self._run, ())

    def set_up(self, timeout_s: float) -> None:
        """Starts the set-up of a run, with `timeout_s` as its timeout."""
        self.timeout_s, self._longest_s, self._begun = timeout_s, 0.0, False
        self._since_s = time.monotonic()

    def round(self, seconds: float) -> None:
        """Records the duration of a round; 0 when the first one begins."""
        if not self._begun:
            self._since_s = time.monotonic()  # ranks that were reading data do not count as silent
        self._longest_s, self._begun = max(self._longest_s, seconds), True

    @property
    def limit_s(self) -> float:
        return self.timeout_s * (1 if self._begun else SET_UP) + self._longest_s

    @property
    def period_s(self) -> float:
        """Seconds between two heartbeats of a rank."""
        return min(30.0, self.timeout_s / 10)

    def end(self) -> None:
        """Stops watching."""
        self._over = True
        self.lanes.clear()

    # ------------------------------------------------------------ heartbeats

    def pulse(self, trains: bool) -> bool:
        """Notes that this rank sends a heartbeat; returns whether any rank trains, as far as it knows."""
        now_s = time.monotonic()
        if now_s - self._pulse_s > 3 * self.period_s:
            self._since_s = now_s  # this rank was not listening, so it cannot say who was silent
        self._pulse_s, self._pulses = now_s, self._pulses + 1
        if trains:
            self._trained_s = now_s
        return now_s - self._trained_s < 2.5 * self.period_s

    def hear(self, rank: int, trains: bool) -> None:
        self._heard_s[rank] = self._pulse_s
        if trains:
            self._trained_s = self._pulse_s

    def judge(self, lane: Lane) -> CommTimeout | None:
        """The error if this rank has waited too long; None otherwise."""
        now_s, limit_s = self._pulse_s, self.limit_s
        if lane.calls != self._calls or not lane.depth:
            self._calls, self._entered_s = lane.calls, now_s
        others = range(1, len(self._hosts)) if self.rank == 0 else (0,)
        silent = [rank for rank in others if now_s - max(self._heard_s[rank], self._since_s) > limit_s]
        if silent:
            return self._timeout(f"heard nothing for {limit_s:.0f} s", silent)
        if now_s - max(self._entered_s, self._trained_s, self._since_s) > limit_s:
            return self._timeout(f"has waited for {limit_s:.0f} s, and nobody trains", [])
        return None

    # ------------------------------------------------------------ the clock

    def _run(self) -> None:
        waited: dict[int, tuple[int, float]] = {}
        before_s = time.monotonic()
        while not self._over:
            tick_s = min(1.0, self.timeout_s / 10)
            time.sleep(tick_s)
            now_s = time.monotonic()
            passed_s, before_s = min(now_s - before_s, 2 * tick_s), now_s  # this process may have been suspended
            for lane in list(self.lanes):
                # A rank that sends heartbeats while it waits checks its own limits (`judge`).
                moves = lane.calls if lane.sleeps_while_waiting else lane.calls + self._pulses
                before, so_far_s = waited.get(id(lane), (-1, 0.0))
                so_far_s = so_far_s + passed_s if lane.depth and moves == before else 0.0
                waited[id(lane)] = moves, so_far_s
                if so_far_s > self.limit_s:
                    self._give_up(self._timeout(f"has been inside one call for {self.limit_s:.0f} s", []))

    def _timeout(self, what: str, silent: Sequence[int]) -> CommTimeout:
        gone = sorted({*silent, *self._gone()})
        names = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in gone[:8]) + (", ..." if gone[8:] else "")
        blame = f"silent: {names}" if gone else "every rank responds, but they wait for different things"
        me = f"rank {self.rank} on {self._hosts[self.rank]}"
        return CommTimeout(gone, f"{me} {what}; {blame} (comm.timeout_s is {self.timeout_s:g})")

    def _gone(self) -> list[int]:
        """Ranks that cannot run: their process is stopped or gone, or their host does not answer."""
        near = [machine == self._machines[self.rank] for machine in self._machines]
        until_s = time.monotonic() + PROBES_S
        asked = dict.fromkeys(host for host, is_near in zip(self._hosts, near, strict=True) if not is_near)
        far = {host: time.monotonic() > until_s or answers(host) for host in asked}
        return [
            rank
            for rank, (host, is_near, pid) in enumerate(zip(self._hosts, near, self._pids, strict=True))
            if (not runs(pid) if is_near else not far[host])
        ]


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return not Path("/proc/self/stat").exists()  # without /proc nothing is known: assume that it runs
    return state not in "TtZX"


def answers(host: str, port: int = 9) -> bool:
    """Whether the host accepts or refuses a connection within PROBE_S. True also if the name cannot be resolved here,
    since that proves nothing."""
    try:
        socket.create_connection((host, port), timeout=PROBE_S).close()
    except (ConnectionRefusedError, socket.gaierror):
        return True
    except OSError:
        return False
    return True
