"""jobs/wheelhouse.sh: fedmpi installs from the folder, and trains, without a network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.mpi import absent

TOP = Path(__file__).parents[1]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "VIRTUAL"))}


def run(*words: object, env: dict[str, str] | None = None, timeout_s: float = 300) -> str:
    done = subprocess.run(list(map(str, words)), env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"{words}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_a_host_without_a_network_installs_from_the_folder(tmp_path: Path) -> None:
    if os.geteuid() or not shutil.which("unshare"):
        absent("netns", "a network namespace takes root and unshare")
    python = getattr(sys, "_base_executable", sys.executable)
    run(
        "bash", TOP / "jobs/wheelhouse.sh", tmp_path / "wheels", "", env={**os.environ, "FEDMPI_PYTHON": sys.executable}
    )
    assert "fedmpi-" in (tmp_path / "wheels/SHA256SUMS").read_text()
    run("sh", "-c", f"cd {tmp_path}/wheels && sha256sum --check --quiet SHA256SUMS")
    alone = ("unshare", "--net")  # no route, and no loopback
    run(python, "-m", "venv", tmp_path / "venv", env=CLEAN)
    pip = (tmp_path / "venv/bin/python", "-m", "pip", "install", "-q", "--no-index")
    run(*alone, *pip, "--find-links", tmp_path / "wheels", "fedmpi", env=CLEAN)
    train = (tmp_path / "venv/bin/fedmpi", "train", TOP / "configs/digits.yaml", "rounds=1", f"out={tmp_path}/run")
    run(*alone, *train, env=CLEAN)
    assert (tmp_path / "run/model.safetensors").exists()
