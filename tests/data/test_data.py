"""Datasets: recipes against published numbers, one clear line for every mistake."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from support.mpi import absent

from fedmpi.catalogue import descriptions
from fedmpi.components import build, hints, to_dict
from fedmpi.data import DATASETS, PARTITIONS, check, digits, fetch, heart_disease, idx, official, shakespeare
from fedmpi.data.fashion_mnist import FashionMnist
from fedmpi.data.files import Files
from fedmpi.data.mnist import Mnist
from fedmpi.data.partition import Labels
from fedmpi.errors import ConfigError, DataMissing

# --- all datasets ---


@pytest.mark.parametrize("cls", [*DATASETS.members.values(), *PARTITIONS.members.values()])
def test_every_field_says_what_it_is_and_goes_through_a_configuration(cls):
    assert set(hints(cls)) <= set(descriptions(cls))
    values = {"silos": [{"id": "a", "path": "a.csv"}], "task": "binary", "shape": [3]} if cls is Files else {}
    made = build(cls, values)
    assert build(cls, to_dict(made)) == made


@pytest.mark.slow
def test_import_is_cheap():
    """Neither the import nor opening digits loads modules that take longer than a short run."""
    code = "import sys, fedmpi.data as d; s = d.DATASETS.build('digits', '').source(0); s.open('silo-0');"
    code += "print(sorted({'sklearn', 'h5py', 'pandas', 'mpi4py'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stderr.strip(), done.stdout.strip()) == ("", "[]")


# --- digits ---


def test_digits_are_scikit_learns_and_their_test_set_is_the_same_for_every_seed(monkeypatch):
    pixels, y = digits.load()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    of_package = digits.load.__wrapped__()
    assert np.array_equal(pixels, of_package[0]) and np.array_equal(y, of_package[1])
    assert not (pixels.flags.writeable or y.flags.writeable)  # all runs of a process share them
    monkeypatch.undo()

    def opened(run_seed, **fields):
        source = DATASETS.build({"name": "digits", **fields}, "data").source(run_seed)
        return source, [source.open(silo.id) for silo in source.silos]

    source, data = opened(0, silos=12, partition={"name": "dirichlet", "alpha": 0.5})
    assert source.central and source.task == "classification" and source.num_classes == 10
    assert [s.id for s in source.silos] == sorted(s.id for s in source.silos) and source.silos[1].id == "silo-01"
    assert [s.num_samples for s in source.silos] == [len(d.x_train) for d in data]
    assert all(d.x_train.shape[1:] == source.shape == (1, 8, 8) for d in data)
    assert all((d.x_train.dtype, d.y_train.dtype) == (torch.float32, torch.int64) for d in data)
    x = torch.cat([torch.cat([d.x_train, d.x_test]) for d in data])
    assert sorted(x.flatten(1).mul(16).int().tolist()) == sorted(pixels.tolist())
    pooled = sorted(torch.cat([d.x_test for d in data]).flatten(1).tolist())
    assert len(pooled) == 359 and pooled == sorted(torch.cat([d.x_test for d in opened(5)[1]]).flatten(1).tolist())
    assert torch.equal(opened(1, seed=7)[1][0].x_train, opened(2, seed=7)[1][0].x_train)
    assert not torch.equal(opened(1)[1][0].x_train, opened(2)[1][0].x_train)


# --- mnist and fashion_mnist ---


@pytest.mark.parametrize(
    ("cls", "labels"), [(FashionMnist, [9, 2, 1, 1, 6, 1, 4, 6]), (Mnist, [7, 2, 1, 0, 4, 1, 4, 9])]
)
def test_images_are_all_there_and_standardised(root, cls, labels):
    if not (root / cls.folder).is_dir():
        absent("data", f"no {cls.folder}/ in {root}")
    source = cls(root=root, silos=3, partition=Labels(labels=4)).source(0)
    data = source.open("silo-1")
    assert len(data.y_train.unique()) == len(data.y_test.unique()) == 4
    assert sum(s.num_samples or 0 for s in source.silos) == 60_000 and source.silos[1].num_samples == len(data.x_train)
    whole = cls(root=root, silos=1).source(0).open("silo-0")
    assert whole.x_test.shape == (10_000, 1, 28, 28) and whole.x_train.dtype == torch.float32
    assert abs(whole.x_train.mean().item()) < 1e-3 and abs(whole.x_train.std().item() - 1) < 1e-3
    assert whole.y_test[:8].tolist() == labels


@pytest.mark.parametrize("cls", [FashionMnist, Mnist])
def test_a_set_of_idx_files_reads_its_own_folder(tmp_path, cls):
    rng, folder = np.random.default_rng(0), tmp_path / cls.folder
    folder.mkdir()
    y, x = rng.integers(10, size=40).astype(np.uint8), rng.integers(256, size=(40, 28, 28)).astype(np.uint8)
    for part in ("train", "t10k"):
        for file, values in ((f"{part}-labels-idx1-ubyte.gz", y), (f"{part}-images-idx3-ubyte.gz", x)):
            head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
            (folder / file).write_bytes(gzip.compress(head + values.tobytes()))
    data = cls(root=tmp_path, silos=1).source(0).open("silo-0")
    assert data.y_train.tolist() == data.y_test.tolist() == y.tolist()
    np.testing.assert_allclose(data.x_train[:, 0].numpy(), (x / 255 - cls.mean) / cls.std, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=f"{cls.folder}: .* has MD5 .* the official one MD5"):
        official.verify(cls.folder, tmp_path)


def test_the_checksum_of_what_is_packed_does_not_depend_on_the_packer(tmp_path):
    for level in (1, 9):
        (tmp_path / f"{level}.gz").write_bytes(gzip.compress(b"digits" * 999, level))
    md5 = hashlib.md5(b"digits" * 999).hexdigest()
    assert [official.md5_of(tmp_path / f"{level}.gz", unpacked=True) for level in (1, 9)] == [md5, md5]
    assert official.md5_of(tmp_path / "1.gz") != official.md5_of(tmp_path / "9.gz")
    for torn in ((tmp_path / "1.gz").read_bytes()[:-9], b"html", b""):
        (tmp_path / "torn.gz").write_bytes(torn)
        assert official.md5_of(tmp_path / "torn.gz", unpacked=True) != md5


def test_a_torn_idx_file_is_said_by_name(tmp_path):
    good = b"\0\0\x08\x01\0\0\0\x03abc"
    for content in (gzip.compress(good)[:-9], gzip.compress(good + b"d"), gzip.compress(b"\0\0"), b"html"):
        (tmp_path / "x.gz").write_bytes(content)
        with pytest.raises(ConfigError, match=r"x\.gz is (damaged|not an IDX)"):
            idx.read_idx(tmp_path / "x.gz", "mnist")
    (tmp_path / "x.gz").write_bytes(gzip.compress(good))
    assert idx.read_idx(tmp_path / "x.gz", "mnist").tolist() == [97, 98, 99]


# --- heart_disease ---


def test_heart_split_is_scikit_learns(root):
    from sklearn.model_selection import train_test_split

    rng = np.random.default_rng(0)
    labels = [heart_disease.read(root / "heart_disease" / file)[1] for file, _ in heart_disease.HOSPITALS.values()]
    labels += [rng.random(n) < p for n in range(20, 60) for p in (0.2, 0.5)]
    for y in labels:
        strata = y if min(y.sum(), (~y).sum()) > 2 else None
        theirs = train_test_split(
            np.arange(len(y)), test_size=1 - 0.66, train_size=0.66, random_state=43, shuffle=True, stratify=strata
        )
        for ours, other in zip(heart_disease.shuffle_split(y), theirs, strict=True):
            assert np.array_equal(np.sort(ours), np.sort(other))


def test_heart_opens_one_hospital_at_a_time(root, tmp_path):
    source = heart_disease.HeartDisease(root=tmp_path).source(0)
    assert [(s.id, s.num_samples) for s in source.silos] == [
        ("cleveland", 199), ("hungary", 172), ("switzerland", 30), ("longbeach", 85),
    ]  # fmt: skip
    (tmp_path / "heart_disease").mkdir()
    file = "processed.hungarian.data"
    (tmp_path / "heart_disease" / file).write_bytes((root / "heart_disease" / file).read_bytes())
    data = source.open("hungary")
    assert data.x_train.shape == (172, 13) and data.y_test.shape == (89,) and data.y_train.dtype == torch.float32
    with pytest.raises(
        DataMissing, match=r"processed\.cleveland\.data in .*`fedmpi data fetch heart_disease`.*MD5 2d91"
    ):
        source.open("cleveland")
    (tmp_path / "heart_disease" / file).write_text("<html>no</html>")
    with pytest.raises(ConfigError, match="is not as UCI has it"):
        source.open("hungary")


def test_with_fixed_preprocessing_no_record_changes_another(tmp_path):
    draw = np.random.default_rng(0)
    rows = np.round(draw.uniform(0, 200, (130, 14)))
    rows[:, -1] = draw.integers(2, size=130)
    other = rows.copy()
    other[3] = 7.0  # features and label of one record
    other[3, -1] = 1 - rows[3, -1]
    found = {}
    for normalise in ("fixed", "fitted"):
        for i, table in enumerate((rows, other)):
            folder = tmp_path / f"{normalise}{i}" / "heart_disease"
            folder.mkdir(parents=True)
            np.savetxt(folder / "processed.va.data", table, delimiter=",")
            data = heart_disease.HeartDisease(root=folder.parent, normalise=normalise).source(0).open("longbeach")
            assert isinstance(data.x_train, torch.Tensor) and isinstance(data.x_test, torch.Tensor)
            found[normalise, i] = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
    differ = {how: int((found[how, 0][0] != found[how, 1][0]).any(1).sum()) for how in ("fixed", "fitted")}
    assert differ["fixed"] == int((found["fixed", 0][1] != found["fixed", 1][1]).sum()) == 1
    assert differ["fitted"] > 100


@pytest.mark.parametrize("seed", [42, 43, 44, 45, 46])
def test_heart_reaches_the_published_federated_averaging(root, seed):
    """Plain numpy FedAvg in float64: 15 rounds of 100 batches; stored weights, and the published accuracies."""
    source = heart_disease.HeartDisease(root=root).source(0)
    data = [[t.numpy().astype(float) for t in source.open(silo.id)] for silo in source.silos]
    n_K = np.array([len(x_train) for x_train, *_ in data])
    with np.load(root / "flamby_heart" / "heart_traces.npz") as traces:
        w = traces[f"{seed}|init"].astype(float)
        expected = traces[f"{seed}|FedAvg100|w"]
        batches = []
        for c in range(4):
            ends = np.cumsum(traces[f"{seed}|FedAvg100|bs{c}"].astype(int))
            batches.append(np.split(traces[f"{seed}|FedAvg100|order{c}"].astype(int), ends)[:1500])
    for r in range(15):
        local = []
        for c, (x, y, _, _) in enumerate(data):
            v = w.copy()
            for rows in batches[c][100 * r : 100 * (r + 1)]:
                error = 1 / (1 + np.exp(-(x[rows] @ v[:13] + v[13]))) - y[rows]
                v -= 0.001 * np.append(error @ x[rows], error.sum()) / len(rows)
            local.append(v)
        w = n_K @ np.array(local) / n_K.sum()
    assert np.abs(w - expected).max() < 5e-6
    with (root / "flamby_heart" / f"heart_seed{seed}.csv").open(newline="") as file:
        published = {r["Test"]: float(r["Metric"]) for r in csv.DictReader(file) if r["Method"] == "FedAvg100"}
    for c, (_, _, x, y) in enumerate(data):
        assert ((x @ w[:13] + w[13] > 0) == y).mean() == pytest.approx(published[f"client_test_{c}"], abs=1e-9)


# --- shakespeare ---


def test_shakespeare_predicts_the_next_character_of_each_speaker(root):
    text = (root / "tinyshakespeare" / "input.txt").read_text()
    assert "".join(sorted(set(text))) == shakespeare.VOCABULARY
    spoken = shakespeare.speeches(text)
    assert (len(spoken), sum(map(len, spoken.values()))) == (
        298,
        7097,
    )  # 299 names, one of them twice ("LADY  CAPULET")
    source = shakespeare.Shakespeare(root=root).source(0)
    assert (len(source.silos), source.silos[0].id, source.num_classes) == (35, "GLOUCESTER", 65)
    assert source.central and source.task == "next_token" and source.shape == (80,)
    for silo in source.silos:
        data, said = source.open(silo.id), "\n".join(spoken[silo.id])
        assert len(data.x_train) == silo.num_samples and torch.equal(data.x_train[:, 1:], data.y_train[:, :-1])
        border = len(said) - int(0.1 * len(said))
        first, last = ("".join(shakespeare.VOCABULARY[i] for i in y) for y in (data.y_train[0], data.y_test[0]))
        assert first == said[1:81] and last == said[border + 1 : border + 81]
        assert 80 * silo.num_samples + 1 <= border < 80 * (silo.num_samples + 1) + 1
    few = shakespeare.Shakespeare(root=root, silos=2, length=20, stride=5, test_fraction=0).source(0)
    data = few.open(few.silos[1].id)
    assert (
        len(few.silos) == 2 and data.x_test.shape == (0, 20) and torch.equal(data.x_train[0, 5:], data.x_train[1, :-5])
    )
    assert len(shakespeare.Shakespeare(root=root, min_chars=1, length=1, silos=200).source(0).silos) == 200


def test_shakespeare_says_what_does_not_fit(root):
    with pytest.raises(ConfigError, match="no speaker has 50000 characters"):
        shakespeare.Shakespeare(root=root, min_chars=50_000).source(0)
    with pytest.raises(ConfigError, match=r"silo \S+ has no samples"):
        shakespeare.Shakespeare(root=root, min_chars=100, length=200).source(0)
    with pytest.raises(ConfigError, match="'é' is not one of the 65 symbols"):
        shakespeare.encode("né")
    with pytest.raises(ConfigError, match="'…' is not one"):
        shakespeare.encode("n…")


# --- files ---

X, Y = np.arange(40, dtype=np.float32).reshape(20, 2), np.arange(20) % 3


def write(path, **arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".csv":
        x, y = arrays["x"], arrays["y"]
        names = [*(f"f{i}" for i in range(x.shape[1])), "target"]
        lines = [",".join(names), *(",".join(map(str, [*row, label])) for row, label in zip(x, y, strict=True))]
        path.write_text("\n".join(lines) + "\n\n")
    else:
        with h5py.File(path, "w") as file:
            for key, value in arrays.items():
                file[key] = value


def files(root, path="a.npz", **fields):
    fields = {"task": "classification", "shape": [2], "num_classes": 3, "root": root} | fields
    silos = fields.pop("silos", [{"id": "a", "path": path}])
    return build(Files, {"silos": silos, **fields}, "data", "dataset 'files'")


@pytest.mark.parametrize("path", ["a.npz", "a.h5", "a.csv"])
def test_files_in_every_format_make_their_test_part_from_the_silos_id(tmp_path, path):
    write(tmp_path / path, x=X, y=Y)
    write(tmp_path / f"b{path}", x=X, y=Y)
    silos = [{"id": "a", "path": path}, {"id": "b", "path": f"b{path}", "host": "n1", "num_samples": 16}]
    silos.append({"id": "c", "path": "nowhere.h5"})
    source = files(tmp_path, silos=silos).source(0)
    assert [(s.id, s.host, s.num_samples) for s in source.silos] == [
        ("a", None, None),
        ("b", "n1", 16),
        ("c", None, None),
    ]
    a, b, again = source.open("a"), source.open("b"), files(tmp_path, silos=silos).source(9).open("a")
    assert (len(a.x_train), len(a.x_test)) == (16, 4) and torch.equal(a.x_test, again.x_test)
    assert not torch.equal(a.x_test, b.x_test)
    assert sorted(torch.cat([a.x_train, a.x_test]).tolist()) == X.tolist()
    assert torch.equal(a.y_train, (a.x_train[:, 0] / 2).long() % 3) and a.y_train.dtype == torch.int64
    with pytest.raises(DataMissing, match=r"silo 'c': no file .*nowhere\.h5"):
        source.open("c")


@pytest.mark.parametrize("path", ["a.npz", "a.h5"])
def test_files_with_a_test_part_keep_it(tmp_path, path):
    write(tmp_path / path, x_train=X, y_train=Y, x_test=X[:3], y_test=Y[:3])
    data = files(tmp_path, path).source(0).open("a")
    assert torch.equal(data.x_train, torch.from_numpy(X)) and data.y_test.tolist() == [0, 1, 2]


def test_csv_columns_are_found_by_name_and_levels_are_the_configurations(tmp_path):
    fields = {"shape": [4], "task": "binary", "num_classes": None, "target": "sick", "classes": ["no", "yes"]}
    fields |= {"levels": {"pain": [1, "none"]}, "test_fraction": 0}
    (tmp_path / "a.csv").write_text("age,pain,sick,bp\n50,1.0,yes,7\n60,none,no,8\n")
    (tmp_path / "b.csv").write_text("sick,bp,age,pain\nyes,7,50,1\nno,8,60,none\n")
    silos = [{"id": i, "path": f"{i}.csv"} for i in "ab"]
    source = files(tmp_path, silos=silos, **fields).source(0)
    for silo in "ab":
        data = source.open(silo)
        assert data.x_train.tolist() == [[50, 7, 1, 0], [60, 8, 0, 1]]
        assert data.y_train.tolist() == [1, 0] and data.y_train.dtype == torch.float32 and len(data.x_test) == 0
    chosen = files(tmp_path, silos=silos, **fields | {"features": ["bp"], "shape": [3]}).source(0).open("b")
    assert chosen.x_train.tolist() == [[7, 1, 0], [8, 0, 1]]


def test_regression_and_next_token(tmp_path):
    write(tmp_path / "a.npz", x=X, y=X * 2)
    data = files(tmp_path, task="regression", num_classes=2).source(0).open("a")
    assert torch.equal(data.y_train, 2 * data.x_train)
    write(tmp_path / "a.npz", x=X, y=X[:, :1])
    assert files(tmp_path, task="regression", num_classes=1).source(0).open("a").y_train.shape == (16,)
    write(tmp_path / "a.npz", x=X.astype(int), y=X.astype(int))
    data = files(tmp_path, task="next_token", num_classes=40).source(0).open("a")
    assert data.x_train.dtype == torch.int64 and data.y_train.shape == (16, 2)
    with pytest.raises(ConfigError, match=r"x: symbol 39 is not a whole number from 0 to 38"):
        files(tmp_path, task="next_token", num_classes=39).source(0).open("a")


NAN = np.where(X == 3, np.nan, X)


@pytest.mark.parametrize(
    ("path", "arrays", "fields", "says"),
    [
        ("a.npz", {"x": X}, {}, "has no 'y' "),
        ("a.h5", {"x_train": X, "y_train": Y, "y_test": Y}, {}, "has no 'x_test' "),
        ("a.h5", {"images": X}, {}, "has no 'x_train', 'y_train'"),
        ("a.npz", {"x": X[:, :1], "y": Y}, {}, r"x have shape \[1\], data.shape is \[2\]"),
        ("a.npz", {"x": X, "y": Y[:7]}, {}, r"x has 20 samples, but y has shape \[7\]"),
        ("a.npz", {"x_train": X, "y_train": Y[:7], "x_test": X, "y_test": Y}, {}, "20 samples, but y_train has"),
        ("a.npz", {"x": X, "y": np.stack([Y, Y], 1)}, {}, r"y has shape \[2\] per sample, not \[\]"),
        ("a.npz", {"x": X[:0], "y": Y[:0]}, {}, "silo 'a' has no samples"),
        ("a.npz", {"x": NAN, "y": Y}, {"test_fraction": 0}, r"x has NaN or infinite values in 1 of 20 .*x\[1\]"),
        ("a.npz", {"x": X, "y": NAN}, {"task": "regression", "num_classes": 2, "test_fraction": 0}, "NaN or inf"),
        ("a.npz", {"x": X, "y": Y}, {"num_classes": 2}, "label 2 is not a whole number from 0 to 1"),
        ("a.npz", {"x": X, "y": Y - 1}, {}, "label -1 is not a whole number from 0 to 2"),
        ("a.npz", {"x": X, "y": Y + 0.5}, {}, "label 0.5 is not a whole number"),
        ("a.npz", {"x": X, "y": Y}, {"task": "binary", "num_classes": 1}, "label 2 is not a whole number from 0 to 1"),
        ("a.csv", {"x": X, "y": Y}, {"target": "targte"}, "no column 'targte' .*; did you mean 'target'"),
        ("a.csv", {"x": NAN, "y": Y}, {}, "column 'f1': line 3 is 'nan'; missing values are not filled in"),
        ("a.csv", {"x": X, "y": ["b"] * 20}, {"num_classes": None, "classes": ["a", "c"]}, "'b'.* not one of a, c"),
        ("a.csv", {"x": X, "y": ["b"] * 20}, {}, "'target': line 2 is 'b'.*need data.classes"),
        ("a.csv", {"x": np.array([["a", 1]]), "y": [1]}, {}, "column 'f0': line 2 is 'a'; .* into data.levels"),
        ("a.csv", {"x": X, "y": Y}, {"levels": {"f1": [1, 2]}}, "column 'f1': line 3 is '3.0', .* not one of 1, 2"),
        ("a.npz", {"x": X, "y": Y}, {"silos": [{"id": "a", "path": "a.npz", "num_samples": 9}]}, "declares 9 .* 16"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_said_in_one_line(tmp_path, path, arrays, fields, says):
    write(tmp_path / path, **arrays)
    source = files(tmp_path, path, **fields).source(0)
    with pytest.raises(ConfigError, match=says) as caught:
        source.open("a")
    assert "silo 'a'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"silos": []}, "at least one silo"),
        ({"silos": [{"id": "a", "path": "a.h5"}] * 2}, "two silos are called 'a'"),
        ({"path": "a.xlsx"}, r"ends in none of \.h5"),
        ({"num_classes": None}, "needs num_classes or classes"),
        ({"task": "binary"}, "num_classes of a binary task is 1"),
        ({"classes": [1, 2]}, "num_classes is 3, but classes has 2"),
        ({"task": "binary", "num_classes": None, "classes": [1, 2, 3]}, "two classes, not 3"),
    ],
)
def test_files_that_contradict_themselves_are_refused_at_the_door(tmp_path, fields, says):
    with pytest.raises(ConfigError, match=says):
        files(tmp_path, **fields)


def test_unreadable_files(tmp_path):
    for path in ("a.npz", "a.h5"):
        (tmp_path / path).write_text("neither")
        with pytest.raises(ConfigError, match="cannot be read as"):
            files(tmp_path, path).source(0).open("a")
    (tmp_path / "a.csv").write_text("f0,f1,target\n1,2,0\n1,2\n")
    with pytest.raises(ConfigError, match="2 cells in line 3, its header 3"):
        files(tmp_path, "a.csv").source(0).open("a")


# --- where files lie ---


def test_root_is_the_field_else_the_environment_else_data(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDMPI_DATA", str(tmp_path / "environment"))
    assert official.root_of(tmp_path) == tmp_path and official.root_of(None) == tmp_path / "environment"
    monkeypatch.delenv("FEDMPI_DATA")
    assert official.root_of(None) == Path("data")


def test_fetch_names_a_file_only_when_its_checksum_is_right(monkeypatch, tmp_path):
    site, root = tmp_path / "site", tmp_path / "root"
    site.mkdir()
    (site / "input.txt").write_text("to be")
    md5 = hashlib.md5((site / "input.txt").read_bytes()).hexdigest()
    urls = ((site / "gone.txt").as_uri(), (site / "input.txt").as_uri())
    monkeypatch.setitem(official.FILES, "shakespeare", {"input.txt": official.Official(md5, urls)})
    target = root / "tinyshakespeare" / "input.txt"
    assert fetch("shakespeare", root) == [target] and target.read_text() == "to be"
    (site / "input.txt").write_text("not to be")
    assert fetch("shakespeare", root) == [target]  # already right: nothing is read
    target.write_text("torn")
    with pytest.raises(ConfigError, match=r"has MD5 .* the official one"):
        official.verify("shakespeare", root)
    with pytest.raises(DataMissing, match=rf"put them there: {target} .*gone.txt or .*input.txt, MD5 {md5}") as caught:
        fetch("shakespeare", root)
    assert "MD5 " in str(caught.value) and [p.name for p in target.parent.iterdir()] == ["input.txt"]
    assert target.read_text() == "torn"
    with pytest.raises(ConfigError, match="did you mean 'heart_disease'"):
        fetch("heart_diseas", root)


@pytest.mark.parametrize("name", ["fashion_mnist", "mnist", "shakespeare"])
def test_missing_data_says_what_to_do(tmp_path, name):
    dataset = DATASETS.build({"name": name, "root": tmp_path}, "data")
    with pytest.raises(
        DataMissing, match=rf"{name}: no \S+ in {tmp_path}.*`fedmpi data fetch {name}`.*official: http.*MD5"
    ):
        dataset.source(0)


def test_check_gives_a_row_per_silo_and_verifies(root, tmp_path):
    for name, official_files in official.FILES.items():
        if name == "mnist" and not (root / name).is_dir():
            absent("data", f"no mnist/ in {root}")
        assert all((official.folder_of(root, name) / file).is_file() for file in official_files)
        official.verify(name, root)
    rows = check(heart_disease.HeartDisease(root=root))
    assert [row[:3] for row in rows] == [
        ("cleveland", 199, 104), ("hungary", 172, 89), ("switzerland", 30, 16), ("longbeach", 85, 45),
    ]  # fmt: skip
    assert rows[0].targets == "0:108 1:91"
    assert check(digits.Digits(silos=1))[0].targets.startswith("0:142 1:146")
    write(tmp_path / "a.npz", x=X, y=X[:, 0])
    silos = [{"id": "a", "path": "a.npz"}, {"id": "b", "path": "elsewhere.npz"}]
    dataset = files(tmp_path, silos=silos, task="regression", num_classes=1, test_fraction=0)
    assert check(dataset, only={"a"}) == [("a", 20, 0, "mean 19")]
    with pytest.raises(DataMissing, match="silo 'b'"):
        check(dataset)


def test_check_finds_a_file_that_was_changed(root, tmp_path):
    (tmp_path / "tinyshakespeare").mkdir()
    text = (root / "tinyshakespeare" / "input.txt").read_text()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text(text[:-1])
    with pytest.raises(ConfigError, match="has MD5"):
        check(shakespeare.Shakespeare(root=tmp_path))
