"""The order of modules, and what a login node must never import."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fedmpi
from fedmpi.cli import app

ROOT = Path(fedmpi.__file__).parent
ORDER = [
    *("errors", "loading", "output", "disk", "sealed", "fencing", "rng", "layout", "types", "state", "trust"),
    *("sources", "components", "outcome", "requests", "stopping", "worker"),
    *("launcher", "starters", "fresh", "module", "kernels"),
    *(
        "codecs",
        "selection",
        "schedules",
        "aggregate",
        "server",
        "transforms",
        "flat",
        "comm",
        "watchdog",
        "targets",
        "metrics",
        "losses",
        "objectives",
    ),
    *("models", "data", "pretrained"),
    *(
        "membership",
        "local",
        "attacks",
        "tensorfile",
        "checkpoint",
        "records",
        "placement",
        "binding",
        "device",
        "health",
        "roster",
        "asking",
        "files",
    ),
    *("secure", "evaluate", "exchange", "privacy", "rounds", "transports", "fork"),
    *("yamlfile", "config", "differences", "alike", "directory", "opening", "trial"),
    "assembly",
    *("moving", "keeper", "rebuild", "changes", "mirror", "heal", "parts", "members", "recovery", "train", "jobs"),
    *("reveals", "plan", "batch", "check", "doctor", "audit", "graphs", "results", "predictions", "compare"),
    "requeues",
    *("launchline", "remains", "supervisor", "report", "watch"),
    *("catalogue", "bench", "cli", "__init__", "__main__"),
]
MODULES = {path: path.relative_to(ROOT).parts[0].removesuffix(".py") for path in sorted(ROOT.rglob("*.py"))}


def imported(path):
    """Full names of all imports in a module, except those for type checking."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: say the whole name"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def test_every_module_has_its_place_in_the_order():
    assert set(MODULES.values()) <= set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_imports_only_what_stands_before_it(path):
    room = MODULES[path]
    before = ORDER[: ORDER.index(room)]
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("fedmpi.")}
    rooms = {fedmpi._HOMES.get(name, name) for name in rooms}  # `from fedmpi import Run` is of `train`
    assert rooms - {room} <= set(before)


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("mpi4py", {"comm/mpi.py", "fresh.py"}),
        ("h5py", {"tensorfile.py", "data/formats.py"}),
        ("cryptography", {"secure/masks.py"}),
    ],
)
def test_a_package_has_one_door(package, allowed):
    users = {
        path.relative_to(ROOT).as_posix() for path in MODULES if any(n.startswith(package) for n in imported(path))
    }
    assert users == allowed


def loaded_after(code, *names):
    """Which of the modules a fresh interpreter has imported after the code."""
    code += f"\nimport sys; print(sorted({set(names)!r} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stderr.splitlines()[-1])


def test_importing_the_package_or_the_command_loads_nothing_heavy():
    heavy = ("torch", "mpi4py", "h5py", "numpy", "pydantic")
    assert loaded_after("import fedmpi", *heavy) == []
    assert loaded_after("import fedmpi.cli, fedmpi.stopping, fedmpi.roster", *heavy) == []


@pytest.mark.parametrize("ending", ["__main__", "cli"])
def test_a_command_looks_for_no_garbage_among_modules(ending):
    """Neither while they load nor when Python ends: half of the time that a command takes to start."""
    code = """
import atexit, gc, sys
found = []
gc.callbacks.append(lambda phase, info: found.append(sys.modules.get("torch") is not None))
atexit.register(lambda: print([sum(found), gc.get_freeze_count() > 100_000]))
sys.argv = ["fedmpi", "list", "selectors"]
"""
    code += "from fedmpi.__main__ import main; main()" if ending == "__main__" else "from fedmpi.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    collections, frozen = ast.literal_eval(done.stdout.splitlines()[-1])
    assert collections < 300  # otherwise 900
    assert frozen == (ending == "__main__")


@pytest.mark.slow
def test_a_login_node_never_starts_mpi(tmp_path):
    code = """
import fedmpi
from fedmpi.cli import app
from fedmpi.comm import SoloComm
open("c.yaml", "w").write("rounds: 1")
for args in (["list"], ["list", "servers"], ["plan", "c.yaml", "--ranks", "4"], ["plan", "c.yaml", "--json"]):
    app(args, standalone_mode=False)
app(["check", "c.yaml"], standalone_mode=False)
with fedmpi.Run("c.yaml", comm=SoloComm()) as run:
    list(run)
for args in (["inspect", "runs/c"], ["silos", "runs/c", "--json"], ["stop", "runs/c"], ["eval", "runs/c"]):
    app(args, standalone_mode=False)
app(["export", "runs/c", "--to", "m.safetensors"], standalone_mode=False)
app(["report", "runs/c"], standalone_mode=False)
app(["watch", "runs/c", "--once"], standalone_mode=False)
"""
    assert loaded_after(f"import os; os.chdir({str(tmp_path)!r})" + code, "mpi4py", "mpi4py.MPI", "sklearn") == []


def test_the_command_says_its_version(capsys):
    app(["--version"], standalone_mode=False)
    assert capsys.readouterr().out == f"fedmpi {version('fedmpi')}\n"
