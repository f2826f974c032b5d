"""Every example does what its header says: the header lists the commands and the figures that they reach."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.mpi import PYTHON, absent, mpirun

EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_LINES = 10  # of a header
LIMIT_S = 200  # per command, on a busy machine; alone, all commands of an example take under 20 s


@dataclass(frozen=True)
class Example:
    """The content of an example's header."""

    file: Path
    lines: list[str]

    @classmethod
    def read(cls, file):
        """The first comment of a YAML file, or the docstring of a program."""
        text = file.read_text()
        if file.suffix == ".py":
            return cls(file, text.split('"""')[1].strip().splitlines())
        return cls(file, [line.removeprefix("# ") for line in re.match(r"(#.*\n)*", text)[0].splitlines()])

    @property
    def commands(self):
        return [shlex.split(line) for line in self.lines if line.startswith("    ")]

    @property
    def reaches(self):
        """A figure's name in records, and the value that it exceeds after the last round."""
        (figure, floor), *more = re.findall(r"reaches (\w+) > ([\d.]+)", "\n".join(self.lines))
        assert not more
        return figure, float(floor.rstrip("."))

    def run(self, place, ranks):
        """Its output and the last record of each of its runs, made in a copy of its folder."""
        for package in re.findall(r"It needs (\w+)", "\n".join(self.lines)):
            if importlib.util.find_spec(package) is None:
                absent(package, f"{package} is not installed (pip install fedmpi[examples])")
        folder = place / "copy"
        folder.mkdir()
        if self.file.parent == EXAMPLES:
            shutil.copy(self.file, folder)
        else:
            unwanted = shutil.ignore_patterns("data", "runs", "*.pt", "__pycache__")
            shutil.copytree(self.file.parent, folder, ignore=unwanted, dirs_exist_ok=True)
        env = {"PATH": f"{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}", "FEDMPI_DATA": "/nowhere"}
        said = ""
        for command in self.commands:
            if command[0] == "mpirun" and ranks > 1:
                assert command[1:3] == ["-n", "2"]
                done = mpirun(ranks, *command[3:], timeout_s=LIMIT_S, cwd=folder, env=env)
                assert done.rc == 0, done.tails
                said += done.out
            else:
                command = command[3:] if command[0] == "mpirun" else command
                ran = subprocess.run(
                    command, cwd=folder, env={**os.environ, **env, "OMP_NUM_THREADS": "1"},
                    capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL,
                )  # fmt: skip
                assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
                said += ran.stdout
        written = sorted(folder.glob("runs/*/metrics.jsonl"))
        return said, [json.loads(file.read_text().splitlines()[-1]) for file in written]


HEADERS = [Example.read(file) for file in sorted([*EXAMPLES.glob("*/*.yaml"), *EXAMPLES.glob("*.py")])]
each = pytest.mark.parametrize("example", HEADERS, ids=lambda example: example.file.stem)


ALONE = ("python_rounds", "hospitals")  # run in one process too, with the same lines
RUNS = [(example, 2) for example in HEADERS] + [(example, 1) for example in HEADERS if example.file.stem in ALONE]


@pytest.mark.slow
@pytest.mark.parametrize(("example", "ranks"), RUNS, ids=[f"{e.file.stem}-{ranks}" for e, ranks in RUNS])
@pytest.mark.mpi
def test_an_example_reaches_what_its_header_says(example, ranks, tmp_path):
    figure, floor = example.reaches
    said, records = example.run(tmp_path, ranks)
    assert figure in said, said
    assert len(records) == sum("mpirun" in command for command in example.commands), said
    for record in records:
        assert record[figure] > floor, record


@each
def test_a_header_is_short_and_has_one_or_two_commands_besides_the_data(example):
    assert len(example.lines) <= MOST_LINES
    commands = [command for command in example.commands if command[0] == "mpirun"]
    assert 1 <= len(commands) <= 2 and len(example.commands) <= 2


def test_the_table_links_every_example_once():
    linked = re.findall(r"^\| .*\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(linked) == sorted(example.file.relative_to(EXAMPLES).as_posix() for example in HEADERS)
