"""One silo's file as numpy arrays: HDF5, npz or CSV, by its ending."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmpi.components import nearest
from fedmpi.errors import ConfigError

Arrays = dict[str, npt.NDArray[Any]]
PARTED = ("x_train", "y_train", "x_test", "y_test")
WHOLE = ("x", "y")
HDF5 = (".h5", ".hdf5")
ENDINGS = (*HDF5, ".npz", ".csv")


def read(
    path: Path, where: str, target: str, features: Sequence[str] | None, levels: Mapping[str, Sequence[Any]]
) -> Arrays:
    """The arrays x_train, y_train, x_test, y_test of a file, or x and y where it has no test part.

    ConfigError, beginning with `where`, when the file is not what its ending says or lacks an array or a column.
    """
    try:
        if path.suffix == ".csv":
            return read_csv(path, where, target, features, levels)
        arrays = _read_hdf5(path) if path.suffix in HDF5 else _read_npz(path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, csv.Error) as error:
        raise ConfigError(f"{where} cannot be read as {path.suffix}: {error}") from None
    for keys in (PARTED, WHOLE):
        if all(key in arrays for key in keys):
            return {key: arrays[key] for key in keys}
    wanted = PARTED if {"x_train", "x_test"} & set(arrays) or not {*WHOLE} & set(arrays) else WHOLE
    lacks = ", ".join(repr(key) for key in wanted if key not in arrays)
    raise ConfigError(f"{where} has no {lacks} (needs {', '.join(PARTED)}, or x, y)")


def _read_hdf5(path: Path) -> Arrays:
    import h5py

    with h5py.File(path, "r") as file:
        return {key: np.asarray(file[key]) for key in (*PARTED, *WHOLE) if key in file}


def _read_npz(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in (*PARTED, *WHOLE) if key in file}


def read_csv(
    path: Path, where: str, target: str, features: Sequence[str] | None, levels: Mapping[str, Sequence[Any]]
) -> Arrays:
    """x [N, features] float32, y [N] text: numeric columns first, then a column per level of each column in `levels`.

    Without `features` the numeric columns are all others, in the order of their NAMES: hospitals that write the same
    columns in another order agree. An empty cell is NaN.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    names, rows = (rows[0], rows[1:]) if rows else ([], [])
    for num, row in enumerate(rows, start=2):
        if row and len(row) != len(names):
            raise ConfigError(f"{where} has {len(row)} cells in line {num}, its header {len(names)}")
    cells = np.array([row for row in rows if row], dtype=str).reshape(-1, len(names))
    numeric = sorted(set(names) - {target, *levels}) if features is None else list(features)
    for name in (target, *numeric, *levels):
        if name not in names:
            raise ConfigError(f"{where} has no column '{name}'{nearest(name, names)}")
    column = {name: cells[:, i] for i, name in enumerate(names)}
    x = [_numbers(column[name], f"{where} column '{name}'") for name in numeric]
    for name, values in levels.items():
        code = codes(column[name], values, f"{where} column '{name}'")
        x += [(code == i).astype(np.float32) for i in range(len(values))]
    values_NX = np.stack(x, axis=1) if x else np.empty((len(cells), 0), np.float32)
    return {"x": values_NX, "y": column[target], "columns": np.array([*numeric, *levels], dtype=str)}


def _numbers(cells: npt.NDArray[Any], where: str) -> npt.NDArray[np.float32]:
    try:
        return np.where(cells == "", "nan", cells).astype(np.float32)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}; declare its values in `levels` to one-hot them") from None


def codes(cells: npt.NDArray[Any], values: Sequence[Any], where: str) -> npt.NDArray[np.int64]:
    """The position in `values` of every cell; "1", 1 and "1.0" are the same value.

    >>> codes(np.array(["b", "2.0", "b"]), [2, "b"], "").tolist()
    [1, 0, 1]
    """
    position = {_plain(value): i for i, value in enumerate(values)}
    found, inverse = np.unique(np.asarray(cells).ravel(), return_inverse=True)
    for cell in found:
        if _plain(cell) not in position:
            raise ConfigError(f"{where}: {str(cell)!r} is not one of {', '.join(map(str, values))}")
    return np.array([position[_plain(cell)] for cell in found], np.int64)[inverse].reshape(np.shape(cells))


def _plain(value: Any) -> float | str:
    text = value.decode() if isinstance(value, bytes) else str(value)
    try:
        return float(text)
    except ValueError:
        return text.strip()
