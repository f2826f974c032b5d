"""slurm/federation.sh on a real SLURM: silos and the server in jobs of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.slurm import Cluster, slurm_or_skip, until

TOP = Path(__file__).parents[2]
CONFIG = """
rounds: 14
data: {name: digits, silos: 2}
local: {name: sgd, lr: 0.05, epochs: 120}
transport: {name: files, root: shared, lease_s: 10}
out: run
"""


@pytest.fixture
def slurm():
    with slurm_or_skip(num_nodes=4) as running:
        yield running


def submitted(slurm: Cluster, folder: Path) -> dict[str, str]:
    """Call the script; the new jobs' ids by the last part of their names."""
    command = [f"{TOP}/slurm/federation.sh", "study.yaml"]
    env = {**slurm.env, "FEDMPI_VENV": sys.prefix}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=150, check=True)
    rows = [line.split() for line in done.stderr.splitlines() if " submitted: " in line]
    return {name.split("-", 2)[2]: job for _, name, _, job in rows}


def test_a_silo_is_cancelled_and_submitted_again(slurm, tmp_path):
    (tmp_path / "study.yaml").write_text(CONFIG)
    jobs = submitted(slurm, tmp_path)
    assert set(jobs) == {"silo-0", "silo-1", "server"}
    assert submitted(slurm, tmp_path) == {}  # all are there
    metrics = tmp_path / "run/metrics.jsonl"

    def two_rounds():
        return metrics.exists() and len(metrics.read_text().splitlines()) >= 2

    until(two_rounds, 150, lambda: slurm.log(jobs["server"]))
    slurm.run("scancel", jobs["silo-1"])
    assert slurm.ended(jobs["silo-1"])["JobState"] == "CANCELLED"
    again = submitted(slurm, tmp_path)
    assert set(again) == {"silo-1"}
    for job in (jobs["silo-0"], again["silo-1"], jobs["server"]):
        end = slurm.ended(job, timeout_s=200)
        assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), slurm.log(job)
    assert submitted(slurm, tmp_path) == {}  # all rounds are done
    command = [f"{sys.prefix}/bin/fedmpi", "train", "study.yaml", "transport=mpi", "out=plain"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=100)
    digests = []
    for out in ("run", "plain"):
        command = [f"{sys.prefix}/bin/fedmpi", "inspect", out, "--json"]
        told = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=60).stdout
        digests.append(json.loads(told)["params_sha256"])
    assert digests[0] == digests[1]
