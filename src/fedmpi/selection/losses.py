"""Selectors that prefer silos whose loss is high or falls fast. All are BIASED, on purpose, and renormalise over the
cohort.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from fedmpi.components import PositiveFloat, PositiveFraction, PositiveInt, component
from fedmpi.errors import ConfigError
from fedmpi.outcome import RoundOutcome
from fedmpi.selection.base import Part, Selection, State, cohort_of, highest, newest

NO_LOSS = -np.inf  # marks a silo that took part without a finite loss


@component
class PowerOfChoice(Part):
    """Power-of-choice (Cho et al. 2020, section 3): draw d candidates without replacement in proportion to n_k, and
    take the m = max(1, round(C K)) with the highest loss.

    `losses: fresh` is pow-d: candidates evaluate the global parameters on their training samples, shared in one small
    collective. With `samples` it is cpow-d: on that many samples, drawn each round. `losses: last` is rpow-d: a silo's
    mean training loss in its last round, infinite before its first, without a message.

    A silo whose fresh loss is not finite ranks last. With last losses its last finite loss counts, or the mean of the
    other silos' if it has none.

    BIASED towards high losses, which makes it fast. The paper takes the plain mean of the cohort, `aggregate: {name:
    mean, weights: uniform}`; with weights by samples n_k counts twice, in the draw and in the mean.
    """

    reads = frozenset({"loss"})

    num_candidates: PositiveInt | None = None
    """d: number of candidates, m to K; null: 2 m"""
    losses: Literal["fresh", "last"] = "fresh"
    """fresh: evaluated in this round; last: of the silo's last training"""
    samples: PositiveInt | None = None
    """samples per candidate for fresh losses; null: all"""

    @property
    def counts(self) -> dict[str, int]:
        """`count` and `num_candidates`, if given."""
        more = {} if self.num_candidates is None else {"num_candidates": self.num_candidates}
        return super().counts | more

    def suits(self, num_silos: int) -> None:
        """Raise ConfigError if `count` or `num_candidates` does not fit the number of silos, or each other."""
        super().suits(num_silos)
        if self.num_candidates is not None and self.num_candidates < (m := self.size(num_silos)):
            raise ConfigError(f"select.num_candidates: {self.num_candidates}, and {m} silos are chosen of them")

    @property
    def asks(self) -> bool:
        """Whether losses are fresh, which takes a collective."""
        return self.losses == "fresh"

    def init(self, num_train: Sequence[int]) -> State:
        return {"num_train": np.asarray(num_train, dtype=np.float64), "loss": np.full(len(num_train), np.nan)}

    def observe(self, ids: Sequence[str], state: State, outcome: RoundOutcome | None) -> State:
        """The state with the training losses of the last round."""
        if outcome is None:
            return state
        loss_K = newest(state["loss"], outcome.loss_K)
        told_none_K = outcome.cohort_K & np.isnan(loss_K)
        return {**state, "loss": np.where(told_none_K, NO_LOSS, loss_K)}

    def candidates(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> list[str]:
        """The drawn candidates; none with last losses."""
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
    """Base of bandits: silos are arms, a participation is a play, and its reward is the decrease of the silo's training
    loss since its last participation.

    Rewards are divided by the largest so far. The first participation, and one with a rejected update, earns 0.
    """

    reads = frozenset({"loss"})

    discount: PositiveFraction = 1.0
    """factor per round on earlier plays and rewards, because silos change with the model"""

    def init(self, num_train: Sequence[int]) -> State:
        zeros = np.zeros(len(num_train))
        return {"plays": zeros, "earned": zeros, "largest": zeros, "loss": np.full(len(num_train), np.nan)}

    def observe(self, ids: Sequence[str], state: State, outcome: RoundOutcome | None) -> State:
        """The state with the rewards of the last round's cohort."""
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
        """Sums of rewards scaled to -1..1, [K]."""
        return state["earned"] / (state["largest"].max() or 1.0)


@component
class Ucb(_Bandit):
    """The m = max(1, round(C K)) silos with the highest upper confidence bound, mean reward + c sqrt(2 ln t / t_k)
    (Auer et al. 2002, UCB1, with several arms per round; with `discount` Garivier and Moulines 2011, D-UCB). t_k counts
    the plays of silo k, t those of all silos. Silos that never played come first.

    BIASED towards silos whose loss still falls.
    """

    exploration: PositiveFloat = 1.0
    """c: weight of the confidence term; larger explores more"""

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
    """Thompson sampling: the m = max(1, round(C K)) silos with the highest draws from N(earned_k / (t_k + 1),
    1 / (t_k + 1)), t_k plays of silo k (Agrawal and Goyal 2013, Algorithm 2, with several arms per round).

    BIASED towards silos whose loss still falls.
    """

    deviation: PositiveFloat = 1.0
    """standard deviation of a reward; 1 in the paper"""

    def select(
        self, ids: Sequence[str], state: State, outcome: RoundOutcome | None, rng: np.random.Generator
    ) -> Selection:
        known_K = state["plays"] + 1
        drawn_K = self.earned(state) / known_K + self.deviation * rng.standard_normal(len(ids)) / np.sqrt(known_K)
        return Selection(cohort_of(ids, highest(drawn_K, self.size(len(ids)), rng)), state)


LOSSES = {"power_of_choice": PowerOfChoice, "ucb": Ucb, "thompson": Thompson}
