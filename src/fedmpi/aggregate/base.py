"""The interface of an aggregator, and linear algebra that several of them share.

K rows, one for each silo whose delta arrived; S coordinates, any slice of them; B rows after mixing.
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
Weights = Any  # returned by `row_weights`, read by `combine`: an array, [K] if linear, or a NamedTuple of arrays

PART = 1 << 13  # coordinates of every row converted to float64 at a time, so that they stay in cache
MANY = 64  # rows; float32 sums over more rows would show rounding error


class CohortSummary(NamedTuple):
    """What every rank knows about the silos whose deltas arrived in a round: arrays [S] in federation order."""

    weights: np.ndarray  # base weight times the selector's factor
    sent: np.ndarray  # weight the delta was summed with, `Aggregator.weight`
    normalizers: np.ndarray  # Contribution.normalizer
    start_losses: np.ndarray
    norms: np.ndarray  # L2 norms of the deltas
    total: float  # divisor of the weights: their sum, or the sum over all silos if the selector gives factors


class Cohort(NamedTuple):
    """The silos whose rows an aggregator reads, in row order, and the round."""

    silos: Sequence[str]
    round: int = 0
    seed: int = 0  # of the run, for random draws


class Aggregator:
    """How deltas are combined; the defaults give every silo one vote, members override what differs.

    `needs` says what the exchange must bring together:

        sum    sum of weight(contribution) * delta; ranks add up their silos before they send. The server optimizer
               receives the mean under these weights, times `scale` of all silos whose deltas arrived.
        rows   each delta, slice by slice, at the rank that owns the slice (`exchange.scope: silo`, plan sharded).
        gram   as `rows`, plus the inner products of all deltas, which are computed before any slice is combined.

    Aggregators that read deltas work in two phases. `row_weights(gram_KK, cohort, state)` sees the whole round but no
    coordinates; `combine(rows_KS, weights)` combines any slice of the coordinates. Iterative rules iterate in
    `row_weights`, on inner products, so they need no vector as long as the model.
    """

    @property
    def needs(self) -> Needs:
        """What the exchange must bring together: `sum`, `rows` or `gram`."""
        return "sum"

    @property
    def reads(self) -> frozenset[str] | None:
        """Per-silo facts that `scale` reads: norm, start_loss. Empty if the silos' sums and means give the same result;
        `disclose: cohort` and `pooled` accept only that. None: not declared."""
        return None if self.needs == "sum" else frozenset({"delta"})

    @property
    def centre(self) -> bool:
        """Whether the last round's result is one more row, after those of the silos; 0 in the first round."""
        return False

    @property
    def linear(self) -> bool:
        """Whether the result is the sum of rows times weights [K]."""
        return type(self).combine is Aggregator.combine

    @property
    def averages(self) -> bool:
        """Whether the result has the magnitude of the inputs. If not, it does not apply to averaged statistics."""
        return True

    @property
    def start_loss(self) -> bool:
        """Whether the contribution must carry the loss of the global parameters on the silo's training samples."""
        return False

    @property
    def scaled(self) -> bool:
        """Whether `scale` is more than a share of weight. It then belongs to one round and cannot span several."""
        return False

    @property
    def refuses_factors(self) -> str:
        """Why a selector's factors (1/probability) would not make the result unbiased; empty if they would."""
        return "every silo has one vote"

    @property
    def refuses_partial(self) -> str:
        """Why deltas of silos that were ended early do not go into it; empty if they do, divided by `Contribution.part`
        unless it `normalises` them itself."""
        return "it takes every delta for a whole round's work"

    @property
    def counts_steps(self) -> bool:
        """Whether a silo weighs by the steps that it took."""
        return False

    @property
    def normalises(self) -> bool:
        """Does `weight` divide by the gradients that a delta holds?"""
        return False

    def conflicts(self, config: Config) -> str | None:
        """Why the rest of the configuration is incompatible, in one line; None if it is compatible."""
        regions, reads_deltas = config.exchange.regions, self.needs != "sum"
        if reads_deltas and not config.exchange.one_by_one and not config.engine.arrivals:
            return f"aggregate: {called(self)} reads each delta; it needs exchange.scope: silo and plan sharded"
        if reads_deltas and (names := ", ".join(auxiliary.name for auxiliary in config.local.auxiliaries)):
            return f"aggregate: {called(config.local)} sends {names} besides the delta; take an aggregator that sums"
        if self.scaled and config.exchange.fragments > 1:
            return f"aggregate: {called(self)} looks at one round, and a fragment holds several rounds of a silo"
        if self.scaled and regions is not None and regions.every > 1:
            return f"aggregate: {called(self)} looks at one round, exchange.regions.every is {regions.every}"
        return None

    def suits(self, num_silos: int) -> None:
        """Raises ConfigError if a cohort of `num_silos` is too small. Checked at set-up for the smallest cohort that
        the selector may give, and in each round for the silos whose deltas arrived."""

    # ------------------------------------------------------------ for aggregators that need only the sum

    def base(self, silo: str, num_samples: int) -> float:
        """Base weight of a silo in the federation, from its number of training samples."""
        return 1.0

    def weight(self, contribution: Contribution) -> float:
        """Weight the silo's delta is summed with; `contribution.weight` is its base times the selector's factor."""
        return 1.0

    def scale(self, heard: CohortSummary) -> float:
        """Factor that the mean is multiplied by."""
        return 1.0

    # ------------------------------------------------------------ for aggregators that read deltas

    def init(self) -> State:
        """State before the first round, besides the centre."""
        return {}

    def row_weights(self, gram_KK: np.ndarray | None, cohort: Cohort, state: State) -> tuple[Weights, State]:
        """Weights that `combine` gets with each slice, and the new state; the same on every rank. `gram_KK`: the rows'
        inner products in float64, the centre's row last; None unless `needs` is `gram`."""
        return np.full(len(cohort.silos), 1 / len(cohort.silos)), state

    def combine(self, rows_KS: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Combines rows [K, S] of any slice of the coordinates into one [S]: by default their weighted sum.

        >>> Aggregator().combine(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), np.array([0.25, 0.75]))
        tensor([2.5000, 3.5000])
        """
        return weighted(rows_KS, weights)


def weighted(rows_KS: torch.Tensor, weights_K: np.ndarray) -> torch.Tensor:
    """Sum of rows [K, S] times weights [K], added in row order; rows of weight 0 are not read."""
    wide = len(rows_KS) > MANY and rows_KS.dtype == torch.float32
    total_S = torch.zeros(rows_KS.shape[1], dtype=torch.float64 if wide else rows_KS.dtype, device=rows_KS.device)
    for row_S, weight in zip(rows_KS, weights_K.tolist(), strict=True):
        if weight:
            total_S.add_(row_S, alpha=weight)
    return total_S.to(rows_KS.dtype)


def distances(gram_KK: np.ndarray) -> np.ndarray:
    """Squared distances |x_i - x_j|^2 [K, K] of rows with inner products `gram_KK`.

    >>> distances(np.array([[1.0, 0.0], [0.0, 4.0]]))
    array([[0., 5.],
           [5., 0.]])
    """
    norms_K = np.diag(gram_KK)
    # Exactly symmetric, though a BLAS may round the two halves of `gram_KK` differently: otherwise a tie between two
    # rows that are each other's nearest would go by rounding.
    squares_KK: np.ndarray = np.maximum(norms_K[:, None] + norms_K - (gram_KK + gram_KK.T), 0.0)
    np.fill_diagonal(squares_KK, 0.0)
    return squares_KK


def distances_from(sum_K: np.ndarray, gram_KK: np.ndarray) -> np.ndarray:
    """Distances |x_k - v| [K] of rows with inner products `gram_KK`, where v is the sum of the rows times `sum_K`."""
    inner_K = gram_KK @ sum_K
    distances_K: np.ndarray = np.sqrt(np.maximum(np.diag(gram_KK) - 2 * inner_K + sum_K @ inner_K, 0.0))
    return distances_K


def products(rows_KS: torch.Tensor) -> np.ndarray:
    """Inner products [K, K] of rows [K, S], in float64, computed block by block."""
    gram_KK = torch.zeros(len(rows_KS), len(rows_KS), dtype=torch.float64, device=rows_KS.device)
    for start in range(0, rows_KS.shape[1], PART):
        exact_KB = rows_KS[:, start : start + PART].double()
        gram_KK.addmm_(exact_KB, exact_KB.T)
    return gram_KK.cpu().numpy()


def enough(what: str, hostile: int, least: int, num_silos: int) -> None:
    """Raises ConfigError if a rule needs more than `num_silos` silos against so many hostile ones."""
    if num_silos < least:
        raise ConfigError(f"aggregate: {what} with hostile: {hostile} needs {least} silos or more, and has {num_silos}")


AGGREGATORS = Family("aggregator", {}, Aggregator, implied="mean")  # filled with the MEMBERS of each file
