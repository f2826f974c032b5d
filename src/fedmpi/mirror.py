"""Keeps the last commits in the ranks' memory, so that the ranks left after a loss can continue from them.

After each commit a rank copies its own part of the state. It sends what no other rank has to its buddies, three other
ranks, on other hosts if possible. If a rank dies, a buddy still has its part; if all four die, the run goes back to the
newest checkpoint.

Two commits are kept. Ranks that notice a death in different calls differ by at most one commit, and continue from the
newest that all of them have. `keep` ends with a barrier: a rank that leaves it knows that all ranks have the commit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedmpi.exchange.chunks import OF_RANK
from fedmpi.health import Health
from fedmpi.keeper import holders
from fedmpi.moving import exchanged, packed, unpacked
from fedmpi.rounds import Federation, State
from fedmpi.state import Key, StateTensor

if TYPE_CHECKING:
    from fedmpi.assembly import Spec

COMMITS = 2  # that a rank keeps
BUDDIES = 3  # ranks that store what only one rank has
AT = "at"  # in a key: followed by the whole vector's length and the places of the rank's parts in it
Runs = list[tuple[int, int]]  # start and length of each part of a vector that a rank has


@dataclass(frozen=True)
class Commit:
    """One commit, as a rank stores it."""

    state: State  # without its vectors
    whole: list[StateTensor]  # what every rank has
    mine: list[StateTensor]  # what only this rank has: its silos' tensors, its parts of vectors
    others: dict[int, list[StateTensor]]  # the same for the ranks whose buddy this rank is

    @property
    def round(self) -> int:
        return self.state.round


@dataclass
class Mirror:
    """The newest two commits of a federation."""

    fed: Federation
    generation: int = 0  # number of earlier federations of the run that were mirrored
    adopts: bool = True  # whether silos of a lost rank may move to another; if not, buddies do not get their state
    spec: Spec | None = None  # what the federation is made of
    commits: list[Commit] = field(default_factory=list)  # newest last
    _totals: dict[Key, int] = field(default_factory=dict)  # elements of vectors that are divided among ranks
    _runs: dict[int, Runs] = field(default_factory=dict)  # this rank's parts, by the vector's number of elements

    def keep(self, state: State, health: Health) -> None:
        """Store a commit. Collective. Raises RankLost if it did not complete on all ranks; the commits before stay."""
        comm = self.fed.comm
        kept = list(holders(state, self.fed, health).state())
        self._measure(kept)
        alone = [self._is_mine(one) for one in kept]
        spare = self.commits[0] if len(self.commits) == COMMITS else None
        memory = {(t.key, t.silo): t.tensor for t in (*spare.whole, *spare.mine)} if spare is not None else {}
        told = [self._told(one) if is_mine else one for one, is_mine in zip(kept, alone, strict=True)]
        copies = [one._replace(tensor=_copied(one.tensor, memory.get((one.key, one.silo)))) for one in told]
        mine = [one for one, is_mine in zip(copies, alone, strict=True) if is_mine]
        whole = [one for one, is_mine in zip(copies, alone, strict=True) if not is_mine]
        to_buddies = packed([one for one in mine if self._outlives(one)])
        mates, nothing = buddies(comm.machines), torch.empty(0, dtype=torch.uint8)
        outgoing = [to_buddies if rank in mates[comm.rank] else nothing for rank in range(comm.size)]
        arrived = exchanged(outgoing, comm)
        others = {rank: unpacked(arrived[rank]) for rank in range(comm.size) if comm.rank in mates[rank]}
        bare = replace(state, params_Q=torch.empty(0), optimizer=None, average_P=None, written=-1)
        self.commits = [*self.commits[1 - COMMITS :], Commit(bare, whole, mine, others)]
        comm.share(np.zeros(1))

    def _measure(self, found: Sequence[StateTensor]) -> None:
        """Find the whole length of each new sharded vector; -1 if every rank has all of it. Collective."""
        new = [one for one in found if one.placement == "sharded" and one.key not in self._totals]
        if not self._totals or new:
            comm = self.fed.comm
            told = [(len(one.tensor), self._has_all(len(one.tensor))) for one in new]
            shared = comm.share(np.array([1.0, *(float(number) for pair in told for number in pair)]))[1:]
            for one, (size, have_all) in zip(new, shared.reshape(-1, 2), strict=True):
                self._totals[one.key] = -1 if have_all == comm.size else int(size)

    def _has_all(self, length: int) -> bool:
        """Whether this rank's `shard` of a vector of this length is the whole vector.

        True on all ranks if every rank holds whole vectors. If vectors are divided, at most on the first rank (one
        piece).
        """
        return 0 < length == len(self.fed.exchange.shard(torch.empty(length)))

    @property
    def divides(self) -> bool:
        """Whether a vector of the state is divided among the ranks."""
        return any(total >= 0 for total in self._totals.values())

    def _is_mine(self, one: StateTensor) -> bool:
        return one.placement == "per_silo" or (one.placement == "sharded" and self._totals[one.key] >= 0)

    def _outlives(self, one: StateTensor) -> bool:
        """Whether it is needed after its rank is lost."""
        return self.adopts or one.placement == "sharded" or OF_RANK in one.key

    def _told(self, one: StateTensor) -> StateTensor:
        """For a part of a divided vector, the tensor with its places in the key; otherwise unchanged."""
        if one.placement != "sharded":
            return one
        total = self._totals[one.key]
        if total not in self._runs:
            self._runs[total] = _runs(self.fed.exchange.shard(torch.arange(total)))
        lies = [str(number) for run in self._runs[total] for number in run]
        return one._replace(key=(*one.key, AT, str(total), *lies))


@functools.lru_cache(maxsize=8)
def buddies(hosts: tuple[Any, ...]) -> tuple[tuple[int, ...], ...]:
    """For each rank, the ranks that store what only it has. `hosts`: each rank's.

    Ranks form a ring, host by host. Buddies are a quarter, half and three quarters of the ring away: one of them is on
    another host unless more than half of the ranks are on one host, and four equal hosts have one copy each. Every rank
    is the buddy of equally many.

    >>> buddies(("a", "b", "a", "b"))[0], buddies(("a",) * 3), buddies(("a",))
    ((2, 1, 3), ((1, 2), (2, 0), (0, 1)), ((),))
    """
    size, number = len(hosts), {host: i for i, host in enumerate(dict.fromkeys(hosts))}
    ring = sorted(range(size), key=lambda rank: number[hosts[rank]])
    copies = min(BUDDIES, size - 1)
    steps = [size * copy // (copies + 1) for copy in range(1, copies + 1)]
    found = {rank: tuple(ring[(place + step) % size] for step in steps) for place, rank in enumerate(ring)}
    return tuple(found[rank] for rank in range(size))


def _runs(places_N: torch.Tensor) -> Runs:
    """Runs of consecutive numbers, as (first, count).

    >>> _runs(torch.tensor([4, 5, 6, 10, 11]))
    [(4, 3), (10, 2)]
    """
    if not len(places_N):
        return []
    ends = torch.nonzero(places_N.diff() != 1).reshape(-1) + 1
    starts = torch.cat([torch.tensor([0]), ends]).tolist()
    stops = [*ends.tolist(), len(places_N)]
    return [(int(places_N[a]), b - a) for a, b in zip(starts, stops, strict=True)]


def _copied(tensor: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
    """A copy in host memory; reuses `memory` if it fits, because new pages cost more than the copy."""
    tensor = tensor.detach()
    if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
        return tensor.to("cpu", copy=True)
    return memory.copy_(tensor)
