"""The code that a run was trained with: found, stored, and compared when the run resumes."""

import sys
from pathlib import Path

import pytest
from support.mpi import TESTS
from support.runs import config, refused, run

from fedmpi import results, sources
from fedmpi.errors import ConfigError
from fedmpi.flat import sha256

FILES = {
    "mine_net.py": "from torch import nn\nfrom mine_pkg.parts import WIDTH\ndef net(): return nn.Linear(WIDTH, 2)\n",
    "mine_loss.py": "def loss(out, y):\n    from mine_scale import SCALE\n    return SCALE * out.square().mean()\n",
    "mine_scale.py": "SCALE = 1.0\n",
    "mine_other.py": "nobody imports it\n",
    "mine_pkg/__init__.py": "",
    "mine_pkg/parts.py": "from .deep import *\nfrom . import more\nWIDTH = 4\n",
    "mine_pkg/more.py": "from mine_pkg import deep\n",
    "mine_pkg/deep.py": "import os\n",
    "mine_pkg/unused.py": "",
}
OWN_CODE = {"model": "mine_net:net", "objective": {"loss": "mine_loss:loss"}}


@pytest.fixture
def code(tmp_path, monkeypatch):
    """User modules in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    yield tmp_path
    forget()


def forget():
    for name in [name for name in sys.modules if name.startswith("mine_")]:
        del sys.modules[name]


def test_what_is_imported_from_the_same_folder_and_package_is_found_and_kept(code):
    run(config("out", 1, **OWN_CODE))
    kept = {p.relative_to("out/code").as_posix(): p.read_text() for p in Path("out/code").rglob("*.py")}
    reached = {n: t for n, t in FILES.items() if n not in ("mine_other.py", "mine_pkg/unused.py")}
    own = {f"support/{name}": (TESTS / "support" / name).read_text() for name in ("__init__.py", "runs.py")}
    assert kept == {**reached, **own}


@pytest.mark.parametrize("name", ["mine_net.py", "mine_loss.py", "mine_scale.py", "mine_pkg/deep.py"])
def test_code_that_has_changed_is_named_and_refused_or_warned_of(code, caplog, name):
    end = sha256(run(config("whole", 4, **OWN_CODE))[1].parameters)
    run(config("out", 4, **OWN_CODE), 2)
    before = Path(name).read_text()
    Path(name).write_text(before + "# other\n")
    forget()
    said = refused(config("out", 4, **OWN_CODE))
    assert f"kept in out/code: {name}; put it back, set resume.code=warn, or choose another out=" in said
    with pytest.raises(ConfigError, match="code has changed"):
        run(config("out", 4, **OWN_CODE))
    assert "code has changed" not in caplog.text
    results.evaluate(Path("out"), allow=["support"])
    assert (
        name not in ("mine_net.py", "mine_pkg/deep.py")
        or f"code has changed since out was trained with it (see out/code): {name}" in caplog.text
    )
    Path(name).write_text(before)
    forget()
    assert run(config("out", 3, **OWN_CODE))[1].resumed == 2  # unchanged
    Path(name).write_text(before + "# other\n")
    forget()
    how = config("out", 4, resume={"code": "warn"}, **OWN_CODE)
    assert sha256(run(how)[1].parameters) == end
    assert f"kept in out/code: {name}" in caplog.text
    assert Path("out/code", name).read_text() == before + "# other\n"
    assert Path("out/code-to-round-000003", name).read_text() == before
    assert run(config("out", 5, **OWN_CODE))[1].resumed == 4  # compared with the code of the last start


def test_changes_are_named_by_what_became_of_the_file():
    there, here = {"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "1"}
    assert sources.changes(there, here) == ["b", "c (gone)", "d (new)"]
    assert sources.own_code({"data": "digits", "x": ["os:path", "fedmpi.rng:key", "no:thing", 3]}).keys() == {"os.py"}
