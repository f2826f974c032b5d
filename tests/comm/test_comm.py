"""Communicator contract (programs/collectives.py) on one rank and on ranks that are threads; and messages about lost
ranks.

MPI jobs run the same contract in mpi/test_collectives.py.
"""

import ast
import inspect
import os
import resource
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.programs.collectives import CASES

from fedmpi.comm import Comm, MpiComm, SoloComm, machine, mpi, process
from fedmpi.comm.threads import ThreadComm, on_ranks
from fedmpi.errors import CommTimeout, ConfigError, ExchangeError, RankLost


@pytest.mark.parametrize("case", CASES)
def test_one_rank_by_itself_keeps_the_contract(case):
    CASES[case](SoloComm())


@pytest.mark.parametrize("n", (1, 3))
@pytest.mark.parametrize("case", CASES)
def test_ranks_that_are_threads_keep_the_contract(case, n):
    on_ranks(n, CASES[case])


@pytest.mark.parametrize("member", (SoloComm, ThreadComm, MpiComm))
def test_a_member_implements_every_method_and_takes_what_the_protocol_says(member):
    assert not member.__abstractmethods__
    for name in (name for name in dir(Comm) if callable(getattr(Comm, name)) and not name.startswith("_")):
        wanted, found = (list(inspect.signature(getattr(kind, name)).parameters) for kind in (Comm, member))
        assert found == wanted, name


def test_no_receive_takes_from_any_rank():
    """Between hosts MPICH may hang in it: it looks in shared memory and in the network at once."""
    calls = []
    for path in sorted(Path(inspect.getfile(mpi)).parent.glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr.endswith("ecv"):
                calls.append((path.name, call.lineno, {keyword.arg for keyword in call.keywords}))
    named = [call for call in calls if "tag" in call[2] or "source" in call[2]]
    assert len(named) > 4 and all("source" in keywords for _, _, keywords in named), named


LOSES = {
    "share": lambda comm: comm.share(np.zeros(1)),
    "gather": lambda comm: comm.gather(b"-"),
    "allreduce": lambda comm: comm.allreduce(torch.zeros(3), torch.zeros(3)),
    "barrier": lambda comm: comm.barrier(),
    "collectively": lambda comm: comm.collectively(lambda: None),
    "group": lambda comm: comm.split(0).barrier(),
}


@pytest.mark.parametrize("call", LOSES)
def test_a_lost_rank_is_named_and_the_others_go_on_without_it(call):
    def work(comm):
        if comm.rank == 1:
            raise LookupError("this rank dies")
        with pytest.raises(RankLost, match="lost rank 1") as lost:
            LOSES[call](comm)
        assert lost.value.ranks == (1,) and not comm.alike(lost.value)
        left = comm.shrink()
        answers.append((comm.rank, left.rank, left.size, left.share(np.ones(1)).tolist()))

    answers = []
    with pytest.raises(LookupError):
        on_ranks(3, work)
    assert sorted(answers) == [(0, 0, 2, [2.0]), (2, 1, 2, [2.0])]


def test_a_rank_that_does_not_come_is_named():
    def work(comm):
        if comm.rank == 2:
            time.sleep(0.5)
            return ()
        with pytest.raises(CommTimeout, match=f"rank {comm.rank} has waited for 0.1 s") as late:
            comm.barrier()
        return late.value.ranks

    assert on_ranks(3, work, limit_s=0.1) == [(2,), (2,), ()]


def test_ranks_in_different_calls_are_told_so():
    with pytest.raises(ExchangeError, match="ranks are in different calls: gather, share"):
        on_ranks(2, lambda comm: comm.gather(b"-") if comm.rank else comm.share(np.zeros(1)))


class Broken(Exception):
    """An MPI error with a class."""

    def Get_error_class(self):
        return self.args[0]


def mpi_rank(error, failed):
    """A rank on which every MPI call fails."""

    def fails(*arguments, **options):
        raise error

    group = SimpleNamespace(Translate_ranks=lambda ranks, group: failed)
    control = SimpleNamespace(Get_group=lambda: None, Get_failed=lambda: group)
    for call in ("Allgather", "Ibarrier", "Iprobe", "Isend"):
        setattr(control, call, fails)
    world = SimpleNamespace(rank=0, size=3, Dup=lambda: control)
    for call in ("Allreduce", "Bcast", "Ialltoallv", "Ibarrier", "Iprobe", "Shrink"):
        setattr(world, call, fails)
    mpi = SimpleNamespace(Exception=Broken, Status=lambda: None, ERR_PROC_FAILED=75, ERR_REVOKED=77, SUM=None)
    comm = MpiComm.__new__(MpiComm)
    super(MpiComm, comm).__init__(mpi, world, control)
    return comm


CALLS = {
    "share": lambda comm: comm.share(np.zeros(1)),
    "gather": lambda comm: comm.gather(b"-"),
    "notices": lambda comm: comm.notices(),
    "notify": lambda comm: comm.notify(1),
    "post": lambda comm: comm.post(0, (1,)),
    "posted": lambda comm: comm.posted(),
    "allreduce": lambda comm: comm.allreduce(torch.zeros(3), torch.zeros(3)),
    "bcast": lambda comm: comm.bcast(torch.zeros(3)),
    "alltoall": lambda comm: comm.alltoall(torch.zeros(3), [(0, 1)] * 3, torch.zeros(3), [(0, 1)] * 3),
    "barrier": lambda comm: comm.barrier(),
    "progress": lambda comm: comm.progress(),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_mpi_says_of_a_lost_rank_comes_out_as_rank_lost(call):
    for failed in ([2, 1], []):
        comm = mpi_rank(Broken(75), failed)
        with pytest.raises(RankLost) as lost:
            CALLS[call](comm)
        assert lost.value.ranks == tuple(sorted(failed)) and comm.depth == 0
    with pytest.raises(Broken):  # any other error is a bug
        CALLS[call](mpi_rank(Broken(15), [1]))


def test_an_mpi_that_cannot_go_on_without_a_rank_says_so_in_one_line():
    with pytest.raises(ConfigError, match=r"^this MPI cannot go on without a lost rank .*\Z"):
        mpi_rank(NotImplementedError("MPI_Comm_shrink"), []).shrink()


def test_one_more_that_dies_as_ranks_shrink_lets_none_of_them_wait_for_another(monkeypatch):
    """Finished and unfinished ranks use the rest of the same communicator the next time."""
    made = []

    class Left(MpiComm):
        def __init__(self, mpi, world):
            self.world, self.oversubscribed, self.revoked = world, False, 0
            self._vigil, self.depth, self.calls, self.outlives_ranks = None, 0, 0, True
            made.append(self)

        def share(self, values, meanwhile=None):
            if len(made) == 1:
                raise RankLost([1])

        def revoke(self):
            self.revoked += 1

    first = SimpleNamespace()
    first.Shrink = lambda: first
    monkeypatch.setattr(mpi, "MpiComm", Left)
    comm = Left(SimpleNamespace(Exception=Broken), None)
    made.clear()
    comm._mpi, comm._first = SimpleNamespace(Exception=Broken), first
    left = comm.shrink()
    assert left is made[1] and [one.world for one in made] == [first] * 2 and made[0].revoked == 1
    made[1]._mpi = comm._mpi
    assert left.shrink() is made[2] and made[2].world is first
    assert made[1].revoked == 1 and comm.depth == made[1].depth == 0


def test_too_little_address_space_for_mpi_is_said_before_it_starts(monkeypatch):
    """Otherwise Open MPI continues without the ranks' shared memory, and the first message never comes."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(process, "launched", lambda: 2)
    monkeypatch.setattr(process, "library", lambda: pytest.fail("MPI was started"))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (used + 2**27, resource.RLIM_INFINITY))
    with pytest.raises(ConfigError, match=r"ulimit -v leaves \d+ MiB of address space, and MPI takes up to 320 MiB"):
        process._connect.__wrapped__()
    for limit in (resource.RLIM_INFINITY, used + 2**30):
        monkeypatch.setattr(resource, "getrlimit", lambda which, limit=limit: (limit, limit))
        assert machine.tight() == ""


@pytest.mark.parametrize("enabled", ["0", "1"])
def test_open_mpi_has_no_collectives_for_hosts_where_ranks_may_be_lost(monkeypatch, enabled):
    told = {"OMPI_MCA_mpi_ft_enable": enabled}
    monkeypatch.setattr(os, "environ", told)
    process._choose_components()
    assert told.get("OMPI_MCA_coll") == ("^han" if enabled == "1" else None)
    told["OMPI_MCA_coll"] = "^cuda"
    process._choose_components()
    assert told["OMPI_MCA_coll"] == "^cuda"
