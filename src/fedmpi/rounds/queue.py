"""When each silo's update arrives in virtual time, and which version of the parameters it is made from.

Every rank computes the same queue, without a message, from the seed and the clock. Of updates that arrive at the same
time, that of the silo that comes first in the federation is the first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmpi.errors import ConfigError, agreed
from fedmpi.local import Order
from fedmpi.rounds.clocks import NOW, Clock, Replay, Scaled, now
from fedmpi.rounds.delays import Delays, too_late

_IDS, _ARRAYS = "queue_ids", ("due", "version", "training")  # names in the engine's state
_ORDERS = ("handed", "work", "amount", "scale", "latest")  # further ones, if the amount of work follows delays


def trainings(state: Mapping[str, np.ndarray], ids: Sequence[str]) -> dict[str, int]:
    """By silo, the number of its last training in an engine's state; -1 before the first. Silos that left are kept: if
    they come back their random numbers go on."""
    before = json.loads(state[_IDS].tobytes()) if _IDS in state else []
    known = dict(zip(before, state["queue_training"].tolist(), strict=True)) if before else {}
    return dict.fromkeys(ids, -1) | known


def after_trainings(now_s: float, numbers: Mapping[str, int]) -> dict[str, np.ndarray]:
    """An engine's state in which `trainings` finds these numbers, and the time."""
    return {NOW: np.array([now_s]), _IDS: _text(list(numbers)), "queue_training": np.array([*numbers.values()])}


def _text(ids: Sequence[str]) -> np.ndarray:
    return np.frombuffer(json.dumps(list(ids)).encode(), dtype=np.uint8).copy()


@dataclass(frozen=True)
class Arrival:
    """An update that arrives."""

    silo: str
    at_s: float
    version: int  # number of server steps in the parameters that it is made from
    staleness: int  # server steps since then
    training: int  # number of the silo's training, from 0
    dropped: bool = False  # whether it is too old to count
    rejected: bool = False  # whether its silo rejected it, where that is known when it arrives
    # If the amount of work follows delays:
    amount: int = 0  # epochs or steps that it was told; 0: nothing
    scale: float = 1.0  # factor of the learning rate
    handed_s: float | None = None  # when its work was handed out, as `at_s`; None: not known
    work_s: float = 0.0  # seconds of the training

    @property
    def order(self) -> Order | None:
        """What the silo was told of this training; None if nothing follows delays."""
        return Order(self.amount, self.scale) if self.amount else None

    @property
    def told(self) -> dict[str, Any]:
        """What the record says of it."""
        names = ["silo", "at_s", "version", "staleness", "training"]
        names += ["amount", "scale", "handed_s", "work_s"] if self.amount else []
        return {name: getattr(self, name) for name in names} | ({"dropped": True} if self.dropped else {})

    @property
    def counts(self) -> bool:
        """Whether it goes into the buffer, as far as is known when it arrives."""
        return not self.dropped and not self.rejected


class Queue:
    """The updates under way: one of each silo."""

    def __init__(
        self, clock: Clock, seed: int, ids: Sequence[str], num_train: Sequence[int], delays: Delays | None = None
    ) -> None:
        self.clock, self.seed, self.ids, self.num_train = clock, seed, list(ids), num_train
        self._delays, self._came = delays, list[Arrival]()
        self._orders = {} if delays is None else delays.orders()  # of trainings that begin from the server's version
        self._told = {name: np.zeros(len(self.ids)) for name in _ORDERS} if self._orders else {}
        self.now = 0.0
        self.due_K = np.zeros(len(self.ids))  # when it arrives, in seconds
        self.version_K = np.zeros(len(self.ids), dtype=np.int64)
        self.training_K = np.full(len(self.ids), -1, dtype=np.int64)
        self._gone: dict[str, int] = {}  # number of the last training of silos that left
        self._waiting: list[int] = []  # silos whose updates have arrived and that fetch after the step

    @classmethod
    def of(
        cls,
        state: Mapping[str, np.ndarray],
        version: int,
        clock: Clock,
        seed: int,
        ids: Sequence[str],
        num_train: Sequence[int],
        delays: Delays | None = None,
    ) -> Queue:
        """The queue in an engine's state. Silos that it does not know fetch `version` now. `delays`: the means at this
        version, if the amount of work follows them."""
        queue = cls(clock, seed, ids, num_train, delays)
        queue.now = now(state)
        before = json.loads(state[_IDS].tobytes()) if _IDS in state else []
        place = {silo: i for i, silo in enumerate(before)}
        for k, silo in enumerate(ids):
            if silo in place and math.isfinite(state["queue_due"][place[silo]]):
                due, made_from, training = (state[f"queue_{name}"][place[silo]] for name in _ARRAYS)
                queue.due_K[k], queue.version_K[k], queue.training_K[k] = due, made_from, training
                for name, told_K in queue._told.items():
                    told_K[k] = state[f"queue_{name}"][place[silo]]
            else:
                queue.training_K[k] = -1 if silo not in place else state["queue_training"][place[silo]]
                queue._fetch(k, version, queue.now)
        gone = place.keys() - set(ids)
        queue._gone = {silo: int(state["queue_training"][i]) for silo, i in place.items() if silo in gone}
        return queue

    def arrays(self) -> dict[str, np.ndarray]:
        """The queue as `of` reads it."""
        gone = np.array([*self._gone.values()], dtype=np.int64)
        more = (np.full(len(gone), math.inf), gone, gone)
        columns = zip(_ARRAYS, (self.due_K, self.version_K, self.training_K), more, strict=True)
        return {
            NOW: np.array([self.now]),
            _IDS: _text([*self.ids, *self._gone]),
            **{f"queue_{name}": np.concatenate([column, end]) for name, column, end in columns},
            **{f"queue_{name}": np.append(told_K, np.zeros(len(gone))) for name, told_K in self._told.items()},
            **({} if self._delays is None else self._delays.arrays()),
        }

    @property
    def versions(self) -> dict[str, tuple[int, ...]]:
        """The version that each silo trains from."""
        return {silo: (version,) for silo, version in zip(self.ids, self.version_K.tolist(), strict=True)}

    def _fetch(self, k: int, version: int, at_s: float) -> None:
        self.training_K[k] += 1
        self.version_K[k] = version
        about = (self.seed, self.ids[k], int(self.training_K[k]), self.num_train[k])
        if (order := self._orders.get(self.ids[k])) is None:
            self.due_K[k] = at_s + self.clock.seconds(*about)
            return
        clock = Scaled(self.clock, {self.ids[k]: order.share})
        self.due_K[k] = at_s + clock.seconds(*about)
        told = (at_s, clock.parts(*about)[0], order.amount, order.scale, order.latest_s)
        for told_K, value in zip(self._told.values(), told, strict=True):
            told_K[k] = value

    def take(self, size: int, window_s: float, version: int, oldest: int | None) -> list[Arrival]:
        """The next `size` updates, and those that arrive within `window_s` seconds after them.

        `version` is the server's. Older updates than `oldest` steps are dropped, and do not count. A silo whose update
        arrives before the buffer is full fetches this version at once; others wait for `step`.
        """
        self._go_on(version)
        found: list[Arrival] = []
        num, closes_s = 0, math.inf
        while True:
            k = int(np.argmin(self.due_K))  # the first of equal ones
            at_s = float(self.due_K[k])
            if num >= size and not (window_s and at_s <= closes_s):
                break
            staleness = version - int(self.version_K[k])
            order = self._order(k)
            drop = oldest is not None and staleness > oldest
            drop = drop or (bool(order) and too_late(at_s - order["handed_s"], float(self._told["latest"][k])))
            made = (int(self.version_K[k]), staleness, int(self.training_K[k]))
            found.append(Arrival(self.ids[k], at_s, *made, dropped=drop, **order))
            num += not drop
            if num == size and not drop and closes_s == math.inf:
                closes_s = at_s + window_s
            if drop or num < size:
                self._fetch(k, version, at_s)
            else:
                self._waiting.append(k)
                self.due_K[k] = math.inf
        self.now = closes_s
        self._came += found
        return found

    def _order(self, k: int) -> dict[str, Any]:
        """What an arrival says of the order of its training."""
        if not self._told:
            return {}
        handed_s, work_s, amount, scale, _ = (float(told_K[k]) for told_K in self._told.values())
        return {"amount": int(amount), "scale": scale, "handed_s": handed_s, "work_s": work_s}

    def _go_on(self, version: int) -> None:
        """Silos that waited for a step fetch, now."""
        waiting, self._waiting = self._waiting, []
        for k in waiting:
            self._fetch(k, version, self.now)

    def step(self, version: int) -> None:
        """The server has stepped to `version`, and the silos that waited for it fetch it."""
        if self._delays is not None:
            self._orders = self._delays.hear(self._came).orders()
            self._came = []
        self._go_on(version)


class Replayed:
    """The updates under way as they were in an earlier run."""

    def __init__(self, clock: Replay, version: int, ids: Sequence[str], delays: Delays | None = None) -> None:
        self._clock, self._number = clock, version + 1
        self._delays, self._came = delays, list[Arrival]()
        self.ids = list(ids)
        self.now = 0.0

    def take(self, size: int, window_s: float, version: int, oldest: int | None) -> list[Arrival]:
        """All updates of the round. Raises ConfigError if it has been called before: then none was usable."""
        if self.now:
            raise agreed(ConfigError("engine.clock.run: the updates of a round are usable there and not here"))
        rows = self._clock.arrivals[self._number]
        self.now = float(rows[-1]["at_s"])
        self._came = [Arrival(**row) for row in rows]
        return list(self._came)

    def step(self, version: int) -> None:
        """The server has stepped. The versions that silos fetch are those of their later arrivals."""
        if self._delays is not None:
            self._delays.hear(self._came)

    @property
    def versions(self) -> dict[str, frozenset[int]]:
        """The versions up to this round's of each silo's updates after this round."""
        return {silo: self._clock.later_versions(silo, self._number) for silo in self.ids}

    def arrays(self) -> dict[str, np.ndarray]:
        """The time, and the means of delays; everything else is in the earlier run."""
        return {NOW: np.array([self.now]), **({} if self._delays is None else self._delays.arrays())}
