"""Environment variables in configurations: `${NAME}` in values of files and overrides."""

import textwrap
from typing import Any

import pytest
import yaml
from support.mpi import FEDMPI, mpirun

from fedmpi import Run
from fedmpi.compare.grid import cells
from fedmpi.config import load, origin_of
from fedmpi.directory import read_config
from fedmpi.errors import ConfigError
from fedmpi.yamlfile import parse, read


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Write a YAML file; returns its path."""
    for name, value in {"SCRATCH": "/s", "ID": "3", "LR": "1e-2", "YES": "true", "ODD": "a: [1, # b"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"ZEROS": "0012", "CLOCK": "1:30", "UNDER": "1_000", "HOLLOW": "", "NOTHING": "null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ABSENT", raising=False)

    def write(text, name="a.yaml"):
        (tmp_path / name).write_text(textwrap.dedent(text))
        return tmp_path / name

    return write


def refusal(call, *args):
    with pytest.raises(ConfigError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("${SCRATCH}/runs/${ID}", "/s/runs/3"),
        ("${ID}", 3),
        ("'${ID}'", "3"),
        ('"${ID}"', "3"),
        ("${ID}${ID}", 33),
        ("-${ID}", -3),
        ("${LR}", 0.01),
        ("${YES}", True),
        ("${NOTHING}", None),
        ("${ODD}", "a: [1, # b"),  # one value, whatever is in it
        ("[${ID}, b]", [3, "b"]),
        ("{a: ${ID}, b: ${SCRATCH}/x}", {"a": 3, "b": "/s/x"}),
        ("[${ODD}]", ["a: [1, # b"]),
        ("${ZEROS}", "0012"),  # YAML 1.1 would read an octal number,
        ("${CLOCK}", "1:30"),  # seconds,
        ("${UNDER}", "1_000"),  # a thousand
        ("$${ID}", "${ID}"),
        ("a$${ID}/${ID}", "a${ID}/3"),
        ("$ID", "$ID"),
        ("$", "$"),
        ("|\n  ${ID}\n  ${SCRATCH}", "3\n/s"),
    ],
)
def test_a_variable_becomes_one_value_as_if_the_file_had_it(file, written, expected):
    assert read(file(f"key: {written}"))[0]["key"] == expected
    assert type(read(file(f"key: {written}"))[0]["key"]) is type(expected)
    if not written.startswith("|"):
        assert parse("key", written)[0] == expected


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("rounds: 3\nout: ${ABSENT}/x", "a.yaml:2) is not set or empty"),
        ("out: ${HOLLOW}/x", "HOLLOW ("),
        ("out: ${ABSENT}${HOLLOW}${ID}", "environment variables ABSENT ("),
        ("out: '${ID:-1}'", "'${ID:-1}' names no variable: write ${NAME}, or $${ for the text ${"),
        ("out: '${}'", "'${}' names no variable"),
        ("out: '${ID'", "'${ID' names no variable"),
        ("${ID}: 2", "a.yaml:1: '${ID}' is a key; variables are expanded in values"),
        ("local: {a${ID}: 2}", "'a${ID}' is a key"),
        ("out: [${ID}", "not YAML"),
    ],
)
def test_what_is_no_set_variable_is_one_line(file, written, says):
    assert says in refusal(load, file(written))


def test_an_override_is_refused_with_its_key(file):
    path = file("rounds: 3")
    assert refusal(load, path, ["out=${ABSENT}"]).startswith("environment variable ABSENT (out) is not set or empty")
    assert refusal(load, path, ["out='${1}'"]).startswith("out: '${1}' names no variable")


def test_comments_are_not_expanded_and_aliases_once(file):
    path = file("# ${ABSENT} ${a b}\nout: &a $${x}${ID} # ${ABSENT}\ninit: *a\n")
    assert read(path)[0] == {"out": "${x}3", "init": "${x}3"}


def test_an_origin_names_the_variables_of_its_value(file):
    path = file("seed: ${ID}\nlocal: {name: sgd, lr: ${LR}, epochs: 1}\nexchange: {exact: [a, 'w${ID}']}\nout: a")
    config, origins = load(
        path, ["data={name: digits, partition: {name: dirichlet, alpha: ${ID}}}", "out=${SCRATCH}/${ID}"]
    )
    local: Any = config.local
    assert (config.seed, local.lr, config.out) == (3, 0.01, "/s/3")
    assert origins["seed"] == f"{path}:1 (${{ID}})" and origin_of("local.lr", origins) == f"{path}:2 (${{LR}})"
    assert origins["exchange.exact"] == f"{path}:3 (${{ID}})" and origins["out"] == "command line (${SCRATCH}, ${ID})"
    assert origins["local.name"] == f"{path}:2"


def test_a_run_directory_holds_values_and_is_not_expanded_again(file, tmp_path, monkeypatch):
    path = file("seed: ${ID}\nrounds: 1\nlocal: {name: sgd, lr: 0.1, steps: 1}\nout: ${OUT}/$${ID}\n")
    monkeypatch.setenv("OUT", str(tmp_path))
    with Run(path) as run:
        first = [record["loss"] for record in run]
    root = tmp_path / "${ID}"
    assert len(first) == 1 and read_config(root).config["seed"] == 3
    assert yaml.safe_load((root / "config.yaml").read_text())["out"] == str(root)

    monkeypatch.setenv("ID", "4")
    monkeypatch.delenv("OUT")
    with Run(root, "rounds=2") as run:  # resumed by its folder: what it began with counts
        assert run.config.seed == 3 and run.resumed == 1 and len(list(run)) == 1
    monkeypatch.setenv("OUT", str(tmp_path))
    assert "seed is 3 there and 4 here" in refusal(lambda: Run(path, "rounds=3"))  # by its file: expanded anew
    monkeypatch.setenv("ID", "3")
    with Run(path, "rounds=3") as run:
        assert run.resumed == 2


def test_a_grid_takes_variables(file):
    path = file(
        """
        base: {rounds: 1, local: {name: sgd, lr: 1, epochs: 1}}
        algorithms: {a: {local.lr: ${LR}}}
        seeds: [${ID}]
        out: ${SCRATCH}/grid
        """
    )
    _, root, found = cells(path, None)
    local: Any = found[0].config.local
    assert str(root) == "/s/grid" and (found[0].seed, local.lr) == (3, 0.01)


@pytest.mark.mpi
@pytest.mark.parametrize("command", ["train", "check"])
def test_ranks_that_expand_a_variable_differently_are_refused_with_its_name(tmp_path, command):
    (tmp_path / "a.yaml").write_text(
        "rounds: 1\nlocal: {name: sgd, lr: 0.1, steps: ${STEPS}}\ndata: {name: digits, silos: 3}\nout: runs/${STEPS}\n"
    )
    line = f'STEPS=1$OMPI_COMM_WORLD_RANK exec "{FEDMPI}" {command} a.yaml'
    done = mpirun(3, "sh", "-c", line, cwd=tmp_path, timeout_s=60)
    assert done.rc == 2, done.tails
    says = "the configuration differs: rank 0 against ranks 1, 2: local.steps is 10 on rank 0 and 11 on rank 1; "
    assert says + "${STEPS} is not the same on all ranks; take what all share" in done.out + done.err
