"""Scaling and missing values: against plain numpy, in memory and streamed, per silo and pooled, and in runs."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import fedmpi
from fedmpi import results
from fedmpi.comm import SoloComm
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.data import check
from fedmpi.data.files import Files
from fedmpi.data.prepare import Pooled, exact_sum
from fedmpi.data.stream import FileSamples
from fedmpi.errors import ConfigError
from fedmpi.flat import sha256

SHIFTS = {"a": 3.0, "b": -40.0, "c": 1e4}


def inputs(silo, num, shape=(4,)):
    """Columns of other units; the last is constant, the one before lacks values."""
    draw = np.random.default_rng(ord(silo))
    x = draw.standard_normal((num, *shape)).astype(np.float32) * 5 + SHIFTS[silo]
    x[:, -1] = 0.1
    x[draw.random(x.shape[:1]) < 0.3, -2] = np.nan
    return x


def files(root, shape=(4,), **fields):
    for silo, num in (("a", 40), ("b", 25), ("c", 9)):
        arrays = {}
        for part, size in (("train", num), ("test", 6)):
            arrays[f"x_{part}"] = inputs(silo, size, shape)
            arrays[f"y_{part}"] = np.arange(size) % 2
        np.savez(root / f"{silo}.npz", **arrays)
    silos = [{"id": silo, "path": f"{silo}.npz"} for silo in SHIFTS]
    values = {"root": str(root), "task": "binary", "shape": shape, "missing": "mean", "silos": silos} | fields
    return build(Files, values, "data", "dataset 'files'")


def opened(source):
    if source.shared is not None:
        for silo in source.silos:
            source.shared.read(silo.id)
        source.shared.agree(SoloComm())
    data = {silo.id: source.open(silo.id) for silo in source.silos}
    whole = {silo: [torch.cat(list(x.blocks())) if isinstance(x, FileSamples) else x for x in (one.x_train, one.x_test)]
             for silo, one in data.items()}  # fmt: skip
    return whole


def oracle(root, scale, missing, pooled):
    """The same by plain numpy, in float64."""
    raw = {
        silo: [np.load(root / f"{silo}.npz")[f"x_{part}"].astype(float) for part in ("train", "test")]
        for silo in SHIFTS
    }
    found = {}
    for silo, parts in raw.items():
        of = np.concatenate([one[0] for one in raw.values()]) if pooled else parts[0]
        axes = (0, *range(2, of.ndim))
        along = (-1, *(1,) * (of.ndim - 2))
        mean, fill = np.nanmean(of, axes).reshape(along), 0.0
        if missing in ("mean", "median"):
            fill = mean if missing == "mean" else np.nanmedian(of, axes).reshape(along)
        shift, width = 0.0, 1.0
        if scale == "standard":
            shift, width = mean, np.nanstd(of, axes).reshape(along)
            width = np.where(np.nanmin(of, axes) == np.nanmax(of, axes), 1, width.ravel()).reshape(along)
        elif scale == "minmax":
            shift = np.nanmin(of, axes).reshape(along)
            width = np.nanmax(of, axes).reshape(along) - shift
            width = np.where(width == 0, 1, width)
        found[silo] = [(np.where(np.isnan(x), fill, x) - shift) / width for x in parts]
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("shape", [(4,), (3, 2, 5)])
@pytest.mark.parametrize("statistics", ["silo", "pooled"])
@pytest.mark.parametrize(
    ("scale", "missing"),
    [
        *(("standard", "mean"), ("standard", "zero"), ("minmax", "mean"), (None, "mean")),
        *(("standard", "median"), (None, "median")),
    ],
)
def test_prepared_inputs_are_those_of_numpy(tmp_path, scale, missing, statistics, shape, stream):
    how = {"scale": scale, "missing": missing, "statistics": statistics, "stream": stream}
    if missing == "median" and (stream or statistics == "pooled"):
        with pytest.raises(ConfigError, match=r"missing: median .* take missing: mean"):
            files(tmp_path, shape, **how)
        return
    source = files(tmp_path, shape, **how).source(0)
    found = opened(source)
    for silo, parts in oracle(tmp_path, scale, missing, statistics == "pooled").items():
        for x, wanted in zip(found[silo], parts, strict=True):
            assert x.dtype == torch.float32
            np.testing.assert_allclose(x.numpy(), wanted, rtol=2e-6, atol=2e-6)
        raw = np.concatenate([np.load(tmp_path / f"{silo}.npz")[f"x_{part}"] for part in ("train", "test")])
        assert source.filled[silo] == np.isnan(raw).sum() > 0
    assert source.fitted


@pytest.mark.parametrize("statistics", ["silo", "pooled"])
def test_streamed_and_in_memory_have_the_same_bits(tmp_path, monkeypatch, statistics):
    monkeypatch.setattr("fedmpi.data.prepare.BLOCK_BYTES", 7 * 4 * 4)
    monkeypatch.setattr("fedmpi.data.stream.BLOCK_BYTES", 5 * 4 * 4)
    both = [
        opened(files(tmp_path, scale="standard", statistics=statistics, stream=stream).source(0)) for stream in (0, 1)
    ]
    for silo in SHIFTS:
        assert all(torch.equal(a, b) for a, b in zip(both[0][silo], both[1][silo], strict=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_test_part_may_be_empty(tmp_path, stream):
    dataset = files(tmp_path, scale="standard", stream=stream)
    arrays = dict(np.load(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", **arrays | {"x_test": arrays["x_test"][:0], "y_test": arrays["y_test"][:0]})
    data = dataset.source(0).open("a")
    assert tuple(data.x_test.shape) == (0, 4) and len(data.x_test[:5]) == 0 and len(data.x_train) == 40


def test_test_rows_change_nothing(tmp_path):
    first = opened(files(tmp_path, scale="standard", statistics="pooled").source(0))
    with np.load(tmp_path / "a.npz") as file:
        arrays = dict(file)
    arrays["x_test"][:] = 1e6
    source = files(tmp_path, scale="standard", statistics="pooled").source(0)
    np.savez(tmp_path / "a.npz", **arrays)
    second = opened(source)
    assert all(torch.equal(first[silo][0], second[silo][0]) for silo in SHIFTS)
    assert not torch.equal(first["a"][1], second["a"][1])


def test_a_sum_is_exact_in_any_order():
    draw = np.random.default_rng(0)
    parts = [draw.standard_normal(3) * 10.0 ** draw.integers(-300, 300, 3) for _ in range(50)]
    parts += [np.array([5e-324, -5e-324, 1.7e308])]
    expected = [math.fsum(column) for column in zip(*parts, strict=True)]
    for order in (parts, parts[::-1]):
        halves = [order[:20], order[20:]]  # two ranks, whose limbs are added up
        kept: Any = []
        exact_sum(halves[0], (3,), lambda limbs: kept.append(limbs) or limbs)  # noqa: B023
        assert exact_sum(halves[1], (3,), lambda limbs: limbs + kept[0]).tolist() == expected  # noqa: B023


CSV = "age,bp,sex,died\n60,130,f,1\nNA,120,m,0\n50,?,f,1\n40,,m,0\n45,100,f,0\n"


def table(root, text=CSV, **fields):
    (root / "a.csv").write_text(text)
    values = {"root": str(root), "task": "binary", "shape": [4], "target": "died", "features": ["age", "bp"],
              "levels": {"sex": ["f", "m"]}, "test_fraction": 0, "silos": [{"id": "a", "path": "a.csv"}]}  # fmt: skip
    return build(Files, values | fields, "data", "dataset 'files'").source(0)


def test_missing_cells_of_a_table_are_filled_in_and_one_hot_columns_stay(tmp_path):
    source = table(tmp_path, scale="standard", missing="mean")
    x = source.open("a").x_train.numpy()
    age, bp = np.array([60, 48.75, 50, 40, 45]), np.array([130, 120, 350 / 3, 350 / 3, 100])
    there = [np.array([60, 50, 40, 45]), np.array([130, 120, 100])]
    for column, values, own in ((0, age, there[0]), (1, bp, there[1])):
        np.testing.assert_allclose(x[:, column], (values - own.mean()) / own.std(), rtol=1e-6, atol=1e-6)
    assert x[:, 2:].tolist() == [[1, 0], [0, 1], [1, 0], [0, 1], [1, 0]] and source.filled == {"a": 3}
    zero = table(tmp_path, missing="zero").open("a").x_train
    assert zero[:, :2].tolist() == [[60, 130], [0, 120], [50, 0], [40, 0], [45, 100]]


def test_indicators_tell_where_values_are_missing_and_are_not_scaled(tmp_path):
    how = {"scale": "standard", "missing": "median", "indicators": ["bp", "age"], "shape": [6]}
    source = table(tmp_path, **how)
    x = source.open("a").x_train.numpy()
    assert x[:, 4:].T.tolist() == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]]  # in the order of `indicators`
    assert x[:, 2:4].tolist() == [[1, 0], [0, 1], [1, 0], [0, 1], [1, 0]] and source.filled == {"a": 3}
    np.testing.assert_allclose(x[1, 0], (47.5 - 48.75) / np.std([60, 50, 40, 45]), rtol=1e-6)  # the median of four
    assert source.columns["a"] == ("age", "bp", "sex", "bp is missing", "age is missing")
    told = source.preparation("a")
    assert told["columns"] == [*source.columns["a"]] and told["shift"][4:] == [0, 0] and told["width"][2:] == [1] * 4
    named = table(tmp_path, **how, features=None).open("a").x_train  # all columns, sorted by name
    assert torch.equal(named, source.open("a").x_train)
    new = tmp_path / "new.csv"
    new.write_text("bp,sex,age\n,m,50\n")
    assert source.inputs(new, "a")[0][:, 2:].tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize(
    ("fields", "text", "said"),
    [
        ({"missing": "mean", "indicators": ["agee"]}, CSV, "'agee' is not in features; did you mean 'age'?"),
        ({"missing": "mean", "indicators": ["sex"], "features": None}, CSV, "indicators: 'sex' is no numeric column"),
        ({"missing": "mean", "indicators": ["age", "age"]}, CSV, "column 'age' is named twice in indicators"),
        ({"missing": "mean", "indicators": ["age"]}, CSV, "features, levels and indicators make 5 columns"),
        ({"indicators": ["age"], "shape": [5]}, CSV, "indicators tell where values are missing, and missing"),
        ({}, CSV, "column 'age': line 3 is 'NA'; column 'bp': line 4 is '?', line 5 is empty; missing values are "
         "not filled in: give a number, set data.missing"),
        ({"missing": "mean"}, CSV.replace("45,", "old,"), "column 'age': line 6 is 'old'; every cell must be"),
        ({"missing": "mean"}, CSV.replace("45,", "inf,"), "column 'age': line 6 is 'inf'"),
        ({"missing": "mean"}, CSV.replace("45,100,f", "45,100,"), "column 'sex': line 6 is empty"),
        ({"statistics": "pooled"}, CSV, "statistics: pooled needs scale, or missing: mean"),
    ],
)  # fmt: skip
def test_what_cannot_be_filled_in_is_told_in_one_line(tmp_path, fields, text, said):
    with pytest.raises(ConfigError) as caught:
        table(tmp_path, text, **fields).open("a")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
def test_infinite_inputs_are_refused_and_NaN_gets_its_remedy(tmp_path, stream):
    dataset = files(tmp_path, stream=stream)
    arrays = dict(np.load(tmp_path / "a.npz"))
    arrays["x_train"][5, 0] = np.inf
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ConfigError, match=r"NaN or infinite values in 1 of 40 samples, first in x_train\[5\]$"):
        dataset.source(0).open("a")
    with pytest.raises(ConfigError, match=r"first in x_train\[\d\]; set data.missing to fill NaN in$"):
        files(tmp_path, stream=stream, missing="error").source(0).open("b")


# ---------------------------------------------------------------- runs


def run_of(root, out, rounds=3, data=(), **values):
    fields = {"scale": "standard", "statistics": "pooled"} | dict(data)
    how = {"rounds": rounds, "out": str(root / out), "data": files(root, **fields), "model": "logistic"}
    how |= {"local": {"name": "sgd", "lr": 0.1, "epochs": 1}} | values
    with fedmpi.Run(build(Config, how), comm=SoloComm()) as run:
        records = list(run)
        return records[-1]["loss"] if records else None, sha256(run.parameters)


PRIVATE = {"clip": 1.0, "sigma": 1.0, "delta": 1e-3}
POISSON = {"name": "poisson", "rate": 0.5}


def test_a_run_keeps_its_pooled_statistics(tmp_path):
    loss, sha = run_of(tmp_path, "whole")
    run_of(tmp_path, "parts", rounds=2)
    about = yaml.safe_load((tmp_path / "parts" / "config.yaml").read_text())["about"]["statistics"]
    of = np.concatenate([np.load(tmp_path / f"{silo}.npz")["x_train"] for silo in SHIFTS]).astype(float)
    np.testing.assert_allclose(about["shift"][:3], np.nanmean(of, 0)[:3], rtol=1e-12)
    assert results.evaluate(tmp_path / "whole")["loss"] == loss
    assert run_of(tmp_path, "parts") == (loss, sha)
    # Statistics come from the directory, not from the files: with others there, another model goes on.
    config = tmp_path / "whole" / "config.yaml"
    text, _, _ = config.read_text().rpartition("# sha256")
    values = yaml.safe_load(text)
    values["about"]["statistics"]["width"][0] *= 2
    from fedmpi.directory import write_config

    write_config(tmp_path / "whole", {k: v for k, v in values.items() if k != "about"}, values["about"])
    assert results.evaluate(tmp_path / "whole")["loss"] != loss


def test_a_fork_takes_the_statistics_of_the_run_that_it_goes_on_from(tmp_path, monkeypatch):
    loss, sha = run_of(tmp_path, "whole", checkpoint={"every": 1})

    def computed(self, comm):
        raise AssertionError("statistics are computed once")

    monkeypatch.setattr(Pooled, "agree", computed)
    assert run_of(tmp_path, "fork", fork=f"{tmp_path / 'whole'}@2") == (loss, sha)
    of_both = [yaml.safe_load((tmp_path / run / "config.yaml").read_text())["about"] for run in ("whole", "fork")]
    assert of_both[0]["statistics"] == of_both[1]["statistics"]


@pytest.mark.parametrize(
    ("values", "data", "said"),
    [
        ({"secure": "secagg", "updates": [{"name": "clip", "norm": 1.0}]}, {}, "without masks"),
        ({"privacy": PRIVATE | {"name": "silo"}, "select": POISSON}, {}, "without noise, outside the account"),
        ({"privacy": PRIVATE | {"name": "record"}}, {"statistics": "silo"}, "preprocessing is fitted to training rows"),
        ({"transport": {"name": "files", "root": "x"}}, {}, "under transport: files they come one by one"),
        ({"disclose": "pooled"}, {"scale": "minmax"}, "disclose: pooled needs scale: standard"),
    ],
)
def test_where_statistics_may_not_go_they_are_refused(tmp_path, values, data, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        run_of(tmp_path, "refused", data=data, **values)


def test_data_check_prepares_pooled_inputs(tmp_path):
    assert [row.num_train for row in check(files(tmp_path, scale="standard", statistics="pooled"))] == [40, 25, 9]
