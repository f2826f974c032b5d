"""Who takes part in a run, and which ranks are whose.

    first = place(silos, comm.hosts)                                      the membership that a run begins with
    first.without("c"), first.with_silo("d", 1), first.moved("a", 0)      the next one

A federation is built from a membership, and built again where it changes between two rounds. Communicators go by their
role, so that who talks to whom is said once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedmpi.comm import Comm
from fedmpi.components import did_you_mean
from fedmpi.errors import ConfigError
from fedmpi.types import Silo

OnFailure = Literal["adopt", "continue", "stop"]


@dataclass(frozen=True)
class Membership:
    """The silos that take part, in the federation's order, each with its team of ranks.

    >>> first = Membership(0, {"a": (0,), "b": (1,)})
    >>> first.moved("a", 1).teams, first.without("a").hosted(1), first.with_silo("c", 0).epoch
    ({'a': (1,), 'b': (1,)}, ['b'], 1)
    """

    epoch: int  # how often the membership has changed since the run began
    teams: Mapping[str, tuple[int, ...]]  # silo -> its ranks, the one that speaks for it first
    leader: int = 0  # the rank that serves

    @classmethod
    def of(cls, epoch: int, hosted: Sequence[Sequence[str]], order: Sequence[str]) -> Membership:
        """From the silos of each rank, in the order of all.

        >>> Membership.of(2, [["b"], ["c", "a"]], "abcd").teams
        {'a': (1,), 'b': (0,), 'c': (1,)}
        """
        ranks = {silo: rank for rank, silos in enumerate(hosted) for silo in silos}
        return cls(epoch, {silo: (ranks[silo],) for silo in order if silo in ranks})

    @functools.cached_property
    def ids(self) -> list[str]:
        """All silos."""
        return list(self.teams)

    @functools.cached_property
    def ranks(self) -> list[int]:
        """The rank that speaks for each silo."""
        return [team[0] for team in self.teams.values()]

    def rank(self, silo: str) -> int:
        """The rank that speaks for the silo."""
        return self.teams[silo][0]

    def hosted(self, rank: int) -> list[str]:
        """The silos that a rank speaks for."""
        return [silo for silo, team in self.teams.items() if team[0] == rank]

    def by_rank(self, num_ranks: int) -> list[list[str]]:
        """The silos that each rank speaks for."""
        found: list[list[str]] = [[] for _ in range(num_ranks)]
        for silo, team in self.teams.items():
            found[team[0]].append(silo)
        return found

    # ------------------------------------------------------------ the next one

    def without(self, *silos: str) -> Membership:
        """These silos leave."""
        for silo in silos:
            self._known(silo)
        return self._next({silo: team for silo, team in self.teams.items() if silo not in silos})

    def with_silo(self, silo: str, rank: int) -> Membership:
        """A silo joins, on this rank. Its data are the dataset's: `data` names all that may ever take part."""
        if silo in self.teams:
            raise ConfigError(f"membership: silo '{silo}' is a member already, on rank {self.rank(silo)}")
        return self._next({**self.teams, silo: (rank,)})

    def moved(self, silo: str, rank: int) -> Membership:
        """A silo goes to another rank."""
        self._known(silo)
        return self._next({**self.teams, silo: (rank,)})

    def _next(self, teams: Mapping[str, tuple[int, ...]]) -> Membership:
        return Membership(self.epoch + 1, teams, self.leader)

    def _known(self, silo: str) -> None:
        if silo not in self.teams:
            raise ConfigError(f"membership: no member '{silo}'{did_you_mean(silo, self.ids)}")

    # ------------------------------------------------------------ what can be

    def checked(self, silos: Sequence[Silo], hosts: Sequence[str], dedicated: bool = False) -> Membership:
        """The same, in the order of `silos`. `hosts` is every rank's host. ConfigError for a membership that cannot
        be: silos or ranks that are not there, a pinned silo elsewhere than on its host."""
        declared = {silo.id: silo for silo in silos}
        if not self.teams:
            raise ConfigError("membership: no silo takes part")
        if self.leader != 0:
            raise ConfigError(f"membership: rank 0 serves; rank {self.leader} cannot lead")
        for silo, team in self.teams.items():
            if silo not in declared:
                raise ConfigError(f"membership: the data have no silo '{silo}'{did_you_mean(silo, list(declared))}")
            if len(team) != 1:
                raise ConfigError(f"membership: silo '{silo}' has {len(team)} ranks; give every silo one")
            if not 0 <= (rank := team[0]) < len(hosts):
                raise ConfigError(f"membership: silo '{silo}' is on rank {rank}, and there are {len(hosts)} ranks")
            if dedicated and rank == self.leader and len(hosts) > 1:  # else it is the last one that is left
                raise ConfigError(f"membership: silo '{silo}' is on rank 0, which server.dedicated keeps free of silos")
            if not same_host(declared[silo].host, hosts[rank]):
                raise ConfigError(
                    f"membership: silo '{silo}' is pinned to host '{declared[silo].host}', and rank {rank} is on "
                    f"'{hosts[rank]}'; its data may not move there"
                )
        # A rank that a site pinned its silos to opens those and no others; one process by itself is all silos.
        pinned_to = {team[0] for silo, team in self.teams.items() if declared[silo].host is not None}
        for silo, (rank, *_) in self.teams.items():
            if declared[silo].host is None and rank in pinned_to and len(hosts) - dedicated > 1:
                raise ConfigError(f"membership: rank {rank} opens silos that are pinned to it alone, and not '{silo}'")
        order = [silo for silo in declared if silo in self.teams]
        return Membership(self.epoch, {silo: tuple(self.teams[silo]) for silo in order}, self.leader)


def same_host(wanted: str | None, host: str) -> bool:
    """Is this the host that a silo is pinned to? Its name may be given without the domain; None is any."""
    return wanted is None or wanted == host or (("." not in wanted) and wanted == host.partition(".")[0])


@dataclass(frozen=True)
class Comms:
    """The communicators of a federation, by their role."""

    world: Comm  # all ranks
    control: Comm  # of all ranks too: what they agree on, and small tables
    leaders: Comm  # one rank per team of a silo, and the server: vectors
    team: Comm  # the ranks of this rank's silos

    @classmethod
    def of(cls, comm: Comm) -> Comms:
        """Where every silo has one rank, one communicator has all roles."""
        return cls(comm, comm, comm, comm)
