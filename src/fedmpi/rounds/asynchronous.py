"""The asynchronous engine: silos do not wait for each other. A round is one step of the server.

    a silo       fetches the newest parameters, trains, sends its update, and fetches again
    the server   adds each update, weighted by its staleness, to a buffer; once `size` updates have arrived, it steps
                 by their mean

With M updates in the buffer, made from the versions tau_i, with weights p_i and staleness weights s, the step from
version t is that of server.optimizer on

    mean = sum_i p_i s(t - tau_i) delta_i / sum_i p_i

A robust rule combines the rows s(t - tau_i) delta_i in place of the mean.

The silos of a round are trained when they are due, from the version that they fetched, and their updates are added in
the order of arrival (exchange/arrivals.py). A round is committed like a synchronous one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from fedmpi.aggregate import Mean
from fedmpi.components import NonNegativeFloat, NonNegativeInt, PositiveInt, called, component
from fedmpi.errors import FedmpiError
from fedmpi.exchange.arrivals import Arrivals
from fedmpi.exchange.base import Exchange
from fedmpi.exchange.dense import Root
from fedmpi.outcome import RoundOutcome
from fedmpi.rounds.agreement import agree_ready
from fedmpi.rounds.clocks import CLOCKS, Clock, Real, Replay
from fedmpi.rounds.delays import Delays
from fedmpi.rounds.due import COLUMNS, Work, share_rows, train_due
from fedmpi.rounds.engine import Engine
from fedmpi.rounds.federation import Federation, State
from fedmpi.rounds.policies import Everybody
from fedmpi.rounds.queue import Arrival, Queue, Replayed, after_trainings, trainings
from fedmpi.rounds.realtime import RealTime
from fedmpi.rounds.record import training_outcome
from fedmpi.rounds.staleness import STALENESS, Polynomial, Staleness
from fedmpi.rounds.synchronous import SynchronousRound, server_of
from fedmpi.selection import All, Selection
from fedmpi.server import ReadsNorms

if TYPE_CHECKING:
    from fedmpi.config import Config


@component
class Buffered(Engine):
    """Asynchronous rounds with a buffer: every silo trains all the time, and the server steps once `size` updates have
    arrived (Nguyen et al. 2022, Federated Learning with Buffered Asynchronous Aggregation, Algorithm 1, FedBuff).

    With size 1 it is w + alpha s(t - tau) (w_k - w_tau), where alpha is the lr of server.optimizer fedavg. Deviation
    from FedAsync (Xie et al. 2019, Asynchronous Federated Optimization, Algorithm 1): that mixes models,
    w + alpha s(t - tau) (w_k - w), so it also pulls w back to the silo's older start. Deviations from FedBuff: all
    silos train, in place of a drawn set; the mean has the weights of `aggregate`, uniform in the paper.

    `rounds` counts server steps, and so do schedules. A silo's learning rate is that of the version it started from.
    """

    gives_orders: ClassVar[bool] = True

    size: PositiveInt = 1
    """updates that the server waits for before it steps; those that are rejected or dropped do not count"""
    staleness: Annotated[Staleness, STALENESS] = Polynomial()
    """how much an update counts, by the server steps that it missed"""
    max_staleness: NonNegativeInt | None = None
    """updates that missed more server steps are dropped, and the record names them; null: none"""
    window_s: NonNegativeFloat = 0.0
    """seconds that the server waits for further updates once `size` have arrived"""
    clock: Annotated[Clock, CLOCKS] = Real()
    """virtual: time by a model, the same on every machine"""

    @property
    def arrivals(self) -> int:
        return self.size

    @property
    def columns(self) -> tuple[str, ...]:
        return COLUMNS

    def conflicts(self, config: Config) -> str | None:
        """Refuses whatever needs a cohort, or all ranks at once."""
        section, rule, optimizer = config.exchange, config.local, config.server.optimizer
        who = "engine: buffered"
        if not self.clock.is_virtual and (stateful := [called(one) for one in config.updates if one.init()]):
            return f"{who} in real time takes no updates: {stateful[0]} that follows earlier rounds"
        if not self.clock.is_virtual and config.on_failure not in (None, "stop"):
            return f"on_failure: {config.on_failure} cannot be combined with {who} in real time; use stop"
        if not isinstance(config.select, All):
            return f"{who} lets every silo train all the time, so there is no cohort to draw; take select: all"
        if config.aggregate.needs == "sum" and not isinstance(config.aggregate, Mean):
            return (
                f"{who} does not go with aggregate: {called(config.aggregate)}, whose factor belongs to the silos of "
                "one round; take mean, or a rule that reads each update"
            )
        if of_cohort := [auxiliary.name for auxiliary in rule.auxiliaries if auxiliary.normaliser == "cohort"]:
            return (
                f"{who} does not go with local: {called(rule)}: its {of_cohort[0]} is a mean over silos that start "
                "from the same parameters, which these do not"
            )
        if rule.server_step is not None:
            return f"{who} does not go with local: {called(rule)}: its server counts the silos of a round"
        if isinstance(optimizer, ReadsNorms):
            return f"{who} does not go with server.optimizer: {called(optimizer)}, which compares whole deltas"
        if not section.chosen and section.member is not Root:
            return f"{who} sends each update to rank 0; exchange.plan: {section.plan} does not, take auto"
        if section.reduction == "reproducible":
            return f"{who} adds updates in the order of arrival, for any number of ranks; take exchange.reduction: fast"
        for name, there in (
            ("overlap", section.overlap),
            ("fragments", section.fragments > 1),
            ("regions", section.regions is not None),
        ):
            if there:
                return f"{who} does not go with exchange.{name}"
        if config.attack is not None and config.attack.omniscient:
            return f"{who} does not go with attack: {called(config.attack)}, which sees all updates of a round"
        if config.disclose not in (None, "silo"):
            return f"{who} tells every rank which silo's update arrives when; it needs disclose: silo"
        return None

    def step(self, state: State, fed: Federation) -> SynchronousRound:
        exchange, timer, number = fed.exchange, fed.timer, state.round + 1
        assert isinstance(exchange, Arrivals)
        sent = fed.comm.counted()
        timer.lap("checkpoint")
        if not self.clock.is_virtual:
            return self._in_real_time(state, fed, exchange, sent)
        delays = Delays.of(state.policy, fed.rule, fed.ids)
        if isinstance(self.clock, Replay):
            queue: Queue | Replayed = Replayed(self.clock, state.round, fed.ids, delays)
        else:
            queue = Queue.of(state.policy, state.round, self.clock, fed.seed, fed.ids, fed.num_train, delays)
        timer.lap("select")

        exchange.begin(number, self.size)
        work, arrivals, num = Work(), list[Arrival](), 0
        while True:
            due = queue.take(self.size - num, self.window_s, state.round, self.max_staleness)
            arrivals += due
            train_due(state, fed, exchange, due, self.staleness, work)
            timer.lap("train")
            outcome = self._agreed(fed, number, due, arrivals, work)
            timer.lap("wait")
            num = int(fed.ready.silo("accepted").sum())
            if num >= self.size or (num and isinstance(queue, Replayed)):
                break
        queue.step(number)
        exchange.fetched(queue.versions)
        outcome = replace(outcome, told={"virtual_s": queue.now, "arrivals": [one.told for one in arrivals]})
        selection = Selection(outcome.cohort, state.selector)
        server = server_of(state, fed, number, selection, 1.0)
        return SynchronousRound(state, fed, outcome, selection, work.trained, server, sent, self.policy, queue.arrays())

    def _in_real_time(
        self, state: State, fed: Federation, exchange: Arrivals, sent: tuple[int, int, int]
    ) -> SynchronousRound:
        """The round of whichever updates arrive first."""
        if exchange.runtime is None:
            build = RealTime if fed.remote is None else fed.remote.real_time
            exchange.runtime = build(self, fed, exchange, state)
        real, timer, number, work = exchange.runtime, fed.timer, state.round + 1, Work()
        assert isinstance(real, RealTime)
        exchange.begin(number, self.size)
        arrivals, end_s = real.round(state, work)
        timer.lap("train")
        taken = {one.silo for one in arrivals if not one.dropped}
        cohort = [silo for silo in fed.ids if silo in taken]
        share_rows(fed, work, exchange.fingerprint(cohort))
        outcome = training_outcome(fed, number, cohort, ())
        with _settling(exchange):
            agree_ready(fed, outcome, self.policy, work.error, num_updates=self.size)
        timer.lap("wait")
        numbers = trainings(state.policy, fed.ids) | {one.silo: one.training for one in arrivals}
        outcome = replace(outcome, told={"arrivals": [one.told for one in arrivals]})
        server = server_of(state, fed, number, selection := Selection(cohort, state.selector), 1.0)
        delays = Delays.of(state.policy, fed.rule, fed.ids).hear(arrivals)
        kept = after_trainings(end_s, numbers) | delays.arrays()
        return _InRealTime(state, fed, outcome, selection, work.trained, server, sent, self.policy, kept)

    def _agreed(
        self, fed: Federation, number: int, due: list[Arrival], arrivals: list[Arrival], work: Work
    ) -> RoundOutcome:
        """The outcome so far, once all ranks have shared theirs. Collective. Raises as `agree_ready`, and Diverged if
        an update of every silo was rejected."""
        assert isinstance(fed.exchange, Arrivals)
        taken = {one.silo for one in arrivals if not one.dropped}
        cohort = [silo for silo in fed.ids if silo in taken]
        silos = [one.silo for one in due if not one.dropped]
        fed.exchange.expect(silos, [fed.membership.rank(silo) for silo in silos])
        share_rows(fed, work, fed.exchange.fingerprint(cohort))
        outcome = training_outcome(fed, number, cohort, ())
        agree_ready(fed, outcome, _Usable(taken == set(fed.ids)), work.error, num_updates=self.size)
        return outcome


@contextlib.contextmanager
def _settling(exchange: Exchange) -> Iterator[None]:
    """Leaves no vector under way where an error of all ranks ends the run: another run would receive it."""
    try:
        yield
    except FedmpiError as error:
        if error.agreed:
            exchange.settle()
        raise


class _InRealTime(SynchronousRound):
    """A round that is committed while other updates are under way."""

    def commit(self, written: int = -1) -> State:
        with _settling(self.fed.exchange):
            return super().commit(written)


@dataclass(frozen=True)
class _Usable(Everybody):
    """Goes on without a usable update until every silo has brought one."""

    all_came: bool = True

    def objection(self, outcome: RoundOutcome) -> str:
        return super().objection(outcome) if self.all_came else ""
