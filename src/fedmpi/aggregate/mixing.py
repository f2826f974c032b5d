"""Mix deltas before another rule reads them: {name: bucketing, size: 2, inner: {name: krum, hostile: 5}}.

A mixing is a matrix M [B, K]: rows become M rows, their inner products M G M'. If the inner rule is linear with weights
w [B], the whole is linear with weights w M; so rows are actually mixed only for inner rules that are not linear.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
import pydantic
import torch

from fedmpi import rng
from fedmpi.aggregate.base import (
    AGGREGATORS,
    Aggregator,
    Cohort,
    Needs,
    State,
    Weights,
    distances,
    enough,
    weighted,
)
from fedmpi.components import NonNegativeInt, PositiveInt, component
from fedmpi.errors import ConfigError


class Mixed(NamedTuple):
    """Weights of a mixing around a rule that is not linear."""

    matrix_BK: np.ndarray
    inner: Weights


class Mixing(Aggregator):
    """Base of all mixings; members implement `matrix`, and `mixed` if they return fewer rows."""

    inner: Aggregator

    def matrix(self, gram_KK: np.ndarray | None, cohort: Cohort) -> np.ndarray:
        """M [B, K]; each row sums to 1."""
        raise NotImplementedError

    def mixed(self, num_silos: int) -> int:
        """B: number of mixed rows for `num_silos` rows."""
        return num_silos

    @property
    def needs(self) -> Needs:
        """As the inner rule's."""
        return self.inner.needs

    @property
    def centre(self) -> bool:
        """As the inner rule's; the centre itself is not mixed."""
        return self.inner.centre

    @property
    def linear(self) -> bool:
        """As the inner rule's."""
        return self.inner.linear

    @property
    def averages(self) -> bool:
        """As the inner rule's."""
        return self.inner.averages

    def init(self) -> State:
        """The inner rule's state."""
        return self.inner.init()

    def row_weights(self, gram_KK: np.ndarray | None, cohort: Cohort, state: State) -> tuple[Weights, State]:
        """The inner rule's weights for the mixed rows; as weights [K] of the original rows if the rule is linear."""
        num = len(cohort.silos)
        matrix_BK = self.matrix(None if gram_KK is None else gram_KK[:num, :num], cohort)
        inner = cohort._replace(silos=[f"row {row}" for row in range(len(matrix_BK))])
        if self.centre:
            matrix_BK = np.block([[matrix_BK, np.zeros((len(matrix_BK), 1))], [np.zeros((1, num)), np.ones((1, 1))]])
        gram_BB = None if gram_KK is None else matrix_BK @ gram_KK @ matrix_BK.T
        weights, state = self.inner.row_weights(gram_BB, inner, state)
        return weights @ matrix_BK if self.linear else Mixed(matrix_BK, weights), state

    def combine(self, rows_KS: torch.Tensor, weights: Weights) -> torch.Tensor:
        """The inner rule applied to the mixed rows, [S]."""
        if not isinstance(weights, Mixed):
            return weighted(rows_KS, weights)
        return self.inner.combine(torch.stack([weighted(rows_KS, row_K) for row_K in weights.matrix_BK]), weights.inner)

    def suits(self, num_silos: int) -> None:
        """Raises ConfigError if the mixed rows are too few for the inner rule."""
        try:
            self.inner.suits(self.mixed(num_silos))
        except ConfigError as error:
            mixed = self.mixed(num_silos)
            raise ConfigError(f"{error}" + (f", {num_silos} mixed to {mixed}" * (mixed != num_silos))) from None

    @pydantic.model_validator(mode="after")
    def _reads_rows(self) -> Mixing:
        if self.inner.needs == "sum":
            raise ValueError(f"{AGGREGATORS.name_of(self.inner)} only adds up; inner is a rule that reads each delta")
        return self


@component
class Bucketing(Mixing):
    """Replaces the deltas by means of `size` deltas each, grouped at random in every round (Karimireddy et al. 2022,
    Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing, Algorithm 1).

    Averaging brings honest deltas on different data closer together. f hostile silos spoil at most f buckets, so the
    inner rule's `hostile` stays f. The last bucket may hold fewer silos.
    """

    size: PositiveInt = 2
    """s: silos per bucket"""
    inner: Annotated[Aggregator, AGGREGATORS]
    """the rule that reads the buckets"""

    def matrix(self, gram_KK: np.ndarray | None, cohort: Cohort) -> np.ndarray:
        """1/s where a silo is in the bucket, [B, K]."""
        num = len(cohort.silos)
        order = rng.generator(cohort.seed, purpose="bucketing", round=cohort.round).permutation(num)
        matrix_BK = np.zeros((self.mixed(num), num))
        matrix_BK[np.arange(num) // self.size, order] = 1.0
        matrix_BK /= matrix_BK.sum(axis=1, keepdims=True)
        return matrix_BK

    def mixed(self, num_silos: int) -> int:
        """Number of buckets."""
        return -(-num_silos // self.size)


@component
class NearestNeighbourMixing(Mixing):
    """Nearest-neighbour mixing: replaces every delta by the mean of the K - f deltas nearest to it, itself included
    (Allouah et al. 2023, Fixing by Mixing, Algorithm 2: NNM)."""

    hostile: NonNegativeInt
    """f: silos that may send anything; fewer than half"""
    inner: Annotated[Aggregator, AGGREGATORS]
    """the rule that reads the mixed deltas"""

    @property
    def needs(self) -> Needs:
        """Inner products, for the distances."""
        return "gram"

    def matrix(self, gram_KK: np.ndarray | None, cohort: Cohort) -> np.ndarray:
        """1/(K - f) for the nearest rows, [K, K]."""
        assert gram_KK is not None
        near = len(gram_KK) - self.hostile
        matrix_KK: np.ndarray = np.zeros_like(gram_KK)
        nearest = np.argsort(distances(gram_KK), axis=1, kind="stable")[:, :near]
        np.put_along_axis(matrix_KK, nearest, 1 / near, axis=1)
        return matrix_KK

    def suits(self, num_silos: int) -> None:
        """Raises ConfigError if there are too few silos for the mixing or for the inner rule."""
        enough("nearest_neighbour_mixing", self.hostile, 2 * self.hostile + 1, num_silos)
        super().suits(num_silos)


MEMBERS: dict[str, type[Aggregator]] = {"bucketing": Bucketing, "nearest_neighbour_mixing": NearestNeighbourMixing}
