"""`fedmpi compare`: grids of runs, and run directories side by side."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from support.mpi import TESTS
from support.runs import config, run

import fedmpi
from fedmpi import comm, results
from fedmpi.cli import app
from fedmpi.comm import SoloComm
from fedmpi.compare import grid as grids
from fedmpi.compare import table as tables
from fedmpi.compare.runs import compare_runs
from fedmpi.config import load
from fedmpi.errors import ConfigError
from fedmpi.records import read_metrics
from fedmpi.records.metrics import METRICS, line_of
from fedmpi.report.history import gather

TOP = TESTS.parent


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """The command and its parts, on one rank; it writes into a folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comm, "connect", SoloComm)

    def main(arguments):
        with pytest.raises(SystemExit) as ended:
            app(["compare", *map(str, arguments)])
        if ended.value.code:
            raise ended.value

    names = {**vars(tables), **vars(grids)}
    return SimpleNamespace(**{name: value for name, value in names.items() if not name.startswith("__")}, main=main)


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


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"algorithms": {"a": {}, "b": {"seed": 3}}, "published": None},
            "algorithms.b: seed is the grid's: each run has its own; take seeds",
        ),
        ({"partitions": {"iid": {"out": "runs/x"}}, "published": None}, "partitions.iid: out is the grid's"),
    ],
)
def test_what_the_grid_sets_no_cell_sets(compare, tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says):
        compare.cells(Path(grid(tmp_path / "grid.yaml", **changes)[0]), None)


def test_runs_on_other_numbers_of_ranks_have_no_bytes_to_compare(compare, tmp_path, capsys):

    def some(megabytes, *ranks):
        return compare.Curve([1, 2], [0.5, 0.6], [megabytes / 2, megabytes], [1.0, 2.0], "", set(ranks))

    alike = {("iid", "fedavg"): [some(8.0, 2)], ("iid", "fedprox"): [some(4.0, 2), some(6.0, 2)]}
    told = compare.Grid(algorithms={"fedavg": {}, "fedprox": {}})
    rows = [compare.row(*names, curves, told, True) for names, curves in compare.comparable(alike).items()]
    assert [(r["megabytes"], r["ranks"]) for r in rows] == [(8.0, "2"), (5.0, "2")] and not capsys.readouterr().err
    for other in (some(4.0, 4), some(4.0, 2, 4)):  # another run, or a resumed one
        mixed = compare.comparable(alike | {("iid", "scaffold"): [other]})
        rows = [compare.row(*names, curves, told, True) for names, curves in mixed.items()]
        assert [r["megabytes"] for r in rows] == [None] * 3 and [r["final"] for r in rows] == [0.6] * 3
        assert rows[2]["ranks"] in ("4", "2 4") and "  -  " in compare.table(rows, told, "accuracy")[2]
        said = capsys.readouterr().err
        assert "no MB: bytes depend on the number of ranks, and runs used 2: " in said and "4: iid/scaffold" in said


def test_a_grid_is_one_table_and_goes_on_where_it_was_broken_off(compare, tmp_path, capsys):
    arguments = grid(tmp_path / "grid.yaml", seeds=[0])
    _, _, cells = compare.cells(tmp_path / "grid.yaml", str(tmp_path / "out"))
    with fedmpi.Run(cells[0].config, comm=SoloComm()) as run:  # one is interrupted after a round, another is done
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

    compare.main(grid(tmp_path / "grid.yaml"))  # with one more seed
    said = capsys.readouterr()
    assert "4 of 4: skewed/fedprox/1" in said.err and " to " in said.out.splitlines()[2]


def test_lines_trained_one_by_one_are_the_grid_and_are_gathered(compare, tmp_path, capsys):
    arguments = grid(tmp_path / "grid.yaml", seeds=[0], partitions={"iid": {"data.partition": "iid"}})
    names = ["1\tiid/fedavg/0\t", "2\tiid/fedprox/0\t"]
    compare.main([*arguments, "--tasks"])
    assert capsys.readouterr().out.splitlines() == [name + "waiting" for name in names]
    compare.main([*arguments, "--task", 2])
    said = capsys.readouterr()
    assert "line 2 is done" in said.err and not said.out and not (tmp_path / "out/table.csv").exists()
    assert not (tmp_path / "out/iid/fedavg").exists()
    compare.main([*arguments, "--tasks"])
    assert capsys.readouterr().out.splitlines() == [names[0] + "waiting", names[1] + "done"]

    with pytest.raises(SystemExit) as ended:
        compare.main([*arguments, "--gather"])
    said = capsys.readouterr()
    assert ended.value.code == 1 and "fedmpi: 1 of 2 lines are not done: 1 (iid/fedavg/0)" in said.err
    assert "fedprox" in said.out and not (tmp_path / "out/iid/fedavg").exists()

    untouched = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/iid").rglob("*") if path.is_file()}
    for line in (1, 2):
        compare.main([*arguments, "--task", line])
    assert all(path.stat().st_mtime_ns == when for path, when in untouched.items())
    capsys.readouterr()
    compare.main([*arguments, "--gather", "--json"])
    gathered = json.loads(capsys.readouterr().out)
    compare.main([*arguments[:2], str(tmp_path / "whole"), "--json"])
    figures = ("algorithm", "final", "best", "rounds_to_target")
    whole = json.loads(capsys.readouterr().out)
    assert [[row[name] for name in figures] for row in gathered] == [[row[name] for name in figures] for row in whole]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task", 0], "--task 0: the grid has lines 1 to 8; "),
        (["--task", 9], "--task 9: the grid has lines 1 to 8; "),
        (["--task", 1, "--tasks"], "--task and --tasks do not go together"),
        (["--gather", "--only", "iid"], "--gather and --only do not go together"),
    ],
)
def test_a_line_that_is_not_there_is_refused(compare, tmp_path, capsys, options, said):
    with pytest.raises(SystemExit) as ended:
        compare.main([*grid(tmp_path / "grid.yaml"), *options])
    assert ended.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_run_that_diverges_is_a_row_that_says_so(compare, tmp_path, capsys):
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
        ({"algorithms": {"a b": {}}}, "'a b' names a folder: use letters, digits and . _ + - only"),
        ({"seeds": []}, "nothing to compare: give algorithms, and at least one seed"),
        ({"seeds": [1, 2, 1]}, "seeds: 1 appears twice; both would be one run, in one folder"),
        ({"seeds": ["x"]}, "seeds.0: a whole number is needed"),
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
def test_a_wrong_grid_is_one_line_before_anything_runs(compare, tmp_path, capsys, changes, said):
    with pytest.raises(SystemExit) as ended:
        compare.main(grid(tmp_path / "grid.yaml", **changes))
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.err.startswith(f"fedmpi: {said}") and told.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("only", "runs"),
    [
        ("iid,fedprox", ["iid/fedprox/0", "iid/fedprox/1"]),
        ("iid,skewed,fedavg,1", ["iid/fedavg/1", "skewed/fedavg/1"]),
        ("0", ["iid/fedavg/0", "iid/fedprox/0", "skewed/fedavg/0", "skewed/fedprox/0"]),
    ],
)
def test_only_of_several_kinds_is_what_they_share(compare, tmp_path, only, runs):
    grid(tmp_path / "grid.yaml")
    _, _, cells = compare.cells(tmp_path / "grid.yaml", str(tmp_path / "out"))
    assert [cells[n].name for n in compare.to_run(cells, only.split(","), 1)] == runs


def test_only_names_what_is_in_the_grid(compare, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.main([*grid(tmp_path / "grid.yaml"), "--only", "fedprox,skewd"])
    assert capsys.readouterr().err == "fedmpi: --only: no 'skewd' in the grid; did you mean 'skewed'?\n"


def test_a_run_of_another_grid_is_not_taken_for_one_of_this(compare, tmp_path, capsys):
    one = {"partitions": {"iid": {}}, "seeds": [0], "algorithms": {"fedavg": {}}}
    compare.main(grid(tmp_path / "grid.yaml", **one))
    with pytest.raises(SystemExit):
        compare.main(grid(tmp_path / "grid.yaml", **one | {"algorithms": {"fedavg": {"local.lr": 0.2}}}))
    assert "holds another run: local.lr is 0.1 there and 0.2 here; choose another --out" in capsys.readouterr().err


def test_a_grid_is_drawn(compare, tmp_path):
    pytest.importorskip("matplotlib")
    compare.main(grid(tmp_path / "grid.yaml"))
    assert (tmp_path / "out" / "figure.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "figure.svg").exists()


@pytest.mark.parametrize("name", ["heart", "fashion", "epochs", "personal", "codecs", "robust"])
def test_the_grids_that_come_along_can_be_built(compare, name):
    grid, root, cells = compare.cells(TOP / "configs" / f"compare_{name}.yaml", None)
    assert root == Path(f"runs/compare_{name}") and len({cell.name for cell in cells}) == len(cells)
    assert {name for known in (grid.published or {}).values() for name in known} <= set(grid.algorithms)
    if name == "robust":
        for cell in cells:
            attack, ids = cell.config.attack, [f"silo-{k:02d}" for k in range(25)]
            assert (cell.config.rounds, cell.config.experimental, attack.hostile(ids)) == (600, True, set(ids[20:]))
        assert len(cells) == 48 and all(len(known) == 8 for known in grid.published.values())
    if name == "fashion":
        for cell in cells:
            local, data = cell.config.local, cell.config.data
            assert (cell.config.rounds, local.epochs, local.batch_size, data.silos) == (50, 10, 64, 10)
            assert (local.lr, dict(local.optimizer.arguments)) == (0.01, {"momentum": 0.9, "weight_decay": 1e-5})
            assert cell.config.evaluate.every == 1 and cell.config.select == fedmpi.Config().select


def test_a_grid_runs_quickly_beside_the_real_one(compare, tmp_path, capsys):
    arguments = grid(tmp_path / "grid.yaml", partitions={"iid": {}}, out=str(tmp_path / "real"))
    compare.main([arguments[0], "--quick"])
    assert "compare: 2 of 2: iid/fedprox/0" in capsys.readouterr().err
    assert [r["round"] for r in read_metrics(tmp_path / "real-quick/iid/fedavg/0")] == [1, 2]
    assert not (tmp_path / "real").exists()


def test_run_directories_stand_side_by_side_with_what_differs(compare, tmp_path, capsys):
    found = []
    for name, rounds, rate in (("a", 2, 0.1), ("b", 3, 0.2)):
        records, _ = run(config(tmp_path / name, rounds, local={"lr": rate}))
        found.append(records)
    capsys.readouterr()
    compare.main(["a", "b", "--json"])
    rows = json.loads(capsys.readouterr().out)
    for row, name, records in zip(rows, "ab", found, strict=True):
        scores = [record["accuracy"] for record in records]
        assert (row["run"], row["rounds"], row["metric"]) == (name, len(records), "accuracy")
        assert (row["last"], row["best"]) == (scores[-1], max(scores))
        assert row["seconds"] == pytest.approx(sum(record["seconds"]["round"] for record in records))
        assert row["megabytes"] == 0.0  # one process sends nothing
    assert [row["differs"] for row in rows] == [{"rounds": 2, "local.lr": 0.1}, {"rounds": 3, "local.lr": 0.2}]
    compare.main(["a", "b"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["run", "rounds", "metric", "last"] and lines[1].split()[:2] == ["a", "2"]
    assert ["local.lr", "0.1", "0.2"] in [line.split() for line in lines]


def test_megabytes_are_all_that_ranks_send(tmp_path):
    made = config(tmp_path, 2)
    run(made)
    root = Path(made.out)
    sent = {"bytes_up": 3000, "bytes_down": 2000, "bytes_control": 500}
    (root / METRICS).write_bytes(b"".join(line_of(record | sent) for record in read_metrics(root)))
    told = tables.curve(grids.Cell("iid", "a", 0, made), grids.Grid(algorithms={}))
    [row] = compare_runs([root])
    assert row["megabytes"] == told.megabytes[-1] == gather(read_metrics(root)).sent.sum() / 1e6 == 0.011


def test_a_folder_without_a_run_is_one_line(compare, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        compare.main(["empty", "nowhere"])
    assert ended.value.code == 2 and capsys.readouterr().err == "fedmpi: empty is not a run directory\n"


@pytest.mark.parametrize("option", [["--out", "x"], ["--only", "iid"], ["--quick"], ["--task", "1"], ["--gather"]])
def test_what_only_a_grid_takes_is_refused_with_run_directories(compare, capsys, option):
    with pytest.raises(SystemExit) as ended:
        compare.main(["a", "b", *option])
    said = f"fedmpi: {option[0]} goes with a grid: one YAML file, no run directories\n"
    assert ended.value.code == 2 and capsys.readouterr().err == said


def test_a_grid_without_a_finished_run_is_an_empty_list_in_json(compare, tmp_path, capsys):
    grid(tmp_path / "grid.yaml")
    told, root, cells = compare.cells(tmp_path / "grid.yaml", str(tmp_path / "out"))
    compare.tell(told, root, cells, as_json=True)
    assert json.loads(capsys.readouterr().out) == []
