"""What ranks store for each other at a commit (mirror.py); whole runs whose ranks die are in mpi/test_heal.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedmpi.comm import SoloComm
from fedmpi.comm.threads import on_ranks
from fedmpi.errors import FedmpiError
from fedmpi.exchange.chunks import Grid
from fedmpi.heal import agreed_mirror
from fedmpi.mirror import Mirror
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
