"""What each engine would do with silos of given speeds: its clock and its queue, without training.

synchronous   every round lasts as long as the slowest silo of the cohort
deadline      rounds close at the deadline; late silos contribute as `late` says
buffered      the server steps after `size` updates (queue.py)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedmpi import rng
from fedmpi.errors import ConfigError
from fedmpi.local import Delay, Order
from fedmpi.records.metrics import read_metrics
from fedmpi.rounds.asynchronous import Buffered
from fedmpi.rounds.clocks import Clock, Scaled, Trace, read_trace
from fedmpi.rounds.policies import Deadline
from fedmpi.rounds.queue import Queue
from fedmpi.selection import All

if TYPE_CHECKING:
    from pathlib import Path

    from fedmpi.config import Config

TRAININGS = 50  # of a silo on average, in a simulation
MOST = 20_000  # trainings of all silos


@dataclass(frozen=True)
class Pace:
    """How fast an engine goes. Shares are of all silos' time."""

    engine: str
    rounds_per_hour: float
    updates_per_hour: float  # those that count, also with a part of their work
    mean_staleness: float  # of those, in server steps
    max_staleness: int
    dropped: float  # share of time in which silos train for updates that are dropped
    waiting: float  # share of time in which silos wait for the server


@dataclass(frozen=True)
class Measured(Clock):
    """Seconds that were measured, by silo, in turn: of a training, and of what else an update took."""

    values: Mapping[str, Sequence[tuple[float, float]]]

    def parts(self, seed: int, silo: str, number: int, num_train: int) -> tuple[float, float]:
        found = self.values[silo]
        return found[number % len(found)]


def measured(path: Path, ids: Sequence[str], most: int = 0) -> Measured:
    """The speeds in a file of lines SILO,SECONDS, or those of an asynchronous run in real time: the seconds between a
    silo's updates. If that run tells its amounts of work, trainings are as long as one of `most` epochs or steps would
    have been. Raises ConfigError for a silo without any."""
    if not path.is_dir():
        Trace(file=str(path)).knows(ids, "--speeds")
        return Measured({silo: [(value, 0.0) for value in row] for silo, row in read_trace(str(path)).items()})
    ends: dict[str, float] = {}  # when the silo's last update came
    gaps: dict[str, list[tuple[float, float]]] = {}
    for record in read_metrics(path):
        for one in record.get("arrivals", ()):
            lasted_s, ends[one["silo"]] = one["at_s"] - ends.get(one["silo"], 0.0), one["at_s"]
            if one.get("amount") and most:
                lasted_s = lasted_s if one["handed_s"] is None else one["at_s"] - one["handed_s"]
                wait_s, work_s = max(0.0, lasted_s - one["work_s"]), one["work_s"] * most / one["amount"]
            else:
                work_s, wait_s = lasted_s, 0.0
            gaps.setdefault(one["silo"], []).append((work_s, wait_s))
    if missing := [silo for silo in ids if not gaps.get(silo)]:
        raise ConfigError(f"--speeds: the records of {path} have no arrival of silo '{missing[0]}'")
    return Measured(gaps)


def amounts(config: Config, clock: Clock, ids: Sequence[str], num_train: Sequence[int]) -> dict[str, Order]:
    """What silos would be told to do if the amount of work follows delays, once their means have settled: from the mean
    seconds of their trainings. Empty if it follows none."""
    if config.local.by_delay is None:
        return {}
    whole, delays = config.local.orders({silo: None for silo in ids}), dict[str, Delay | None]()
    for silo, num in zip(ids, num_train, strict=True):
        parts = [clock.parts(config.seed, silo, number, num) for number in range(TRAININGS)]
        work_s, wait_s = np.mean(parts, axis=0).tolist()
        delays[silo] = Delay(wait_s, work_s * whole[silo].share / whole[silo].amount)
    return config.local.orders(delays)


def paces(config: Config, clock: Clock, ids: Sequence[str], num_train: Sequence[int]) -> list[Pace]:
    """The pace of each engine. What the configuration does not say of an engine has its default; `buffered` then comes
    with sizes 1 and a quarter of the silos."""
    if orders := amounts(config, clock, ids, num_train):
        clock = Scaled(clock, {silo: one.share for silo, one in orders.items()})
    cohort = len(ids) if isinstance(config.select, All) else config.select.least(ids, config.rounds)
    silos = _Silos(clock, config.seed, ids, num_train, cohort)
    policy = config.policy if isinstance(config.policy, Deadline) else Deadline()
    engine = config.engine
    own = [engine] if isinstance(engine, Buffered) else [Buffered(size=size) for size in (1, max(2, len(ids) // 4))]
    return [_synchronous(silos), _deadline(silos, policy), *(_buffered(silos, one) for one in own)]


@dataclass(frozen=True)
class _Silos:
    clock: Clock
    seed: int
    ids: Sequence[str]
    num_train: Sequence[int]
    cohort: int

    @property
    def num_trainings(self) -> int:
        return min(MOST, TRAININGS * len(self.ids))

    def rounds(self) -> Iterator[np.ndarray]:
        """The seconds of each silo of a cohort, round by round; cohorts are drawn uniformly."""
        for number in range(max(2, self.num_trainings // self.cohort)):
            draw = rng.generator(self.seed, purpose="pace", round=number)
            places = sorted(draw.choice(len(self.ids), self.cohort, replace=False).tolist())
            seconds = (self.clock.seconds(self.seed, self.ids[k], number, self.num_train[k]) for k in places)
            yield np.array([*seconds])


def _synchronous(silos: _Silos) -> Pace:
    ends = np.array([*silos.rounds()])
    lasts = ends.max(axis=1)
    total = float(lasts.sum())
    waiting = 1.0 - float(ends.sum()) / (total * silos.cohort)
    return Pace("synchronous", *_per_hour(total, len(ends), ends.size), 0.0, 0, 0.0, waiting)


def _deadline(silos: _Silos, policy: Deadline) -> Pace:
    state: dict[str, np.ndarray] = {}
    total = busy = lost = 0.0
    num_rounds = num_updates = num_stale = 0
    for ends in silos.rounds():
        limit_s, quorum = policy.limit_s(state), min(policy.min_silos, len(ends))
        if policy.deadline_s == "auto":
            seen = np.where(ends <= limit_s, ends, 2 * limit_s)
            state = {"medians": np.append(state.get("medians", np.empty(0)), np.median(seen))[-5:]}
        enough_s = float(np.sort(ends)[quorum - 1])
        while enough_s > limit_s and policy.too_few == "repeat":  # a void round, and again with twice the time
            void_s = float(np.minimum(ends, limit_s).sum())
            total, busy, lost, limit_s = total + limit_s, busy + void_s, lost + void_s, 2 * limit_s
        lasts = min(max(limit_s, enough_s), float(ends.max()))  # `stop` ends the run; here it waits
        late = ends > lasts
        late_s = lasts * int(late.sum())
        total, num_rounds = total + lasts, num_rounds + 1
        busy, lost = busy + float(ends[~late].sum()) + late_s, lost + late_s * (policy.late == "drop")
        num_updates += len(ends) - int(late.sum()) * (policy.late == "drop")
        num_stale += int(late.sum()) * (policy.late == "buffer")
    time = total * silos.cohort
    limit = f"{policy.deadline_s:g} s" if policy.deadline_s != "auto" else f"{policy.factor:g} x median"
    name = f"deadline {limit}, {policy.late}"
    rates, stale = _per_hour(total, num_rounds, num_updates), num_stale / num_updates
    return Pace(name, *rates, stale, int(num_stale > 0), lost / time, max(0.0, 1.0 - busy / time))


def _buffered(silos: _Silos, engine: Buffered) -> Pace:
    queue = Queue.of({}, 0, silos.clock, silos.seed, silos.ids, silos.num_train)

    def seconds(silo: str, k: int, number: int) -> float:
        return silos.clock.seconds(silos.seed, silo, number, silos.num_train[k])

    index = {silo: k for k, silo in enumerate(silos.ids)}
    stale: list[int] = []
    busy = lost = 0.0
    version = came = 0
    while came < silos.num_trainings:
        due = queue.take(engine.size, engine.window_s, version, engine.max_staleness)
        for one in due:
            lasted = seconds(one.silo, index[one.silo], one.training)
            busy, lost = busy + lasted, lost + lasted * one.dropped
        stale += [one.staleness for one in due if not one.dropped]
        came, version = came + len(due), version + 1
        queue.step(version)
    for k, silo in enumerate(silos.ids):  # trainings under way
        if math.isfinite(queue.due_K[k]):
            busy += queue.now - (float(queue.due_K[k]) - seconds(silo, k, int(queue.training_K[k])))
    time, name = queue.now * len(silos.ids), f"buffered, size {engine.size}"
    rates = _per_hour(queue.now, version, len(stale))
    return Pace(name, *rates, float(np.mean(stale)), max(stale), lost / time, max(0.0, 1.0 - busy / time))


def _per_hour(seconds: float, *counts: int) -> tuple[float, float]:
    rounds, updates = (3600.0 * count / seconds if seconds else math.inf for count in counts)
    return rounds, updates
