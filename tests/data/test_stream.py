"""Streamed silos: the same samples, figures and bits as in memory, and one line where that cannot be."""

import os
import threading
import tracemalloc

import h5py
import numpy as np
import pytest
import torch

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.data.files import Files
from fedmpi.data.stream import ChunkedRows, FileSamples, PlacedRows
from fedmpi.errors import ConfigError, FedmpiError
from fedmpi.flat import sha256
from fedmpi.kernels.rows import read_rows
from fedmpi.opening import facts_of

DRAW = np.random.default_rng(3)
SHAPE = (3, 5)


def parted(dtype, sizes=(37, 11)):
    arrays = {}
    for part, num in zip(("train", "test"), sizes, strict=True):
        arrays[f"x_{part}"] = (DRAW.standard_normal((num, *SHAPE)) * 50).astype(dtype)
        arrays[f"y_{part}"] = DRAW.integers(0, 3, num)
    return arrays


def whole(dtype, num=41):
    return {"x": (DRAW.standard_normal((num, *SHAPE)) * 50).astype(dtype), "y": DRAW.integers(0, 3, num)}


def npz(path, arrays):
    np.savez(path.with_suffix(".npz"), **arrays)
    return "a.npz"


def h5(path, arrays, **storage):
    with h5py.File(path.with_suffix(".h5"), "w", userblock_size=storage.pop("userblock_size", None)) as file:
        for key, values in arrays.items():
            file.create_dataset(key, data=values, **(storage if key.startswith("x") else {}))
    return "a.h5"


STORES = {
    "npz": npz,
    "contiguous": h5,
    "user block": lambda *given: h5(*given, userblock_size=1024),
    "chunks": lambda *given: h5(*given, chunks=(4, *SHAPE)),
    "chunks of a part of a row": lambda *given: h5(*given, chunks=(4, 2, 5)),
    "compressed": lambda *given: h5(*given, chunks=(7, *SHAPE), compression="gzip", shuffle=True),
}


def dataset(root, name, **fields):
    fields = {"task": "classification", "num_classes": 3, "shape": SHAPE, "silos": [{"id": "a", "path": name}]} | fields
    return build(Files, {"root": root, **fields}, "data", "dataset 'files'").source(0)


def both(root, name, **fields):
    return [dataset(root, name, stream=stream, **fields).open("a") for stream in (False, True)]


def read(samples):
    return torch.cat(list(samples.blocks())) if isinstance(samples, FileSamples) else samples


@pytest.mark.parametrize("content", [parted, whole])
@pytest.mark.parametrize("dtype", ["f4", ">f8", "u1", "i8", "f2", "?"])
@pytest.mark.parametrize("store", STORES)
def test_streamed_samples_are_those_in_memory(tmp_path, store, dtype, content):
    name = STORES[store](tmp_path / "a", content(dtype))
    memory, streamed = both(tmp_path, name)
    source = dataset(tmp_path, name)
    assert isinstance(streamed.x_train, FileSamples) and isinstance(streamed.x_test, FileSamples)
    assert torch.equal(memory.y_train, streamed.y_train) and torch.equal(memory.y_test, streamed.y_test)
    for x, lazy in ((memory.x_train, streamed.x_train), (memory.x_test, streamed.x_test)):
        rows = torch.from_numpy(DRAW.integers(0, len(x), 60))
        assert lazy.shape == x.shape and lazy.dtype == x.dtype and len(lazy) == len(x)
        for here in (rows, slice(2, 6), slice(None, 3), slice(8, 10**6), torch.arange(0), torch.arange(3, 8)):
            assert lazy[here].numpy().tobytes() == x[here].numpy().tobytes()
        assert torch.equal(read(lazy), x)
    assert facts_of("a", memory, source, {}).tolist() == facts_of("a", streamed, source, {}).tolist()


def test_places_in_a_file_with_a_user_block_are_not_trusted(tmp_path):
    """Not every version of HDF5 counts it, and rows that are mostly zero look alike at places that are off by it."""
    (_, plain), (memory, streamed) = (
        both(tmp_path, h5(tmp_path / "a", parted("f4"), userblock_size=size)) for size in (None, 512)
    )
    assert isinstance(plain.x_train._raw, PlacedRows) and isinstance(streamed.x_train._raw, ChunkedRows)
    assert torch.equal(read(streamed.x_train), memory.x_train)


def test_a_batch_is_no_view_of_another(tmp_path):
    (_, streamed) = both(tmp_path, npz(tmp_path / "a", parted("f4")))
    one, other = streamed.x_train[:4], streamed.x_train[:4]
    one.zero_()
    assert other.abs().sum() > 0 and torch.equal(streamed.x_train[:4], other)


def test_rows_that_one_call_does_not_read_are_read_one_by_one(tmp_path):
    """A signal or a file system may cut a read short."""
    memory, streamed = both(tmp_path, npz(tmp_path / "a", parted("f4")))
    raw, rows = streamed.x_train._raw, torch.tensor([5, 6, 0, 30])
    for read in range(4):
        raw._read_rows = lambda fd, places, size, out, read=read: read_rows(fd, places[:read], size, out)
        assert torch.equal(streamed.x_train[rows], memory.x_train[rows])
    raw._read_rows = read_rows
    raw._starts = raw._starts + os.path.getsize(tmp_path / "a.npz") - 16 * 60
    with pytest.raises(FedmpiError, match=r"silo 'a': .*a\.npz has become shorter since it was opened"):
        streamed.x_train[rows]


def spied(monkeypatch, *kinds):
    """What is read from now on: the name of the thread, and the rows."""
    seen = []
    for kind in kinds:

        def spy(self, rows, read=kind._read):
            seen.append((threading.current_thread().name.split("_")[0], rows.tolist()))
            return read(self, rows)

        monkeypatch.setattr(kind, "_read", spy)
    return seen


@pytest.mark.parametrize("store", ["npz", "compressed"])
def test_a_thread_reads_ahead_what_is_asked_for_next(tmp_path, monkeypatch, store):
    memory, streamed = both(tmp_path, STORES[store](tmp_path / "a", parted("f4")))
    seen = spied(monkeypatch, PlacedRows, ChunkedRows)
    rows, others = torch.tensor([5, 30, 6]), torch.tensor([1, 2, 3])
    for wanted in ([rows], [others, rows], [rows, others]):
        streamed.x_train.ahead(rows)
        for these in wanted:
            assert torch.equal(streamed.x_train[these], memory.x_train[these])
    ahead, mine = ("fedmpi-read", rows.tolist()), ("MainThread", others.tolist())
    assert seen == [ahead, ahead, mine, ("MainThread", rows.tolist()), ahead, mine]


def test_an_error_in_what_is_read_ahead_waits_for_who_asks(tmp_path):
    _, streamed = both(tmp_path, npz(tmp_path / "a", parted("f4")))
    raw, rows = streamed.x_train._raw, torch.tensor([5, 6])
    raw._starts = raw._starts + 10**6
    for _ in range(2):
        streamed.x_train.ahead(rows)
    raw._starts = raw._starts - 10**6
    assert streamed.x_train[:2].shape == (2, *SHAPE)  # what was read ahead is not asked for
    raw._starts = raw._starts + 10**6
    streamed.x_train.ahead(rows)
    with pytest.raises(FedmpiError, match=r"silo 'a': .*a\.npz has become shorter since it was opened"):
        streamed.x_train[rows]


def test_decoded_chunks_are_let_go(tmp_path, monkeypatch):
    name = STORES["compressed"](tmp_path / "a", parted("f4"))
    monkeypatch.setattr("fedmpi.data.stream.CHUNKS_BYTES", 2 * 7 * 15 * 4)
    memory, streamed = both(tmp_path, name)
    for _ in range(3):
        rows = torch.from_numpy(DRAW.permutation(len(memory.x_train)))
        assert torch.equal(streamed.x_train[rows], memory.x_train[rows])
        assert len(streamed.x_train._raw._chunks) == 2


def test_memory_does_not_grow_with_the_file(tmp_path):
    num = 400_000  # 24 MB
    arrays = {"x": np.zeros((num, *SHAPE), np.float32), "y": np.zeros(num, np.int8)}
    name = npz(tmp_path / "a", arrays)
    del arrays
    source = dataset(tmp_path, name, stream=True)
    tracemalloc.start()
    data = source.open("a")
    facts_of("a", data, source, {})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 8 bytes a row for the split, and for the labels as they are read; blocks of 8 MiB. In memory it is 48 MB and more.
    assert peak < 35 * num + 20e6
    assert len(data.x_train) == 320_000


REFUSED = {
    "compressed npz": ("a.npz", lambda p: np.savez_compressed(p, **whole("f4")), {}, "write it with numpy.savez"),
    "by columns": (
        "a.npz",
        lambda p: np.savez(p, x=np.asfortranarray(whole("f4")["x"]), y=np.zeros(41)),
        {},
        "x is stored by columns; write numpy.ascontiguousarray(x)",
    ),
    "text": ("a.npz", lambda p: np.savez(p, x=np.full((4, *SHAPE), "1"), y=np.zeros(4)), {}, "stream needs numbers"),
    "NaN": (
        "a.npz",
        lambda p: np.savez(p, x=np.where(np.arange(60).reshape(4, *SHAPE) == 40, np.nan, 1.0), y=np.zeros(4)),
        {},
        "x has NaN or infinite values in 1 of 4 samples, first in x[2]",
    ),
    "beyond": (
        "a.npz",
        lambda p: np.savez(p, x=np.full((4, *SHAPE), 1e300), y=np.zeros(4)),
        {},
        "x has values beyond float32 (3.4e38) in 4 of 4 samples, first in x[0]",
    ),
    "shape": ("a.npz", lambda p: np.savez(p, x=np.zeros((4, 3)), y=np.zeros(4)), {}, "samples of x have shape [3]"),
    "csv": ("a.csv", lambda p: p.write_text("a,target\n1,0\n"), {}, "a.csv cannot be streamed: stream takes HDF5"),
    "text task": ("a.npz", lambda p: None, {"task": "next_token"}, "stream keeps targets in memory"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_streamed_is_refused_in_one_line(tmp_path, what):
    name, write, fields, said = REFUSED[what]
    write(tmp_path / name)
    with pytest.raises(ConfigError) as caught:
        dataset(tmp_path, name, stream=True, **fields).open("a")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_npz_is_found_when_it_is_opened(tmp_path):
    name = npz(tmp_path / "a", parted("f4"))
    content = bytearray((tmp_path / name).read_bytes())
    content[1000] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"a.npz cannot be read as .npz: Bad CRC-32"):
        dataset(tmp_path, name, stream=True).open("a")


@pytest.mark.parametrize("store", ["npz", "chunks", "compressed"])
def test_a_file_that_changes_under_a_run_ends_it(tmp_path, store):
    name = STORES[store](tmp_path / "a", parted("f4"))
    _, streamed = both(tmp_path, name)
    os.utime(tmp_path / name, ns=(0, 0))
    with pytest.raises(FedmpiError, match=r"silo 'a': .*a\.\w+ has changed since it was opened"):
        streamed.x_train[:3]


# ---------------------------------------------------------------- runs


def run_of(tmp_path, stream, out, rounds=3, **values):
    data = {"name": "files", "root": str(tmp_path), "task": "binary", "shape": [15], "stream": stream}
    data["silos"] = [{"id": "a", "path": "a.npz"}, {"id": "b", "path": "b.h5"}]
    local = {"name": "sgd", "lr": 0.01, "epochs": 2, "batch_size": 8} | values.pop("local", {})
    local = {key: value for key, value in local.items() if value != "leave out"}
    how = {"rounds": rounds, "out": str(tmp_path / out), "data": data, "model": "logistic", "local": local} | values
    with fedmpi.Run(build(Config, how), comm=SoloComm()) as run:
        return [record["loss"] for record in run], sha256(run.parameters)


@pytest.fixture
def silos(tmp_path):
    for name, num in (("a", 53), ("b", 38)):
        x = DRAW.standard_normal((num, 15))
        arrays = {"x": x, "y": (x.sum(1) > 0).astype(int)}
        (npz if name == "a" else h5)(tmp_path / name, arrays)
    return tmp_path


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"local": {"last_batch": "merge", "steps": 5, "epochs": None}},
        {"local": {"name": "scaffold", "option": "I"}},
        {"local": {"name": "fedsgd", "batch_size": 16, "epochs": "leave out"}},
        {"local": {"name": "mime_lite"}},
        {"local": {"name": "ditto", "lam": 0.1}},
        {"evaluate": {"finetune": {"name": "sgd", "lr": 0.01, "epochs": 1}, "batch_size": 3}},
        {"select": {"name": "power_of_choice", "fraction": 0.5, "num_candidates": 2, "samples": 5}},
        {
            "privacy": {"name": "record", "clip": 1.0, "sigma": 1.0, "delta": 1e-3, "reproducible": True},
            "disclose": "pooled",
        },
        {"attack": {"name": "label_flip", "silos": ["b"]}, "experimental": True},
    ],
    ids=lambda values: (
        "-".join([*values, *(v["name"] for v in values.values() if isinstance(v, dict) and "name" in v)]) or "sgd"
    ),
)
def test_a_streamed_run_has_the_bits_of_one_in_memory(silos, values):
    assert run_of(silos, True, "streamed", **values) == run_of(silos, False, "memory", **values)


@pytest.mark.parametrize(
    "local", [{}, {"last_batch": "merge"}, {"last_batch": "drop"}, {"steps": 7, "epochs": None}, {"batch_size": 100}]
)
def test_all_batches_but_the_first_of_an_epoch_are_read_ahead(silos, monkeypatch, local):
    seen = spied(monkeypatch, PlacedRows)
    ended = run_of(silos, True, "ahead", local=local)
    ahead = [rows for name, rows in seen if name == "fedmpi-read"]
    everything = [rows for _, rows in seen]
    seen.clear()
    monkeypatch.setattr(FileSamples, "ahead", lambda self, rows: None)
    assert run_of(silos, True, "then", local=local) == ended
    assert [rows for _, rows in seen] == everything  # none was read in vain
    trained = [rows for rows in everything if len(rows) in range(1, 9)]
    if local.get("batch_size") == 100:
        assert not ahead
    else:
        assert len(ahead) > len(trained) / 2


def test_a_run_goes_on_streamed_or_in_memory(silos):
    expected = run_of(silos, False, "memory", rounds=4)
    run_of(silos, True, "mixed", rounds=2)
    assert run_of(silos, False, "mixed", rounds=3)[1] != expected[1]
    assert run_of(silos, True, "mixed", rounds=4)[1] == expected[1]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"local": {"batch_size": None}}, "local.batch_size"),
        ({"local": {"name": "fedsgd", "epochs": "leave out", "batch_size": None}}, "local.batch_size"),
        ({"evaluate": {"finetune": {"name": "sgd", "lr": 1, "epochs": 1, "batch_size": None}}}, "evaluate.finetune"),
    ],
)
def test_what_takes_all_samples_at_once_is_refused(silos, values, key):
    with pytest.raises(ConfigError, match=rf"data.stream: {key}.* takes all samples of a silo at once; give a number"):
        run_of(silos, True, "refused", **values)
