"""The batch scripts with stand-ins for SLURM and the ranks: which stops requeue which job. No MPI."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from support.slurm import until

from fedmpi import requeues
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
echo "$@" >>asked
case "$3" in
  where)
    [ ! -e refused ] || exit 2
    [ ! -e early ] || { touch ready; while [ -e hold ]; do sleep 0.02; done; }
    echo "a run" ;;
  may)
    [ ! -e never ] || exit 1
    [ ! -e late ] || { touch asks; while [ -e late ]; do sleep 0.02; done; }
    ;;
esac
"""
EXEC = '#!/bin/bash\nwhile [[ $1 = -* ]]; do [ "$1" != --pwd ] || shift 3; shift; done; exec "$@"\n'
CASES = {
    "train": ("slurm/train.sbatch", ["a.yaml"]),
    "sweep": ("slurm/sweep.sbatch", ["--job", "task", "venv", "grid.yaml"]),
    "apptainer": ("slurm/apptainer.sbatch", ["image", "a.yaml"]),
    "written": ("job.sh", []),
}
FEDERATION = {"federation": ("slurm/federation.sh", ["--job", "venv", "a run", "silo", "a.yaml", "--id", "x"])}


@pytest.fixture
def site(tmp_path):
    """A folder with a virtual environment of stand-ins; `srun` and `apptainer` start their command here."""
    programs = {
        "fedmpi": FEDMPI,
        "python": PYTHON,
        "scontrol": '#!/bin/sh\necho "$@" >> scontrol.log\n[ ! -e forbidden ]\n',
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


def environment(site, **slurm):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    path = f"{site}/venv/bin:{clean['PATH']}"
    env = {**clean, "PATH": path, "SLURM_JOB_ID": "70", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
    return env | {"FEDMPI_VENV": f"{site}/venv", "FEDMPI_LAUNCHER": "env", "PYTHONPATH": str(TOP / "src"), **slurm}


def stop(site, name, *signals, exit_code=None, early=False, then=None, **slurm):
    """The words that scontrol got after the script's ranks have started and the signals were sent; with `early`, before
    ranks start. `then` is called with the script once the ranks may end."""
    file, words = {**CASES, **FEDERATION}[name]
    for each in ("ready", "told", "scontrol.log"):
        (site / each).unlink(missing_ok=True)
    (site / "hold").touch()
    script = TOP / file if (TOP / file).exists() else site / file
    env = environment(site, **slurm)
    command = ["bash", script, *words]
    with subprocess.Popen(command, cwd=site, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True) as job:
        try:
            until((site / "ready").exists, 30)
            for number in signals:
                job.send_signal(number)
                if not early:
                    until((site / "told").exists, 30)
            (site / "hold").unlink()
            if then is not None:
                then(job)
            said = job.communicate(timeout=60)[1]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)  # the stand-ins too
    assert exit_code in (None, job.returncode), said
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


WHERE = {"train": "a.yaml", "sweep": "grid.yaml --task 1", "apptainer": "a.yaml", "written": "a.yaml"}


@pytest.mark.parametrize("name", CASES)
def test_a_job_is_not_requeued_where_requeues_bring_no_checkpoint(site, name):
    (site / "never").touch()
    assert stop(site, name, USR1, **IN_ARRAY)[0] == []
    where, may = (site / "asked").read_text().splitlines()  # the first before the ranks start
    assert where == f"-m fedmpi.requeues where {WHERE[name]}" and may == "-m fedmpi.requeues may 3 a run"


@pytest.mark.parametrize("name", CASES)
def test_a_signal_before_ranks_start_requeues_too(site, name):
    (site / "early").touch()
    assert stop(site, name, USR1, early=True, **IN_ARRAY)[0] == ["requeue", "70_1"]
    assert stop(site, name, TERM, early=True, **IN_ARRAY)[0] == []


@pytest.mark.parametrize("name", ("train", "written"))
def test_a_stop_before_the_first_checkpoint_requeues_too(site, name):
    (site / "venv/bin/fedmpi").write_text(FEDMPI.replace("exit 3", "exit 1"))
    assert stop(site, name, USR1)[0] == ["requeue", "70"]
    (site / "a run/checkpoints/round-000002").mkdir(parents=True)
    (site / "a run/checkpoints/round-000002/manifest.json").touch()
    assert stop(site, name, USR1, exit_code=1)[0] == []  # a failure


@pytest.mark.parametrize("name", CASES)
def test_where_requeueing_is_forbidden_the_job_ends_as_stopped(site, name):
    (site / "forbidden").touch()
    words, said = stop(site, name, USR1, exit_code=3, **IN_ARRAY)
    assert words == ["requeue", "70_1"] and ("again" in said or "resumes" in said)


@pytest.mark.parametrize("name", {**CASES, **FEDERATION})
def test_scancel_while_the_script_asks_is_final(site, name):
    (site / "late").touch()

    def scancel(job):
        until((site / "asks").exists, 30)
        job.send_signal(TERM)
        (site / "late").unlink()

    assert stop(site, name, USR1, then=scancel, SLURM_JOB_NAME="x", **IN_ARRAY)[0] == []


def test_a_stop_that_the_script_has_no_signal_of_is_told(site):
    """As with sbatch --signal=USR1 without B:, or by `fedmpi stop`."""
    (site / "venv/bin/fedmpi").write_text("#!/bin/sh\ntouch ready; while [ -e hold ]; do sleep 0.02; done; exit 3\n")
    words, said = stop(site, "train", exit_code=3)
    assert words == [] and "so not requeued: `fedmpi stop`, or sbatch --signal without B:" in said


@pytest.mark.parametrize("name", CASES)
def test_a_refused_configuration_starts_no_ranks(site, name):
    (site / "refused").touch()
    script = TOP / CASES[name][0] if (TOP / CASES[name][0]).exists() else site / CASES[name][0]
    env = environment(site, **IN_ARRAY)
    done = subprocess.run(["bash", script, *CASES[name][1]], cwd=site, env=env, capture_output=True, timeout=30)
    assert done.returncode == 2 and not (site / "ready").exists()


@pytest.mark.parametrize(
    ("words", "root"), [(["a.yaml", "out=b"], "b"), (["grid.yaml", "--task", "2"], "grid/as_given/other/0")]
)
def test_the_run_directory_is_that_of_the_scripts_words(site, monkeypatch, capsys, words, root):
    monkeypatch.chdir(site)
    assert requeues.main(["where", *words]) == 0 and capsys.readouterr().out == f"{root}\n"
    assert requeues.main(["where", words[0], "rounds=none"]) == 2 and "fedmpi: " in capsys.readouterr().err


def test_requeues_are_counted_until_there_is_a_newer_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "70")
    root = tmp_path / "a run"
    assert [requeues.main(["may", "1", str(root)]) for _ in range(4)] == [0, 0, 1, 1]
    assert "the last 1 requeues brought no new checkpoint" in capsys.readouterr().err
    for number in (2, 4):
        (root / f"checkpoints/round-00000{number}").mkdir(parents=True)
        (root / f"checkpoints/round-00000{number}/manifest.json").touch()
    assert [requeues.main(["may", "1", str(root)]) for _ in range(3)] == [0, 0, 1]
    assert (root / "requeues").read_text() == "1 70 round-000004\n"
    assert requeues.main(["may", "1", str(root), "requeues-silo"]) == 0  # of another job of the same run


def test_whether_a_job_may_requeue_is_answered_without_heavy_imports(tmp_path):
    code = "import sys; from fedmpi import requeues; requeues.main(['may', '1', sys.argv[1]]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"torch", "numpy", "pydantic", "yaml"} & {*done.stdout.split()}


def test_a_job_of_a_federation_is_requeued_unless_the_server_makes_no_progress(site):
    about = {"SLURM_JOB_NAME": "fedmpi-1a2b-x"}
    assert stop(site, "federation", USR1, **about)[0] == ["requeue", "70"]
    assert (site / "asked").read_text() == "-m fedmpi.requeues may 10 a run requeues-fedmpi-1a2b-x\n"
    (site / "never").touch()
    assert stop(site, "federation", USR1, exit_code=3, **about)[0] == []


def test_a_finished_chain_cancels_its_own_jobs_only(site):
    (site / "venv/bin/fedmpi").write_text("#!/bin/sh\ntouch ready\n[ $1 != inspect ]\n")
    (site / "venv/bin/scancel").write_text('#!/bin/sh\necho "$@" >>cancelled\n')
    (site / "venv/bin/scancel").chmod(0o755)
    stop(site, "train", FEDMPI_CHAIN="fedmpi-1a2b", SLURM_JOB_NAME="fedmpi")
    assert "--name=fedmpi-1a2b" in (site / "cancelled").read_text().split()
