"""The command that runs a program again on a fresh rank."""

import os
import subprocess
import sys

PRINTS = "from fedmpi.fresh import is_fresh, same_program\nprint(same_program(), is_fresh())\n"


def told(*command, cwd):
    path = os.pathsep.join(filter(None, [str(cwd), os.environ.get("PYTHONPATH", "")]))
    return subprocess.check_output(command, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, text=True).strip()


def test_a_script_and_a_module_run_again_with_their_arguments(tmp_path):
    (tmp_path / "mine.py").write_text(PRINTS)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(PRINTS)
    again = [sys.executable, "-m", "fedmpi.fresh"]
    script = [*again, "script", str(tmp_path / "mine.py"), "a", "b=1"]
    assert told(sys.executable, "mine.py", "a", "b=1", cwd=tmp_path) == f"{script} False"
    assert told(sys.executable, "-m", "package", "a", cwd=tmp_path) == f"{[*again, 'module', 'package', 'a']} False"


def test_code_without_a_file_cannot_run_again(tmp_path):
    assert told(sys.executable, "-c", PRINTS, cwd=tmp_path) == "None False"
