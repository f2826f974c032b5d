"""Clocks: how long training takes, as an engine sees it.

    real       as long as it takes
    virtual    as long as a model says: the order of events, and so every result, depends on the seed alone
    replay     as long as it took in an earlier run

Under a virtual clock a silo trains when it is due, as fast as the machine can, and the record carries both clocks.
Times are keyed random numbers, rounded to twelve digits, because the last bit of a logarithm depends on the processor
and all ranks must see the same order.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic

from fedmpi import rng
from fedmpi.components import Family, NonNegativeFloat, PositiveFloat, component, did_you_mean
from fedmpi.errors import ConfigError
from fedmpi.records.metrics import read_metrics

if TYPE_CHECKING:
    from fedmpi.config import Config

LONGEST_LINE = 4096  # characters of a trace's line


# ---------------------------------------------------------------- distributions


class Times:
    """A distribution of positive numbers: seconds, or factors of them."""

    @abstractmethod
    def draw(self, silo: str, number: int, generator: np.random.Generator) -> float:
        """The number for a silo's training `number`, counted from 0."""

    def knows(self, ids: Sequence[str], where: str) -> None:
        """Raise ConfigError if it has no numbers for one of these silos; `where` names the key."""


@component
class Constant(Times):
    """Always the same value."""

    value: NonNegativeFloat = 1.0
    """the value"""

    def draw(self, silo: str, number: int, generator: np.random.Generator) -> float:
        return self.value


@component
class Uniform(Times):
    """Uniform between two values."""

    low: NonNegativeFloat
    """smallest value"""
    high: PositiveFloat
    """largest value"""

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Uniform:
        if self.low > self.high:
            raise ValueError(f"low is {self.low:g}, above high, {self.high:g}")
        return self

    def draw(self, silo: str, number: int, generator: np.random.Generator) -> float:
        return float(generator.uniform(self.low, self.high))


@component
class Lognormal(Times):
    """median times exp(sigma z), z standard normal: most values near the median, a few far above it."""

    median: PositiveFloat = 1.0
    """median"""
    sigma: NonNegativeFloat = 0.5
    """standard deviation of the logarithm; 0.4: the slowest of 40 is about 2.4 times the median, 1.0: 9 times"""

    def draw(self, silo: str, number: int, generator: np.random.Generator) -> float:
        return self.median * math.exp(self.sigma * float(generator.standard_normal()))


@component
class Trace(Times):
    """Values from a file: lines SILO,VALUE. A silo's values are taken in order, then again from its first."""

    file: str
    """a text file; a first line `silo,value` is skipped"""

    def draw(self, silo: str, number: int, generator: np.random.Generator) -> float:
        values = self._values[silo]
        return values[number % len(values)]

    def knows(self, ids: Sequence[str], where: str) -> None:
        """Read the file. Raise ConfigError if it cannot be read, or has no values for one of these silos."""
        vars(self).pop("_values", None)  # the file may have changed since an earlier run
        values = self._values
        if missing := [silo for silo in ids if silo not in values]:
            raise ConfigError(f"{where}: {self.file} has no value for silo '{missing[0]}'")

    @functools.cached_property
    def _values(self) -> dict[str, list[float]]:
        return read_trace(self.file)


def read_trace(file: str) -> dict[str, list[float]]:
    """The values of each silo in a trace file. Raises ConfigError."""
    found: dict[str, list[float]] = {}
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, start=1):
        silo, comma, text = line[:LONGEST_LINE].rpartition(",")
        if not line.strip() or (number == 1 and text.strip() == "value"):
            continue
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not comma or not 0 <= value < math.inf:
            raise ConfigError(f"{file}:{number}: not a line SILO,VALUE with a number from 0 on: {line[:40]!r}")
        found.setdefault(silo.strip(), []).append(value)
    return found


TIMES = Family(
    "distribution",
    {"constant": Constant, "uniform": Uniform, "lognormal": Lognormal, "trace": Trace},
    Times,
    defaults=True,
)


# ---------------------------------------------------------------- clocks


class Clock:
    """How long training takes, as an engine sees it."""

    is_virtual: ClassVar[bool] = False  # whether `seconds` gives the time, in place of the machine

    def seconds(self, seed: int, silo: str, number: int, num_train: int) -> float:
        """Virtual seconds from when a silo fetches parameters until its update has arrived. `number` counts the silo's
        trainings from 0, `num_train` its training samples."""
        compute_s, delay_s = self.parts(seed, silo, number, num_train)
        return float(f"{compute_s + delay_s:.12g}")

    def parts(self, seed: int, silo: str, number: int, num_train: int) -> tuple[float, float]:
        """`seconds` in parts: those of the training, and those of the transfers."""
        raise NotImplementedError

    def suits(self, ids: Sequence[str]) -> None:
        """Raise ConfigError if it does not know these silos."""

    def members(self, number: int) -> Sequence[str] | None:
        """The silos that take part in round `number`, if the clock says so; None: those that take part now."""
        return None

    def conflicts(self, config: Config) -> str | None:
        """Why it does not work with the rest of the configuration, in one line; None if it does."""
        return None


@component
class Real(Clock):
    """The machine's clock."""


@component
class Virtual(Clock):
    """Time by a model: an update takes speed x compute + delay seconds.

    >>> clock = Virtual(compute=Constant(value=2.0), delay=Constant(value=0.5), slower={"b": 5.0})
    >>> clock.seconds(0, "a", 0, 100), clock.seconds(0, "b", 0, 100)
    (2.5, 10.5)
    """

    is_virtual: ClassVar[bool] = True

    compute: Annotated[Times, TIMES] = Constant()
    """seconds of a training, drawn for each one"""
    per: Literal["training", "sample"] = "training"
    """what `compute` is the time of: a training, or a training sample of the silo"""
    delay: Annotated[Times, TIMES] = Constant(value=0.0)
    """seconds for a silo's transfers in both directions, drawn for each training"""
    speed: Annotated[Times, TIMES] = Constant()
    """factor of `compute`, drawn once for each silo"""
    slower: dict[str, PositiveFloat] = pydantic.Field(default_factory=dict)
    """a further factor of `compute` for single silos, by id"""

    def parts(self, seed: int, silo: str, number: int, num_train: int) -> tuple[float, float]:
        def drawn(times: Times, what: str, number: int) -> float:
            draw = rng.generator(seed, purpose=f"virtual {what}", round=number, silo=silo)
            return times.draw(silo, number, draw)

        compute = drawn(self.compute, "compute", number) * (num_train if self.per == "sample" else 1)
        factor = drawn(self.speed, "speed", 0) * self.slower.get(silo, 1.0)
        return factor * compute, drawn(self.delay, "delay", number)

    def suits(self, ids: Sequence[str]) -> None:
        for name in ("compute", "delay", "speed"):
            times: Times = getattr(self, name)
            times.knows(ids, f"engine.clock.{name}")
        if others := [silo for silo in self.slower if silo not in ids]:
            raise ConfigError(f"engine.clock.slower: no silo '{others[0]}'{did_you_mean(others[0], ids)}")

    def conflicts(self, config: Config) -> str | None:
        """Refuses rules whose work depends on the machine's clock."""
        if config.local.timed:
            return "engine.clock: virtual, but local.amount: seconds counts the machine's; take steps or epochs"
        return None


@dataclass(frozen=True)
class Scaled(Clock):
    """A virtual clock under which trainings take a share of their time, by silo, because they are shorter."""

    is_virtual: ClassVar[bool] = True

    clock: Clock
    shares: Mapping[str, float]  # of silos that do less than all

    def parts(self, seed: int, silo: str, number: int, num_train: int) -> tuple[float, float]:
        compute_s, delay_s = self.clock.parts(seed, silo, number, num_train)
        return compute_s * self.shares.get(silo, 1.0), delay_s


@component
class Replay(Clock):
    """The order of arrivals of an earlier run with engine: buffered, in real or virtual time: its updates are trained
    from the same versions and added in the same order, which gives the same bits. Silos join after the same rounds. Not
    of one that silos have left."""

    is_virtual: ClassVar[bool] = True

    run: str
    """the earlier run's directory; its metrics.jsonl has the arrivals"""

    @functools.cached_property
    def _records(self) -> Mapping[int, dict[str, Any]]:
        """The record of each round. Raises ConfigError if they have no arrivals."""
        return _records(self.run)

    @functools.cached_property
    def arrivals(self) -> Mapping[int, list[dict[str, Any]]]:
        """The arrivals of each round. Raises ConfigError if there are none."""
        return {number: record["arrivals"] for number, record in self._records.items()}

    def members(self, number: int) -> Sequence[str] | None:
        """The silos of the earlier run's round; None if there is no such round."""
        return [*self._records[number]["silos"]] if number in self._records else None

    @functools.cached_property
    def _last_use(self) -> dict[str, dict[int, int]]:
        """By silo and version that it trains from: the last round to which it brings an update from it."""
        found: dict[str, dict[int, int]] = {}
        for number in sorted(self.arrivals):
            for row in (row for row in self.arrivals[number] if not row.get("dropped")):
                found.setdefault(row["silo"], {})[row["version"]] = number
        return found

    def later_versions(self, silo: str, number: int) -> frozenset[int]:
        """The versions up to `number` that the silo trains from for its updates after round `number`."""
        rows = self._last_use.get(silo, {}).items()
        return frozenset(version for version, last in rows if version <= number < last)

    def suits(self, ids: Sequence[str]) -> None:
        """Read the arrivals. Raise ConfigError unless all silos of the earlier run are among these."""
        for name in ("_records", "arrivals", "_last_use"):
            vars(self).pop(name, None)  # the file may have changed since an earlier run
        for number, of_round in self.arrivals.items():
            for silo in (*(one["silo"] for one in of_round), *(self.members(number) or ())):
                if silo not in ids:
                    raise ConfigError(f"engine.clock.run: {self.run} has a silo '{silo}', which is none here")

    def conflicts(self, config: Config) -> str | None:
        if missing := [number for number in range(1, config.rounds + 1) if number not in self.arrivals]:
            return f"engine.clock.run: {self.run} has no arrivals of round {missing[0]}"
        told = {"amount" in one for rows in self.arrivals.values() for one in rows}
        if told - {config.local.by_delay is not None}:
            there = "tell no amounts of work" if config.local.by_delay is not None else "tell amounts of work"
            return f"local.amount: the arrivals of {self.run} {there}; give the local.amount of that run"
        return None


def _records(run: str) -> dict[int, dict[str, Any]]:
    records = [record for record in read_metrics(Path(run)) if "arrivals" in record]
    if not records:
        raise ConfigError(f"engine.clock.run: {run} has no metrics.jsonl with arrivals")
    before: Mapping[str, Any] = {}
    for record in records:
        if left := [silo for silo in before if silo not in record["silos"]]:  # if it came back, it began anew
            raise ConfigError(f"engine.clock.run: silo '{left[0]}' has left {run} before round {record['round']}")
        before = record["silos"]
    return {record["round"]: record for record in records}


CLOCKS = Family("clock", {"real": Real, "virtual": Virtual, "replay": Replay}, Clock, defaults=True)

NOW = "now"  # name of the virtual time, in seconds, in the engine's state


def now(state: Mapping[str, np.ndarray]) -> float:
    """The virtual time in an engine's state; 0 before the first round."""
    return float(state[NOW][0]) if NOW in state else 0.0
