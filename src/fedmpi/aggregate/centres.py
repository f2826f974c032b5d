"""Robust centres: the farther away a delta is, the less it counts. Iterations run on inner products alone."""

from __future__ import annotations

import math

import numpy as np

from fedmpi.aggregate.base import Aggregator, Cohort, State, Weights, distances_from, enough
from fedmpi.components import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, component


@component
class GeometricMedian(Aggregator):
    """Geometric median: the point with the least sum of distances to all deltas, by smoothed Weiszfeld steps from 0
    (Pillutla et al. 2022, Robust Aggregation for Federated Learning, Algorithm 2): v = sum_k b_k x_k / sum_k b_k with
    b_k = 1 / max(nu, |x_k - v|).

    Robust if fewer than half of the silos are hostile. Deviations: all silos have equal weight; 100 steps instead of
    about three, since a step costs no message here.
    """

    needs = "gram"

    hostile: NonNegativeInt = 0
    """silos that may send anything; fewer than half"""
    iterations: PositiveInt = 100
    """Weiszfeld steps"""
    smoothing: PositiveFloat = 1e-6
    """nu: smaller distances are replaced by it"""

    def row_weights(self, gram_KK: np.ndarray | None, cohort: Cohort, state: State) -> tuple[Weights, State]:
        """b_k divided by their sum, [K]."""
        assert gram_KK is not None
        weights_K = np.zeros(len(gram_KK))
        for _ in range(self.iterations):
            weights_K = 1 / np.maximum(self.smoothing, distances_from(weights_K, gram_KK))
            weights_K /= weights_K.sum()
        return weights_K, state

    def suits(self, num_silos: int) -> None:
        """Raises ConfigError unless most silos are honest."""
        enough("geometric_median", self.hostile, 2 * self.hostile + 1, num_silos)


@component
class CenteredClipping(Aggregator):
    """Moves the last round's result v by the mean of the differences to it, each clipped to tau (Karimireddy et al.
    2021, Learning from History for Byzantine Robust Optimization, section 4):
    v + 1/K sum_k (x_k - v) min(1, tau/|x_k - v|).

    v starts at 0 and is stored like the server's state. The paper assumes silos with momentum of their own
    (local.keep_optimizer).
    """

    needs = "gram"
    centre = True

    hostile: NonNegativeInt = 0
    """silos that may send anything; fewer than half"""
    tau: PositiveFloat = 10.0
    """clipping radius, in units of the delta's norm"""
    iterations: PositiveInt = 1
    """updates of v per round"""

    def row_weights(self, gram_KK: np.ndarray | None, cohort: Cohort, state: State) -> tuple[Weights, State]:
        """Weights of the silos' deltas and, last, of the old v, [K + 1]."""
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
        """Raises ConfigError unless most silos are honest."""
        enough("centered_clipping", self.hostile, 2 * self.hostile + 1, num_silos)


@component
class NormBound(Aggregator):
    """The mean of deltas clipped to norm C (Sun et al. 2019, Can You Really Backdoor Federated Learning?, section 4:
    norm thresholding): 1/K sum_k x_k min(1, C/|x_k|).

    With a `quantile`, C follows that quantile of the norms (Andrew et al. 2021, Differentially Private Learning with
    Adaptive Clipping, Algorithm 1 without noise; `next_bound`).
    """

    needs = "gram"

    hostile: NonNegativeInt = 0
    """silos that may send anything; fewer than half"""
    norm: PositiveFloat = 1.0
    """C; with a quantile, its initial value"""
    quantile: Fraction | None = None
    """share of deltas that C should leave unclipped; null: C is constant"""
    rate: NonNegativeFloat = 0.2
    """learning rate of C"""

    def init(self) -> State:
        """C, if it adapts."""
        return {} if self.quantile is None else {"norm": np.array(self.norm)}

    def row_weights(self, gram_KK: np.ndarray | None, cohort: Cohort, state: State) -> tuple[Weights, State]:
        """min(1, C/|x_k|) / K, [K]."""
        assert gram_KK is not None
        norms_K = np.sqrt(np.diag(gram_KK))
        bound = float(state.get("norm", self.norm))
        if self.quantile is not None:
            state = {"norm": np.array(next_bound(bound, norms_K, self.quantile, self.rate))}
        return _clipped(norms_K, bound) / len(norms_K), state

    def suits(self, num_silos: int) -> None:
        """Raises ConfigError unless most silos are honest."""
        enough("norm_bound", self.hostile, 2 * self.hostile + 1, num_silos)


def next_bound(bound: float, norms_N: np.ndarray, quantile: float, rate: float) -> float:
    """The bound for the next round: C exp(-rate (b - quantile)), where b is the share of norms [N] that were at most C.

    C moves to that quantile of the norms (Andrew et al. 2021, Algorithm 1, without its noise on b). Rounded to twelve
    digits, because the last bit of exp depends on the processor."""
    return float(f"{bound * math.exp(-rate * (float(np.mean(norms_N <= bound)) - quantile)):.12g}")


def _clipped(lengths_K: np.ndarray, most: float) -> np.ndarray:
    """Factors [K] that clip vectors of these lengths to at most `most`."""
    factors_K: np.ndarray = most / np.maximum(lengths_K, most)
    return factors_K


MEMBERS = {"geometric_median": GeometricMedian, "centered_clipping": CenteredClipping, "norm_bound": NormBound}
