"""Jobs under a real SLURM: slurm/train.sbatch on two virtual nodes with two ranks each."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.slurm import Cluster, slurm_or_skip, until

TOP = Path(__file__).parents[2]
# Rounds take some tenths of a second, so that there is time to interrupt them.
TRAINING = ("rounds=10", "local.epochs=40", "checkpoint.every=2")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    """Four nodes, so that one job can run while another waits to be requeued."""
    with slurm_or_skip(num_nodes=4) as running:
        yield running


def submit(slurm: Cluster, out: Path, **env: str) -> str:
    """The id of a job that trains into ``out``."""
    sbatch = f"sbatch --parsable --nodes=2 --ntasks-per-node=2 --chdir={TOP} --output={out}-%j.log".split()
    train = (f"{TOP}/slurm/train.sbatch", "configs/digits.yaml", f"out={out}", *TRAINING)
    return slurm.run(*sbatch, *train, FEDMPI_VENV=sys.prefix, **env).strip()


def wait_for_checkpoint(slurm: Cluster, job: str, out: Path) -> None:
    until(lambda: list(out.glob("checkpoints/round-*/manifest.json")), 60, lambda: slurm.log(job))


def inspect(out: Path) -> dict[str, Any]:
    command = [f"{sys.prefix}/bin/fedmpi", "inspect", str(out), "--json"]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)


def test_a_signalled_job_is_requeued_and_ends_with_the_same_bits(slurm: Cluster, tmp_path: Path) -> None:
    cut = submit(slurm, tmp_path / "cut")
    wait_for_checkpoint(slurm, cut, tmp_path / "cut")
    slurm.run("scancel", "--signal=USR1", "--batch", cut)
    whole = submit(slurm, tmp_path / "whole")
    for job, restarts in (whole, "0"), (cut, "1"):
        end = slurm.ended(job, timeout_s=200)
        assert (end["JobState"], end["Restarts"]) == ("COMPLETED", restarts), slurm.log(job)
    assert "resumed after round" in slurm.log(cut)
    assert inspect(tmp_path / "cut")["params_sha256"] == inspect(tmp_path / "whole")["params_sha256"]


def test_scancel_is_final_and_exit_0_is_not_believed(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path / "run")
    wait_for_checkpoint(slurm, job, tmp_path / "run")
    slurm.run("scancel", job)
    end = slurm.ended(job)
    assert (end["JobState"], end["Restarts"], end["Requeue"]) == ("CANCELLED", "0", "1"), slurm.log(job)

    # Simulates the files after mpirun loses a node and returns exit code 0.
    job = submit(slurm, tmp_path / "run", FEDMPI_LAUNCHER="true", FEDMPI_STARTS="2")
    end = slurm.ended(job)
    assert (end["JobState"], end["ExitCode"]) == ("FAILED", "1:0"), slurm.log(job)
    assert "2 starts in a row brought no newer checkpoint; round " in slurm.log(job)


def test_a_launcher_that_starts_worlds_of_one_is_refused(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path / "run", FEDMPI_LAUNCHER="srun")
    end = slurm.ended(job)
    assert (end["JobState"], end["ExitCode"]) == ("FAILED", "2:0"), slurm.log(job)
    assert "the launcher started 4 ranks but MPI sees 1" in slurm.log(job)
    assert not (tmp_path / "run" / "checkpoints").exists()
