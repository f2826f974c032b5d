"""A federation goes on without the ranks that it has lost, from the newest commit that all others have.

    agreed_mirror, newest_common   the commit, and who of the ranks that are left was which rank before
    inherited                      which of them hosts what the lost ranks hosted, or which silos leave
    healed                         the federation of these members, with the state of the commit

Nothing is read from disk but the data of silos that are adopted. The parts of the state that only a lost rank had come
from a buddy (mirror.py). Where its buddies are lost too, and where a partition of the network may have left another
half that goes on as well, the job ends, and the newest checkpoint is what remains.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from fedmpi.assembly import Spec
from fedmpi.comm import Comm
from fedmpi.errors import FedmpiError, agreed, ranks_text
from fedmpi.health import Health
from fedmpi.membership import Comms, Membership, OnFailure
from fedmpi.mirror import AT, Commit, Mirror, buddies
from fedmpi.moving import exchanged, heirs, packed, unpacked
from fedmpi.opening import Opened
from fedmpi.placement import adopted
from fedmpi.rebuild import begun_again, leave_memory
from fedmpi.rounds import Federation, State
from fedmpi.state import StateTensor

T = TypeVar("T")


@dataclass(frozen=True)
class Regrouped:
    """The ranks that are left."""

    comm: Comm
    before: Comm  # what they are left of
    old_ranks: Sequence[int]  # which rank each was

    @property
    def lost(self) -> list[int]:
        """The ranks of before that are gone."""
        return sorted({*range(self.before.size)} - {*self.old_ranks})

    @property
    def new_ranks(self) -> dict[int, int]:
        """By the rank of before."""
        return {old: new for new, old in enumerate(self.old_ranks)}


def agreed_mirror(mirrors: Sequence[Mirror], left: Comm) -> tuple[Mirror, Regrouped]:
    """The newest mirror that all ranks have a commit in, and the ranks that are left of its federation. A call of all
    of them. Raises FedmpiError where they may not go on."""
    mirror = _newest_of_all({mirror.generation: mirror for mirror in mirrors if mirror.commits}, left)
    before = mirror.fed.comm
    old_ranks = [int(rank) for rank in left.gather_number(before.rank)]
    _require_quorum(before.hosts, old_ranks)
    return mirror, Regrouped(left, before, old_ranks)


def _require_quorum(hosts: Sequence[str], left: Sequence[int]) -> None:
    """A host that is gone as a whole may be one that only the network took away, with ranks that go on by themselves:
    then those with most of the ranks go on, or with half of them and rank 0.

    >>> _require_quorum(["a", "b", "b"], [0])    # of b nobody is heard
    Traceback (most recent call last):
    fedmpi.errors.FedmpiError: 1 of 3 ranks are left, and host b is gone as a whole: its ranks may be going on by \
themselves, so these end; start again from the checkpoint
    >>> _require_quorum(["a", "a", "b"], [0, 1]), _require_quorum(["a", "b"], [0])
    (None, None)
    >>> _require_quorum(["a", "a", "a"], [2])    # the others died where somebody is left: nobody else goes on
    """
    there = {hosts[rank] for rank in left}
    gone = sorted({*hosts} - there)
    apart = [rank for rank, host in enumerate(hosts) if host in gone]  # who may be going on
    if not apart or len(left) > len(apart) or (len(left) == len(apart) and 0 in left):
        return
    raise agreed(
        FedmpiError(
            f"{len(left)} of {len(hosts)} ranks are left, and host {', '.join(gone)} is gone as a whole: its ranks may "
            "be going on by themselves, so these end; start again from the checkpoint"
        )
    )


def newest_common(mirror: Mirror, group: Regrouped) -> Commit:
    """The newest commit that every rank has. A call of all ranks."""
    return _newest_of_all({commit.round: commit for commit in mirror.commits}, group.comm)


def _newest_of_all(numbered: Mapping[int, T], comm: Comm) -> T:
    """The one with the highest number that every rank has. A call of all ranks."""
    number = int(comm.gather_number(max(numbered, default=-1)).min())
    if comm.gather_number(number not in numbered).any():
        raise agreed(FedmpiError(f"no round is in the memory of all ranks that are left; {_AGAIN}"))
    return numbered[number]


_AGAIN = "start again from the checkpoint"


def inherited(spec: Spec, fed: Federation, group: Regrouped, how: OnFailure) -> Membership:
    """The members from now on, on the ranks that are left."""
    before, now = fed.membership, group.new_ranks
    hosts, dedicated = group.comm.hosts, spec.config.server.dedicated
    stay = {silo: (now[rank],) for silo, (rank, *_) in before.teams.items() if rank in now}
    if dedicated:  # rank 0 of now may have hosted silos
        stay = {silo: team for silo, team in stay.items() if team[0] != 0}
    declared = [silo for silo in spec.source.silos if silo.id in before.teams]
    num_train = dict(zip(fed.ids, fed.num_train, strict=True))
    adopts = how == "adopt"
    orphans = [s for s in declared if s.id not in stay and (adopts or before.rank(s.id) in now)]
    taken = adopted(stay, orphans, declared, num_train, hosts, dedicated)
    teams = {silo: taken.get(silo, stay.get(silo, ())) for silo in before.ids}
    return Membership(before.epoch + 1, {silo: team for silo, team in teams.items() if team})


def healed(
    spec: Spec, mirror: Mirror, health: Health, group: Regrouped, commit: Commit, opened: Opened
) -> tuple[Federation, State]:
    """The federation of these members on the ranks that are left, with the state of the commit; the one before is
    spent. A call of all ranks."""
    whole, of_silos = _handed_on(commit, mirror.fed, group, opened.members)
    leave_memory(mirror.fed)
    return begun_again(spec, mirror.fed, Comms.of(group.comm), commit.state, health, opened, whole, of_silos)


def _handed_on(
    commit: Commit, fed: Federation, group: Regrouped, members: Membership
) -> tuple[list[StateTensor], list[StateTensor]]:
    """On rank 0 all whole tensors of the commit, and of the silos that this rank hosts now what they keep. A call of
    all ranks."""
    comm, heir_of = group.comm, heirs(fed.membership, members)
    held, old = list(commit.mine), group.before.rank
    for lost, tensors in commit.others.items():
        keepers = [rank for rank in buddies(lost, group.before.size) if rank not in group.lost]
        if lost in group.lost and keepers[0] == old:
            held += tensors
    going: list[list[StateTensor]] = [[] for _ in range(comm.size)]
    for one in held:
        going[0 if one.placement == "sharded" else members.rank(heir_of.get(one.silo, one.silo))].append(one)
    arrived = [one for part in exchanged([*map(packed, going)], comm) for one in unpacked(part)]
    parts = [one for one in arrived if one.placement == "sharded"]
    there = {one.silo for one in arrived if one.key == _CURSOR}
    comm.collectively(lambda: _require_all(members.hosted(comm.rank), there))
    whole = comm.collectively(lambda: [*commit.whole, *_joined(parts)] if comm.rank == 0 else [])
    return whole, [one for one in arrived if one.placement == "per_silo"]


_CURSOR = ("silos", "cursor")  # which every silo has


def _joined(parts: Sequence[StateTensor]) -> Iterator[StateTensor]:
    """Vectors out of the parts that ranks had of them. FedmpiError where a part is gone with its rank and buddies."""
    vectors: dict[tuple[str, ...], torch.Tensor] = {}
    missing: dict[tuple[str, ...], int] = {}
    for one in parts:
        cut = one.key.index(AT)
        key, (total, *lies) = one.key[:cut], (int(number) for number in one.key[cut + 1 :])
        vector = vectors.setdefault(key, torch.zeros(total, dtype=one.tensor.dtype))
        missing.setdefault(key, total)
        start = 0
        for first, length in zip(lies[::2], lies[1::2], strict=True):
            vector[first : first + length] = one.tensor[start : start + length]
            start += length
        missing[key] -= start
    for key, vector in vectors.items():
        if missing[key]:
            raise FedmpiError(f"a rank and its buddies are lost, and with them parts of {'/'.join(key)}; {_AGAIN}")
        yield StateTensor(key, vector, "sharded")


def _require_all(silos: Sequence[str], there: Collection[str]) -> None:
    if lack := [silo for silo in silos if silo not in there]:
        raise FedmpiError(f"a rank and its buddies are lost, and with them what silo '{lack[0]}' keeps; {_AGAIN}")


# ---------------------------------------------------------------- what is said of it


@dataclass(frozen=True)
class Loss:
    """Ranks that were lost, and what became of their silos."""

    round: int  # from which the run goes on
    ranks: Sequence[int]  # of before
    before: Membership
    after: Membership
    old_ranks: Sequence[int]  # by rank of now
    seconds: float  # from when it was noticed

    @property
    def silos(self) -> dict[str, int | None]:
        """Those of the lost ranks: the rank that has each now; None for one that left."""
        lost = [silo for silo in self.before.ids if self.before.rank(silo) in self.ranks]
        return {silo: self.after.rank(silo) if silo in self.after.teams else None for silo in lost}

    @property
    def line(self) -> str:
        """One line of events.jsonl."""
        told = {"event": "lost", "round": self.round, "ranks": [*self.ranks], "silos": self.silos}
        return json.dumps({**told, "num_ranks": len(self.old_ranks), "seconds": round(self.seconds, 3)})

    def __str__(self) -> str:
        taken = [f"{silo} is on rank {rank}" for silo, rank in self.silos.items() if rank is not None]
        left = [silo for silo, rank in self.silos.items() if rank is None]
        what = [*taken[:8], *(["..."] if taken[8:] else []), *([f"{', '.join(left[:8])} left"] if left else [])]
        num = len(self.old_ranks)
        return (
            f"lost {ranks_text(self.ranks)}, and goes on after round {self.round} with {num} "
            f"rank{'s' if num > 1 else ''}, {self.seconds:.2f} s later: {'; '.join(what) or 'no silo was there'}"
        )
