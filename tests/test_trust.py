"""What code of a run directory a reader of it may execute."""

import sys
from pathlib import Path

import pytest
import yaml
from support.runs import run
from typer.testing import CliRunner

import fedmpi
from fedmpi import directory, results
from fedmpi.cli import app
from fedmpi.comm import SoloComm
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.errors import ConfigError

SOURCE = """
import os, subprocess, shutil
from os import system
from pathlib import Path
import torch
from torch import nn
from shutil import copyfile

class Net(nn.Linear):
    def __init__(self, width=0):
        super().__init__(4, 2)

def plain(width=0):
    layers = [nn.Flatten(), nn.Linear(4, 2)]
    return nn.Sequential(*layers)

def chosen(width=0):
    net = Net(width)
    return plain(width) if width else net

def said(width=0) -> nn.Module:
    return {"net": Net}["net"](width)

def unsaid(path="reached", width=0):
    Path(path).write_text("reached")
    return {"net": Net}["net"](width)

def writes(path="reached"):
    Path(path).write_text("reached")
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A run directory below the current folder, and modules here, elsewhere on the path, and inside it."""
    trap = "import pathlib; pathlib.Path('reached').write_text('imported')\n" + SOURCE
    for name, text in (("work/mine_here", SOURCE), ("away/mine_trap", trap), ("work/outs/a/mine_inside", trap)):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(str(tmp_path / "away"))
    monkeypatch.syspath_prepend(".")
    run(build(Config, {"rounds": 1, "out": "outs/a", "data": "support.runs:Blobs"}))
    yield tmp_path / "work"
    for name in [name for name in sys.modules if name.startswith(("mine_", "outs"))]:
        del sys.modules[name]


PLAIN = {"data": {"name": "digits"}, "model": {"name": "logistic"}}


def rewrite(changes):
    """A config.yaml from somebody else, with a valid checksum."""
    about = directory.read_config(Path("outs/a")).about
    directory.write_config(Path("outs/a"), {**PLAIN, **changes}, about)


COMMANDS = {
    "eval": ["eval", "outs/a"],
    "export": ["export", "outs/a", "--to", "out.pt"],
    "plan": ["plan", "outs/a/config.yaml"],
    "train": ["train", "outs/a", "out=outs/b"],
}
REFUSED = {
    "os:system": {"command": "touch reached"},
    "subprocess:run": {"args": ["touch", "reached"]},
    "shutil:copyfile": {"src": "mine_here.py", "dst": "reached"},
    "torch.nn:Linear": {"in_features": 4, "out_features": 2},
    "fedmpi.disk:replace_text": {"path": "reached", "text": "reached"},
    "mine_here:os.system": {"command": "touch reached"},
    "mine_here:system": {"command": "touch reached"},
    "mine_here:copyfile": {"src": "mine_here.py", "dst": "reached"},
    "mine_here:subprocess.run": {"args": ["touch", "reached"]},
    "mine_here:writes": {"path": "reached"},
    "mine_here:unsaid": {"path": "reached"},
    "mine_here:Path": {},
    "mine_trap:Net": {},
    "outs.a.mine_inside:Net": {},
}


def said(command, *more):
    done = CliRunner().invoke(app, [*COMMANDS[command], *more])
    return done.exit_code, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_code_from_elsewhere_is_refused_in_one_line_before_it_runs(home, command):
    for name, arguments in list(REFUSED.items())[:: 1 if command == "plan" else 5]:
        rewrite({"model": {"name": name, **arguments}})
        code, line = said(command)
        assert (code, line.count("\n")) == (2, 1) and f"the run directory names '{name}'" in line, (name, line)
        assert not Path("reached").exists(), name
    for family, name in (("data", "mine_trap:Net"), ("local", "os:system"), ("select", "mine_trap:Net")):
        rewrite({family: {"name": name}})
        code, line = said(command)
        assert (code, line.count("\n")) == (2, 1) and f"{family}: the run directory names" in line
    rewrite({"objective": {"loss": "os:system"}})
    code, line = said(command)
    assert (code, line.count("\n")) == (2, 1) and "the run directory names 'os:system'" in line
    rewrite({"objective": {"loss": {"name": "mine_here:writes", "path": "reached"}}})
    code, line = said(command)
    assert (code, line.count("\n")) == (2, 1) and "the run directory names the loss 'mine_here:writes'" in line
    assert not Path("reached").exists()


@pytest.mark.parametrize("name", ["mine_here:Net", "mine_here:plain", "mine_here:chosen", "mine_here:said"])
def test_models_below_the_current_folder_are_built(home, name):
    rewrite({"model": {"name": name, "width": 0}})
    assert said("plan") == (0, "")


@pytest.mark.parametrize(
    ("name", "module"),
    [("mine_here:unsaid", "mine_here"), ("torch.nn:Linear", "torch"), ("mine_trap:Net", "mine_trap")],
)
def test_modules_that_the_user_allows_are_imported(home, name, module):
    rewrite({"model": {"name": name, **(REFUSED[name] if "torch" in name else {})}})
    assert said("plan")[0] == 2
    assert said("plan", "--allow", "nothing", "--allow", module) == (0, "")


def test_a_configuration_in_a_run_directory_is_a_run_directorys_with_or_without_what_runs_add(home):
    Path("outs/a/config.yaml").write_text(yaml.safe_dump({"model": {"name": "os:system", "command": "touch reached"}}))
    assert said("plan")[0] == said("train")[0] == 2 and not Path("reached").exists()
    with pytest.raises(ConfigError, match="the run directory names"):
        fedmpi.Run("outs/a/config.yaml", "out=outs/b", comm=SoloComm())


def test_the_users_own_configuration_may_name_anything(home):
    Path("own.yaml").write_text(
        yaml.safe_dump(
            {"data": "support.runs:Blobs", "model": {"name": "torch.nn:Linear", **REFUSED["torch.nn:Linear"]}}
        )
    )
    assert CliRunner().invoke(app, ["plan", "own.yaml"]).exit_code == 0
    with fedmpi.Run("own.yaml", "rounds=1", "out=outs/c", comm=SoloComm()) as run:
        assert len(list(run)) == 1
    with pytest.raises(ConfigError, match="--allow"):
        results.evaluate(Path("outs/c"))
    assert results.evaluate(Path("outs/c"), allow=["torch", "support"])["round"] == 1
