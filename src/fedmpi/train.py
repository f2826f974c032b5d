"""The training loop of a run: assemble, resume, train rounds, evaluate, record, checkpoint, stop.

    with fedmpi.Run("configs/digits.yaml", "rounds=5") as run:
        for record in run:
            print(record["round"], record["accuracy"])

Every rank executes the same lines. What can fail on one rank only runs in `comm.collectively`, so that all ranks raise
the same error.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch

import fedmpi
from fedmpi import checkpoint, disk, launcher, rng, roster, sources, stopping
from fedmpi.assembly import assemble, digest_of, open_members
from fedmpi.changes import asked_for
from fedmpi.comm import Comm, Spawned, connect, go_on_with
from fedmpi.components import did_you_mean, to_dict
from fedmpi.config import Config, differences, digest, load, moved_schedules, run_directory
from fedmpi.device import capabilities
from fedmpi.directory import (
    CODE,
    UNSHARED_FILE,
    RunDirectory,
    keep_code,
    read_config,
    save_model,
    save_tensors,
    write_config,
)
from fedmpi.errors import (
    CheckpointError,
    CommTimeout,
    ConfigError,
    Diverged,
    FedmpiError,
    NoCohort,
    RankLost,
    Stopped,
    agreed,
)
from fedmpi.evaluate import load_own
from fedmpi.flat import changed_entries, signature
from fedmpi.fresh import is_fresh, joins_no_more
from fedmpi.heal import Loss, Regrouped, agreed_mirror, healed, inherited, newest_common
from fedmpi.health import Health
from fedmpi.keeper import Keeper
from fedmpi.membership import Comms, Membership
from fedmpi.mirror import Mirror
from fedmpi.opening import Opened, fingerprint
from fedmpi.outcome import RoundOutcome
from fedmpi.output import flush, say
from fedmpi.rebuild import admitted, leave_memory, rebuilt
from fedmpi.records import PHASES, Record, RunInfo, Sink, Sinks
from fedmpi.records.metrics import last_round
from fedmpi.records.sink import Timings
from fedmpi.requests import Desk, Request
from fedmpi.roster import Roster, contributors
from fedmpi.rounds import Federation
from fedmpi.trust import confined

log = logging.getLogger("fedmpi")

RANKS_FILE = "ranks.json"
SPAWNS = 8  # times that fresh ranks are started in a run
WRITER_S = 30.0  # seconds that a failed run waits for the checkpoint that is being written
ALONE_S = 1.0  # the same for a rank that fails alone, while the others wait for it


@functools.cache
def versions() -> dict[str, str]:
    """The versions of fedmpi, Python and the packages that affect a run's figures."""
    from importlib.metadata import version

    names = ("torch", "numpy", "mpi4py", "h5py")
    return {"fedmpi": fedmpi.__version__, "python": platform.python_version()} | {n: version(n) for n in names}


class Run:
    """A federated run. Iterating over it trains and yields one record per round. Construction is collective.

    It is a context manager, because checkpoints are written in the background. `config` is a Config or a YAML file with
    overrides; from the config.yaml of a run directory only trusted code is imported (trust.py) and what `allow` names.
    `membership` says which silos take part, on which ranks; the default is all silos, or on resume those of the
    checkpoint. Raises ConfigError, the same on every rank, before anything is trained.

    Attributes: config; out (the run directory); parameters (the global shared parameters, [P]); record (the last one);
    resumed (the round it resumed from); metric and maximize (the metric that decides the best round, and whether higher
    is better).
    """

    def __init__(
        self,
        config: Config | str | Path,
        *overrides: str,
        allow: Sequence[str] = (),
        comm: Comm | None = None,
        membership: Membership | None = None,
    ) -> None:
        stopping.listen()  # before MPI starts: a batch system may signal a job during its start
        try:
            self.comm = comm if comm is not None else connect()
            named_by = None if isinstance(config, Config) else run_directory(Path(config))
            self._confined = functools.partial(confined, named_by, allow)
            self._agree(lambda: _loaded(config, overrides))
        except BaseException as error:
            stopping.forget()
            if is_fresh():
                _leave_others(error)
            raise
        self.code: dict[str, bytes] = {}  # of the user, that the configuration names
        self._closed = False
        self._spoiled = False  # whether a round failed after its parameters were overwritten
        self._listens = True  # to signals
        self._stopped = False  # whether a stop request ends the run
        self._breaks_off = False  # whether an error that all ranks raise ends it before its last round
        self.comm.open_runs += 1
        self._mirrors: list[Mirror] = []  # of the state; two from a new membership to the next commit
        self._added: list[Sink] = []  # by `add_sink`
        self._roster: Roster | None = None  # on rank 0, unless all rounds are done
        self._desk: Desk | None = None  # likewise
        self._changes: list[tuple[Request, int, int]] = []  # in the last `_take_up`: request, rounds done, epoch
        self._rounds_before: int | None = None  # `rounds` in the run directory's stored configuration
        self._full_hosts = self.comm.hosts  # of all ranks, with lost ones
        self._spawned: Spawned | None = None  # fresh ranks that have not joined yet
        self._spawns = SPAWNS  # how often fresh ranks may be started
        try:
            self._set_up(None if is_fresh() else membership)  # a fresh rank takes the members that the others have now
        except BaseException as error:
            self._release(error)
            if is_fresh():
                _leave_others(error)
            raise

    # ------------------------------------------------------------ set-up

    def _agree(self, load: Callable[[], Config]) -> None:
        """Agree on the configuration. Collective."""
        if not self.comm.open_runs:
            self.comm.finish()  # an earlier run's stop notice must not stop this one
        with self._confined():
            self.config = self.comm.collectively(load)
        self.comm.require_equal("the configuration", digest(self.config), ConfigError)
        self.comm.set_up(self.config.comm.timeout_s)

    def _set_up(self, membership: Membership | None, directory: RunDirectory | None = None) -> None:
        """Build the run's parts, and resume. `directory`: of the start that goes on with fresh ranks. Collective."""
        self._require_own_posts()
        with self._confined():
            self._assemble(membership, directory)
        self._resume(others=membership is not None)
        self._describe()

    def _require_own_posts(self) -> None:
        """Raise ConfigError if this run's posts between ranks could be read by another open run of the process."""
        engine = self.config.engine
        who = "engine.policy: a deadline" if engine.policy.posts else "engine: buffered in real time"
        posts = engine.policy.posts or (engine.arrivals > 0 and not engine.clock.is_virtual)
        if posts and self.comm.size > 1 and self.comm.open_runs > 1:
            raise agreed(ConfigError(f"{who} needs the ranks to itself; close the open run first"))

    def _assemble(self, members: Membership | None, directory: RunDirectory | None) -> None:
        """Lock the run directory and build the run's parts. Collective."""
        kept: dict[str, bytes] | None = (
            None if directory is None else self.code
        )  # what runs here, even if the files have changed since
        if directory is None:
            self._directory = RunDirectory(Path(self.config.out), self.comm)
        else:
            directory.hand_over(self.comm)
        self.out = self._directory.path
        before = self._directory.stored
        parts = assemble(self.config, self.comm, self.out, self._directory.plan_before, members, before)
        fed, self._spec = parts.federation, parts.spec
        self.federation = fed
        self.device, self.threads, self.central = parts.spec.device, parts.threads, parts.spec.source.central
        self.metric, self.maximize = fed.objective.metric_name, fed.objective.maximize
        self.unshared, self.plan, self._resumes = parts.unshared, parts.plan, parts.resumes
        self.state, module = parts.state, fed.model.module
        modules = [type(module).__module__] if isinstance(self.config.model, torch.nn.Module) else []
        self.code = self.comm.collectively(
            lambda: sources.own_code(to_dict(self.config), *modules) if kept is None else kept
        )
        digest_of_code = hashlib.sha256(repr(sources.digests(self.code)).encode()).digest()
        self.comm.require_equal("the code that the configuration names", digest_of_code, ConfigError)

    def _resume(self, others: bool) -> None:
        """Resume from the newest round that is whole on all ranks, if there is one. Collective. `others`: whether that
        round may have had other members."""
        self.comm.collectively(self._check_stored if self.comm.rank == 0 else lambda: None)
        self._health = Health(self.config.stop)
        self._keeper = self._make_keeper(others)
        self.state = self._keeper.resume(self.state, None if self._resumes is None else self._resumes.round)
        self.resumed = self.state.round

    def _make_keeper(self, others: bool) -> Keeper:
        order = [silo.id for silo in self._spec.source.silos]
        return Keeper(
            self.config,
            self.federation,
            self._health,
            self._directory,
            self._score,
            order,
            others,
            self._spec.admitted,
        )

    def _judge(self, outcome: RoundOutcome) -> None:
        """Raise Diverged, on all ranks, if a round that is not committed yet shows divergence. Collective. At the first
        doubt the last good state is written to disk."""
        loss, norm = outcome.loss, outcome.norm
        if loss is None and not outcome.num_not_finite:
            return  # no target was counted, so there is nothing to judge
        if not self._health.doubts and self._health.suspects(loss, norm) and not self._keeper.has(self.state):
            self._keeper.write(self.state)
        why = self._health.look(outcome.round, loss, norm)
        if why:
            raise agreed(Diverged(why))

    def _check_stored(self) -> None:
        """Raise ConfigError if the run directory was started with another configuration, model or code."""
        if not checkpoint.sealed_rounds(self.out):
            return
        begun = read_config(self.out)
        about = begun.about
        self._rounds_before = begun.config.get("rounds")
        changed = differences(begun.config, self.config, about["plan"])
        if not changed and (others := sources.changes(about.get("code", {}), sources.digests(self.code))):
            text = f"code has changed since {self.out} was trained with it, and is kept in {self.out / CODE}: "
            text += ", ".join(others)
            if self.config.resume.code == "refuse":
                raise ConfigError(f"{text}; put it back, say resume.code=warn, or choose another out=")
            log.warning("%s", text)
        changed += changed_entries(about["model"], self.federation.model.entries)
        if not changed and about["unshared"] != digest_of(self.unshared).hex():
            changed = ["what the model does not share starts otherwise (was `init` given then?)"]
        if changed:
            more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
            raise ConfigError(
                f"{self.out} holds checkpoints of another run: {'; '.join(changed[:3])}{more}; choose another out="
            )
        if moved := moved_schedules(begun.config, self.config):
            before, now = begun.config["rounds"], self.config.rounds
            say(
                f"fedmpi: rounds was {before} and is {now}: {' and '.join(moved)} now ends at {now}; to keep it as it "
                f"was, {moved[0]}.rounds={before}",
                error=True,
            )

    def _describe(self) -> None:
        """Write the run's description, configuration and code into its directory. Collective."""
        fed, ranks = self.federation, self._ranks()
        about = {
            "versions": versions(),
            "unshared": digest_of(self.unshared).hex(),
            "metric": self.metric,
            "maximize": self.maximize,
            "params": fed.model.num_shared,
            "plan": fed.exchange.section.plan,
            "plan_seconds": dict(self.plan.seconds),
            "ranks": self.comm.size,
            "model": signature(fed.model.entries),
            "code": sources.digests(self.code),
        }
        rounds = self.config.rounds
        # If no round is left to train, the directory keeps the description of the run that trained.
        over = self.resumed > rounds or self.resumed == rounds == self._rounds_before

        def write() -> None:
            if self.unshared:
                save_tensors(self.unshared, self.out / UNSHARED_FILE)
            if not over:
                keep_code(self.out, self.code, self.state.round)
                write_config(self.out, to_dict(self.config), about)
                self._roster = Roster(self.out, self.state.round, rounds, self.config.admit)
                self._register(ranks)
                self._desk = Desk(self.out)
                self._begin_desk(self._desk)
            self._open_sinks(self.state.round)

        def written() -> None:
            try:
                write()
            except OSError as error:
                raise ConfigError(f"out: cannot write into {self.out}: {error.strerror or error}") from None

        self.comm.collectively(written if self.comm.rank == 0 else lambda: None)
        self._keeper.open(lambda: self._sinks.sync())

    def _open_sinks(self, done: int) -> None:
        info = RunInfo(self.out, done, self.config.rounds, self.metric, self._timings)
        self._sinks = Sinks(info, self.config.records.open_sinks())

    def _close_sinks(self) -> None:
        if "_sinks" in vars(self):  # on rank 0, while a run is open
            self._sinks.close()
            del self._sinks

    def _timings(self) -> Timings:
        """Each rank's start time of the last round, and the seconds of its phases, both by rank [n]."""
        done = self.federation.done
        return done.rank("started_s"), {name: done.rank(name) for name in PHASES}

    def _ranks(self) -> list[dict[str, Any]]:
        """The rows of ranks.json. Collective."""
        pid = os.getpid()
        row = {"pid": pid, "born": launcher.born(pid), **capabilities(self.device), "threads": self.threads}
        rows = self.comm.gather(json.dumps(row).encode().ljust(320))
        hosted = self.membership.by_rank(self.comm.size)
        return [
            {"rank": rank, "host": host, **json.loads(text), "silos": silos}
            for rank, (host, text, silos) in enumerate(zip(self.comm.hosts, rows, hosted, strict=True))
        ]

    def _register(self, ranks: Sequence[dict[str, Any]], lost: Mapping[str, str] = {}, why: str | None = None) -> None:
        """Write the current members to ranks.json and silos.json; see Roster.register. Rank 0 only."""
        disk.replace_text(self.out / RANKS_FILE, json.dumps(ranks, indent=1))
        if self._roster is not None:
            fed = self.federation
            code = hashlib.sha256(repr((fedmpi.__version__, sources.digests(self.code))).encode()).hexdigest()[:8]
            shown = self.config.disclose == "silo"
            about = {
                silo: {"num_train": int(facts[0]), "data": fingerprint(facts) if shown else None, "code": code}
                for silo, facts in fed.facts.items()
            }
            self._roster.register(self.membership, self._spec.known, about, ranks, self.state.round, lost, why)

    # ------------------------------------------------------------ members

    @property
    def membership(self) -> Membership:
        """Which silos take part, and on which ranks."""
        return self.federation.membership

    @rng.borrowed()
    def rebuild(self, membership: Membership) -> None:
        """Change the members, or the ranks of silos, from the next round on. Collective, between two rounds.

            for record in run:
                if record["round"] == 10:
                    run.rebuild(run.membership.without("c").moved("a", 1))

        A silo that moves keeps its state; its new rank opens its data. A silo that joins must be in the data set and
        not a member, for example because it left earlier; it starts without kept state. The next rounds give the same
        bits as a run that resumes from this round with this membership. Tensors read from the run before the call, such
        as `parameters`, are invalid afterwards. A run that is killed before the next checkpoint resumes from the last
        one, with that checkpoint's members.

        Raises ConfigError, the same on every rank, for an impossible membership; the run is then unchanged.
        """
        if self._closed:
            raise ConfigError("membership: the run is closed")
        fed, state = self.federation, self.state
        membership = replace(membership, epoch=max(membership.epoch, fed.membership.epoch + 1))
        self.comm.set_up(self.config.comm.timeout_s)  # opening data takes time
        opened = admitted(self._spec, fed, state, membership)
        self._keeper.seal()
        self._spoiled = True  # until the new federation is complete
        self.state = replace(state, params_Q=state.params_Q.clone(), optimizer=None)
        self.federation, self.state = rebuilt(self._spec, fed, state, self._health, opened)
        self._spoiled = False
        self._keeper.follow(self.federation, self._spec.admitted)
        self._mirror_anew()
        ranks = self._ranks()

        def register() -> None:  # the change is done: a file that only people read must not undo it
            try:
                self._register(ranks)
            except OSError as error:
                log.warning("%s: cannot write who takes part: %s", self.out, error.strerror or error)

        self.comm.collectively(register if self.comm.rank == 0 else lambda: None)

    # ------------------------------------------------------------ rounds

    def add_sink(self, sink: Sink) -> None:
        """Pass every record from now on to `sink.write`, on rank 0; on other ranks the call does nothing."""
        self._added.append(sink)
        if self.comm.rank == 0:
            self._sinks.add(sink)

    @property
    def model(self) -> torch.nn.Module:
        """The torch module that this rank's silos train in, one after the other."""
        return self.federation.model.hand_out()

    @property
    def parameters(self) -> torch.Tensor:
        """The global shared parameters, [P]."""
        return self.federation.layout.params(self.state.params_Q)

    @property
    def averaged_parameters(self) -> torch.Tensor:
        """The parameters that are evaluated and saved to model.safetensors, [P]: with `server.average` their average
        over rounds, otherwise `parameters`."""
        return self.parameters if self.state.average_P is None else self.state.average_P

    @property
    def saved(self) -> str:
        """What remains of a run that ends early, as text for the user."""
        return self._keeper.saved

    @property
    def record(self) -> Record | None:
        """The last round's record; None before the first round."""
        return self.state.record

    def __iter__(self) -> Iterator[Record]:
        """Train up to `rounds`; yield each round's record once every rank has committed the round. Collective."""
        self.federation.timer.reset()
        stopping.mind_interrupts()  # from now on an interrupt may lose rounds
        self._keeper.remember()
        self.comm.took(0.0)
        yielded = self.state.round
        try:
            self._begin_mirror()
            begun = False  # whether requests made before the first round are carried out
            while self.state.round < self.config.rounds:
                try:
                    if self._refill():
                        begun = False  # as the fresh ranks
                    if not begun:
                        self._take_up()
                        begun = True
                    self._round()
                except Exception as error:
                    if not self._outlives(error):
                        raise
                    self._heal(error)
                    begun = False  # only some ranks may have carried them out
                if self.state.round > yielded:
                    yielded = self.state.round
                    assert self.record is not None
                    yield self.record
        except Exception as error:
            # After an error of one rank alone the others are elsewhere, so no collective can follow.
            alike = self.comm.alike(error)
            if alike and isinstance(error, (Stopped, Diverged, NoCohort)):
                self._stopped, self._breaks_off = isinstance(error, Stopped), True
                self._keeper.finish(self.state)
                if self._stopped and self.comm.rank == 0:  # the launcher's exit code may not say so
                    with contextlib.suppress(OSError):
                        told = {"event": stopping.STOPPED, "round": self.state.round}
                        disk.append_line(self.out / stopping.EVENTS_FILE, json.dumps(told))
                raise
            self._spoiled = True
            if alike and isinstance(error, FedmpiError):
                with contextlib.suppress(FedmpiError):
                    self._keeper.seal()
            raise

    def _round(self) -> None:
        """Train, commit and record one round; write a checkpoint if one is due. Collective."""
        fed = self.federation  # it may be a new one every round
        with rng.borrowed():
            prepared = self.config.engine.step(self.state, fed)
            self._judge(prepared.outcome)
            self.state = prepared.commit(self._keeper.written)
            if self._mirrors:
                self._mirrors[-1].keep(self.state, self._health)
                del self._mirrors[:-1]
        self._tell()

    def _tell(self) -> None:
        """Write the last round's record, take up requests, and write a checkpoint if one is due. Collective."""
        record = self.state.record
        assert record is not None
        self.comm.took(record["seconds"]["round"])
        if self.comm.rank == 0:
            self._sinks.write(record)
        if self._roster is not None:
            self._roster.heard(self.state.round, contributors(record))
        if self.federation.done.rank("asked").any() and self.state.round < self.config.rounds:
            self._take_up()
        if not self._keeper.has(self.state):
            self._keeper.keep(self.state)

    # ------------------------------------------------------------ requests

    def _begin_desk(self, desk: Desk) -> None:
        """Let changes that the resumed checkpoint does not hold wait again. Rank 0 only."""
        done, keeper = self.state.round, self._keeper
        again = {one.silo for one in desk.begin(keeper.epoch, keeper.left)}
        for silo in keeper.left:  # a request keeps them out until a checkpoint does
            desk.carried_out(Request(f"0-{silo.encode().hex()}", "retire", silo), done, self.membership.epoch)
        desk.forget(self._directory.oldest_epoch)
        for silo in self._resumes.later if self._resumes is not None else ():
            what = "the request is carried out again" if silo in again else "it takes no part; admit it again"
            log.warning("silo '%s' joined after round %d, which the run resumes from: %s", silo, done, what)

    def _take_up(self) -> None:
        """Carry out the requests to change the members, and write the result to disk. Collective."""
        state, regions = self.state, self.config.exchange.regions
        if regions is not None and state.round % regions.every:
            return  # wait until all regions have the same model
        has_before = self._keeper.has(state)  # whether a checkpoint has the members before the change
        due = self.comm.collectively(self._due if self.comm.rank == 0 else list)
        due = json.loads(self.comm.broadcast_text(json.dumps(due), 0))
        self._changes.clear()  # rank 0 has recorded all of them
        if any([self._carry_out(Request(**one)) for one in due]):
            self.comm.took(0.0)  # opening data took time that is not a round's
            if not has_before:
                self._keeper.keep(self.state, due=True)
                if self._desk is not None and self._keeper.sealed == state.round:
                    self._desk.sealed(state.round)

    def _due(self) -> list[dict[str, Any]]:
        """The requests to carry out now, as dicts; invalid ones are refused. Rank 0 only."""
        assert self._desk is not None
        self._desk.sealed(self._keeper.sealed - 1)
        self._desk.forget(self._directory.oldest_epoch)
        found = []
        for token, one in self._desk.due(self.state.round):
            if isinstance(one, Request):
                found.append(asdict(one))
            else:
                self._answer(token, one)
        return found

    def _carry_out(self, request: Request) -> bool:
        """Carry out a request. Returns False if it is refused; the run is then unchanged. Collective."""
        before = self._spec
        try:
            self._spec, members = asked_for(request, before, self.federation)
            self._changes.append((request, self.state.round, members.epoch))
            self.rebuild(members)
        except FedmpiError as error:
            if not error.agreed or self._spoiled or isinstance(error, CheckpointError):
                raise
            self._spec = before
            self._changes = [change for change in self._changes if change[0] != request]
            self._answer(request.token, str(error).strip().splitlines()[-1], request)
            return False
        if self._desk is not None:
            self._desk.carried_out(request, self.state.round, self.membership.epoch)
        self._answer(request.token, None, request)
        return True

    def _answer(self, token: str, why: str | None, request: Request | None = None) -> None:
        """Answer a request, on rank 0. `why`: why it was refused; None if it was carried out."""
        if self.comm.rank != 0:
            return
        done = self.state.round
        asked = "a request" if request is None else f"{request.what} {request.silo}"
        say(f"fedmpi: after round {done}: {asked}{'' if why is None else f': refused: {why}'}", error=True)
        if self._roster is not None:
            self._roster.answer(token, done, why)
        if why is not None:
            (self._desk or Desk(self.out)).close(token)
        elif request is not None:
            told = {"event": request.what, "round": done, "silo": request.silo, "epoch": self.membership.epoch}
            disk.append_line(self.out / stopping.EVENTS_FILE, json.dumps(told))

    def _mark_changes(self, epoch: int) -> None:
        """Record and answer requests up to this epoch that the lost rank 0 left unanswered. Rank 0 only."""
        assert self._desk is not None
        answered = {answer["token"] for answer in roster.read(self.out)["answers"]}
        for request, done, made in self._changes:
            if made <= epoch and request.token not in answered:
                self._desk.carried_out(request, done, made)
                self._answer(request.token, None, request)

    def _close_desk(self) -> None:
        """Remove requests that a checkpoint holds; refuse the others if all rounds are done. Rank 0 only."""
        desk, rounds = self._desk or Desk(self.out), self.config.rounds
        desk.sealed(self._keeper.sealed - 1)
        desk.forget(self._directory.oldest_epoch)
        if self.state.round >= rounds:
            for token, one in desk.due(rounds):
                why = one if isinstance(one, str) else f"the run has ended: all {rounds} rounds are done"
                self._answer(token, why, one if isinstance(one, Request) else None)

    # ------------------------------------------------------------ lost ranks

    def _mirror_anew(self) -> None:
        """Start to mirror the state in all ranks' memory, if the run survives lost ranks. Collective."""
        if not self.comm.outlives_ranks or self.config.heals == "stop":
            self._mirrors = []
        else:
            newest = self._mirrors[-1].generation if self._mirrors else -1  # a fresh rank has none
            generation = 1 + int(self.comm.gather_number(newest).max())
            self._mirrors.append(Mirror(self.federation, generation, self.config.adopts, spec=self._spec))
            self._mirrors[-1].keep(self.state, self._health)

    def _begin_mirror(self) -> None:
        """Mirror the state before the first round. Until then the others go on without a fresh rank. Collective."""
        try:
            self._mirror_anew()
        except Exception as error:
            if is_fresh():
                _leave_others(error)
            raise
        joins_no_more()

    def _outlives(self, error: Exception) -> bool:
        """Whether the error is a loss of ranks that the run can continue without."""
        lost = isinstance(error, (RankLost, *self.comm.fatal)) and not isinstance(error, (MemoryError, CommTimeout))
        return lost and bool(self._mirrors)

    @rng.borrowed()
    def _heal(self, error: Exception, lost: bool = True) -> None:
        """Continue on the remaining ranks, from the newest commit that all of them have in memory. Collective over
        these. Raises FedmpiError, with the text of `error`, if a rank should be `lost` and none is."""
        if self._spawned is not None:
            self._spawned.drop()  # others are started once it is known how many
            self._spawned = None
        began_s, num_ranks = time.monotonic(), self.comm.size
        self._spoiled = True
        losses: list[Loss] = []
        made: tuple[int, Loss] | None = None  # by the last attempt: its generation and loss
        lost_comms: list[Comm] = []
        while True:
            try:
                self._keeper.close(ALONE_S)
                lost_comms.append(self.comm)
                self._succeed(self.comm.shrink())
                mirror, group = agreed_mirror(self._mirrors, self.comm)
                if made is not None and made[0] == mirror.generation:
                    losses.append(made[1])  # the last attempt was complete on all ranks before the next loss
                made = None
                if lost and self.comm.size == num_ranks:
                    raise agreed(FedmpiError(f"no rank is lost, and yet: {error}"))
                commit = newest_common(mirror, group)
                assert mirror.spec is not None
                # The mirror's, because only some ranks may have begun a change of the current one.
                self._spec = replace(mirror.spec, watch=self._spec.watch)
                opened = self._reopened(mirror.fed, group)
                self.federation, self.state = healed(self._spec, mirror, self._health, group, commit, opened)
                before, after = mirror.fed.membership, self.membership
                loss = Loss(commit.round, group.lost, before, after, group.old_ranks, time.monotonic() - began_s)
                made = mirror.generation + 1, loss
                self._mirrors = [mirror]
                self._mirror_anew()
                self._go_on([*losses, loss])
                break
            except Exception as another:
                if not self._outlives(another):
                    raise
                # Another rank was lost: try again.
        self._spoiled = False
        for comm in lost_comms:
            comm.discard_shared()
        losses.append(replace(loss, seconds=time.monotonic() - began_s))
        for told in (one for one in losses if one.ranks and self.comm.rank == 0):
            say(f"fedmpi: {told}", error=True)
            disk.append_line(self.out / stopping.EVENTS_FILE, told.line)
        if lost and self.comm.rank == 0 and not any(one.ranks for one in losses):
            say("fedmpi: a fresh rank has died before its first round; training goes on without it", error=True)

    def _succeed(self, left: Comm) -> None:
        """Continue on the communicator of the remaining ranks. Collective over these."""
        go_on_with(left, self.comm)
        self.comm = left
        left.set_up(self.config.comm.timeout_s)
        self._directory.hand_over(left)
        if (watchdog := self._spec.watch.watchdog) is not None:
            watchdog.comm = left
        self._spec = replace(self._spec, watch=stopping.Watch(left, self.out, watchdog))

    def _reopened(self, fed: Federation, group: Regrouped) -> Opened:
        """Open the members' data on the remaining ranks. If adoption fails, the lost ranks' silos leave. Collective."""
        comms, adopts = Comms.of(self.comm), self.config.adopts
        try:
            members = inherited(self._spec, fed, group, adopts)
            return open_members(self._spec, members, comms, fed.silos, fed.facts)
        except FedmpiError as error:
            if not adopts or not error.agreed:
                raise
            if self.comm.rank == 0:
                say(f"fedmpi: nobody can take over what is lost, and it leaves: {error}", error=True)
            members = inherited(self._spec, fed, group, adopts=False)
            return open_members(self._spec, members, comms, fed.silos, fed.facts)

    def _go_on(self, losses: Sequence[Loss]) -> None:
        """Move checkpoints, records and ranks.json to the remaining ranks. Collective over these."""
        done, ranks, record = self.state.round, self._ranks(), self.state.record
        self._close_sinks()
        why = {silo: f"rank {lost.before.rank(silo)} was lost" for lost in losses for silo in lost.silos}
        before, self._keeper = self._keeper, self._make_keeper(others=True)
        self._keeper.inherit(before)
        self._keeper.take_over(done)

        def write() -> None:
            if self._roster is not None:
                self._roster.save()
            self._roster = Roster(self.out, done, self.config.rounds, self.config.admit)
            self._register(ranks, why)
            self._desk = Desk(self.out) if self._desk is None else self._desk
            self._mark_changes(losses[0].before.epoch)
            self._open_sinks(done)
            for sink in self._added:
                self._sinks.add(sink)
            if record is not None and last_round(self.out) != done:
                self._sinks.write(record)

        self.comm.collectively(write if self.comm.rank == 0 else lambda: None)
        self._changes.clear()
        self._keeper.open(lambda: self._sinks.sync())
        self._keeper.remember()
        if record is not None and not self._keeper.has(self.state):
            self._keeper.keep(self.state)
        self.comm.took(record["seconds"]["round"] if record is not None else 0.0)
        self.federation.timer.reset()

    # ------------------------------------------------------------ fresh ranks

    def _refill(self) -> bool:
        """Start fresh ranks in place of lost ones, or let them join if ready; True if they joined. Collective."""
        if self.config.heals != "respawn" or self.comm.size == len(self._full_hosts):
            return False
        if self._spawned is None:
            self._spawn()
            return False
        ready = self._spawned.ready()
        if ready is None:
            self._drop_spawned("a fresh rank has died")
        return bool(ready) and self._join()

    def _spawn(self) -> None:
        """Start a fresh rank for each lost one, unless that was done too often. Collective."""
        if self._spawns and (why := self._stands_alone()):
            self._spawns = 0
            self._drop_spawned(why)
        self._spawns = int(self.comm.gather_number(self._spawns).min())  # each rank counts from its own start
        if self._spawns:
            self._spawns -= 1
            lost = Counter(self._full_hosts) - Counter(self.comm.hosts)
            try:
                self._spawned = Spawned(self.comm, [*lost.elements()])
            except ConfigError as error:
                self._drop_spawned(str(error))

    def _stands_alone(self) -> str:
        """Why no fresh rank can take part; empty if one can."""
        if self.comm.open_runs != 1:
            return "several runs are open"
        if isinstance(self.config.model, torch.nn.Module):
            return "the model is an object of the running processes; give its name"
        return ""

    def _drop_spawned(self, why: str) -> None:
        """Go on without the fresh ranks. It is not collective."""
        if self._spawned is not None:
            self._spawned.drop()
            self._spawned = None
        if self.comm.rank == 0:
            more = "another is started" if self._spawns else "training goes on without it"
            say(f"fedmpi: no fresh rank takes the place of a lost one: {why}; {more}", error=True)

    def _join(self) -> bool:
        """Go on with the fresh ranks, from a checkpoint of this round. Collective over all but these, which start as
        any rank does that resumes. True if they take part; else the run goes on as before."""
        assert self._spawned is not None
        if not self._keeper.may_hold(self.state):
            return False  # try again after the next round
        if not self._keeper.has(self.state):
            self._keeper.write(self.state)
        self._keeper.seal()
        if self._keeper.sealed != self.state.round:
            return False  # the disk does not take it now
        if not self._mirrors:  # one rank is left, and has none
            self._mirrors = [Mirror(self.federation, 0, self.config.adopts, spec=self._spec)]
            self._mirrors[-1].keep(self.state, self._health)
        spawned, began_s = self._spawned, time.monotonic()
        joined = spawned.join()
        if joined is None:
            self._drop_spawned("a fresh rank has died")
            return False
        before, spec, resumed, config, keeper = self.comm, self._spec, self.resumed, self.config, self._keeper
        self._take_down()
        go_on_with(joined, before)
        self.comm = joined
        error: Exception | None = None
        try:
            joined.finish()  # as each rank does before its first run
            self._agree(lambda: config)
            self._set_up(None, self._directory)
        except Exception as raised:
            if not isinstance(raised, (FedmpiError, *joined.fatal)):
                raise
            error = raised
            if not joined.alike(error):
                joined.revoke()  # the other ranks may wait for this one
        if (error := self._any_error(error, before)) is not None:
            if not joined.alike(error):
                joined.revoke()
            joined.retire()
            if self._spec is not spec and self._spec.watch.watchdog is not None:
                self._spec.watch.watchdog.end()
            go_on_with(before, joined)
            self.comm, self._spec, self._keeper, self.config, self.resumed = before, spec, keeper, config, resumed
            self._spawned = None  # they may still be in the call that failed
            try:
                self._heal(error, lost=False)
            finally:
                self._spawned = spawned
            joined.discard_shared()
            if self.comm.gather_number(joined.alike(error)).any():
                self._spawns = 0  # others would fail alike
            self._drop_spawned(str(error))
            return False
        self._spawned, self.resumed = None, resumed
        spawned.comm.retire()
        if spec.watch.watchdog is not None:
            spec.watch.watchdog.end()
        for sink in self._added if self.comm.rank == 0 else ():
            self._sinks.add(sink)
        self.federation.timer.reset()
        self._keeper.remember()
        self.comm.took(0.0)
        self._mirror_anew()
        if self.comm.rank == 0:
            told = {"event": "joined", "round": self.state.round, "num_ranks": self.comm.size}
            seconds = round(time.monotonic() - began_s, 3)
            disk.append_line(self.out / stopping.EVENTS_FILE, json.dumps({**told, "seconds": seconds}))
            say(f"fedmpi: fresh ranks have joined after round {self.state.round}, {seconds:.2f} s", error=True)
        return True

    def _take_down(self) -> None:
        """Close what a start opens, and free what ranks share. Collective."""
        fed = self.federation
        fed.exchange.settle()
        fed.exchange.leave()
        leave_memory(fed)
        self.state = replace(self.state, params_Q=self.state.params_Q.clone(), optimizer=None)
        self.comm.free_parts()
        self._keeper.close(WRITER_S)
        self._close_sinks()
        if self._roster is not None:
            self._roster.save()

    def _any_error(self, error: Exception | None, before: Comm) -> Exception | None:
        """`error`, or another if a rank of `before` has one: these ranks go on with fresh ranks together, or not at
        all. Collective over them."""
        try:
            if before.gather_number(error is not None).any() and error is None:
                return RankLost([], "a fresh rank has died")
        except Exception as raised:
            if not isinstance(raised, (RankLost, *before.fatal)):
                raise
            return error or raised
        return error

    def _score(self, record: Record) -> float | None:
        """The round's score, higher is better; None if the round was not evaluated."""
        value = record.get(self.metric)
        return None if value is None else float(value if self.maximize else -value)

    # ------------------------------------------------------------ the end

    def close(self) -> None:
        """Write the last checkpoint and, if all rounds are done, model.safetensors. Collective. After a failed round it
        writes nothing, and the newest checkpoint stays. If ranks are lost meanwhile, the others finish without them;
        not after an error that ends the run early, since a rank that missed it would go on training."""
        if self._closed:
            return
        try:
            while not (self._spoiled or self._closed):
                try:
                    self._conclude()
                except Exception as error:
                    if self._closed or self._breaks_off or not self._outlives(error):
                        raise
                    self._heal(error)
        except BaseException as error:
            self._release(error)
            raise
        self._release()

    def _conclude(self) -> None:
        """Write the last checkpoint and the model, then close. Collective."""
        self._keeper.finish(self.state)
        self.comm.set_up(self.config.comm.timeout_s)  # rank 0 may need long to write a large model
        self.federation.model.load(self.averaged_parameters)
        self.federation.model.load_personal({})  # no silo's personal layers are saved

        def write() -> None:
            if self.comm.rank == 0:
                if self.state.round >= self.config.rounds:
                    try:
                        model = self.federation.model
                        save_model(model, self.out / "model.safetensors", shared_only=model.has_personal)
                    except OSError as error:
                        raise CheckpointError(f"cannot write model.safetensors into {self.out}: {error}") from None
                (self.out / stopping.STOP_FILE).unlink(missing_ok=True)
                self._close_desk()

        self.comm.collectively(write)
        self.federation.exchange.settle()
        self._put_away()
        self.comm.finish()

    def silo_model(self, silo: str) -> torch.nn.Module | None:
        """A copy of the silo's personal model; None on the ranks that do not host the silo.

        It is the first of these that exists: the model fine-tuned after the last round, the personal model of the
        silo's local rule, the global parameters with the silo's personal layers, the global model. Raises ConfigError
        for an unknown silo, and if its personal layers are not trained yet.
        """
        fed = self.federation
        if silo not in fed.index:
            raise ConfigError(f"no silo '{silo}'{did_you_mean(silo, list(fed.ids))}")
        if silo not in fed.silos:
            return None
        own = fed.silos[silo]

        def check() -> None:
            if not self._closed:  # heartbeat: other ranks wait for this one at the run's end
                self.comm.beat(trains=True)

        # A copy, because the memory of the run's model belongs to the exchange and is freed with the run.
        model = fed.model.twin()
        with rng.borrowed():
            load_own(fed.rule, model, own, self.averaged_parameters, fed.tuning(own, self.state.round, check))
        return model.module

    def _keep_readable(self) -> None:
        """Copy the parameters and the model out of shared memory, which is freed when the run ends."""
        self.state = replace(self.state, params_Q=self.state.params_Q.clone(), optimizer=None)
        self.federation.model.leave()

    def _release(self, error: BaseException | None = None) -> None:
        """Release everything that the run holds. Not collective: it also runs if this rank fails alone."""
        self._put_away(WRITER_S if error is None or self.comm.alike(error) else ALONE_S)
        if self._listens:
            self._listens = False
            stopping.forget(self._stopped)

    def _put_away(self, writer_s: float = WRITER_S) -> None:
        """Close this rank's files and unlock the run directory. Waits for the exchange in flight, which all ranks have
        begun, and at most `writer_s` seconds for the checkpoint writer."""
        if not self._closed:
            self._closed = True
            self.comm.open_runs -= 1
            if "_spec" in vars(self) and (watchdog := self._spec.watch.watchdog) is not None:
                watchdog.end()
            self.comm.set_up(self.config.comm.timeout_s)  # closing may take long
            if self._spawned is not None:
                self._spawned.drop()
            if "federation" in vars(self):
                self.federation.exchange.leave()
            if "_keeper" in vars(self):
                self._keeper.close(writer_s)
            if "state" in vars(self):
                self._keep_readable()
            self._close_sinks()
            if self._roster is not None and self._directory.is_ours():
                self._roster.save()
            if "_directory" in vars(self):
                self._directory.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the run, or only release it after a failure. Adds what is saved on disk to the error that ended it."""
        if kind is None or (issubclass(kind, (Stopped, Diverged)) and self.comm.alike(error)):
            self.close()
        else:
            self._release(error)
        if isinstance(error, Stopped):
            more = Stopped(f"{error}; {self.saved}")
            more.agreed = error.agreed
            raise more from None
        says_so = isinstance(error, CheckpointError) and error.agreed  # its text already does
        if isinstance(error, (Exception, KeyboardInterrupt)) and not (
            says_so or isinstance(error, (Diverged, NoCohort))
        ):
            error.add_note(self.saved)


def _leave_others(error: BaseException) -> NoReturn:
    """End a fresh rank that cannot take part; the other ranks go on without it."""
    if not isinstance(error, FedmpiError):  # the others do not know it
        say(f"fedmpi: a fresh rank failed\n{''.join(traceback.format_exception(error))}", error=True)
    flush()
    time.sleep(1.0)  # they may still be in the call that failed
    os._exit(1)


def _loaded(config: Config | str | Path, overrides: tuple[str, ...]) -> Config:
    """The configuration, read if it is a file. Raises ConfigError, also for overrides of a Config."""
    if isinstance(config, Config):
        if overrides:
            raise ConfigError("overrides go with a configuration file; a Config is built with its values")
        return config
    return load(config, overrides)[0]
