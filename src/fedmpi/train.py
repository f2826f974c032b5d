"""The training loop of a run: rounds, records, checkpoints, stops, the end.

    with fedmpi.Run("configs/digits.yaml", "rounds=5") as run:
        for record in run:
            print(record["round"], record["accuracy"])

Run is one class in four files: what it consists of (parts.py), its members (members.py), lost and fresh ranks
(recovery.py), and here the rest. Every rank executes the same lines. What can fail on one rank only runs in
`comm.collectively`, so that all ranks raise the same error.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fedmpi import disk, rng, stopping
from fedmpi.comm import Comm, Spawned, connect
from fedmpi.components import did_you_mean
from fedmpi.config import Config, load, run_directory
from fedmpi.directory import save_model
from fedmpi.errors import CheckpointError, ConfigError, Diverged, FedmpiError, NoCohort, Stopped, agreed
from fedmpi.evaluate import load_own
from fedmpi.fresh import is_fresh
from fedmpi.membership import Membership
from fedmpi.mirror import Mirror
from fedmpi.outcome import RoundOutcome
from fedmpi.output import say
from fedmpi.records import Callback, Record, RunInfo, Sink
from fedmpi.recovery import ALONE_S, SPAWNS, WRITER_S, Recovery, leave_others
from fedmpi.requests import Desk, Request
from fedmpi.roster import Roster, contributors
from fedmpi.trust import confined


class Run(Recovery):
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
                leave_others(error)
            raise
        self.code: dict[str, bytes] = {}  # of the user, that the configuration names
        self._closed = False
        self._spoiled = False  # whether a round failed after its parameters were overwritten
        self._listens = True  # to signals
        self._spent = False  # whether the privacy budget ended the run
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
                leave_others(error)
            raise

    # ------------------------------------------------------------ set-up

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

    # ------------------------------------------------------------ rounds

    def add_sink(self, sink: Sink) -> None:
        """Pass every record from now on to `sink.write`, on rank 0; on other ranks the call does nothing."""
        self._added.append(sink)
        if self.comm.rank == 0:
            self._sinks.add(sink)

    def add_callback(self, function: Callable[[Record, RunInfo], Any]) -> None:
        """Call `function(record, run)` on rank 0 with a copy of every record from now on, as `callbacks` of the
        configuration are called."""
        self.add_sink(Callback(function))

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
            while self._goes_on:
                try:
                    if self._refill():
                        begun = False  # as the fresh ranks
                    if not begun:
                        self._take_up()
                        begun = True
                    if not self._affords():
                        break
                    self._follow_clock()
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
                if self.comm.rank == 0:  # the launcher's exit code may not say so
                    with contextlib.suppress(OSError):
                        event = stopping.STOPPED if self._stopped else stopping.ENDED
                        told = {"event": event, "round": self.state.round}
                        told |= {} if self._stopped else {"why": str(error)}
                        disk.append_line(self.out / stopping.EVENTS_FILE, json.dumps(told))
                raise
            self._spoiled = True
            if alike and isinstance(error, FedmpiError):
                with contextlib.suppress(FedmpiError):
                    self._keeper.seal()
            raise

    @property
    def _goes_on(self) -> bool:
        """Whether rounds are left to train."""
        return self.state.round < self.config.rounds and not self._health.ended

    @property
    def ended(self) -> str:
        """Why a metric has ended the run before its last round (`stop.early`); empty if none has."""
        return self._health.ended if self.state.round < self.config.rounds else ""

    def _affords(self) -> bool:
        """Whether the privacy budget, if there is one, suffices for the next round. Collective."""
        private = self._spec.private
        if private is None:
            return True
        self._spent = not private.begin(self.comm, self.state.round + 1)
        if self._spent and self.comm.rank == 0:
            done, rounds = self.state.round, self.config.rounds
            say(f"fedmpi: the privacy budget is spent after round {done} of {rounds}: {private.told}", error=True)
        return not self._spent

    def _round(self) -> None:
        """Train, commit and record one round; write a checkpoint if one is due. Collective."""
        fed = self.federation  # it may be a new one every round
        with rng.borrowed():
            prepared = self.config.engine.step(self.state, fed)
            self._judge(prepared.outcome)
            self.state = prepared.commit(self._keeper.written)
            assert self.state.record is not None
            self._hear(self.state.record)
            if self._mirrors:
                self._mirrors[-1].keep(self.state, self._health)
                del self._mirrors[:-1]
        self._tell()

    def _hear(self, record: Record) -> None:
        """Take up what a round's record says of the run's progress."""
        self._health.hear(record)

    def _tell(self) -> None:
        """Write the last round's record, take up requests, and write a checkpoint if one is due. Collective."""
        record = self.state.record
        assert record is not None
        self.comm.took(record["seconds"]["round"])
        if self.comm.rank == 0:
            self._sinks.write(record)
        if self._roster is not None:
            self._roster.heard(self.state.round, contributors(record))
        if self.federation.done.rank("asked").any() and self._goes_on:
            self._take_up()
        if not self._keeper.has(self.state):
            self._keeper.keep(self.state)

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
                    if self._breaks_off or self._closed or not self._outlives(error):
                        raise
                    self._heal(error, rewinds=False)  # nobody would train the rounds again
            if not self._spoiled:
                self._part()
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
                if why := self.ended:
                    text = json.dumps({"round": self.state.round, "why": why})
                    disk.replace_text(self.out / stopping.ENDED_FILE, text)
                if self._spent or not self._goes_on:
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

    def _part(self) -> None:
        """Leave the run together. All is on disk, so ranks that were lost since are only reported. Collective."""
        try:
            self.comm.finish()
        except Exception as error:
            if self._breaks_off or not self._outlives(error):
                raise
            self._tell_parted(error)

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


def _loaded(config: Config | str | Path, overrides: tuple[str, ...]) -> tuple[Config, dict[str, str]]:
    """The configuration, read if it is a file, and the origins of its values. Raises ConfigError, also for overrides of
    a Config."""
    if isinstance(config, Config):
        if overrides:
            raise ConfigError("overrides go with a configuration file; a Config is built with its values")
        return config, {}
    return load(config, overrides)
