"""Files of tensors: any name and dtype survives, and nothing outside the file is ever read."""

import json
import subprocess
import sys
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from support.runs import tensors_of

from fedmpi import tensorfile
from fedmpi.checkpoint import Writer, read_server, read_silos, seal
from fedmpi.errors import CheckpointError
from fedmpi.tensorfile import Table

NAMES = [
    "head/weight",
    "a#b",
    "exchange_rate",
    "cursor",
    "",
    "/",
    ".",
    "index",
    "0",
    "\0",
    "ids",
    "kept",
    "é\ud800",
    "x" * 9999,
]
TYPES = [
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.bool, torch.complex64, torch.complex128),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.float8_e4m3fn),
]


def bits(tensor):
    return (
        tensor.dtype,
        tensor.shape,
        tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
    )


def of_type(dtype, *shape):
    return (torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32) * 9).to(dtype)


def test_silos_and_the_server_keep_tensors_under_any_name_and_of_any_type(tmp_path):
    kept = {("kept", name): torch.full((2,), float(i)) for i, name in enumerate(NAMES)}
    kept |= {("kept", str(dtype)): of_type(dtype, 2, 3) for dtype in TYPES}
    kept |= {("kept", f"scalar {dtype}"): of_type(dtype) for dtype in TYPES}
    kept |= {("exchange", name): torch.zeros(0, 3) for name in NAMES} | {("cursor",): torch.tensor(2**60)}
    kept |= {("kept", "conjugate"): torch.tensor([1 + 2j]).conj(), ("kept", "turned"): torch.arange(6.0).view(2, 3).T}
    silos: dict[str, dict[Any, torch.Tensor]] = {
        "a": kept,
        "b/#": {key: tensor.clone() for key, tensor in kept.items()},
        "c": {("cursor",): torch.tensor(1)},
    }
    silos["b/#"]["kept", "cursor"] = torch.ones(5, dtype=torch.bool)  # another shape and dtype than a's
    writer = Writer(tmp_path, 0)
    writer.start(1, tensors_of(kept, silos))
    writer.join()
    seal(tmp_path, 1, [writer.digests], [list(silos)], {})
    found = read_silos(tmp_path, 1, silos)
    found["the server"], silos["the server"] = read_server(tmp_path, 1), kept
    for name, tensors in silos.items():
        assert found[name].keys() == tensors.keys()
        assert all(bits(found[name][key]) == bits(tensor) for key, tensor in tensors.items())


def rewritten(path, change):
    """A file of two tensors, changed with h5py as an attacker would."""
    tensorfile.write(path, [Table(("params",), torch.arange(4.0)), Table(("rows",), torch.ones(2, 3), ["a", "b"])])
    with h5py.File(path, "r+") as file:
        change(file, path.parent / "secret")
    return path


def replace(name, make):
    def change(file, secret):
        del file[name]
        make(file, secret)

    return change


def index(change):
    def rewrite(file, secret):
        told = json.loads(file["index"][()].tobytes())
        change(told)
        del file["index"]
        file["index"] = np.frombuffer(json.dumps(told).encode(), dtype=np.uint8)

    return rewrite


def outside(file, secret):
    file.create_dataset("0", (4,), "<f4", external=[(str(secret), 0, 16)])


def virtual(file, secret):
    layout = h5py.VirtualLayout((4,), "<f4")
    layout[:] = h5py.VirtualSource(str(secret), "x", (4,))
    file.create_virtual_dataset("0", layout)


def sparse(file, secret):
    file.create_dataset("0", (2**31,), "<f4")


HOSTILE = {
    "external storage": replace("0", outside),
    "a virtual dataset": replace("0", virtual),
    "an external link": replace("0", lambda file, secret: file.update({"0": h5py.ExternalLink(str(secret), "/x")})),
    "a soft link": replace("0", lambda file, secret: file.update({"0": h5py.SoftLink("/1")})),
    "an index elsewhere": replace("index", lambda f, secret: f.update({"index": h5py.ExternalLink(str(secret), "/x")})),
    "text of any length": replace("0", lambda file, secret: file.create_dataset("0", (4,), h5py.string_dtype())),
    "references": replace("0", lambda file, secret: file.create_dataset("0", (4,), h5py.ref_dtype)),
    "a compound": replace("0", lambda file, secret: file.create_dataset("0", (4,), [("a", "<f4")])),
    "a list a row": replace("0", lambda file, secret: file.create_dataset("0", (4,), h5py.vlen_dtype(np.float32))),
    "an enum": replace("0", lambda file, secret: file.create_dataset("0", (4,), h5py.enum_dtype({"a": 1}))),
    "another type": replace("0", lambda file, secret: file.create_dataset("0", data=np.zeros(4, "<f8"))),
    "another length": replace("0", lambda file, secret: file.create_dataset("0", data=np.zeros(5, "<f4"))),
    "nothing": replace("0", lambda file, secret: file.create_dataset("0", dtype="<f4")),
    "a folder": replace("0", lambda file, secret: file.create_group("0")),
    "packed": replace("0", lambda file, secret: file.create_dataset("0", (4,), "<f4", chunks=(2,), compression=9)),
    "sparse": replace("0", sparse),
    "sparse and declared": lambda file, secret: [
        replace("0", sparse)(file, secret), index(lambda told: told[0].update(shape=[2**31]))(file, secret)
    ],
    "one that is not in the index": lambda file, secret: file.create_dataset("2", (2**33,), "u1"),
    "one that is not there": index(lambda told: told.append(told[0])),
    "twice": index(lambda told: told[1].update(key=["params"], shape=[4], silos=None)),
    "a type that is none": index(lambda told: told[0].update(dtype="save")),
    "a shape that is none": index(lambda told: told[0].update(shape=[-4])),
    "a key that is none": index(lambda told: told[0].update(key=[["params"]])),
    "more silos than rows": index(lambda told: told[1].update(silos=["a", "b", "c"])),
    "a placement that is none": index(lambda told: told[0].update(placement="elsewhere")),
    "the server's, of silos": index(lambda told: told[0].update(placement="per_silo")),
    "no list": index(lambda told: told.__setitem__(0, 3)),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_reaches_out_or_claims_more_than_it_holds_is_refused(tmp_path, what):
    (tmp_path / "secret").write_bytes(b"0123456789abcdef")
    path = rewritten(tmp_path / "server.h5", HOSTILE[what])
    for look in (tensorfile.contents, tensorfile.read, lambda path: tensorfile.read_rows(path, ["a"])):
        with pytest.raises(CheckpointError, match=r"server\.h5"):
            look(path)


def test_a_file_that_is_whole_is_read(tmp_path):
    path = rewritten(tmp_path / "server.h5", lambda file, secret: None)
    assert [entry.key for entry in tensorfile.contents(path)] == [("params",), ("rows",)]
    (params,) = tensorfile.read(path)
    assert params.key == ("params",) and params.tensor.tolist() == [0, 1, 2, 3]
    assert tensorfile.read_rows(path, ["b"]).keys() == {"b"}


FULL = """
import resource, sys
from pathlib import Path
import torch
from fedmpi import tensorfile
from fedmpi.tensorfile import Table

path = Path(sys.argv[1])
tables = [Table((str(n),), torch.full((40, n + 1), float(n))) for n in range(60)]
tables.append(Table(("long",), torch.arange(3e6)))  # written in parts
for size in (0, 1, 600, 5000, 70_000, 300_000, 9_000_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        tensorfile.write(path, tables)
    except OSError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
tensorfile.write(path, tables)
assert all(torch.equal(one.tensor, table.tensor) for one, table in zip(tensorfile.read(path), tables, strict=True))
"""


def test_a_process_lives_on_after_a_write_that_failed_wherever_it_did(tmp_path):
    """No file may grow: a full disk as the library that writes sees it."""
    command = [sys.executable, "-c", FULL, str(tmp_path / "t.h5")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["[Errno 27] File too large"] * 7
    assert [path.name for path in tmp_path.iterdir()] == ["t.h5"]
