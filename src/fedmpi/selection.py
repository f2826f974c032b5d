"""Selectors: which silos form a round's cohort.

A selector is called with the same inputs on every rank and answers the same on every rank: no message is needed.
Its state is a dict of arrays that goes in and comes out, and into the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fedmpi.components import Family, PositiveFraction, component

State = dict[str, np.ndarray]


class Selection(NamedTuple):
    """A round's cohort in the federation's order, and the selector's new state.

    `factors` are given where the aggregate is to be an unbiased estimate of that over all silos: what each of the
    cohort counts besides its weight, 1/probability. The sum is then divided by the weight of all silos and not by that
    of the cohort.
    """

    cohort: list[str]
    state: State
    factors: list[float] | None = None


class Selector(Protocol):
    """Which silos take part."""

    def init(self, num_train: Sequence[int]) -> State:
        """The state before the first round, given every silo's number of training samples."""
        ...

    def select(
        self, ids: Sequence[str], state: State, record: Mapping[str, Any] | None, rng: np.random.Generator
    ) -> Selection | tuple[list[str], State]:
        """The cohort, in the federation's order, and the new state. `record` is the last round's."""
        ...


@component
class All:
    """Every silo, every round."""

    def init(self, num_train: Sequence[int]) -> State:
        return {}

    def select(
        self, ids: Sequence[str], state: State, record: Mapping[str, Any] | None, rng: np.random.Generator
    ) -> Selection:
        return Selection(list(ids), state)


@component
class Uniform:
    """S = max(1, round(C K)) silos drawn without replacement (McMahan et al. 2017, Algorithm 1, with max(C K, 1)).

    The aggregate is renormalised over the cohort.

    >>> Uniform(fraction=0.5).select(["a", "b", "c", "d"], {}, None, np.random.default_rng(0))[0]
    ['c', 'd']
    """

    fraction: PositiveFraction = 1.0  # C, of the federation's silos

    def init(self, num_train: Sequence[int]) -> State:
        return {}

    def select(
        self, ids: Sequence[str], state: State, record: Mapping[str, Any] | None, rng: np.random.Generator
    ) -> Selection:
        size = max(1, round(self.fraction * len(ids)))
        chosen = np.sort(rng.choice(len(ids), size=size, replace=False))
        return Selection([ids[i] for i in chosen], state)


SELECTORS = Family("selector", {"all": All, "uniform": Uniform})
