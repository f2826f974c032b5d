"""slurm/federation.sh on a real SLURM: silos and the server in jobs of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.slurm import Cluster, slurm_or_skip, until

TOP = Path(__file__).parents[2]
CONFIG = """
rounds: 30
data: {name: digits, silos: 2}
local: {name: sgd, lr: 0.05, epochs: 15}
transport: {name: files, root: shared, lease_s: 10}
out: run
"""


@pytest.fixture
def slurm():
    with slurm_or_skip(num_nodes=4) as running:
        yield running


def submitted(slurm: Cluster, folder: Path, **more: str) -> dict[str, str]:
    """Call the script; the new jobs' ids by the last part of their names."""
    command = [f"{TOP}/slurm/federation.sh", "study.yaml"]
    env = {**slurm.env, "FEDMPI_VENV": sys.prefix, **more}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=150, check=True)
    rows = [line.split() for line in done.stderr.splitlines() if " submitted: " in line]
    return {name.split("-", 2)[2]: job for _, name, _, job in rows}


def test_a_silo_is_cancelled_and_submitted_again(slurm, tmp_path):
    (tmp_path / "study.yaml").write_text(CONFIG)
    jobs = submitted(slurm, tmp_path)
    assert set(jobs) == {"silo-0", "silo-1", "server"}
    until(lambda: rounds(tmp_path) >= 2, 150, lambda: slurm.log(jobs["server"]))
    slurm.run("scancel", jobs["silo-1"])
    assert slurm.ended(jobs["silo-1"])["JobState"] == "CANCELLED"
    again = submitted(slurm, tmp_path)
    assert set(again) == {"silo-1"}
    assert submitted(slurm, tmp_path) == {}  # all are there
    for job in (jobs["silo-0"], again["silo-1"], jobs["server"]):
        end = slurm.ended(job, timeout_s=200)
        assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), slurm.log(job)
    assert submitted(slurm, tmp_path) == {}  # all rounds are done
    assert_bits_of_one_process(tmp_path)


def test_signalled_jobs_are_requeued_and_a_cancelled_server_is_submitted_again(slurm, tmp_path):
    (tmp_path / "study.yaml").write_text(CONFIG)
    jobs = submitted(slurm, tmp_path)
    for number, job in ((2, "silo-0"), (5, "server")):
        until(lambda number=number: rounds(tmp_path) >= number, 200, lambda: slurm.log(jobs["server"]))
        slurm.run("scancel", "--signal=USR1", "--batch", jobs[job])
        until(lambda job=job: slurm.job(jobs[job])["Restarts"] == "1", 60, lambda job=job: slurm.log(jobs[job]))
    until(lambda: rounds(tmp_path) >= 9, 150, lambda: slurm.log(jobs["server"]))
    slurm.run("scancel", jobs["server"])
    assert slurm.ended(jobs["server"])["JobState"] == "CANCELLED"
    again = submitted(slurm, tmp_path)
    assert set(again) == {"server"}
    for job, restarts in ((jobs["silo-0"], "1"), (jobs["silo-1"], "0"), (again["server"], "0")):
        end = slurm.ended(job, timeout_s=250)
        told = (end["JobState"], end["ExitCode"], end["Restarts"])
        assert told == ("COMPLETED", "0:0", restarts), slurm.log(job)
    assert_bits_of_one_process(tmp_path)


def test_a_silo_is_requeued_before_its_time_limit(slurm, tmp_path):
    amount = "{name: sgd, lr: 0.05, epochs: 99999, amount: {name: seconds, seconds: 2.0}}"  # it outlasts the limit
    config = CONFIG.replace("{name: sgd, lr: 0.05, epochs: 15}", amount).replace("rounds: 30", "rounds: 36")
    (tmp_path / "study.yaml").write_text(config)
    jobs = submitted(slurm, tmp_path, FEDMPI_SBATCH_SILO="--time=3")  # USR1 after a minute
    for job in jobs.values():
        end = slurm.ended(job, timeout_s=280)
        assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), slurm.log(job)
    for silo in ("silo-0", "silo-1"):
        assert int(slurm.job(jobs[silo])["Restarts"]) >= 1
        assert "stopped on request, requeueing" in slurm.log(jobs[silo])
    assert rounds(tmp_path) == 36


def test_queue_slurm_compares_the_engines(slurm):
    command = [sys.executable, f"{TOP}/jobs/experiments/queue_slurm.py", "--quick"]
    done = subprocess.run(command, env=slurm.env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["synchronous"]["rounds"] == 2
    assert told["buffered"]["accuracy"] >= told["synchronous"]["accuracy"] > 0


def rounds(folder: Path) -> int:
    """Rounds that the server has recorded."""
    metrics = folder / "run/metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def assert_bits_of_one_process(folder: Path) -> None:
    """The parameters are those of the same configuration in one process."""
    command = [f"{sys.prefix}/bin/fedmpi", "train", "study.yaml", "transport=mpi", "out=plain"]
    subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=250)
    digests = []
    for out in ("run", "plain"):
        command = [f"{sys.prefix}/bin/fedmpi", "inspect", out, "--json"]
        told = subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=60).stdout
        digests.append(json.loads(told)["params_sha256"])
    assert digests[0] == digests[1]
