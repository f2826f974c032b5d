"""Lets a federation continue without its lost ranks, from the newest commit that all others have.

    agreed_mirror, newest_common   the commit, and the old rank of each rank that is left
    is_gone                        whether state was lost with a rank and its buddies
    inherited                      the membership on the ranks that are left: silos move to them, or leave
    healed                         the federation of these members, with the state of the commit

Only the data of adopted silos are read from disk. State that only a lost rank had comes from a buddy (mirror.py). If
its buddies are lost too, the run goes back to the newest checkpoint (recovery.py). If a network partition may have left
another half running, the job ends, and the newest checkpoint remains.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fedmpi.assembly import Spec
from fedmpi.comm import Comm
from fedmpi.errors import FedmpiError, agreed, ranks_text
from fedmpi.health import Health
from fedmpi.membership import Comms, Membership
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
    before: Comm  # the communicator that lost ranks
    old_ranks: Sequence[int]  # the old rank of each rank

    @property
    def lost(self) -> list[int]:
        """The old ranks that are gone."""
        return sorted({*range(self.before.size)} - {*self.old_ranks})

    @property
    def new_ranks(self) -> dict[int, int]:
        """The new rank by old rank."""
        return {old: new for new, old in enumerate(self.old_ranks)}


def agreed_mirror(mirrors: Sequence[Mirror], left: Comm) -> tuple[Mirror, Regrouped]:
    """The newest mirror in which all ranks have a commit, and the ranks left of its federation. Collective.

    Raises FedmpiError if there is no common commit, or if another part of the job may still be running.
    """
    mirror = _newest_of_all({mirror.generation: mirror for mirror in mirrors if mirror.commits}, left)
    before = mirror.fed.comm
    old_ranks = [int(rank) for rank in left.gather_number(before.rank)]
    _require_quorum(before.machines, old_ranks, before.hosts)
    return mirror, Regrouped(left, before, old_ranks)


def _require_quorum(hosts: Sequence[Any], left: Sequence[int], names: Sequence[str]) -> None:
    """Raise FedmpiError if another part of a partitioned network may continue. `hosts`: each rank's, by identity;
    `names`: for the message.

    A host that is gone as a whole may only be unreachable, with ranks that continue by themselves. Then the part with
    most of the ranks continues, or with half of them and rank 0.

    >>> _require_quorum([1, 2, 2], [0], ["a", "b", "b"])    # host b is gone as a whole
    Traceback (most recent call last):
    fedmpi.errors.FedmpiError: 1 of 3 ranks are left, and host b is gone as a whole: its ranks may still be running, \
so these end; start again from the checkpoint
    >>> _require_quorum([1, 1, 2], [0, 1], "aab"), _require_quorum([1, 2], [0], "ab")
    (None, None)
    >>> _require_quorum([1, 1, 1], [2], "aaa")    # the lost ranks' host is reachable, so they are dead
    """
    there = {hosts[rank] for rank in left}
    apart = [rank for rank, host in enumerate(hosts) if host not in there]  # ranks that may still be running
    gone = dict.fromkeys(names[rank] for rank in apart)
    if not apart or len(left) > len(apart) or (len(left) == len(apart) and 0 in left):
        return
    raise agreed(
        FedmpiError(
            f"{len(left)} of {len(hosts)} ranks are left, and host {', '.join(gone)} is gone as a whole: its ranks may "
            "still be running, so these end; start again from the checkpoint"
        )
    )


def newest_common(mirror: Mirror, group: Regrouped) -> Commit:
    """The newest commit that every rank has. Collective."""
    return _newest_of_all({commit.round: commit for commit in mirror.commits}, group.comm)


def _newest_of_all(numbered: Mapping[int, T], comm: Comm) -> T:
    """The value with the highest number that every rank has. Collective. Raises FedmpiError if there is none."""
    number = int(comm.gather_number(max(numbered, default=-1)).min())
    if comm.gather_number(number not in numbered).any():
        raise agreed(FedmpiError(f"no round is in the memory of all ranks that are left; {_AGAIN}"))
    return numbered[number]


_AGAIN = "start again from the checkpoint"


def inherited(spec: Spec, fed: Federation, group: Regrouped, adopts: bool) -> Membership:
    """The membership on the ranks that are left; orphaned silos are adopted, or leave."""
    before, now = fed.membership, group.new_ranks
    hosts, dedicated = group.comm.hosts, spec.config.server.dedicated
    stay = {silo: (now[rank],) for silo, (rank, *_) in before.teams.items() if rank in now}
    if dedicated:  # the new rank 0 may have hosted silos
        stay = {silo: team for silo, team in stay.items() if team[0] != 0}
    declared = [silo for silo in spec.source.silos if silo.id in before.teams]
    num_train = dict(zip(fed.ids, fed.num_train, strict=True))
    orphans = [s for s in declared if s.id not in stay and (adopts or before.rank(s.id) in now)]
    taken = adopted(stay, orphans, declared, num_train, hosts, dedicated)
    teams = {silo: taken.get(silo, stay.get(silo, ())) for silo in before.ids}
    return Membership(before.epoch + 1, {silo: team for silo, team in teams.items() if team})


def is_gone(mirror: Mirror, group: Regrouped) -> bool:
    """Whether a rank was lost with all its buddies, and with it what a silo keeps or a part of a divided vector. The
    same on every rank."""
    mates, hosting = buddies(group.before.machines), {rank for rank, *_ in mirror.fed.membership.teams.values()}
    gone = {rank for rank in group.lost if {*mates[rank]} <= {*group.lost}}
    return bool(gone and mirror.divides) or bool(gone & hosting and mirror.adopts)


def healed(
    spec: Spec, mirror: Mirror, health: Health, group: Regrouped, commit: Commit, opened: Opened
) -> tuple[Federation, State]:
    """The federation of the new members on the ranks that are left, with the commit's state. Collective.

    Frees the memory of the federation before.
    """
    whole, of_silos = _handed_on(commit, mirror.fed, group, opened.members)
    leave_memory(mirror.fed)
    return begun_again(spec, mirror.fed, Comms.of(group.comm), commit.state, health, opened, whole, of_silos)


def _handed_on(
    commit: Commit, fed: Federation, group: Regrouped, members: Membership
) -> tuple[list[StateTensor], list[StateTensor]]:
    """The commit's whole tensors (on rank 0), and the tensors of the silos that this rank hosts now. Collective."""
    comm, heir_of = group.comm, heirs(fed.membership, members)
    held, old = list(commit.mine), group.before.rank
    for lost, tensors in commit.others.items():
        keepers = [rank for rank in buddies(group.before.machines)[lost] if rank not in group.lost]
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


_CURSOR = ("silos", "cursor")  # every silo has one


def _joined(parts: Sequence[StateTensor]) -> Iterator[StateTensor]:
    """Whole vectors from the ranks' parts. Raises FedmpiError if a part was lost with its rank and buddies."""
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


# ---------------------------------------------------------------- the report of a loss


@dataclass(frozen=True)
class Loss:
    """Ranks that were lost, and what happened to their silos."""

    round: int  # the run continues after this round
    ranks: Sequence[int]  # old numbers of the lost ranks
    before: Membership
    after: Membership
    old_ranks: Sequence[int]  # the old rank of each new rank
    seconds: float  # since the loss was noticed

    @property
    def silos(self) -> dict[str, int | None]:
        """The silos of the lost ranks, with their new rank; None for a silo that left."""
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
        renumbered = ", numbered anew" if [*self.old_ranks] != [*range(num)] else ""
        return (
            f"lost {ranks_text(self.ranks)}; training goes on after round {self.round} with {num} "
            f"rank{'s' if num > 1 else ''}{renumbered}, {self.seconds:.2f} s later: "
            f"{'; '.join(what) or 'they hosted no silo'}"
        )
