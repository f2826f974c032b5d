"""The ReFrame suite in jobs/bench/suite, run by ReFrame itself: on this machine, and as jobs of a real SLURM."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.mpi import absent, launcher
from support.slurm import slurm_or_skip

TOP = Path(__file__).parents[2]
CHECKS = ("TrainCheck", "QualityCheck", "ExchangeCheck", "CodecCheck", "CheckpointCheck", "ScalingCheck")
QUICK = ("params=2e4", "num_ranks=2", "target=0.9")


def reframe(partition: str, checks: tuple[str, ...], prefix: Path, env: dict[str, str]) -> str:
    """Runs checks of the suite; what ReFrame says."""
    found = shutil.which("reframe", path=f"{sys.prefix}/reframe/bin:{os.environ['PATH']}")
    if found is None:
        absent(
            "reframe",
            "ReFrame is not installed: python -m venv .venv/reframe, .venv/reframe/bin/pip install ReFrame-HPC",
        )
    suite = TOP / "jobs/bench/suite"
    command = [found, "-C", f"{suite}/site.py", "-c", f"{suite}/checks.py", "--system", f"here:{partition}"]
    command += ["--prefix", str(prefix), "-r", "--performance-report"]
    command += [option for text in QUICK for option in ("-S", text)]
    command += [option for name in checks for option in ("-n", f"^{name}$")]
    path = f"{sys.prefix}/bin:{Path(launcher()[0]).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=prefix, env={**os.environ, **env, "PATH": path}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert f"Ran {len(checks)}/{len(checks)} test case(s)" in done.stdout
    return done.stdout


def test_the_suite_on_this_machine(tmp_path: Path) -> None:
    said = reframe("local", CHECKS, tmp_path, {})
    for name in ("quality.time", "exchange.sharded.int8.bandwidth", "codecs.topk.encode", "checkpoint.write"):
        assert name in said
    assert "scaling.weak.ranks2.efficiency" in said


def test_the_suite_in_slurm_jobs(tmp_path: Path) -> None:
    with slurm_or_skip(num_nodes=1) as slurm:
        said = reframe("slurm", ("TrainCheck", "CodecCheck"), tmp_path, slurm.env)
    assert "here:slurm" in said and "codecs.int8.wire" in said


@pytest.mark.parametrize("settings", ["target=1.01"])
def test_a_check_fails_where_the_target_is_missed(
    tmp_path: Path, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "QUICK", (*QUICK[:2], settings))
    with pytest.raises(AssertionError, match="TrainCheck"):
        reframe("local", ("TrainCheck",), tmp_path, {})
