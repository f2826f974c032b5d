"""Parquet files and folders of images as silos."""

import numpy as np
import pytest
import torch

from fedmpi.components import build
from fedmpi.data.files import Files
from fedmpi.errors import ConfigError

# ---------------------------------------------------------------- Parquet

TABLE = {
    "bp": [130.5, None, 110.25, 120.1],
    "age": [60, 50, 40, 30],
    "id": [2**60 + 1, 2, 3, 4],
    "sex": ["f", "m", "f", "m"],
    "died": ["yes", "no", "no", "yes"],
}
FIELDS = {"task": "binary", "shape": [4], "target": "died", "classes": ["no", "yes"], "features": ["age", "bp"],
          "levels": {"sex": ["f", "m"]}, "test_fraction": 0}  # fmt: skip


def opened(root, name, **fields):
    fields = {"root": root, "silos": [{"id": "a", "path": name}]} | fields
    return build(Files, fields, "data", "dataset 'files'").source(0).open("a")


def parquet(root, table):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(table), root / "a.parquet")


def test_a_parquet_file_is_read_as_the_same_csv(tmp_path):
    parquet(tmp_path, TABLE)
    rows = [",".join("" if value is None else str(value) for value in row) for row in zip(*TABLE.values(), strict=True)]
    (tmp_path / "a.csv").write_text("\n".join([",".join(TABLE), *rows]) + "\n")
    for fields in (FIELDS, {**FIELDS, "levels": {"id": [2**60 + 1, 2, 3, 4], "sex": ["f", "m"]}, "shape": [8]}):
        of_parquet, of_csv = (opened(tmp_path, f"a.{end}", missing="mean", **fields) for end in ("parquet", "csv"))
        assert torch.equal(of_parquet.x_train, of_csv.x_train) and torch.equal(of_parquet.y_train, of_csv.y_train)
    assert of_csv.x_train[:, 0].tolist() == [60, 50, 40, 30]


@pytest.mark.parametrize(
    ("change", "fields", "said"),
    [
        ({}, {}, "column 'bp': row 1 is empty; missing values are not filled in: give a number, set data.missing"),
        ({"bp": [1.0, 2, 3, float("inf")]}, {}, "column 'bp': row 3 is 'inf'; every cell must be"),
        ({"bp": ["x", "1", "2", "3"]}, {}, "column 'bp': row 0 is 'x'"),
        ({"bp": [1.0, 2, 3, 4], "sex": ["f", "m", "x", "m"]}, {}, "column 'sex': row 2 is x, which is not one of f, m"),
        ({"bp": [1.0, 2, 3, 4], "died": ["yes", "no", "no", "?"]}, {}, "which is not one of no, yes"),
        ({}, {"features": ["age", "weight"]}, "has no column 'weight'"),
        ({}, {"stream": True}, "a.parquet cannot be streamed"),
    ],
)
def test_what_is_wrong_in_a_parquet_file_is_one_line(tmp_path, change, fields, said):
    parquet(tmp_path, {**TABLE, **change})
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, "a.parquet", **{**FIELDS, **fields})
    assert said in str(caught.value).replace("'x', which", "x, which") and "\n" not in str(caught.value)


def test_a_file_that_is_not_parquet_and_a_missing_package_are_one_line(tmp_path, monkeypatch):
    parquet(tmp_path, TABLE)
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match=r"a.parquet cannot be read as .parquet"):
        opened(tmp_path, "a.parquet", **FIELDS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(ConfigError, match=r"Parquet needs another package: pip install 'fedmpi\[parquet\]'"):
        opened(tmp_path, "a.parquet", **FIELDS)


# ---------------------------------------------------------------- images

IMAGES = {"task": "classification", "shape": [3, 4, 6], "classes": ["cat", "dog", "owl"], "test_fraction": 0}


def picture(path, seed, size=(6, 4), mode="RGB"):
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    depth = (3,) if mode == "RGB" else ()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *depth), np.uint8)
    image.fromarray(pixels).save(path)
    return pixels


def deep(path, dtype):
    pytest.importorskip("PIL.Image").fromarray(np.full((4, 6), 300, dtype)).save(path)


def stacked(path):
    image = pytest.importorskip("PIL.Image")
    first, second = (image.fromarray(np.full((4, 6), grey, np.uint8)) for grey in (10, 20))
    first.save(path, save_all=True, append_images=[second])


def test_a_silo_that_lacks_a_class_numbers_the_others_alike(tmp_path):
    pixels = {name: picture(tmp_path / "a" / name, i) for i, name in enumerate(["owl/1.png", "owl/0.png", "cat/9.bmp"])}
    (tmp_path / "a" / "owl" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "owl" / "._0.png").write_bytes(b"what a file browser leaves")
    data = opened(tmp_path, "a", **IMAGES)
    assert data.y_train.tolist() == [0, 2, 2] and data.x_train.dtype == torch.float32
    for x, name in zip(data.x_train, ["cat/9.bmp", "owl/0.png", "owl/1.png"], strict=True):
        np.testing.assert_array_equal(x.numpy(), pixels[name].transpose(2, 0, 1).astype(np.float32) / np.float32(255))


def test_folders_train_and_test_and_grey_images(tmp_path):
    for part, num in (("train", 3), ("test", 2)):
        for i in range(num):
            picture(tmp_path / "a" / part / ("dog" if i else "cat") / f"{i}.png", i, mode="L")
    data = opened(tmp_path, "a", **{**IMAGES, "shape": [1, 4, 6], "scale": "standard"})
    assert data.y_train.tolist() == [0, 1, 1] and data.y_test.tolist() == [0, 1]
    assert data.x_train.shape == (3, 1, 4, 6) and data.x_train.mean().abs() < 1e-6


@pytest.mark.parametrize(
    ("plant", "fields", "said"),
    [
        (lambda p: picture(p / "cow" / "1.png", 0), {}, "folder 'cow', which is not one of data.classes: cat"),
        (lambda p: picture(p / "cat" / "2.png", 0, (5, 4)), {}, "a/cat/2.png has 4 x 5 pixels, data.shape is"),
        (lambda p: (p / "cat" / "2.png").write_bytes(b"x"), {}, "a/cat/2.png is no image that can be read"),
        (lambda p: deep(p / "cat" / "2.png", np.uint16), {}, "a/cat/2.png has more than 8 bits a value (mode I;16)"),
        (lambda p: deep(p / "cat" / "2.tif", np.float32), {}, "a/cat/2.tif has more than 8 bits a value (mode F)"),
        (lambda p: stacked(p / "cat" / "2.tif"), {}, "a/cat/2.tif holds 2 images, and one file is one sample"),
        (lambda p: (p / "cat" / "1.png").unlink(), {}, "has no samples for training"),
        (lambda p: None, {"shape": [2, 4, 6]}, "images have a shape of [1 or 3, height, width]"),
        (lambda p: None, {"stream": True}, "cannot be streamed"),
        (lambda p: None, {"classes": None, "num_classes": 3}, "a ends in none of"),
        (lambda p: None, {"silos": [{"id": "a", "path": "b"}]}, "no file"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_folder_is_one_line(tmp_path, plant, fields, said):
    picture(tmp_path / "a" / "cat" / "1.png", 0)
    plant(tmp_path / "a")
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, "a", **{**IMAGES, **fields})
    assert said in str(caught.value) and "\n" not in str(caught.value)
