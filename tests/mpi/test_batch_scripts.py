"""slurm/train.pbs and slurm/apptainer.sbatch, with stand-ins for what is not here: qstat, qsub, apptainer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.mpi import OTHERS
from support.slurm import EVERYTHING, OPEN_MPI, inspect, reference, slurm_or_skip, wait_for_checkpoint

pytestmark = EVERYTHING
TOP = Path(__file__).parents[2]
TRAINING = ("rounds=12", "local.epochs=40", "checkpoint.every=1", "exchange.reduction=reproducible")

QSTAT = """#!/bin/sh
echo "    queue = short"
echo "    resources_used.walltime = 00:00:02"
echo "    Resource_List.select = 1:mpiprocs=2"
echo "    Resource_List.walltime = $(cat "$(dirname "$0")/walltime")"
"""
SLEEP = """#!/bin/sh
[ "$1" -lt 100 ] || exec /bin/sleep "$1"
while ! ls {run}/checkpoints/round-*/manifest.json >/dev/null 2>&1; do /bin/sleep 0.1; done
"""
APPTAINER = """#!/bin/sh
# apptainer exec --pwd DIR --bind DIRS IMAGE COMMAND...
[ "$1 $2 $4" = "exec --pwd --bind" ] || exit 9
shift 6
exec "$@"
"""


def put(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def test_a_pbs_job_stops_before_its_limit_and_the_next_one_goes_on(tmp_path: Path) -> None:
    put(tmp_path / "bin", "qstat", QSTAT)
    put(tmp_path / "bin", "qsub", f'#!/bin/sh\necho "$@" >> {tmp_path}/submitted\n')
    put(tmp_path / "bin", "sleep", SLEEP.format(run=tmp_path / "run"))  # stops once there is a checkpoint
    (tmp_path / "nodes").write_text("localhost\nlocalhost\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
    env = {**clean, **OPEN_MPI, "PBS_JOBID": "7", "PBS_O_WORKDIR": str(TOP), "PBS_NODEFILE": f"{tmp_path}/nodes"}
    env |= {"CONFIG": "configs/digits.yaml", "OVERRIDES": " ".join((f"out={tmp_path}/run", *TRAINING))}
    env |= {"FEDMPI_VENV": sys.prefix, "PATH": f"{tmp_path}/bin:{env['PATH']}", "FEDMPI_STOP_S": "180"}

    def job() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", TOP / "slurm/train.pbs"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200
        )

    (tmp_path / "bin/walltime").write_text("00:03:16")  # 14 s after the start it stops
    done = job()
    assert done.returncode == 0 and "submitting the next job" in done.stderr, done.stderr
    line = "-l select=1:mpiprocs=2 -l walltime=00:03:16 -V slurm/train.pbs"
    assert (tmp_path / "submitted").read_text().strip() == f"-q short {line}"
    assert 0 < inspect(tmp_path / "run")["rounds"] < 12
    (tmp_path / "bin/walltime").write_text("02:00:00")
    done = job()
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "submitted").read_text().splitlines()) == 1
    assert inspect(tmp_path / "run")["params_sha256"] == reference(tmp_path / "whole", *TRAINING)


def test_a_job_of_containers_is_requeued_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    put(tmp_path / "bin", "apptainer", APPTAINER)
    (tmp_path / "image.sif").write_text("")
    with slurm_or_skip(num_nodes=2) as slurm:
        sbatch = f"sbatch --parsable --nodes=2 --ntasks-per-node=1 --chdir={TOP} --output={tmp_path}/%j.log".split()
        train = (f"{TOP}/slurm/apptainer.sbatch", f"{tmp_path}/image.sif", "configs/digits.yaml", f"out={tmp_path}/run")
        path = f"{tmp_path}/bin:{Path(shutil.which('fedmpi') or sys.prefix).parent}:{slurm.env['PATH']}"
        job = slurm.run(*sbatch, *train, *TRAINING, PATH=path).strip()
        wait_for_checkpoint(slurm, job, tmp_path / "run")
        slurm.run("scancel", "--signal=USR1", "--batch", job)
        end = slurm.ended(job, timeout_s=200)
        assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), slurm.log(job)
    assert inspect(tmp_path / "run")["params_sha256"] == reference(tmp_path / "whole", *TRAINING)
