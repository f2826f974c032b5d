"""Policies: they decide when a round ends, and whether it may go on with the updates that arrived."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import pydantic

from fedmpi.components import Family, PositiveFloat, PositiveInt, called, component
from fedmpi.errors import ConfigError, NoCohort, agreed
from fedmpi.outcome import RoundOutcome
from fedmpi.rounds.closing import COLUMNS, Closing
from fedmpi.rounds.federation import Federation
from fedmpi.server import ReadsNorms

if TYPE_CHECKING:
    from fedmpi.config import Config

State = Mapping[str, np.ndarray]


class Policy:
    """Decides whether a round may go on with the updates that arrived. A rank that failed or was asked to stop ends the
    round under every policy. Members define `objection` and `reads`."""

    reads: ClassVar[frozenset[str] | None] = None  # per-silo figures that it reads, as for a selector; None: unknown
    columns: ClassVar[tuple[str, ...]] = ()  # of the silos' table, that it needs

    @abstractmethod
    def objection(self, outcome: RoundOutcome) -> str:
        """Why the round may not go on; empty if it may. Every rank asks with the same outcome."""
        ...

    def closing(self, fed: Federation, state: State, key: tuple[int, int], cohort: Sequence[str]) -> Closing | None:
        """What ends the training of round `key[0]`, repeated `key[1]` times so far; None: the round waits for every
        silo."""
        return None

    def give_up(self, outcome: RoundOutcome) -> None:
        """Raise NoCohort, alike on every rank, if a void round is not to be repeated."""

    def follow(self, state: State, fed: Federation, outcome: RoundOutcome) -> State:
        """Its state after a round; arrays by name, equal on every rank, which checkpoints hold."""
        return state

    def least(self, num_silos: int) -> int:
        """The fewest updates that a cohort of so many silos brings."""
        return num_silos

    def suits(self, num_silos: int) -> None:
        """ConfigError if the smallest cohort, of so many silos, is too small."""

    def conflicts(self, config: Config) -> str | None:
        """Why the rest of a configuration does not go with it, in one line; None if it does."""
        return None


@component
class Everybody(Policy):
    """Waits for every rank. A round goes on if at least one update is usable, with all that are."""

    reads: ClassVar[frozenset[str]] = frozenset()

    def objection(self, outcome: RoundOutcome) -> str:
        return "" if outcome.num_taken else "every update was rejected"


@component
class Deadline(Policy):
    """Closes a round at a deadline, once enough silos are through; late silos stop after the batch that they are in.

    `partial` counts what a late silo has done, normalised as in FedNova (Wang et al. 2020, Tackling the Objective
    Inconsistency Problem, equations 8-9) in units of planned work: a silo that did the part r_k of its planned
    gradients has the weight w_k / r_k, and the mean is scaled by sum_k w_k r_k / sum_k w_k. So a late silo does not
    pull the optimum, and if no silo is late every bit is as without a deadline. Small parts are scaled up: with large
    steps (lr times curvature times planned steps well above 1) a silo that did few of many overshoots; take `drop`.

    A rank's silos train in turn. The deadline holds for all of them; those that have not begun contribute nothing.
    """

    columns: ClassVar[tuple[str, ...]] = COLUMNS
    reads: ClassVar[frozenset[str]] = frozenset({"lateness"})

    deadline_s: PositiveFloat | Literal["auto"] = "auto"
    """from the start of training; auto: `factor` times the median silo's time in the last 5 rounds, none in round 1"""
    factor: Annotated[float, pydantic.Field(ge=1)] = 2.0
    """of `deadline_s: auto`"""
    min_silos: PositiveInt = 1
    """silos that must be through before the round closes"""
    late: Literal["partial", "drop", "buffer"] = "partial"
    """what a late silo contributes: partial: what it has done, normalised; drop: nothing, and it stays as it was;
    buffer: the same as partial, in the next round and with (1 + 1)^(-1/2) of its weight (rounds/buffered.py)"""
    too_few: Literal["wait", "repeat", "stop"] = "wait"
    """if fewer than `min_silos` are through: wait for more, repeat the round with twice the time, or stop the run with
    a checkpoint"""

    def closing(self, fed: Federation, state: State, key: tuple[int, int], cohort: Sequence[str]) -> Closing:
        limit_s = self.limit_s(state) * 2 ** key[1]
        quorum = min(self.min_silos, len(cohort))
        partial, buffers = self.late != "drop", self.late == "buffer"
        return Closing(fed.comm, fed.watch, key, limit_s, quorum, self.too_few == "wait", partial, buffers)

    def limit_s(self, state: State) -> float:
        """The deadline of the next round; infinite if nothing is known yet.

        >>> Deadline(factor=3.0).limit_s({"medians": np.array([1.0, 2.0, 9.0])}), Deadline().limit_s({})
        (6.0, inf)
        """
        if self.deadline_s != "auto":
            return self.deadline_s
        return self.factor * float(np.median(state["medians"])) if "medians" in state else math.inf

    def follow(self, state: State, fed: Federation, outcome: RoundOutcome) -> State:
        """A late silo's time is unknown; it counts as twice the deadline."""
        if self.deadline_s != "auto":
            return state
        seconds = fed.ready.silo("seconds")[outcome.cohort_K]
        medians = np.append(state.get("medians", np.empty(0)), np.median(seconds))
        return {"medians": medians[-5:]}

    def objection(self, outcome: RoundOutcome) -> str:
        return "" if outcome.num_taken else "no update was usable"

    def give_up(self, outcome: RoundOutcome) -> None:
        if self.too_few == "stop":
            through = len(outcome.cohort) - len(outcome.late)
            raise agreed(
                NoCohort(
                    f"round {outcome.round}: {through} of {len(outcome.cohort)} silos were through at the deadline of "
                    f"{outcome.deadline_s:.3g} s, and engine.policy.min_silos is {self.min_silos}"
                )
            )

    def least(self, num_silos: int) -> int:
        return min(self.min_silos, num_silos)

    def suits(self, num_silos: int) -> None:
        if self.min_silos > num_silos:
            raise ConfigError(f"engine.policy.min_silos: {self.min_silos}, and a cohort may be {num_silos}")

    def conflicts(self, config: Config) -> str | None:
        """Refuses what needs every silo, or a clock that repeats itself; with `partial` what takes a part for the whole
        of a silo's work."""
        section, rule, aggregate, who = config.exchange, config.local, config.aggregate, "engine.policy: deadline"
        if section.overlap:
            return f"{who} does not go with exchange.overlap, which has a round in flight while the next one trains"
        if section.regions is not None:
            return f"{who} does not go with exchange.regions, whose regions wait for all of their silos"
        if section.reduction == "reproducible":
            return f"exchange.reduction: reproducible, but who is late under {who} is what no clock repeats"
        if self.late == "drop":
            return None
        more = f"{who} with late: {self.late}"
        if rule.refuses_partial:
            return f"{more} does not go with local {called(rule)}: {rule.refuses_partial}; take late: drop"
        if rule.carries_over:
            return f"{more} does not go with local.keep_optimizer: momentum carries earlier gradients into it"
        if aggregate.refuses_partial:
            return (
                f"{more} does not go with aggregate {called(aggregate)}: {aggregate.refuses_partial}; take late: drop"
            )
        if isinstance(config.server.optimizer, ReadsNorms):
            optimizer = called(config.server.optimizer)
            return f"{more} does not go with server.optimizer {optimizer}, which goes by the norms of whole rounds"
        if config.select.unbiased:
            return (
                f"{more} does not go with select {called(config.select)}, which counts silos by 1/probability: the "
                "product of two estimates is biased; take late: drop"
            )
        if self.late == "buffer" and section.scope == "silo":
            return f"{more} does not go with exchange.scope: silo, where a silo has one row in a round"
        if self.late == "buffer" and (names := ", ".join(auxiliary.name for auxiliary in rule.auxiliaries)):
            return f"{more} does not go with local {called(rule)}: its {names} must not arrive a round late"
        if section.fragments > 1:
            return f"{more} does not go with exchange.fragments: a fragment holds several rounds of a silo"
        return None


POLICIES = Family("policy", {"all": Everybody, "deadline": Deadline}, Policy, defaults=True)
