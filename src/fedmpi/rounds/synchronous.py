"""The synchronous engine: each round waits for its cohort, for as long as its policy says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np

from fedmpi.aggregate import CohortSummary
from fedmpi.components import component
from fedmpi.errors import Diverged, agreed
from fedmpi.exchange.weights import nearness
from fedmpi.local import LocalSilo, Order
from fedmpi.outcome import BUFFERED, RoundOutcome
from fedmpi.records import peak_rss_bytes
from fedmpi.rounds.agreement import agree_ready, may_uncover, raise_failure, silos_taken
from fedmpi.rounds.clocks import CLOCKS, NOW, Clock, Real, Replay, Scaled, now
from fedmpi.rounds.closing import Closing, VirtualClosing, normalised
from fedmpi.rounds.cohort import select_cohort, share_of_all
from fedmpi.rounds.delays import Delays
from fedmpi.rounds.disclosure import heard
from fedmpi.rounds.engine import Engine
from fedmpi.rounds.evaluation import evaluate
from fedmpi.rounds.federation import Federation, State
from fedmpi.rounds.policies import POLICIES, Everybody, Policy
from fedmpi.rounds.record import make_record, training_outcome
from fedmpi.rounds.training import train_silos
from fedmpi.selection import Selection
from fedmpi.server import Server
from fedmpi.stopping import FAILED

if TYPE_CHECKING:
    from fedmpi.config import Config


@component
class Synchronous(Engine):
    """Synchronous rounds: the cohort trains, its updates are aggregated, the server steps (McMahan et al. 2017,
    Algorithm 1)."""

    gives_orders: ClassVar[bool] = True

    policy: Annotated[Policy, POLICIES] = Everybody()
    """decides when a round closes and whether it may go on"""
    clock: Annotated[Clock, CLOCKS] = Real()
    """real, or a virtual one: a round takes as long as the slowest silo of its cohort, or until its deadline"""

    def conflicts(self, config: Config) -> str | None:
        """Refuses the order of arrivals of another run."""
        if isinstance(self.clock, Replay):
            return "engine.clock: replay gives the order of arrivals, which only engine: buffered has"
        return None

    def step(self, state: State, fed: Federation) -> SynchronousRound:
        comm, timer, number = fed.comm, fed.timer, state.round + 1
        sent = comm.counted()
        timer.lap("checkpoint")  # the time between rounds
        selection, lossless, refused = select_cohort(state, fed, number)
        cohort, _, factors, _ = selection
        if fed.private is not None:
            fed.private.drew(selection.state)
            if not fed.private.of_silos:  # figures of noised updates are shared before the exchange
                fed.private.spend(comm, cohort)
        timer.lap("select")

        share = share_of_all(fed, cohort, factors)
        near = 1.0 if fed.exchange.section.lossy or not cohort else nearness(share)
        virtual_s = now(state.policy)
        delays = Delays.of(state.policy, fed.rule, fed.ids)
        orders = delays.orders(cohort)
        clock = Scaled(self.clock, {silo: one.share for silo, one in orders.items()}) if orders else self.clock
        for repeats in itertools.count():
            closing = self._closing(state, fed, (number, repeats), cohort, clock, orders)
            of_cohort = (number, cohort, factors, near, near * share, refused, closing, orders)
            if fed.remote is None:
                trained, error = train_silos(state, fed, *of_cohort)
            else:
                trained, error = fed.remote.collect(state, fed, *of_cohort)
            timer.lap("train")
            _share_ready(fed, closing)
            outcome = training_outcome(fed, number, cohort, lossless)
            if closing is not None:
                limit_s = closing.limit_s if math.isfinite(closing.limit_s) else None
                outcome = replace(outcome, deadline_s=limit_s, repeats=repeats)
            agree_ready(fed, outcome, self.policy, error, near)
            timer.lap("wait")
            if self.clock.is_virtual:
                lasts = closing.lasts_s if isinstance(closing, VirtualClosing) else _slowest(clock, fed, number, cohort)
                virtual_s = virtual_s + lasts
            if not outcome.is_void:
                break
            self.policy.give_up(outcome)
        kept: dict[str, np.ndarray] = {}
        if self.clock.is_virtual:
            kept = {NOW: np.array([virtual_s])}
            outcome = replace(outcome, told={"virtual_s": virtual_s})
        if orders:
            seconds = partial(_parts, clock, fed, number) if self.clock.is_virtual else None
            told = delays.hear_round({silo: fed.index[silo] for silo in cohort}, fed.ready, orders, seconds)
            kept, outcome = kept | delays.arrays(), replace(outcome, told={**outcome.told, "amounts": told})
        server = None if outcome.given_up else server_of(state, fed, number, selection, near)
        return SynchronousRound(state, fed, outcome, selection, trained, server, sent, self.policy, kept)

    def _closing(
        self,
        state: State,
        fed: Federation,
        key: tuple[int, int],
        cohort: Sequence[str],
        clock: Clock,
        orders: Mapping[str, Order],
    ) -> Closing | None:
        """The closing of round `key[0]`, repeated `key[1]` times so far."""
        if self.clock.is_virtual:
            return self.policy.virtual_closing(fed, state.policy, key, cohort, clock, orders) if cohort else None
        return self.policy.closing(fed, state.policy, key, cohort)


def _parts(clock: Clock, fed: Federation, number: int, silo: str) -> tuple[float, float]:
    """Virtual seconds of a silo's training and of its transfers."""
    return clock.parts(fed.seed, silo, number - 1, fed.num_train[fed.index[silo]])


def _slowest(clock: Clock, fed: Federation, number: int, cohort: Sequence[str]) -> float:
    """Virtual seconds of the round's slowest silo."""
    num_train = dict(zip(fed.ids, fed.num_train, strict=True))
    return max((clock.seconds(fed.seed, silo, number - 1, num_train[silo]) for silo in cohort), default=0.0)


@dataclass(frozen=True)
class SynchronousRound:
    """A round whose cohort has trained."""

    state: State
    fed: Federation
    outcome: RoundOutcome
    selection: Selection
    trained: dict[str, LocalSilo]  # this rank's silos of the cohort, after training
    server: Server | None  # the server's step; None: the round is given up, and changes nothing
    sent: tuple[int, int, int]  # bytes sent up, down and as control traffic before this round
    policy: Policy
    kept: Mapping[str, np.ndarray]  # the engine's own state after the round, besides its policy's

    def commit(self, written: int = -1) -> State:
        state, fed, number = self.state, self.fed, self.outcome.round
        comm, timer = fed.comm, fed.timer
        if fed.private is not None and fed.private.of_silos:
            fed.private.spend(comm)
        timer.lap("checkpoint")
        fed.model.release()  # the parameters are written
        if fed.secure is not None:
            fed.exchange.meet(silos_taken(fed))
        params_Q, optimizer = state.params_Q, state.optimizer
        if self.server is not None:
            params_Q, optimizer = fed.exchange.finish(params_Q, self.server, optimizer, timer.lap)
        fed.silos.update(self.trained)
        params_P = fed.layout.params(params_Q)
        if fed.exchange.wrote_model:
            fed.model.hold(params_P)
        average_P = state.average_P
        if self.server is None and average_P is not None:
            params_P = average_P
        elif fed.average is not None and average_P is not None:
            params_P = average_P = fed.average.follow(average_P, params_P, number)
        if fed.remote is not None:
            fed.remote.commit(fed, number, params_Q, params_P)
        error = evaluate(fed, number, params_P) if fed.remote is None else fed.remote.evaluate(fed, number, params_P)
        timer.lap("evaluate")
        up, down, control = comm.counted()
        now = (up, down, control + (2 * fed.done.num_bytes if comm.size > 1 else 0))  # plus `share` below
        fed.done.set_rank(
            comm.rank,
            written=written,
            asked=fed.watch.asked(),
            started_s=timer.started_s,
            rss=peak_rss_bytes(),
            **timer.seconds,
            **timer.parts,
            **fed.exchange.figures(),
            **fed.exchange.tracks(),
            **dict(zip(("up", "down", "control"), (b - a for a, b in zip(self.sent, now, strict=True)), strict=True)),
        )
        timer.reset()
        fed.done.share(comm.share, lambda: bool((fed.done.rank("status") < FAILED).all()))
        timer.lap("agree")
        raise_failure(fed, fed.done.rank("status"), error)
        outcome, record = make_record(fed, self.outcome)
        if fed.remote is not None:
            record |= fed.remote.scored(fed)
        safe = int(fed.done.rank("written").min())
        updates, policy = state.updates, state.policy
        if self.server is not None:
            updates = fed.updates.follow(state.updates, _fresh_updates(fed, outcome))
            policy = self.policy.follow(state.policy, fed, outcome)
        return State(
            *(number, params_Q, optimizer, self.selection.state, outcome, record, average_P, updates),
            policy={**policy, **self.kept},
            written=safe,
        )


def _fresh_updates(fed: Federation, outcome: RoundOutcome) -> Callable[[str], np.ndarray]:
    """Columns of the silos' table by name. `taken` is True only for silos with an accepted update of this round: the
    table has no norm for a buffered update of an earlier one."""
    if outcome.late_K is None or outcome.rejected_K is None:
        return fed.ready.silo
    fresh_K = outcome.taken_K | (outcome.late_K == BUFFERED)
    return lambda name: fresh_K & (fed.ready.silo("rejected") == 0) if name == "taken" else fed.ready.silo(name)


def _share_ready(fed: Federation, closing: Closing | None) -> None:
    meanwhile = fed.watch.look if closing is None else closing.wait
    fed.ready.share(lambda values: fed.comm.share(values, meanwhile), lambda: may_uncover(fed))


def server_of(state: State, fed: Federation, number: int, selection: Selection, near: float) -> Server:
    """The server's step of this round. Every rank computes the same one from the figures of the accepted updates."""
    weights, sent, normalizers, losses, norms = heard(fed.ready)
    total = float(weights.sum())
    if selection.factors is not None:  # the sum estimates the one over all silos drawn from: divide by their weight
        among = selection.among or fed.ids
        total = sum(fed.aggregator.base(silo, fed.num_train[fed.index[silo]]) for silo in among)
    private = fed.private if fed.private is not None and fed.private.of_silos else None
    if private is not None:  # a divisor that does not depend on who takes part
        total = private.denominator
    scale = fed.aggregator.scale(CohortSummary(weights, sent, normalizers, losses, norms, total))
    if "plain" in fed.told and not fed.ready.pools:
        scale *= normalised(fed.ready)
    if not math.isfinite(scale):
        aggregator = type(fed.aggregator).__name__
        raise agreed(Diverged(f"round {number}: {aggregator} would multiply the mean of the updates by {scale}"))
    share = float(sent.sum()) / fed.exchange.facts.total_weight
    optimizer = fed.optimizer.at(number, fed.rounds, share)
    counts = float(sent.sum() / weights.sum()) if len(sent) else 1.0
    steps = fed.updates.steps(state.updates, fed.seed, number, fed.layout)
    shares = sent / sent.sum()
    largest = float(shares.max()) if private is None else private.largest_weight / float(sent.sum())
    on_mean, squares = steps.on_mean(largest), float((shares * norms**2).sum())
    return Server(optimizer, fed.layout, scale, share * near, counts, on_mean, squares)
