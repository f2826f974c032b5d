"""Scorers: a metric's state, how it is summed over batches and silos, and the figure that results."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedmpi.errors import ConfigError

Tensor = torch.Tensor

SILO_MEAN = "silo_mean_"  # prefix of a figure that is the mean over silos, not pooled
WITHIN = "_within"  # suffix of the error bound of a binned figure
NOTHING = np.zeros(0)


def of_silo(key: str) -> str:
    """The name in a silo's row of a record's figure.

    >>> of_silo("personal_silo_mean_dice")
    'personal_dice'
    """
    return key.replace(SILO_MEAN, "", 1)


def pooled(values: np.ndarray, counts: np.ndarray) -> float | None:
    """The mean of silos' means, weighted by counts; None if all counts are 0.

    >>> pooled(np.array([1.0, 4.0]), np.array([2, 1]))
    2.0
    """
    total = float(counts.sum())
    return float((np.where(counts > 0, values, 0.0) * counts).sum() / total) if total else None


class Scorer:
    """A metric at work.

    Call `update` for every batch of a silo, then `parts` for the part of the state that is sent, and `value` for the
    silo's own figure.
    """

    name: str  # in a silo's row
    maximize: bool | None  # whether higher is better; None: not a number
    pools = True  # whether the figure of all silos is that of the pooled samples
    whole = False  # whether `update` needs all of a silo's outputs at once
    num_counts: int  # integers that are summed over silos
    num_sums = 0  # numbers with one row per silo
    # Whether the summed rows, with the mean of values weighted by `weight`, give the same figure of all silos.
    adds_up = False

    @property
    def key(self) -> str:
        """The name of the figure of all silos."""
        return self.name if self.pools else SILO_MEAN + self.name

    def init(self, device: torch.device | str) -> Any:
        """The state before any sample."""
        return None

    def update(self, state: Any, outputs: Tensor, targets: Tensor) -> Any:
        """The state with more samples, rows as `Targets.rows` gives them; with `whole`, the figure of them all."""
        raise NotImplementedError

    def parts(self, state: Any) -> tuple[np.ndarray, np.ndarray]:
        """A silo's counts [num_counts] and sums [num_sums]."""
        return NOTHING, NOTHING

    def value(self, state: Any) -> float:
        """A silo's value; nan if undefined."""
        raise NotImplementedError

    def shown(self, value: float) -> float:
        """The figure to show for a silo's value."""
        return value

    def weight(self, value: float, sums_S: np.ndarray) -> float:
        """The weight of a silo's value in the mean over silos; 0 if no mean is needed."""
        return 0.0

    def of_all(self, values_K: np.ndarray, sums_KS: np.ndarray, counts_C: np.ndarray) -> dict[str, Any]:
        """The record's figures for all tested silos; rows are in silo order."""
        raise NotImplementedError


@dataclass(frozen=True)
class Mean(Scorer):
    """The mean over terms: samples, tokens or numbers."""

    name: str
    maximize: bool | None
    terms: Callable[[Tensor, Tensor], Tensor]
    then: Callable[[float], float] | None = None  # applied to the mean
    num_counts = 0
    num_sums = 1
    adds_up = True

    def weight(self, value: float, sums_S: np.ndarray) -> float:
        return float(sums_S[0])

    def init(self, device: torch.device | str) -> Any:
        return torch.zeros((), dtype=torch.float64, device=device), 0

    def update(self, state: Any, outputs: Tensor, targets: Tensor) -> Any:
        terms = self.terms(outputs, targets)
        return state[0] + terms.sum(dtype=torch.float64), state[1] + terms.numel()

    def parts(self, state: Any) -> tuple[np.ndarray, np.ndarray]:
        return NOTHING, np.array([float(state[1])])

    def value(self, state: Any) -> float:
        total, num = state
        return float(total) / num if num else math.nan

    def shown(self, value: float) -> float:
        return value if self.then is None else self.then(value)

    def of_all(self, values_K: np.ndarray, sums_KS: np.ndarray, counts_C: np.ndarray) -> dict[str, Any]:
        mean = pooled(values_K, sums_KS[:, 0])
        return {self.key: None if mean is None else self.shown(mean)}


@dataclass(frozen=True)
class Counts(Scorer):
    """A figure computed from counts."""

    name: str
    maximize: bool | None
    num_counts: int
    count: Callable[[Tensor, Tensor], Tensor]
    figure: Callable[[np.ndarray], Any]
    within: Callable[[np.ndarray], float] | None = None  # the largest error of the figure
    adds_up = True

    def init(self, device: torch.device | str) -> Any:
        return torch.zeros(self.num_counts, dtype=torch.int64, device=device)

    def update(self, state: Any, outputs: Tensor, targets: Tensor) -> Any:
        return state + self.count(outputs, targets)

    def parts(self, state: Any) -> tuple[np.ndarray, np.ndarray]:
        return state.cpu().numpy(), NOTHING

    def value(self, state: Any) -> float:
        return math.nan if self.maximize is None else float(self.figure(state.cpu().numpy()))

    def of_all(self, values_K: np.ndarray, sums_KS: np.ndarray, counts_C: np.ndarray) -> dict[str, Any]:
        found = {self.key: self.figure(counts_C)}
        return found if self.within is None else found | {self.key + WITHIN: self.within(counts_C)}


@dataclass(frozen=True)
class Determination(Scorer):
    """R squared, from each target's count, mean, squared deviations and squared errors.

    These merge exactly (Chan, Golub and LeVeque 1979, Updating Formulae and a Pairwise Algorithm, equation 2.1).
    """

    num_targets: int
    name: str = "r2"
    maximize: bool | None = True
    num_counts = 0

    @property
    def num_sums(self) -> int:  # type: ignore[override]
        return 4 * self.num_targets

    def init(self, device: torch.device | str) -> Any:
        return torch.zeros(4, self.num_targets, dtype=torch.float64, device=device)

    def update(self, state: Any, outputs: Tensor, targets: Tensor) -> Any:
        truth = targets.reshape(len(targets), -1).double()
        if truth.shape[1] != self.num_targets:
            raise ConfigError(f"r2: targets are {list(targets.shape)}, the data have {self.num_targets} a sample")
        errors = (outputs.reshape(truth.shape).double() - truth).square().sum(0)
        mean = truth.mean(0)
        num = torch.full_like(mean, len(truth))
        return merged(state, torch.stack([num, mean, (truth - mean).square().sum(0), errors]))

    def parts(self, state: Any) -> tuple[np.ndarray, np.ndarray]:
        return NOTHING, state.cpu().numpy().reshape(-1)

    def value(self, state: Any) -> float:
        num, _, squares, errors = state.cpu()
        return float((1 - errors / squares).mean()) if bool((num > 1).all() and (squares > 0).all()) else math.nan

    def of_all(self, values_K: np.ndarray, sums_KS: np.ndarray, counts_C: np.ndarray) -> dict[str, Any]:
        state = self.init("cpu")
        for sums_S in sums_KS:
            state = merged(state, torch.from_numpy(sums_S.reshape(4, -1)))
        return {self.key: self.value(state)}


def merged(one: Tensor, other: Tensor) -> Tensor:
    """Count, mean, squared deviations and squared errors of two sets together, each [4, targets]."""
    num = one[0] + other[0]
    if not bool(other[0].any()):
        return one
    step = other[1] - one[1]
    share = other[0] / num
    squares = one[2] + other[2] + step.square() * one[0] * share
    return torch.stack([num, one[1] + step * share, squares, one[3] + other[3]])


def silo_mean(scorer: Scorer, values_K: np.ndarray) -> dict[str, Any]:
    """The mean over the silos whose figure is defined; None if there are none."""
    there = values_K[~np.isnan(values_K)]
    return {scorer.key: float(there.mean()) if there.size else None}
