"""Data that is already apart: one file a silo, opened by the rank that hosts the silo and by no other."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedmpi.components import Decay, PositiveInt, component
from fedmpi.data import formats
from fedmpi.data.official import root_of
from fedmpi.errors import ConfigError, DataMissing
from fedmpi.rng import generator
from fedmpi.types import Silo, SiloData, Source, Task

Value = int | float | str  # as a file writes it; 1, "1" and 1.0 are the same


@component
class FileSilo:
    """One silo and its file."""

    id: str  # stable name of the data owner
    path: Path  # .h5, .npz or .csv; relative to root
    host: str | None = None  # the only host that may open it; null: any
    num_samples: PositiveInt | None = None  # training samples, for placement; null: learned by who opens it


@component
class Files:
    """One HDF5, npz or CSV file per silo.

    HDF5 and npz hold x_train, y_train, x_test, y_test, or x, y. CSV has a header line; its columns are read by name.
    Without a test part `test_fraction` of the rows becomes one, chosen by the silo's id, whatever the run's seed.
    Shape, classes and levels are said here, for all silos alike: nothing is learned from another silo's data.
    """

    silos: tuple[FileSilo, ...]  # id, path, host, num_samples of each
    task: Task  # classification, binary, regression or next_token
    shape: tuple[PositiveInt, ...]  # of one sample, without the batch axis
    num_classes: PositiveInt | None = None  # classes, symbols, or regression targets; null: from classes, else 1
    classes: tuple[Value, ...] | None = None  # labels as the files write them, number 0 first
    test_fraction: Decay = 0.2  # of a file's rows, where it has no test part (0 to 1)
    target: str = "target"  # CSV: column of the label
    features: tuple[str, ...] | None = None  # CSV: numeric columns; null: all others, in the order of their names
    levels: dict[str, tuple[Value, ...]] = field(default_factory=dict)  # CSV: columns to one-hot, with their values
    root: Path | None = None  # folder of relative paths; null: $FEDMPI_DATA, else ./data

    def __post_init__(self) -> None:
        """ValueError where the fields do not fit each other."""
        ids = [silo.id for silo in self.silos]
        if not ids:
            raise ValueError("files: needs at least one silo")
        seen: set[str] = set()
        for silo in self.silos:
            if silo.id in seen:
                raise ValueError(f"files: two silos are called '{silo.id}'")
            seen.add(silo.id)
            if silo.path.suffix not in formats.ENDINGS:
                raise ValueError(f"silo '{silo.id}': {silo.path} ends in none of {', '.join(formats.ENDINGS)}")
        if self.task in ("classification", "next_token") and not (self.num_classes or self.classes):
            raise ValueError(f"files: task {self.task} needs num_classes or classes")
        if self.task == "binary" and (self.num_classes or 1) != 1:
            raise ValueError("files: num_classes of a binary task is 1 (one output for two labels)")
        if self.task == "binary" and len(self.classes or (0, 1)) != 2:
            raise ValueError(f"files: a binary task has two classes, not {len(self.classes or ())}")
        if self.classes and self.task == "classification" and self.num_classes not in (None, len(self.classes)):
            raise ValueError(f"files: num_classes is {self.num_classes}, but classes has {len(self.classes)}")

    def source(self, seed: int) -> Source:
        """The silos as declared; looks at no file."""
        silos = tuple(Silo(id=s.id, num_samples=s.num_samples, host=s.host) for s in self.silos)
        columns: dict[str, tuple[str, ...]] = {}
        return Source(
            self.task, self.shape, self._outputs(), silos, lambda silo: self._open(silo, columns), columns=columns
        )

    def _outputs(self) -> int:
        return self.num_classes or (len(self.classes) if self.classes and self.task == "classification" else 1)

    def _open(self, silo: str, columns: dict[str, tuple[str, ...]]) -> SiloData:
        declared = next(s for s in self.silos if s.id == silo)
        path = root_of(self.root) / declared.path
        if not path.is_file():
            raise DataMissing(f"silo '{silo}': no file {path.absolute()}; put it there or correct its path")
        where = f"silo '{silo}': {path}"
        arrays = formats.read(path, where, self.target, self.features, self.levels)
        columns[silo] = tuple(str(name) for name in arrays.get("columns", ()))
        if "x" in arrays:
            arrays = parted(arrays["x"], arrays["y"], self.test_fraction, silo, where)
        data = SiloData(*self._part(arrays, "train", where), *self._part(arrays, "test", where))
        num = len(data.x_train)
        if num == 0:
            raise ConfigError(f"silo '{silo}' has no samples for training in {path}")
        if declared.num_samples not in (None, num):
            raise ConfigError(f"silo '{silo}' declares {declared.num_samples} training samples, {path} has {num}")
        return data

    def _part(self, arrays: formats.Arrays, part: str, where: str) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim == 0 or x.shape[1:] != self.shape:
            raise ConfigError(f"{where}: samples of x ({part}) have shape {list(x.shape[1:])}, not {list(self.shape)}")
        if y.ndim == 0 or len(y) != len(x):
            raise ConfigError(f"{where}: {len(x)} samples, but y ({part}) has shape {list(y.shape)}")
        if self.task == "next_token":
            symbols = self._numbers(x, self.shape, f"{where}: x ({part})")
            return symbols, self._numbers(y, self.shape, f"{where}: y ({part})")
        if not np.isfinite(x := _floats(x, f"{where}: x ({part})")).all():
            raise ConfigError(f"{where}: x ({part}) has NaN or infinite values in {_bad_rows(x)} of {len(x)} samples")
        return torch.from_numpy(x), self._targets(y, f"{where}: y ({part})")

    def _targets(self, y: npt.NDArray[Any], where: str) -> torch.Tensor:
        """int64 [N] for classification, float32 [N] for binary, float32 [N] or [N, targets] for regression."""
        num = self._outputs() if self.task == "regression" else 1
        shape = (num,) if num > 1 else ()
        if y.ndim == 2 and y.shape[1] == 1 and num == 1:
            y = y[:, 0]
        if self.task == "classification":
            return self._numbers(y, shape, where)
        if self.task == "binary":
            return self._numbers(y, shape, where).float()
        _same_shape(y, shape, where)
        if not np.isfinite(y := _floats(y, where)).all():
            raise ConfigError(f"{where} has NaN or infinite values in {_bad_rows(y)} of {len(y)} samples")
        return torch.from_numpy(y)

    def _numbers(self, values: npt.NDArray[Any], shape: tuple[int, ...], where: str) -> torch.Tensor:
        """Labels or symbols as int64; each in 0 to its limit."""
        _same_shape(values, shape, where)
        limit = 2 if self.task == "binary" else self._outputs()
        if self.classes:
            values = formats.codes(values, self.classes, where)
        values = _floats(values, where, np.float64)
        if values.size and not ((values >= 0) & (values < limit) & (values % 1 == 0)).all():
            bad = values[~((values >= 0) & (values < limit) & (values % 1 == 0))][0]
            raise ConfigError(f"{where}: label {bad:g} is not a whole number from 0 to {limit - 1}")
        return torch.from_numpy(values.astype(np.int64))


def parted(x: npt.NDArray[Any], y: npt.NDArray[Any], fraction: float, silo: str, where: str) -> formats.Arrays:
    """x and y in two, in file order; which rows are for testing depends on the silo's id and their number alone."""
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise ConfigError(f"{where}: x has shape {list(x.shape)}, y {list(y.shape)}; they need as many rows")
    order = generator(0, purpose="test part", silo=silo).permutation(len(x))
    num_test = min(round(fraction * len(x)), len(x) - 1) if len(x) else 0
    test, train = np.sort(order[:num_test]), np.sort(order[num_test:])
    return {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]}


def _same_shape(values: npt.NDArray[Any], shape: tuple[int, ...], where: str) -> None:
    if values.shape[1:] != shape:
        raise ConfigError(f"{where} has shape {list(values.shape[1:])} per sample, not {list(shape)}")


def _floats(values: npt.NDArray[Any], where: str, dtype: Any = np.float32) -> npt.NDArray[Any]:
    try:
        return np.ascontiguousarray(values, dtype)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}; text labels need `classes`") from None


def _bad_rows(values: npt.NDArray[Any]) -> int:
    return int((~np.isfinite(values.reshape(len(values), -1))).any(axis=1).sum())
