"""Policies decide when a round closes, and whether it goes on with the updates that arrived."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import pydantic

from fedmpi.components import Family, PositiveFloat, PositiveInt, called, component
from fedmpi.errors import ConfigError, NoCohort, agreed
from fedmpi.local import GradientRule, Order
from fedmpi.outcome import RoundOutcome
from fedmpi.rounds.clocks import Clock
from fedmpi.rounds.closing import COLUMNS, Closing, VirtualClosing
from fedmpi.rounds.federation import Federation
from fedmpi.server import ReadsNorms

if TYPE_CHECKING:
    from fedmpi.config import Config

State = Mapping[str, np.ndarray]


class Policy:
    """Decides when a round closes, and whether it goes on with the updates that arrived. A rank that failed or was
    asked to stop ends the round under every policy. Subclasses define `objection` and `reads`."""

    reads: ClassVar[frozenset[str] | None] = None  # per-silo figures it reads, as for a selector; None: unknown
    columns: ClassVar[tuple[str, ...]] = ()  # columns it needs in the silos' table
    posts: ClassVar[bool] = False  # whether ranks post to each other during training

    @abstractmethod
    def objection(self, outcome: RoundOutcome) -> str:
        """Why the round may not go on; empty if it may. Every rank calls it with the same outcome."""
        ...

    def closing(self, fed: Federation, state: State, key: tuple[int, int], cohort: Sequence[str]) -> Closing | None:
        """The Closing of round `key[0]`, which was repeated `key[1]` times so far; None if the round waits for every
        silo."""
        return None

    def virtual_closing(
        self,
        fed: Federation,
        state: State,
        key: tuple[int, int],
        cohort: Sequence[str],
        clock: Clock,
        orders: Mapping[str, Order],
    ) -> VirtualClosing | None:
        """As `closing`, under a virtual clock. `orders`: what silos are told of how much to do (delays.py)."""
        return None

    def give_up(self, outcome: RoundOutcome) -> None:
        """Raise the same NoCohort on every rank if a void round must not be repeated."""

    def follow(self, state: State, fed: Federation, outcome: RoundOutcome) -> State:
        """The policy's state after a round: arrays by name, equal on every rank, stored in checkpoints."""
        return state

    def least(self, num_silos: int) -> int:
        """The fewest updates that a cohort of `num_silos` silos can bring."""
        return num_silos

    def suits(self, num_silos: int) -> None:
        """Raise ConfigError if `num_silos`, the size of the smallest cohort, is too small."""

    def conflicts(self, config: Config) -> str | None:
        """Why the policy does not work with the rest of the configuration, in one line; None if it does."""
        return None


@component
class Everybody(Policy):
    """Waits for every silo. A round goes on with all usable updates, if there is at least one."""

    reads: ClassVar[frozenset[str]] = frozenset()

    def objection(self, outcome: RoundOutcome) -> str:
        return "" if outcome.num_taken else "every update was rejected"


@component
class Deadline(Policy):
    """Closes a round at a deadline, once enough silos have finished; late silos stop after their current batch.

    `partial` counts the work of a late silo, normalised as in FedNova (Wang et al. 2020, Tackling the Objective
    Inconsistency Problem, equations 8-9) in units of planned work: a silo that did the part r_k of its planned
    gradients gets the weight w_k / r_k, and the mean is scaled by sum_k w_k r_k / sum_k w_k. So late silos do not bias
    the optimum. If no silo is late, every bit is as without a deadline. Small parts are scaled up: with large steps (lr
    times curvature times planned steps well above 1), a silo that did few of its steps overshoots; use `drop` then.

    The silos of one rank train in turn, under the same deadline; those that have not begun contribute nothing.
    """

    columns: ClassVar[tuple[str, ...]] = COLUMNS
    posts: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"lateness"})

    deadline_s: PositiveFloat | Literal["auto"] = "auto"
    """seconds after training starts; auto: `factor` times the median silo time of the last 5 rounds, none in round 1"""
    factor: Annotated[float, pydantic.Field(ge=1)] = 2.0
    """multiple of the median time, for `deadline_s: auto`"""
    min_silos: PositiveInt = 1
    """silos that must have finished before the round closes"""
    late: Literal["partial", "drop", "buffer"] = "partial"
    """what a late silo contributes: partial: its work so far, normalised; drop: nothing, and its state stays as it
    was; buffer: as partial, but in the next round, with (1 + 1)^(-1/2) of its weight (rounds/buffered.py)"""
    too_few: Literal["wait", "repeat", "stop"] = "wait"
    """if fewer than `min_silos` have finished at the deadline: wait for more, repeat the round with twice the time, or
    stop the run with a checkpoint"""

    def closing(self, fed: Federation, state: State, key: tuple[int, int], cohort: Sequence[str]) -> Closing:
        limit_s, (quorum, *rest) = self.limit_s(state) * 2 ** key[1], self._closes(cohort)
        if fed.secure is not None:
            quorum = max(quorum, fed.secure.threshold)
        return Closing(fed.comm, fed.watch, key, limit_s, quorum, *rest)

    def virtual_closing(
        self,
        fed: Federation,
        state: State,
        key: tuple[int, int],
        cohort: Sequence[str],
        clock: Clock,
        orders: Mapping[str, Order],
    ) -> VirtualClosing:
        num_train, number = dict(zip(fed.ids, fed.num_train, strict=True)), key[0]
        times = {silo: clock.parts(fed.seed, silo, number - 1, num_train[silo]) for silo in cohort}

        def planned(silo: str) -> int:
            about = (fed.silos[silo], number, fed.rounds, fed.seed)
            return fed.rule.num_steps(*about, orders[silo]) if silo in orders else fed.rule.num_steps(*about)

        limit_s, rest = self.limit_s(state) * 2 ** key[1], self._closes(cohort)
        return VirtualClosing(fed.watch, times, planned, limit_s, *rest)

    def _closes(self, cohort: Sequence[str]) -> tuple[int, bool, bool, bool]:
        """The quorum, whether the round waits for it, and whether late silos contribute, now or in the next round."""
        return min(self.min_silos, len(cohort)), self.too_few == "wait", self.late != "drop", self.late == "buffer"

    def limit_s(self, state: State) -> float:
        """The deadline of the next round, in seconds; infinite if no time is known yet.

        >>> Deadline(factor=3.0).limit_s({"medians": np.array([1.0, 2.0, 9.0])}), Deadline().limit_s({})
        (6.0, inf)
        """
        if self.deadline_s != "auto":
            return self.deadline_s
        return self.factor * float(np.median(state["medians"])) if "medians" in state else math.inf

    def follow(self, state: State, fed: Federation, outcome: RoundOutcome) -> State:
        """Adds the median time of this round. The time of a late silo is unknown and counts as twice the deadline."""
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
            silos = "1 silo" if num_silos == 1 else f"{num_silos} silos"
            raise ConfigError(f"engine.policy.min_silos is {self.min_silos}, but a cohort may have only {silos}")

    def conflicts(self, config: Config) -> str | None:
        """Refuses components that need every silo, and bitwise reproducible sums; unless `late` is drop, also
        components that would take partial work for a silo's whole work."""
        section, rule, aggregate, who = config.exchange, config.local, config.aggregate, "engine.policy: deadline"
        if section.overlap:
            return f"{who} does not go with exchange.overlap, which has a round in flight while the next one trains"
        if section.regions is not None:
            return f"{who} does not go with exchange.regions, whose regions wait for all of their silos"
        virtual = config.engine.clock.is_virtual
        if section.reduction == "reproducible" and not (virtual and self.late == "drop"):
            return f"exchange.reduction: reproducible does not go with {who}: no two runs have the same late silos"
        if self.late == "drop":
            return None
        more = f"{who} with late: {self.late}"
        if virtual and not isinstance(rule, GradientRule):
            return f"{more} and engine.clock: virtual does not go with local {called(rule)}: it does not say its steps"
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
