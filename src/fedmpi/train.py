"""The run: put together, resumed, round after round, checkpoint, stop.

    with fedmpi.Run("configs/digits.yaml", "rounds=5") as run:
        for record in run:
            print(record["round"], record["accuracy"])

Every rank executes the same lines. What can fail on one rank only goes through `comm.collectively`, so
that all fail alike.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

import fedmpi
from fedmpi import checkpoint, disk, rng, sources, stopping
from fedmpi.assembly import assemble, digest_of
from fedmpi.comm import Comm, connect, ranks_text
from fedmpi.components import did_you_mean, to_dict
from fedmpi.config import Config, differences, digest, load, moved_schedules, run_directory
from fedmpi.directory import (
    CODE,
    UNSHARED_FILE,
    RunDirectory,
    keep_code,
    newest_whole,
    read_config,
    save_model,
    save_tensors,
    write_config,
)
from fedmpi.errors import CheckpointError, ConfigError, Diverged, FedmpiError, NoCohort, Stopped, agreed
from fedmpi.evaluate import load_own
from fedmpi.exchange.base import Exchange, Kept
from fedmpi.flat import changed_entries, signature
from fedmpi.health import Health
from fedmpi.opening import fingerprint
from fedmpi.outcome import RoundOutcome
from fedmpi.output import say
from fedmpi.records import PHASES, Record, RunInfo, Sink, Sinks
from fedmpi.records.sink import Timings
from fedmpi.rounds import State
from fedmpi.tensorfile import Key
from fedmpi.trust import confined

log = logging.getLogger("fedmpi")

# What begins the keys of a checkpoint's tensors; the rest of a key may be any string.
OPTIMIZER, SELECTOR, HEALTH, EXCHANGE = "optimizer", "selector", "health", "exchange"  # the server's
KEPT = "kept"  # a silo's, besides what the exchange files under it
CURSOR: Key = ("cursor",)
WRITER_S = 30.0  # how long a run that failed waits for the checkpoint that it was writing
ALONE_S = 1.0  # the same of a rank that ends alone, while the others wait for it
WAIT_SHARE = 0.02  # of the time between checkpoints: how long to wait for one before training goes on


@functools.cache
def versions() -> dict[str, str]:
    """What a run's figures were made with."""
    from importlib.metadata import version

    names = ("torch", "numpy", "mpi4py", "h5py")
    return {"fedmpi": fedmpi.__version__, "python": platform.python_version()} | {n: version(n) for n in names}


class Run:
    """A federated run; iterate over it for its records. A context manager, since checkpoints are written behind it.

    `config` is a Config or a YAML file with overrides; from the config.yaml of a run directory code is imported as
    trust.py says, and what `allow` names. All ranks of the MPI job build it together. Raises ConfigError,
    alike on every rank, before anything is trained.

    Attributes: config; out (the run directory); parameters (the global shared parameters, [P]); record (the last one);
    resumed (the round it went on from); metric and maximize (which figure tells the best round, and in which sense).
    """

    def __init__(
        self, config: Config | str | Path, *overrides: str, allow: Sequence[str] = (), comm: Comm | None = None
    ) -> None:
        stopping.listen()  # before MPI: a batch system may signal a job while it starts
        try:
            self.comm = comm if comm is not None else connect()
            if not self.comm.open_runs:
                self.comm.finish()  # an earlier run of this process: no notice of its end must end this one
            named_by = None if isinstance(config, Config) else run_directory(Path(config))
            with confined(named_by, allow):
                self.config = self.comm.collectively(lambda: _loaded(config, overrides))
            self.comm.require_equal("the configuration", digest(self.config), ConfigError)
            self.comm.set_up(self.config.comm.timeout_s)
        except BaseException:
            stopping.forget()
            raise
        self._closed = False
        self._spoiled = False  # has a round failed after its parameters were overwritten?
        self._listens = True  # to signals
        self._stopped = False  # does the run end because it was asked to?
        self.comm.open_runs += 1
        self._rounds_before: int | None = None  # what the run that the directory holds was begun with
        self._sealed = -1  # the newest round whose checkpoint is sealed; -1 for none
        self._pending: int | None = None  # the round whose checkpoint is being written
        try:
            with confined(named_by, allow):
                self._assemble()
            self._resume()
            self._describe()
        except BaseException as error:
            self._release(error)
            raise

    # ------------------------------------------------------------ set-up

    def _assemble(self) -> None:
        """A directory that is ours, and what the run is made of."""
        self._directory = RunDirectory(Path(self.config.out), self.comm)
        self.out = self._directory.path
        parts = assemble(self.config, self.comm, self.out, self._directory.plan_before)
        fed = self.federation = parts.federation
        self.device, self.threads, self.central = parts.spec.device, parts.threads, parts.spec.source.central
        self.metric, self.maximize = fed.objective.metric_name, fed.objective.maximize
        self.unshared, self.plan_seconds = parts.unshared, parts.plan_seconds
        self.fingerprint = fingerprint(fed.facts_KF)
        self.model, self.state = fed.model.module, parts.state
        module = [type(self.model).__module__] if isinstance(self.config.model, torch.nn.Module) else []
        self.code = self.comm.collectively(lambda: sources.own_code(to_dict(self.config), *module))
        digest_of_code = hashlib.sha256(repr(sources.digests(self.code)).encode()).digest()
        self.comm.require_equal("the code that the configuration names", digest_of_code, ConfigError)

    def _resume(self) -> None:
        """Go on from the newest round that is whole on all ranks, if there is one."""
        self.comm.collectively(self._check_stored if self.comm.rank == 0 else lambda: None)
        self._sealed = self._newest()
        self.resumed = max(0, self._sealed)
        self._health = Health(self.config.stop)
        if self._sealed >= 0:
            self._load()
        # Not before everything was read: until here nothing on disk has changed.
        self.comm.collectively(
            lambda: checkpoint.remove_after(self.out, self._sealed) if self._directory.leads else None
        )

    def _load(self) -> None:
        """The state of the checkpoint that the run goes on from."""
        fed = self.federation
        kept = self.comm.collectively(lambda: checkpoint.read_silos(self.out, self.resumed, fed.silos))
        filed: Kept = {}
        for name, tensors in kept.items():
            fed.silos[name].cursor = int(tensors[CURSOR])
            fed.silos[name].kept = _of(KEPT, tensors)
            filed[name] = _of(EXCHANGE, tensors)
        loads = self.comm.rank == 0
        stored = self.comm.collectively(lambda: checkpoint.read_server(self.out, self.resumed) if loads else {})
        state, exchange = self.state, fed.exchange
        kept_P = _under(OPTIMIZER, state.optimizer._asdict()) | _under(EXCHANGE, exchange.server_tensors())
        lengths = {OPTIMIZER: fed.model.num_shared, EXCHANGE: exchange.num_params}
        whole = {n: (t.dtype, lengths[n[0]]) for n, t in kept_P.items()}
        alike = _under(EXCHANGE, exchange.vectors(state.params_Q))
        alike |= {checkpoint.AVERAGE: state.average_P} if state.average_P is not None else {}
        whole |= {n: (t.dtype, len(t)) for n, t in alike.items()}
        grows = _under(HEALTH, self._health.kept(0)).keys()
        self.comm.collectively(lambda: _expect(stored, whole, grows) if loads else None)
        # A selector's state is what its last round made of it, whatever it began with.
        told = [(n, str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in stored.items() if n not in whole]
        said = json.loads(self.comm.broadcast_text(json.dumps(told), 0))
        grown: dict[Key, Any] = {tuple(key): (getattr(torch, dtype), shape) for key, dtype, shape in said}
        sizes = (whole | grown).items()
        from_0 = {n: stored[n] if loads else torch.empty(size, dtype=dtype) for n, (dtype, size) in sizes}
        exchange.take_vectors(state.params_Q, _of(EXCHANGE, from_0), self.resumed)
        if state.average_P is not None:
            self.comm.bcast(from_0[checkpoint.AVERAGE])
            state.average_P.copy_(from_0[checkpoint.AVERAGE])
        for key, part in kept_P.items():
            exchange.load(part, from_0[key])
        for key in grown:
            self.comm.bcast(from_0[key].reshape(-1).view(torch.uint8))
        selector = {n: tensor.numpy() for n, tensor in _of(SELECTOR, from_0).items()}
        self._health.take(_of(HEALTH, from_0))
        exchange.take(self.resumed, state.params_Q, {silo: tensors for silo, tensors in filed.items() if tensors})
        record = self.comm.collectively(lambda: checkpoint.manifest(self.out, self.resumed).record if loads else None)
        record = json.loads(self.comm.broadcast_text(json.dumps(record), 0))
        outcome = RoundOutcome.from_record(fed.ids, record) if record is not None else None
        self.state = replace(
            self.state, round=self.resumed, selector=selector, outcome=outcome, record=record, written=self.resumed
        )

    def _judge(self, outcome: RoundOutcome) -> None:
        """Give up where a round that is not committed yet shows that the run diverges; what was last good is on disk
        from the first doubt on."""
        if outcome.loss is None and not outcome.not_finite:
            return  # no target counted, which says nothing
        before = self._health.doubts
        why = self._health.look(outcome.round, outcome.loss, outcome.norm)
        if self._health.doubts and not before and self.state.round not in (self._sealed, self._pending):
            self._checkpoint(doubts=0)
        if why:
            raise agreed(Diverged(why))

    def _check_stored(self) -> None:
        """Refuse a run directory that another configuration, model or dataset has begun."""
        if not checkpoint.sealed_rounds(self.out):
            return
        begun = read_config(self.out)
        about = begun.about
        self._rounds_before = begun.config.get("rounds")
        changed = differences(begun.config, self.config)
        if not changed and (others := sources.changes(about.get("code", {}), sources.digests(self.code))):
            text = f"code has changed since {self.out} was trained with it, and is kept in {self.out / CODE}: "
            text += ", ".join(others)
            if self.config.resume.code == "refuse":
                raise ConfigError(f"{text}; put it back, say resume.code=warn, or choose another out=")
            log.warning("%s", text)
        changed += changed_entries(about["model"], self.federation.model.entries)
        if not changed and about.get("data") != self.fingerprint:
            changed = ["the silos' data are not the same"]
        if not changed and about["unshared"] != digest_of(self.unshared).hex():
            changed = ["what the model does not share starts otherwise (was `init` given then?)"]
        if changed:
            more = f" (and {len(changed) - 2} more)" if len(changed) > 2 else ""
            raise ConfigError(
                f"{self.out} holds checkpoints of another run: {'; '.join(changed[:2])}{more}; choose another out="
            )
        if moved := moved_schedules(begun.config, self.config):
            before, now = begun.config["rounds"], self.config.rounds
            say(
                f"fedmpi: rounds was {before} and is {now}: {' and '.join(moved)} now ends at {now}; to keep it as it "
                f"was, {moved[0]}.rounds={before}",
                error=True,
            )

    def _newest(self) -> int:
        """The newest round that is whole on every rank; each looks at the files it will read."""
        round, lost = newest_whole(self.out, self.comm, self.federation.silos)
        if round >= 0:
            return round
        # Nothing is whole everywhere. To start over would be to throw away what some rank can still see.
        sealed = self.comm.collectively(lambda: checkpoint.sealed_rounds(self.out))
        seen = np.zeros(self.comm.size)
        seen[self.comm.rank] = 1 + max(sealed, default=-1)
        seen = self.comm.share(seen)
        if seen.any():
            why = f"but none is whole on {ranks_text(lost)}; mend that, or choose another out="
            raise agreed(ConfigError(f"{self.out} holds checkpoints up to round {int(seen.max()) - 1}, {why}"))
        return -1

    def _describe(self) -> None:
        """Write what the run is into its directory."""
        fed = self.federation
        row = json.dumps({"pid": os.getpid(), "device": str(self.device), "threads": self.threads})
        rows = self.comm.gather(row.encode().ljust(256))
        ranks = [
            {"rank": r, "host": host, **json.loads(text), "silos": silos}
            for r, (host, text, silos) in enumerate(
                zip(self.comm.hosts, rows, fed.membership.by_rank(self.comm.size), strict=True)
            )
        ]
        about = {
            "versions": versions(),
            "data": self.fingerprint,
            "unshared": digest_of(self.unshared).hex(),
            "metric": self.metric,
            "maximize": self.maximize,
            "params": fed.model.num_shared,
            "plan": fed.exchange.section.plan,
            "plan_seconds": self.plan_seconds,
            "ranks": self.comm.size,
            "model": signature(fed.model.entries),
            "code": sources.digests(self.code),
        }
        rounds = self.config.rounds
        # Where nothing is left to train, the directory goes on telling of what was trained.
        over = self.resumed > rounds or self.resumed == rounds == self._rounds_before

        def write() -> None:
            if self.unshared:
                save_tensors(self.unshared, self.out / UNSHARED_FILE)
            if not over:
                keep_code(self.out, self.code, self.state.round)
                write_config(self.out, to_dict(self.config), about)
                disk.replace_text(self.out / "ranks.json", json.dumps(ranks, indent=1))
            info = RunInfo(self.out, self.state.round, rounds, self.metric, self._timings)
            self._sinks = Sinks(info, self.config.records.open_sinks())

        def written() -> None:
            try:
                write()
            except OSError as error:
                raise ConfigError(f"out: cannot write into {self.out}: {error.strerror or error}") from None

        self.comm.collectively(written if self.comm.rank == 0 else lambda: None)
        self._scores = self.comm.collectively(lambda: checkpoint.scores(self.out) if self._directory.leads else {})
        told = [score for score in self._scores.values() if score is not None] if self.comm.rank == 0 else []
        self._best_score = float(
            self.comm.broadcast_text(repr(max(told, default=-math.inf)), 0)
        )  # of all rounds so far
        self._best: checkpoint.Best | None = None  # that round, where no checkpoint has it yet
        self._pending_best: checkpoint.Best | None = None  # the one that is being written
        self._writer = self.comm.collectively(lambda: checkpoint.Writer(self.out, self.comm.rank))

    def _timings(self) -> Timings:
        """When each rank began the last round, and the seconds of its phases."""
        done = self.federation.done
        return done.rank("started_s"), {name: done.rank(name) for name in PHASES}

    # ------------------------------------------------------------ rounds

    def add_sink(self, sink: Sink) -> None:
        """Let `sink.write` have every record from now on, on rank 0; other ranks may call it and nothing happens."""
        if self.comm.rank == 0:
            self._sinks.add(sink)

    @property
    def parameters(self) -> torch.Tensor:
        """The global shared parameters, [P]."""
        return self.federation.layout.params(self.state.params_Q)

    @property
    def averaged_parameters(self) -> torch.Tensor:
        """The parameters that records evaluate and model.safetensors holds, [P]: their average over rounds if
        `server.average` keeps one."""
        return self.parameters if self.state.average_P is None else self.state.average_P

    @property
    def saved(self) -> str:
        """What remains of a run that ends early."""
        if self._sealed < 0:
            return f"no round is on disk in {self.config.out} yet; the same command starts again"
        return f"round {self._sealed} is on disk; the same command resumes"

    @property
    def record(self) -> Record | None:
        """The last round's record."""
        return self.state.record

    def __iter__(self) -> Iterator[Record]:
        """Train round after round up to `rounds`; each record comes when its round is committed on every rank."""
        fed = self.federation
        fed.timer.reset()
        stopping.mind_interrupts()  # from now on there are rounds to lose
        self._remember()
        self.comm.took(0.0)
        try:
            while self.state.round < self.config.rounds:
                with rng.borrowed():
                    prepared = self.config.engine.step(self.state, fed)
                    self._judge(prepared.outcome)
                    self.state = prepared.commit(self._writer.written)
                record = self.state.record
                assert record is not None
                self.comm.took(record["seconds"]["round"])
                if self.comm.rank == 0:
                    self._sinks.write(record)
                self._hold_best()
                if self._pending is not None and self.state.written >= self._pending:
                    self._seal()
                if self.state.round % self.config.checkpoint.every == 0 and not self._health.doubts:
                    self._checkpoint()
                yield record
        except Exception as error:
            # What one rank alone raises leaves the others where they are: no collective can follow.
            alike = self.comm.alike(error)
            if alike and isinstance(error, (Stopped, Diverged, NoCohort)):
                self._stopped = isinstance(error, Stopped)
                self._finish_checkpoint()
                raise
            self._spoiled = True
            if alike and isinstance(error, FedmpiError) and self._pending is not None:
                with contextlib.suppress(FedmpiError):
                    self._seal()
            raise

    def _score(self, record: Record | None) -> float | None:
        """How good a round is, higher is better; None where it was not evaluated, and between two exchanges across
        regions: what was evaluated then is no one model."""
        regions = self.config.exchange.regions
        if record is None or (regions is not None and record["round"] % regions.every):
            return None
        value = record.get(self.metric)
        return None if value is None else float(value if self.maximize else -value)

    def _hold_best(self) -> None:
        """Hold on to what is evaluated of the round just done, if it is the best so far, until a checkpoint is written.

        So the best round is on disk whenever a checkpoint is, and rounds between two of them cost a copy of the
        parameters on rank 0 where they are the best, and no file: a run that is killed does them again.
        """
        score, state = self._score(self.state.record), self.state
        if score is None or score <= self._best_score or self._health.doubts or state.record is None:
            return
        self._best_score = score
        if state.round % self.config.checkpoint.every == 0:
            self._best = None  # the checkpoint that follows is more
            return
        fed = self.federation
        # Rules never write into what silos keep, so it need not be copied.
        own = None if hasattr(fed.rule, "personal") else fed.model.first_personal.keys()
        silos = {
            name: {CURSOR: torch.tensor(silo.cursor)}
            | _under(KEPT, {n: t for n, t in silo.kept.items() if own is None or n in own})
            for name, silo in fed.silos.items()
        }
        server = (
            {checkpoint.PARAMS: self.averaged_parameters.detach().to("cpu", copy=True)} if self.comm.rank == 0 else None
        )
        self._best = checkpoint.Best(state.round, state.record, score, server, silos)

    def _checkpoint(self, doubts: int | None = None) -> None:
        """Begin to write the state of the round just done, which left so many doubts (None: as many as there are)."""
        if self._pending is not None:
            self._seal()
        fed, state = self.federation, self.state
        optimizer = fed.exchange.settled(state.optimizer, fed.timer.lap)
        filed = fed.exchange.kept(state.params_Q)
        silos = {
            name: {
                CURSOR: torch.tensor(silo.cursor),
                **_under(KEPT, silo.kept),
                **_under(EXCHANGE, filed.get(name, {})),
            }
            for name, silo in fed.silos.items()
        }
        arrived = replace(state, optimizer=optimizer)
        whole = _server_tensors(arrived, fed.exchange, fed.model.num_shared)  # of all ranks' parts
        whole |= _under(HEALTH, self._health.kept(self._health.doubts if doubts is None else doubts))
        server = whole if self.comm.rank == 0 else None
        # Its own errors come up with the next round's record, or when the checkpoint is sealed.
        if self._best is not None and self._best.round == state.round:
            self._best = None  # this checkpoint is more
        self.comm.collectively(lambda: self._writer.start(state.round, server, silos, self._best))
        self._pending, self._pending_best, self._best = state.round, self._best, None
        self._pending_record = state.record
        # Where rounds are long, the moment until the files are safe is nothing, and a kill in the next round then costs
        # that round alone. Where they are short, the seal follows with a later round's record.
        period_s = (state.record or {"seconds": {"round": 0.0}})["seconds"]["round"] * self.config.checkpoint.every
        done = self.comm.share(np.array([float(self._wait(WAIT_SHARE * period_s))]))
        if done[0] == self.comm.size:
            self._seal()

    def _seal(self) -> None:
        """All ranks' files of the pending checkpoint are safe, now or after a wait: write the manifest, last."""
        round, record = self._pending, self._pending_record
        assert round is not None
        fed = self.federation
        self._wait(math.inf)
        self.comm.collectively(self._writer.join)
        rows = self.comm.gather(self._writer.digests)
        hosted = fed.membership.by_rank(self.comm.size)
        best, ranks = self._pending_best, self.comm.size
        self._scores[round] = self._score(record)
        if best is not None:
            self._scores[best.round] = best.score
        about = {"ranks": ranks, "score": self._scores[round], "record": record}

        def write() -> None:
            if self.comm.rank == 0:
                if not self._directory.is_ours():  # on a file system without locks nothing else would tell
                    raise CheckpointError(f"another job has begun to train in {self.out}")
                self._sinks.sync()
            if self._directory.leads:
                if best is not None:
                    of_best = {"ranks": ranks, "score": best.score, "record": best.record}
                    checkpoint.seal(self.out, best.round, rows, hosted, of_best, best=True)
                checkpoint.seal(self.out, round, rows, hosted, about)
                checkpoint.prune(self.out, self.config.checkpoint.keep, self._scores)

        self.comm.collectively(write)
        self._pending, self._pending_best, self._sealed = None, None, round
        self._remember()

    def _wait(self, limit_s: float) -> bool:
        """Is what this rank writes of the pending checkpoint on disk, by now or within `limit_s`?"""
        until_s = time.monotonic() + limit_s
        while not (done := self._writer.wait(min(1.0, max(0.0, until_s - time.monotonic())))):
            self.comm.beat(trains=True)  # a slow disk is not a silent rank
            if time.monotonic() >= until_s:
                break
        return done

    def _remember(self) -> None:
        """What is to be said should the launcher kill this process."""
        if self.comm.rank == 0 and self.comm.size > 1:
            stopping.last_words(f"fedmpi: ended by the launcher: {self.saved}")

    def _finish_checkpoint(self) -> None:
        """The last whole round is on disk, sealed; where the last ones are in doubt, the last before them, unless the
        run is through with them."""
        in_doubt = self._health.doubts > 0 and self.state.round < self.config.rounds
        if not in_doubt and self.state.round not in (self._sealed, self._pending):
            self._checkpoint()
        if self._pending is not None:
            self._seal()

    # ------------------------------------------------------------ the end

    def close(self) -> None:
        """Write the last checkpoint and, once all rounds are done, model.safetensors. A call of all ranks. After a
        round that failed it writes nothing: the newest checkpoint stays what it is."""
        if self._closed:
            return
        try:
            if not self._spoiled:
                self._conclude()
        except BaseException as error:
            self._release(error)
            raise
        self._release()

    def _conclude(self) -> None:
        self._finish_checkpoint()
        self.comm.set_up(self.config.comm.timeout_s)  # a large model takes rank 0 as long as it takes
        self.federation.model.load(self.averaged_parameters)
        self.federation.model.load_personal({})  # no silo's own leaves it

        def write() -> None:
            if self.comm.rank == 0:
                if self.state.round >= self.config.rounds:
                    try:
                        model = self.federation.model
                        save_model(model, self.out / "model.safetensors", shared_only=model.has_personal)
                    except OSError as error:
                        raise CheckpointError(f"cannot write model.safetensors into {self.out}: {error}") from None
                (self.out / stopping.STOP_FILE).unlink(missing_ok=True)

        self.comm.collectively(write)
        self.federation.exchange.close()
        self._put_away()
        self.comm.finish()

    def silo_model(self, silo: str) -> torch.nn.Module | None:
        """A copy of the model that the silo would use for itself: fine-tuned after the last round where the run does
        that, its rule's own, or the global parameters with its own layers; the global model where it has no other.

        None on the ranks that do not host the silo. Raises ConfigError where there is no such silo, and where its
        layers were not trained yet.
        """
        fed = self.federation
        if silo not in fed.index:
            raise ConfigError(f"no silo '{silo}'{did_you_mean(silo, list(fed.ids))}")
        if silo not in fed.silos:
            return None
        own = fed.silos[silo]

        def check() -> None:
            if not self._closed:  # the other ranks wait for this one at the run's end
                self.comm.beat(trains=True)

        # One beside the run's, whose memory belongs to the exchange and goes with the run.
        model = fed.model.twin()
        with rng.borrowed():
            load_own(fed.rule, model, own, self.averaged_parameters, fed.tuning(own, self.state.round, check))
        return model.module

    def _keep_readable(self) -> None:
        """Shared memory goes with the run, or with the next: what is looked at afterwards gets memory of its own."""
        self.state = replace(self.state, params_Q=self.state.params_Q.clone(), optimizer=None)
        self.federation.model.leave()

    def _release(self, error: BaseException | None = None) -> None:
        """All that a run has taken is given back; also where it failed on some rank alone."""
        self._put_away(WRITER_S if error is None or self.comm.alike(error) else ALONE_S)
        if self._listens:
            self._listens = False
            stopping.forget(self._stopped)

    def _put_away(self, writer_s: float = WRITER_S) -> None:
        """Close this rank's files and give the run directory free. Only what all have begun is waited for."""
        if not self._closed:
            self._closed = True
            self.comm.open_runs -= 1
            self.comm.set_up(self.config.comm.timeout_s)  # what ranks do now takes as long as it takes
            if "federation" in vars(self):
                self.federation.exchange.leave()
            if "_writer" in vars(self):
                self._writer.close(writer_s)  # a thread with tensors must not outlive Python
            if "state" in vars(self):
                self._keep_readable()
            if "_sinks" in vars(self):
                self._sinks.close()
            if "_directory" in vars(self):
                self._directory.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close after a whole loop, a `break` or a stop; what was raised goes up, with what remains on disk."""
        if kind is None or (issubclass(kind, (Stopped, Diverged)) and self.comm.alike(error)):
            self.close()
        else:
            self._release(error)
        if isinstance(error, Stopped):
            more = Stopped(f"{error}; {self.saved}")
            more.agreed = error.agreed
            raise more from None
        if isinstance(error, (Exception, KeyboardInterrupt)) and not isinstance(error, (Diverged, NoCohort)):
            error.add_note(self.saved)  # those two would come again


def _loaded(config: Config | str | Path, overrides: tuple[str, ...]) -> Config:
    if isinstance(config, Config):
        if overrides:
            raise ConfigError("overrides go with a configuration file; a Config is built with its values")
        return config
    return load(config, overrides)[0]


def _under(first: str, tensors: Mapping[str, torch.Tensor]) -> dict[Key, torch.Tensor]:
    """The tensors under keys that begin so."""
    return {(first, name): tensor for name, tensor in tensors.items()}


def _of(first: str, tensors: Mapping[Key, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `_under` was given."""
    return {key[1]: tensor for key, tensor in tensors.items() if key[0] == first}


def _server_tensors(state: State, exchange: Exchange, num_params: int) -> dict[Key, torch.Tensor]:
    """What server.h5 holds, whole on rank 0: the state's own tensors and the exchange's. A call of all ranks."""
    tensors = _under(EXCHANGE, exchange.vectors(state.params_Q))
    tensors |= {checkpoint.AVERAGE: state.average_P} if state.average_P is not None else {}
    for name, part in zip(state.optimizer._fields, state.optimizer, strict=True):
        tensors[OPTIMIZER, name] = exchange.whole(part, num_params)
    tensors |= _under(EXCHANGE, {name: exchange.whole(part) for name, part in exchange.server_tensors().items()})
    return tensors | _under(SELECTOR, {name: _numbers(name, array) for name, array in sorted(state.selector.items())})


def _numbers(name: str, array: Any) -> torch.Tensor:
    try:
        return torch.from_numpy(np.asarray(array))
    except TypeError:
        raise CheckpointError(f"the selector keeps '{name}' as {np.asarray(array).dtype}, which is no number") from None


def _expect(
    stored: Mapping[Key, torch.Tensor], wanted: Mapping[Key, tuple[torch.dtype, int]], grows: Collection[Key]
) -> None:
    """ConfigError unless these tensors are there, those that grow with the run, a selector's, and no others."""
    for key, (dtype, size) in wanted.items():
        there = f"{stored[key].dtype} of {stored[key].numel()}" if key in stored else "absent"
        if there != (here := f"{dtype} of {size}"):
            raise ConfigError(f"the checkpoint's {'/'.join(key)} is {there}, this run's {here}")
    for key in (stored.keys() | grows) - wanted.keys():
        if key not in stored or (key[0] != SELECTOR and key not in grows):
            what = "not of this run" if key in stored else "absent"
            raise ConfigError(f"the checkpoint's {'/'.join(key)} is {what}")
