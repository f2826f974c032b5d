"""jobs/multihost.sh on hosts of one machine (network namespaces), with a stand-in for ssh."""

import json
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest
from support.mpi import OTHER_MPIS, TESTS, absent, other_mpi
from support.slurm import inspect, reference

TOP = TESTS.parent
TESTBED = TESTS / "support/testbed.sh"
TRAINING = ("rounds=3", "data.silos=6", "exchange.reduction=reproducible")


def on_hosts(num: int, tmp_path: Path, lines: str, *more: str, mpi: str = "") -> subprocess.CompletedProcess[str]:
    """`mpi`: one of OTHER_MPIS instead of the virtual environment's."""
    (tmp_path / "hosts").write_text(lines)
    train = ["bash", "jobs/multihost.sh", tmp_path / "hosts", "configs/digits.yaml", f"out={tmp_path}/run", *TRAINING]
    env = {"FEDMPI_SSH": "/proc/1/root/dev/shm/enter", "FEDMPI_VENV": sys.prefix, **(other_mpi(mpi) if mpi else {})}
    words = [
        TESTBED,
        "--hosts",
        str(num),
        "--rate",
        "1gbit",
        "--once",
        "--",
        "env",
        *(f"{name}={value}" for name, value in env.items()),
        *train,
        *more,
    ]
    done = subprocess.run(list(map(str, words)), cwd=TOP, capture_output=True, text=True, timeout=240)
    if done.returncode == 77:
        absent("netns", done.stderr.strip())
    return done


def test_four_hosts_give_the_bits_of_one(tmp_path: Path) -> None:
    done = on_hosts(4, tmp_path, "h1  # one\nh2 slots=1\nh3\tslots=2\nh4\n")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "5 ranks on h1 h2 h3 h4 by: mpirun" in done.stderr
    rows = json.loads((tmp_path / "run/ranks.json").read_text())
    assert [row["host"] for row in rows] == ["h1", "h2", "h3", "h3", "h4"]
    assert inspect(tmp_path / "run")["params_sha256"] == reference(tmp_path / "whole", *TRAINING)


@pytest.mark.parametrize("mpi", OTHER_MPIS)
def test_mpiexec_starts_as_many_ranks_of_a_host_as_it_has_slots(tmp_path: Path, mpi: str) -> None:
    if mpi == "impi" and not find_library("fabric"):
        pytest.skip("between hosts Intel MPI needs libfabric (libfabric1 of Debian), which its wheel lacks")
    done = on_hosts(2, tmp_path, "h1 slots=1\nh2 slots=2\n", mpi=mpi)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = json.loads((tmp_path / "run/ranks.json").read_text())
    assert [row["host"] for row in rows] == ["h1", "h2", "h2"]
    assert inspect(tmp_path / "run")["params_sha256"] == reference(tmp_path / "whole", *TRAINING)


@pytest.mark.parametrize(
    ("lines", "says"),
    [("h1\nh7 slots=2\n", "multihost: h7: no answer by "), ("# none\n", "names no hosts")],
)
def test_a_host_that_does_not_answer_is_named_before_anything_starts(tmp_path: Path, lines: str, says: str) -> None:
    done = on_hosts(1, tmp_path, lines)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
