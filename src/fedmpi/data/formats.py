"""Reads one silo's file, HDF5, npz or CSV by its suffix, as numpy arrays; finds where inputs to stream lie in it."""

from __future__ import annotations

import csv
import errno
import logging
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmpi.data.stream import ChunkedRows, PlacedRows, Raw
from fedmpi.data.table import Columns, read_csv, read_parquet
from fedmpi.errors import ConfigError, FedmpiError

log = logging.getLogger("fedmpi")

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array | Raw]
PARTED = ("x_train", "y_train", "x_test", "y_test")
WHOLE = ("x", "y")
INPUTS = ("x_train", "x_test", "x")
HDF5 = (".h5", ".hdf5")
TABLES = (".csv", ".parquet")
STREAMED = (*HDF5, ".npz")
ENDINGS = (*HDF5, ".npz", *TABLES)

# Everything that numpy, zipfile, h5py and the file system raise for a file that is damaged or of another format.
_DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError, MemoryError),
    *(OverflowError, SyntaxError, zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True)
class Content:
    """The content of a silo's file: x and y, or x_train, y_train, x_test and y_test. Streamed inputs are Raw."""

    arrays: Arrays
    columns: tuple[str, ...] = ()  # columns of x, if the file names them
    lines: tuple[int, ...] = ()  # CSV: line number of every row
    targets: Sequence[str] = ()  # CSV: columns of y

    def name(self, key: str) -> str:
        """An array's name in messages."""
        if key != "y" or not self.lines:
            return key
        return f"column{'s' if len(self.targets) > 1 else ''} " + ", ".join(f"'{name}'" for name in self.targets)

    def place(self, key: str, row: int) -> str:
        """A row's name in messages."""
        return f"line {self.lines[row]}" if self.lines else f"{key}[{row}]"


def read(path: Path, where: str, columns: Columns, stream: bool = False) -> Content:
    """Reads a file; with `stream` its inputs stay in it. Raises ConfigError, starting with `where`, if it is damaged,
    of another format, or lacks an array or a column."""
    ending = path.suffix.lower()
    try:
        if ending in TABLES:
            table = (read_csv if ending == ".csv" else read_parquet)(path, where, columns)
            return Content({"x": table.x_NX, "y": table.y}, table.columns, table.lines, columns.targets)
    except (OSError, MemoryError) as error:
        raise ConfigError(f"{where} {_why(error, ending)}") from None
    try:
        arrays = _read_hdf5(path, where, stream) if ending in HDF5 else _read_npz(path, where, stream)
    except FedmpiError:
        raise
    except _DAMAGE as error:
        raise ConfigError(f"{where} {_why(error, ending)}") from None
    for keys in (PARTED, WHOLE):
        if all(key in arrays for key in keys):
            if keys == WHOLE and len(arrays) > len(WHOLE):
                beside = ", ".join(key for key in arrays if key not in WHOLE)
                raise ConfigError(f"{where} has both x, y and {beside}; keep one set")
            return Content({key: arrays[key] for key in keys})
    wanted = PARTED if {"x_train", "x_test"} & set(arrays) or not {*WHOLE} & set(arrays) else WHOLE
    lacks = ", ".join(repr(key) for key in wanted if key not in arrays)
    raise ConfigError(f"{where} has no {lacks} (needs {', '.join(PARTED)}, or x, y){_held(path, ending)}")


def read_inputs(path: Path, where: str, columns: Columns) -> Content:
    """Reads x, and y if the file has it: it need not have targets. Raises ConfigError as `read` does."""
    ending = path.suffix.lower()
    try:
        if ending in TABLES:
            named = replace(columns, unlabelled=True)
            table = (read_csv if ending == ".csv" else read_parquet)(path, where, named)
            there = {"y": table.y} if table.y.shape[1:] != (0,) else {}
            return Content({"x": table.x_NX, **there}, table.columns, table.lines, columns.targets)
        if ending not in ENDINGS:
            raise ConfigError(f"{where} ends in none of {', '.join(ENDINGS)}")
        arrays = _read_hdf5(path, where, False) if ending in HDF5 else _read_npz(path, where, False)
    except FedmpiError:
        raise
    except _DAMAGE as error:
        raise ConfigError(f"{where} {_why(error, ending)}") from None
    if "x" not in arrays:
        raise ConfigError(f"{where} has no 'x': new samples are one array x, and their targets, if any, y")
    return Content({key: arrays[key] for key in WHOLE if key in arrays})


def write(path: Path, columns: Mapping[str, Array]) -> None:
    """Writes columns of equal length as .csv, .npz or .h5, beside the final name first. Raises OSError."""
    beside = path.with_name(f".{path.name}.part")
    if path.suffix == ".csv":
        with beside.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(columns)
            rows.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))
    elif path.suffix == ".npz":
        with beside.open("wb") as opened:
            np.savez(opened, **dict[str, Any](columns))
    else:
        import h5py

        with h5py.File(beside, "w") as store:
            for name, values in columns.items():
                text = values.dtype.kind in "US"
                data, dtype = (values.astype(object), h5py.string_dtype()) if text else (values, None)
                store.create_dataset(name, data=data, dtype=dtype)
    os.replace(beside, path)


def _held(path: Path, ending: str) -> str:
    """Names of the arrays in an HDF5 or npz file, the first ten of them; with the path of their group."""
    names: list[str] = []
    if ending in HDF5:
        import h5py

        with suppress(*_DAMAGE), h5py.File(path, "r") as file:
            file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
    else:
        with np.load(path, allow_pickle=False) as file:
            names += file.files
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"; it holds {', '.join(names[:10]) or 'no array'}{more}"


def _why(error: BaseException, ending: str) -> str:
    """What is wrong with a file, from its reader's error, and what to do if that is known."""
    text = " ".join(str(error).split())
    if "lock" in text.lower() or getattr(error, "errno", None) == errno.ENOLCK:
        return (
            "is locked: another program has it open, or its file system has no locks; close it there, or set "
            "HDF5_USE_FILE_LOCKING=FALSE"
        )
    if isinstance(error, PermissionError):
        return "may not be read by this user (permission denied)"
    if isinstance(error, MemoryError):
        return f"does not fit into memory: {text}"
    if "Object arrays" in text:
        return "holds Python objects (rows of several lengths?); save arrays of numbers"
    if "pickle" in text:  # numpy assumes a pickle if the file is neither an archive nor an array
        return f"cannot be read as {ending}: it is not in that format"
    return f"cannot be read as {ending}: {text[:300] or type(error).__name__}"


def _read_hdf5(path: Path, where: str, stream: bool) -> dict[str, Array | Raw]:
    import h5py

    with h5py.File(path, "r") as file:
        arrays: dict[str, Array | Raw] = {}
        for key in (*PARTED, *WHOLE):
            if key in file:
                if not isinstance(file[key], h5py.Dataset) or file[key].shape is None:
                    raise ValueError(f"'{key}' is not an array")
                streams = stream and key in INPUTS
                arrays[key] = _hdf5_rows(path, where, file[key]) if streams else np.asarray(file[key])
        return arrays


def _hdf5_rows(path: Path, where: str, dataset: Any) -> Raw:
    """The rows of an HDF5 dataset: at their places in the file if they are stored as they are, else by whole chunks."""
    import h5py

    shape, dtype, rows = dataset.shape, dataset.dtype, dataset.shape[0] if dataset.shape else 0
    plist = dataset.id.get_create_plist()
    plain = dtype.kind in "biuf" and not plist.get_nfilters() and not plist.get_external_count() and rows > 0
    plain = plain and not dataset.file.userblock_size  # offsets do not count it in every version of HDF5
    placed: Raw | None = None
    if plain and plist.get_layout() == h5py.h5d.CONTIGUOUS and (start := dataset.id.get_offset()) is not None:
        placed = PlacedRows(path, where, shape, dtype, np.array([start]), rows)
    elif plain and plist.get_layout() == h5py.h5d.CHUNKED and dataset.chunks[1:] == shape[1:]:
        per = dataset.chunks[0]
        starts = np.full(-(-rows // per), -1, np.int64)
        for i in range(dataset.id.get_num_chunks()):
            chunk = dataset.id.get_chunk_info(i)
            starts[chunk.chunk_offset[0] // per] = chunk.byte_offset
        if (starts >= 0).all():  # chunks that were never written have no place
            placed = PlacedRows(path, where, shape, dtype, starts, per)
    probe = np.unique(np.array([0, rows // 2, rows - 1]))
    # See whether the same values are there.
    if placed is not None and placed.read(probe).tobytes() == np.stack([dataset[i] for i in probe]).tobytes():
        return placed
    per = dataset.chunks[0] if dataset.chunks else max(1, (1 << 20) // max(dtype.itemsize, 1))
    if plist.get_nfilters():
        log.warning("%s: %s is compressed: every batch decodes whole chunks; store it plain", where, dataset.name)
    kept = h5py.File(path, "r")[dataset.name]  # keeps its file open
    return ChunkedRows(path, where, shape, dtype, per, lambda start, stop: np.asarray(kept[start:stop]))


def _read_npz(path: Path, where: str, stream: bool) -> dict[str, Array | Raw]:
    with path.open("rb") as opened:  # numpy would leave a file open that it cannot read
        file = np.load(opened, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it is one array without a name (.npy); use numpy.savez(path, x=..., y=...)")
        return {
            key: _npz_rows(path, where, key) if stream and key in INPUTS else file[key]
            for key in (*PARTED, *WHOLE)
            if key in file
        }


def _npz_rows(path: Path, where: str, key: str) -> Raw:
    """The rows of an array in an npz file that is not compressed. Reads it once, for its checksum."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{key}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ConfigError(f"{where} is compressed, so {key} cannot be streamed; write it with numpy.savez")
        with archive.open(member) as content:
            version = np.lib.format.read_magic(content)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in header:
                raise ConfigError(f"{where}: {key} has a header of version {version}; write it with numpy.savez")
            shape, by_columns, dtype = header[version](content)
            begins = content.tell()
            while content.read(1 << 20):  # raises at the end if the checksum is wrong
                pass
    if by_columns and len(shape) > 1:
        raise ConfigError(f"{where}: {key} is stored by columns; write numpy.ascontiguousarray({key})")
    with path.open("rb") as opened:
        opened.seek(member.header_offset)
        local = opened.read(30)
    place = member.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    return PlacedRows(path, where, shape, dtype, np.array([place + begins]), shape[0] if shape else 0)
