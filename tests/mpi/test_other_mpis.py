"""MPIs beside the virtual environment's: collectives, runs and stops of MPICH and Intel MPI, by their own mpiexec."""

import json
import os
import signal
from pathlib import Path

import pytest
from support.mpi import FEDMPI, OTHER_MPIS, TESTS, Job, launch, mpirun, other_mpi, until
from support.programs.collectives import CASES, LARGE
from support.slurm import inspect, reference

from fedmpi import checkpoint
from fedmpi.exchange import plans

pytestmark = pytest.mark.parametrize("mpi", OTHER_MPIS)
TRAINING = ("rounds=3", "data.silos=5", "exchange.reduction=reproducible")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SHA-256 of the run in one process."""
    return reference(tmp_path_factory.mktemp("whole") / "run", *TRAINING)


@pytest.mark.parametrize("n", (1, 2, 3, 4))
def test_collectives(mpi: str, n: int) -> None:
    other_mpi(mpi)  # or skip
    report = launch("collectives", n, mpi=mpi, timeout_s=600)
    for case in (*CASES, *(LARGE if n == 2 else ())):
        report.check(case)
    assert report.done.rc == 0, report.done.tails


def test_all_plans_have_the_bits_of_one_process(mpi: str, tmp_path: Path, whole: str) -> None:
    for plan in plans.PLANS.members:
        words = ("train", "configs/digits.yaml", f"out={tmp_path}/{plan}", *TRAINING, f"exchange.plan={plan}")
        done = mpirun(3, FEDMPI, *words, cwd=TESTS.parent, mpi=mpi, timeout_s=200)
        assert done.rc == 0, done.tails
        assert inspect(tmp_path / plan)["params_sha256"] == whole, plan
        assert len(json.loads((tmp_path / plan / "ranks.json").read_text())) == 3


def test_a_stop_leaves_a_checkpoint_and_the_next_start_has_the_same_bits(mpi: str, tmp_path: Path) -> None:
    long = (*TRAINING, "rounds=400", "checkpoint.every=1")
    words = (FEDMPI, "train", "configs/digits.yaml", f"out={tmp_path}/run", *long)
    with Job(3, *words, cwd=TESTS.parent, mpi=mpi) as job:
        until(lambda: checkpoint.sealed_rounds(tmp_path / "run"), 120, lambda: job.so_far().tails)
        os.kill(job.process.pid, signal.SIGUSR1)
        done = job.wait(60)
    assert done.rc == 3 and "stopped in round" in done.err, done.tails
    rounds = f"rounds={max(checkpoint.sealed_rounds(tmp_path / 'run')) + 2}"
    done = mpirun(2, *words, rounds, cwd=TESTS.parent, mpi=mpi, timeout_s=200)
    assert done.rc == 0 and "resumed after round" in done.out, done.tails
    assert inspect(tmp_path / "run")["params_sha256"] == reference(tmp_path / "whole", *long, rounds)


def test_doctor_names_the_library_and_the_launchers_numbers(mpi: str, tmp_path: Path) -> None:
    done = mpirun(2, FEDMPI, "doctor", "--json", "--out", str(tmp_path), cwd=tmp_path, mpi=mpi, timeout_s=100)
    assert done.rc == 0, done.tails
    result = json.loads(done.out)
    assert result["library"]["library"].startswith({"mpich": "MPICH Version", "impi": "Intel(R) MPI Library"}[mpi])
    assert [row["local_rank"] for row in result["ranks"]] == [["MPI_LOCALRANKID", 0], ["MPI_LOCALRANKID", 1]]
    assert result["local_ranks"] == "" and not any("mpirun on PATH" in line for line in result["warnings"])
