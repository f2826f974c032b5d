"""How a run goes on when ranks are lost, and when fresh ranks take their place.

heal.py says what the remaining ranks do with the state. Here the run's other parts follow: the run directory,
checkpoints, records and the roster.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import torch

from fedmpi import disk, rng, stopping
from fedmpi.assembly import open_members
from fedmpi.comm import Comm, Spawned, go_on_with
from fedmpi.errors import CommTimeout, ConfigError, FedmpiError, RankLost, agreed
from fedmpi.fresh import is_fresh, joins_no_more
from fedmpi.heal import Loss, Regrouped, agreed_mirror, healed, inherited, is_gone, newest_common
from fedmpi.members import Members
from fedmpi.membership import Comms
from fedmpi.mirror import Mirror
from fedmpi.opening import Opened
from fedmpi.output import flush, say
from fedmpi.rebuild import leave_memory
from fedmpi.records import Sink
from fedmpi.records.metrics import last_round
from fedmpi.requests import Desk
from fedmpi.roster import Roster
from fedmpi.rounds import Federation

SPAWNS = 8  # times that fresh ranks are started in a run
WRITER_S = 30.0  # seconds that a failed run waits for the checkpoint that is being written
ALONE_S = 1.0  # the same for a rank that fails alone, while the others wait for it


class Recovery(Members):
    """A run that outlives ranks. Every method is called by all ranks alike, unless it says otherwise."""

    _mirrors: list[Mirror]  # of the state; two from a new membership to the next commit
    _added: list[Sink]  # by `add_sink`
    _full_hosts: Sequence[str]  # of all ranks, with lost ones
    _spawned: Spawned | None  # fresh ranks that have not joined yet
    _spawns: int  # how often fresh ranks may still be started

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
        wanted = self.config.on_failure
        if wanted not in (None, "stop") and not self.comm.outlives_ranks and self.comm.rank == 0:
            say(
                f"fedmpi: on_failure: {wanted} has no effect: this job ends with the first rank that dies; start Open "
                "MPI 5 with mpirun --with-ft ulfm",
                error=True,
            )
        try:
            self._mirror_anew()
        except Exception as error:
            if is_fresh():
                leave_others(error)
            raise
        joins_no_more()

    def _outlives(self, error: Exception) -> bool:
        """Whether the error is a loss of ranks that the run can continue without."""
        lost = isinstance(error, (RankLost, *self.comm.fatal)) and not isinstance(error, (MemoryError, CommTimeout))
        return lost and bool(self._mirrors)

    @rng.borrowed()
    def _heal(self, error: Exception, lost: bool = True, rewinds: bool = True) -> None:
        """Continue on the remaining ranks, from the newest commit that all of them have in memory. Collective over
        these. If state is in no memory any more, it goes back to the newest checkpoint if it `rewinds`. Raises
        FedmpiError, with the text of `error`, if a rank should be `lost` and none is."""
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
                before, goes_back = mirror.fed.membership, rewinds and self._may_rewind() and is_gone(mirror, group)
                if goes_back:
                    self._mirrors = [mirror]
                    self._rewind(mirror.fed)
                else:
                    commit = newest_common(mirror, group)
                    assert mirror.spec is not None
                    # The mirror's, because only some ranks may have begun a change of the current one.
                    self._spec = replace(mirror.spec, watch=self._spec.watch)
                    opened = self._reopened(mirror.fed, group)
                    self.federation, self.state = healed(self._spec, mirror, self._health, group, commit, opened)
                seconds, done = time.monotonic() - began_s, self.state.round
                loss = Loss(done, group.lost, before, self.membership, group.old_ranks, seconds)
                made = mirror.generation + 1, loss
                self._mirrors = [mirror]
                self._mirror_anew()
                if not goes_back:
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

    def _may_rewind(self) -> bool:
        """Whether this process can go back to a checkpoint by itself, as a start that resumes."""
        return self.config.adopts and not isinstance(self.config.model, torch.nn.Module)

    def _rewind(self, fed: Federation) -> None:
        """Go back to the newest checkpoint, or to the beginning if there is none. Collective over the remaining ranks.
        `fed`: the federation that lost ranks."""
        if self.comm.rank == 0:
            say("fedmpi: a rank and its buddies are lost; the others go back to the newest checkpoint", error=True)
        leave_memory(fed)
        self._close_sinks()
        if self._roster is not None:
            self._roster.save()
        self._roster, self._desk = None, None
        if self._spec.watch.watchdog is not None:
            self._spec.watch.watchdog.end()
        resumed = self.resumed
        try:
            self._set_up(None, self._directory)
        except ConfigError as error:
            if not error.agreed:
                raise
            # Exit code 2 would say that the run cannot start.
            raise agreed(FedmpiError(f"the others cannot go back to a checkpoint: {error}")) from error
        self.resumed = resumed
        self._changes.clear()
        for sink in self._added if self.comm.rank == 0 else ():
            self._sinks.add(sink)
        self.federation.timer.reset()
        self._keeper.remember()
        self.comm.took(0.0)

    def _reopened(self, fed: Federation, group: Regrouped) -> Opened:
        """Open the members' data on the remaining ranks. If adoption fails, the lost ranks' silos leave. Collective."""
        comms, adopts = Comms.of(self.comm), self.config.adopts
        try:
            members = inherited(self._spec, fed, group, adopts)
            return open_members(self._spec, members, comms, fed.silos, fed.facts)
        except FedmpiError as error:
            if not adopts or not error.agreed:
                raise
            if self.config.secure is not None:  # two sums of a round that differ by one silo would show its update
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

    def _tell_parted(self, error: Exception) -> None:
        """Report ranks that were lost after the run was on disk. Not collective: some ranks may not know of them."""
        lost = error.ranks if isinstance(error, RankLost) else ()
        if self.comm.rank == min({*range(self.comm.size)} - {*lost}):
            done = self.state.round
            say(f"fedmpi: {RankLost(lost)}; all is on disk after round {done}, and the others leave", error=True)
            told = {"event": "lost", "round": done, "ranks": [*lost], "silos": {}}
            with contextlib.suppress(OSError):
                line = {**told, "num_ranks": self.comm.size - len(lost), "seconds": 0.0}
                disk.append_line(self.out / stopping.EVENTS_FILE, json.dumps(line))

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
            self._agree(lambda: (config, {}))
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


def leave_others(error: BaseException) -> NoReturn:
    """End a fresh rank that cannot take part; the other ranks go on without it."""
    if not isinstance(error, FedmpiError):  # the others do not know it
        say(f"fedmpi: a fresh rank failed\n{''.join(traceback.format_exception(error))}", error=True)
    flush()
    time.sleep(1.0)  # they may still be in the call that failed
    os._exit(1)
