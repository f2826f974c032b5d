"""What the exchange and the round ask of an aggregator.

K rows, one of each silo that was heard; S coordinates, any slice of them; B rows that rows were mixed to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from fedmpi.components import Family, called
from fedmpi.errors import ConfigError
from fedmpi.types import Contribution

if TYPE_CHECKING:
    from fedmpi.config import Config

Needs = Literal["sum", "rows", "gram"]
State = dict[str, np.ndarray]  # small; the same on every rank
Weights = Any  # what `row_weights` gives and `combine` takes: an array, [K] of a linear rule, or a NamedTuple of them

PART = 1 << 13  # coordinates of every row that are made float64 at a time, so that they stay in cache
MANY = 64  # rows: sums of more of them in float32 would show how they were rounded


class CohortSummary(NamedTuple):
    """What is known of the silos that were heard in a round, on every rank, in the federation's order: arrays [S]."""

    weights: np.ndarray  # what each stands for: its share of the federation times the selector's factor
    sent: np.ndarray  # the weights that the deltas were added with, `Aggregator.weight`
    normalizers: np.ndarray  # Contribution.normalizer
    start_losses: np.ndarray
    norms: np.ndarray  # of the deltas
    total: float  # what the weights are to be divided by: their own sum, or that of all silos where factors are given


class Cohort(NamedTuple):
    """Whose rows an aggregator reads, in their order, and when."""

    silos: Sequence[str]
    round: int = 0
    seed: int = 0  # of the run, for what is drawn


class Aggregator:
    """How deltas become one; members say what is other than one vote for every silo.

    `needs` says how much the exchange has to bring together:

        sum    the sum of weight(contribution) * delta, which ranks fold before they send. What the server's optimizer
               gets is the mean under these weights, times `scale` of all that were heard.
        rows   each delta, piece by piece at the piece's owner (`exchange.scope: silo`, plan sharded).
        gram   the same, and before that the inner products of all deltas: no step is taken before they are known.

    One that reads deltas works in two phases. `row_weights(gram_KK, cohort, state)` sees all of the round and no
    coordinate; `combine(rows_KS, weights)` makes one row of any slice of the coordinates. Where a rule iterates it does
    so in `row_weights`, on inner products: no vector is as long as the model.
    """

    @property
    def needs(self) -> Needs:
        """What the exchange has to bring together."""
        return "sum"

    @property
    def reads(self) -> frozenset[str] | None:
        """What `scale` looks at of each silo: norm, start_loss; empty where it gives the same for the silos' sums and
        means, and then `disclose: cohort` and `pooled` take it. None: it does not say."""
        return None if self.needs == "sum" else frozenset({"delta"})

    @property
    def centre(self) -> bool:
        """Is the result of the last round one more row, behind those of the silos? In the first round it is 0."""
        return False

    @property
    def linear(self) -> bool:
        """Is the result the sum of rows times weights [K]?"""
        return type(self).combine is Aggregator.combine

    @property
    def averages(self) -> bool:
        """Is the result of the size of what was sent? Else it is nothing for statistics, which are no steps."""
        return True

    @property
    def start_loss(self) -> bool:
        """Has the contribution to say what the loss of the global parameters is on the silo's training samples?"""
        return False

    @property
    def scaled(self) -> bool:
        """Is `scale` more than a share of weight? It is of one round's silos then and does not go over several."""
        return False

    @property
    def refuses_factors(self) -> str:
        """Why a selector's factors (1/probability) would not make it unbiased; empty where they do."""
        return "every silo has one vote"

    def conflicts(self, config: Config) -> str | None:
        """Why the rest of a configuration does not go with it, in one line; None where it does."""
        regions, reads_deltas = config.exchange.regions, self.needs != "sum"
        if reads_deltas and not config.exchange.one_by_one:
            return f"aggregate: {called(self)} reads each delta; it needs exchange.scope: silo and plan sharded"
        if reads_deltas and (names := ", ".join(auxiliary.name for auxiliary in config.local.auxiliaries)):
            return f"aggregate: {called(config.local)} sends {names} besides the delta, to be summed and not chosen"
        if self.scaled and config.exchange.fragments > 1:
            return f"aggregate: {called(self)} looks at one round, and a fragment holds several rounds of a silo"
        if self.scaled and regions is not None and regions.every > 1:
            return f"aggregate: {called(self)} looks at one round, exchange.regions.every is {regions.every}"
        return None

    def suits(self, num_silos: int) -> None:
        """ConfigError where cohorts of so many silos are too small. It is asked of the smallest cohort that the
        selector may give, and in each round of the silos that were heard."""

    # ------------------------------------------------------------ what needs only the sum

    def base(self, silo: str, num_samples: int) -> float:
        """What a silo stands for in the federation, given its number of training samples."""
        return 1.0

    def weight(self, contribution: Contribution) -> float:
        """What the silo's delta is added with; `contribution.weight` is its base times the selector's factor."""
        return 1.0

    def scale(self, heard: CohortSummary) -> float:
        """What the mean is multiplied with."""
        return 1.0

    # ------------------------------------------------------------ what reads deltas

    def init(self) -> State:
        """What is kept from round to round besides the centre, before the first."""
        return {}

    def row_weights(self, gram_KK: np.ndarray | None, cohort: Cohort, state: State) -> tuple[Weights, State]:
        """What `combine` is given with each slice, and the new state; the same on every rank. `gram_KK` are the rows'
        inner products in float64, the centre's behind the silos'; None unless they are needed."""
        return np.full(len(cohort.silos), 1 / len(cohort.silos)), state

    def combine(self, rows_KS: torch.Tensor, weights: Weights) -> torch.Tensor:
        """One row of any slice of the coordinates: the weighted sum.

        >>> Aggregator().combine(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), np.array([0.25, 0.75]))
        tensor([2.5000, 3.5000])
        """
        return weighted(rows_KS, weights)


def weighted(rows_KS: torch.Tensor, weights_K: np.ndarray) -> torch.Tensor:
    """The sum of rows times weights, in the order of rows; rows of weight 0 are not looked at."""
    wide = len(rows_KS) > MANY and rows_KS.dtype == torch.float32
    total_S = torch.zeros(rows_KS.shape[1], dtype=torch.float64 if wide else rows_KS.dtype, device=rows_KS.device)
    for row_S, weight in zip(rows_KS, weights_K.tolist(), strict=True):
        if weight:
            total_S.add_(row_S, alpha=weight)
    return total_S.to(rows_KS.dtype)


def distances(gram_KK: np.ndarray) -> np.ndarray:
    """|x_i - x_j|^2 of rows with these inner products, [K, K].

    >>> distances(np.array([[1.0, 0.0], [0.0, 4.0]]))
    array([[0., 5.],
           [5., 0.]])
    """
    norms_K = np.diag(gram_KK)
    squares_KK: np.ndarray = np.maximum(norms_K[:, None] + norms_K - gram_KK - gram_KK.T, 0.0)
    np.fill_diagonal(squares_KK, 0.0)
    return squares_KK


def distances_from(sum_K: np.ndarray, gram_KK: np.ndarray) -> np.ndarray:
    """|x_k - v| of rows with these inner products, v being the sum of the rows times `sum_K`."""
    inner_K = gram_KK @ sum_K
    distances_K: np.ndarray = np.sqrt(np.maximum(np.diag(gram_KK) - 2 * inner_K + sum_K @ inner_K, 0.0))
    return distances_K


def products(rows_KS: torch.Tensor) -> np.ndarray:
    """Inner products of rows in float64, a part of them at a time, [K, K]."""
    gram_KK = torch.zeros(len(rows_KS), len(rows_KS), dtype=torch.float64, device=rows_KS.device)
    for start in range(0, rows_KS.shape[1], PART):
        exact_KB = rows_KS[:, start : start + PART].double()
        gram_KK.addmm_(exact_KB, exact_KB.T)
    return gram_KK.cpu().numpy()


def enough(what: str, hostile: int, least: int, num_silos: int) -> None:
    """ConfigError where there are fewer silos than a rule needs against so many hostile ones."""
    if num_silos < least:
        raise ConfigError(f"aggregate: {what} with hostile: {hostile} needs {least} silos or more, and has {num_silos}")


AGGREGATORS = Family("aggregator", {}, Aggregator)  # filled with the MEMBERS of each file
