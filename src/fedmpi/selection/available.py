"""Availability traces: silos that are not always available, around another selector."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic

from fedmpi.components import Family, component, did_you_mean
from fedmpi.errors import ConfigError, NoCohort
from fedmpi.outcome import RoundOutcome
from fedmpi.selection.base import Selection, Selector, State
from fedmpi.selection.draws import DRAWS, All
from fedmpi.selection.losses import LOSSES
from fedmpi.selection.norms import NORMS

INNER = Family("selector", {**DRAWS, **NORMS, **LOSSES}, Selector, defaults=True)

Traces = dict[str, list[tuple[int, int]]]


@component
class Available(Selector):
    """Another selector, applied to the silos that are available in the round. An interval [from, to) excludes `to`.

    A file of traces is read with the configuration and becomes part of it: all ranks have the same, config.yaml holds
    it, and resuming with another file is refused. It is JSON, {silo: [[from, to], ...]}, or CSV with the columns silo,
    from, to. A silo that is not named is always available; one with an empty list never is. A fraction counts the
    available silos. A round without any ends the run with an error.

    If the inner selector gives factors, the aggregate is UNBIASED over the available silos. It is BIASED against silos
    that are seldom available.

    >>> away = Available(traces={"a": [(2, 9)]})
    >>> away.select(["a", "b"], away.init([5, 5]), None, np.random.default_rng(0)).cohort
    ['b']
    """

    traces: Traces
    """{silo: [[from, to), ...]} in rounds counted from 1, or a JSON or CSV file of it"""
    inner: Annotated[Selector, INNER] = All()
    """selector among the available silos"""

    @pydantic.field_validator("traces", mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        return _read(Path(value)) if isinstance(value, (str, Path)) else value

    @pydantic.field_validator("traces")
    @classmethod
    def _in_order(cls, traces: Traces) -> Traces:
        for silo, intervals in traces.items():
            for start, stop in intervals:
                if not 1 <= start < stop:
                    raise ValueError(f"silo '{silo}': [{start}, {stop}) is no interval of rounds, counted from 1")
        return traces

    @property
    def counts(self) -> dict[str, int]:
        """The inner selector's."""
        return self.inner.counts

    def suits(self, num_silos: int) -> None:
        """Raise ConfigError if the inner selector asks for more silos than there are."""
        self.inner.suits(num_silos)

    def knows(self, ids: Sequence[str]) -> None:
        """Raise ConfigError if the traces name an unknown silo. Silos that left the run may be named."""
        if unknown := sorted(self.traces.keys() - set(ids)):
            raise ConfigError(f"select.traces: no silo '{unknown[0]}'{did_you_mean(unknown[0], list(ids))}")

    def least(self, ids: Sequence[str], rounds: int) -> int:
        """The inner selector's smallest cohort in the round with the fewest available silos."""
        edges = {1, *(edge for some in self.traces.values() for interval in some for edge in interval)}
        there = [self._in_round(ids, number) for number in edges if number <= rounds]
        return min((self.inner.least(some, rounds) for some in there if some), default=len(ids))

    @property
    def unbiased(self) -> bool:
        """Whether the inner selector gives factors."""
        return self.inner.unbiased

    @property
    def reads(self) -> frozenset[str] | None:
        """Per-silo figures that the inner selector reads."""
        return self.inner.reads

    @property
    def asks(self) -> bool:
        """Whether the inner selector asks for fresh losses."""
        return self.inner.asks

    @property
    def samples(self) -> int | None:
        """The inner selector's number of samples for fresh losses."""
        return self.inner.samples

    def init(self, num_train: Sequence[int]) -> State:
        return self.inner.init(num_train)

    def observe(self, ids: Sequence[str], state: State, outcome: RoundOutcome | None) -> State:
        """The inner selector's new state, from the figures of all silos."""
        return self.inner.observe(ids, state, outcome)

    def candidates(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> list[str]:
        """The inner selector's candidates among the available silos."""
        there = self._there(ids, outcome)
        return self.inner.candidates(*_part(ids, state, there), _only(outcome, there), rng)

    def select(
        self,
        ids: Sequence[str],
        state: State,
        outcome: RoundOutcome | None,
        rng: np.random.Generator,
        *losses: Mapping[str, float],
    ) -> Selection:
        there = self._there(ids, outcome)
        some, part = _part(ids, state, there)
        found = Selection(*self.inner.select(some, part, _only(outcome, there), rng, *losses))
        state = {name: _put(array, there, found.state[name], len(ids)) for name, array in state.items()}
        return found._replace(state=state, among=found.among or some)

    def _there(self, ids: Sequence[str], outcome: RoundOutcome | None) -> np.ndarray:
        """Indices of the silos available in the round after `outcome`. Raises NoCohort if there is none."""
        number = outcome.round + 1 if outcome is not None else 1
        there = set(self._in_round(ids, number))
        if not there:
            raise NoCohort(f"round {number}: no silo is there (select.traces)")
        return np.array([i for i, silo in enumerate(ids) if silo in there])

    def _in_round(self, ids: Sequence[str], number: int) -> list[str]:
        """The silos available in a round."""
        always = [(number, number + 1)]
        return [silo for silo in ids if any(a <= number < b for a, b in self.traces.get(silo, always))]


def _part(ids: Sequence[str], state: State, there: np.ndarray) -> tuple[list[str], State]:
    """The available silos, and the state restricted to them."""
    part = {name: array[there] if len(array) == len(ids) else array for name, array in state.items()}
    return [ids[i] for i in there], part


def _only(outcome: RoundOutcome | None, there: np.ndarray) -> RoundOutcome | None:
    return None if outcome is None else outcome.only(there)


def _put(array: np.ndarray, there: np.ndarray, new: np.ndarray, num_silos: int) -> np.ndarray:
    if len(array) != num_silos:
        return new
    array = array.copy()
    array[there] = new
    return array


def _read(path: Path) -> Traces:
    """The traces in a file. Raises ValueError with one line."""
    try:
        text = path.read_text()
        if path.suffix != ".csv":
            found: Traces = json.loads(text)
            return found
        traces: Traces = {}
        reader = csv.DictReader(text.splitlines())
        if {"silo", "from", "to"} - set(reader.fieldnames or ()):
            raise ValueError
        for row in reader:
            traces.setdefault(row["silo"].strip(), []).append((int(row["from"]), int(row["to"])))
        return traces
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path} is no JSON of {{silo: [[from, to], ...]}} and no CSV of silo,from,to") from None
