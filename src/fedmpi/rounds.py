"""One federated round, the same lines on every rank in the same order.

    cohort        selected by every rank alike: no message, or one small collective for fresh losses of candidates
    contributions local training of my silos in the cohort, folded as they come
    ready         one small collective: who is ready, who stopped or failed, losses, weights
    exchange      the vectors, and the server's step
    agree         one small collective: evaluation, timings, bytes: the record; the round commits here

A round is a transaction. Whoever leaves it early, because of a signal or because a silo raised, says so in `ready`,
which every rank enters; then all leave, and the state is still that of the last round. Nothing is under `if rank`.

With `exchange.overlap` the parameters that come out of a round, and that it evaluates, are those of the round before:
the exchange that it has begun goes on behind the next one's training (exchange/behind.py).
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any, Literal

import numpy as np
import torch

from fedmpi import rng
from fedmpi.aggregate import Aggregator, Heard
from fedmpi.comm import Solo, ranks_text
from fedmpi.errors import ConfigError, Diverged, ExchangeError, FedmpiError, NoCohort, SiloError, Stopped, agreed
from fedmpi.evaluate import PERSONAL, Scores, Tuning, evaluate_silo, evaluation_key, own_model, tell
from fedmpi.exchange.base import LARGEST_NORM, UNIT, Exchange
from fedmpi.exchange.weights import nearness
from fedmpi.flat import FlatModel
from fedmpi.local import LocalRule, LocalSilo, Round
from fedmpi.metrics.scorers import pooled
from fedmpi.objectives import Criterion, Resolved, Tally
from fedmpi.records import PHASES, Board, Record, Timer, likeness, peak_rss_bytes, plain
from fedmpi.selection import Selection, Selector
from fedmpi.server import Average, Server, ServerOptimizer
from fedmpi.stopping import FAILED, STOP, BrokenOff, Watch
from fedmpi.types import Auxiliary, Contribution

READY_RANK = ("status", "fingerprint")
READY_SILO = (
    *("taken", "rejected", "loss", "targets", "samples", "steps", "norm", "weight", "sent", "normalizer", "start_loss"),
)
PROBE_RANK, PROBE_SILO = ("status",), ("loss",)
DONE_RANK = ("status", "started_s", *PHASES, "rss", "up", "down", "control", "written")

REFUSED = FAILED + 1  # of a rank whose selector chose no cohort
WITHIN = 2e-7  # how far the ring may be from the exact mean, for deltas of 1

Judge = Callable[[int, float | None, float | None], None]


@dataclass(frozen=True)
class State:
    """What a round changes."""

    round: int  # rounds done
    # The global shared parameters [P], on the rank's device; with overlap, the newest to arrive. And behind them the
    # local rule's auxiliary vectors, each [P].
    params_Q: torch.Tensor
    optimizer: Any  # the server optimizer's state
    selector: dict[str, np.ndarray]
    record: Record | None = None  # of the last round
    average_P: torch.Tensor | None = None  # of the parameters over rounds, alike on every rank, if one is kept
    written: int = -1  # newest round whose checkpoint files are safe on every rank


@dataclass
class Federation:
    """What stays the same from round to round: the silos, the rules and this rank's part."""

    ids: Sequence[str]  # all silos, in the federation's order
    owners: Sequence[int]  # the rank of each
    num_train: Sequence[int]  # training samples of each
    silos: dict[str, LocalSilo]  # those that this rank hosts
    comm: Solo
    watch: Watch
    model: FlatModel
    objective: Resolved
    rule: LocalRule
    selector: Selector
    aggregator: Aggregator
    optimizer: ServerOptimizer
    exchange: Exchange
    seed: int
    rounds: int
    evaluate_every: int
    evaluate_batch: int
    average: Average | None = None  # what is evaluated; None: the parameters themselves
    gram: bool | Literal["matrix"] = False  # of the deltas: into the record? All of it?
    finetune: LocalRule | None = None  # for personal figures after the last round
    timer: Timer = field(default_factory=Timer)

    def __post_init__(self) -> None:
        self.index = {silo: i for i, silo in enumerate(self.ids)}
        self.auxiliaries: Sequence[Auxiliary] = getattr(self.rule, "auxiliaries", ())
        self.not_trained = self.model.not_trained()
        rows = zip(self.ids, self.num_train, strict=True)
        self.weights_K = np.array([self.aggregator.base(silo, num) for silo, num in rows])  # what each stands for
        self.ready = Board(self.comm.size, READY_RANK, len(self.ids), READY_SILO)
        self.scores = Scores.of(self.objective, self.rule, self.finetune, self.model.has_personal)
        columns, counts = self.scores.columns, self.scores.num_counts
        self._criteria: dict[str, Criterion] = {}
        self.done = Board(self.comm.size, (*DONE_RANK, *self.exchange.figures()), len(self.ids), columns, counts)

    def criterion(self, silo: LocalSilo) -> Criterion:
        """The training loss for a silo's targets, at which it looks once."""
        if silo.id not in self._criteria:
            self._criteria[silo.id] = self.objective.criterion(silo.data.y_train)
        return self._criteria[silo.id]

    def tuning(self, silo: LocalSilo, number: int, check: Callable[[], None] = lambda: None) -> Tuning | None:
        """How the silo trains the model on for itself after the last round, if it is to."""
        if self.finetune is None or number < self.rounds:
            return None
        criterion = self.criterion(silo)
        round = Round(number, self.rounds, self.seed, criterion.loss, check, count=criterion.count)
        return self.finetune, round


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
    (cohort, selector, factors, among), lossless, refused = _select(state, fed, number)
    timer.lap("select")

    share = _stands_for(fed, cohort, factors)
    near = 1.0 if fed.exchange.section.lossy or not cohort else nearness(share)
    trained, error = _train(state, fed, number, cohort, factors, near, near * share, refused)
    timer.lap("train")
    fed.ready.share(lambda values: comm.share(values, fed.watch.look))
    timer.lap("wait")
    _agree_ready(fed, number, cohort, error, near)
    loss, norm = _trained(fed, lossless)
    if loss is not None or lossless:  # else no target counted, which says nothing
        judge(number, loss, norm)

    server = _server(fed, number, None if factors is None else among or fed.ids, near)
    params_Q, optimizer = fed.exchange.finish(state.params_Q, server, state.optimizer, timer.lap)
    fed.silos.update(trained)
    params_P = params_Q[: fed.model.num_shared]
    average_P = state.average_P
    if fed.average is not None and average_P is not None:
        params_P = average_P = fed.average.follow(average_P, params_P, number)
    error = _evaluate(fed, number, params_P, written)
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
    _raise_failure(fed, fed.done.rank("status"), error)
    record = _record(fed, number, cohort, loss, norm, lossless)
    safe = int(fed.done.rank("written").min())
    return State(number, params_Q, optimizer, selector, record, average_P, safe), record


def _select(state: State, fed: Federation, number: int) -> tuple[Selection, set[str], FedmpiError | None]:
    """The round's cohort, with the silos whose loss is not finite; or why there is none: what a selector says no to on
    this rank, `ready` tells all."""
    try:
        return *_cohort(state, fed, number), None
    except FedmpiError as error:
        if error.agreed:
            raise
        return Selection([], state.selector), set(), error


def _cohort(state: State, fed: Federation, number: int) -> tuple[Selection, set[str]]:
    """The round's cohort; where its selector wants to know losses of the global parameters, after a small collective,
    and with the silos whose loss is not finite.

    Whoever stops or fails while it evaluates says so in that collective, which every rank enters.
    """
    selector, draw = fed.selector, rng.generator(fed.seed, purpose="select", round=number)
    own, observe, asks = state.selector, getattr(fed.selector, "observe", None), getattr(selector, "candidates", None)
    if observe is not None:
        own = observe(fed.ids, own, state.record)
    candidates = asks(fed.ids, own, state.record, draw) if asks is not None else []
    if not candidates:
        return _chosen(selector.select(fed.ids, own, state.record, draw), fed, number), set()
    probe, error = _probe(state, fed, number, candidates)
    status = probe.rank("status")
    _raise_failure(fed, status, error)
    if status.max() >= STOP:
        raise agreed(Stopped(f"stopped in round {number}: {_reason(fed, status)}"))
    losses = dict(zip(fed.ids, probe.silo("loss").tolist(), strict=True))
    of_candidates = {silo: losses[silo] for silo in candidates}
    found = selector.select(fed.ids, own, state.record, draw, of_candidates)  # type: ignore[call-arg]
    return _chosen(found, fed, number), {silo for silo, loss in of_candidates.items() if not math.isfinite(loss)}


def _chosen(found: Any, fed: Federation, number: int) -> Selection:
    """What a selector gave, if it is a cohort and a state."""
    who = f"round {number}: the selector {type(fed.selector).__name__}"
    if not isinstance(found, tuple) or len(found) < 2 or not isinstance(found[1], Mapping):
        raise NoCohort(f"{who} is to return a cohort and its new state (a dict of arrays), and gave {found!r:.80}")
    cohort = [found[0]] if isinstance(found[0], str) else list(found[0])
    chosen = set(cohort)
    if cohort != [silo for silo in fed.ids if silo in chosen]:
        others = [silo for silo in cohort if silo not in fed.index]
        why = f"'{others[0]}' is no silo" if others else "a silo twice, or not in the federation's order"
        raise NoCohort(f"{who} chose {cohort!r:.80}: {why}")
    return Selection(cohort, *found[1:])


def _probe(state: State, fed: Federation, number: int, candidates: Sequence[str]) -> tuple[Board, FedmpiError | None]:
    """Losses of the global parameters on the training samples of the candidates: mine, then everybody's."""
    probe = Board(fed.comm.size, PROBE_RANK, len(fed.ids), PROBE_SILO)
    error: FedmpiError | None = None
    status, name = 0, ""
    try:
        fed.watch.check()
        fed.model.load(state.params_Q[: fed.model.num_shared])
        for name in (silo for silo in candidates if silo in fed.silos):
            if fed.model.touched:  # by a module that counts in evaluation too
                fed.model.load(state.params_Q[: fed.model.num_shared])
            silo, num = fed.silos[name], getattr(fed.selector, "samples", None)
            x, y = silo.data.x_train, silo.data.y_train
            if num is not None and num < len(x):
                drawn = rng.generator(fed.seed, purpose="probe", round=number, silo=name)
                rows = torch.from_numpy(np.sort(drawn.choice(len(x), size=num, replace=False))).to(x.device)
                x, y = x[rows], y[rows]
            probe.set_silo(fed.index[name], loss=_loss(fed, number, silo, x, y))
    except BrokenOff as broken:
        status = broken.status
    except (Exception, SystemExit) as raised:
        status, error = FAILED, _said(raised, f"rank {fed.comm.rank}, silo '{name}', before round {number}")
        fed.watch.tell(FAILED, "")
    probe.set_rank(fed.comm.rank, status=status)
    probe.share(lambda values: fed.comm.share(values, fed.watch.look))
    return probe, error


def _loss(fed: Federation, number: int, silo: LocalSilo, x: torch.Tensor, y: torch.Tensor) -> float:
    """Of what the model shares by now, with the silo's own rest."""
    rng.set_all(rng.key(fed.seed, purpose="loss", round=number, silo=silo.id))
    fed.model.load_personal(silo.kept)
    return fed.objective.mean_loss(fed.model.module, x, y, fed.evaluate_batch, fed.model.device, fed.watch.check)


def _stands_for(fed: Federation, cohort: Sequence[str], factors: Sequence[float] | None) -> float:
    """The share of all weight that the cohort stands for, its selector's factors counted."""
    if len(cohort) == len(fed.ids) and factors is None:
        return 1.0
    weights = fed.weights_K[[fed.index[silo] for silo in cohort]]
    return float((weights if factors is None else weights * factors).sum()) / fed.exchange.facts.total_weight


def _train(
    state: State,
    fed: Federation,
    number: int,
    cohort: Sequence[str],
    factors: Sequence[float] | None,
    near: float,
    stands_for: float,
    refused: FedmpiError | None,
) -> tuple[dict[str, LocalSilo], FedmpiError | None]:
    """Train my silos of the cohort and fold what they contribute; what happened is in `ready`. There is no cohort where
    my selector `refused`."""
    fed.ready.clear()
    mine = [(silo, factor) for silo, factor in zip(cohort, factors or repeat(1.0)) if silo in fed.silos]  # noqa: B905
    fed.exchange.begin(number, len(mine), near)
    trained: dict[str, LocalSilo] = {}
    error: FedmpiError | None = None
    status, name = 0, ""
    try:
        fed.watch.check()
        for name, factor in mine:
            before = fed.silos[name]
            silo = replace(before, kept=dict(before.kept))  # the round may yet be broken off: state waits for agree
            contribution, besides = _contribution(state, fed, number, silo, factor, near)
            fed.ready.set_silo(
                fed.index[name],
                samples=contribution.num_samples,
                targets=contribution.counted,
                steps=contribution.num_steps,
                normalizer=contribution.held,
                start_loss=contribution.start_loss,
                weight=silo.weight * factor,
            )
            norm = float(torch.linalg.vector_norm(contribution.delta_P[: fed.model.num_shared]))
            usable = not math.isnan(besides) and math.isfinite(contribution.weight)
            grown = _grown(contribution.weight, silo.weight * factor, stands_for)
            room = grown if fed.exchange.ring else 1.0
            usable = usable and max(norm, besides) * room < LARGEST_NORM  # not so for nan
            if usable and fed.exchange.holds(contribution.delta_P, grown):
                fed.exchange.add(contribution)
                trained[name] = silo
                fed.ready.set_silo(
                    fed.index[name], taken=True, loss=contribution.loss, norm=norm, sent=contribution.weight
                )
            else:
                fed.ready.set_silo(fed.index[name], rejected=True)
    except BrokenOff as broken:
        status = broken.status
    except (Exception, SystemExit) as raised:
        status, error = FAILED, _said(raised, f"rank {fed.comm.rank}, silo '{name}', round {number}")
        fed.watch.tell(FAILED, "")
    if refused is not None:
        status, error = REFUSED, refused
        fed.watch.tell(FAILED, "")
    fingerprint = fed.exchange.fingerprint(cohort)
    fed.ready.set_rank(fed.comm.rank, status=status, fingerprint=fingerprint)
    return trained, error


def _grown(weight: float, stands_for: float, all_stand_for: float) -> float:
    """Factor by which a delta grows in the sum that it may have to leave room for others in.

    Shares add up to 1 by themselves, but not where steps or a selector's factors are counted.
    """
    return max(1.0, weight / stands_for) * max(1.0, all_stand_for)


def _contribution(
    state: State, fed: Federation, number: int, silo: LocalSilo, factor: float, near: float
) -> tuple[Contribution, float]:
    """What a silo sends: the rule's delta with the aggregator's weight, and auxiliary vectors so that this weight makes
    of them what is theirs; the norm of these before that."""
    num = fed.model.num_shared
    start_Q = fed.exchange.start(silo.id, state.params_Q)
    params_P, *rest = start_Q.view(-1, num)
    auxiliary = {auxiliary.name: part for auxiliary, part in zip(fed.auxiliaries, rest, strict=True)}
    start_loss = 0.0
    if getattr(fed.aggregator, "start_loss", False):
        fed.model.load(params_P)
        start_loss = _loss(fed, number, silo, silo.data.x_train, silo.data.y_train)
    criterion = fed.criterion(silo)
    round = Round(number, fed.rounds, fed.seed, criterion.loss, fed.watch.check, auxiliary, criterion.count)
    contribution = fed.rule.train(silo, fed.model, params_P, round)
    _check(contribution, silo, fed)
    contribution.start_loss = start_loss
    others_A = contribution.delta_P[fed.model.num_shared :]
    besides = float(torch.linalg.vector_norm(others_A))
    contribution.weight = stands_for = silo.weight * factor
    contribution.weight = weight = fed.aggregator.weight(contribution)
    for i, auxiliary_ in enumerate(fed.auxiliaries):
        if auxiliary_.normaliser == "population":
            fed.model.auxiliary(i).mul_(fed.exchange.facts.total_weight / near / (weight * len(fed.ids)))
        elif weight != stands_for:
            fed.model.auxiliary(i).mul_(stands_for / weight)
    return contribution, besides if bool(torch.isfinite(torch.linalg.vector_norm(others_A))) else math.inf


def _check(contribution: Any, silo: LocalSilo, fed: Federation) -> None:
    """TypeError for what a rule gave that cannot be added up or kept."""
    rule, length = type(fed.rule).__name__, fed.model.num_shared * (1 + len(fed.auxiliaries))
    if not isinstance(contribution, Contribution):
        raise TypeError(f"the rule {rule} returned {type(contribution).__name__} in place of a Contribution")
    delta = contribution.delta_P
    if delta.shape != (length,) or delta.dtype != fed.model.dtype:
        wanted = f"{fed.model.dtype} of [{length}]"
        raise TypeError(
            f"the rule {rule} gave a delta that is {delta.dtype} of {list(delta.shape)} in place of {wanted}"
        )
    for name, kept in silo.kept.items():
        if not isinstance(kept, torch.Tensor):
            raise TypeError(f"the rule {rule} keeps '{name}' as {type(kept).__name__}; silos keep tensors")


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
    scale = fed.aggregator.scale(Heard(weights, sent, normalizers, losses, norms, total))
    if not math.isfinite(scale):
        aggregator = type(fed.aggregator).__name__
        raise agreed(Diverged(f"round {number}: {aggregator} would multiply the mean of the updates by {scale}"))
    share = float(sent.sum()) / all_weight
    at = getattr(fed.optimizer, "at", None)  # for one that must know of the round
    optimizer = fed.optimizer if at is None else at(number, fed.rounds, share)
    counts = float(sent.sum() / weights.sum()) if len(sent) else 1.0
    places = (fed.not_trained, fed.exchange.facts.variances)
    return Server(optimizer, fed.model.num_shared, fed.auxiliaries, scale, share * near, counts, *places)


def _agree_ready(
    fed: Federation, number: int, cohort: Sequence[str], error: FedmpiError | None, near: float = 1.0
) -> None:
    """Everybody goes on, or everybody raises the same."""
    status = fed.ready.rank("status")
    if (status == REFUSED).all():
        raise agreed(NoCohort(str(error)))
    if error is not None and status[fed.comm.rank] == REFUSED:
        error = SiloError(f"rank {fed.comm.rank}: {error}")
    _raise_failure(fed, status, error)
    if status.max() >= STOP:
        raise agreed(Stopped(f"stopped in round {number}: {_reason(fed, status)}"))
    fingerprint = fed.ready.rank("fingerprint")
    if (others := np.flatnonzero(fingerprint != fingerprint[0])).size:
        raise agreed(ExchangeError(_difference(fed, cohort, others.tolist())))
    if not cohort:
        raise agreed(NoCohort(f"round {number}: the selector chose no silo"))
    if not fed.ready.silo("taken").any():
        rejected = [silo for silo, no in zip(fed.ids, fed.ready.silo("rejected"), strict=True) if no]
        raise agreed(
            Diverged(
                f"round {number}: every update was rejected ({', '.join(rejected[:8])}): not finite or its norm beyond "
                f"{LARGEST_NORM:.0f}{_beyond(fed)}; a smaller local.lr or local.clip may help"
            )
        )
    if fed.exchange.ring:
        _has_room(fed, number, near)
    if (enough := getattr(fed.aggregator, "suits", None)) is not None:
        try:
            enough(int(fed.ready.silo("taken").sum()))
        except ConfigError as few:  # it is what the round has brought, not the configuration
            raise agreed(NoCohort(f"round {number}: {few}")) from None


def _beyond(fed: Federation) -> str:
    """What else updates are rejected for: that a codec does not hold them."""
    largest = fed.exchange.section.largest
    return "" if largest == math.inf else f" or a value beyond the {largest:.5g} that a codec holds"


def _has_room(fed: Federation, number: int, near: float) -> None:
    """ExchangeError where those that were heard weigh so little of the cohort that the ring's units would show."""
    heard = np.flatnonzero(fed.ready.silo("taken"))
    share = float(fed.ready.silo("sent")[heard].sum()) / fed.exchange.facts.total_weight * near
    if share < len(heard) ** 0.5 / UNIT / WITHIN:
        names = ", ".join(fed.ids[int(i)] for i in heard[:8])
        raise agreed(
            ExchangeError(
                f"round {number}: exchange.reduction: reproducible has no room for updates that weigh {share:.1e} of "
                f"their cohort, and only they were usable ({names}); take reduction: fast, or weights nearer to each "
                "other"
            )
        )


def _said(raised: BaseException, where: str) -> FedmpiError:
    """What went wrong on this rank, for all: one line where it says itself what is wrong, else the traceback."""
    if isinstance(raised, FedmpiError):
        return (ConfigError if isinstance(raised, ConfigError) else SiloError)(f"{where}: {raised}")
    return SiloError(f"{where}:\n{traceback.format_exc()}")


def _raise_failure(fed: Federation, status: np.ndarray, error: FedmpiError | None) -> None:
    """SiloError (or ConfigError) on every rank, with what the first rank that raised has to say. A rank that only left
    because of a notice has nothing to say."""
    if (status < FAILED).all():
        return
    told = np.zeros(fed.comm.size)
    told[fed.comm.rank] = 0 if error is None else error.exit_code
    told = fed.comm.share(told)
    first = int(np.flatnonzero(told)[0]) if told.any() else 0
    text = fed.comm.say("" if error is None else str(error), first)
    kind = ConfigError if told[first] == ConfigError.exit_code else SiloError
    raise agreed(kind(text or "a rank left the round because of an earlier failure"))


def _difference(fed: Federation, cohort: Sequence[str], others: list[int]) -> str:
    """What rank 0 and the first of the others are about to exchange."""
    mine = json.dumps(fed.exchange.declared(cohort))
    here, there = (json.loads(fed.comm.say(mine, rank)) for rank in (0, others[0]))
    names = [name for name in here if here[name] != there[name]]
    texts = [f"{name} is {str(here[name])[:80]} there and {str(there[name])[:80]} here" for name in names]
    return f"what is to be exchanged differs, rank 0 (there) against {ranks_text(others)} (here): {'; '.join(texts)}"


def _reason(fed: Federation, status: np.ndarray) -> str:
    mine = np.zeros(fed.comm.size)
    mine[fed.comm.rank] = bool(fed.watch.reason)
    first = int(np.argmax(fed.comm.share(mine)))
    return f"{fed.comm.say(fed.watch.reason, first)} (rank {first})"


def _evaluate(fed: Federation, number: int, params_P: torch.Tensor, written: Any) -> FedmpiError | None:
    """Evaluate the new parameters on my silos' test data, if it is due, and the silos' own models where they have any;
    what happened is in `done`."""
    fed.done.clear()
    error: FedmpiError | None = None
    name = ""
    try:
        fed.done.set_rank(fed.comm.rank, written=written())
        if number % fed.evaluate_every == 0 or number == fed.rounds:
            fed.model.load(params_P)
            tallies: dict[str, Tally] = {}
            for name, silo in fed.silos.items():
                if fed.model.touched:  # by a module that counts in evaluation too
                    fed.model.load(params_P)
                # Between batches news is passed on, so that a stop is agreed in time; the round still commits.
                rng.set_all(evaluation_key(fed.seed, number, name))
                tallies[name] = evaluate_silo(fed.model, fed.objective, silo, fed.evaluate_batch, fed.watch.look)
                fed.scores.enter(fed.done, fed.index[name], tallies[name])
                tell(f"round {number}", name, tallies[name])
            for name, silo in fed.silos.items():
                own = _evaluate_personal(fed, number, silo, params_P, tallies[name])
                if own is not None:
                    fed.scores.enter(fed.done, fed.index[name], own, PERSONAL)
                    if own is not tallies[name]:
                        tell(f"round {number}", name, own)
    except (Exception, SystemExit) as raised:
        at = f", silo '{name}', after round {number}" if name else ""
        error = _said(raised, f"rank {fed.comm.rank}{at}")
        fed.done.set_rank(fed.comm.rank, status=FAILED)
    return error


def _trained(fed: Federation, lossless: set[str]) -> tuple[float | None, float | None]:
    """Training loss and mean norm of deltas of those that were heard; None where no loss is finite. Silos whose loss is
    not are left out and join the `lossless`."""
    taken, targets, losses = (fed.ready.silo(name) for name in ("taken", "targets", "loss"))
    finite = np.isfinite(losses)
    lossless.update(fed.ids[int(i)] for i in np.flatnonzero(~finite))
    loss = pooled(np.where(finite, losses, 0.0), targets * taken * finite)
    norm = pooled(fed.ready.silo("norm"), taken)
    return plain(loss), plain(norm)


def _evaluate_personal(
    fed: Federation, number: int, silo: LocalSilo, params_P: torch.Tensor, tally: Tally
) -> Tally | None:
    """What the model came to that the silo would use for itself; None where that is the global one. `tally` is of the
    parameters with the silo's layers."""
    if not len(silo.data.x_test):
        return None
    look = fed.watch.look

    def check() -> None:  # a stop is passed on, and waits for the round
        look()

    found = own_model(fed.rule, fed.model, silo, params_P, fed.tuning(silo, number, check))
    if found is None:
        return None
    own_P, own = found
    if own is silo and own_P is params_P:
        return tally
    fed.model.load(own_P)
    rng.set_all(evaluation_key(fed.seed, number, silo.id))
    return evaluate_silo(fed.model, fed.objective, own, fed.evaluate_batch, look)


def _record(
    fed: Federation,
    number: int,
    cohort: Sequence[str],
    loss: float | None,
    norm: float | None,
    lossless: Collection[str],
) -> Record:
    """What the round says of itself, from figures that every rank has."""
    ready, done = fed.ready, fed.done
    tests = done.silo("tests").tolist()
    rejected = [silo for silo, no in zip(fed.ids, ready.silo("rejected"), strict=True) if no]
    in_cohort = set(cohort)
    of_ready = {name: ready.silo(name).tolist() for name in READY_SILO}  # ten thousand silos: no numpy per number
    scored, figures = fed.scores.figures(done, fed.ids)
    own: dict[str, dict[str, Any]] = {}
    if fed.scores.personal:
        own, of_own = fed.scores.figures(done, fed.ids, PERSONAL)
        figures |= of_own
    silos: dict[str, dict[str, Any]] = {}
    for i, silo in enumerate(fed.ids):
        row: dict[str, Any] = {"rank": fed.owners[i], "num_train": fed.num_train[i]}
        if silo in in_cohort and of_ready["taken"][i]:
            row["train_loss"] = of_ready["loss"][i]
            row["num_samples"] = int(of_ready["samples"][i])
            row["num_steps"] = int(of_ready["steps"][i])
            row["delta_norm"] = of_ready["norm"][i]
        if silo in scored:
            row |= {"num_test": int(tests[i]), **scored[silo], **own.get(silo, {})}
        silos[silo] = row
    record: Record = {"round": number, "cohort": list(cohort), "rejected": rejected}
    if lossless:
        record["not_finite"] = [silo for silo in fed.ids if silo in lossless]
    record |= {"train_loss": loss, "delta_norm": norm, **_likeness(fed)}
    record |= figures
    seconds = {name: float(done.rank(name).max()) for name in PHASES}
    record["seconds"] = {"round": float(sum(done.rank(name) for name in PHASES).max()), **seconds}  # type: ignore[union-attr]
    record["seconds"] |= {name: float(done.rank(name).max()) for name in fed.exchange.figures()}
    for name, column in (("bytes_up", "up"), ("bytes_down", "down"), ("bytes_control", "control")):
        record[name] = int(done.rank(column).sum())
    record["peak_rss_bytes"] = [int(v) for v in done.rank("rss")]
    record["silos"] = silos
    return {name: plain(value) for name, value in record.items()}


def _likeness(fed: Federation) -> dict[str, Any]:
    """What the deltas' inner products say, where they were asked for."""
    gram_KK = fed.exchange.gram
    if gram_KK is None:
        return {}
    heard = [silo for silo, sent in zip(fed.ids, fed.ready.silo("sent"), strict=True) if sent]
    return likeness(gram_KK, heard if fed.gram == "matrix" else None)
