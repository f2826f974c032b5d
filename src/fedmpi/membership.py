"""The members of a run, and which ranks host which silo.

    first = place(silos, comm.hosts)                                      the membership at the start of a run
    first.without("c"), first.with_silo("d", 1), first.moved("a", 0)      the next one

A federation is built from a membership, and rebuilt when it changes between two rounds. Communicators are named by
their role.
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

OnFailure = Literal["adopt", "respawn", "continue", "stop"]


@dataclass(frozen=True)
class Membership:
    """The silos that take part, in the federation's order, each with its team of ranks.

    >>> first = Membership(0, {"a": (0,), "b": (1,)})
    >>> first.moved("a", 1).teams, first.without("a").hosted(1), first.with_silo("c", 0).epoch
    ({'a': (1,), 'b': (1,)}, ['b'], 1)
    """

    epoch: int  # number of membership changes since the run began
    teams: Mapping[str, tuple[int, ...]]  # silo -> its ranks, the leading one first
    leader: int = 0  # the rank of the server

    @classmethod
    def of(cls, epoch: int, hosted: Sequence[Sequence[str]], order: Sequence[str]) -> Membership:
        """The membership from each rank's silos; `order` lists all silos.

        >>> Membership.of(2, [["b"], ["c", "a"]], "abcd").teams
        {'a': (1,), 'b': (0,), 'c': (1,)}
        """
        ranks = {silo: rank for rank, silos in enumerate(hosted) for silo in silos}
        return cls(epoch, {silo: (ranks[silo],) for silo in order if silo in ranks})

    @functools.cached_property
    def ids(self) -> list[str]:
        """All member silos."""
        return list(self.teams)

    @functools.cached_property
    def ranks(self) -> list[int]:
        """The leading rank of each silo."""
        return [team[0] for team in self.teams.values()]

    def rank(self, silo: str) -> int:
        """The leading rank of the silo."""
        return self.teams[silo][0]

    def hosted(self, rank: int) -> list[str]:
        """The silos that a rank leads."""
        return [silo for silo, team in self.teams.items() if team[0] == rank]

    def by_rank(self, num_ranks: int) -> list[list[str]]:
        """The silos that each rank leads."""
        found: list[list[str]] = [[] for _ in range(num_ranks)]
        for silo, team in self.teams.items():
            found[team[0]].append(silo)
        return found

    # ------------------------------------------------------------ changes

    def without(self, *silos: str) -> Membership:
        """The membership after these silos leave. Raises ConfigError for a silo that is no member."""
        for silo in silos:
            self._known(silo)
        return self._next({silo: team for silo, team in self.teams.items() if silo not in silos})

    def with_silo(self, silo: str, rank: int) -> Membership:
        """The membership after a silo joins on this rank. Raises ConfigError if it is a member already.

        The dataset must know the silo: `data` names all silos that may ever take part.
        """
        if silo in self.teams:
            raise ConfigError(f"membership: silo '{silo}' is a member already, on rank {self.rank(silo)}")
        return self._next({**self.teams, silo: (rank,)})

    def moved(self, silo: str, rank: int) -> Membership:
        """The membership after a silo moves to another rank. Raises ConfigError if it is no member."""
        self._known(silo)
        return self._next({**self.teams, silo: (rank,)})

    def _next(self, teams: Mapping[str, tuple[int, ...]]) -> Membership:
        return Membership(self.epoch + 1, teams, self.leader)

    def _known(self, silo: str) -> None:
        if silo not in self.teams:
            raise ConfigError(f"membership: no member '{silo}'{did_you_mean(silo, self.ids)}")

    # ------------------------------------------------------------ validation

    def checked(self, silos: Sequence[Silo], hosts: Sequence[str], dedicated: bool = False) -> Membership:
        """This membership in the order of `silos`; `hosts` lists the host of every rank.

        Raises ConfigError for an impossible membership: unknown silos or ranks, a pinned silo on another host than its
        own, a silo on rank 0 with `dedicated`.
        """
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
            if dedicated and rank == self.leader and len(hosts) > 1:  # a single rank serves and hosts
                raise ConfigError(f"membership: silo '{silo}' is on rank 0, which server.dedicated keeps free of silos")
            if not same_host(declared[silo].host, hosts[rank]):
                raise ConfigError(
                    f"membership: silo '{silo}' is pinned to host '{declared[silo].host}', and rank {rank} is on "
                    f"'{hosts[rank]}'; its data may not move there"
                )
        # A rank with silos pinned to its site opens only those; a single process opens all silos.
        pinned_to = {team[0] for silo, team in self.teams.items() if declared[silo].host is not None}
        for silo, (rank, *_) in self.teams.items():
            if declared[silo].host is None and rank in pinned_to and len(hosts) - dedicated > 1:
                raise ConfigError(f"membership: rank {rank} opens silos that are pinned to it alone, and not '{silo}'")
        order = [silo for silo in declared if silo in self.teams]
        return Membership(self.epoch, {silo: tuple(self.teams[silo]) for silo in order}, self.leader)


def same_host(wanted: str | None, host: str) -> bool:
    """Whether a silo pinned to host `wanted` may run on `host`. The domain may be left out; None allows any host."""
    return wanted is None or wanted == host or (("." not in wanted) and wanted == host.partition(".")[0])


@dataclass(frozen=True)
class Comms:
    """The communicators of a federation, by role."""

    world: Comm  # all ranks
    control: Comm  # all ranks: agreements and small tables
    leaders: Comm  # one rank per silo's team, and the server: vectors
    team: Comm  # the ranks of this rank's silos

    @classmethod
    def of(cls, comm: Comm) -> Comms:
        """One communicator in all roles, for silos of one rank each."""
        return cls(comm, comm, comm, comm)
