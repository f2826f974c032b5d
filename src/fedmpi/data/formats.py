"""Reads one silo's file, HDF5, npz or CSV by its suffix, as numpy arrays."""

from __future__ import annotations

import errno
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmpi.data.table import Columns, read_csv
from fedmpi.errors import ConfigError

Arrays = Mapping[str, npt.NDArray[Any]]
PARTED = ("x_train", "y_train", "x_test", "y_test")
WHOLE = ("x", "y")
HDF5 = (".h5", ".hdf5")
ENDINGS = (*HDF5, ".npz", ".csv")

# Everything that numpy, zipfile, h5py and the file system raise for a file that is damaged or of another format.
_DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError, MemoryError),
    *(OverflowError, SyntaxError, zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True)
class Content:
    """The content of a silo's file: x and y, or x_train, y_train, x_test and y_test."""

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


def read(path: Path, where: str, columns: Columns) -> Content:
    """Reads a file. Raises ConfigError, starting with `where`, if it is damaged, of another format, or lacks an array
    or a column."""
    ending = path.suffix.lower()
    try:
        if ending == ".csv":
            table = read_csv(path, where, columns)
            return Content({"x": table.x_NX, "y": table.y}, table.columns, table.lines, columns.targets)
    except (OSError, MemoryError) as error:
        raise ConfigError(f"{where} {_why(error, ending)}") from None
    try:
        arrays = _read_hdf5(path) if ending in HDF5 else _read_npz(path)
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
    raise ConfigError(f"{where} has no {lacks} (needs {', '.join(PARTED)}, or x, y)")


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


def _read_hdf5(path: Path) -> dict[str, npt.NDArray[Any]]:
    import h5py

    with h5py.File(path, "r") as file:
        arrays = {}
        for key in (*PARTED, *WHOLE):
            if key in file:
                if not isinstance(file[key], h5py.Dataset) or file[key].shape is None:
                    raise ValueError(f"'{key}' is not an array")
                arrays[key] = np.asarray(file[key])
        return arrays


def _read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    with path.open("rb") as opened:  # numpy would leave a file open that it cannot read
        file = np.load(opened, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it is one array without a name (.npy); use numpy.savez(path, x=..., y=...)")
        return {key: file[key] for key in (*PARTED, *WHOLE) if key in file}
