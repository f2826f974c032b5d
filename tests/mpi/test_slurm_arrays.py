"""Arrays, chains and heterogeneous jobs under a real SLURM: slurm/sweep.sbatch, slurm/chain.sh, slurm/train.sbatch."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.slurm import EVERYTHING, Cluster, inspect, reference, slurm_or_skip, until, wait_for_checkpoint

pytestmark = EVERYTHING
TOP = Path(__file__).parents[2]
# Rounds take some tenths of a second, so that there is time to interrupt them.
TRAINING = ("rounds=8", "local.epochs=40", "checkpoint.every=2", "exchange.reduction=reproducible")
GRID = """
base: {rounds: 3, data: {name: digits, silos: 4}, local: {name: sgd, lr: 0.1, epochs: 1}, checkpoint: {every: 1}}
algorithms: {fedavg: {}, fedprox: {local.name: fedprox, local.mu: 0.1}}
seeds: [3]
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with slurm_or_skip(num_nodes=2) as running:
        yield running


def test_an_array_trains_a_grid_and_gathers_its_table(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(GRID)
    sweep = [str(TOP / "slurm/sweep.sbatch"), "grid.yaml", "--out", "out"]
    more = {"FEDMPI_VENV": sys.prefix, "FEDMPI_SBATCH": "--nodes=1 --ntasks-per-node=2"}
    env = {**slurm.env, **more, "PYTHONPATH": str(TOP / "src")}

    def call() -> str:
        done = subprocess.run(sweep, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    said = call()
    assert "2 tasks submitted" in said
    table = said.split("the table: ")[1].split(",")[0]
    assert "its tasks are queued or running" in call()
    end = slurm.ended(table, timeout_s=300)
    logs = "\n".join(path.read_text() for path in sorted((tmp_path / "logs").glob("*")))
    assert end["JobState"] == "COMPLETED", logs
    for line in ("fedavg", "fedprox"):
        assert line in slurm.log(table), logs
        ranks = json.loads((tmp_path / f"out/as_given/{line}/3/ranks.json").read_text())
        assert len(ranks) == 2, logs
    until(lambda: not slurm.run("squeue", "--noheader"), 20)
    said = call()
    assert "all lines are done" in said and "fedprox" in said and not slurm.run("squeue", "--noheader")


def test_a_stop_of_the_task_with_the_arrays_id_leaves_the_others_alone(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(GRID.replace("rounds: 3", "rounds: 8").replace("epochs: 1", "epochs: 60"))
    more = {"FEDMPI_VENV": sys.prefix, "FEDMPI_SBATCH": "--nodes=1 --ntasks-per-node=1"}
    env = {**slurm.env, **more, "PYTHONPATH": str(TOP / "src")}
    sweep = [str(TOP / "slurm/sweep.sbatch"), "grid.yaml", "--out", "out"]
    done = subprocess.run(sweep, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    array = done.stderr.split("submitted: ")[1].split(";")[0]

    def tasks() -> dict[str, dict[str, str]]:
        lines = slurm.run("scontrol", "show", "--oneliner", "job", array).splitlines()
        rows = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
        return {row["ArrayTaskId"]: row for row in rows}

    until(lambda: any(row["JobId"] == array and row["JobState"] == "RUNNING" for row in tasks().values()), 60)
    (last,) = (task for task, row in tasks().items() if row["JobId"] == array)
    out = tmp_path / "out/as_given" / ("fedavg", "fedprox")[int(last) - 1] / "3"
    until(lambda: list(out.glob("checkpoints/round-*/manifest.json")), 240)
    slurm.run("scancel", "--signal=USR1", "--batch", f"{array}_{last}")
    until(lambda: all(row["JobState"] == "COMPLETED" for row in tasks().values()), 200, tasks)
    assert {task: row["Restarts"] for task, row in tasks().items()} == {
        "1": str(int(last == "1")),
        "2": str(int(last == "2")),
    }


def test_a_chain_ends_with_the_run_and_its_bits(slurm: Cluster, tmp_path: Path) -> None:
    env = {**slurm.env, "FEDMPI_VENV": sys.prefix, "PYTHONPATH": str(TOP / "src")}
    env["FEDMPI_SBATCH"] = f"--nodes=2 --ntasks-per-node=1 --output={tmp_path}/%j.log"
    chain = [TOP / "slurm/chain.sh", "4", "configs/digits.yaml", f"out={tmp_path}/run", *TRAINING]
    done = subprocess.run(chain, env=env, cwd=TOP, capture_output=True, text=True, timeout=60)
    first, second, third, fourth = done.stdout.split()
    again = subprocess.run(chain, env=env, cwd=TOP, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and "a chain of this run is queued or running" in again.stderr
    wait_for_checkpoint(slurm, first, tmp_path / "run")
    slurm.run("scancel", "--signal=USR1", "--batch", first)  # as SLURM does near the limit
    end = slurm.ended(first)
    assert (end["Restarts"], end["ExitCode"]) == ("0", "3:0"), slurm.log(first)
    end = slurm.ended(second, timeout_s=240)
    assert end["JobState"] == "COMPLETED", slurm.log(second)
    assert "resumed after round" in slurm.log(second)
    assert [slurm.ended(job)["JobState"] for job in (third, fourth)] == ["CANCELLED", "CANCELLED"]
    assert inspect(tmp_path / "run")["params_sha256"] == reference(tmp_path / "whole", *TRAINING)


def test_components_of_a_heterogeneous_job_are_one_world(slurm: Cluster, tmp_path: Path) -> None:
    options = f"sbatch --parsable --chdir={TOP} --ntasks=1 --output={tmp_path}/%j.log : --nodes=1 --ntasks-per-node=2"
    train = [f"{TOP}/slurm/train.sbatch", "configs/digits.yaml", f"out={tmp_path}/run", "server.dedicated=true"]
    job = slurm.run(*options.split(), *train, *TRAINING, FEDMPI_VENV=sys.prefix).strip()
    assert slurm.ended(job, timeout_s=240)["JobState"] == "COMPLETED", slurm.log(job)
    rows = json.loads((tmp_path / "run/ranks.json").read_text())
    assert [len(row["silos"]) for row in rows] == [0, 2, 2], rows
    assert inspect(tmp_path / "run")["params_sha256"] == reference(tmp_path / "whole", *TRAINING)
