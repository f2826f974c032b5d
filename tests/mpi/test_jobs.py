"""Every script of jobs/ runs in its quick form, on ranks if it starts any."""

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.mpi import ENVIRONMENT, FEDMPI, PYTHON, absent, launcher, mpirun

TOP = Path(__file__).parents[2]
# Scripts without a quick form: the others source setup.sh; test.sh would start these tests again. tests/test_jobs.py
# covers them; tests/docs covers docs.sh; multihost.sh and wheelhouse.sh have tests of their own beside this one.
APART = {"setup.sh", "test.sh", "quickstart.sh", "reproduce_heart.sh", "docs.sh", "multihost.sh", "wheelhouse.sh"}

# What setup.sh writes once all is installed.
STAMP = """
printf '%s\\n' "$PWD/.venv" | cat - setup.cfg jobs/constraints.txt | cksum >.venv/fedmpi-installed
extras=$(sed -n '/extras_require/,$ s/^\\([a-z]*\\) =$/\\1/p' setup.cfg | sort | paste -sd,)
echo "with $extras" >>.venv/fedmpi-installed
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout whose .venv is the environment of these tests, so that jobs find everything installed."""
    top = tmp_path_factory.mktemp("checkout")
    for folder in ("jobs", "configs", "src"):
        shutil.copytree(TOP / folder, top / folder)  # with numba's compiled kernels
    shutil.copy(TOP / "setup.cfg", top)
    (top / ".venv/bin").mkdir(parents=True)
    launch = " ".join(launcher()) or "mpirun"
    for name, command in (("python", PYTHON), ("fedmpi", FEDMPI), ("mpirun", launch)):
        (top / ".venv/bin" / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (top / ".venv/bin" / name).chmod(0o755)
    (top / "stamp.sh").write_text(STAMP)
    subprocess.run(["bash", "stamp.sh"], cwd=top, check=True, timeout=20)
    return top


def quick(checkout: Path, name: str, *arguments: str) -> str:
    """Standard output of the script with --quick."""
    inside = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMIX_", "PRTE_"))}
    path = os.pathsep.join(filter(None, [str(checkout / "src"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        ["bash", name, "--quick", *arguments],
        cwd=checkout,
        env={**inside, **ENVIRONMENT, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "pip" not in done.stderr, done.stderr
    return done.stdout


def experiment(name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A script of jobs/experiments in its quick form, which starts mpirun itself."""
    environment = {**os.environ, **ENVIRONMENT, "PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}"}
    words = [PYTHON, str(TOP / "jobs/experiments" / name), *arguments, "--quick"]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280)


def test_private_heart_beside_the_published_figures(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMPI_DATA", str(root))
    done = experiment("private_heart.py")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["spent"] <= told["epsilon"] == 1.0 and 0 <= told["accuracy"] <= 1


def test_private_mnist_in_its_quick_form(tmp_path: Path) -> None:
    done = experiment("private_mnist.py", "--out", str(tmp_path), "--svg", str(tmp_path / "figure.svg"))
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["epsilon"] > 0
    assert f">{math.ceil(100 * row['epsilon']) / 100:.2f}<" in (tmp_path / "figure.svg").read_text()


def test_work_by_measured_delays_is_compared_with_whole_work() -> None:
    done = experiment("by_delay.py")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["engine"] for row in rows] == ["synchronous"] * 5 + ["buffered"] * 5
    assert rows[5]["stale"] > 0 == rows[0]["stale"] and all(0 <= row["end"] <= 1 for row in rows)


def test_gradients_of_single_samples_are_timed_beside_plain_ones() -> None:
    done = subprocess.run(
        [PYTHON, str(TOP / "jobs/bench/per_sample.py"), "--quick"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    ways = [json.loads(line)["way"] for line in done.stdout.splitlines()]
    assert ways[:3] == ["sgd", "fast", "torch.func"]


def test_a_streamed_silo_is_timed_beside_one_in_memory() -> None:
    done = subprocess.run(
        [PYTHON, str(TOP / "jobs/bench/streaming.py"), "--quick"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same_sha256"] and found["speed"] > 0 and found["samples"] == 682
    assert all(mib > 50 for mib in found["peak_mib"].values())


def test_masks_are_timed_beside_their_key_streams() -> None:
    done = subprocess.run(
        [PYTHON, str(TOP / "jobs/bench/masks.py"), "--words", "100000", "--quick"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"100000 words of (?:32|64) bits: stream [\d.]+ ms, mask [\d.]+ ms", done.stdout)) == 2


def test_rounds_under_masks_are_timed_beside_plain_ones() -> None:
    done = mpirun(2, PYTHON, str(TOP / "jobs/bench/secure.py"), "--quick", timeout_s=120)
    assert done.rc == 0, done.tails
    assert len(re.findall(r"10000 parameters, 2 ranks: plain [\d.]+ s, masked [\d.]+ s", done.out)) == 3


def test_every_script_has_a_test_of_its_quick_form() -> None:
    tests = (Path(__file__), *(TOP / "tests" / f"test_{name}.py" for name in ("jobs", "experiments")))
    text = "".join(path.read_text() for path in tests)
    for path in sorted((TOP / "jobs").rglob("*.sh")):
        name = str(path.relative_to(TOP))
        assert path.name in APART or f'"{name}"' in text or f'"{name} --quick' in text, f"{name} is run by no test"
    for path in (TOP / "jobs").rglob("*.py"):
        code = path.read_text()
        assert (
            "--quick" in code
            or "__main__" not in code
            or path.name in ("first_batch.py", "goodput_torchft.py", "reference.py")
        ), f"{path} has no --quick"


def test_three_deaths_are_drawn(tmp_path: Path) -> None:
    script, picture = TOP / "jobs/experiments/three_deaths.py", tmp_path / "picture.svg"
    options = ("--quick", "--out", str(tmp_path / "run"), "--to", str(picture))
    done = subprocess.run([PYTHON, str(script), *options], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "healed in" in picture.read_text()


def test_every_way_to_treat_late_silos_is_shown() -> None:
    done = mpirun(2, PYTHON, str(TOP / "jobs/experiments/late_silos.py"), "--quick")
    assert done.rc == 0, done.tails
    rows = next(json.loads(line) for line in done.out.splitlines() if line.startswith("{"))
    assert set(rows) == {"even", "all", "partial", "drop", "buffer"}


def test_startup_says_how_long_the_first_batch_takes(checkout: Path) -> None:
    figures = json.loads(quick(checkout, "jobs/bench/startup.sh"))
    assert figures["repeats"] == 1 and figures["first_batch_s"] > 0 < figures["imports_s"]
    assert figures["ratio"] == pytest.approx(figures["first_batch_s"] / figures["imports_s"], rel=0.05)


def test_memory_is_told_by_number_of_silos(checkout: Path) -> None:
    said = quick(checkout, "jobs/bench/memory.sh")
    rows = re.findall(r"^(\d+) silos: rank 0 ([\d.]+) MiB, rank 1 ([\d.]+) MiB$", said, re.MULTILINE)
    assert [row[0] for row in rows] == ["4", "8"] and all(float(b) > 50 for row in rows for b in row[1:]), said


def test_a_killed_run_resumes_to_the_same_bits(checkout: Path) -> None:
    said = quick(checkout, "jobs/experiments/kill_resume.sh")
    shas = dict(re.findall(r"^(undisturbed|killed) +([0-9a-f]{64})", said, re.MULTILINE))
    assert "kill 1 after round" in said and shas["undisturbed"] == shas["killed"]


def test_a_drill_kills_a_rank_and_tells_what_was_lost(checkout: Path) -> None:
    said = quick(checkout, "jobs/drill.sh", "kill-silo", "--limit-s", "150")
    assert said.splitlines()[-1].startswith("PASS kill-silo, "), said
    assert re.search(r"SIGKILL to rank 2, after round 3\n.* lost \[2\], healed in .*silo-\d to rank [0-2]", said), said
    assert re.search(r"lost +0 rounds, 0 of \d+ batches\n +next round +\d+\.\d+ s after the fault", said), said
    assert re.search(r"ok +SHA-256 [0-9a-f]{12} is the undisturbed run's", said), said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("kill-loop", "--hosts", "2", "--spare", "2"), r"deaths +[12]: [12] healed in the job[^$]*on h[12]"),
        (("cut-loop",), r"tries +2, [^$]*history +0 tries with two lines"),
    ],
    ids=["kill", "cut"],
)
def test_a_campaign_on_two_hosts(tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    done = experiment("drill.py", *words, "--out", str(tmp_path))
    if done.returncode == 77:
        absent("netns", done.stdout)
    assert done.returncode == 0 and re.search(told, done.stdout) and f"PASS {words[0]}" in done.stdout, done.stdout


def test_a_soak_reads_all_processes(tmp_path: Path) -> None:
    done = experiment("drill.py", "soak", "--out", str(tmp_path))
    assert done.returncode == 0 and "PASS soak" in done.stdout, done.stdout
    for name in ("rank", "launcher", "supervisor"):
        assert re.search(rf"descriptors +{name} +\d+ to \d+ over \d+ rounds", done.stdout), done.stdout


def test_goodput_is_told_beside_the_undisturbed_run(tmp_path: Path) -> None:
    done = experiment("goodput.py", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])["restart"]
    assert row["deaths"] == 0 and row["undisturbed"] > 500 and 0.5 < row["goodput"] < 2


def test_two_commits_are_compared_in_turns(checkout: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    (checkout / ".gitignore").write_text("__pycache__\n.venv\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (
        ["init", "-q"],
        ["add", "."],
        [*who, "commit", "-qm", "one"],
        [*who, "commit", "-qm", "two", "--allow-empty"],
    ):
        subprocess.run(["git", *command], cwd=checkout, check=True, timeout=60)
    said = quick(checkout, "jobs/bench/compare_commits.sh", "--ranks", "1", "--json", "found.json", "HEAD~1")
    found = json.loads((checkout / "found.json").read_text())
    rows = {row["what"]: row for row in found["rows"]}
    assert {"exchange root identity", "exchange sharded identity", "federation: a round"} <= rows.keys()
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["b_s"] / row["a_s"]) and row["least"] == row["most"] == row["ratio"]
    assert said.splitlines()[0].split()[1:3] == [found["a"], found["b"]] and found["a"] != found["b"]
    left = subprocess.run(["git", "worktree", "list"], cwd=checkout, capture_output=True, text=True, timeout=60).stdout
    assert len(left.splitlines()) == 1


def test_starts_without_what_a_program_counts_on_come_to_an_end(checkout: Path) -> None:
    """A tiny /dev/shm, little memory, a closed stdout, no HOME, a full disk: one start each."""
    path = os.pathsep.join([str(checkout / ".venv/bin"), os.environ["PATH"]])
    source = os.pathsep.join(filter(None, [str(checkout / "src"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [PYTHON, "jobs/experiments/drill_starts.py", "--quick"],
        cwd=checkout,
        env={**os.environ, **ENVIRONMENT, "PATH": path, "PYTHONPATH": source},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row[0]: row[1:] for row in map(str.split, done.stdout.splitlines()[1:])}
    assert list(rows) == ["shm", "memory", "stdout", "home", "disk"]
    for condition in ("stdout", "home"):
        assert rows[condition] == ["1", "0", "0", "0", "0"], done.stdout


def test_private_fashion_in_its_quick_form(tmp_path: Path) -> None:
    done = experiment("private_fashion.py", "--svg", str(tmp_path / "figure.svg"))
    assert done.returncode == 0, done.stderr
    kinds = [json.loads(line)["kind"] for line in done.stdout.splitlines()]
    assert kinds == ["none", "gaussian", "adaptive", "correlated"]
    assert (tmp_path / "figure.svg").read_text().count("<path") > 10
