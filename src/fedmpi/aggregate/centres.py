"""Rules that let a delta count for less the farther it is away. They iterate on inner products alone."""

from __future__ import annotations

import math

import numpy as np

from fedmpi.aggregate.base import Aggregator, Cohort, State, Weights, distances_from, enough
from fedmpi.components import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, component


@component
class GeometricMedian(Aggregator):
    """The point with the least sum of distances to all deltas, by smoothed Weiszfeld steps from 0 (Pillutla et al.
    2022, Robust Aggregation for Federated Learning, Algorithm 2): v = sum_k b_k x_k / sum_k b_k with
    b_k = 1 / max(nu, |x_k - v|).

    Holds against less than half of the silos. Deviations: every silo has the same weight; 100 steps in place of about
    three, since a step costs no message here.
    """

    needs = "gram"

    hostile: NonNegativeInt = 0
    """silos that may send anything; fewer than half"""
    iterations: PositiveInt = 100
    """Weiszfeld steps"""
    smoothing: PositiveFloat = 1e-6
    """nu: a distance below it counts as it"""

    def row_weights(self, gram_KK: np.ndarray | None, cohort: Cohort, state: State) -> tuple[Weights, State]:
        """b_k over their sum."""
        assert gram_KK is not None
        weights_K = np.zeros(len(gram_KK))
        for _ in range(self.iterations):
            weights_K = 1 / np.maximum(self.smoothing, distances_from(weights_K, gram_KK))
            weights_K /= weights_K.sum()
        return weights_K, state

    def suits(self, num_silos: int) -> None:
        """ConfigError where so many silos are not the more."""
        enough("geometric_median", self.hostile, 2 * self.hostile + 1, num_silos)


@component
class CenteredClipping(Aggregator):
    """From the last round's result v on the mean of what is clipped around it (Karimireddy et al. 2021, Learning from
    History for Byzantine Robust Optimization, section 4): v + 1/K sum_k (x_k - v) min(1, tau/|x_k - v|).

    The first v is 0. It is a vector that is kept like the server's state. Silos with momentum of their own
    (local.keep_optimizer) are the paper's.
    """

    needs = "gram"
    centre = True

    hostile: NonNegativeInt = 0
    """silos that may send anything; fewer than half"""
    tau: PositiveFloat = 10.0
    """clipping radius, in units of the delta's norm"""
    iterations: PositiveInt = 1
    """times that v moves in a round"""

    def row_weights(self, gram_KK: np.ndarray | None, cohort: Cohort, state: State) -> tuple[Weights, State]:
        """What the new v is made of: the silos' deltas and the old v, [K + 1]."""
        assert gram_KK is not None
        num = len(gram_KK) - 1
        weights_K = np.zeros(num + 1)
        weights_K[-1] = 1.0
        for _ in range(self.iterations):
            kept_K = _clipped(distances_from(weights_K, gram_KK)[:num], self.tau) / num
            weights_K *= 1 - kept_K.sum()
            weights_K[:num] += kept_K
        return weights_K, state

    def suits(self, num_silos: int) -> None:
        """ConfigError where so many silos are not the more."""
        enough("centered_clipping", self.hostile, 2 * self.hostile + 1, num_silos)


@component
class NormBound(Aggregator):
    """The mean of deltas that are shortened to a norm C where they are longer (Sun et al. 2019, Can You Really Backdoor
    Federated Learning?, section 4: norm thresholding): 1/K sum_k x_k min(1, C/|x_k|).

    With a `quantile` C follows the norms (Andrew et al. 2021, Differentially Private Learning with Adaptive Clipping,
    Algorithm 1 without noise; `next_bound`).
    """

    needs = "gram"

    hostile: NonNegativeInt = 0
    """silos that may send anything; fewer than half"""
    norm: PositiveFloat = 1.0
    """C; with a quantile the first one"""
    quantile: Fraction | None = None
    """share of deltas that C is to leave as they are; null: C stays"""
    rate: NonNegativeFloat = 0.2
    """how fast C follows"""

    def init(self) -> State:
        """C."""
        return {} if self.quantile is None else {"norm": np.array(self.norm)}

    def row_weights(self, gram_KK: np.ndarray | None, cohort: Cohort, state: State) -> tuple[Weights, State]:
        """min(1, C/|x_k|) / K."""
        assert gram_KK is not None
        norms_K = np.sqrt(np.diag(gram_KK))
        bound = float(state.get("norm", self.norm))
        if self.quantile is not None:
            state = {"norm": np.array(next_bound(bound, norms_K, self.quantile, self.rate))}
        return _clipped(norms_K, bound) / len(norms_K), state

    def suits(self, num_silos: int) -> None:
        """ConfigError where so many silos are not the more."""
        enough("norm_bound", self.hostile, 2 * self.hostile + 1, num_silos)


def next_bound(bound: float, norms_N: np.ndarray, quantile: float, rate: float) -> float:
    """C exp(-rate (b - quantile)) after a round in which the share b of norms was at most C: C moves to that quantile
    of the norms (Andrew et al. 2021, Algorithm 1, without its noise on b). Twelve digits: exp's last bit depends on the
    processor."""
    return float(f"{bound * math.exp(-rate * (float(np.mean(norms_N <= bound)) - quantile)):.12g}")


def _clipped(lengths_K: np.ndarray, most: float) -> np.ndarray:
    """What a vector of each length is multiplied with to be no longer than `most`."""
    factors_K: np.ndarray = most / np.maximum(lengths_K, most)
    return factors_K


MEMBERS = {"geometric_median": GeometricMedian, "centered_clipping": CenteredClipping, "norm_bound": NormBound}
