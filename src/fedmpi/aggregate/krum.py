"""Rules that select the silos whose deltas are closest to most others, by distances between whole deltas."""

from __future__ import annotations

import numpy as np
import torch

from fedmpi.aggregate.base import Aggregator, Cohort, State, Weights, distances, enough
from fedmpi.components import NonNegativeInt, PositiveInt, component
from fedmpi.errors import ConfigError


def scores(squares_KK: np.ndarray, hostile: int) -> np.ndarray:
    """Krum scores [K]: for each row, the sum of squared distances to its K - f - 2 nearest others (at least one)."""
    apart_KK = squares_KK.copy()
    np.fill_diagonal(apart_KK, np.inf)
    num_near = max(1, len(apart_KK) - hostile - 2)
    scores_K: np.ndarray = np.sort(apart_KK, axis=1)[:, :num_near].sum(axis=1)
    return scores_K


@component
class Krum(Aggregator):
    """Krum: the delta with the least sum of squared distances to its K - f - 2 nearest others (Blanchard et al. 2017,
    Machine Learning with Adversaries, section 3). On a tie, the first in federation order.

    Robust against f hostile silos if K >= 2 f + 3 and honest deltas differ by less than what they have in common.
    """

    needs = "gram"

    hostile: NonNegativeInt
    """f: silos that may send anything"""

    def row_weights(self, gram_KK: np.ndarray | None, cohort: Cohort, state: State) -> tuple[Weights, State]:
        """1 for the selected silo, 0 for the others, [K]."""
        assert gram_KK is not None
        weights_K = np.zeros(len(gram_KK))
        weights_K[np.argmin(scores(distances(gram_KK), self.hostile))] = 1.0
        return weights_K, state

    def suits(self, num_silos: int) -> None:
        """Raises ConfigError for fewer than 2 f + 3 silos."""
        enough("krum", self.hostile, 2 * self.hostile + 3, num_silos)


@component
class MultiKrum(Aggregator):
    """Multi-Krum: the mean of the m deltas with the lowest Krum scores (Blanchard et al. 2017, section 4)."""

    needs = "gram"

    hostile: NonNegativeInt
    """f: silos that may send anything"""
    m: PositiveInt | None = None
    """number of deltas averaged; null: K - f"""

    def row_weights(self, gram_KK: np.ndarray | None, cohort: Cohort, state: State) -> tuple[Weights, State]:
        """1/m for the selected silos, 0 for the others, [K]."""
        assert gram_KK is not None
        m = len(gram_KK) - self.hostile if self.m is None else self.m
        weights_K = np.zeros(len(gram_KK))
        weights_K[np.argsort(scores(distances(gram_KK), self.hostile), kind="stable")[:m]] = 1 / m
        return weights_K, state

    def suits(self, num_silos: int) -> None:
        """Raises ConfigError for fewer than 2 f + 3 silos, or if m is above K - f."""
        enough("multi_krum", self.hostile, 2 * self.hostile + 3, num_silos)
        if self.m is not None and self.m > num_silos - self.hostile:
            raise ConfigError(
                f"aggregate.m: multi_krum would average {self.m} of {num_silos} silos, {self.hostile} of them hostile; "
                f"take {num_silos - self.hostile} or less"
            )


@component
class Bulyan(Aggregator):
    """Bulyan of Krum: repeats Krum until K - 2 f deltas are selected; then takes, per coordinate, the mean of the
    K - 4 f values nearest to their median (El Mhamdi et al. 2018, The Hidden Vulnerability of Distributed Learning in
    Byzantium, section 4).

    Robust against f hostile silos if K >= 4 f + 3, in every coordinate. Deviation: the number of nearest others in the
    Krum score is at least one, also when few deltas are left.
    """

    needs = "gram"

    hostile: NonNegativeInt
    """f: silos that may send anything"""

    def row_weights(self, gram_KK: np.ndarray | None, cohort: Cohort, state: State) -> tuple[Weights, State]:
        """Which rows are selected: booleans [K]."""
        assert gram_KK is not None
        squares_KK, left = distances(gram_KK), np.arange(len(gram_KK))
        while len(left) > 2 * self.hostile:
            left = np.delete(left, np.argmin(scores(squares_KK[np.ix_(left, left)], self.hostile)))
        chosen_K = np.ones(len(gram_KK), dtype=bool)
        chosen_K[left] = False
        return chosen_K, state

    def combine(self, rows_KS: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Mean of the selected rows' values nearest to their median, [S]."""
        ordered_CS = rows_KS[torch.from_numpy(weights).to(rows_KS.device)].sort(dim=0).values
        num = len(ordered_CS)
        median_S = (ordered_CS[(num - 1) // 2] + ordered_CS[num // 2]) / 2
        nearest_CS = (ordered_CS - median_S).abs().argsort(dim=0, stable=True)
        return ordered_CS.gather(0, nearest_CS[: num - 2 * self.hostile]).mean(dim=0)

    def suits(self, num_silos: int) -> None:
        """Raises ConfigError for fewer than 4 f + 3 silos."""
        enough("bulyan", self.hostile, 4 * self.hostile + 3, num_silos)


MEMBERS = {"krum": Krum, "multi_krum": MultiKrum, "bulyan": Bulyan}
