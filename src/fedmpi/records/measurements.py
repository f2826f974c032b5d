"""Measurements: extra figures of a round, for its record only. One class per measurement."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from fedmpi.components import Family, component
from fedmpi.outcome import RoundOutcome


def spread(values_K: np.ndarray, maximize: bool) -> dict[str, float] | None:
    """How unequal a metric is over silos, all with equal weight: standard deviation, and the worst tenth percentile
    (`p10` if higher is better, `p90` if lower is). None without a finite value.

    >>> spread(np.array([0.5, 0.5, 1.0, 1.0]), True)
    {'std': 0.25, 'p10': 0.5}
    """
    finite = values_K[np.isfinite(values_K)]
    if not finite.size:
        return None
    percent = 10 if maximize else 90
    return {"std": float(finite.std()), f"p{percent}": float(np.percentile(finite, percent))}


def gradient_diversity(gram_KK: np.ndarray, silos: Sequence[str] | None = None) -> dict[str, Any]:
    """Similarity of K deltas, from their inner products: gradient diversity, sum_k |delta_k|^2 / |sum_k delta_k|^2 (Yin
    et al. 2018, Gradient Diversity, Definition 1), 1/K for equal deltas, 1 for orthogonal ones; the mean and smallest
    cosine of two deltas; with `silos` all cosines, in that order. None if a delta or the sum is 0.

    >>> gradient_diversity(np.array([[1.0, 0.0], [0.0, 4.0]]))
    {'diversity': 1.0, 'cosine': {'mean': 0.0, 'min': 0.0}}
    """
    norms_K = np.sqrt(np.diag(gram_KK))
    moves = norms_K > 0
    outer = np.outer(norms_K, norms_K)
    cosines_KK = np.divide(gram_KK, outer, out=np.full_like(gram_KK, np.nan), where=outer > 0).clip(-1, 1)
    pairs = cosines_KK[np.triu_indices(len(gram_KK), 1)]
    pairs = pairs[~np.isnan(pairs)]
    whole = float(gram_KK.sum())
    found: dict[str, Any] = {"diversity": float(np.trace(gram_KK)) / whole if moves.any() and whole > 0 else None}
    found["cosine"] = {"mean": float(pairs.mean()), "min": float(pairs.min())} if pairs.size else None
    if silos is not None:
        rows = [[None if math.isnan(value) else value for value in row] for row in cosines_KK.tolist()]
        found["cosines"] = {"silos": list(silos), "rows": rows}
    return found


class Measurement:
    """Figures measured in every round. Members define `of`, `needs` and `reads`."""

    needs: ClassVar[frozenset[str]] = frozenset()  # gram: the outcome must hold the deltas' inner products
    # Arrays of the outcome that it reads: loss, norm, samples, steps, taken, metric, gram. None: unknown.
    reads: ClassVar[frozenset[str] | None] = None

    @abstractmethod
    def of(self, outcome: RoundOutcome) -> dict[str, Any]:
        """Fields for the record."""
        ...


@component
class Gram(Measurement):
    """Similarity of the silos' deltas: gradient diversity and cosines (Yin et al. 2018, Gradient Diversity,
    Definition 1, with deltas instead of gradients)."""

    needs = reads = frozenset({"gram"})

    matrix: bool = False
    """record all cosines, not only their mean and minimum"""

    def of(self, outcome: RoundOutcome) -> dict[str, Any]:
        assert outcome.gram_KK is not None
        return gradient_diversity(outcome.gram_KK, outcome.names(outcome.taken_K) if self.matrix else None)


@component
class Dissimilarity(Measurement):
    """Variance of the silos' deltas: the mean of |delta_k - mean delta|^2 over the K accepted ones, with equal weight
    (Li et al. 2020, Federated Optimization in Heterogeneous Networks, section 5.3.3, with deltas instead of gradients).

    >>> outcome = RoundOutcome.of("ab", 1, "ab", gram_KK=np.array([[1.0, 0.0], [0.0, 9.0]]))
    >>> Dissimilarity().of(outcome)
    {'dissimilarity': 2.5}
    """

    needs = reads = frozenset({"gram"})

    def of(self, outcome: RoundOutcome) -> dict[str, Any]:
        gram_KK = outcome.gram_KK
        assert gram_KK is not None
        num = len(gram_KK)
        return {"dissimilarity": max(0.0, float(np.trace(gram_KK) / num - gram_KK.sum() / num**2)) if num else None}


MEASUREMENTS = Family("measurement", {"gram": Gram, "dissimilarity": Dissimilarity}, Measurement, defaults=True)
