"""Weighted means: of the deltas themselves, normalised by local steps, or weighted by the silos' losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch  # noqa: F401  for the doctest

from fedmpi.aggregate.base import Aggregator, CohortSummary
from fedmpi.components import NonNegativeFloat, PositiveFloat, PositiveInt, component
from fedmpi.errors import ConfigError
from fedmpi.types import Contribution

if TYPE_CHECKING:
    from fedmpi.config import Config


@component
class Mean(Aggregator):
    """The weighted mean: sum_k (n_k/n) delta_k over the cohort (McMahan et al. 2017, Algorithm 1).

    Algorithm 1 as first printed divides by the samples of all silos; its later version, common implementations and this
    class divide by the cohort's. If a selector gives factors (1/probability), the divisor is the sum over all silos.

    >>> Mean().base("a", 200), Mean(weights="uniform").base("a", 200), Mean(weights={"a": 3.0}).base("a", 200)
    (200.0, 1.0, 3.0)
    """

    reads = frozenset[str]()  # nothing per silo

    weights: Literal["samples", "uniform", "steps"] | dict[str, PositiveFloat] = "samples"
    """samples: n_k; uniform: the same for every silo; steps: local steps of the round; or your own, by silo id"""
    max_samples: PositiveInt | None = None
    """with weights by samples: larger silos weigh as if they had so many"""

    def conflicts(self, config: Config) -> str | None:
        """Refuses `steps` with fragments: steps are counted per round."""
        if self.weights == "steps" and config.exchange.fragments > 1:
            return "aggregate: weights: steps counts those of one round, and a fragment holds several rounds of a silo"
        return super().conflicts(config)

    @property
    def counts_steps(self) -> bool:
        return self.weights == "steps"

    @property
    def refuses_factors(self) -> str:
        """Steps are known only for the silos whose deltas arrived."""
        return "weights: steps divides by the steps of the cohort" if self.weights == "steps" else ""

    @property
    def refuses_partial(self) -> str:
        """Step counts as weights favour the silos that take more steps."""
        return "weights: steps counts a silo that took fewer steps for less" if self.weights == "steps" else ""

    def base(self, silo: str, num_samples: int) -> float:
        """n_k, 1, or the user's weight. Raises ConfigError for a silo without a weight."""
        if isinstance(self.weights, dict):
            if silo not in self.weights:
                raise ConfigError(f"aggregate.weights: silo '{silo}' has none")
            return self.weights[silo]
        if self.weights != "samples":
            return 1.0
        return float(num_samples if self.max_samples is None else min(num_samples, self.max_samples))

    def weight(self, contribution: Contribution) -> float:
        """Base times the selector's factor, times the local steps if `weights: steps`."""
        return contribution.weight * (contribution.num_steps if self.weights == "steps" else 1)

    def scale(self, heard: CohortSummary) -> float:
        """1 if the weights of the silos that answered add up to the whole."""
        return 1.0 if self.weights == "steps" else float(heard.weights.sum()) / heard.total


@component
class FedNova(Aggregator):
    """Normalised averaging (Wang et al. 2020, Tackling the Objective Inconsistency Problem, Algorithm 1 and eq. 8-9):
    w + tau_eff sum_k p_k delta_k / |a_k|_1, tau_eff = sum_k p_k |a_k|_1, p_k the silo's share of the cohort's weight.

    |a_k|_1 is the gradient weight that the local rule reports: the number of steps, adjusted for momentum and a
    proximal term; for optimizers that are not linear in the gradients (Adam), the number of steps. More local steps do
    not give a silo more weight; with equal steps the result is the mean.
    """

    reads = frozenset[str]()  # nothing per silo
    refuses_factors = "it multiplies two sums over the cohort, and the product of two estimates is biased"
    refuses_partial = ""
    normalises = True
    scaled = True

    weights: Literal["samples", "uniform"] = "samples"
    """p_k: by n_k, or the same for every silo"""

    def conflicts(self, config: Config) -> str | None:
        """Refuses optimizers kept between rounds: it must know how many gradients a delta contains."""
        if config.local.carries_over:
            return (
                "aggregate: fednova divides by the gradients that a round's delta holds, and with "
                "local.keep_optimizer momentum carries earlier rounds' into it"
            )
        return super().conflicts(config)

    def base(self, silo: str, num_samples: int) -> float:
        """n_k, or 1."""
        return float(num_samples) if self.weights == "samples" else 1.0

    def weight(self, contribution: Contribution) -> float:
        """p_k / |a_k|_1."""
        return contribution.weight / contribution.num_gradients

    def scale(self, heard: CohortSummary) -> float:
        """tau_eff times the factor that turns the mean under the sent weights into the sum of eq. 8."""
        tau_eff = float((heard.weights * heard.normalizers).sum()) / heard.total
        return tau_eff * float(heard.sent.sum()) / heard.total


@component
class Qffl(Aggregator):
    """q-FedAvg (Li et al. 2020, Fair Resource Allocation in Federated Learning, Algorithm 2): a silo counts the more,
    the higher its loss F_k of the global parameters: w + sum_k F_k^q L delta_k / sum_k h_k with
    h_k = q F_k^(q-1) |L delta_k|^2 + L F_k^q and L = 1/lr.

    q = 0 is the unweighted mean over silos; a large q approaches minimax fairness. F_k is evaluated on all training
    samples of the silo before it trains. As in the authors' code, 1e-10 is added to F_k. Deviation: Algorithm 2 samples
    silos in proportion to n_k; here all take part, or a uniform sample. Selectors that weight by 1/probability are
    refused, since the sum is divided by the cohort's.

    >>> Qffl(lr=0.1).weight(Contribution("a", 1, 1.0, torch.ones(1), 0.0, 1, 1, start_loss=2.0))
    2.0000000001
    """

    start_loss = True
    scaled = True
    reads = frozenset({"start_loss", "norm"})
    refuses_factors = "it divides by a sum over the cohort, which is not known of all silos"

    q: NonNegativeFloat = 1.0
    """strength of fairness; 0: none"""
    lr: PositiveFloat
    """1/L: the silos' learning rate"""

    def base(self, silo: str, num_samples: int) -> float:
        """1 for every silo."""
        return 1.0

    def weight(self, contribution: Contribution) -> float:
        """F_k^q; not finite if the loss is not, and the update is then rejected."""
        return float(self._powers(np.array([contribution.start_loss]), self.q)[0])

    def scale(self, heard: CohortSummary) -> float:
        """L / sum_k h_k, times the factor that turns the mean under the sent weights into their sum."""
        steepness = 1 / self.lr
        squares = (steepness * heard.norms) ** 2
        h = steepness * heard.sent
        if self.q:
            h += self.q * self._powers(heard.start_losses, self.q - 1) * squares
        return steepness * float(heard.sent.sum()) / float(h.sum())

    @staticmethod
    def _powers(losses: np.ndarray, q: float) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.float_power(losses + 1e-10, q)


MEMBERS = {"mean": Mean, "fednova": FedNova, "qffl": Qffl}
