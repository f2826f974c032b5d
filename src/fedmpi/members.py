"""How members of a run change between two rounds: by the caller, or as `fedmpi retire` and `fedmpi admit` ask."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from typing import Any

from fedmpi import disk, rng, roster, stopping
from fedmpi.changes import asked_for, rank_for
from fedmpi.errors import CheckpointError, ConfigError, FedmpiError, agreed
from fedmpi.membership import Membership
from fedmpi.output import say
from fedmpi.parts import Parts
from fedmpi.rebuild import admitted, rebuilt
from fedmpi.requests import Desk, Request

log = logging.getLogger("fedmpi")


class Members(Parts):
    """A run whose members change. Every method is called by all ranks alike."""

    _closed: bool
    _spoiled: bool  # whether a round failed after its parameters were overwritten
    _changes: list[tuple[Request, int, int]]  # in the last `_take_up`: request, rounds done, epoch

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

    def _follow_clock(self) -> None:
        """Change the members to those that the engine's clock names for the next round. Collective. Raises ConfigError
        if one that took part already is gone: it would begin anew."""
        clock, done, members = self.config.engine.clock, self.state.round, self.membership
        before = (clock.members(done) or ()) if done else ()
        for silo in clock.members(done + 1) or ():
            if silo in members.teams:
                continue
            if silo in before:
                raise agreed(
                    ConfigError(
                        f"engine.clock: replay: silo '{silo}' has left, and takes part in round {done + 1} there"
                    )
                )
            members = members.with_silo(silo, rank_for(silo, self._spec, self.federation))
        if members is not self.membership:
            self.rebuild(members)

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

    def _mirror_anew(self) -> None:
        """Start to mirror the new federation's state (recovery.py). Collective."""
        raise NotImplementedError
