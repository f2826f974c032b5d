"""Invalid silo files: one line that names the silo, the file, the place in it and the remedy."""

import contextlib
import os
import warnings

import h5py
import numpy as np
import pytest
import torch

from fedmpi.components import build
from fedmpi.data.files import Files
from fedmpi.errors import ConfigError, DataMissing

CSV = "age,bp,target\n1,2,0\n3,4,1\n5,6,1\n"
X, Y = np.arange(8.0).reshape(4, 2), np.array([0, 1, 0, 1])


def write(path, content):
    if isinstance(content, (str, bytes)):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    else:
        with h5py.File(path, "w") as file:
            for key, value in content.items():
                file[key] = value


def opened(root, name, content, **fields):
    """The samples of the only silo of a dataset, all of it for training."""
    write(root / name, content)
    fields = {"task": "binary", "shape": [2], "test_fraction": 0, "silos": [{"id": "a", "path": name}]} | fields
    return build(Files, {"root": root, **fields}, "data", "dataset 'files'").source(0).open("a")


def refusal(*given, **fields):
    with pytest.raises(ConfigError) as caught:
        opened(*given, **fields)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


# ---------------------------------------------------------------- CSV

SAYS = [
    ("renamed", CSV.replace("bp", "blood"), {"features": ["age", "bp"]}, "has no column 'bp'; other columns: blood"),
    ("renamed a little", CSV.replace("bp", "bP"), {"features": ["age", "bp"]}, "no column 'bp'; did you mean 'bP'?"),
    (
        "two renamed",
        CSV.replace("age,bp", "u,v"),
        {"features": ["age", "bp"]},
        "no columns 'age', 'bp'; other columns: u, v",
    ),
    ("target renamed", CSV.replace("target", "died"), {}, "no column 'target' (data.target)"),
    (
        "one too many",
        CSV.replace("bp,", "bp,sex,").replace("4,1", "4,0,1").replace("2,0", "2,1,0").replace("6,1", "6,1,1"),
        {},
        "samples of x have shape [3] (age, bp, sex), data.shape is [2]",
    ),
    ("two of a name", CSV.replace("bp", "age"), {}, "columns 1, 2 are all called 'age'; rename"),
    ("no name", CSV.replace("age", ""), {}, "has no name for its column 1 (an index, as pandas writes it?"),
    ("empty cell", CSV.replace("3,4", "3,"), {}, "column 'bp': line 3 is empty; missing values are not filled in"),
    ("NaN", CSV.replace("3,4", "3,NaN"), {}, "column 'bp': line 3 is 'NaN'; missing values are not filled in"),
    ("n/a", CSV.replace("3,4", "n/a,4"), {}, "column 'age': line 3 is 'n/a'; missing values are not filled in"),
    (
        "two columns",
        CSV.replace("3,4", "NA,?"),
        {},
        "column 'age': line 3 is 'NA'; column 'bp': line 3 is '?'; missing",
    ),
    ("typing error", CSV.replace("3,4", "3,4o"), {}, "column 'bp': line 3 is '4o'; every cell must be a finite number"),
    ("inf", CSV.replace("3,4", "inf,4"), {}, "column 'age': line 3 is 'inf'; every cell must be a finite number"),
    ("beyond float32", CSV.replace("3,4", "1e39,4"), {}, "column 'age': line 3 is '1e39'; every cell"),
    (
        "text",
        "sex,bp,target\nf,2,0\nm,4,1\n",
        {},
        "column 'sex': line 2 is 'f', line 3 is 'm'; a column of text goes into",
    ),
    ("thirty", "age,bp,target\n" + "1,x,0\n" * 30, {}, "line 3 is 'x', line 4 is 'x' (30 cells of 30)"),
    (
        "other level",
        "sex,bp,target\nf,2,0\nx,4,1\n",
        {"levels": {"sex": ["f", "m"]}, "shape": [3]},
        "column 'sex': line 3 is 'x', which is not one of f, m",
    ),
    (";", CSV.replace(",", ";"), {}, """has ';' between its columns, not ','; set data.separator: ";\""""),
    ("tab", CSV.replace(",", "\t"), {}, r"has a tab between its columns, not " "','" r'; set data.separator: "\t"'),
    (
        "decimal comma",
        CSV.replace(",", ";").replace("3;", "3,5;"),
        {"separator": ";"},
        "line 3 is '3,5'; write a decimal point",
    ),
    ("no header", "1,2,0\n3,4,1\n", {}, "begins with numbers; its first line must name the columns"),
    ("header only", "age,bp,target\n", {}, "has a header line and no rows"),
    ("empty", "", {}, "is empty"),
    ("blanks", "\n  \n", {}, "is empty"),
    ("cells missing", CSV.replace("3,4,1", "3,4"), {}, "has 2 cells in line 3, its header 3"),
    ("empty line of a spreadsheet", CSV + ",,\n", {}, "has only empty cells in line 5; leave the line out"),
    ("open quote", CSV.replace("4", '"4'), {}, "cannot be read as CSV at line 4: unexpected end of data"),
    ("latin-1", CSV.encode() + "é,2,1\n".encode("latin-1"), {}, "is not UTF-8 in line 5 (byte 0xe9)"),
    ("UTF-16", CSV.encode("utf-16"), {}, "is UTF-16; save it as UTF-8"),
    ("spreadsheet", b"PK\x03\x04...", {}, "is not text; a spreadsheet or an archive"),
    (
        "labels from 1",
        CSV.replace(",0\n", ",2\n"),
        {},
        "from 0 to 1 (line 2); labels counted from 1 need data.classes: [1, 2]",
    ),
    ("labels -1, 1", CSV.replace(",0\n", ",-1\n"), {}, "name them in their order: data.classes: [-1, 1]"),
    ("label of text", CSV.replace(",0\n", ",no\n").replace(",1\n", ",yes\n"), {}, "data.classes: [no, yes]"),
    ("label empty", CSV.replace("4,1", "4,"), {}, "column 'target': line 3 is empty, which is not a number"),
    (
        "label NaN",
        CSV.replace("4,1", "4,nan"),
        {},
        "column 'target': label nan is not a whole number from 0 to 1 (line 3)",
    ),
    (
        "another label",
        CSV.replace("4,1", "4,x"),
        {"classes": [0, 1]},
        "column 'target': line 3 is 'x', which is not one of 0, 1",
    ),
]


@pytest.mark.parametrize(("content", "fields", "says"), [case[1:] for case in SAYS], ids=[case[0] for case in SAYS])
def test_a_csv_file_is_refused_with_column_and_line(tmp_path, content, fields, says):
    said = refusal(tmp_path, "a.csv", content, **fields)
    assert said.startswith(f"silo 'a': {tmp_path}/a.csv") and says in said


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        ("\ufeff" + CSV, {}),
        (CSV.replace("\n", "\r\n"), {}),
        (CSV.replace("\n", "\r"), {}),
        (CSV + "\n\n   \n", {}),
        (CSV.replace("age", '"age"').replace("3", '"3"').replace("4", " 4 "), {}),
        (CSV.replace(",", " , "), {}),
        (CSV.replace(",", ";"), {"separator": ";"}),
        (CSV.replace(",", "\t"), {"separator": "\t"}),
        (CSV.replace(",0\n", ",0.0\n").replace(",1\n", ",1.00\n"), {}),
        (CSV.replace(",0\n", ",False\n").replace(",1\n", ",True\n"), {}),
        (CSV.replace(",0\n", ",true\n").replace(",1\n", ",false\n"), {"classes": [True, False]}),
        (CSV.replace(",1\n", ",2\n").replace(",0\n", ",1\n"), {"classes": [1, 2]}),
        (CSV.replace(",0\n", ",nan\n").replace(",1\n", ",inf\n"), {"classes": ["nan", "inf"]}),
        (CSV.replace("age", "sex,age").replace("\n", "\nx,", 3), {"features": ["age", "bp"]}),
    ],
)
def test_a_csv_file_is_read_however_it_is_written(tmp_path, content, fields):
    data = opened(tmp_path, "a.csv", content, **fields)
    assert data.x_train.tolist() == [[1, 2], [3, 4], [5, 6]] and data.y_train.tolist() == [0, 1, 1]


# ---------------------------------------------------------------- arrays

NAN, BIG = np.where(X == 2, np.nan, X), np.where(X == 2, 1e39, X)
TEXT = np.array([b"no", b"yes", b"no", b"yes"])
ARRAYS = [
    (
        "text for x",
        {"x": X.astype("S"), "y": Y.astype("S")},
        {"shape": [3]},
        "samples of x have shape [2], data.shape is [3]",
    ),
    ("no numbers", {"x": np.array([[b"1", b"a"]] * 4), "y": Y}, {}, "x: x[0] is 'a', which is not a number"),
    ("complex", {"x": X + 1j, "y": Y}, {}, "x holds complex128; plain numbers are needed"),
    ("records", {"x": np.zeros(4, [("a", "f4")]), "y": Y}, {}, "x holds [('a', '<f4')]; plain numbers are needed"),
    ("NaN", {"x": NAN, "y": Y}, {}, "x has NaN or infinite values in 1 of 4 samples, first in x[1]"),
    (
        "inf in the test part",
        {"x_train": X, "y_train": Y, "x_test": X + np.inf, "y_test": Y},
        {},
        "x_test has NaN or infinite",
    ),
    ("beyond float32", {"x": BIG, "y": Y}, {}, "x has values beyond float32 (3.4e38) in 1 of 4 samples, first in x[1]"),
    (
        "target beyond",
        {"x": X, "y": Y * 1e300},
        {"task": "regression"},
        "y has values beyond float32 (3.4e38) in 2 of 4",
    ),
    ("huge label", {"x": X, "y": np.array([0, 1, 2**64 - 1, 0], "u8")}, {}, "label 1.84467e+19 is not a whole number"),
    ("negative label", {"x": X, "y": -Y}, {}, "label -1 is not a whole number from 0 to 1 (y[1])"),
    ("label between", {"x": X, "y": Y / 2}, {}, "label 0.5 is not a whole number from 0 to 1 (y[1])"),
    (
        "infinite label",
        {"x": X, "y": np.array([0, np.inf, 0, 0])},
        {},
        "label inf is not a whole number from 0 to 1 (y[1])",
    ),
    (
        "labels from 1",
        {"x": X, "y": [1, 2, 3, 1]},
        {"task": "classification", "num_classes": 3},
        "data.classes: [1, 2, 3]",
    ),
    (
        "labels of text",
        {"x": X, "y": TEXT},
        {},
        "y: y[0] is 'no', which is not a number; name them in their order: data.cl",
    ),
    ("no UTF-8", {"x": X, "y": np.array([b"\xff"] * 4)}, {"classes": ["no", "yes"]}, "which is not one of no, yes"),
    (
        "one-hot",
        {"x": X, "y": np.eye(3)[[0, 1, 2, 0]]},
        {"task": "classification", "num_classes": 3},
        "its class (argmax)",
    ),
    ("a number", {"x": X, "y": 1}, {}, "x has 4 samples, but y has shape []"),
    ("no batch axis", {"x": X[:, 0], "y": Y}, {}, "samples of x have shape [], data.shape is [2]"),
    (
        "channels last",
        {"x": np.zeros((4, 5, 2)), "y": Y},
        {"shape": [2, 5]},
        "data.shape is [2, 5]; if only the order of the axes differs, write numpy.transpose(x, (0, 2, 1))",
    ),
    (
        "square images, channels last",
        {"x": np.zeros((4, 5, 5, 3)), "y": Y},
        {"shape": [3, 5, 5]},
        "numpy.transpose(x, (0, 3, 1, 2))",
    ),
    (
        "other names",
        {f"a{i:02d}": Y for i in range(12)},
        {},
        "or x, y); it holds a00, a01, a02, a03, a04, a05, a06, a07, a08, a09 and 2 more",
    ),
    ("nothing", {"x": X[:0], "y": Y[:0]}, {}, "silo 'a' has no samples for training"),
    ("too much", {"x": X, "y": Y, "x_train": X}, {}, "has both x, y and x_train; keep one set"),
    (
        "negative symbol",
        {"x": -X, "y": X},
        {"task": "next_token", "num_classes": 8},
        "symbol -1 is not a whole number from",
    ),
]


@pytest.mark.parametrize("name", ["a.npz", "a.h5"])
@pytest.mark.parametrize(("content", "fields", "says"), [case[1:] for case in ARRAYS], ids=[case[0] for case in ARRAYS])
def test_arrays_are_refused_with_name_and_row(tmp_path, name, content, fields, says):
    said = refusal(tmp_path, name, content, **fields)
    assert said.startswith("silo 'a'") and str(tmp_path / name) in said and says in said


@pytest.mark.parametrize("name", ["a.npz", "a.h5"])
@pytest.mark.parametrize(
    ("x", "y", "fields"),
    [
        (X.astype("f2"), Y.astype("f2"), {}),
        (X.astype("i8"), Y > 0, {}),
        (X.astype("u1"), Y[:, None].astype("u8"), {}),
        (X, Y + 1, {"classes": [1, 2]}),
        (X, Y + 1.0, {"classes": [1, 2]}),
        (X, TEXT, {"classes": ["no", "yes"]}),
        (X, np.array([2**62, 2**62 + 1] * 2), {"classes": [2**62, 2**62 + 1]}),  # equal as float64
    ],
)
def test_arrays_of_any_real_type_are_read(tmp_path, name, x, y, fields):
    data = opened(tmp_path, name, {"x": x, "y": y}, **fields)
    assert torch.equal(data.x_train, torch.from_numpy(X).float()) and data.y_train.tolist() == [0, 1, 0, 1]


SURVIVAL = "age,years,event\n50,1.5,1\n60,0.5,0\n70,2,1\n"
TIMES = {"task": "regression", "num_classes": 2, "shape": [1], "target": ["years", "event"]}


def test_columns_of_a_csv_file_that_target_names_are_the_targets_in_its_order(tmp_path):
    data = opened(tmp_path, "a.csv", SURVIVAL, **TIMES)
    assert data.x_train.tolist() == [[50], [60], [70]]
    assert data.y_train.tolist() == [[1.5, 1], [0.5, 0], [2, 1]]
    swapped = opened(tmp_path, "a.csv", SURVIVAL, **(TIMES | {"target": ["event", "years"]}))
    assert swapped.y_train.tolist() == [[1, 1.5], [0, 0.5], [1, 2]]


@pytest.mark.parametrize(
    ("content", "fields", "says"),
    [
        (SURVIVAL, {"num_classes": 3}, "target names 2 columns, but num_classes is 3"),
        (SURVIVAL, {"target": "years"}, "target names 1 column, but num_classes is 2"),
        (SURVIVAL, {"task": "binary", "num_classes": None}, "target names 2 columns, but task binary has one target"),
        (SURVIVAL, {"target": ["years", "years"]}, "column 'years' is named twice in target"),
        (SURVIVAL, {"features": ["event"]}, "'event' is the target; it cannot be a feature too"),
        (SURVIVAL.replace("event", "died"), {}, "no column 'event' (data.target)"),
        (SURVIVAL.replace("0.5,0", "0.5,"), {}, "columns 'years', 'event': line 3 is empty, which is not a number"),
    ],
)
def test_several_target_columns_that_cannot_be_are_refused(tmp_path, content, fields, says):
    assert says in refusal(tmp_path, "a.csv", content, **(TIMES | fields))


@pytest.mark.parametrize("name", ["a.npz", "a.h5", "a.csv"])
def test_classes_counted_from_one_are_learned_from_every_format(tmp_path, name):
    labels = np.array([1, 3, 2, 3])
    content = "u,v,target\n" + "".join(f"{a},{b},{k}\n" for (a, b), k in zip(X, labels, strict=True))
    content = content if name == "a.csv" else {"x": X, "y": labels}
    data = opened(tmp_path, name, content, task="classification", classes=[1, 2, 3])
    assert data.y_train.tolist() == [0, 2, 1, 2] and data.y_train.dtype == torch.int64


def test_symbols_may_have_names(tmp_path):
    fields = {"task": "next_token", "classes": [7, 8, 9]}
    source = build(Files, {"root": tmp_path, "shape": [2], "silos": [{"id": "a", "path": "a.npz"}], **fields}).source(0)
    np.savez(tmp_path / "a.npz", x=[[7, 9]], y=[[9, 8]])
    assert source.num_classes == 3 and source.open("a").x_train.tolist() == [[0, 2]]


def test_one_sample_is_a_training_sample_and_a_test_part_may_be_empty(tmp_path):
    data = opened(tmp_path, "a.csv", "age,bp,target\n1,2,0\n", test_fraction=0.5)
    assert len(data.x_train) == 1 and data.x_test.shape == (0, 2) and data.y_test.shape == (0,)
    content = {"x_train": X, "y_train": Y, "x_test": X[:0], "y_test": Y[:0]}
    assert opened(tmp_path, "a.npz", content).x_test.shape == (0, 2)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"features": ["age", "target"]}, "'target' is the target; it cannot be a feature too"),
        ({"levels": {"target": [0, 1]}}, "'target' is the target"),
        ({"features": ["age", "age"]}, "column 'age' is named twice"),
        ({"features": ["age", "bp"], "levels": {"bp": [1]}}, "column 'bp' is named twice"),
        ({"features": ["age", "bp"], "shape": [3]}, "shape is [3], but features and levels make 2 columns"),
        ({"classes": [1, "1.0"]}, "classes has 1.0 twice"),
        ({"levels": {"sex": ["f", "f"]}}, "sex has f twice"),
        ({"separator": "x"}, "separator is 'x'; one of ',', ';', a tab, '|'"),
        ({"task": "regression", "classes": [1, 2]}, "a regression has numbers for targets and no classes"),
        ({"task": "next_token", "classes": [1, 2], "num_classes": 3}, "num_classes is 3, but classes has 2"),
        (
            {"silos": [{"id": "a", "path": "a.npz"}], "features": ["u"]},
            "features, levels and indicators are for CSV files",
        ),
        ({"silos": [{"id": " ", "path": "a.npz"}]}, "the silo of a.npz has an empty id"),
        ({"silos": [{"id": "a", "path": "."}]}, "ends in none of .h5"),
    ],
)
def test_what_is_said_of_columns_and_classes_fits_together(tmp_path, fields, says):
    assert says in refusal(tmp_path, "a.csv", CSV, **fields)


# ---------------------------------------------------------------- the file itself


def test_a_path_that_is_no_file_says_what_it_is(tmp_path, monkeypatch):
    (tmp_path / "folder.csv").mkdir()
    for name, says in (("folder.csv", "is a folder"), ("none.csv", "no file"), ("a.csv/b.csv", "no file")):
        assert says in refusal(tmp_path, "a.csv", CSV, silos=[{"id": "a", "path": name}])

    monkeypatch.chdir(tmp_path)
    silos = [{"id": "a", "path": "a.csv"}]
    for root, where in (("data", r"\(data in the current folder\)"), (tmp_path / "data", rf"\({tmp_path}/data\)")):
        files = build(Files, {"task": "binary", "shape": [2], "root": str(root), "silos": silos})
        with pytest.raises(DataMissing, match=rf"no file {tmp_path}/data/a\.csv; .* its path or data\.root {where}"):
            files.source(0).open("a")

    def stat(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(DataMissing, match=r"silo 'a': /nowhere/a\.csv cannot be reached: Permission denied"):
        files = build(Files, {"task": "binary", "shape": [2], "silos": [{"id": "a", "path": "/nowhere/a.csv"}]})
        files.source(0).open("a")


@pytest.mark.parametrize("name", ["a.csv", "a.npz", "a.h5"])
def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch, name):
    write(tmp_path / name, CSV if name == "a.csv" else {"x": X, "y": Y})

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    for owner, call in ((np, "load"), (h5py, "File"), (type(tmp_path), "read_bytes")):
        monkeypatch.setattr(owner, call, refuse)
    with pytest.raises(ConfigError, match=rf"{name} may not be read by this user"):
        files = {"task": "binary", "shape": [2], "root": tmp_path, "silos": [{"id": "a", "path": name}]}
        build(Files, files).source(0).open("a")


def test_a_locked_hdf5_file_names_the_switch(tmp_path, monkeypatch):
    write(tmp_path / "a.h5", {"x": X, "y": Y})

    def locked(*_, **__):
        raise BlockingIOError(11, "Unable to synchronously open file (unable to lock file, errno = 11)")

    monkeypatch.setattr(h5py, "File", locked)
    with pytest.raises(ConfigError, match=r"a\.h5 is locked: .*HDF5_USE_FILE_LOCKING=FALSE"):
        files = {"task": "binary", "shape": [2], "root": tmp_path, "silos": [{"id": "a", "path": "a.h5"}]}
        build(Files, files).source(0).open("a")


def test_an_array_without_a_name_and_a_group_are_no_arrays(tmp_path):
    np.save(tmp_path / "b.npy", X)
    assert "use numpy.savez" in refusal(tmp_path, "a.npz", (tmp_path / "b.npy").read_bytes())
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_group("x")
        file["y"] = Y
    assert "'x' is not an array" in refusal(tmp_path, "a.h5", (tmp_path / "b.h5").read_bytes())
    assert "Python objects" in refusal(tmp_path, "a.npz", {"x": np.array([[1], [2, 3]], object), "y": Y[:2]})


@pytest.mark.parametrize("name", ["a.csv", "a.npz", "a.h5"])
def test_a_damaged_file_is_refused_or_read_but_never_a_traceback(tmp_path, name):
    write(tmp_path / name, CSV if name == "a.csv" else {"x": X, "y": Y})
    whole = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(150):
        content = bytearray(whole[: rng.integers(len(whole))] if number % 3 == 0 else whole)
        for at in rng.integers(0, len(content), 4) if content else ():
            content[at] ^= 1 << rng.integers(8)
        with contextlib.suppress(ConfigError), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            refused += 1
            opened(tmp_path, name, bytes(content))
            refused -= 1
    assert refused > 40
