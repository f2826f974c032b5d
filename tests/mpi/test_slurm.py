"""Jobs under a real SLURM: slurm/train.sbatch on two virtual nodes with two ranks each."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mpi import other_mpi
from support.slurm import EVERYTHING, Cluster, inspect, reference, slurm_or_skip, until, wait_for_checkpoint

TOP = Path(__file__).parents[2]
# Rounds take some tenths of a second, so that there is time to interrupt them.
TRAINING = ("rounds=10", "local.epochs=40", "checkpoint.every=2", "exchange.reduction=reproducible")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    """Four nodes, so that one job can run while another waits to be requeued."""
    with slurm_or_skip(num_nodes=4) as running:
        yield running


def submit(slurm: Cluster, out: Path, *options: str, rounds: int = 10, **env: str) -> str:
    """The id of a job that trains into ``out``."""
    sbatch = f"sbatch --parsable --nodes=2 --ntasks-per-node=2 --chdir={TOP} --output={out.parent}/%j.log".split()
    train = (f"{TOP}/slurm/train.sbatch", "configs/digits.yaml", f"out={out}", *TRAINING, f"rounds={rounds}")
    return slurm.run(*sbatch, *options, *train, FEDMPI_VENV=sys.prefix, **env).strip()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SHA-256 of the run in one process."""
    return reference(tmp_path_factory.mktemp("whole") / "run", *TRAINING)


@pytest.mark.parametrize(
    "launcher",
    ["pmix", "mpirun", pytest.param("pmi2", marks=EVERYTHING), pytest.param("mpiexec", marks=EVERYTHING)],
)
def test_a_signalled_job_is_requeued_and_ends_with_the_same_bits(
    slurm: Cluster, tmp_path: Path, launcher: str, undisturbed: str
) -> None:
    env = other_mpi("mpich") if launcher in ("pmi2", "mpiexec") else {}
    job = submit(slurm, tmp_path / "a cut", FEDMPI_LAUNCHER=launcher, **env)
    wait_for_checkpoint(slurm, job, tmp_path / "a cut")
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    end = slurm.ended(job, timeout_s=200)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), slurm.log(job)
    assert "resumed after round" in slurm.log(job)
    told = inspect(tmp_path / "a cut")
    assert told["params_sha256"] == undisturbed and told["metrics"]["accuracy"] > 0.85
    assert len(json.loads((tmp_path / "a cut/ranks.json").read_text())) == 4


@EVERYTHING
def test_a_job_at_its_time_limit_goes_on_by_itself(slurm: Cluster, tmp_path: Path) -> None:
    """The run has more rounds than it ever trains, so that the test does not depend on the machine's speed."""
    out = tmp_path / "run"
    job = submit(slurm, out, "--time=4", "--signal=B:USR1@120", rounds=10**6)

    def rounds() -> int:
        return max((int(path.parent.name[-6:]) for path in out.glob("checkpoints/round-*/manifest.json")), default=0)

    resumed = until(lambda: re.search(r"resumed after round (\d+)", slurm.log(job)), 400, lambda: slurm.log(job))
    until(lambda: rounds() > int(resumed[1]), 100, lambda: slurm.log(job))
    slurm.run("scancel", job)
    end = slurm.ended(job)
    assert end["JobState"] == "CANCELLED" and int(end["Restarts"]) >= 1 and int(resumed[1]) > 0, slurm.log(job)
    stopped = inspect(out)
    assert stopped["params_sha256"] == reference(tmp_path / "whole", *TRAINING, f"rounds={stopped['rounds']}")


@EVERYTHING
def test_the_script_that_fedmpi_slurm_writes_trains_and_is_requeued(
    slurm: Cluster, tmp_path: Path, undisturbed: str
) -> None:
    out = tmp_path / "run"
    words = [
        "--nodes=2",
        "--ranks-per-node=2",
        "--time=10",
        "--launcher=pmix",
        f"--sbatch=--output={out}.log",
        "--submit",
    ]
    job = slurm.run(f"{sys.prefix}/bin/fedmpi", "slurm", f"{TOP}/configs/digits.yaml", f"out={out}", *TRAINING, *words)
    job = job.strip()
    wait_for_checkpoint(slurm, job, out)
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    end = slurm.ended(job, timeout_s=200)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), slurm.log(job)
    assert inspect(out)["params_sha256"] == undisturbed


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


@EVERYTHING
@pytest.mark.parametrize("launcher", ["srun --mpi=pmix --kill-on-bad-exit=1", "mpirun"])
def test_a_node_where_ranks_do_not_start_is_left_out(slurm: Cluster, tmp_path: Path, launcher: str) -> None:
    (tmp_path / "on.sh").write_text('[ "$SLURMD_NODENAME" != "$(cat $0.bad)" ] || exit 1\nexec "$@"\n')
    out, bad = tmp_path / "run", tmp_path / "on.sh.bad"
    bad.write_text("none")
    probe = f'[ "$SLURMD_NODENAME" != "$(cat {bad})" ]'
    job = submit(slurm, out, "--hold", FEDMPI_LAUNCHER=f"{launcher} sh {tmp_path}/on.sh", FEDMPI_PROBE=probe)
    slurm.run("scontrol", "update", f"jobid={job}", "reqnodelist=n3,n4")
    bad.write_text("n4")
    slurm.run("scontrol", "release", job)
    end = slurm.ended(job, timeout_s=200)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "0"), slurm.log(job)
    assert "no answer from n4; their silos move to the others" in slurm.log(job)
    assert len(json.loads((out / "ranks.json").read_text())) == 2
    assert inspect(out)["params_sha256"] == reference(tmp_path / "whole", *TRAINING)


@EVERYTHING
def test_a_node_that_is_killed_at_launch_is_replaced(tmp_path: Path, undisturbed: str) -> None:
    with slurm_or_skip(num_nodes=3) as own:
        job = submit(own, tmp_path / "run")
        until(lambda: "started from the beginning" in own.log(job), 60)
        own.kill_node("n2")
        end = own.ended(job, timeout_s=240)
        assert end["JobState"] == "COMPLETED" and int(end["Restarts"]) >= 1, own.log(job)
        assert end["NodeList"] == "n[1,3]"
        assert inspect(tmp_path / "run")["params_sha256"] == undisturbed
