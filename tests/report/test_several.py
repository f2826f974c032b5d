"""Pages about several runs and grids: figures, what differs, and each run behind a heading."""

import re
from typing import Any

import numpy as np
import pytest
import yaml
from support.pages import directory, page, record, sound

from fedmpi.comm import SoloComm
from fedmpi.compare import grid as grids
from fedmpi.compare import table as tables
from fedmpi.report.groups import curve, runs_of

SILOS = ["a", "b", "c", "d"]
GRID = {
    "base": {
        "rounds": 2,
        "data": {"name": "digits", "silos": 3},
        "local": {"name": "sgd", "lr": 0.1, "epochs": 1},
        "records": {"trace": False},
        "checkpoint": {"every": 2},
        "device": {"name": "cpu"},
    },
    "algorithms": {"fedavg": {}, "fedprox": {"local.name": "fedprox", "local.mu": 0.5}},
    "partitions": {"iid": {"data.partition": "iid"}, "skewed": {"data.partition": {"name": "labels", "labels": 4}}},
    "seeds": [0, 1],
    "over": "silos",
    "target": 0.3,
    "published": {"iid": {"fedavg": 0.95}},
}


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A trained grid: its file and its folder; one run has no seed 1."""
    folder = tmp_path_factory.mktemp("grid")
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
    for cell in grids.cells(folder / "grid.yaml", str(folder / "out"))[2][:-1]:
        grids.train(cell, SoloComm())
    return folder / "grid.yaml", folder / "out"


def test_a_grid_has_the_numbers_of_compare(grid):
    file, root = grid
    found = page(file, root)
    sound(found)
    head = found.text.partition("Contents")[0]
    assert re.search(r"is that of (fedavg|fedprox), [\d.]+ \((iid|skewed)\); (fedavg|fedprox), [\d.]+ \(", head)
    built, _, cells = grids.cells(file, str(root))
    runs = runs_of([file, root])
    assert runs.missing == ["skewed/fedprox/1"] and "1 run of the grid not trained yet" in found.text
    of_cells = {cell.name: cell for cell in cells}
    for name, run in zip(runs.names, runs.runs, strict=True):
        told, expected = curve(run, runs.metric, built.over), tables.curve(of_cells[name], built)
        assert told._replace(seconds=[], megabytes=[]) == expected._replace(seconds=[], megabytes=[])
        assert told.seconds == pytest.approx(expected.seconds)
        assert told.megabytes == pytest.approx(expected.megabytes)
    rows: Any = found.table("partition", "runs")
    assert set(rows) == {"iid", "skewed"}  # the first column; the last row of each
    fedprox = [tables.curve(of_cells[f"iid/fedprox/{seed}"], built) for seed in (0, 1)]
    row: Any = tables.row("iid", "fedprox", fedprox, built, True)
    assert rows["iid"]["last, mean"] == row["final"] and rows["iid"]["seeds"] == 2
    assert rows["iid"]["rounds to 0.3"] == (row["rounds_to_target"] or "-")
    chart = found.under("Accuracy by round: iid")
    line = next(t for t in chart["traces"] if t["name"] == "fedprox" and t.get("label"))
    assert line["y"] == pytest.approx(np.mean([c.values for c in fedprox], axis=0).tolist())
    low, high = (t["y"] for t in chart["traces"] if t["name"] == "fedprox" and not t.get("label"))
    assert (low, high) == ([min(v) for v in zip(*(c.values for c in fedprox), strict=True)],
                           [max(v) for v in zip(*(c.values for c in fedprox), strict=True)])  # fmt: skip
    paper = next(t for t in chart["traces"] if t["name"] == "fedavg, published")
    assert paper["y"] == [0.95] and "the mean of the silos' figures" in found.text


def test_the_folder_of_a_grid_is_grouped_alike_but_has_no_published_figures(grid):
    _, root = grid
    runs = runs_of([root])
    assert [(g.partition, g.name, len(g.runs)) for g in runs.groups] == [
        *(("iid", "fedavg", 2), ("iid", "fedprox", 2), ("skewed", "fedavg", 2), ("skewed", "fedprox", 1)),
    ]
    assert "published" not in page(root).text


def test_runs_beside_each_other_show_what_differs_and_each_run(tmp_path):
    first = directory(tmp_path / "first", [record(n, SILOS) for n in (1, 2, 3)], rounds=3, seed=1)
    again = directory(
        tmp_path / "again", [record(n, SILOS, accuracy=0.1 * n) for n in (1, 2)], rounds=3, seed=2, done=False
    )
    other = directory(
        tmp_path / "other",
        [record(n, "abc", accuracy=0.3) for n in (1, 2, 3)],
        rounds=3,
        local={"name": "fedprox", "lr": 0.1, "mu": 1.0, "epochs": 1},
    )
    found = page(first, again, other, out=tmp_path / "page.html")
    sound(found)
    assert "2 of 3 runs" in found.text and "again: ended early" in found.text
    table = found.table("key")
    assert table["local.name"]["other"] == "fedprox" and "seed" not in table and "out" not in table
    rows = found.table("run", "state")
    assert rows["again"]["last accuracy"] == 0.2 and rows["first"]["last accuracy"] == 3 / 7
    traces = found.under("Accuracy by round")["traces"]
    both = next(t for t in traces if t.get("label") and "others" in t["name"])
    assert both["y"] == pytest.approx([(1 / 5 + 0.1) / 2, (2 / 6 + 0.2) / 2, 3 / 7])
    assert "run3-learning" in found.ids and "run1-configuration" in found.ids
    many = page(
        *[directory(tmp_path / f"r{n}", [record(1, SILOS)], seed=n) for n in range(14)], out=tmp_path / "x.html"
    )
    sound(many)
    assert "With more than 12 runs they are left out" in many.text and "run1-learning" not in many.ids


def test_runs_with_other_metrics_are_told_apart(tmp_path):
    one = directory(tmp_path / "one", [record(1, SILOS), record(2, SILOS)])
    regression = [
        {k: v for k, v in record(n, SILOS).items() if k not in ("accuracy", "worst")} | {"rmse": 2.0 / n}
        for n in (1, 2)
    ]
    two = directory(tmp_path / "two", regression, about={"metric": "rmse", "maximize": False})
    found = page(one, two, out=tmp_path / "page.html")
    sound(found)
    assert found.table("run", "state")["two"]["last accuracy"] == "-" and "two: its metric is rmse" in found.text
    assert "in 1 group" not in found.text
