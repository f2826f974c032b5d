"""What ranks store for each other at a commit (mirror.py); whole runs whose ranks die are in mpi/test_heal.py."""

import random
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedmpi import mirror as mirrors
from fedmpi.comm import SoloComm
from fedmpi.comm.threads import on_ranks
from fedmpi.errors import FedmpiError, RankLost
from fedmpi.exchange.chunks import Grid
from fedmpi.heal import _handed_on, agreed_mirror, newest_common
from fedmpi.membership import Membership
from fedmpi.mirror import BUDDIES, Mirror, buddies
from fedmpi.state import StateTensor


@pytest.mark.parametrize("num_elements", [4 << 16, (4 << 16) + 1, 1000])
def test_what_is_divided_is_told_from_what_every_rank_has(num_elements):
    """Also if all parts are equal, and as long as the first rank's piece of such a short vector."""

    def work(comm):
        grid = Grid(num_elements, comm.size)

        def shard(vector):
            return torch.cat([vector[:0], *(vector[grid.part(piece)] for piece in grid.owned(comm.rank))])

        for divide, total in ((shard, num_elements), (lambda vector: vector, -1)):
            mirror = Mirror(SimpleNamespace(comm=comm, exchange=SimpleNamespace(shard=divide)))
            mirror._measure([StateTensor(("v",), divide(torch.zeros(num_elements)), "sharded")])
            totals.append((mirror._totals["v",], total))

    totals = []
    on_ranks(4, work)
    assert len(totals) == 8 and all(found == wanted for found, wanted in totals), totals


@pytest.mark.parametrize("machines", ["aaa", "abb"])
def test_hosts_of_one_name_are_still_two_hosts(machines):
    """The ranks of the host that is gone may still be running, and are more."""
    before = SimpleNamespace(rank=0, size=3, hosts=("node",) * 3, machines=tuple(machines))
    commit: Any = SimpleNamespace(round=1)
    mirror = Mirror(SimpleNamespace(comm=before), commits=[commit])
    if machines == "aaa":
        assert agreed_mirror([mirror], SoloComm())[1].lost == [1, 2]
    else:
        with pytest.raises(FedmpiError, match="1 of 3 ranks are left, and host node is gone as a whole"):
            agreed_mirror([mirror], SoloComm())


def test_what_a_silo_keeps_stays_with_its_rank_where_nobody_may_take_it_over():
    of_silo = StateTensor(("silos", "kept", "own"), torch.zeros(1), "per_silo", "a")
    of_rank = StateTensor(("exchange", "up", "rank", "feedback"), torch.zeros(1), "per_silo", "a")
    part = StateTensor(("optimizer", "v_P", "at", "1", "0", "1"), torch.zeros(1), "sharded")
    for adopts, stays in ((True, []), (False, [of_silo])):
        mirror = Mirror(SimpleNamespace(), adopts=adopts)
        assert [one for one in (of_silo, of_rank, part) if not mirror._outlives(one)] == stays


def test_copies_are_on_other_hosts_and_every_rank_stores_equally_many():
    rng = random.Random(3)
    for size in (*range(1, 12), 64):
        for _ in range(20):
            hosts = tuple(rng.choice("abcd") for _ in range(size))
            mates = buddies(hosts)
            copies = min(BUDDIES, size - 1)
            assert all(len({rank, *mates[rank]}) == 1 + copies for rank in range(size))
            assert set(Counter(mate for some in mates for mate in some).values()) <= {copies}
            for rank, host in enumerate(hosts):
                if copies and 2 * hosts.count(host) <= size:
                    assert any(hosts[mate] != host for mate in mates[rank]), (hosts, rank, mates[rank])
    for rank, mates in enumerate(buddies(tuple("abcd" * 4))):  # one copy on each of four hosts
        assert {one % 4 for one in (rank, *mates)} == {0, 1, 2, 3}


@dataclass(frozen=True)
class Numbered:
    """What `Mirror.keep` reads of a State."""

    round: int = 7
    params_Q: Any = None
    optimizer: Any = None
    average_P: Any = None
    written: int = 0


@pytest.mark.parametrize("dead", [(1, 2, 3), (4, 0, 1), (0, 2, 4)])
def test_what_silos_keep_outlives_three_of_five_ranks_that_die_at_once(dead, monkeypatch):
    """Also the parts of a vector that is divided among the ranks."""
    monkeypatch.setattr(mirrors, "holders", lambda state, fed, health: SimpleNamespace(state=lambda: fed.held))
    vector_P = torch.arange(10.0)
    before = Membership(0, {f"silo-{rank}": (rank,) for rank in range(5)})

    def work(comm):
        mine = slice(2 * comm.rank, 2 * comm.rank + 2)
        held = [
            StateTensor(("silos", "cursor"), torch.tensor(10 + comm.rank), "per_silo", f"silo-{comm.rank}"),
            StateTensor(("optimizer", "v_P"), vector_P[mine], "sharded"),
        ]
        shard = SimpleNamespace(shard=lambda vector: vector[mine])
        mirror = Mirror(SimpleNamespace(comm=comm, exchange=shard, membership=before, held=held))
        mirror._totals["optimizer", "v_P"] = 10
        mirror.keep(Numbered(), None)
        if comm.rank in dead:
            raise LookupError("this rank dies")
        while (left := comm.shrink()).size > 2:
            with pytest.raises(RankLost):
                comm.share(np.zeros(1))
        mirror, group = agreed_mirror([mirror], left)
        after = Membership(1, {silo: (rank % 2,) for silo, (rank,) in before.teams.items()})
        whole, of_silos = _handed_on(newest_common(mirror, group), mirror.fed, group, after)
        cursors = {one.silo: int(one.tensor) for one in of_silos}
        assert cursors == {silo: 10 + rank for silo, (rank,) in before.teams.items() if rank % 2 == group.comm.rank}
        assert [one.tensor.tolist() for one in whole] == ([vector_P.tolist()] if group.comm.rank == 0 else [])
        healed.append(comm.rank)

    healed: list[int] = []
    with pytest.raises(LookupError):
        on_ranks(5, work)
    assert sorted(healed) == sorted({*range(5)} - {*dead})
