"""Which cores a rank shares with which others, and which GPU it takes under which launcher."""

import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedmpi import device
from fedmpi.comm import SoloComm, machine
from fedmpi.comm.started import LOCAL_RANKS, RANKS, SIZES, local_rank
from fedmpi.comm.threads import on_ranks
from fedmpi.device import Seat, assign, disagreement, local_ranks, sharing
from fedmpi.errors import ConfigError


class Two(SoloComm):
    """A rank that equals another one except for its host name."""

    def __init__(self, other: "Two | None", host: str) -> None:
        super().__init__()
        self.hosts, self.other, self.rows = (host,), other, []  # type: ignore[assignment,var-annotated]

    def gather(self, row: bytes) -> list[bytes]:
        self.rows = [row]
        return [row, *(self.other.rows if self.other else [])]


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_hosts_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    first = Two(None, "h1")
    assert device.set_threads(first, reproducible=False) == 4
    assert device.set_threads(Two(first, "h2"), reproducible=False) == 2
    assert device.set_threads(Two(first, "h2"), reproducible=True) == 1
    monkeypatch.setattr(Path, "read_text", lambda path: "another machine")
    assert device.set_threads(Two(first, "h2"), reproducible=False) == 4


def test_hosts_differ_by_boot_name_and_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers on one machine have namespaces of their own, and may have equal names."""
    mine = machine.host_identity()
    assert mine == machine.host_identity() == SoloComm().machines[0] and len(mine) == 32
    found = {mine}
    for target, name, fake in (
        (socket, "gethostname", lambda: "h2"),
        (Path, "read_text", lambda path: "another boot"),
        (os, "readlink", lambda path: path if path.endswith("uts") else ""),
        (os, "readlink", lambda path: path if path.endswith("net") else ""),
    ):
        with monkeypatch.context() as other:
            other.setattr(target, name, fake)
            found.add(machine.host_identity())
    assert len(found) == 5


@pytest.mark.parametrize(("given", "found"), [("1", 1), ("3,2", 3), ("8", 4), ("0", 1), ("many", 4), ("", 4)])
def test_no_more_threads_than_the_user_says(monkeypatch: pytest.MonkeyPatch, given: str, found: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert device.set_threads(Two(None, "h1"), reproducible=False) == found


# What the ranks of two nodes see, two on each: variables of rank 3, and which of them is taken.
LAUNCHERS = {
    "mpirun of Open MPI": {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_RANK": "3", "PMIX_RANK": "3"},
    "the same in a SLURM job": {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "SLURM_LOCALID": "0", "SLURM_PROCID": "1"},
    "prterun": {"PMIX_RANK": "3"},
    "a wrapper around prterun": {"PMIX_RANK": "3", "PMIX_LOCAL_RANK": "1"},
    "srun --mpi=pmix": {"PMIX_RANK": "3", "SLURM_LOCALID": "1", "SLURM_PROCID": "3"},
    "srun --mpi=pmi2": {"PMI_RANK": "3", "SLURM_LOCALID": "1", "SLURM_PROCID": "3"},
    "mpiexec of MPICH": {"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_RANK": "3"},
    "the same in a SLURM job, by srun": {"MPI_LOCALRANKID": "1", "PMI_RANK": "3", "SLURM_LOCALID": "0"},
    "mpiexec.hydra of Intel MPI": {"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_RANK": "3", "I_MPI_RANK": "3"},
    "MVAPICH2": {"MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_RANK": "3"},
    "PALS": {"PALS_LOCAL_RANKID": "1", "PALS_RANKID": "3"},
    "jsrun": {"JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_RANK": "3"},
    "flux run": {"FLUX_TASK_LOCAL_ID": "1", "FLUX_TASK_RANK": "3"},
    "no launcher": {},
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_local_rank_is_that_of_the_innermost_launcher(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in (*SIZES, *RANKS, *LOCAL_RANKS):
        monkeypatch.delenv(other, raising=False)
    for variable, value in LAUNCHERS[name].items():
        monkeypatch.setenv(variable, value)
    told = local_rank()
    if name in ("prterun", "no launcher"):
        assert told is None
    else:
        assert told is not None and told[1] == 1 and told[0] in LAUNCHERS[name]


def seat(host: str, said: int, gpus: str = "", node: int = 0, variable: str = "V", is_launched: bool = True) -> Seat:
    return Seat(host, f"machine of {host}", node, variable if said >= 0 else "", said, is_launched, tuple(gpus))


@pytest.mark.parametrize(
    ("seats", "numbers", "chosen"),
    [
        # all GPUs of the host for each rank, two hosts
        ([seat(h, n, g) for h, g in (("a", "xy"), ("b", "uv")) for n in (0, 1)], [0, 1, 0, 1], [0, 1, 0, 1]),
        # ranks placed by turns on the hosts
        ([seat("ab"[n % 2], n // 2, ("xy", "uv")[n % 2]) for n in range(4)], [0, 0, 1, 1], [0, 0, 1, 1]),
        # the launcher numbers ranks of a host the other way round: near its own cores
        ([seat("a", 1, "xy"), seat("a", 0, "xy")], [1, 0], [1, 0]),
        # CUDA_VISIBLE_DEVICES has one for each
        ([seat("a", 0, "x"), seat("a", 1, "y")], [0, 1], [0, 0]),
        # CUDA_VISIBLE_DEVICES has two for each: shared by ranks 0 and 2
        ([seat("a", n, ("xy", "uv")[n % 2]) for n in range(4)], [0, 1, 2, 3], [0, 0, 1, 1]),
        # the same GPUs in another order
        ([seat("a", 0, "xy"), seat("a", 1, "yx")], [0, 1], [0, 0]),
        # a container for each rank, all with the GPUs of the machine
        ([seat(f"c{n}", n, "xyz") for n in range(3)], [0, 1, 2], [0, 1, 2]),
        # the variable is an outer launcher's
        ([seat("a", 0, "xyz") for _ in range(3)], [0, 1, 2], [0, 1, 2]),
        # no launcher's variable
        ([seat("a", -1, "xy"), seat("a", -1, "xy")], [0, 1], [0, 1]),
        # more ranks than GPUs: by turns
        ([seat("a", n, "xy") for n in range(4)], [0, 1, 2, 3], [0, 1, 0, 1]),
        # a rank that sees none
        ([seat("a", 0, ""), seat("a", 1, "x")], [0, 1], [-1, 0]),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own(seats: list[Seat], numbers: list[int], chosen: list[int]) -> None:
    assert local_ranks(seats) == numbers
    assert assign(seats) == chosen
    some = [one.gpus[number] for one, number in zip(seats, chosen, strict=True) if one.gpus]
    assert (sharing(seats, chosen) is None) == (len(set(some)) == len(some))


def test_two_ranks_on_one_gpu_are_found() -> None:
    seats = [seat("c0", 0, "y"), seat("c1", 1, "xy"), seat("c2", 2, "x")]
    assert sharing(seats[:2], assign(seats[:2])) is None
    assert sharing(seats, [0, 0, 0]) == (1, 2)
    assert sharing(seats, [0, 1, 0]) == (0, 1)


@pytest.mark.parametrize(
    ("seats", "says"),
    [
        ([seat("a", 0), seat("a", 1), seat("b", 0, node=2), seat("b", 1, node=2)], ""),
        ([seat("a", -1), seat("a", -1)], ""),
        ([seat("a", 1), seat("a", 0)], ""),  # numbered the other way round
        (  # the variables of an outer launcher
            [seat("a", 0), seat("a", 0), seat("a", 0)],
            "a: MPI_Comm_split_type finds ranks 0, 1, 2 on one node, and V numbers them 0, 0, 0 there, not from 0; "
            "GPUs are chosen by numbers counted on each host. ",
        ),
        (  # containers without common memory
            [seat("c0", 0), seat("c1", 1, node=1)],
            "c1: MPI_Comm_split_type finds rank 1 on one node, and V numbers them 1 there, not from 0; GPUs are chosen "
            "by the launcher's numbers. ",
        ),
        # after a loss of rank 0, the launcher's numbers have a gap
        ([seat("a", 1, is_launched=False), seat("a", 2, is_launched=False)], ""),
    ],
)
def test_a_launcher_that_disagrees_with_mpi_is_told(seats: list[Seat], says: str) -> None:
    told = disagreement(seats)
    assert told.startswith(says) and bool(told) == bool(says) and "\n" not in told


def choose_on(monkeypatch: pytest.MonkeyPatch, visible: list[str], said: list[int], share: bool = False) -> list[str]:
    """The devices of ranks that see these GPUs, each a letter, and whose launcher says these local ranks."""
    me = threading.local()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible[me.rank]))
    monkeypatch.setattr(torch.cuda, "set_device", lambda one: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: SimpleNamespace(uuid=visible[me.rank][n]))
    monkeypatch.setattr(device, "local_rank", lambda: ("V", said[me.rank]))

    def work(comm: object) -> str:
        me.rank = comm.rank  # type: ignore[attr-defined]
        return str(device.choose("auto", share, comm))  # type: ignore[arg-type]

    return on_ranks(len(visible), work)


def test_devices_follow_the_launchers_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_on(monkeypatch, ["xyz"] * 3, [2, 0, 1]) == ["cuda:2", "cuda:0", "cuda:1"]
    assert choose_on(monkeypatch, ["x", "y"], [0, 1]) == ["cuda:0", "cuda:0"]
    assert choose_on(monkeypatch, ["", ""], [0, 1]) == ["cpu", "cpu"]
    assert choose_on(monkeypatch, ["x", "x"], [0, 1], share=True) == ["cuda:0", "cuda:0"]
    with pytest.raises(ConfigError, match="device: ranks 0 and 1 would share one GPU of "):
        choose_on(monkeypatch, ["x", "x"], [0, 1])
