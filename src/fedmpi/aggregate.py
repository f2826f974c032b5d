"""Aggregators: how deltas become one.

The mean needs only the sum of weighted deltas, so ranks fold their silos before anything is sent. The others read each
delta (`exchange.scope: silo`), coordinate by coordinate: where the plan is sharded, the owner of a piece sees what all
silos sent of it, and nobody holds K whole vectors. They give every silo one vote, whatever its samples.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import pydantic
import torch

from fedmpi.components import Family, NonNegativeFloat, PositiveFloat, component
from fedmpi.errors import ConfigError
from fedmpi.types import Contribution


class CohortSummary(NamedTuple):
    """What is known of the silos that were heard in a round, on every rank, in the federation's order: arrays [S]."""

    weights: np.ndarray  # what each stands for: its share of the federation times the selector's factor
    sent: np.ndarray  # the weights that the deltas were added with, `Aggregator.weight`
    normalizers: np.ndarray  # Contribution.normalizer
    start_losses: np.ndarray
    norms: np.ndarray  # of the deltas
    total: float  # what the weights are to be divided by: their own sum, or that of all silos where factors are given


class Aggregator(Protocol):
    """How deltas become one.

    What is added up is weight(contribution) * delta; what the server's optimizer gets is the mean under these weights,
    times `scale` of all that were heard. An aggregator that reads each delta has a method
    `combine(rows_KS, weights_K) -> row_S` besides, over any slice S of the coordinates; one with `start_loss` set finds
    the loss of the global parameters on the silo's training samples in the contribution.

    `reads` says what `scale` looks at of each silo: `norm`, `start_loss`; where it is empty, `scale` gives the same
    for the silos' sums and means (`disclose`). `refuses_factors` says why a selector's factors (1/probability)
    would not make it unbiased; `scaled` is set where `scale` is more than their sum's share: of one round's silos,
    so that it does not go over several rounds; `suits(num_silos)` raises ConfigError where cohorts of so many silos
    are too small for it: it is asked of the smallest cohort that the selector may give, and each round of the silos
    that were heard.
    """

    def base(self, silo: str, num_samples: int) -> float:
        """What a silo stands for in the federation, given its number of training samples."""
        ...

    def weight(self, contribution: Contribution) -> float:
        """What the silo's delta is added with; `contribution.weight` is its base times the selector's factor."""
        ...

    def scale(self, heard: CohortSummary) -> float:
        """What the mean is multiplied with."""
        ...


@component
class Mean:
    """The weighted mean: sum_k (n_k/n) delta_k over the cohort (McMahan et al. 2017, Algorithm 1).

    Algorithm 1 as first printed divides by the samples of all silos; like its later version and everybody's code this
    divides by the cohort's. Where a selector gives factors (1/probability), it divides by those of all silos.

    >>> Mean().base("a", 200), Mean(weights="uniform").base("a", 200), Mean(weights={"a": 3.0}).base("a", 200)
    (200.0, 1.0, 3.0)
    """

    reads: ClassVar[frozenset[str]] = frozenset()  # of single silos

    # n_k; every silo the same; the steps that it took in the round; or your own, by silo id
    weights: Literal["samples", "uniform", "steps"] | dict[str, PositiveFloat] = "samples"

    @property
    def refuses_factors(self) -> str:
        """Steps are known only of the silos that were heard."""
        return "weights: steps divides by the steps of the cohort" if self.weights == "steps" else ""

    def base(self, silo: str, num_samples: int) -> float:
        """n_k, 1, or the user's number. ConfigError for a silo that the user has left out."""
        if isinstance(self.weights, dict):
            if silo not in self.weights:
                raise ConfigError(f"aggregate.weights: silo '{silo}' has none")
            return self.weights[silo]
        return float(num_samples) if self.weights == "samples" else 1.0

    def weight(self, contribution: Contribution) -> float:
        """The base, or the steps taken."""
        return contribution.weight * (contribution.num_steps if self.weights == "steps" else 1)

    def scale(self, heard: CohortSummary) -> float:
        """1 where the weights of those that were heard add up to the whole."""
        return 1.0 if self.weights == "steps" else float(heard.weights.sum()) / heard.total


@component
class FedNova:
    """Normalised averaging (Wang et al. 2020, Tackling the Objective Inconsistency Problem, Algorithm 1 and eq. 8-9):
    w + tau_eff sum_k p_k delta_k / |a_k|_1, tau_eff = sum_k p_k |a_k|_1, p_k the silo's share of the cohort's weight.

    |a_k|_1 is what the local rule says its delta holds of gradients: the steps taken, or what momentum and a proximal
    term make of them; of optimizers that are not linear in the gradients (Adam) it is the steps. A silo that takes more
    steps counts for no more; with equal steps it is the mean.
    """

    reads: ClassVar[frozenset[str]] = frozenset()  # of single silos
    refuses_factors = "it multiplies two sums over the cohort, and the product of two estimates is biased"
    scaled = True

    weights: Literal["samples", "uniform"] = "samples"  # p_k by n_k, or every silo the same

    def base(self, silo: str, num_samples: int) -> float:
        """n_k, or 1."""
        return float(num_samples) if self.weights == "samples" else 1.0

    def weight(self, contribution: Contribution) -> float:
        """p_k / |a_k|_1."""
        return contribution.weight / contribution.num_gradients

    def scale(self, heard: CohortSummary) -> float:
        """tau_eff, and what turns the mean under the sent weights into their sum."""
        tau_eff = float((heard.weights * heard.normalizers).sum()) / heard.total
        return tau_eff * float(heard.sent.sum()) / heard.total


@component
class Qffl:
    """q-FedAvg (Li et al. 2020, Fair Resource Allocation in Federated Learning, Algorithm 2): the higher a silo's loss
    F_k of the global parameters, the more it counts, w + sum_k F_k^q L delta_k / sum_k h_k with
    h_k = q F_k^(q-1) |L delta_k|^2 + L F_k^q and L = 1/lr.

    q = 0 is the mean over silos, each alike; a large q leads to minimax fairness. F_k is evaluated on all training
    samples of the silo before it trains. As in the authors' code 1e-10 is added to F_k. Deviation: Algorithm 2 draws
    silos in proportion to n_k, here they are all, or drawn alike: a selector that counts them by 1/probability is not
    for a sum that is divided by the cohort's.

    >>> Qffl(lr=0.1).weight(Contribution("a", 1, 1.0, torch.ones(1), 0.0, 1, 1, start_loss=2.0))
    2.0000000001
    """

    start_loss = True
    scaled = True
    reads: ClassVar[frozenset[str]] = frozenset({"start_loss", "norm"})
    refuses_factors = "it divides by a sum over the cohort, which is not known of all silos"

    q: NonNegativeFloat = 1.0  # how much fairness counts
    lr: PositiveFloat  # 1/L: the silos' learning rate

    def base(self, silo: str, num_samples: int) -> float:
        """Every silo alike."""
        return 1.0

    def weight(self, contribution: Contribution) -> float:
        """F_k^q; not finite where the loss is not, and the update is then rejected."""
        return float(self._powers(np.array([contribution.start_loss]), self.q)[0])

    def scale(self, heard: CohortSummary) -> float:
        """L / sum_k h_k, and what turns the mean under the sent weights into their sum."""
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


class _Votes:
    """One vote for every silo."""

    reads: ClassVar[frozenset[str]] = frozenset({"delta"})
    refuses_factors = "every silo has one vote"

    def base(self, silo: str, num_samples: int) -> float:
        """One vote."""
        return 1.0

    def weight(self, contribution: Contribution) -> float:
        """One vote."""
        return 1.0

    def scale(self, heard: CohortSummary) -> float:
        """As it is."""
        return 1.0


@component
class Median(_Votes):
    """The coordinate-wise median; of an even number the middle two's mean (Yin et al. 2018, Algorithm 1, Option I).

    Holds against less than half of the silos sending anything at all.

    >>> Median().combine(torch.tensor([[1.0], [9.0], [2.0]]), torch.ones(3))
    tensor([2.])
    """

    def combine(self, rows_KS: torch.Tensor, weights_K: torch.Tensor) -> torch.Tensor:
        """Of K rows one."""
        ordered = rows_KS.sort(dim=0).values
        k = len(ordered)
        return (ordered[(k - 1) // 2] + ordered[k // 2]) / 2


@component
class TrimmedMean(_Votes):
    """The coordinate-wise mean without the largest and the smallest (Yin et al. 2018, Algorithm 1, Option II).

    Holds against up to `fraction` of the silos sending anything at all; floor(fraction K) are left out at each end.

    >>> TrimmedMean(fraction=0.25).combine(torch.tensor([[1.0], [2.0], [4.0], [99.0]]), torch.ones(4))
    tensor([3.])
    """

    # beta: of the silos, left out at each end, rounded down
    fraction: Annotated[float, pydantic.Field(ge=0, lt=0.5)] = 0.1

    def combine(self, rows_KS: torch.Tensor, weights_K: torch.Tensor) -> torch.Tensor:
        """Of K rows one."""
        out = self._out(len(rows_KS))
        return rows_KS.sort(dim=0).values[out : len(rows_KS) - out].mean(dim=0)

    def suits(self, num_silos: int) -> None:
        """ConfigError where so many silos are too few for anything to be left out."""
        if self.fraction and not self._out(num_silos):
            raise ConfigError(
                f"aggregate.fraction: {self.fraction:g} of {num_silos} silos is less than one silo: none is left out; "
                f"take {math.ceil(1000 / num_silos) / 1000:g} or more, or 0 for the plain mean"
            )

    def _out(self, num_silos: int) -> int:
        return math.floor(self.fraction * num_silos + 1e-9)


AGGREGATORS = Family(
    "aggregator",
    {"mean": Mean, "fednova": FedNova, "qffl": Qffl, "median": Median, "trimmed_mean": TrimmedMean},
    Aggregator,
)
