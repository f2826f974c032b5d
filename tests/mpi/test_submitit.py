"""The example of docs/clusters.md for submitit, on a real SLURM."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from support.mpi import absent
from support.slurm import EVERYTHING, inspect, reference, slurm_or_skip, until, wait_for_checkpoint

pytestmark = EVERYTHING
TOP = Path(__file__).parents[2]
TRAINING = ("rounds=12", "local.epochs=40", "checkpoint.every=1", "exchange.reduction=reproducible")


def example(folder: Path) -> str:
    """The page's code, for a small run, which prints the job's id and then its results."""
    (code,) = re.findall(r"```python\n(import os\n.*?)```", (TOP / "docs/clusters.md").read_text(), re.DOTALL)
    for before, after in (
        ("tasks_per_node=4, timeout_min=480", "tasks_per_node=2, timeout_min=10"),
        ('folder="logs/%j"', f'folder="{folder}/logs/%j"'),
        ('"out=runs/digits"', ", ".join(repr(word) for word in (f"out={folder}/run", *TRAINING))),
    ):
        assert code.count(before) == 1, before
        code = code.replace(before, after)
    return f"{code}\nprint(job.job_id, flush=True)\nprint(job.results(), flush=True)\n"


def test_a_function_is_requeued_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    if importlib.util.find_spec("submitit") is None:
        absent("submitit", "submitit is not installed: pip install submitit")
    (tmp_path / "submit.py").write_text(example(tmp_path))
    with slurm_or_skip(num_nodes=2) as slurm:
        path = os.pathsep.join(filter(None, [str(TOP / "src"), os.environ.get("PYTHONPATH")]))
        env = {**slurm.env, "PYTHONPATH": path}
        words = [sys.executable, tmp_path / "submit.py"]
        with subprocess.Popen(words, cwd=TOP, env=env, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            job = client.stdout.readline().strip()
            wait_for_checkpoint(slurm, job, tmp_path / "run")
            slurm.run("scancel", "--signal=USR1", job)  # to the ranks, as SLURM does near the limit
            until(lambda: slurm.job(job)["Restarts"] == "1", 60, lambda: slurm.log(job))
            results = client.communicate(timeout=200)[0]
        end = slurm.ended(job)
        assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), slurm.log(job)
    losses = json.loads(results.splitlines()[-1])
    assert len(losses) == 4 and all(len(one) == 1 and one == losses[0] for one in losses), results  # from each rank
    assert inspect(tmp_path / "run")["params_sha256"] == reference(tmp_path / "whole", *TRAINING)
