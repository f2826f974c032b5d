"""Selectors that draw silos by the norms of their updates: silos with larger updates are drawn more often and counted
less.

The norm is that of the delta in the silo's last round; a silo that has not taken part yet gets the largest known norm.
This needs no message. The aggregate is unbiased for any norms, because factors use the probabilities of the draw. Old
norms, and `aggregate.weights` other than samples (n_k is assumed), only increase the variance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmpi.components import PositiveFraction, component
from fedmpi.outcome import RoundOutcome
from fedmpi.selection.base import Part, Selection, State, cohort_of, mixed, newest, with_replacement


@component
class _ByNorm(Part):
    """Base class: keeps the norm of each silo's last delta as state."""

    unbiased = True
    reads = frozenset({"norm"})

    floor: PositiveFraction = 0.1
    """share of the probability that is uniform, so that no silo has 0"""

    def least(self, ids: Sequence[str], rounds: int) -> int:
        """1: the number of different silos is random."""
        return 1

    def init(self, num_train: Sequence[int]) -> State:
        n_K = np.asarray(num_train, dtype=np.float64)
        return {"num_train": n_K, "norm": np.full(len(n_K), np.nan)}

    def observe(self, ids: Sequence[str], state: State, outcome: RoundOutcome | None) -> State:
        """The state with the norms of the last round."""
        return state if outcome is None else {**state, "norm": newest(state["norm"], outcome.norm_K)}

    def sizes(self, state: State) -> np.ndarray:
        """n_k |delta_k|, [K]; silos without a norm get the largest norm."""
        norm_K = state["norm"]
        heard = ~np.isnan(norm_K)
        return state["num_train"] * np.where(heard, norm_K, norm_K[heard].max() if heard.any() else 1.0)


@component
class Norm(_ByNorm):
    """S = max(1, round(C K)) draws with replacement, p_k = floor/K + (1 - floor) n_k |delta_k| / sum (importance
    sampling by norms of gradients, Zhao and Zhang 2015, Stochastic Optimization with Importance Sampling, with the
    uniform part of Needell et al. 2014, section 4).

    UNBIASED: a silo drawn m times counts m / (S p_k). The norm is that of the silo's last participation.
    """

    def select(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> Selection:
        return with_replacement(ids, state, mixed(self.sizes(state), self.floor), self.size(len(ids)), rng)


@component
class Optimal(_ByNorm):
    """Optimal client sampling (Chen, Horvath, Richtarik 2022, Algorithm 1, eq. 7): each silo independently with
    probability p_i, m = max(1, round(C K)) expected, where the p_i minimise the variance for given w_i |U_i|.

    UNBIASED: each counts 1/p_i. Deviations: norms are from the silos' last rounds, whereas in the paper all silos train
    and send their norms first; a share `floor` of p_i is m/K, so that an old norm of 0 does not exclude a silo; an
    empty draw is repeated, and factors are (1 - P(empty)) / p_i.
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
    """The probabilities of Chen et al. 2022, eq. 7, [K]; they sum to `size` if at least that many are not 0.

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
