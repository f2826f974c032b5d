"""The checkpoints of a run: what they hold, when they are written and sealed, and how a run resumes from one."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedmpi import checkpoint, stopping
from fedmpi.assembly import Admitted
from fedmpi.comm import ranks_text
from fedmpi.config import Config
from fedmpi.directory import RunDirectory, newest_whole
from fedmpi.errors import CheckpointError, ConfigError, FedmpiError, agreed
from fedmpi.exchange.base import Exchange
from fedmpi.fork import STATE, section_of, without
from fedmpi.health import Health
from fedmpi.local import LocalSilo
from fedmpi.membership import Membership
from fedmpi.moving import heirs, remaining
from fedmpi.opening import CHECKSUMS, checksum, is_of
from fedmpi.outcome import RoundOutcome
from fedmpi.records import Record
from fedmpi.rounds import Federation, State
from fedmpi.sealed import folder_of
from fedmpi.selection import carried
from fedmpi.state import Arrays, Holder, Holders, StateTensor, Vectors, gathered, scattered, under

log = logging.getLogger("fedmpi")

FAILED = -2  # written round of a failed write
WAIT_SHARE = 0.02  # longest wait for a checkpoint before training continues, as a share of the time between checkpoints


# ---------------------------------------------------------------- what a checkpoint holds


class Exchanged:
    """The parameters and the exchange's other state."""

    def __init__(self, exchange: Exchange, state: State) -> None:
        self._exchange, self._params_Q, self._round = exchange, state.params_Q, state.round

    def state(self) -> Iterator[StateTensor]:
        """The exchange's state, once no exchange is in flight."""
        return self._exchange.state(self._params_Q)

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Restore into the parameters' memory."""
        self._exchange.restore(self._params_Q, self._round, stored)


class SameData:
    """Checksums of this rank's silos' data, so that a run resumes only on the same data."""

    def __init__(self, fed: Federation) -> None:
        self._fed = fed

    def state(self) -> Iterator[StateTensor]:
        """A checksum per silo, of those whose data are known here: not of jobs of their own under `secure`."""
        for silo in self._fed.silos:
            if self._fed.facts[silo][CHECKSUMS].any():
                yield StateTensor(("checksum",), self._checksum(silo), "per_silo", silo)

    def others(self, stored: Sequence[StateTensor]) -> list[str]:
        """The silos whose data differ from those of the checkpoint."""
        known = (one for one in stored if one.key == checkpoint.CHECKSUM and one.silo in self._fed.silos)
        fed = self._fed
        return [one.silo for one in known if not is_of(int(one.tensor), fed.facts[one.silo], fed.silos[one.silo].data)]

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Does nothing: `others` checks the data before anything is restored."""

    def _checksum(self, silo: str) -> torch.Tensor:
        return torch.tensor(checksum(self._fed.facts[silo]))


class Silos:
    """Data cursors and kept tensors of this rank's silos; only those tensors in `names`, if given."""

    def __init__(self, silos: dict[str, LocalSilo], names: Collection[str] | None = None) -> None:
        self._silos, self._names = silos, names

    def state(self) -> Iterator[StateTensor]:
        """The cursor and kept tensors of every silo."""
        for silo in self._silos.values():
            yield StateTensor(("cursor",), torch.tensor(silo.cursor), "per_silo", silo.id)
            kept = (item for item in silo.kept.items() if self._names is None or item[0] in self._names)
            yield from (StateTensor(("kept", name), tensor, "per_silo", silo.id) for name, tensor in kept)

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Restore the cursor and kept tensors of every silo."""
        for silo in self._silos.values():
            silo.kept = {}
        for (what, *name), tensor, _, silo_id, _ in stored:
            if what == "cursor":
                self._silos[silo_id].cursor = int(tensor)
            else:
                self._silos[silo_id].kept[name[0]] = tensor


def holders(state: State, fed: Federation, health: Health) -> Holders:
    """All state that the next round depends on. Every checkpoint holds what is added here."""
    found: dict[str, Holder] = {
        "data": SameData(fed),
        "exchange": Exchanged(fed.exchange, state),
        "optimizer": Vectors(state.optimizer._asdict(), "sharded"),
        "selector": Arrays(state.selector),
        "updates": Arrays(state.updates),
        "policy": Arrays(state.policy),
        "health": health,
        "silos": Silos(fed.silos),
    }
    if fed.private is not None:
        found["privacy"] = fed.private
    if state.average_P is not None:
        found["average"] = Vectors({"params": state.average_P}, "replicated")
    return Holders(found)


def restored(
    state: State,
    fed: Federation,
    health: Health,
    whole: Sequence[StateTensor],
    of_silos: Sequence[StateTensor],
    before: Membership,
    anew: Collection[str] = (),
) -> State:
    """The state at the time when it was gathered, in the memory of `state`. Collective.

    `whole` holds rank 0's tensors, `of_silos` those of this rank's silos, `before` the members at that time. Holders in
    `anew` stay as they are, but for silos, whose tensors are those in `of_silos`.
    """
    every = holders(state, fed, health)
    found = Holders({name: holder for name, holder in every.items() if name not in anew or name == "silos"})
    found.restore([*scattered(whole, found, fed.exchange, fed.comm), *of_silos])
    selector, updates, policy = every["selector"], every["updates"], every["policy"]
    assert isinstance(selector, Arrays) and isinstance(updates, Arrays) and isinstance(policy, Arrays)
    arrays = carried(fed.selector, selector.arrays, before.ids, fed.ids, fed.num_train)
    return replace(state, selector=arrays, updates=updates.arrays, policy=policy.arrays)


# ---------------------------------------------------------------- the checkpoints of a run


class Keeper:
    """The checkpoints of one run; every rank calls it alike.

    Attributes: sealed (the newest round whose checkpoint is sealed; -1 for none); epoch (of the resumed round's
    membership; -1 for none); left (members of that round that left later, as a damaged newer checkpoint says).
    """

    def __init__(
        self,
        config: Config,
        federation: Federation,
        health: Health,
        directory: RunDirectory,
        score: Callable[[Record], float | None],
        order: Sequence[str],
        others: bool = False,
        admitted: Sequence[Admitted] = (),
    ) -> None:
        self.comm = federation.comm
        self.sealed = self.epoch = -1
        self.left: list[str] = []
        self._config, self._fed, self._health, self._directory = config, federation, health, directory
        self._out, self._score_of = directory.path, score
        self._order = order  # all silos of the data, in their order
        self._admitted = admitted  # silos that the configuration does not name
        self._others = others  # whether a checkpoint may have other members than the run
        self._pending: int | None = None  # round whose checkpoint is being written
        self._pending_record: Record | None = None
        self._pending_members = federation.membership
        self._best: checkpoint.Best | None = None  # best round so far, until a checkpoint holds it
        self._best_P = torch.empty(0)  # its parameters, on rank 0 and wherever rank 0 may die
        self._pending_best: checkpoint.Best | None = None  # best round that is being written
        self._writer: checkpoint.Writer | None = None
        self._failures = 0  # failed writes in a row
        self._sync: Callable[[], None] = lambda: None

    @property
    def saved(self) -> str:
        """What remains of a run that ends early, as text for the user."""
        if self.sealed < 0:
            return f"no round is on disk in {self._config.out} yet; the same command starts again"
        return f"round {self.sealed} is on disk; the same command resumes"

    def remember(self) -> None:
        """Set the message for the case that the launcher kills this process."""
        if self.comm.rank == 0 and self.comm.size > 1:
            stopping.last_words(f"fedmpi: ended by the launcher: {self.saved}")

    # ------------------------------------------------------------ resuming

    def resume(self, state: State, latest: int | None = None) -> State:
        """The state of the newest round, up to `latest`, that is whole on all ranks, in the memory of `state`.
        Collective.

        Returns `state` unchanged if there is no such round. Later rounds are deleted from disk.
        """
        self.sealed = self._newest(latest)
        if self.sealed >= 0:
            state = self._restore(replace(state, round=self.sealed, written=self.sealed))
        # Delete only after everything was read: until here nothing on disk has changed.
        self.comm.collectively(
            lambda: checkpoint.remove_after(self._out, self.sealed) if self._directory.leads else None
        )
        return state

    def take_over(self, round: int) -> None:
        """Follow the keeper of a federation that lost ranks, after `round`. Collective.

        Its sealed checkpoints stay, even if the new rank 0 does not see them yet; later ones and unfinished ones are
        deleted.
        """
        rounds = self.comm.collectively(lambda: checkpoint.sealed_rounds(self._out) if self.comm.rank == 0 else [])
        self.sealed = int(self.comm.gather_number(max(rounds, default=-1))[0])
        self.comm.collectively(self._require_ours)
        self.comm.collectively(lambda: checkpoint.remove_after(self._out, round) if self._directory.leads else None)

    def _newest(self, latest: int | None) -> int:
        """The newest round, up to `latest`, that is whole on every rank; each checks the files that it will read.
        Collective."""
        below = None if latest is None else latest + 1
        round, lost = newest_whole(self._out, self.comm, self._fed.silos, self._others, below)
        if round >= 0:
            return round
        # No round is whole everywhere. A fresh start would overwrite checkpoints that some rank still sees.
        sealed = self.comm.collectively(lambda: checkpoint.sealed_rounds(self._out))
        seen = self.comm.gather_number(1 + max(sealed, default=-1))
        if seen.any():
            why = f"but none is whole on {ranks_text(lost)}; repair it, or choose another out="
            raise agreed(ConfigError(f"{self._out} holds checkpoints up to round {int(seen.max()) - 1}, {why}"))
        return -1

    def _restore(self, state: State) -> State:
        """The state of the checkpoint of `state.round`. Collective."""
        comm, round, fed = self.comm, state.round, self._fed
        about = comm.collectively(lambda: checkpoint.manifest(self._out, round) if comm.rank == 0 else None)
        told = None if about is None else (about.record, about.epoch, about.hosted)
        record, epoch, hosted = json.loads(comm.broadcast_text(json.dumps(told), 0))
        before, self.epoch = Membership.of(epoch, hosted, self._order), epoch
        if fed.secure is not None and {silo for some in hosted for silo in some} != {*fed.ids}:
            why = "two sums that differ by one silo would show its update"
            raise agreed(ConfigError(f"secure: a resumed run keeps its silos, and round {round} has others: {why}"))
        if before.ids != fed.ids and not self._others:  # a newer checkpoint is damaged
            self._require_left(round, before)
        heir_of = heirs(before, fed.membership)
        mine = [silo for silo in before.ids if heir_of.get(silo, silo) in fed.silos]
        stored = comm.collectively(lambda: checkpoint.read_silos(self._out, round, mine))
        of_silos = [
            StateTensor(key, tensor, "per_silo", silo)
            for silo, tensors in stored.items()
            for key, tensor in tensors.items()
        ]
        comm.collectively(lambda: self._require_same(SameData(fed).others(of_silos)))
        whole = comm.collectively(lambda: checkpoint.read_state(self._out, round) if comm.rank == 0 else [])
        outcome = None if record is None else RoundOutcome.from_record(fed.ids, record)
        state = replace(state, outcome=outcome, record=record)
        of_silos = remaining(of_silos, before, heir_of)
        section = section_of(self._config.fork)
        if section is None or section.round != round or not section.reset:
            return restored(state, fed, self._health, whole, of_silos, before)
        whole, of_silos = (without(some, section.reset, fed.model.first_personal) for some in (whole, of_silos))
        return restored(state, fed, self._health, whole, of_silos, before, [STATE[part] for part in section.reset])

    def _require_left(self, round: int, before: Membership) -> None:
        """ConfigError unless the members are those of the round without silos that left later, which stay out."""
        self.left = [silo for silo in before.ids if silo not in self._fed.index]
        who = ", ".join(self.left[:4]) + (", ..." if self.left[4:] else "")
        if len(before.ids) != len(self._fed.ids) + len(self.left):
            raise agreed(ConfigError(f"{self._out}: round {round} has other members; give the run a membership"))
        if self.comm.rank == 0:
            log.warning("round %d has members that left later (%s): the run goes on without them", round, who)

    def _require_same(self, others: Sequence[str]) -> None:
        if others:
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            raise ConfigError(
                f"{self._out} holds checkpoints of another run: the data of silo '{others[0]}'{more} are not the same; "
                "choose another out="
            )

    # ------------------------------------------------------------ writing

    def open(self, sync: Callable[[], None]) -> None:
        """Start to accept checkpoints. `sync` runs on rank 0 and flushes what must be on disk before a seal.
        Collective."""
        self._sync = sync
        self._scores = self.comm.collectively(lambda: checkpoint.scores(self._out) if self._directory.leads else {})
        told = [score for score in self._scores.values() if score is not None] if self.comm.rank == 0 else []
        self._best_score = float(self.comm.broadcast_text(repr(max(told, default=-math.inf)), 0))  # of all rounds
        self._stored_score = self._best_score  # of the rounds on disk
        self._writer = self.comm.collectively(
            lambda: checkpoint.Writer(self._out, self.comm.rank, self._directory.require_newest)
        )
        self._hold_inherited()

    @property
    def writer(self) -> checkpoint.Writer:
        """This rank's writer."""
        assert self._writer is not None
        return self._writer

    @property
    def written(self) -> int:
        """The newest round whose file this rank has safely written; FAILED after a failed write.

        `keep` raises the failure on all ranks once they agree.
        """
        try:
            return self.writer.written
        except CheckpointError:
            return FAILED

    def keep(self, state: State, due: bool = False) -> None:
        """Handle a finished round: hold it if it is the best, seal a checkpoint that is safe by now, and start one if
        due. `due`: it is, and it is sealed at once."""
        self._hold_best(state)
        if self._pending is not None and (state.written >= self._pending or state.written == FAILED):
            self.seal()
        if (due or state.round % self._config.checkpoint.every == 0) and not self._health.doubts:
            self.write(state)
        if due:
            self.seal()

    def follow(self, federation: Federation, admitted: Sequence[Admitted]) -> None:
        """Continue with another federation; the checkpoints of the one before are on disk."""
        self._fed, self._admitted = federation, admitted

    def has(self, state: State) -> bool:
        """Whether a checkpoint of the round exists or is being written."""
        return state.round in (self.sealed, self._pending)

    def may_hold(self, state: State) -> bool:
        """Whether a checkpoint of this round can serve a start that goes on as this run does: not while the state is in
        doubt, not if the round's checkpoint has the members before a change. After a failed write it must be due."""
        if self.has(state):
            return self._pending_members == self._fed.membership
        return not self._health.doubts and not self._failures

    def _score(self, record: Record | None) -> float | None:
        """The score of a round, higher is better; None if it was not evaluated.

        Also None between two exchanges across regions, where regions have different models.
        """
        regions = self._config.exchange.regions
        if record is None or (regions is not None and record["round"] % regions.every):
            return None
        return self._score_of(record)

    def _hold_best(self, state: State) -> None:
        """Hold the evaluated parameters of the finished round in memory, if it is the best, until a checkpoint is
        written.

        So every checkpoint includes the best round. A best round between two checkpoints costs a copy of the parameters
        on rank 0 but no file; a killed run repeats it.
        """
        score, fed = self._score(state.record), self._fed
        if score is None or score <= self._best_score or self._health.doubts or state.record is None:
            return
        self._best_score = score
        if state.round % self._config.checkpoint.every == 0:
            self._best = None  # the checkpoint of this round will hold it
            return
        if self.comm.rank == 0 or self.comm.outlives_ranks:
            params_P = fed.layout.params(state.params_Q) if state.average_P is None else state.average_P
            self._best_P = params_P.detach().to("cpu", copy=True)
        self._best = checkpoint.Best(state.round, state.record, score, self._of_best(), fed.membership)

    def _of_best(self) -> list[StateTensor]:
        """This rank's tensors of the best round."""
        fed = self._fed
        # Rules never write into kept tensors, so no copy is needed.
        own = None if fed.rule.is_personal else fed.model.first_personal.keys()
        tensors = [*under("silos", Silos(fed.silos, own).state())]
        return [*tensors, StateTensor(checkpoint.PARAMS, self._best_P)] if self.comm.rank == 0 else tensors

    def inherit(self, before: Keeper) -> None:
        """Take over the best round that the keeper `before` held; `open` decides whether to go on holding it."""
        self._best, self._best_P = before._newest_best(), before._best_P

    def _hold_inherited(self) -> None:
        """Hold an inherited best round only if every rank inherited it. Collective.

        Not where silos have models of their own, which went with their ranks, or where silos have left.
        """
        best, fed, self._best = self._best, self._fed, None
        rounds = self.comm.gather_number(-1 if best is None else best.round)
        if best is None or best.score <= self._best_score or (rounds != best.round).any():
            return
        if best.members.ids == fed.ids and not fed.rule.is_personal and not fed.model.first_personal:
            self._best_score = best.score
            self._best = replace(best, tensors=self._of_best(), members=fed.membership)

    def _newest_best(self) -> checkpoint.Best | None:
        """The better of the best round held and the one that is being written."""
        held = [one for one in (self._pending_best, self._best) if one is not None]
        return max(held, key=lambda one: one.score, default=None)

    def write(self, state: State, last: bool = False) -> None:
        """Start to write a checkpoint of the state; if it is the `last`, a failure raises. Collective."""
        if self._pending is not None:
            self.seal()
        fed = self._fed
        fed.timer.lap("checkpoint")
        fed.exchange.settle()
        fed.timer.lap("exchange")
        tensors = gathered(holders(state, fed, self._health), fed.exchange, self.comm.rank)
        # The writer's own errors are raised with the next round's record, or when the checkpoint is sealed.
        if self._best is not None and self._best.round == state.round:
            self._best = None  # this checkpoint holds it
        self.comm.collectively(lambda: self.writer.start(state.round, tensors, self._best))
        self._pending, self._pending_best, self._best = state.round, self._best, None
        self._pending_record, self._pending_members = state.record, fed.membership
        # With long rounds, waiting for the files costs little, and a kill in the next round then loses only that
        # round. With short rounds, a later round's record seals the checkpoint.
        round_s = (state.record or {"seconds": {"round": 0.0}})["seconds"]["round"]
        period_s = round_s * self._config.checkpoint.every
        done = self.comm.share(np.array([float(self._wait(WAIT_SHARE * period_s))]))
        if done[0] == self.comm.size:
            self.seal(last)

    def seal(self, last: bool = False) -> None:
        """Wait until all ranks' files of the pending checkpoint are safe, then write the manifest. Collective.

        Does nothing if no checkpoint is pending. After a failure training continues with a warning, until
        `checkpoint.max_failures` in a row or the `last` one fail: then every rank raises CheckpointError.
        """
        if (round := self._pending) is None:
            return
        try:
            self._seal(round)
        except FedmpiError as error:
            if not error.agreed:
                raise
            self._give_up(round, error, last)
        else:
            self._failures, self.sealed = 0, round
            self.remember()

    def _give_up(self, round: int, error: FedmpiError, last: bool) -> None:
        """Continue without the round's checkpoint, or raise CheckpointError. Collective."""
        self._best = self._newest_best()
        self._best_score = self._stored_score if self._best is None else max(self._stored_score, self._best.score)
        self._pending, self._pending_best = None, None
        self._failures += 1
        self.comm.collectively(self._require_ours)
        self.writer.forget_failure()
        if self._directory.leads and folder_of(self._out, round).is_dir():
            with contextlib.suppress(OSError):  # a full disk needs the room; the next start deletes what is left
                checkpoint.remove(self._out, round)
        most = self._config.checkpoint.max_failures
        if last or self._failures >= most:
            many = f"{self._failures} checkpoints in a row failed, " if self._failures > 1 else ""
            raise agreed(CheckpointError(f"{many}round {round}: {error}; {self.saved}")) from None
        if self.comm.rank == 0:
            more = f"failure {self._failures} of {most} in a row (checkpoint.max_failures); training goes on"
            log.warning("round %d: %s; %s; %s", round, error, more, self.saved)

    def _require_ours(self) -> None:
        """Raise CheckpointError if another start or job uses the run directory by now."""
        self._directory.require_newest()
        # On a file system without locks this is the only sign.
        if self.comm.rank == 0 and not self._directory.is_ours():
            raise CheckpointError(f"another job has begun to train in {self._out}")

    def _seal(self, round: int) -> None:
        """Write the manifest of the pending checkpoint. Collective."""
        record, best, ranks = self._pending_record, self._pending_best, self.comm.size
        self._wait(math.inf)
        self.comm.collectively(self.writer.join)
        rows = self.comm.gather(self.writer.digests)
        members = self._pending_members
        self._scores[round] = self._score(record)
        if best is not None:
            self._scores[best.round] = best.score
        scores = (self._scores[round], None if best is None else best.score)
        about: dict[str, Any] = {"ranks": ranks, "epoch": members.epoch, "score": self._scores[round], "record": record}
        if self._admitted:
            about["admitted"] = [list(one) for one in self._admitted]

        def write() -> None:
            if self.comm.rank == 0:
                self._require_ours()
                self._sync()
            if self._directory.leads:
                if best is not None:
                    of_best = {**about, "epoch": best.members.epoch, "score": best.score, "record": best.record}
                    checkpoint.seal(self._out, best.round, rows, best.members.by_rank(ranks), of_best, best=True)
                checkpoint.seal(self._out, round, rows, members.by_rank(ranks), about)
                checkpoint.prune(self._out, self._config.checkpoint.keep, self._scores)

        def written() -> None:
            try:
                write()
            except OSError as error:
                raise CheckpointError(f"cannot write a checkpoint into {self._out}: {error}") from None

        self.comm.collectively(written)
        self._pending, self._pending_best = None, None
        self._stored_score = max(self._stored_score, *(score for score in scores if score is not None), -math.inf)

    def _wait(self, limit_s: float) -> bool:
        """Whether this rank's part of the pending checkpoint is on disk within `limit_s` seconds."""
        until_s = time.monotonic() + limit_s
        while not (done := self.writer.wait(min(1.0, max(0.0, until_s - time.monotonic())))):
            self.comm.beat(trains=True)  # so that a slow disk does not look like a dead rank
            if time.monotonic() >= until_s:
                break
        return done

    def finish(self, state: State) -> None:
        """Make sure that the last whole round is on disk and sealed. Collective.

        If the last rounds look bad and the run is not complete, this is the last good checkpoint.
        """
        in_doubt = self._health.doubts > 0 and state.round < self._config.rounds and not self._health.ended
        if not in_doubt and not self.has(state):
            self.write(state, last=True)
        self.seal(last=True)

    def close(self, limit_s: float) -> None:
        """Let this rank's writer thread end within `limit_s` seconds."""
        if self._writer is not None:
            self._writer.close(limit_s)  # a thread with tensors must not outlive Python
