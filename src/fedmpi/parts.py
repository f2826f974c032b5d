"""The parts of a run, and how they are made at a start and when fresh ranks join: assemble, resume, describe.

What can fail on one rank only runs in `comm.collectively`, so that all ranks raise the same error.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fedmpi
from fedmpi import checkpoint, disk, fork, launcher, sources, stopping
from fedmpi.alike import mixed, unlike
from fedmpi.assembly import Assembly, assemble, digest_of
from fedmpi.binding import my_cores, nodes_of, numa, spans, told
from fedmpi.comm import Comm
from fedmpi.components import to_dict
from fedmpi.config import Config
from fedmpi.device import capabilities
from fedmpi.differences import differences, moved_schedules
from fedmpi.directory import (
    CODE,
    STATISTICS,
    UNSHARED_FILE,
    RunDirectory,
    Stored,
    keep_code,
    read_config,
    save_tensors,
    write_config,
)
from fedmpi.errors import ConfigError, agreed
from fedmpi.flat import Entry, changed_entries, signature
from fedmpi.health import Health, Progress
from fedmpi.keeper import Keeper
from fedmpi.membership import Membership
from fedmpi.opening import fingerprint
from fedmpi.output import say
from fedmpi.records import PHASES, Record, RunInfo, Sinks, clock
from fedmpi.records.sink import Timings
from fedmpi.records.timer import PARTS, column
from fedmpi.requests import Desk, Request
from fedmpi.roster import Roster

log = logging.getLogger("fedmpi")

RANKS_FILE = "ranks.json"


@functools.cache
def versions() -> dict[str, str]:
    """The versions of fedmpi, Python and the packages that affect a run's figures."""
    from importlib.metadata import version

    names = ("torch", "numpy", "mpi4py", "h5py")
    return {"fedmpi": fedmpi.__version__, "python": platform.python_version()} | {n: version(n) for n in names}


def other_model(about: Mapping[str, Any], found: Sequence[Entry], unshared: str) -> list[str]:
    """How a model with these tensors differs from that of the run described by `about`, as text. `unshared`: SHA-256 of
    its first values that are not shared."""
    changed = changed_entries(about["model"], found)
    if not changed and about["unshared"] != unshared:
        changed = ["what the model does not share starts otherwise (was `init` given then?)"]
    return changed


def changed_in_fork(
    config: Config, section: fork.ForkSection, found: Sequence[Entry], unshared: str, root: Path
) -> list[str]:
    """What a fork with this model changes, as text. `root`: where its checkpoint is. Raises ConfigError for what a fork
    may not change."""
    begun = read_config(Path(section.run))
    changed = differences(begun.config, config, begun.about["plan"])
    refused = fork.refused(changed) + other_model(begun.about, found, unshared)
    if refused:
        more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
        raise ConfigError(f"fork: {'; '.join(refused[:3])}{more}: a fork of {section.run} must leave that as it is")
    ways = (config.exchange.up, config.exchange.down)
    stateful = len(config.server.optimizer.init(torch.zeros(1))) > 0
    if why := fork.unfit(section, root, changed, any(way.feedback for way in ways), stateful):
        raise ConfigError(f"fork: {why}")
    return changed


class Parts:
    """What a run consists of. Every method is called by all ranks alike."""

    config: Config
    comm: Comm
    code: dict[str, bytes]  # the user's, by file
    _deciding: dict[str, bytes]  # the part of it that may change figures
    resumed: int  # the round it resumed from
    _confined: Callable[[], contextlib.AbstractContextManager[None]]  # what code may be imported meanwhile
    _roster: Roster | None  # on rank 0, unless all rounds are done
    _desk: Desk | None  # likewise
    _rounds_before: int | None  # `rounds` in the run directory's stored configuration

    def _agree(self, load: Callable[[], tuple[Config, Mapping[str, str]]]) -> None:
        """Agree on the configuration. Collective."""
        if not self.comm.open_runs:
            self.comm.finish()  # an earlier run's stop notice must not stop this one
        with self._confined():
            self.config, origins = self.comm.collectively(load)
        if why := mixed(self.comm, versions()) or unlike(self.comm, self.config, origins):
            raise agreed(ConfigError(why))
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
        # Where the start goes on, what runs here, even if the files have changed since.
        kept = None if directory is None else self.code
        if directory is None:
            self._directory = RunDirectory(Path(self.config.out), self.comm)
        else:
            directory.hand_over(self.comm)
        self.out = self._directory.path
        copies = directory is None and self._directory.leads
        self.comm.collectively(lambda: fork.copied(self.config, self.out) if copies else None)
        before = self._directory.stored
        parts = self._built(members, before)
        fed, self._spec = parts.federation, parts.spec
        self.federation = fed
        self.device, self.threads, self.central = parts.spec.device, parts.threads, parts.spec.source.central
        self.binding = told(parts.bound)
        self.metric, self.maximize = fed.objective.metric_name, fed.objective.maximize
        self.unshared, self.plan, self._resumes = parts.unshared, parts.plan, parts.resumes
        self.state, module = parts.state, fed.model.module
        modules = [type(module).__module__] if isinstance(self.config.model, torch.nn.Module) else []
        values = to_dict(self.config)
        self.code = self.comm.collectively(lambda: sources.own_code(values, *modules) if kept is None else kept)
        if kept is None:
            decides = sources.own_code(sources.deciding(values), *modules)
            self._deciding = {file: content for file, content in self.code.items() if file in decides}
        digest_of_code = hashlib.sha256(repr(sources.digests(self.code)).encode()).digest()
        self.comm.require_equal("the code that the configuration names", digest_of_code, ConfigError)

    def _built(self, members: Membership | None, before: Callable[[], Sequence[Stored]]) -> Assembly:
        """The federation and its first state. Collective."""
        if self.config.transport.apart:
            raise agreed(ConfigError("transport: files takes `fedmpi serve CONFIG` and `fedmpi silo CONFIG --id ID`"))
        return assemble(
            self.config,
            self.comm,
            self.out,
            self._directory.plan_before,
            members,
            before,
            self._directory.statistics_before,
        )

    def _resume(self, others: bool) -> None:
        """Resume from the newest round that is whole on all ranks, if there is one. Collective. `others`: whether that
        round may have had other members."""
        self.comm.collectively(self._check_stored if self.comm.rank == 0 else lambda: None)
        self._health = Health(self.config.stop, self.comm.collectively(self._progress))
        self._keeper = self._make_keeper(others)
        self.state = self._keeper.resume(self.state, None if self._resumes is None else self._resumes.round)
        self.resumed = self.state.round
        self.comm.collectively(self._refuse_ended if self.comm.rank == 0 else lambda: None)

    def _refuse_ended(self) -> None:
        if fork.begins(self.out) and (why := self._health.ended):
            raise ConfigError(
                f"fork: the other run has ended here: {why}; give another stop.early, or fork.reset: [stop]"
            )

    def _progress(self) -> Progress | None:
        fed = self.federation
        tested = any(facts[1] > 0 for facts in fed.facts.values())
        return Progress.of(self.config, self.metric, fed.scores.better, tested)

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

    def _check_stored(self) -> None:
        """Raise ConfigError if the run directory was started with another configuration, model or code."""
        if not checkpoint.sealed_rounds(self.out):
            return
        if fork.begins(self.out):
            self._check_forked()
            return
        begun = read_config(self.out)
        about = begun.about
        self._rounds_before = begun.config.get("rounds")
        changed = differences(begun.config, self.config, about["plan"])
        there = {file: digest for file, digest in about.get("code", {}).items() if self._may_decide(file)}
        if not changed and (others := sources.changes(there, sources.digests(self._deciding))):
            text = f"code has changed since {self.out} was trained with it, and is kept in {self.out / CODE}: "
            text += ", ".join(others)
            if self.config.resume.code == "refuse":
                raise ConfigError(f"{text}; put it back, set resume.code=warn, or choose another out=")
            log.warning("%s", text)
        changed += other_model(about, self.federation.model.entries, digest_of(self.unshared).hex())
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

    def _may_decide(self, file: str) -> bool:
        """Whether a stored file of code may change figures: earlier versions also stored those of sinks."""
        return file in self._deciding or file not in self.code

    def _check_forked(self) -> None:
        """Raise ConfigError if this new run cannot go on from the checkpoint of the run that it is forked from."""
        section, unshared = fork.section_of(self.config.fork), digest_of(self.unshared).hex()
        assert section is not None
        changed = changed_in_fork(self.config, section, self.federation.model.entries, unshared, self.out)
        told = f": {'; '.join(changed[:6])}" if changed else ""
        anew = fork.begin_anew(section, self.out, changed)
        say(f"fedmpi: goes on from {section.run}, round {section.round}{told}{anew}")

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
            "code": sources.digests(self._deciding),
        }
        if (shared := self._spec.source.shared) is not None:
            about[STATISTICS] = shared.told()
        rounds = self.config.rounds
        # If no round is left to train, the directory keeps the description of the run that trained.
        over = self.resumed > rounds or self.resumed == rounds == self._rounds_before or bool(self._health.ended)

        def write() -> None:
            if self.unshared:
                save_tensors(self.unshared, self.out / UNSHARED_FILE)
            if not over:
                (self.out / stopping.ENDED_FILE).unlink(missing_ok=True)
                keep_code(self.out, self.code, self.state.round)
                write_config(self.out, to_dict(self.config), about)
                fork.has_begun(self.out)
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
        self._sinks = Sinks(info, self.config.open_sinks())

    def _close_sinks(self) -> None:
        if "_sinks" in vars(self):  # on rank 0, while a run is open
            self._sinks.close()
            del self._sinks

    def _timings(self) -> Timings:
        """What ranks did in the last round."""
        done, tracks = self.federation.done, self.federation.exchange.tracks()
        numbers = sorted({name.rpartition("_")[2] for name in tracks})
        return Timings(
            done.rank("started_s"),
            {name: done.rank(name) for name in PHASES},
            {one: done.rank(column(*one)) for one in PARTS},
            [
                {name[: -len(end) - 1]: done.rank(name) for name in tracks if name.endswith(f"_{end}")}
                for end in numbers
            ],
            self._rank_rows,
        )

    @property
    def membership(self) -> Membership:
        """Which silos take part, and on which ranks."""
        return self.federation.membership

    def _ranks(self) -> list[dict[str, Any]]:
        """The rows of ranks.json. Collective."""
        pid = os.getpid()
        cores = my_cores()
        place = {"cores": spans(cores), "numa": ",".join(nodes_of(cores, numa()))}
        row = {"pid": pid, "born": launcher.born(pid), **capabilities(self.device), "threads": self.threads, **place}
        rows = self.comm.gather_values(row)
        hosted = self.membership.by_rank(self.comm.size)
        self._rank_rows: list[dict[str, Any]] = [
            {"rank": rank, "host": host, **row, "silos": silos}
            for rank, (host, row, silos) in enumerate(zip(self.comm.hosts, rows, hosted, strict=True))
        ]
        ahead_s, error_s = clock.offsets(self.comm)
        if self.comm.rank == 0 and error_s.any():
            for row, ahead, error in zip(self._rank_rows, ahead_s.tolist(), error_s.tolist(), strict=True):
                row |= {"clock_ahead_s": round(ahead, 6), "clock_error_s": round(error, 6)}
        return self._rank_rows

    def _register(self, ranks: Sequence[dict[str, Any]], lost: Mapping[str, str] = {}, why: str | None = None) -> None:
        """Write the current members to ranks.json and silos.json; see Roster.register. Rank 0 only."""
        disk.replace_text(self.out / RANKS_FILE, json.dumps(ranks, indent=1))
        if self._roster is not None:
            fed = self.federation
            code = hashlib.sha256(repr((fedmpi.__version__, sources.digests(self.code))).encode()).hexdigest()[:8]
            shown = self.config.disclosed == "silo"
            about = {
                silo: {"num_train": int(facts[0]), "data": fingerprint(facts) if shown else None, "code": code}
                for silo, facts in fed.facts.items()
            }
            self._roster.register(self.membership, self._spec.known, about, ranks, self.state.round, lost, why)

    def _score(self, record: Record) -> float | None:
        """The round's score, higher is better; None if the round was not evaluated."""
        value = record.get(self.metric)
        return None if value is None else float(value if self.maximize else -value)

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
