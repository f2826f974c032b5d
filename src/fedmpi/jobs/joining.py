"""Which silos take part in a federation of jobs: those that have registered, and whose data and configuration fit.

    the first members   once `min_silos` silos have registered, or all
    later ones          at the next round (Serving), as the line of commits then says
    a silo that does not fit is told so in one line; the others go on

The commits hold the members of their rounds. So a server that starts again computes each round with the members that it
had, whoever has registered since.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fedmpi.assembly import Resumes, Spec, weights_of
from fedmpi.comm import Comm
from fedmpi.config import Config
from fedmpi.directory import Stored, newest_usable
from fedmpi.errors import ConfigError, FedmpiError, Stopped, agreed
from fedmpi.files.line import Commit
from fedmpi.jobs.messages import Call, Registration, unlike
from fedmpi.jobs.post import ServerPost, files_of
from fedmpi.membership import Membership
from fedmpi.opening import Opened
from fedmpi.output import say
from fedmpi.stopping import READY, Watch
from fedmpi.types import SiloData

NO_DATA = SiloData(*(torch.empty(0) for _ in range(4)))


class Members(NamedTuple):
    """The members of a round."""

    epoch: int  # of the membership
    ids: list[str]


class Kind(NamedTuple):
    """What all silos of a federation have in common."""

    first: Registration
    begins: str  # digest of the model's first tensors
    columns: float  # checksum of the names of columns; 0: there are none

    @classmethod
    def of(cls, found: Mapping[str, Registration]) -> Kind:
        """What most of these silos have; of equally many, what the first one has."""
        usual, _ = Counter((one.same, one.begins) for one in found.values()).most_common(1)[0]
        alike = [one for one in found.values() if (one.same, one.begins) == usual]
        columns = Counter(one.facts[4] for one in alike if one.facts[4]).most_common(1)
        return cls(alike[0], alike[0].begins, columns[0][0] if columns else 0.0)

    def objection(self, one: Registration, config: Config) -> str:
        """Why a silo does not fit, in one line; empty if it does."""
        for name, own, usual in (
            ("silos", one.known, self.first.known),
            ("task", one.task, self.first.task),
            ("shape", one.shape, self.first.shape),
            ("number of classes", one.num_classes, self.first.num_classes),
        ):
            if own != usual:
                return f"its data have another {name} than the federation: {own}, not {usual}"
        if changed := unlike(one.config, config):
            return f"its configuration is not the server's: {'; '.join(changed[:3])} (there: the silo's job)"
        if one.begins != self.begins:
            return "its model starts from other parameters than the federation's: other init, or torch"
        if one.facts[4] and self.columns and one.facts[4] != self.columns:
            return "its columns are not those of the other silos; rename them, or name those to use in data.features"
        return ""


class Joining:
    """Lets silos into the federation of a server's job."""

    def __init__(self, config: Config, post: ServerPost, watch: Watch) -> None:
        self._config, self._post, self._watch = config, post, watch
        self._kind: Kind | None = None
        self._spec: Spec | None = None
        self._facts: dict[str, list[float]] = {}  # of the members, as they were when they joined
        self._before: dict[str, list[float]] = {}  # of an earlier start's members
        self._refused: dict[str, tuple[int, str]] = {}  # by silo: incarnation of its job, and why

    def first(self, members: Members | None, last: Call) -> dict[str, Registration]:
        """The silos to begin with, once they have registered: the `members` that are known already, or as many as the
        transport asks for. `last` is the last call of an earlier start. Waits; raises Stopped on a signal."""
        while True:
            if self._watch.look() != READY:
                raise self._post.error or _stopped(self._watch)
            found, starts = self._registered()
            self._kind = Kind.of(found) if found else None
            why = {silo: self._kind.objection(one, self._config) for silo, one in found.items() if self._kind}
            fits = {silo: one for silo, one in found.items() if not why[silo]}
            known = self._kind.first.known if self._kind else []
            if members is not None:
                wanted, least = members.ids, len(members.ids)
            else:
                wanted, least = known, self._least(known) if known else 1
            there = [silo for silo in wanted if silo in fits]
            if len(there) >= least:
                break
            if 2 * len(fits) > len(known):  # whoever comes, they stay the most
                self._tell_refused(why, starts)
            missing = [silo for silo in wanted if silo not in fits]
            heard = f"{len(there)} of {least} have" if known or members else "none has yet"
            what = f"for silos to register: {heard}"
            odd = [f"; silo '{silo}': {why[silo]}" for silo in missing if why.get(silo)]
            self._post.waits("".join([f"{what}; missing: {', '.join(missing[:6])}" if missing else what, *odd[:1]]))
            self._post.pause()
        self._tell_refused(why, starts)
        self._before = dict(zip(last.ids, last.facts, strict=True))
        self._facts = {silo: self._before.get(silo, fits[silo].facts) for silo in there}
        return {silo: fits[silo] for silo in there}

    def _least(self, known: Sequence[str]) -> int:
        transport = files_of(self._config)
        transport.suits(len(known))
        return len(known) if transport.min_silos is None else transport.min_silos

    def _registered(self) -> tuple[dict[str, Registration], dict[str, int]]:
        """What the newest job of each silo registered, and its incarnation."""
        rows = self._post.files.registrations()
        return {silo: Registration(**about) for silo, (_, about) in rows.items()}, {
            silo: by for silo, (by, _) in rows.items()
        }

    def begin(self, spec: Spec, begins: str) -> None:
        """The server's model is built, and starts from tensors with this digest. Raises ConfigError if silos start from
        others."""
        assert self._kind is not None
        self._spec = spec
        if begins != self._kind.begins:
            raise ConfigError("the model's first parameters differ from those of the silos: other init, or torch")

    # ------------------------------------------------------------ between two rounds

    def opened(self, members: Membership) -> Opened:
        """The members' facts; their data are in their jobs. Raises ConfigError if a component does not take them, or if
        one has left."""
        assert self._spec is not None
        if left := [silo for silo in self._facts if silo not in members.teams]:
            raise ConfigError(f"transport: files: silo '{left[0]}' stays a member; a new run has others")
        registered, _ = self._registered()
        for silo in members.ids:
            if silo not in self._facts:
                self._facts[silo] = self._before.get(silo, registered[silo].facts)
        facts_KF = np.array([self._facts[silo] for silo in members.ids])
        self._spec.config.entries(self._spec.module, members.ids, self._spec.known)
        weights_of(self._spec.config, members.ids, [int(facts_F[0]) for facts_F in facts_KF])
        return Opened(members, dict.fromkeys(members.ids, NO_DATA), facts_KF)

    def new(self, ids: Sequence[str]) -> list[str]:
        """Silos that have registered, fit, and are no members. Those that do not fit are told."""
        assert self._kind is not None and self._spec is not None
        registered, starts = self._registered()
        found = {silo: one for silo, one in registered.items() if silo not in ids}
        why = {silo: self._kind.objection(one, self._config) for silo, one in found.items()}
        for silo, one in found.items():
            if not why[silo]:
                try:
                    weights_of(self._config, [silo], [int(one.facts[0])])
                except ConfigError as error:
                    why[silo] = str(error)
        self._tell_refused(why, starts)
        return [silo for silo in self._spec.known if silo in found and not why[silo]]

    def _tell_refused(self, why: Mapping[str, str], starts: Mapping[str, int]) -> None:
        """Tell silos that do not fit. `starts` are the incarnations that were judged: a newer job is judged anew."""
        refused = {silo: (starts[silo], text) for silo, text in why.items() if text}
        for silo, told in refused.items():
            if self._refused.get(silo) != told:
                say(f"fedmpi: silo '{silo}' is refused: {told[1]}", error=True)
        if refused != self._refused:
            self._refused = refused
            self._post.refuse(refused)


def with_silos(members: Members, known: Sequence[str]) -> Membership:
    """The membership of these silos, which are all behind one process, in the order of the data."""
    return Membership(members.epoch, {silo: (0,) for silo in known if silo in members.ids})


def members_of(commit: Commit | None) -> Members | None:
    """The members of a committed round; None if the commit is gone, or of a version that did not tell them."""
    if commit is None or "ids" not in commit.about:
        return None
    return Members(commit.about["epoch"], commit.about["ids"])


def first_members(
    before: Sequence[Stored], out: Path, comm: Comm, post: ServerPost
) -> tuple[Members | None, Resumes | None]:
    """The members to begin with, if they are known: those of the newest checkpoint that is whole, or of the first
    commit; and that checkpoint, if newer ones are damaged and have others."""
    if before:
        one = before[newest_usable(out, comm, before, lambda one: sorted(one.silos))]
        return Members(one.epoch, sorted(one.silos)), None if one is before[0] else Resumes(one.round, [])
    return members_of(None if post.files.head is None else post.files.commit_of(0)), None


def _stopped(watch: Watch) -> FedmpiError:
    return agreed(Stopped(f"stopped before the first round: {watch.reason}"))
