"""The batch scripts with stand-ins for SLURM and the ranks: which stops requeue which job. No MPI."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from support.slurm import until

from fedmpi import checkpoint, requeues
from fedmpi.batch import Request, script
from fedmpi.config import load
from fedmpi.plan import plan
from fedmpi.starters import STARTERS

TOP = Path(__file__).parents[1]
GRID = "base: {rounds: 3, data: {name: digits, silos: 4}}\nalgorithms: {fedavg: {}, other: {rounds: 2}}\nout: grid\n"
CONFIG = "rounds: 3\ndata: {name: digits, silos: 4}\nout: run\n"
FEDMPI = """#!/bin/bash
case "$*" in *--tasks) printf '1\\tx\\twaiting\\n'; exit ;; inspect*) exit 1 ;; esac
trap 'touch told; while [ -e hold ]; do sleep 0.02; done; exit 3' USR1
touch ready
while :; do sleep 0.02; done
"""
PYTHON = """#!/bin/sh
[ "$1" = -m ] || { echo run; exit; }
echo "$@" >>asked
[ ! -e never ]
"""
EXEC = '#!/bin/bash\nwhile [[ $1 = -* ]]; do [ "$1" != --pwd ] || shift 3; shift; done; exec "$@"\n'
CASES = {
    "train": ("slurm/train.sbatch", ["a.yaml"]),
    "sweep": ("slurm/sweep.sbatch", ["--job", "task", "venv", "grid.yaml"]),
    "apptainer": ("slurm/apptainer.sbatch", ["image", "a.yaml"]),
    "written": ("job.sh", []),
}


@pytest.fixture
def site(tmp_path):
    """A folder with a virtual environment of stand-ins; `srun` and `apptainer` start their command here."""
    programs = {
        "fedmpi": FEDMPI,
        "python": PYTHON,
        "scontrol": '#!/bin/sh\necho "$@" >> scontrol.log\n',
        "srun": EXEC,
        "apptainer": '#!/bin/sh\nshift 6\nexec "$@"\n',
    }
    (tmp_path / "venv/bin").mkdir(parents=True)
    for name, text in programs.items():
        (tmp_path / "venv/bin" / name).write_text(text)
        (tmp_path / "venv/bin" / name).chmod(0o755)
    (tmp_path / "a.yaml").write_text(CONFIG)
    (tmp_path / "grid.yaml").write_text(GRID)
    (tmp_path / "image").write_text("")
    config, origins = load(tmp_path / "a.yaml")
    planned = plan(config, origins, 1)
    request = Request(1, "60")
    text = script(config, ["a.yaml"], planned, request, STARTERS["mpirun"], str(tmp_path), str(tmp_path / "venv"))
    (tmp_path / "job.sh").write_text(text)
    return tmp_path


def stop(site, name, *signals, **slurm):
    """The words that scontrol got after the script's ranks have started and the signals were sent."""
    file, words = CASES[name]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    path = f"{site}/venv/bin:{clean['PATH']}"
    env = {**clean, "PATH": path, "SLURM_JOB_ID": "70", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
    env |= {"FEDMPI_VENV": f"{site}/venv", "FEDMPI_LAUNCHER": "env", "PYTHONPATH": str(TOP / "src"), **slurm}
    for each in ("ready", "told", "scontrol.log"):
        (site / each).unlink(missing_ok=True)
    (site / "hold").touch()
    script = TOP / file if (TOP / file).exists() else site / file
    with subprocess.Popen(["bash", script, *words], cwd=site, env=env, stderr=subprocess.PIPE, text=True) as job:
        try:
            until((site / "ready").exists, 30)
            for number in signals:
                job.send_signal(number)
                until((site / "told").exists, 30)
            (site / "hold").unlink()
            said = job.communicate(timeout=60)[1]
        finally:
            job.kill()
    log = site / "scontrol.log"
    return (log.read_text().split() if log.exists() else []), said


USR1, TERM = signal.SIGUSR1, signal.SIGTERM
IN_ARRAY = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1"}  # the last task of an array has the array's id


@pytest.mark.parametrize("name", CASES)
def test_a_stop_requeues_the_task_and_not_its_array_and_scancel_is_final(site, name):
    alone = IN_ARRAY if name == "sweep" else {}
    assert stop(site, name, USR1, **IN_ARRAY)[0] == ["requeue", "70_1"]
    if name != "sweep":
        assert stop(site, name, USR1)[0] == ["requeue", "70"]
    assert stop(site, name, USR1, TERM, **alone)[0] == []


@pytest.mark.parametrize(
    ("name", "words"), [("sweep", "3 grid.yaml --task 1"), ("apptainer", "3 a.yaml"), ("written", "3 a.yaml")]
)
def test_a_job_is_not_requeued_where_requeues_bring_no_checkpoint(site, name, words):
    (site / "never").touch()
    assert stop(site, name, USR1, **IN_ARRAY)[0] == []
    assert (site / "asked").read_text() == f"-m fedmpi.requeues {words}\n"


def test_train_sbatch_counts_its_requeues(site):
    calls = [stop(site, "train", USR1) for _ in range(5)]
    assert [words for words, _ in calls] == [["requeue", "70"]] * 4 + [[]]
    assert "requeues brought no new checkpoint" in calls[-1][1]


@pytest.mark.parametrize(
    ("words", "root"), [(["a.yaml", "out=b"], "b"), (["grid.yaml", "--task", "2"], "grid/as_given/other/0")]
)
def test_requeues_are_counted_until_there_is_a_newer_checkpoint(site, monkeypatch, capsys, words, root):
    monkeypatch.chdir(site)
    monkeypatch.setenv("SLURM_JOB_ID", "70")
    assert [requeues.main(["1", *words]) for _ in range(4)] == [0, 0, 1, 1]
    assert "the last 1 requeues brought no new checkpoint" in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "sealed_rounds", lambda root: [2, 4])
    assert [requeues.main(["1", *words]) for _ in range(3)] == [0, 0, 1]
    assert (site / root / "requeues").read_text() == "1 70 4\n"


def test_a_finished_chain_cancels_its_own_jobs_only(site):
    (site / "venv/bin/fedmpi").write_text("#!/bin/sh\ntouch ready\n[ $1 != inspect ]\n")
    (site / "venv/bin/scancel").write_text('#!/bin/sh\necho "$@" >>cancelled\n')
    (site / "venv/bin/scancel").chmod(0o755)
    stop(site, "train", FEDMPI_CHAIN="fedmpi-1a2b", SLURM_JOB_NAME="fedmpi")
    assert "--name=fedmpi-1a2b" in (site / "cancelled").read_text().split()
