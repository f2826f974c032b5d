"""Distributed data stays where it is: which files each rank touches, from its system calls."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from support.mpi import absent, mpirun

TRAIN = """
r=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}
exec strace -f --seccomp-bpf -qq -e trace=%file -s 4096 -o trace-$r "$0" -m fedmpi train config.yaml
"""


@pytest.fixture
def strace() -> None:
    if shutil.which("strace") is None:
        absent("strace", "strace is not installed")
    tried = subprocess.run(["strace", "-f", "--seccomp-bpf", "-o", "/dev/null", "true"], capture_output=True, text=True)
    if tried.returncode:
        absent("strace", f"strace may not trace here: {tried.stderr.strip()}")


def write_silos(folder: Path) -> dict[str, Path]:
    """Four silos, each in a folder of its own: npz, HDF5, CSV, npz."""
    paths = {}
    for number, ending in enumerate((".npz", ".h5", ".csv", ".npz")):
        silo = f"hospital{number}"
        path = folder / f"site-{number}" / f"{silo}{ending}"
        path.parent.mkdir()
        rng = np.random.default_rng(number)
        x, y = rng.standard_normal((40 + number, 3)).astype(np.float32), rng.integers(0, 2, 40 + number)
        if ending == ".csv":
            rows = [f"{','.join(map(str, a))},{b}" for a, b in zip(x.tolist(), y, strict=True)]
            path.write_text("\n".join(["u,v,w,target", *rows]))
        elif ending == ".h5":
            with h5py.File(path, "w") as file:
                file["x"], file["y"] = x, y
        else:
            np.savez(path, x=x, y=y)
        paths[silo] = path
    return paths


def touched(trace: Path, silo_paths: dict[str, Path]) -> set[str]:
    """Silos whose folder or file appears in any system call of a rank."""
    named = set(re.findall(r'"((?:[^"\\]|\\.)*)"', trace.read_text(errors="replace")))
    return {silo for silo, path in silo_paths.items() if any(path.parent.name in name for name in named)}


@pytest.mark.usefixtures("strace")
def test_a_rank_touches_no_other_ranks_silos(tmp_path: Path) -> None:
    paths = write_silos(tmp_path)
    config = {
        "rounds": 2,
        "out": "run",
        "data": {
            "name": "files",
            "task": "binary",
            "shape": [3],
            "silos": [{"id": silo, "path": str(path)} for silo, path in paths.items()],
        },
        "local": {"name": "sgd", "lr": 0.1, "epochs": 1},
        "checkpoint": {"every": 1},
        "device": {"name": "cpu"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = mpirun(2, "sh", "-c", TRAIN, sys.executable, cwd=tmp_path)
    assert done.rc == 0, done.tails
    hosted = {row["rank"]: set(row["silos"]) for row in json.loads((tmp_path / "run" / "ranks.json").read_text())}
    assert hosted[0] and hosted[1] and hosted[0] | hosted[1] == set(paths), hosted
    for rank, mine in hosted.items():
        trace = tmp_path / f"trace-{rank}"
        assert "libmpi" in trace.read_text(errors="replace"), "the trace is not of a rank"
        assert touched(trace, paths) == mine, f"rank {rank}"
