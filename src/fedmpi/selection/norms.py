"""Draws by the size of updates: silos that move the parameters most are drawn most often, and count less for it.

What is known of a silo is the norm of its delta when it last took part; a silo that was never heard counts as the
largest. No vector and no message is needed, and the aggregate is unbiased whatever the norms were: probabilities are
those that were drawn with. Old norms cost variance only, and so do `aggregate.weights` other than samples: silos are
taken to count by n_k.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmpi.components import PositiveFraction, component
from fedmpi.outcome import RoundOutcome
from fedmpi.selection.base import Part, Selection, State, cohort_of, mixed, newest, with_replacement


@component
class _ByNorm(Part):
    """The norms of last participations, as state."""

    unbiased = True
    reads = frozenset({"norm"})

    floor: PositiveFraction = 0.1
    """of the probability, spread evenly, so that nobody's is 0"""

    def least(self, ids: Sequence[str], rounds: int) -> int:
        """One: how many different silos are drawn is chance."""
        return 1

    def init(self, num_train: Sequence[int]) -> State:
        n_K = np.asarray(num_train, dtype=np.float64)
        return {"num_train": n_K, "norm": np.full(len(n_K), np.nan)}

    def observe(self, ids: Sequence[str], state: State, outcome: RoundOutcome | None) -> State:
        """The norms of the last round are the newest."""
        return state if outcome is None else {**state, "norm": newest(state["norm"], outcome.norm_K)}

    def sizes(self, state: State) -> np.ndarray:
        """n_k |delta_k|, with the largest norm for silos that were never heard."""
        norm_K = state["norm"]
        heard = ~np.isnan(norm_K)
        return state["num_train"] * np.where(heard, norm_K, norm_K[heard].max() if heard.any() else 1.0)


@component
class Norm(_ByNorm):
    """S = max(1, round(C K)) draws with replacement, p_k = floor/K + (1 - floor) n_k |delta_k| / sum (importance
    sampling by norms of gradients, Zhao and Zhang 2015, Stochastic Optimization with Importance Sampling, with the even
    part of Needell et al. 2014, section 4).

    UNBIASED: a silo drawn m times counts m / (S p_k). The norm is that of the silo's last participation.
    """

    def select(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> Selection:
        return with_replacement(ids, state, mixed(self.sizes(state), self.floor), self.size(len(ids)), rng)


@component
class Optimal(_ByNorm):
    """Optimal client sampling (Chen, Horvath, Richtarik 2022, Algorithm 1, eq. 7): every silo by itself with
    probability p_i, m = max(1, round(C K)) of them expected, the p_i that make the variance least given w_i |U_i|.

    UNBIASED: each counts 1/p_i. Deviations: the norms are those of last participations, where the paper lets all silos
    train and send theirs first; `floor` of p_i is m/K, since an old norm of 0 must not shut a silo out; where nobody
    was drawn it is drawn again, and the factors are (1 - P(nobody)) / p_i.
    """

    def select(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> Selection:
        size = self.size(len(ids))
        p_K = self.floor * size / len(ids) + (1 - self.floor) * least_variance(self.sizes(state), size)
        p_K = np.minimum(p_K, 1.0)
        somebody = 1.0 - float(np.prod(1.0 - p_K))
        chosen = np.zeros(0, dtype=np.int64)
        while not len(chosen):
            chosen = np.flatnonzero(rng.random(len(ids)) < p_K)
        return Selection(cohort_of(ids, chosen), state, (somebody / p_K[chosen]).tolist())


def least_variance(sizes_K: np.ndarray, size: int) -> np.ndarray:
    """The probabilities of Chen et al. 2022, eq. 7; they add up to `size` where so many are not 0.

    >>> least_variance(np.array([1.0, 9.0, 1.0]), 2)
    array([0.5, 1. , 0.5])
    """
    num = len(sizes_K)
    if size >= num or not sizes_K.any():
        return np.full(num, min(1.0, size / num))
    order = np.argsort(sizes_K, kind="stable")
    sums = np.cumsum(sizes_K[order])
    left = size - num + np.arange(1, num + 1)  # m + l - n, for l = 1 to n
    fits = (left > 0) & (left * sizes_K[order] <= sums * (1 + 1e-12))
    last = int(np.flatnonzero(fits).max())
    p_K, small = np.ones(num), order[: last + 1]
    p_K[small] = left[last] * (sizes_K[small] / sums[last] if sums[last] > 0 else 1 / len(small))
    return np.minimum(p_K, 1.0)


NORMS = {"norm": Norm, "optimal": Optimal}
