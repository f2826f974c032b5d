"""Draws that look at nothing, or at numbers of samples alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from fedmpi.components import PositiveInt, component
from fedmpi.outcome import RoundOutcome
from fedmpi.selection.base import Part, Selection, Selector, State, at_most, cohort_of, with_replacement


@component
class All(Selector):
    """Every silo, every round. The aggregate is that of all silos."""

    reads: ClassVar[frozenset[str]] = frozenset()  # of single silos

    def init(self, num_train: Sequence[int]) -> State:
        return {}

    def least(self, ids: Sequence[str], rounds: int) -> int:
        """All."""
        return len(ids)

    def select(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> Selection:
        return Selection(list(ids), state)


@component
class Uniform(Part):
    """S = max(1, round(C K)) silos drawn without replacement (McMahan et al. 2017, Algorithm 1, with max(C K, 1)).

    `weights: renormalised` divides by the weight of the cohort: at equal weights the aggregate is UNBIASED, at unequal
    ones it is not, since a cohort of small silos moves the parameters as far as one of large ones. Of two silos with
    n_k/n = 0.1 and 0.9, one of them a round, each makes half of the expected step.

    `weights: inverse` counts each silo K/S times and divides by the weight of all: UNBIASED, with variance
    K(1-C) / (C(K-1)) sum_k |a_k - mean(a)|^2, a_k = (n_k/n) delta_k; steps are longer and shorter with the cohort.

    >>> Uniform(fraction=0.5).select(["a", "b", "c", "d"], {}, None, np.random.default_rng(0))[0]
    ['c', 'd']
    """

    reads: ClassVar[frozenset[str]] = frozenset()  # of single silos

    weights: Literal["renormalised", "inverse"] = "renormalised"
    """over the cohort; or each counted K/S times"""

    @property
    def unbiased(self) -> bool:
        """Are factors given?"""
        return self.weights == "inverse"

    def init(self, num_train: Sequence[int]) -> State:
        return {}

    def select(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> Selection:
        size = self.size(len(ids))
        cohort = cohort_of(ids, rng.choice(len(ids), size=size, replace=False))
        return Selection(cohort, state, [len(ids) / size] * size if self.unbiased else None)


@component
class Proportional(Part):
    """Silos drawn in proportion to their training samples, S times (Li et al. 2020, On the Convergence of FedAvg on
    Non-IID Data, Scheme I): with replacement, the aggregate is the plain mean over the draws, if the aggregator's
    weights are samples. UNBIASED: a silo drawn m times counts m / (S p_k), p_k = n_k/n.

    `replace: false` draws S different silos, with probabilities of being in the cohort that are min(1, c n_k) exactly:
    systematic sampling (Madow 1949) after a random order. UNBIASED by their inverse.
    """

    reads: ClassVar[frozenset[str]] = frozenset()  # of single silos

    unbiased = True

    replace: bool = True
    """may a silo be drawn more than once?"""

    def least(self, ids: Sequence[str], rounds: int) -> int:
        """One, drawn every time; S without replacement."""
        return 1 if self.replace else self.size(len(ids))

    def init(self, num_train: Sequence[int]) -> State:
        return {"num_train": np.asarray(num_train, dtype=np.float64)}

    def select(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> Selection:
        n_K, size = state["num_train"], self.size(len(ids))
        if self.replace:
            return with_replacement(ids, state, n_K / n_K.sum(), size, rng)
        p_K = inclusion(n_K, size)
        chosen = np.sort(systematic(p_K, size, rng))
        return Selection(cohort_of(ids, chosen), state, (1 / p_K[chosen]).tolist())


@component
class RoundRobin(Selector):
    """`count` silos each round, in the federation's order and around again: those whose last turn is longest ago. Of
    fewer that are there (`available`) all.

    Renormalised over the cohort, and BIASED: a round's cohort is not drawn; over K/count rounds everybody has a turn.

    >>> robin, state = RoundRobin(count=2), RoundRobin().init([5, 5, 5])
    >>> cohort, state, *_ = robin.select(["a", "b", "c"], state, None, None)
    >>> cohort, robin.select(["a", "b", "c"], state, RoundOutcome.of("abc", 1), None).cohort
    (['a', 'b'], ['a', 'c'])
    """

    reads: ClassVar[frozenset[str]] = frozenset()  # of single silos

    count: PositiveInt = 1
    """silos per round"""

    def suits(self, num_silos: int) -> None:
        """ConfigError for a count beyond the number of silos."""
        at_most(num_silos, "count", self.count)

    def least(self, ids: Sequence[str], rounds: int) -> int:
        """The count."""
        return min(self.count, len(ids))

    def init(self, num_train: Sequence[int]) -> State:
        return {"turn": np.zeros(len(num_train))}

    def select(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> Selection:
        chosen = np.argsort(state["turn"], kind="stable")[: self.count]
        turn_K = state["turn"].copy()
        before = outcome.round * self.count if outcome is not None else 0
        turn_K[chosen] = 1 + before + np.arange(len(chosen))
        return Selection(cohort_of(ids, chosen), {"turn": turn_K})


def inclusion(scores_K: np.ndarray, size: int) -> np.ndarray:
    """Probabilities min(1, c s_k) that add up to `size` (at most the number of positive scores).

    >>> inclusion(np.array([1.0, 1.0, 6.0]), 2)
    array([0.5, 0.5, 1. ])
    """
    p_K = np.ones(len(scores_K))
    free = np.ones(len(scores_K), dtype=bool)
    while free.any():
        p_K[free] = (size - (~free).sum()) * scores_K[free] / scores_K[free].sum()
        if not (over := free & (p_K >= 1)).any():
            break
        p_K[over], free[over] = 1.0, False
    return p_K


def systematic(p_K: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` different numbers, k among them with probability p_k; the p_k add up to `size`."""
    order = rng.permutation(len(p_K))
    ends = np.cumsum(p_K[order])
    ends *= size / ends[-1]  # rounding
    return order[np.searchsorted(ends, rng.random() + np.arange(size), side="right")]


DRAWS = {"all": All, "uniform": Uniform, "proportional": Proportional, "round_robin": RoundRobin}
