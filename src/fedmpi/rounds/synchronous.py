"""The round that waits for every silo of its cohort."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fedmpi.aggregate import CohortSummary
from fedmpi.errors import Diverged, agreed
from fedmpi.exchange.weights import nearness
from fedmpi.records import Record, peak_rss_bytes
from fedmpi.rounds.agreement import agree_ready, raise_failure
from fedmpi.rounds.cohort import select_cohort, share_of_all
from fedmpi.rounds.evaluation import evaluate
from fedmpi.rounds.federation import Federation, State
from fedmpi.rounds.outcome import make_record, training_figures
from fedmpi.rounds.training import train_silos
from fedmpi.server import Server

Judge = Callable[[int, float | None, float | None], None]


def run_round(
    state: State, fed: Federation, written: Any = lambda: -1, judge: Judge = lambda number, loss, norm: None
) -> tuple[State, Record]:
    """The state after one more round, and its record, which is the same on every rank.

    `written` tells the newest checkpoint of this rank; `judge` hears the round's training loss and mean norm of deltas
    before vectors travel, while the state is whole, and may raise. Raises alike on every rank: Stopped, Diverged or
    SiloError out of training, and the state that was given is still whole; SiloError out of evaluation: its parameters
    are spent.
    """
    comm, timer, number = fed.comm, fed.timer, state.round + 1
    sent = comm.counted()
    timer.lap("checkpoint")  # all that lies between rounds
    (cohort, selector, factors, among), lossless, refused = select_cohort(state, fed, number)
    timer.lap("select")

    share = share_of_all(fed, cohort, factors)
    near = 1.0 if fed.exchange.section.lossy or not cohort else nearness(share)
    trained, error = train_silos(state, fed, number, cohort, factors, near, near * share, refused)
    timer.lap("train")
    fed.ready.share(lambda values: comm.share(values, fed.watch.look))
    timer.lap("wait")
    agree_ready(fed, number, cohort, error, near)
    loss, norm = training_figures(fed, lossless)
    if loss is not None or lossless:  # else no target counted, which says nothing
        judge(number, loss, norm)

    server = _server(fed, number, None if factors is None else among or fed.ids, near)
    params_Q, optimizer = fed.exchange.finish(state.params_Q, server, state.optimizer, timer.lap)
    fed.silos.update(trained)
    params_P = fed.layout.params(params_Q)
    average_P = state.average_P
    if fed.average is not None and average_P is not None:
        params_P = average_P = fed.average.follow(average_P, params_P, number)
    error = evaluate(fed, number, params_P, written)
    timer.lap("evaluate")
    up, down, control = comm.counted()
    now = (up, down, control + (2 * fed.done.num_bytes if comm.size > 1 else 0))  # with the one that follows
    fed.done.set_rank(
        comm.rank,
        started_s=timer.started_s,
        rss=peak_rss_bytes(),
        **timer.seconds,
        **fed.exchange.figures(),
        **dict(zip(("up", "down", "control"), (b - a for a, b in zip(sent, now, strict=True)), strict=True)),
    )
    timer.reset()
    fed.done.share(comm.share)
    timer.lap("agree")
    raise_failure(fed, fed.done.rank("status"), error)
    record = make_record(fed, number, cohort, loss, norm, lossless)
    safe = int(fed.done.rank("written").min())
    return State(number, params_Q, optimizer, selector, record, average_P, safe), record


def _server(fed: Federation, number: int, among: Sequence[str] | None, near: float) -> Server:
    """The server's step of this round, from what all ranks know of those that were heard. `among`: the silos by whose
    weight the sum is divided, None: those that were heard."""
    heard = fed.ready.silo("taken") > 0
    weights, sent, normalizers, losses, norms = (
        fed.ready.silo(name)[heard] for name in ("weight", "sent", "normalizer", "start_loss", "norm")
    )
    all_weight = fed.exchange.facts.total_weight
    total = float(weights.sum())
    if among is not None:
        total = sum(fed.aggregator.base(silo, fed.num_train[fed.index[silo]]) for silo in among)
    scale = fed.aggregator.scale(CohortSummary(weights, sent, normalizers, losses, norms, total))
    if not math.isfinite(scale):
        aggregator = type(fed.aggregator).__name__
        raise agreed(Diverged(f"round {number}: {aggregator} would multiply the mean of the updates by {scale}"))
    share = float(sent.sum()) / all_weight
    at = getattr(fed.optimizer, "at", None)  # for one that must know of the round
    optimizer = fed.optimizer if at is None else at(number, fed.rounds, share)
    counts = float(sent.sum() / weights.sum()) if len(sent) else 1.0
    return Server(optimizer, fed.layout, scale, share * near, counts)
