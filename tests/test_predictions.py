"""`fedmpi predict`: files per silo against the models themselves, personal ones too, for new files, and refusals."""

import csv
import json
import warnings

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import fedmpi
from fedmpi import results
from fedmpi.cli import app
from fedmpi.comm import SoloComm
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.predictions import predict

NAMES = ("cured", "ill")


def cells(path):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.fixture
def study(tmp_path):
    for i in range(2):
        draw = np.random.default_rng(i)
        lines = ["age,bp,died,note"]
        for _ in range(30 + 9 * i):
            age, bp = draw.normal(60 + 10 * i, 9), draw.normal(130, 20)
            lines.append(
                f"{age:.2f},{'' if draw.random() < 0.1 else f'{bp:.2f}'},{NAMES[int(age + draw.normal() > 65)]},x"
            )
        (tmp_path / f"{i}.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def trained(root, out="run", data=(), **values):
    silos = [{"id": "a", "path": "0.csv"}, {"id": "b/c", "path": "1.csv"}]
    fields = {"name": "files", "root": str(root), "task": "binary", "shape": [2], "target": "died", "classes": NAMES}
    fields |= {"features": ["age", "bp"], "missing": "mean", "scale": "standard", "silos": silos} | dict(data)
    local = {"name": "sgd", "lr": 0.3, "epochs": 2, "batch_size": 8} | values.pop("local", {})
    how = {"rounds": 3, "out": str(root / out), "data": fields, "model": "logistic", "local": local} | values
    with fedmpi.Run(build(Config, how), comm=SoloComm()) as run:
        record = list(run)[-1]
        return record, {silo.id: run._spec.source.open(silo.id) for silo in run._spec.source.silos}


def logits(root, x, silo=None):
    """By the exported model, without fedmpi."""
    results.export(root / "run", root / "m.safetensors", silo=silo)
    tensors = load_file(root / "m.safetensors")
    return (x @ tensors["linear.weight"].T + tensors["linear.bias"])[:, 0]


@pytest.mark.parametrize("statistics", ["silo", "pooled"])
def test_predictions_are_those_of_the_exported_model_on_prepared_inputs(study, statistics):
    record, data = trained(study, data={"statistics": statistics})
    done = predict(study / "run", study / "out")
    assert {silo: (one.path.name, one.own) for silo, one in done.items()} == {
        "a": ("a.csv", False),
        "b/c": ("b%2Fc.csv", False),
    }
    for silo, (path, num, *_) in done.items():
        found, one = cells(path), data[silo]
        assert list(found) == ["row", "target", "prediction", "p_cured", "p_ill"] and num == len(one.x_test)
        wanted = logits(study, one.x_test).double().sigmoid()
        np.testing.assert_allclose(np.array(found["p_ill"], float), wanted, rtol=1e-5)
        assert found["prediction"] == [NAMES[int(p > 0.5)] for p in wanted]
        assert found["target"] == [NAMES[int(y)] for y in one.y_test]
        hits = np.mean([a == b for a, b in zip(found["prediction"], found["target"], strict=True)])
        assert hits == pytest.approx(record["silos"][silo]["accuracy"])
        lines = (study / ("0.csv" if silo == "a" else "1.csv")).read_text().splitlines()
        assert [lines[int(row) - 1].split(",")[2] for row in found["row"]] == found["target"]


@pytest.mark.parametrize("ending", ["npz", "h5"])
def test_other_formats_and_parts_hold_the_same(study, ending):
    trained(study)
    predict(study / "run", study / "out", part="all")
    done = predict(study / "run", study / "out", part="all", ending=ending, only=["a"])
    found = cells(study / "out" / "a.csv")
    assert list(done) == ["a"] and sorted(map(int, found["row"])) == list(range(2, 32))
    assert found["part"] == ["train"] * 24 + ["test"] * 6
    path = done["a"][0]
    if ending == "npz":
        other = dict(np.load(path))
    else:
        with h5py.File(path) as file:
            other = {name: file[name].asstr()[:] if file[name].dtype == object else file[name][:] for name in file}
    assert other.keys() == found.keys()
    for name, values in found.items():
        assert [str(value) for value in other[name].tolist()] == values
    assert sorted(path.name for path in (study / "out").iterdir()) == sorted(["a.csv", f"a.{ending}", "b%2Fc.csv"])


@pytest.mark.parametrize(
    "values",
    [
        {"local": {"name": "ditto", "lam": 0.1}},
        {"evaluate": {"finetune": {"name": "sgd", "lr": 0.5, "epochs": 3}}},
        {"exchange": {"parameters": ["*weight"]}},
    ],
    ids=["ditto", "finetune", "layers"],
)
def test_a_silo_with_a_personal_model_uses_it(study, values):
    record, data = trained(study, **values)
    for silo, (path, _, own, *_) in predict(study / "run", study / "out").items():
        wanted = logits(study, data[silo].x_test, silo)
        assert own
        np.testing.assert_allclose(np.array(cells(path)["p_ill"], float), wanted.double().sigmoid(), rtol=1e-5)
        hits = np.mean([a == b for a, b in zip(cells(path)["prediction"], cells(path)["target"], strict=True)])
        assert hits == pytest.approx(record["silos"][silo]["personal_accuracy"])


@pytest.mark.parametrize("statistics", ["silo", "pooled"])
def test_new_samples_without_labels_are_prepared_as_in_training(study, statistics):
    trained(study, data={"statistics": statistics})
    predict(study / "run", study / "out", part="all", only=["a"])
    lines = (study / "0.csv").read_text().splitlines()
    (study / "new.csv").write_text(
        "bp,age\n" + "\n".join(",".join(line.split(",")[1::-1]) for line in lines[1:]) + "\n"
    )
    only = ["a"] if statistics == "silo" else []
    done = predict(study / "run", study / "out", data=study / "new.csv", only=only)
    found, of_training = cells(study / "out" / ("new@a.csv" if only else "new.csv")), cells(study / "out" / "a.csv")
    assert list(found) == ["row", "prediction", "p_cured", "p_ill"] and len(done) == 1
    order = [of_training["row"].index(row) for row in found["row"]]
    assert [of_training["prediction"][i] for i in order] == found["prediction"]
    np.testing.assert_allclose(
        [float(of_training["p_ill"][i]) for i in order], [float(p) for p in found["p_ill"]], rtol=1e-5
    )


def test_new_samples_with_labels_keep_them(study, caplog):
    trained(study)
    predict(study / "run", study / "out", part="all", only=["a"])
    of_training = cells(study / "out" / "a.csv")
    (study / "new.csv").write_text((study / "0.csv").read_text())
    given = {"data": study / "new.csv", "only": ["a"]}
    done = predict(study / "run", study / "out", **given)["a"]
    found = cells(done.path)
    assert list(found) == ["row", "target", "prediction", "p_cured", "p_ill"] and not done.replaced
    assert dict(zip(found["row"], found["target"], strict=True)) == dict(
        zip(of_training["row"], of_training["target"], strict=True)
    )
    lines = (study / "0.csv").read_text().replace(",ill,", ",,", 1).splitlines()  # one is not known yet
    (study / "new.csv").write_text("\n".join(lines) + "\n")
    done = predict(study / "run", study / "out", **given)["a"]
    assert list(cells(done.path)) == ["row", "prediction", "p_cured", "p_ill"] and done.replaced
    other = predict(study / "run", study / "out", data=study / "new.csv", only=["b/c"])["b/c"]
    assert other.path == study / "out" / "new@b%2Fc.csv" and not other.replaced and done.path.exists()
    assert "is empty, which is not one of cured, ill; the predictions have no targets" in caplog.text


def told_by(path):
    """What a file of a model says of the preparation of its inputs."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
    elif path.suffix == ".pt":
        about = getattr(torch.load(path, weights_only=True), "_metadata", {}).get("fedmpi", {})
    elif path.suffix == ".torchscript":
        about = {"preparation": ""}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            torch.jit.load(str(path), _extra_files=about)
    else:
        onnx = pytest.importorskip("onnx")
        about = {one.key: one.value for one in onnx.load(str(path)).metadata_props}
    return json.loads(about["preparation"]) if about.get("preparation") else None


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".torchscript", ".onnx"])
def test_an_exported_model_says_how_its_inputs_are_prepared(study, ending, caplog):
    _, data = trained(study)
    results.export(study / "run", study / f"m{ending}", silo="b/c")
    told = told_by(study / f"m{ending}")
    lines = (study / "1.csv").read_text().splitlines()[1:]
    raw = np.array([[cell or "nan" for cell in line.split(",")[:2]] for line in lines], np.float32)
    raw = np.where(np.isnan(raw), told["fill"], raw)
    prepared = ((raw - told["shift"]) / told["width"]).astype(np.float32)
    both = torch.cat([data["b/c"].x_train, data["b/c"].x_test]).numpy()
    assert told["columns"] == ["age", "bp"] and sorted(map(tuple, prepared)) == sorted(map(tuple, both))
    assert "statistics" not in caplog.text
    results.export(study / "run", study / f"m{ending}")
    assert told_by(study / f"m{ending}") is None
    assert "each silo has its own; --silo ID writes that silo's into the file's metadata" in caplog.text


def test_an_exported_model_holds_pooled_statistics_and_no_unknown_ones(study, caplog):
    trained(study, data={"statistics": "pooled"})
    results.export(study / "run", study / "m.pt")
    of_all = told_by(study / "m.pt")
    results.export(study / "run", study / "m.pt", silo="a")
    assert told_by(study / "m.pt") == of_all and of_all["width"] != [1.0, 1.0] and "statistics" not in caplog.text
    trained(study, "other")
    (study / "0.csv").unlink()
    results.export(study / "other", study / "m.pt", silo="a")
    assert told_by(study / "m.pt") is None and "are not in the file: silo 'a': no file" in caplog.text


@pytest.mark.parametrize("given", [{}, {"data": "0.csv", "only": ["a"]}])
def test_predictions_never_replace_samples(study, given):
    (study / "1.csv").rename(study / "0@a.csv")
    trained(study, data={"silos": [{"id": "0", "path": "0.csv"}, {"id": "a", "path": "0@a.csv"}]})
    before = [(study / name).read_bytes() for name in ("0.csv", "0@a.csv")]
    given = {key: study / value if key == "data" else value for key, value in given.items()}
    with pytest.raises(ConfigError, match=r"--to: .*0(@a)?\.csv holds samples, and predictions would replace it"):
        predict(study / "run", study, **given)
    assert [(study / name).read_bytes() for name in ("0.csv", "0@a.csv")] == before


def test_the_command_says_round_and_model(study):
    trained(study)
    words = ["predict", str(study / "run"), "--to", str(study / "out"), "--silo", "a"]
    first, again = (CliRunner().invoke(app, words) for _ in range(2))
    told = f"{study}/out/a.csv: 6 test samples of silo a, predicted by the global model of round 3"
    assert (first.stdout, again.stdout) == (f"{told}\n", f"{told}, in place of an older file\n")


def test_a_file_that_has_changed_since_training_is_told(study, caplog):
    trained(study)
    given = {"data": study / "0.csv", "only": ["b/c"]}
    for changed in (False, True):
        if changed:
            lines = (study / "1.csv").read_text().splitlines()
            (study / "1.csv").write_text("\n".join([lines[0], *("9" + line for line in lines[1:])]) + "\n")
        for how in ({}, given):
            caplog.clear()
            predict(study / "run", study / "out", **how)
            assert ("silo 'b/c': its data, or how they are prepared, differ" in caplog.text) == changed
        caplog.clear()
        results.evaluate(study / "run")
        assert ("silo 'b/c': its data, or how they are prepared, differ" in caplog.text) == changed
        assert "silo 'a'" not in caplog.text


def test_a_silo_that_had_left_by_then_is_one_line(study, monkeypatch):
    trained(study)
    monkeypatch.setattr("fedmpi.predictions.members_of", lambda root, round, comm: {"a"})
    assert list(predict(study / "run", study / "out")) == ["a"]
    with pytest.raises(ConfigError, match="--silo: 'b/c' was no member in round 3"):
        predict(study / "run", study / "out", only=["b/c"])


def test_several_classes_and_numbers(tmp_path):
    draw = np.random.default_rng(0)
    x = draw.standard_normal((40, 3)).astype(np.float32)
    for task, y, num in (("classification", draw.integers(0, 3, 40), 3), ("regression", x[:, :2] * 2, 2)):
        np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:7], y_test=y[:7])
        data = {"name": "files", "root": str(tmp_path), "task": task, "num_classes": num, "shape": [3], "stream": True,
                "silos": [{"id": "a", "path": "a.npz"}]}  # fmt: skip
        local = {"name": "sgd", "lr": 0.1, "epochs": 1}
        how = {"rounds": 1, "out": str(tmp_path / task), "data": data, "model": "logistic", "local": local}
        with fedmpi.Run(build(Config, how), comm=SoloComm()) as run:
            list(run)
            module = run.federation.model.module.eval()
            with torch.no_grad():
                outputs = module(torch.from_numpy(x[:7]))
        np.savez(tmp_path / "new.npz", x=x[:7], y=y[:7])
        done = predict(tmp_path / task, tmp_path / "out", data=tmp_path / "new.npz", ending="npz")[""]
        of_file = dict(np.load(done.path))
        found = dict(np.load(predict(tmp_path / task, tmp_path / "out", ending="npz")["a"][0]))
        assert of_file.keys() == found.keys() and all((of_file[name] == found[name]).all() for name in found)
        assert found["row"].tolist() == list(range(7))
        if task == "classification":
            assert list(found) == ["row", "target", "prediction", "p_0", "p_1", "p_2"]
            np.testing.assert_allclose(np.stack([found[f"p_{i}"] for i in range(3)], 1), outputs.double().softmax(1))
            assert (
                found["prediction"].tolist() == outputs.argmax(1).tolist()
                and found["target"].tolist() == y[:7].tolist()
            )
        else:
            np.testing.assert_allclose(np.stack([found[f"prediction_{i}"] for i in range(2)], 1), outputs)
            np.testing.assert_allclose(found["target_1"], y[:7, 1])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"only": ["c"]}, "no silo 'c'"),
        ({"ending": "xls"}, "--format xls: one of csv, npz, h5"),
        ({"part": "new"}, "--part new: one of test, train, all"),
        ({"which": 9}, "no checkpoint of round 9"),
        ({"data": "new.csv"}, "a silo's statistics of its training samples are needed"),
        ({"data": "nothing.csv", "only": ["a"]}, "no file"),
        ({"data": "0.txt", "only": ["a"]}, "ends in none of"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(study, given, said):
    trained(study)
    (study / "new.csv").write_text("age,bp\n1,2\n")
    (study / "0.txt").write_text("age,bp\n1,2\n")
    given = {key: study / value if key == "data" else value for key, value in given.items()}
    with pytest.raises(ConfigError) as caught:
        predict(study / "run", study / "out", **given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_other_columns_are_refused(study):
    for i in range(2):
        lines = [",".join(line.split(",")[:3]) for line in (study / f"{i}.csv").read_text().splitlines()]
        (study / f"{i}.csv").write_text("\n".join(lines) + "\n")
    trained(study, data={"features": None})
    (study / "new.csv").write_text("age,weight\n60,80\n")
    with pytest.raises(ConfigError, match="has other columns than silo 'a'; name them in"):
        predict(study / "run", study / "out", data=study / "new.csv", only=["a"])
