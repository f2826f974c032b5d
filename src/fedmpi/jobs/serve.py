"""The server's job: `fedmpi serve CONFIG`. A run on one process whose silos are jobs of their own.

    a round    the server tells the cohort, waits for its updates, steps, commits the new parameters with the updates
               that they contain; then silos score them, and the record is written
    a resume   from the run's checkpoint; the rounds that were committed since are computed again, from the updates that
               their commits name, and must give the same bits

Everything else is as in any run: policies, aggregation, server optimizers, checkpoints, records.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from fedmpi import device, disk
from fedmpi.assembly import Assembly, begin, build_federation, digest_of, first_values, specify
from fedmpi.comm import SoloComm
from fedmpi.config import Config
from fedmpi.directory import Stored
from fedmpi.errors import ConfigError, FedmpiError, FolderError, Stopped, Superseded
from fedmpi.exchange.config import Channel
from fedmpi.exchange.outbox import Summed
from fedmpi.health import TRAIN_LOSS
from fedmpi.jobs.joining import Joining, Members, first_members, with_silos
from fedmpi.jobs.masked import MaskedRemote
from fedmpi.jobs.post import ServerPost, files_of
from fedmpi.jobs.remote import FilesRemote
from fedmpi.membership import Comms, Membership
from fedmpi.module import saved
from fedmpi.output import say
from fedmpi.records import Record
from fedmpi.stopping import EVENTS_FILE, Watch
from fedmpi.train import Run
from fedmpi.types import Silo, SiloData, Source


class Serving(Run):
    """The run of the server's job. Iterate over it as over a Run.

    Raises ConfigError also if another server of the run is alive, and Superseded once a newer one has taken over.
    """

    _post: ServerPost | None = None
    _remote: FilesRemote | None = None
    _joining: Joining | None = None

    def __init__(self, config: Config | str | Path, *overrides: str, allow: Sequence[str] = ()) -> None:
        super().__init__(config, *overrides, allow=allow, comm=SoloComm())

    def _built(self, members: Membership | None, before: Callable[[], Sequence[Stored]]) -> Assembly:
        config, comm = self.config, self.comm
        files_of(config)
        threads = device.set_threads(comm, config.exchange.reduction == "reproducible")
        watch = Watch(comm, self.out)
        about = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID", "")}
        self._post = post = ServerPost(config, about, watch)
        post.start()
        begun, resumes = first_members([*before()], self.out, comm, post)
        self._joining = joining = Joining(config, post, watch)
        registered = joining.first(begun, post.last)
        first = registered[next(iter(registered))]
        silos = tuple(map(Silo, first.known))
        source = Source(first.task, tuple(first.shape), first.num_classes, silos, _refuse_to_open)
        spec = replace(specify(config, comm, self.out, source), watch=watch)
        if not config.engine.arrivals:  # silos encode
            plan = "replicated" if config.secure is not None else spec.section.plan
            spec = replace(spec, section=replace(spec.section, up=Channel(), plan=plan))
        begins = digest_of(saved(spec.module)).hex()
        joining.begin(spec, begins)
        epoch = 0 if begun is None else begun.epoch
        opened = joining.opened(with_silos(Members(epoch, [*registered]), first.known))
        unshared = first_values(spec.module, spec.entries)
        kind, sends = (FilesRemote, None) if config.secure is None else (MaskedRemote, Summed)
        self._remote = remote = kind(config, post, self.out, begins, joining)
        plan_before = self._directory.plan_before
        built = build_federation(spec, opened, Comms.of(comm), plan_before=plan_before, sends=sends, remote=remote)
        return Assembly(built.spec, built.federation, begin(built.federation), threads, unshared, built.plan, resumes)

    def _take_up(self) -> None:
        self._let_in()
        super()._take_up()

    def _tell(self) -> None:
        assert self._post is not None
        self._post.files.require_newest()  # else the records are the newer server's
        super()._tell()
        if self.state.round < self.config.rounds:
            self._let_in()

    def _hear(self, record: Record) -> None:
        """An evaluation in which silos with test data are missing does not decide whether the run ends (stop.early)."""
        early, silos = self.config.stop.early, record["silos"]
        tested = {silo for silo, facts in self.federation.facts.items() if facts[1] > 0}
        scored = record.get("scored_by", []) if self.config.secure else [s for s in silos if "num_test" in silos[s]]
        if early is None or early.metric == TRAIN_LOSS or tested <= {*scored}:
            super()._hear(record)

    def _conclude(self) -> None:
        if self.ended and self._post is not None:
            self._keeper.finish(self.state)  # so that a new start needs no silo
            self._post.final(self.state.round)
        super()._conclude()

    def _let_in(self) -> None:
        """Change the members to those of the next round: as it was committed, or as it was called by an earlier start,
        or with the silos that have registered since."""
        assert self._remote is not None and self._joining is not None
        members = self._remote.members_of(self.state.round + 1)
        now, known = self.membership, self._spec.known
        if members is None:
            new = self._joining.new(now.ids) if len(now.ids) < len(known) else []
            members = Members(now.epoch + 1, [*now.ids, *new])
        if not (joined := [silo for silo in members.ids if silo not in now.teams]):
            return
        self.rebuild(with_silos(members, known))
        say(f"fedmpi: after round {self.state.round}: {', '.join(joined)} joined", error=True)
        for silo in joined:
            told = {"event": "admit", "round": self.state.round, "silo": silo, "epoch": self.membership.epoch}
            with contextlib.suppress(OSError):  # silos.json has it
                disk.append_line(self.out / EVENTS_FILE, json.dumps(told))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tell_end(error)
        super().__exit__(kind, error, trace)

    def _release(self, error: BaseException | None = None) -> None:
        self._tell_end(error)
        super()._release(error)

    def _tell_end(self, error: BaseException | None) -> None:
        """Tell the silos that the run ends with this error. Not if the same command goes on with it."""
        if not isinstance(error, Exception) or isinstance(error, (Stopped, Superseded, FolderError)):
            return
        if self._post is not None and self._post.error is None:
            with contextlib.suppress(FedmpiError):
                self._post.over(error)

    def _put_away(self, writer_s: float = 30.0) -> None:
        super()._put_away(writer_s)
        if self._post is not None:
            if self._remote is not None and "_keeper" in vars(self) and self._post.error is None:
                with contextlib.suppress(FedmpiError):  # the next start comes again
                    self._remote.release_all(self._keeper.sealed)
            self._post.end()
            self._post = None


def _refuse_to_open(silo: str) -> SiloData:
    raise ConfigError(f"silo '{silo}': the server's job opens no silo's data")
