"""What selectors share: the selection, the protocol, draws with known probabilities.

Arrays in a selector's state that are as long as the federation have one entry per silo, in the federation's order.
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

    `factors` are given where the aggregate is to be an unbiased estimate of that over all silos: what each of the
    cohort counts besides its weight, 1/probability. The sum is then divided by the weight of all silos and not by that
    of the cohort.
    """

    cohort: list[str]
    state: State
    factors: list[float] | None = None
    among: list[str] | None = None  # the silos whose aggregate the factors estimate; None: all


class Selector:
    """Which silos take part. Members say `init` and `select`, and what else is other than here."""

    @property
    def reads(self) -> frozenset[str] | None:
        """The arrays of the outcome that it looks at besides `cohort`: loss, norm, samples, steps, taken, metric.
        `disclose: cohort` and `pooled` ask for it, where some are nan; None: it does not say."""
        return None

    @property
    def unbiased(self) -> bool:
        """Does `select` give factors?"""
        return False

    @property
    def asks(self) -> bool:
        """Are there ever `candidates`?"""
        return False

    @property
    def samples(self) -> int | None:
        """On how many of a candidate's training samples its loss is found out; None: all."""
        return None

    def conflicts(self, config: Config) -> str | None:
        """Why the rest of a configuration does not go with it, in one line; None where it does."""
        regions, weighs = config.exchange.regions, f"{called(self)} counts silos by 1/probability"
        if not self.unbiased:
            return None
        if why := config.aggregate.refuses_factors:
            return f"select: {weighs}, which makes no sense of aggregate {called(config.aggregate)}: {why}"
        if regions is not None and regions.every > 1:
            return f"select: {weighs} of a round, and exchange.regions.every is {regions.every} rounds"
        return None

    def suits(self, num_silos: int) -> None:
        """ConfigError where a number of silos that it is given is more than there are."""

    def knows(self, ids: Sequence[str]) -> None:
        """ConfigError where an option names a silo that is none of these, which are all that may ever take part."""

    def least(self, ids: Sequence[str], rounds: int) -> int:
        """The fewest silos that a cohort of these rounds may have, for aggregators that need a number of them."""
        return len(ids)

    @abstractmethod
    def init(self, num_train: Sequence[int]) -> State:
        """The state before the first round, given every silo's number of training samples."""

    def observe(self, ids: Sequence[str], state: State, outcome: RoundOutcome | None) -> State:
        """The state once it has seen the last round's outcome, None before the first; called before all else."""
        return state

    def candidates(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> list[str]:
        """Silos whose loss under the global parameters is to be found out. `select` is then given what was found,
        {silo: loss}, as one more argument."""
        return []

    @abstractmethod
    def select(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> Selection | tuple[list[str], State]:
        """The cohort, in the federation's order, and the new state. `outcome` is the last round's."""


@component
class Part(Selector):
    """The fields of selectors that take a part of the silos."""

    fraction: PositiveFraction = 1.0
    """C, of the federation's silos"""
    count: PositiveInt | None = None
    """S itself, in place of a fraction; of fewer silos that are there all"""

    @pydantic.model_validator(mode="after")
    def _one_size(self) -> Part:
        if self.count is not None and self.fraction != 1.0:
            raise ValueError("give either 'fraction' or 'count'")
        return self

    def size(self, num_silos: int) -> int:
        """S = max(1, round(C K)), or the count."""
        return min(self.count, num_silos) if self.count is not None else max(1, round(self.fraction * num_silos))

    def suits(self, num_silos: int) -> None:
        """ConfigError for a count beyond the number of silos."""
        if self.count is not None:
            at_most(num_silos, "count", self.count)

    def least(self, ids: Sequence[str], rounds: int) -> int:
        """S."""
        return self.size(len(ids))


def at_most(num_silos: int, name: str, count: int) -> None:
    """ConfigError where `count` silos are asked for and there are fewer."""
    if count > num_silos:
        raise ConfigError(f"select.{name}: {count} silos, and there are {num_silos}")


def cohort_of(ids: Sequence[str], indices: np.ndarray) -> list[str]:
    """Silos by number, in the federation's order."""
    return [ids[i] for i in np.sort(indices)]


def newest(known_K: np.ndarray, told_K: np.ndarray) -> np.ndarray:
    """What was told, or else what is known."""
    return np.where(np.isnan(told_K), known_K, told_K)


def highest(scores_K: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """The numbers of the largest scores; which of equal ones is drawn."""
    order = rng.permutation(len(scores_K))
    return order[np.argsort(-scores_K[order], kind="stable")[:size]]


def mixed(scores_K: np.ndarray, floor: float) -> np.ndarray:
    """Probabilities proportional to the scores, a part `floor` of them alike for all; they add up to 1.

    >>> mixed(np.array([3.0, 1.0]), 0.2)
    array([0.7, 0.3])
    """
    total = scores_K.sum()
    even = np.full(len(scores_K), 1 / len(scores_K))
    return floor * even + (1 - floor) * (scores_K / total) if total > 0 else even


def with_replacement(
    ids: Sequence[str], state: State, p_K: np.ndarray, size: int, rng: np.random.Generator
) -> Selection:
    """`size` draws; a silo drawn m times counts m / (size p)."""
    times_K = rng.multinomial(size, p_K)
    chosen = np.flatnonzero(times_K)
    return Selection(cohort_of(ids, chosen), state, (times_K[chosen] / (size * p_K[chosen])).tolist())


def carried(
    selector: Selector, state: State, before: Sequence[str], ids: Sequence[str], num_train: Sequence[int]
) -> State:
    """A selector's state once other silos are members: those that stay keep what is known of them, and those that join
    begin as all did.

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
