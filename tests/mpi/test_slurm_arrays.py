"""Arrays and chains of jobs under a real SLURM: slurm/sweep.sbatch."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.slurm import Cluster, slurm_or_skip, until

TOP = Path(__file__).parents[2]
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
    end = slurm.ended(table, timeout_s=150)
    logs = "\n".join(path.read_text() for path in sorted((tmp_path / "logs").glob("*")))
    assert end["JobState"] == "COMPLETED", logs
    for line in ("fedavg", "fedprox"):
        assert line in slurm.log(table), logs
        ranks = json.loads((tmp_path / f"out/as_given/{line}/3/ranks.json").read_text())
        assert len(ranks) == 2, logs
    until(lambda: not slurm.run("squeue", "--noheader"), 20)
    said = call()
    assert "all lines are done" in said and "fedprox" in said and not slurm.run("squeue", "--noheader")
