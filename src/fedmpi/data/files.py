"""Data that are already distributed: one file per silo, opened only by the rank that hosts the silo."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pydantic
import torch

from fedmpi.components import Decay, PositiveInt, component, did_you_mean
from fedmpi.data import formats
from fedmpi.data.images import read_folder
from fedmpi.data.official import root_of
from fedmpi.data.prepare import Missing, Pooled, Preparation, Scale
from fedmpi.data.stream import FileSamples, Raw
from fedmpi.data.table import SEPARATORS, Columns, codes, plain
from fedmpi.data.values import Rows, bad_rows, finite, floats, not_finite, shaped
from fedmpi.errors import ConfigError, DataMissing
from fedmpi.rng import generator
from fedmpi.types import Samples, Silo, SiloData, Source, Task, blocks

Value = int | float | str  # as a file writes it; 1, "1" and 1.0 are equal


@component
class FileSilo:
    """One silo and its file."""

    id: str
    """stable name of the data owner"""
    path: Path
    """.h5, .npz, .csv or .parquet, or a folder of images; relative to root"""
    host: str | None = None
    """the only host that may open it; null: any"""
    num_samples: PositiveInt | None = None
    """number of training samples, for placement; null: read when the file is opened"""


@component
class Files:
    """One HDF5, npz, CSV or Parquet file, or one folder of images, per silo.

    HDF5 and npz hold x_train, y_train, x_test, y_test, or x, y. CSV (UTF-8) has a header line; columns are read by
    name. Labels are 0, 1, ... or those of `classes`. Every number must be finite, but see `missing`.
    Without a test part, `test_fraction` of the rows is split off, depending on the silo's id and not on the run's seed.
    Shape, classes and levels are configured for all silos together: nothing is learned from another silo's data.
    """

    silos: tuple[FileSilo, ...]
    """for each silo: id, path, host, num_samples"""
    task: Task
    """classification, binary, regression or next_token"""
    shape: tuple[PositiveInt, ...]
    """shape of one sample, without the batch axis"""
    num_classes: PositiveInt | None = None
    """number of classes, symbols, or regression targets; null: the length of classes, else 1"""
    classes: tuple[Value, ...] | None = None
    """labels as written in the files, class 0 first, such as [1, 2, 3]"""
    test_fraction: Decay = 0.2
    """share of a file's rows used for testing, if it has no test part (0 to 1)"""
    target: str | tuple[str, ...] = "target"
    """CSV: column of the label; for a regression with several targets, their columns, such as [time, event]"""
    features: tuple[str, ...] | None = None
    """CSV: numeric columns; null: all other columns, sorted by name"""
    levels: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    """CSV: columns to one-hot encode, with their possible values"""
    separator: str = ","
    """CSV: column separator: "," ";" "|" or a tab"""
    root: Path | None = None
    """folder of relative paths; null: $FEDMPI_DATA, else ./data"""
    scale: Scale | None = None
    """standard: (x - mean) / standard deviation; minmax: (x - min) / (max - min); of training samples, per column, or
    per channel of samples [C, ...]; one-hot columns stay as they are"""
    missing: Missing = "error"
    """missing values and NaN: refuse them, or fill in 0, or the column's mean or median over training samples, before
    scaling; the median only with statistics: silo, since sums of all silos do not give it"""
    indicators: tuple[str, ...] = ()
    """CSV: numeric columns that get a further column: 1 where the value is missing, else 0"""
    statistics: Literal["silo", "pooled"] = "silo"
    """training samples behind means and deviations: each silo's own, or those of all silos together"""
    stream: bool = False
    """HDF5, npz: inputs stay in the file and batches are read from it, for silos larger than memory"""

    def __post_init__(self) -> None:
        """Raises ValueError if fields contradict each other."""
        ids = [silo.id for silo in self.silos]
        if not ids:
            raise ValueError("files: needs at least one silo")
        seen: set[str] = set()
        for silo in self.silos:
            if not silo.id.strip():
                raise ValueError(f"files: the silo of {silo.path} has an empty id")
            if silo.id in seen:
                raise ValueError(f"files: two silos are called '{silo.id}'")
            seen.add(silo.id)
            if not silo.path.suffix and self.classes and len(self.shape) == 3 and self.task in _CLASSES:
                continue  # a folder of images
            if silo.path.suffix.lower() not in formats.ENDINGS:
                raise ValueError(f"silo '{silo.id}': {silo.path} ends in none of {', '.join(formats.ENDINGS)}")
        if self.task in ("classification", "next_token") and not (self.num_classes or self.classes):
            raise ValueError(f"files: task {self.task} needs num_classes or classes")
        if self.task == "binary" and (self.num_classes or 1) != 1:
            raise ValueError("files: num_classes of a binary task is 1 (one output for two labels)")
        if self.task == "binary" and len(self.classes or (0, 1)) != 2:
            raise ValueError(f"files: a binary task has two classes, not {len(self.classes or ())}")
        if self.classes and self.task == "regression":
            raise ValueError("files: a regression has numbers for targets and no classes")
        if self.classes and self.task != "binary" and self.num_classes not in (None, len(self.classes)):
            raise ValueError(f"files: num_classes is {self.num_classes}, but classes has {len(self.classes)}")
        for name, values in {"classes": self.classes or (), **self.levels}.items():
            if (twice := _twice([plain(value) for value in values])) is not None:
                raise ValueError(f"files: {name} has {twice} twice (1, '1' and 1.0 are the same)")
        self._check_columns()
        if self.stream:
            self._check_stream()
        if self.task == "next_token" and (self.scale is not None or self.missing != "error"):
            raise ValueError("files: scale and missing are for numbers, and a next_token sample holds symbols")
        if self.missing == "median" and self.statistics == "pooled":
            raise ValueError(
                "files: missing: median takes statistics: silo: sums, which is all that leaves a silo, do not give the "
                "median of all; or take missing: mean"
            )
        if self.missing == "median" and self.stream:
            raise ValueError("files: missing: median reads whole columns, and stream reads batches; take missing: mean")
        if self.indicators and self.missing == "error":
            raise ValueError("files: indicators tell where values are missing, and missing: error refuses those")
        if self.statistics == "pooled" and not self._preparation.fits:
            raise ValueError("files: statistics: pooled needs scale, or missing: mean; there is no statistic otherwise")

    def _check_stream(self) -> None:
        """Raises ValueError if the inputs cannot be streamed."""
        for silo in self.silos:
            if silo.path.suffix.lower() not in formats.STREAMED:
                raise ValueError(f"files: {silo.path} cannot be streamed: stream takes HDF5 or npz")
        if self.task == "next_token":
            raise ValueError(
                "files: stream keeps targets in memory, and those of next_token are as large as the inputs"
            )

    def _check_columns(self) -> None:
        """Raises ValueError if the CSV fields contradict each other."""
        of_csv = [silo.path.suffix.lower() in formats.TABLES for silo in self.silos]
        if self.separator not in SEPARATORS:
            raise ValueError(f"files: separator is {self.separator!r}; one of {', '.join(SEPARATORS.values())}")
        if not any(of_csv) and (self.features is not None or self.levels or self.indicators):
            raise ValueError("files: features, levels and indicators are for CSV files, and there is none")
        if (twice := _twice(self.indicators)) is not None:
            raise ValueError(f"files: column '{twice}' is named twice in indicators")
        features = self.features
        if features is not None and (others := [name for name in self.indicators if name not in features]):
            raise ValueError(f"files: indicators: '{others[0]}' is not in features{did_you_mean(others[0], features)}")
        if (twice := _twice([*(self.features or ()), *self.levels])) is not None:
            raise ValueError(f"files: column '{twice}' is named twice in features and levels")
        if (twice := _twice(self._targets())) is not None:
            raise ValueError(f"files: column '{twice}' is named twice in target")
        for name in self._targets():
            if name in (*(self.features or ()), *self.levels):
                raise ValueError(f"files: '{name}' is the target; it cannot be a feature too")
        num, wanted = len(self._targets()), self._outputs() if self.task == "regression" else 1
        if all(of_csv) and num != wanted:
            why = f"num_classes is {wanted}" if self.task == "regression" else f"task {self.task} has one target"
            raise ValueError(f"files: target names {num} column{'s' if num != 1 else ''}, but {why}")
        if all(of_csv) and self.features is not None:
            num, what = len(self.features) + self._as_they_are, "features and levels"
            if self.shape != (num,):
                what = "features, levels and indicators" if self.indicators else what
                raise ValueError(f"files: shape is {list(self.shape)}, but {what} make {num} columns")

    def source(self, seed: int) -> Source:
        """The silos as declared; opens no file."""
        silos = tuple(Silo(id=s.id, num_samples=s.num_samples, host=s.host) for s in self.silos)
        columns: dict[str, tuple[str, ...]] = {}
        filled: dict[str, int] = {}
        how = self._preparation

        rows: dict[str, tuple[Any, Any]] = {}

        def read(silo: str) -> SiloData:
            return self._read(silo, columns, filled, rows)

        pooled = Pooled(how, read) if self.statistics == "pooled" else None

        def opened(silo: str) -> SiloData:
            if pooled is not None:
                return how.apply(pooled.take(silo), pooled.found)
            data = read(silo)
            return how.apply(data, how.of_one(data))

        def inputs(path: Path, silo: str | None) -> tuple[Samples, Any, torch.Tensor | None]:
            where = str(path)
            content = self._inputs_of(path, where)
            if silo is None and ((how.fits and pooled is None) or (content.columns and self.features is None)):
                what = "statistics of its training samples" if how.fits and pooled is None else "names of its columns"
                raise ConfigError(f"{where}: a silo's {what} are needed; name the silo with --silo")
            found = how.none if pooled is None else pooled.found
            if silo is not None and (pooled is None or content.columns):
                data = read(silo)
                found = how.of_one(data) if pooled is None else found
                if content.columns and content.columns != columns[silo]:
                    raise ConfigError(f"{where} has other columns than silo '{silo}'; name them in data.features")
            x = torch.from_numpy(self._checked_inputs(content, where))
            nothing = torch.empty(0)
            names = np.array(content.lines) if content.lines else np.arange(len(x))
            prepared = how.apply(SiloData(x, nothing, x[:0], nothing), found).x_train
            return prepared, names, self._targets_of(content, where, len(x))

        def preparation(silo: str | None) -> dict[str, Any] | None:
            found = how.none if pooled is None else pooled.found
            if silo is not None and (pooled is None and how.fits):
                found = how.of_one(read(silo))
            names = columns.get(silo or "", self._columns.of_x(self.features or ()))
            return {**how.told(found), "columns": list(names)} if how.changes else None

        return Source(
            self.task,
            self.shape,
            self._outputs(),
            silos,
            opened,
            columns=columns,
            filled=filled,
            rows=rows,
            classes=self.classes or (),
            inputs=inputs,
            preparation=preparation,
            files={s.id: root_of(self.root) / s.path for s in self.silos},
            fitted=how.fits,
            shared=pooled,
            readable=self._readable,
        )

    @property
    def _preparation(self) -> Preparation:
        return Preparation(self.shape, self.scale, self.missing, self._as_they_are)

    @property
    def _as_they_are(self) -> int:
        """Number of columns that are neither filled in nor scaled."""
        return sum(map(len, self.levels.values())) + len(self.indicators)

    @property
    def _columns(self) -> Columns:
        fills = self.missing != "error"
        return Columns(self._targets(), self.features, self.levels, self.separator, False, fills, self.indicators)

    def with_silo(self, silo: str, path: Path) -> Files:
        """With one more silo. ConfigError in one line where it does not fit the others."""
        try:
            return replace(self, silos=(*self.silos, FileSilo(id=silo, path=path)))
        except pydantic.ValidationError as error:
            raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None

    def _readable(self, silo: str) -> bool:
        path = root_of(self.root) / next(s.path for s in self.silos if s.id == silo)
        return path.exists() and os.access(path, os.R_OK)

    def _targets(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else self.target

    def _outputs(self) -> int:
        return self.num_classes or (len(self.classes) if self.classes and self.task != "binary" else 1)

    def _inputs_of(self, path: Path, where: str) -> formats.Content:
        """The inputs of any file, as those of the silos. Raises ConfigError."""
        if not path.is_file():
            raise DataMissing(f"no file {path.absolute()}")
        return formats.read_inputs(path, where, self._columns)

    def _targets_of(self, content: formats.Content, where: str, num: int) -> torch.Tensor | None:
        """The targets of new samples, as those of the silos; None if there are none, or, with a warning, if they cannot
        be read."""
        if "y" not in content.arrays or self.task == "next_token":
            return None
        y, rows = content.arrays["y"], Rows(content, "y", where)
        assert not isinstance(y, Raw)
        try:
            if y.dtype.kind not in "biufSUO" or y.ndim == 0 or len(y) != num:
                raise ConfigError(f"{rows.name} holds {y.dtype} of {list(y.shape)}, and there are {num} samples")
            return torch.from_numpy(self._numbers(y, rows))
        except ConfigError as error:
            log.warning("%s; the predictions have no targets", error)
            return None

    def _numbers(self, y: npt.NDArray[Any], rows: Rows) -> npt.NDArray[Any]:
        """Targets, one or several numbers a sample, in their training type. Raises ConfigError."""
        if self.task == "regression":
            num = self._outputs()
            return finite(shaped(y, (num,) if num > 1 else (), rows), rows)
        labels = self._symbols(y, (), rows)
        return labels.astype(np.float32) if self.task == "binary" else labels

    def _checked_inputs(self, content: formats.Content, where: str) -> npt.NDArray[Any]:
        x, rows = content.arrays["x"], Rows(content, "x", where)
        assert not isinstance(x, Raw)
        if x.dtype.kind not in "biufSU" or x.shape[1:] != self.shape or not x.shape:
            raise ConfigError(
                f"{rows.name} holds {x.dtype} of {list(x.shape[1:])}, and data.shape is {list(self.shape)}"
            )
        return (
            self._symbols(x, self.shape, rows)
            if self.task == "next_token"
            else finite(x, rows, self.missing != "error")
        )

    def _read(
        self,
        silo: str,
        columns: dict[str, tuple[str, ...]],
        filled: dict[str, int],
        rows: dict[str, tuple[Any, Any]],
    ) -> SiloData:
        """A silo's samples, not prepared: missing values are NaN."""
        declared = next(s for s in self.silos if s.id == silo)
        path = root_of(self.root) / declared.path
        try:
            if path.is_dir() and declared.path.suffix:
                raise DataMissing(f"silo '{silo}': {path.absolute()} is a folder; correct its path to one file in it")
            if not path.exists() or (path.is_file() and not declared.path.suffix):
                root = root_of(self.root)
                here = "" if root.is_absolute() else " in the current folder"
                where = f"put it there, or correct its path or data.root ({root}{here})"
                raise DataMissing(f"silo '{silo}': no file {path.absolute()}; {where}")
        except OSError as error:
            raise DataMissing(f"silo '{silo}': {path.absolute()} cannot be reached: {error.strerror}") from None
        where = f"silo '{silo}': {path}"
        if declared.path.suffix:
            content = formats.read(path, where, self._columns, self.stream)
        else:
            content = formats.Content(read_folder(path, where, self.shape, self.classes or ()))
        columns[silo] = content.columns
        if "x" in content.arrays:
            x, y = self._checked(content, "x", "y", where)
            train, test = parts_of(len(y), self.test_fraction, silo)
            parts = _rows_of(x, train), y[train], _rows_of(x, test), y[test]
            lines = np.array(content.lines)
            rows[silo] = (lines[train], lines[test]) if content.lines else (train, test)
        else:
            parts = (
                *self._checked(content, "x_train", "y_train", where),
                *self._checked(content, "x_test", "y_test", where),
            )
        x_train, y_train, x_test, y_test = parts
        data = SiloData(_samples(x_train), torch.from_numpy(y_train), _samples(x_test), torch.from_numpy(y_test))
        filled[silo] = 0
        if self.missing != "error":
            parts_of_x = (block for x in (data.x_train, data.x_test) for block in blocks(x))
            filled[silo] = sum(int(block.isnan().sum()) for block in parts_of_x)
        num = len(data.x_train)
        if num == 0:
            raise ConfigError(f"silo '{silo}' has no samples for training in {path}")
        if declared.num_samples not in (None, num):
            raise ConfigError(f"silo '{silo}' declares {declared.num_samples} training samples, {path} has {num}")
        return data

    def _checked(self, content: formats.Content, x_key: str, y_key: str, where: str) -> tuple[Inputs, npt.NDArray[Any]]:
        """Samples and targets, checked and converted to training types. Raises ConfigError."""
        x, y = content.arrays[x_key], content.arrays[y_key]
        assert not isinstance(y, Raw)
        of_x, of_y = Rows(content, x_key, where), Rows(content, y_key, where)
        for values, rows in ((x, of_x), (y, of_y)):
            if values.dtype.kind not in "biufSUO":
                raise ConfigError(f"{rows.name} holds {values.dtype}; plain numbers are needed")
        if isinstance(x, Raw) and x.dtype.kind not in "biuf":
            raise ConfigError(f"{of_x.name} holds {x.dtype}; data.stream needs numbers")
        if not x.shape or x.shape[1:] != self.shape:
            named = f" ({', '.join(content.columns)})" if 0 < len(content.columns) <= 40 else ""
            raise ConfigError(
                f"{where}: samples of {x_key} have shape {list(x.shape[1:])}{named}, data.shape is {list(self.shape)}"
                f"{_reordered(x_key, x.shape, self.shape)}"
            )
        if y.ndim == 0 or len(y) != x.shape[0]:
            raise ConfigError(f"{where}: {x_key} has {x.shape[0]} samples, but {y_key} has shape {list(y.shape)}")
        if self.task == "next_token":
            assert not isinstance(x, Raw)
            return self._symbols(x, self.shape, of_x), self._symbols(y, self.shape, of_y)
        return _inputs(x, of_x, self.missing != "error"), self._numbers(y, of_y)

    def _symbols(self, values: npt.NDArray[Any], shape: tuple[int, ...], rows: Rows) -> npt.NDArray[np.int64]:
        """Labels or symbols as int64, each from 0 to below its limit. Raises ConfigError."""
        what = "symbol" if self.task == "next_token" else "label"
        limit = 2 if self.task == "binary" else self._outputs()
        if self.task == "classification" and values.ndim == 2 and values.shape[1] == limit > 1:
            raise ConfigError(f"{rows.name} has {limit} numbers a sample; a label is one number: its class (argmax)")
        values = shaped(values, shape, rows)
        if self.classes:
            return codes(values, self.classes, rows.name, rows.place)
        try:
            numbers = floats(values, rows, np.float64)
        except ConfigError as error:
            raise ConfigError(f"{error}{_classes_for(values, limit)}") from None
        with np.errstate(invalid="ignore"):
            bad = ~((numbers >= 0) & (numbers < limit) & (numbers % 1 == 0))
        if bad.any():
            row = int(np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))[0])
            raise ConfigError(
                f"{rows.name}: {what} {numbers[bad].flat[0]:g} is not a whole number from 0 to {limit - 1} "
                f"({rows.place(row)}){_classes_for(numbers, limit)}"
            )
        return numbers.astype(np.int64)


log = logging.getLogger("fedmpi")

_CLASSES = ("classification", "binary")
Inputs = npt.NDArray[Any] | FileSamples


def parts_of(num: int, fraction: float, silo: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rows for training and those for testing, in file order. They depend only on the silo's id and the number of
    rows."""
    order = generator(0, purpose="test part", silo=silo).permutation(num)
    num_test = min(round(fraction * num), num - 1) if num else 0
    return np.sort(order[num_test:]), np.sort(order[:num_test])


def _reordered(x_key: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What to do about samples whose axes are in another order, such as [length, channels]; else empty."""
    if sorted(stored[1:]) != sorted(wanted):
        return ""
    left, order = list(enumerate(stored))[1:], [0]
    for size in wanted:  # axes of the same size keep their order
        axis = next(i for i, (_, other) in enumerate(left) if other == size)
        order.append(left.pop(axis)[0])
    return f"; if only the order of the axes differs, write numpy.transpose({x_key}, {tuple(order)})"


def _rows_of(x: Inputs, rows: npt.NDArray[np.int64]) -> Inputs:
    return x.part(rows) if isinstance(x, FileSamples) else x[rows]


def _samples(x: Inputs) -> Samples:
    return x if isinstance(x, FileSamples) else torch.from_numpy(x)


def _inputs(x: npt.NDArray[Any] | Raw, rows: Rows, fills: bool) -> Inputs:
    """The inputs as float32, all finite, or NaN where `fills`. Raises ConfigError."""
    if not isinstance(x, Raw):
        return finite(x, rows, fills)
    samples, num = FileSamples(x), 0
    bad: list[int] = []
    for block in samples.blocks():
        bad += (num + bad_rows(block.numpy(), fills)).tolist()
        num += len(block)
    if bad:
        raise not_finite(rows, x.read(np.array(bad[:1])), bad, num)
    return samples


def _twice(values: Sequence[Any]) -> Any:
    """The first value that occurs more than once, or None."""
    return next((value for i, value in enumerate(values) if value in values[:i]), None)


def _classes_for(labels: npt.NDArray[Any], limit: int) -> str:
    """A hint for messages: the `classes` that these labels would need; empty if that is unclear."""
    if labels.dtype.kind == "f" and not (np.isfinite(labels).all() and (labels % 1 == 0).all()):
        return ""
    found = sorted({plain(label) for label in labels.ravel()[:100_000].tolist()}, key=lambda v: (isinstance(v, str), v))
    texts = [label for label in found if isinstance(label, str)]
    numbers = [label for label in found if not isinstance(label, str)]
    if not texts and min(numbers) >= 1 and max(numbers) <= limit:
        return f"; labels counted from 1 need data.classes: [{', '.join(map(str, range(1, limit + 1)))}]"
    if len(found) == limit and "" not in texts:
        return f"; name them in their order: data.classes: [{', '.join(str(_whole(label)) for label in found)}]"
    return "; labels of text need data.classes" if texts else ""


def _whole(label: float | str) -> int | float | str:
    return label if isinstance(label, str) or label != int(label) else int(label)
