"""Selectors that go where the loss is high, or falls fastest. All are BIASED, on purpose, and renormalise over the
cohort.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from fedmpi.components import PositiveFloat, PositiveFraction, PositiveInt, component
from fedmpi.errors import ConfigError
from fedmpi.outcome import RoundOutcome
from fedmpi.selection.base import Part, Selection, State, at_most, cohort_of, highest, newest

NO_LOSS = -np.inf  # of a silo that took part and told no finite loss


@component
class PowerOfChoice(Part):
    """Power-of-choice (Cho et al. 2020, section 3): d candidates drawn without replacement in proportion to n_k, and of
    these the m = max(1, round(C K)) with the highest loss.

    `losses: fresh` is pow-d: candidates evaluate the global parameters on their training samples, and one small
    collective tells all; with `samples` it is cpow-d, on so many drawn anew each round. `losses: last` is rpow-d: the
    mean training loss of a silo's last participation, infinite before its first, and no message.

    A silo whose fresh loss is not finite comes after all others; of last losses the last finite one counts, and the
    mean of the others' for a silo that has none.

    BIASED towards high losses: that is what makes it fast. The paper's is the plain mean of the chosen: `aggregate:
    {name: mean, weights: uniform}`; weights by samples count n_k once more than its draw does.
    """

    reads = frozenset({"loss"})

    num_candidates: PositiveInt | None = None
    """d, at least m and at most K; null: 2 m"""
    losses: Literal["fresh", "last"] = "fresh"
    """evaluated for this round; or as they were when last heard"""
    samples: PositiveInt | None = None
    """with fresh losses: samples of each candidate; null: all"""

    def suits(self, num_silos: int) -> None:
        """ConfigError for numbers that do not fit the number of silos or each other."""
        super().suits(num_silos)
        if self.num_candidates is not None:
            at_most(num_silos, "num_candidates", self.num_candidates)
            if self.num_candidates < (m := self.size(num_silos)):
                raise ConfigError(f"select.num_candidates: {self.num_candidates}, and {m} silos are chosen of them")

    @property
    def asks(self) -> bool:
        """Is there a collective for fresh losses?"""
        return self.losses == "fresh"

    def init(self, num_train: Sequence[int]) -> State:
        return {"num_train": np.asarray(num_train, dtype=np.float64), "loss": np.full(len(num_train), np.nan)}

    def observe(self, ids: Sequence[str], state: State, outcome: RoundOutcome | None) -> State:
        """Training losses of the last round are the newest."""
        if outcome is None:
            return state
        loss_K = newest(state["loss"], outcome.loss_K)
        told_none_K = outcome.cohort_K & np.isnan(loss_K)
        return {**state, "loss": np.where(told_none_K, NO_LOSS, loss_K)}

    def candidates(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> list[str]:
        """Those whose loss is asked for: none where the last known is taken."""
        return cohort_of(ids, self._drawn(state, rng)) if self.losses == "fresh" else []

    def select(
        self,
        ids: Sequence[str],
        state: State,
        outcome: RoundOutcome | None,
        rng: np.random.Generator,
        losses: Mapping[str, float] | None = None,
    ) -> Selection:
        if losses is not None:
            drawn = np.array([i for i, silo in enumerate(ids) if silo in losses])
            known = np.array([losses[ids[i]] for i in drawn])
            known = np.where(np.isfinite(known), known, NO_LOSS)
        else:
            drawn = np.sort(self._drawn(state, rng))
            loss_K = state["loss"]
            finite_K = loss_K[np.isfinite(loss_K)]
            neutral = finite_K.mean() if len(finite_K) else 0.0
            known = np.where(np.isnan(loss_K), np.inf, np.where(loss_K == NO_LOSS, neutral, loss_K))[drawn]
        return Selection(cohort_of(ids, drawn[highest(known, self.size(len(ids)), rng)]), state)

    def _drawn(self, state: State, rng: np.random.Generator) -> np.ndarray:
        n_K = state["num_train"]
        m = self.size(len(n_K))
        d = min(max(m, self.num_candidates or 2 * m), len(n_K))
        return rng.choice(len(n_K), size=d, replace=False, p=n_K / n_K.sum())


@component
class _Bandit(Part):
    """Silos as arms: a play is a participation, its reward how far the silo's training loss fell since its last one.

    Rewards are divided by the largest so far. A first participation, and one whose update was rejected, earns 0.
    """

    reads = frozenset({"loss"})

    discount: PositiveFraction = 1.0
    """per round, of what was earned before: silos change as the model does"""

    def init(self, num_train: Sequence[int]) -> State:
        zeros = np.zeros(len(num_train))
        return {"plays": zeros, "earned": zeros, "largest": zeros, "loss": np.full(len(num_train), np.nan)}

    def observe(self, ids: Sequence[str], state: State, outcome: RoundOutcome | None) -> State:
        """What the last round's cohort has earned."""
        if outcome is None:
            return state
        played_K = outcome.cohort_K.astype(np.float64)
        reward_K = np.nan_to_num(state["loss"] - outcome.loss_K, nan=0.0)
        return {
            "plays": self.discount * state["plays"] + played_K,
            "earned": self.discount * state["earned"] + reward_K,
            "largest": np.maximum(state["largest"], np.abs(reward_K)),
            "loss": newest(state["loss"], outcome.loss_K),
        }

    def earned(self, state: State) -> np.ndarray:
        """The sums of rewards, each between -1 and 1."""
        return state["earned"] / (state["largest"].max() or 1.0)


@component
class Ucb(_Bandit):
    """The m = max(1, round(C K)) silos with the highest upper confidence bound, mean reward + c sqrt(2 ln t / t_k)
    (Auer et al. 2002, UCB1, with several arms a round; with `discount` Garivier and Moulines 2011, D-UCB): t_k plays of
    silo k, t of all; who never played comes first.

    BIASED towards silos whose loss still falls.
    """

    exploration: PositiveFloat = 1.0
    """c"""

    def select(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> Selection:
        plays_K = state["plays"]
        tried = plays_K > 0
        divisor_K = np.where(tried, plays_K, 1.0)
        total = max(1.0, float(plays_K.sum()))
        bound_K = self.earned(state) / divisor_K + self.exploration * np.sqrt(2 * np.log(total) / divisor_K)
        bound_K[~tried] = np.inf
        return Selection(cohort_of(ids, highest(bound_K, self.size(len(ids)), rng)), state)


@component
class Thompson(_Bandit):
    """The m = max(1, round(C K)) silos with the highest draws from N(earned_k / (t_k + 1), 1 / (t_k + 1)), t_k plays of
    silo k (Agrawal and Goyal 2013, Algorithm 2, with several arms a round).

    BIASED towards silos whose loss still falls.
    """

    deviation: PositiveFloat = 1.0
    """of a reward; the paper's is 1"""

    def select(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> Selection:
        known_K = state["plays"] + 1
        drawn_K = self.earned(state) / known_K + self.deviation * rng.standard_normal(len(ids)) / np.sqrt(known_K)
        return Selection(cohort_of(ids, highest(drawn_K, self.size(len(ids)), rng)), state)


LOSSES = {"power_of_choice": PowerOfChoice, "ucb": Ucb, "thompson": Thompson}
