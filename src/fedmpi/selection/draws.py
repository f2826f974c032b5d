"""Selectors that ignore training: all, uniform, proportional to samples, round robin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from fedmpi.components import PositiveFraction, PositiveInt, component
from fedmpi.outcome import RoundOutcome
from fedmpi.selection.base import Part, Selection, Selector, State, cohort_of, with_replacement


@component
class All(Selector):
    """Every silo in every round."""

    reads: ClassVar[frozenset[str]] = frozenset()

    def init(self, num_train: Sequence[int]) -> State:
        return {}

    def least(self, ids: Sequence[str], rounds: int) -> int:
        """All silos."""
        return len(ids)

    def select(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> Selection:
        return Selection(list(ids), state)


@component
class Uniform(Part):
    """S = max(1, round(C K)) silos drawn without replacement (McMahan et al. 2017, Algorithm 1, with max(C K, 1)).

    `weights: renormalised` divides by the weight of the cohort. The aggregate is UNBIASED for equal weights and biased
    for unequal ones, because a cohort of small silos moves the parameters as far as one of large silos. Example: with
    two silos of n_k/n = 0.1 and 0.9, and one silo per round, each makes half of the expected step.

    `weights: inverse` counts each silo K/S times and divides by the weight of all silos: UNBIASED, with variance
    K(1-C) / (C(K-1)) sum_k |a_k - mean(a)|^2, a_k = (n_k/n) delta_k; the step length varies with the cohort.

    >>> Uniform(fraction=0.5).select(["a", "b", "c", "d"], {}, None, np.random.default_rng(0))[0]
    ['c', 'd']
    """

    reads: ClassVar[frozenset[str]] = frozenset()

    weights: Literal["renormalised", "inverse"] = "renormalised"
    """renormalised: divide by the cohort's weight; inverse: count each silo K/S times"""

    @property
    def unbiased(self) -> bool:
        """Whether factors are given."""
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
class Poisson(Selector):
    """Every silo independently with probability `rate`, as amplification of privacy by sampling needs it.

    If nobody is drawn, one silo stands in, drawn uniformly; under `privacy: {name: silo}` its update counts as zero.
    Renormalised over the cohort, BIASED for unequal weights; under `privacy` divided by the expected weight of a
    cohort, UNBIASED.

    >>> Poisson(rate=0.5).select(["a", "b", "c", "d"], {}, None, np.random.default_rng(0)).cohort
    ['b', 'c', 'd']
    """

    reads: ClassVar[frozenset[str]] = frozenset()

    rate: PositiveFraction
    """probability of a silo to take part"""

    def init(self, num_train: Sequence[int]) -> State:
        return {"empty": np.zeros(1)}

    def least(self, ids: Sequence[str], rounds: int) -> int:
        """1."""
        return 1

    def select(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> Selection:
        chosen, stand_in = np.flatnonzero(rng.random(len(ids)) < self.rate), rng.integers(len(ids))
        empty = not len(chosen)
        return Selection(cohort_of(ids, np.array([stand_in]) if empty else chosen), {"empty": np.array([float(empty)])})


@component
class Proportional(Part):
    """S draws with replacement, with probabilities proportional to the training samples (Li et al. 2020, On the
    Convergence of FedAvg on Non-IID Data, Scheme I). UNBIASED: a silo drawn m times counts m / (S p_k), p_k = n_k/n.
    With the aggregator's weights by samples, the aggregate is the plain mean over the draws.

    `replace: false` draws S different silos. Silo k is in the cohort with probability min(1, c n_k) exactly: systematic
    sampling (Madow 1949) in random order. UNBIASED: each counts 1/probability.
    """

    reads: ClassVar[frozenset[str]] = frozenset()

    unbiased = True

    replace: bool = True
    """draw with replacement"""

    def least(self, ids: Sequence[str], rounds: int) -> int:
        """1 with replacement (the same silo every time), else S."""
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
    """`count` silos per round in cyclic order: those whose last turn is longest ago. All of them, if fewer are
    `available`.

    Renormalised over the cohort. BIASED: the cohort is not random; every silo has a turn within K/count rounds.

    >>> robin, state = RoundRobin(count=2), RoundRobin().init([5, 5, 5])
    >>> cohort, state, *_ = robin.select(["a", "b", "c"], state, None, None)
    >>> cohort, robin.select(["a", "b", "c"], state, RoundOutcome.of("abc", 1), None).cohort
    (['a', 'b'], ['a', 'c'])
    """

    reads: ClassVar[frozenset[str]] = frozenset()

    count: PositiveInt = 1
    """silos per round"""

    @property
    def counts(self) -> dict[str, int]:
        """`count`."""
        return {"count": self.count}

    def least(self, ids: Sequence[str], rounds: int) -> int:
        """`count`, or the number of silos if that is smaller."""
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
    """Inclusion probabilities min(1, c s_k) that sum to `size` (at most the number of positive scores), [K].

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
    """`size` different indices, k among them with probability p_k; the p_k sum to `size`."""
    order = rng.permutation(len(p_K))
    ends = np.cumsum(p_K[order])
    ends *= size / ends[-1]  # corrects rounding
    return order[np.searchsorted(ends, rng.random() + np.arange(size), side="right")]


DRAWS = {"all": All, "poisson": Poisson, "uniform": Uniform, "proportional": Proportional, "round_robin": RoundRobin}
