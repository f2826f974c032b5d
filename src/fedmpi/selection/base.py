"""Base classes of selectors, the selection, draws with known probabilities.

Arrays in a selector's state that are as long as the federation have one entry per silo, in its order.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pydantic

from fedmpi.components import PositiveFraction, PositiveInt, called, component
from fedmpi.errors import ConfigError
from fedmpi.outcome import RoundOutcome

if TYPE_CHECKING:
    from fedmpi.config import Config

State = dict[str, np.ndarray]


class Selection(NamedTuple):
    """A round's cohort in the federation's order, and the selector's new state.

    With `factors` the aggregate is an unbiased estimate of the one over all silos: each silo's weight is multiplied by
    its factor, 1/probability, and the sum is divided by the weight of all silos, not of the cohort.
    """

    cohort: list[str]
    state: State
    factors: list[float] | None = None  # one per silo of the cohort
    among: list[str] | None = None  # the silos whose aggregate the factors estimate; None: all


class Selector:
    """Chooses the silos of each round. Members define `init` and `select`, and override the rest as needed."""

    @property
    def reads(self) -> frozenset[str] | None:
        """The outcome's arrays that it reads besides `cohort`: loss, norm, samples, steps, taken, metric. Checked under
        `disclose: cohort` and `pooled`, which hide some. None: unknown."""
        return None

    @property
    def unbiased(self) -> bool:
        """Whether `select` gives factors."""
        return False

    @property
    def asks(self) -> bool:
        """Whether `candidates` may be non-empty."""
        return False

    @property
    def samples(self) -> int | None:
        """Number of a candidate's training samples that its loss is evaluated on; None: all."""
        return None

    def conflicts(self, config: Config) -> str | None:
        """Why the selector cannot work with the rest of the configuration, in one line; None if it can."""
        regions, weighs = config.exchange.regions, f"{called(self)} counts silos by 1/probability"
        if not self.unbiased:
            return None
        if why := config.aggregate.refuses_factors:
            return f"select: {weighs}, which makes no sense of aggregate {called(config.aggregate)}: {why}"
        if regions is not None and regions.every > 1:
            return f"select: {weighs} of a round, and exchange.regions.every is {regions.every} rounds"
        return None

    @property
    def counts(self) -> dict[str, int]:
        """Options that ask for a number of silos. Each is capped at the number of members, which may fall."""
        return {}

    def suits(self, num_silos: int) -> None:
        """Raise ConfigError if one of `counts` exceeds the number of silos that may ever take part."""
        for name, count in self.counts.items():
            if count > num_silos:
                raise ConfigError(f"select.{name}: {count} silos, and there are {num_silos}")

    def capped(self, num_silos: int) -> str:
        """Which of `counts` exceed the number of members, in one line; empty if none does."""
        over = [f"{name} is {count}" for name, count in self.counts.items() if count > num_silos]
        return f"select: {' and '.join(over)}, capped at the {num_silos} silos that take part" if over else ""

    def knows(self, ids: Sequence[str]) -> None:
        """Raise ConfigError if an option names a silo that is not among `ids`, all silos that may ever take part."""

    def least(self, ids: Sequence[str], rounds: int) -> int:
        """The smallest possible cohort in these rounds, for aggregators that need a minimum."""
        return len(ids)

    @abstractmethod
    def init(self, num_train: Sequence[int]) -> State:
        """The state before the first round, given every silo's number of training samples."""

    def observe(self, ids: Sequence[str], state: State, outcome: RoundOutcome | None) -> State:
        """The state after the last round's outcome (None before the first round); called first in a round."""
        return state

    def candidates(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> list[str]:
        """Silos whose loss under the global parameters is evaluated. `select` then gets {silo: loss} as one more
        argument."""
        return []

    @abstractmethod
    def select(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> Selection | tuple[list[str], State]:
        """The cohort, in the federation's order, and the new state. `outcome` is the last round's."""


@component
class Part(Selector):
    """Base of selectors that choose a fraction or a number of silos."""

    fraction: PositiveFraction = 1.0
    """C: fraction of the silos"""
    count: PositiveInt | None = None
    """S: number of silos, instead of a fraction; all if fewer are available"""

    @pydantic.model_validator(mode="after")
    def _one_size(self) -> Part:
        if self.count is not None and self.fraction != 1.0:
            raise ValueError("give either 'fraction' or 'count'")
        return self

    def size(self, num_silos: int) -> int:
        """S = max(1, round(C K)), or the count."""
        return min(self.count, num_silos) if self.count is not None else max(1, round(self.fraction * num_silos))

    @property
    def counts(self) -> dict[str, int]:
        """`count`, if given."""
        return {} if self.count is None else {"count": self.count}

    def least(self, ids: Sequence[str], rounds: int) -> int:
        """S."""
        return self.size(len(ids))


def cohort_of(ids: Sequence[str], indices: np.ndarray) -> list[str]:
    """The silos with these indices, in the federation's order."""
    return [ids[i] for i in np.sort(indices)]


def newest(known_K: np.ndarray, told_K: np.ndarray) -> np.ndarray:
    """The new values, or the known ones where a new value is nan, [K]."""
    return np.where(np.isnan(told_K), known_K, told_K)


def highest(scores_K: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """The indices of the `size` largest scores; ties are broken at random."""
    order = rng.permutation(len(scores_K))
    return order[np.argsort(-scores_K[order], kind="stable")[:size]]


def mixed(scores_K: np.ndarray, floor: float) -> np.ndarray:
    """Probabilities proportional to the scores, mixed with a share `floor` of the uniform ones; they sum to 1.

    >>> mixed(np.array([3.0, 1.0]), 0.2)
    array([0.7, 0.3])
    """
    total = scores_K.sum()
    even = np.full(len(scores_K), 1 / len(scores_K))
    return floor * even + (1 - floor) * (scores_K / total) if total > 0 else even


def with_replacement(
    ids: Sequence[str], state: State, p_K: np.ndarray, size: int, rng: np.random.Generator
) -> Selection:
    """The selection of `size` draws with replacement; a silo drawn m times has factor m / (size p)."""
    times_K = rng.multinomial(size, p_K)
    chosen = np.flatnonzero(times_K)
    return Selection(cohort_of(ids, chosen), state, (times_K[chosen] / (size * p_K[chosen])).tolist())


def carried(
    selector: Selector, state: State, before: Sequence[str], ids: Sequence[str], num_train: Sequence[int]
) -> State:
    """A selector's state for new members: entries of silos that stay are kept, silos that join get initial values.

    >>> from fedmpi.selection.draws import RoundRobin
    >>> carried(RoundRobin(), {"turn": np.array([3.0, 1.0, 2.0])}, "abc", "acd", [5, 5, 5])["turn"]
    array([3., 2., 0.])
    """
    if list(before) == list(ids):
        return state
    number = {silo: i for i, silo in enumerate(before)}
    there = np.array([number.get(silo, -1) for silo in ids])
    stays = there >= 0
    fresh = selector.init(num_train)
    found = dict(state)
    for name, array in state.items():
        if np.ndim(array) and len(array) == len(before) and name in fresh and len(fresh[name]) == len(ids):
            found[name] = np.array(fresh[name], dtype=array.dtype)
            found[name][stays] = array[there[stays]]
    return found
