"""A folder in which `mpirun -n N fedmpi train config.yaml` works, with a user's own model; for tests of the command."""

import json
import shutil
from pathlib import Path

import numpy as np
import yaml
from support.mpi import FEDMPI, PROGRAMS, Done, Job, mpirun, until

from fedmpi import checkpoint
from fedmpi.results import inspect

SILOS = "abcd"
STEPS = 500  # batches of a silo's round
TEN_MINUTES = {"SLEEP_S": "0.6"}  # per batch; two silos on a rank
CONFIG = {
    "rounds": 4,
    "data": {
        "name": "files",
        "task": "classification",
        "shape": [6],
        "num_classes": 3,
        "silos": [{"id": silo, "path": f"{silo}.npz"} for silo in SILOS],
    },
    "model": {"name": "mine:Net"},
    "local": {"name": "sgd", "lr": 0.05, "steps": STEPS, "batch_size": 8},
    "exchange": {"reduction": "reproducible"},
    "checkpoint": {"every": 10},
    "device": {"name": "cpu"},
}


class Place:
    """A folder with a configuration, data and the user's module."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(PROGRAMS / "mine.py", folder)
        self.data = folder / "data"
        self.data.mkdir()
        for number, silo in enumerate(SILOS):
            rng = np.random.default_rng(number)
            x = rng.standard_normal((60, 6)).astype(np.float32)
            x[:, 0] = number
            np.savez(self.data / f"{silo}.npz", x=x, y=rng.integers(0, 3, 60))
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))

    def command(self, out: str, *overrides: str) -> tuple[str, ...]:
        root = [] if any(o.startswith("data") for o in overrides) else [f"data.root={self.data}"]
        return (FEDMPI, "train", "config.yaml", f"out={out}", *root, *overrides)

    def start(self, n: int, out: str, *overrides: str, **env: str) -> Job:
        return Job(n, *self.command(out, *overrides), cwd=self.folder, env=env)

    def train(self, n: int, out: str, *overrides: str, limit_s: float = 60, **env: str) -> Done:
        return mpirun(n, *self.command(out, *overrides), cwd=self.folder, env=env, timeout_s=limit_s)

    def sha(self, out: str) -> str:
        found = inspect(self.folder / out)
        assert found["rounds"] == CONFIG["rounds"], found["rounds"]
        return str(found["params_sha256"])

    def rounds(self, out: str) -> list[int]:
        """The sealed checkpoints."""
        return checkpoint.sealed_rounds(self.folder / out)

    def busy(self, job: Job, out: str, idle: int = 0) -> dict[int, int]:
        """Process ids by rank, from the run directory, once all ranks but `idle` are inside a slow batch."""

        def all_busy() -> bool:
            busy = sum((self.folder / f"busy-{pid}").exists() for pid in job.ranks().values())
            return busy >= job.n - idle and (self.folder / out / "ranks.json").exists()  # the trial is a batch too

        until(lambda: all_busy() or job.process.poll() is not None, 60, lambda: job.so_far().tails)
        assert job.process.poll() is None, job.so_far().tails
        pids = {row["rank"]: row["pid"] for row in json.loads((self.folder / out / "ranks.json").read_text())}
        assert pids == job.ranks()
        return pids


def own_lines(done: Done) -> list[str]:
    """Standard error without the launcher's messages about exit codes, which stand between dashes or alone."""
    own, ours = [], True
    for line in done.err.splitlines():
        if set(line) == {"-"} and len(line) > 20:
            ours = not ours
        elif ours and line.strip():
            own.append(line)
    return own
