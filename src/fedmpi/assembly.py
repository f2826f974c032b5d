"""Builds a run from its configuration: data, model and rules, all checked before training starts. A resumed run is
built the same way."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from fedmpi import device, pretrained, rng, stopping
from fedmpi.attacks import HostileRule, edit_of, poisoned, said
from fedmpi.binding import Bound, bound, collisions
from fedmpi.comm import Comm
from fedmpi.config import Config
from fedmpi.data.files import Files
from fedmpi.directory import Stored, left_later, newest_usable
from fedmpi.errors import ConfigError, agreed
from fedmpi.exchange.base import Exchange, ExchangeContext
from fedmpi.exchange.choose import Choice, choose
from fedmpi.exchange.choose import make as make_exchange
from fedmpi.exchange.config import ExchangeSection
from fedmpi.flat import (
    Allocate,
    Entry,
    FlatModel,
    entries,
    frozen_alone,
    layout_of,
    master_dtype,
    named_exact,
    one_vector,
)
from fedmpi.layout import Layout
from fedmpi.local import LocalRule, LocalSilo
from fedmpi.membership import Comms, Membership
from fedmpi.models import make
from fedmpi.module import saved
from fedmpi.objectives import LossAndMetrics, resolve
from fedmpi.opening import Opened, open_silos
from fedmpi.placement import place
from fedmpi.privacy import SiloPrivacy, Spending, masked, prepare
from fedmpi.privacy.base import REPEATS
from fedmpi.rounds import Federation, State, delays
from fedmpi.rounds.disclosure import refuse_metrics
from fedmpi.rounds.remote import Remote
from fedmpi.secure.apart import Apart
from fedmpi.secure.masks import keep_out_of_core_dumps, require
from fedmpi.secure.session import Masking, Session
from fedmpi.transforms import Transform, Updates
from fedmpi.trial import subject, try_metrics, try_out
from fedmpi.types import SiloData, Source
from fedmpi.watchdog import Watchdog

log = logging.getLogger("fedmpi")

HEAVY = 0.75  # share of the weight beyond which a sum is nearly the update of one silo


class Admitted(NamedTuple):
    """A silo that was admitted to a running job and that the configuration does not name."""

    id: str
    path: str


@dataclass(frozen=True)
class Spec:
    """What a federation is made of, independent of its current members; the same on every rank."""

    config: Config
    source: Source
    objective: LossAndMetrics
    module: torch.nn.Module
    entries: Sequence[Entry]  # of the module's tensors
    section: ExchangeSection  # as configured; `plan` is filled in once it is chosen
    device: torch.device
    watch: stopping.Watch
    private: Spending | None  # the account of differential privacy; it outlives every federation of the run
    admitted: tuple[Admitted, ...] = ()  # silos of `source` that the configuration does not name

    @property
    def known(self) -> list[str]:
        """Ids of all silos that may ever take part. Which of them are hostile does not depend on current members."""
        return [silo.id for silo in self.source.silos]

    @property
    def layout(self) -> Layout:
        """Layout of the vector that crosses ranks."""
        named = named_exact(self.entries, self.config.exchange.exact)
        return layout_of(self.entries, self.config.local.auxiliaries, named)


@dataclass(frozen=True)
class Resumes:
    """The checkpoint whose members a run goes on with, because newer ones with other members are damaged."""

    round: int
    later: Sequence[str]  # silos that joined after it


@dataclass(frozen=True)
class Assembly:
    """A federation with its initial state, and what the run reports about itself."""

    spec: Spec
    federation: Federation
    state: State
    threads: int
    unshared: dict[str, torch.Tensor]  # initial values of the model that no checkpoint stores
    plan: Choice  # of the exchange
    resumes: Resumes | None  # None: from the newest whole checkpoint that fits the members, if there is one
    bound: Sequence[Bound] = ()  # what each rank may run on


@rng.borrowed()
def assemble(
    config: Config,
    comm: Comm,
    out: Path,
    plan_before: Callable[[], str],
    members: Membership | None = None,
    members_before: Callable[[], Sequence[Stored]] = lambda: [],
    statistics_before: Callable[[], Mapping[str, Any]] = dict,
) -> Assembly:
    """Builds and checks everything a run needs. Collective; raises ConfigError on every rank alike.

    `plan_before` is called on rank 0 and returns the plan the run began with, or an empty string. `members` are the
    members to continue with. If None, they are those of the newest whole checkpoint in what `members_before` returns
    on rank 0, the newest first; in a new run, all silos. `statistics_before` returns the statistics behind the inputs
    of the run there, if it has some.
    """
    threads = device.set_threads(comm, config.exchange.reduction == "reproducible")
    ranks_bound = bound(comm)
    for line in collisions(ranks_bound) if comm.rank == 0 else ():
        log.warning(line)
    spec = specify(config, comm, out)
    if (shared := spec.source.shared) is not None:
        begun = comm.collectively(lambda: statistics_before() if comm.rank == 0 else {})
        if known := json.loads(comm.broadcast_text(json.dumps(begun), 0)):
            shared.load(known)
    before = comm.collectively(lambda: members_before() if comm.rank == 0 else [])
    stored = [Stored(*one) for one in json.loads(comm.broadcast_text(json.dumps(before), 0))]
    resumes: Resumes | None = None
    if stored and members is None:
        spec, first, resumes = _resumed_members(spec, comm, out, stored)
    else:
        spec = comm.collectively(lambda: _spec_of(spec, stored[0])) if stored else spec
        first = comm.collectively(lambda: _first_members(spec, comm.hosts, members, stored))
    unshared = first_values(spec.module, spec.entries)
    comms = Comms.of(comm)
    opened = open_members(spec, first, comms)
    built = build_federation(spec, opened, comms, plan_before=plan_before)
    with _or_leave(built.federation.exchange):
        state = begin(built.federation)
    return Assembly(built.spec, built.federation, state, threads, unshared, built.plan, resumes, ranks_bound)


def _first_members(spec: Spec, hosts: Sequence[str], given: Membership | None, stored: Sequence[Stored]) -> Membership:
    """Members at the start of a run without a checkpoint, or with given members."""
    if given is None:
        first = spec.config.engine.clock.members(1)
        silos = [silo for silo in spec.source.silos if first is None or silo.id in first]
        return place(silos, hosts, spec.config.server.dedicated)
    if not stored:
        return given
    before = Membership.of(stored[0].epoch, stored[0].hosted, spec.known)
    # The epoch never falls: requests of a lower one count as done.
    return replace(given, epoch=max(given.epoch, before.epoch + (given.teams != before.teams)))


def _resumed_members(
    spec: Spec, comm: Comm, out: Path, stored: Sequence[Stored]
) -> tuple[Spec, Membership, Resumes | None]:
    """The members of the newest checkpoint that is whole on all ranks, and the spec with those of its silos that the
    configuration does not name. Silos that left later, as damaged newer checkpoints say, stay out. Collective."""

    def members_of(one: Stored) -> Membership:
        return _as_stored(_spec_of(spec, one), comm.hosts, one, stored[0].silos)

    chosen = stored[newest_usable(out, comm, stored, lambda one: members_of(one).hosted(comm.rank))]
    members = comm.collectively(lambda: members_of(chosen))
    later = sorted(stored[0].silos - members.teams.keys())
    resumes = None if chosen is stored[0] else Resumes(chosen.round, later)
    return comm.collectively(lambda: _spec_of(spec, chosen)), members, resumes


def _spec_of(spec: Spec, one: Stored) -> Spec:
    """The spec with the checkpoint's silos that the configuration does not name."""
    return with_admitted(spec, [Admitted(*silo) for silo in one.admitted]) if one.admitted else spec


def _as_stored(spec: Spec, hosts: Sequence[str], one: Stored, newest: Collection[str]) -> Membership:
    """The members of a checkpoint that are also `newest` members. ConfigError if there is none."""
    silos, dedicated = spec.source.silos, spec.config.server.dedicated
    before = Membership.of(one.epoch, one.hosted, spec.known)
    if left := left_later(one, before.ids, newest):
        before = before.without(*left)
    if before.epoch == 0 and len(before.teams) == len(silos):
        return place(silos, hosts, dedicated)
    with contextlib.suppress(ConfigError):
        if len(one.hosted) == len(hosts):
            return before.checked(silos, hosts, dedicated)
    again = place([silo for silo in silos if silo.id in before.teams], hosts, dedicated)  # ranks or hosts changed
    return replace(again, epoch=before.epoch)


def specify(config: Config, comm: Comm, out: Path, known: Source | None = None) -> Spec:
    """Builds what does not depend on the members. Collective. `known`: the silos, if not from the configured data."""
    chosen = device.choose(config.device.name, config.device.share, comm)
    source = comm.collectively(lambda: source_of(config)) if known is None else known
    facts_of_all = (source.silos, source.task, source.shape, source.num_classes)
    if config.attack is not None and comm.rank == 0:
        log.warning("an experiment, not for use: %s", said(config.attack, [silo.id for silo in source.silos]))
    if config.privacy is not None and config.privacy.reproducible and comm.rank == 0:
        log.warning("an experiment, not for use: privacy.reproducible: %s", REPEATS)
    comm.require_equal("the list of silos", hashlib.sha256(repr(facts_of_all).encode()).digest(), ConfigError)
    objective = comm.collectively(lambda: resolve(config.objective, source.task, source.num_classes))
    comm.collectively(lambda: refuse_metrics(config.disclosed, objective.scorers, config.secure is not None))
    module = comm.collectively(lambda: build_module(config, source))
    if (init := config.init) is not None:
        left_out = comm.collectively(lambda: pretrained.start(module, init))
        if left_out and comm.rank == 0:
            log.warning(left_out)
    # Different initial values would make ranks train different models: other files in `init`, other torch versions.
    comm.require_equal("the model's first parameters", digest_of(saved(module)), ConfigError)
    found = comm.collectively(lambda: entries(module, config.exchange.parameters))
    comm.collectively(lambda: starts_finite(module, found))
    grace_s, heals = config.comm.grace_s, config.heals != "stop"
    watchdog = comm.collectively(lambda: None if grace_s is None else Watchdog(grace_s, comm, heals))
    watch = stopping.Watch(comm, out, watchdog)
    private = None
    if config.privacy is not None:
        config.privacy.takes(source)  # alike on all ranks
        private = Spending.of(config.privacy, out, config.seed)
        private.open(comm)
    return Spec(config, source, objective, module, found, config.exchange, chosen, watch, private)


def open_members(
    spec: Spec, members: Membership, comms: Comms, held: Collection[str] = (), known: Mapping[str, np.ndarray] = {}
) -> Opened:
    """Opens the members' data where it is not open yet, and tries it with the model. Collective.

    Every check of a membership happens here, alike on every rank, and leaves existing state unchanged. `held`: silos
    that this rank has open; `known`: facts of silos, from any rank. Raises ConfigError on every rank.
    """
    config, comm = spec.config, comms.control
    members = comm.collectively(lambda: members.checked(spec.source.silos, comms.world.hosts, config.server.dedicated))
    if config.secure is not None and known and {*known} != {*members.ids}:
        raise agreed(ConfigError("secure: a run keeps its silos: two sums that differ by one would show its update"))
    opened = open_silos(spec.source, members, comm, held, known, config.hides_checksums)
    # Components raise if they do not support them.
    comm.collectively(lambda: config.entries(spec.module, members.ids, spec.known))
    comm.collectively(lambda: weights_of(config, members.ids, opened.num_train))
    _try_members(spec, members, opened.data, comm)
    if (capped := config.select.capped(len(members.ids))) and comm.rank == 0:
        log.warning(capped)
    return opened


def open_alone(spec: Spec, silo: str, comms: Comms) -> Opened:
    """Opens the data of one silo, whose process hosts no other, and tries them with the model. Raises ConfigError."""
    members = Membership(0, {silo: (0,)}).checked(spec.source.silos, comms.world.hosts)
    opened = open_silos(spec.source, members, comms.control)
    spec.config.entries(spec.module, spec.known, spec.known)
    weights_of(spec.config, members.ids, opened.num_train)
    _try_members(spec, members, opened.data, comms.control)
    return opened


class Built(NamedTuple):
    """A federation and what it was built from."""

    federation: Federation
    spec: Spec  # with the plan that was chosen
    plan: Choice  # of the exchange


def build_federation(
    spec: Spec,
    opened: Opened,
    comms: Comms,
    held: Mapping[str, LocalSilo] = {},
    plan_before: Callable[[], str] = lambda: "",
    sends: type[Exchange] | None = None,
    remote: Remote | None = None,
) -> Built:
    """Builds the federation of these members, with its own exchange and model, as before its first round.

    `held`: silos that this rank has open. `sends`: the exchange, in place of a plan of the configuration; `remote`:
    silos in jobs of their own. Collective; raises ConfigError on every rank alike."""
    config, comm, members, attack = spec.config, comms.control, opened.members, spec.config.attack
    weights = weights_of(config, members.ids, opened.num_train)
    hosted = members.hosted(comm.rank)
    secure = _session(spec, opened, comm)
    context = _context(spec, weights, hosted, comm)._replace(secure=secure)
    zeros_Q = torch.zeros(spec.layout.size, dtype=master_dtype(spec.entries), device=spec.device)
    updates: tuple[Transform, ...] = config.updates
    if sends is None:
        plan = choose(spec.section, comms.leaders, zeros_Q, context, plan_before)
        exchange = make_exchange(plan.section, comms.leaders, zeros_Q, context)
    else:
        plan = Choice(spec.section)
        exchange = sends(spec.section, comms.leaders, zeros_Q, context)
    with _or_leave(exchange):
        if spec.private is not None:
            num_train = dict(zip(members.ids, opened.num_train, strict=True))
            updates = prepare(config, spec.private, num_train, weights, comm)
            if secure is not None and isinstance(config.privacy, SiloPrivacy):
                given = (config.privacy, config, spec.private, members, secure.ring, exchange.layout)
                secure.noise = comm.collectively(lambda: masked.shares(*given))
        model = _model(spec, exchange, comms)
        silos = comm.collectively(
            lambda: {silo: _local(silo, opened.data, held, weights[silo], spec.device) for silo in hosted}
        )
        federation = Federation(
            membership=members,
            comms=comms,
            facts_KF=opened.facts_KF,
            silos=silos,
            watch=spec.watch,
            model=model,
            objective=spec.objective,
            rule=config.rule if attack is None else cast(LocalRule, HostileRule(config.rule, attack, spec.known)),
            runner=config.runner,
            selector=config.select,
            aggregator=config.aggregate,
            optimizer=config.server.optimizer,
            exchange=exchange,
            seed=config.seed,
            rounds=config.rounds,
            evaluate_every=config.evaluate.every,
            evaluate_batch=config.evaluate.batch_size,
            average=config.server.average,
            measurements=config.records.measurements,
            disclose=config.disclosed,
            updates=Updates(updates),
            private=spec.private,
            finetune=config.evaluate.finetune,
            told=told_columns(config),
            secure=secure,
            experiment=_experiment(config, spec.known),
            remote=remote,
        )
    return Built(federation, replace(spec, section=plan.section), plan)


def told_columns(config: Config) -> tuple[str, ...]:
    """Columns of the silos' table that the engine needs; also who drops out of secure sums of silos in jobs."""
    columns = (*config.policy.columns, *config.engine.columns, *_of_delays(config))
    lost = ("late", "seconds") if config.secure is not None and config.transport.apart else ()
    return (*columns, *(name for name in lost if name not in columns))


def _of_delays(config: Config) -> tuple[str, ...]:
    """Columns that tell measured delays of silos, if the amount of work follows them and no arrivals tell them."""
    return delays.COLUMNS if config.local.by_delay is not None and not config.engine.arrivals else ()


def _session(spec: Spec, opened: Opened, comm: Comm) -> Masking | None:
    """New keys for these members, or none if silos in jobs of their own make them for each sum; None without `secure`.
    Collective."""
    config, members = spec.config, opened.members
    if (secure := config.secure) is None:
        return None
    num_tested = int(np.count_nonzero(opened.facts_KF[:, 1]))
    comm.collectively(lambda: can_mask(config, members.ids, num_tested, spec.device))
    keep_out_of_core_dumps()
    ring, threshold = secure.ring(config, len(members.ids)), secure.fewest(config, members.ids)
    session: Masking
    if config.transport.apart:
        session = Apart(len(members.ids), ring, threshold)
    else:
        session = Session(comm, members.ids, members.ranks, ring, threshold, secure.neighbours)
    if comm.rank == 0:
        heavy = _heavy(weights_of(config, members.ids, opened.num_train))
        for told in filter(None, (session.alone(), secure.sparse(len(members.ids)), heavy)):
            log.warning("secure: %s", told)
    return session


def _heavy(weights: Mapping[str, float]) -> str:
    """A warning if one silo has most of the weight of all; else empty."""
    silo = max(weights, key=lambda silo: weights[silo])
    if (share := weights[silo] / sum(weights.values())) <= HEAVY:
        return ""
    return (
        f"silo '{silo}' has {share:.0%} of the weight of all, so a sum is nearly its update; "
        "aggregate: {name: mean, weights: uniform} counts silos alike"
    )


def can_mask(config: Config, ids: Sequence[str], num_tested: int, chosen: torch.device) -> None:
    """Raises ConfigError if masks cannot be made here, or if so few silos with test data that their sums are hidden."""
    assert config.secure is not None
    require()
    if chosen.type != "cpu":
        raise ConfigError("secure: masks are made in host memory; take device.name: cpu")
    if 0 < num_tested < (threshold := config.secure.fewest(config, ids)):
        why = f"{num_tested} of the silos have test data, and secure.threshold is {threshold}"
        raise ConfigError(f"secure: {why}: sums of so few test figures are not revealed; test more silos, or none")


@contextlib.contextmanager
def _or_leave(exchange: Exchange) -> Iterator[None]:
    """Stops the exchange's pending communication if the block raises."""
    try:
        yield
    except Exception:
        exchange.leave()
        raise


def begin(fed: Federation) -> State:
    """The state before the first round. Collective."""
    model, exchange = fed.model, fed.exchange
    params_Q = torch.zeros(exchange.num_params, dtype=model.dtype, device=model.device)
    params_P = fed.layout.params(params_Q)
    params_P.copy_(model.params())
    average_P = params_P.clone() if fed.average is not None else None
    begun = fed.comm.collectively(lambda: fed.optimizer.init(exchange.shard(params_P)))
    params_Q, optimizer = exchange.home(params_Q, begun)
    selector = fed.comm.collectively(lambda: fed.selector.init(fed.num_train))
    return State(0, params_Q, optimizer, selector, average_P=average_P, updates=fed.updates.init())


def _context(spec: Spec, weights: Mapping[str, float], hosted: Sequence[str], comm: Comm) -> ExchangeContext:
    """Facts about the run that the exchange needs."""
    config, found = spec.config, spec.entries
    one = torch.zeros(1, dtype=master_dtype(found))
    states = comm.collectively(lambda: len(config.server.optimizer.init(one)))
    layout = comm.collectively(lambda: spec.layout)
    return ExchangeContext(
        sum(weights.values()),
        list(weights),
        hosted,
        config.seed,
        None if config.aggregate.needs == "sum" else config.aggregate,
        config.rounds,
        layout.num_params if "gram" in config.records.needs else 0,
        states,
        layout,
        None if config.attack is None or not config.attack.omniscient else edit_of(config.attack, spec.known),
        config.engine.arrivals > 0,
    )


def _model(spec: Spec, exchange: Exchange, comms: Comms) -> FlatModel:
    """The model, in memory that its deltas can be sent from directly. Collective."""
    allocate: Allocate = comms.leaders.allocate
    if spec.device.type == "cpu" and one_vector(spec.entries):
        own = exchange.delta()
        allocate = lambda n, dtype: own[:n]  # noqa: E731
    shared = spec.config.exchange.parameters
    make = functools.partial(FlatModel, spec.module, shared, spec.device, allocate, exchange.layout)
    model = comms.control.collectively(make)
    if isinstance(spec.config.model, torch.nn.Module):
        model.hand_out()  # who made the configuration still has it
    return model


def with_admitted(spec: Spec, admitted: Sequence[Admitted]) -> Spec:
    """The spec with these silos in its data, besides the configured ones. ConfigError if they do not fit."""
    source = source_of(spec.config, admitted)
    if source.shared is not None and spec.source.shared is not None and spec.source.shared.known:
        source.shared.load(spec.source.shared.told())  # of the silos that began
    return replace(spec, source=source, admitted=tuple(admitted))


def source_of(config: Config, admitted: Sequence[Admitted] = ()) -> Source:
    """The dataset, with the `admitted` silos added. The global generators of torch, numpy and Python are seeded around
    a user's dataset, so it draws the same numbers in every run and on every rank, for each silo's samples too."""
    seed, data = config.seed, config.data
    for silo, path in admitted:
        if not isinstance(data, Files):
            raise ConfigError(f"silo '{silo}' has a file of its own, but data is not `files`")
        data = data.with_silo(silo, Path(path))
    with rng.borrowed():
        rng.set_all(rng.key(seed, purpose="data"))
        source = data.source(seed)

    def opened(silo: str) -> SiloData:
        with rng.borrowed():
            rng.set_all(rng.key(seed, purpose="data", silo=silo))
            return source.open(silo)

    keyed = replace(source, open=opened)
    return keyed if config.attack is None else poisoned(keyed, config.attack)


def _experiment(config: Config, known: Sequence[str]) -> str:
    """Label in the records of a run that is an experiment; empty for any other."""
    if config.privacy is not None and config.privacy.reproducible:
        return f"privacy.reproducible: {REPEATS}"
    return "" if config.attack is None else said(config.attack, known)


def weights_of(config: Config, ids: Sequence[str], num_train: Sequence[int]) -> dict[str, float]:
    """Base weight of each silo. Raises ConfigError unless it is positive and finite."""
    weights = {silo: config.aggregate.base(silo, n) for silo, n in zip(ids, num_train, strict=True)}
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise ConfigError(f"aggregate: silo '{name}' weighs {weight}; weights are positive numbers")
    return weights


def build_module(config: Config, source: Source) -> torch.nn.Module:
    """The model with initial parameters that depend only on the seed. Raises ConfigError for meta tensors."""
    with rng.borrowed():
        rng.set_all(rng.key(config.seed, purpose="init"))
        module = make(config.model, source)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise ConfigError(f"model: '{name}' is on the meta device and has no values; make it on a real one")
    return module


def _try_members(spec: Spec, members: Membership, opened: Mapping[str, SiloData], comm: Comm) -> None:
    """Runs a few samples of every member through a copy of the model, and every metric. Collective."""
    config, objective = spec.config, spec.objective
    rng.set_all(rng.key(config.seed, purpose="trial"))
    speaks = comm.rank == members.ranks[0]  # a rank with a silo; the model is the same on all ranks
    with subject(spec.module, spec.device) as one:
        comm.collectively(lambda: try_out(config, one, objective, opened, frozen_alone(spec.entries), speaks))
        try_metrics(one, objective, opened, config.evaluate.batch_size, comm)


def starts_finite(module: torch.nn.Module, found: Sequence[Entry]) -> None:
    """Raises ConfigError if initial values are not finite."""
    tensors = saved(module)
    for entry in found:
        if (entry.trainable or entry.kind == "shared") and not bool(torch.isfinite(tensors[entry.name]).all()):
            other = "" if entry.trainable else "; a buffer that is not to be sent is registered with persistent=False"
            raise ConfigError(f"model: '{entry.name}' starts with values that are not finite{other}")


def digest_of(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """SHA-256 of tensors and their names, independent of their order."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.digest()


def _local(
    silo: str, data: dict[str, SiloData], held: Mapping[str, LocalSilo], weight: float, chosen: torch.device
) -> LocalSilo:
    """The silo before training, its samples on the training device and removed from `data`."""
    if silo in held:
        return LocalSilo(silo, held[silo].data, weight)
    parts = data.pop(silo)
    tensors = {i: part for i, part in enumerate(parts) if isinstance(part, torch.Tensor)}  # streamed ones stay
    moved = dict(zip(tensors, device.keep_on(chosen, list(tensors.values())), strict=True))
    return LocalSilo(silo, SiloData(*(moved.get(i, part) for i, part in enumerate(parts))), weight)  # type: ignore[arg-type]


def first_values(module: torch.nn.Module, found: Sequence[Entry]) -> dict[str, torch.Tensor]:
    """Copies of the initial values that no checkpoint stores: frozen parameters that are not shared, and the values
    from which silos start their personal ones."""
    state = module.state_dict()
    return {e.name: state[e.name].detach().cpu().clone() for e in found if e.kind != "shared"}
