"""The silos of a server's job, which are behind the shared folder: their updates and scores in place of training and
evaluation on a rank (rounds/remote.py).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedmpi.config import Config
from fedmpi.errors import CheckpointError, FedmpiError
from fedmpi.exchange.arrivals import Arrivals
from fedmpi.exchange.outbox import Inbox, Packed, as_bytes
from fedmpi.files import names
from fedmpi.files.line import Commit, Entry, File
from fedmpi.files.server import Arrived
from fedmpi.flat import sha256
from fedmpi.jobs.arrivals import FilesTime
from fedmpi.jobs.joining import Joining, Members, members_of
from fedmpi.jobs.messages import Call, read_row, shown, told_arrays, told_order, told_row
from fedmpi.jobs.post import ServerPost, files_of
from fedmpi.jobs.scores import Scores
from fedmpi.local import LocalSilo, Order
from fedmpi.membership import Membership
from fedmpi.opening import Opened
from fedmpi.outcome import DROPPED, VOID
from fedmpi.output import say
from fedmpi.rounds import Federation, State
from fedmpi.rounds.agreement import REFUSED, as_error
from fedmpi.rounds.closing import Closing, Late
from fedmpi.rounds.delays import Delays
from fedmpi.rounds.training import NO_ORDERS
from fedmpi.stopping import FAILED, READY, BrokenOff
from fedmpi.types import Contribution

FORGETS = 64  # rounds after which all kept files are looked through


class Gathered(NamedTuple):
    """What has come of a round's updates, by silo."""

    found: dict[str, Arrived]
    seconds: dict[str, float]  # of the round, as its policy counts, when the update came
    delays: dict[str, float]  # since the wait began


class FilesRemote:
    """Silos behind the shared folder (rounds/remote.py)."""

    def __init__(self, config: Config, post: ServerPost, out: Path, begins: str, joining: Joining) -> None:
        self._config, self.post, self._begins, self._joining = config, post, begins, joining
        self.told: dict[str, Any] = {}  # by the engine, in the next commit
        self.given_up = ""  # never: updates are added as they are
        self._out, self._scores = out, Scores(out / "scores")
        self._came: dict[tuple[str, int], Arrived] = {}  # by silo and number: updates that no commit answers yet
        self.answers: list[Entry] = []  # of the round, in the order of arrival
        self._inbox: Inbox | None = None
        self._time: FilesTime | None = None  # of the last members
        self._took_over = post.files.head is not None  # whether an earlier server may have handed out a round's work
        self._called = -1  # epoch of the membership that `call_all` has told
        self._behind: dict[str, int] = {}  # by silo: last round that closed without it; it may still train
        self._mended = False  # whether the files of the newest commit of earlier starts are known to be whole
        self._forgot = -1  # version up to which everything was looked through
        self._kept: list[tuple[int, Entry]] = []  # committed updates that are kept, with their rounds

    # ------------------------------------------------------------ a round

    def collect(
        self,
        state: State,
        fed: Federation,
        number: int,
        cohort: Sequence[str],
        factors: Sequence[float] | None,
        near: float,
        stands_for: float,
        refused: FedmpiError | None,
        closing: Closing | None = None,
        orders: Mapping[str, Order] = NO_ORDERS,
    ) -> tuple[dict[str, LocalSilo], FedmpiError | None]:
        """See rounds/remote.py. Raises Superseded and FolderError; then the round is not committed."""
        fed.ready.clear()
        fed.exchange.begin(number, len(cohort), near)
        status, error = 0, refused
        if refused is not None:
            status = REFUSED
        else:
            try:
                self.begin(state, fed)
                if (commit := self.committed(number)) is not None:
                    self._recall(commit, fed)
                else:
                    call = self._call(state, fed, number, cohort, factors, near, stands_for, orders)
                    self.post.call(call)
                    self._wait(fed, number, cohort, closing, orders)
            except BrokenOff as broken:
                if self.post.error is not None:
                    raise self.post.error from None
                status = broken.status
            except (FedmpiError, SystemExit) as raised:
                if isinstance(raised, FedmpiError):
                    raise
                status, error = FAILED, as_error(raised, f"round {number}")
        fed.ready.set_rank(0, status=status, fingerprint=fed.exchange.fingerprint(cohort))
        return {}, error

    def _call(
        self,
        state: State,
        fed: Federation,
        number: int,
        cohort: Sequence[str],
        factors: Sequence[float] | None,
        near: float,
        stands_for: float,
        orders: Mapping[str, Order] = NO_ORDERS,
    ) -> Call:
        members = fed.membership
        told = (shown(self._config), self._begins, members.epoch, members.ids, fed.facts_KF.tolist())
        weights = None if factors is None else list(factors)
        rows = {silo: told_order(order) for silo, order in orders.items()}
        return Call(*told, number, list(cohort), weights, near, stands_for, told_arrays(state.updates), orders=rows)

    def real_time(self, engine: Any, fed: Federation, exchange: Arrivals, state: State) -> FilesTime:
        """See rounds/remote.py."""
        self._time = FilesTime(engine, fed, exchange, state, remote=self, before=self._time)
        return self._time

    def admitted(self, members: Membership) -> Opened:
        """See rounds/remote.py."""
        return self._joining.opened(members)

    def members_of(self, number: int) -> Members | None:
        """The members of a round that was committed, or called by an earlier start; None if they are open."""
        if (commit := self.committed(number)) is not None:
            return members_of(commit)
        last = self.post.last
        return Members(last.epoch, last.ids) if last.round == number else None

    def call_all(self, state: State, fed: Federation) -> None:
        """Tell the silos who takes part, for rounds without a cohort."""
        if self._called != fed.membership.epoch:
            orders = Delays.of(state.policy, fed.rule, fed.ids).orders()
            self.post.call(self._call(state, fed, state.round + 1, [], None, 1.0, 1.0, orders))
            self._called = fed.membership.epoch

    def begin(self, state: State, fed: Federation) -> None:
        """Make sure that the parameters that the round starts from are committed; forget what a checkpoint holds."""
        self._release(state)
        head = self.post.files.head
        if head is None and state.round > 0:
            raise CheckpointError(f"{self._config.out} holds round {state.round}, and the shared folder no commit")
        if head is None:
            self._publish(0, fed, state.params_Q, fed.layout.params(state.params_Q), [])
        elif head.version < state.round:
            raise CheckpointError(
                f"{self._config.out} holds round {state.round}, and the shared folder only version {head.version}"
            )
        elif (commit := self.committed(state.round)) is not None:
            self._require(commit, state.params_Q)
            if commit is head and not self._mended:
                self._mended = True
                self._mend(commit, fed, state)

    def _mend(self, commit: Commit, fed: Federation, state: State) -> None:
        """Write what silos train from and score again, if it was damaged since the commit."""
        scored_P = fed.layout.params(state.params_Q) if state.average_P is None else state.average_P
        for kind, vector in (("params", state.params_Q), ("average", scored_P)):
            if kind in commit.files and not self.post.files.mend(commit.files[kind], [as_bytes(vector)]):
                raise CheckpointError(
                    f"version {commit.version}: its {kind} are damaged in {self.post.files.folder.root}, and those of "
                    "this run are not the same; begin anew with another out and transport.root"
                )

    def committed(self, version: int) -> Commit | None:
        """The commit of a version, if it was made. Raises CheckpointError if it was and is gone."""
        head = self.post.files.head
        if head is None or head.version < version:
            return None
        commit = head if head.version == version else self.post.files.commit_of(version)
        if commit is None:
            raise CheckpointError(f"the shared folder holds version {head.version}, but version {version} is gone")
        return commit

    def _require(self, commit: Commit, params_Q: torch.Tensor) -> None:
        if commit.about["params"] != sha256(params_Q):
            raise CheckpointError(
                f"version {commit.version}: the parameters of this run are not those that were committed; was the "
                "run directory of another run given?"
            )

    def release_all(self, written: int) -> None:
        """Remove what the checkpoint of this round holds, also what earlier starts have left. Raises Superseded."""
        if written >= 0 and files_of(self._config).keep == "needed":
            self.post.files.forget(written)
            self._forgot = written

    def _release(self, state: State) -> None:
        """Remove what a checkpoint holds by now."""
        if self._forgot < 0 or state.written >= self._forgot + FORGETS:
            self.release_all(state.written)
        for round, entry in self._kept:
            if round <= state.written and files_of(self._config).keep == "needed":
                self.post.files.drop_kept(entry)
        self._kept = [(round, entry) for round, entry in self._kept if round > state.written]
        self._scores.forget(state.written)

    def _recall(self, commit: Commit, fed: Federation) -> None:
        """Take the updates that a commit names."""
        self._recall_table(commit, fed)
        for entry in commit.entries:
            if entry.counts:
                content = self.post.update(commit, entry)
                self._add(Arrived(entry.silo, entry.number, entry.by, content), fed, commit.version)

    def _recall_table(self, commit: Commit, fed: Federation) -> None:
        """Fill in the round's table and answers as the commit has them."""
        self.answers = list(commit.entries)
        for silo, told in commit.about["rows"].items():
            fed.ready.set_silo(fed.index[silo], **(row := read_row(told)))
            if row.get("late") in (DROPPED, VOID):
                self._behind[silo] = commit.version
        for entry in commit.entries:
            self._came.pop((entry.silo, entry.number), None)

    def _poll(self, promised: Collection[tuple[str, int, int]] = ()) -> list[Arrived]:
        """Note the updates that have come since the last call."""
        arrived = self.post.files.poll(promised)
        self._came.update({(one.silo, one.number): one for one in arrived})
        return arrived

    def _of_round(self, number: int, cohort: Sequence[str]) -> dict[str, Arrived]:
        """The updates of a round that have come, by silo."""
        found: dict[str, Arrived] = {}
        for one in sorted(self._came.values(), key=lambda one: one.number):
            if one.content.head["round"] == number and one.silo in cohort:
                found.setdefault(one.silo, one)
        return found

    def _is_decided(self, fed: Federation, number: int) -> bool:
        """Whether nothing more enters the round, as an earlier start has decided."""
        return False

    def _gather(self, fed: Federation, number: int, cohort: Sequence[str], closing: Closing | None) -> Gathered:
        """Wait for the cohort's updates, or until the round closes."""
        found: dict[str, Arrived] = {}
        seconds: dict[str, float] = {}
        delays: dict[str, float] = {}
        began_s = time.monotonic()
        with contextlib.suppress(Late):
            while True:
                if self._poll():
                    self.post.news()
                found = self._of_round(number, cohort)
                for silo in found:
                    if silo not in seconds:
                        seconds[silo] = 0.0 if closing is None else closing.through()
                        delays[silo] = time.monotonic() - began_s
                if len(found) == len(cohort) or self._is_decided(fed, number):
                    break
                (fed.watch if closing is None else closing).check()
                missing = [silo for silo in cohort if silo not in found]
                self.post.waits(f"in round {number} for: {', '.join(missing[:6])}")
                self.post.pause(math.inf if closing is None or closing.left_s <= 0 else closing.left_s)
        self.post.goes_on()
        return Gathered(found, seconds, delays)

    def _wait(
        self,
        fed: Federation,
        number: int,
        cohort: Sequence[str],
        closing: Closing | None,
        orders: Mapping[str, Order],
    ) -> None:
        """Wait for the cohort's updates, or until the round closes; take what has come, in the cohort's order."""
        self.answers = []
        found, seconds, delays = self._gather(fed, number, cohort, closing)
        for one in sorted(self._came.values(), key=lambda one: one.number):
            self._heard(one)
            if one.content.head["round"] < number:
                self.answers.append(one.entry(counts=False))
        for silo in cohort:
            if silo in found:
                self._take(found[silo], fed, number, None if closing is None else seconds[silo])
                if silo in orders:
                    self._measure(fed, silo, delays[silo])
            elif closing is not None:
                self._behind[silo] = number
                late = VOID if closing.is_broken else DROPPED
                fed.ready.set_silo(fed.index[silo], late=late, seconds=2 * closing.limit_s)
                if silo in orders and late == DROPPED:
                    fed.ready.set_silo(fed.index[silo], work_s=2 * closing.limit_s, units=orders[silo].amount)
        self._took_over = False

    def _measure(self, fed: Federation, silo: str, delay_s: float) -> None:
        """Enter how long the silo waited. If an earlier server handed its work out, that is not known."""
        row = fed.ready.row(fed.index[silo])
        wait_s = max(0.0, delay_s - row["work_s"])
        fed.ready.set_silo(fed.index[silo], **({"units": 0.0} if self._took_over else {"wait_s": wait_s}))

    def _heard(self, one: Arrived) -> None:
        """A silo that was late is free again once the update of that round has come."""
        if one.content.head["round"] >= self._behind.get(one.silo, math.inf):
            del self._behind[one.silo]

    def _take(self, one: Arrived, fed: Federation, number: int, seconds: float | None) -> None:
        """Enter an update into the round's table, and add its vector to the sum."""
        row = read_row(one.content.head["row"])
        if seconds is not None:
            row |= {"done": row.get("weight", 0.0), "plain": row.get("sent", 0.0), "seconds": seconds}
        fed.ready.set_silo(fed.index[one.silo], **row)
        self.answers.append(one.entry(counts=bool(row.get("taken"))))
        if row.get("taken"):
            self._add(one, fed, number)

    def _add(self, one: Arrived, fed: Federation, number: int) -> None:
        """Add an update's vector to the sum."""
        row = read_row(one.content.head["row"])
        vector_Q = self._vector(one, fed, number).to(fed.model.device)
        fed.comm.bytes_up += len(one.content.payload)
        fed.exchange.add(
            Contribution(
                *(one.silo, number, row["sent"], vector_Q, row.get("loss", 0.0), int(row.get("samples", 0))),
                int(row.get("steps", 0)),
                row.get("normalizer"),
                row.get("start_loss", 0.0),
                row.get("targets", 0),
                norm=row.get("norm", 0.0),
                layout=fed.layout,
            )
        )

    def _vector(self, one: Arrived, fed: Federation, number: int) -> torch.Tensor:
        """The update's vector, [Q]."""
        if self._inbox is None:
            self._inbox = Inbox(self._config.exchange.up, fed.layout, fed.model.dtype, fed.seed)
        packed = Packed(one.content.head["sizes"], bytes(one.content.payload))
        return self._inbox.vector(packed, number, one.silo)

    # ------------------------------------------------------------ after it

    def commit(self, fed: Federation, number: int, params_Q: torch.Tensor, scored_P: torch.Tensor) -> None:
        """Commit the parameters with the updates that they contain; or, if they were committed before, require them."""
        self._kept += [(number, entry) for entry in self.answers if entry.counts]
        if (commit := self.committed(number)) is not None:
            self._require(commit, params_Q)
        else:
            self._publish(number, fed, params_Q, scored_P, self.answers)
        for entry in self.answers:
            self._came.pop((entry.silo, entry.number), None)

    def _publish(
        self,
        version: int,
        fed: Federation,
        params_Q: torch.Tensor,
        scored_P: torch.Tensor,
        entries: Sequence[Entry],
    ) -> None:
        files: list[File] = []
        for kind, vector in (("params", params_Q), *([("average", scored_P)] if fed.average is not None else [])):
            files.append(self.post.files.put(kind, version, {}, [payload := as_bytes(vector)]))
            fed.comm.bytes_down += len(payload)
        scores = version > 0 and (version % fed.evaluate_every == 0 or version == fed.rounds)
        rows = {silo: told_row(row) for silo in fed.ids if any((row := fed.ready.shown(fed.index[silo])).values())}
        about = {"params": sha256(params_Q), "scores": scores, "rows": rows if version else {}, **self.told}
        about |= Members(fed.membership.epoch, fed.ids)._asdict()
        self.post.files.commit(entries, files, about, version >= fed.rounds)

    def evaluate(self, fed: Federation, number: int, params_P: torch.Tensor) -> FedmpiError | None:
        """The scores of the silos that are there."""
        fed.done.clear()
        if number % fed.evaluate_every and number != fed.rounds:
            return None
        if fed.exchange.facts.arrivals and number < fed.rounds:
            return None  # silos are in training, and score when they fetch
        told = self._scores.read(number)
        if told is None:
            self._scores.write(number, told := self._wait_for_scores(fed, number))
        for silo in fed.ids:
            if silo in told:
                fed.done.set_silo(fed.index[silo], **read_row(told[silo]["row"]))
                fed.done.counts[:] += np.array(told[silo]["counts"])
        return None

    def scored(self, fed: Federation) -> dict[str, Any]:
        """Under `engine: buffered`, the pooled figures of the silos' last scores, with their versions."""
        return self._scores.last(fed, self.post.files) if fed.exchange.facts.arrivals else {}

    def _wait_for_scores(self, fed: Federation, number: int) -> dict[str, Any]:
        told: dict[str, Any] = {}
        damaged = set[str]()
        self.post.news()
        while True:
            newest = {silo: by for silo, version, by in self.post.files.silo_files(names.SCORE) if version == number}
            for silo, by in newest.items():
                if silo not in fed.index or silo in told or silo in damaged:
                    continue
                content = self.post.files.read_silo(names.SCORE, silo, number, by)
                if content is not None:
                    told[silo] = {"row": content.head["row"], "counts": content.head["counts"]}
                    self.post.news()
                elif self._gives_up_score(silo, number, by):
                    damaged.add(silo)
            self._hear_late()
            done = {*told, *damaged, *self._behind}
            missing = [silo for silo in fed.ids if silo not in done]
            if not missing or fed.watch.look() != READY:
                break
            present = self.post.present()
            if not present.intersection(missing):
                break
            self.post.waits(f"for scores of round {number}: {', '.join(missing[:6])}")
            self.post.pause()
        self.post.goes_on()
        return told

    def _gives_up_score(self, silo: str, number: int, by: int) -> bool:
        """Whether the scores of a silo, which are not whole, are damaged. Says so."""
        if not self.post.files.is_damaged(names.SCORE, silo, number, by):
            return False
        root = self.post.files.folder.root
        say(
            f"fedmpi: round {number} goes on without the scores of silo '{silo}', which are damaged in {root}",
            error=True,
        )
        return True

    def _hear_late(self) -> None:
        """Silos that a round has closed without are waited for again once their updates have come."""
        for one in self._poll() if self._behind else ():
            self._heard(one)
