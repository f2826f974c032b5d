"""Values of a silo's file as numbers, checked; messages name the array and the row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmpi.data import formats
from fedmpi.data.table import plain
from fedmpi.errors import ConfigError


class Rows:
    """Names an array of a file and its rows, for messages."""

    def __init__(self, content: formats.Content, key: str, where: str) -> None:
        self._content, self._key = content, key
        self.name, self.of_inputs = f"{where}: {content.name(key)}", key.startswith("x")

    def place(self, row: int) -> str:
        return self._content.place(self._key, row)


def bad_rows(numbers: npt.NDArray[np.float32], fills: bool) -> npt.NDArray[np.int64]:
    """Rows with values that are not finite; NaN is accepted if missing values are filled in."""
    good = ~np.isinf(numbers) if fills else np.isfinite(numbers)
    if good.all():
        return np.empty(0, np.int64)
    return np.flatnonzero(~good.reshape(len(good), -1).all(axis=1))


def not_finite(rows: Rows, first: npt.NDArray[Any], bad: Sequence[int], num: int) -> ConfigError:
    """Text on samples, by number, with values that are not finite; `first`: the first of them, as in the file."""
    what, remedy = "NaN or infinite values", ""
    if first.dtype.kind in "iuf" and np.isfinite(first).all():
        what = "values beyond float32 (3.4e38)"
    elif first.dtype.kind == "f" and np.isnan(first).any() and rows.of_inputs:
        remedy = "; set data.missing to fill NaN in"
    told = f"{what} in {len(bad)} of {num} samples, first in {rows.place(int(bad[0]))}"
    return ConfigError(f"{rows.name} has {told}{remedy}")


def shaped(values: npt.NDArray[Any], shape: tuple[int, ...], rows: Rows) -> npt.NDArray[Any]:
    """The values, checked to have this shape per sample; [N, 1] is accepted as [N]. Raises ConfigError."""
    if values.ndim == 2 and values.shape[1] == 1 and shape == ():
        return values[:, 0]
    if values.shape[1:] != shape:
        raise ConfigError(f"{rows.name} has shape {list(values.shape[1:])} per sample, not {list(shape)}")
    return values


def finite(values: npt.NDArray[Any], rows: Rows, fills: bool = False) -> npt.NDArray[np.float32]:
    """The values as float32. Raises ConfigError unless all are finite, or NaN where `fills`."""
    numbers = floats(values, rows, np.float32)
    if len(bad := bad_rows(numbers, fills)):
        raise not_finite(rows, values[bad[0]], bad.tolist(), len(numbers))
    return numbers


def floats(values: npt.NDArray[Any], rows: Rows, dtype: Any) -> npt.NDArray[Any]:
    """The values as numbers of this type; parses text. Raises ConfigError."""
    try:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(values, dtype)
    except (ValueError, TypeError):
        pass
    numbers = [plain(value) for value in values.ravel()]
    bad = next((i for i, number in enumerate(numbers) if isinstance(number, str)), None)
    if bad is None:  # True and False, or numbers with blanks around them
        return np.array(numbers, dtype).reshape(values.shape)
    shown = repr(numbers[bad]) if numbers[bad] else "empty"
    raise ConfigError(
        f"{rows.name}: {rows.place(bad // (len(numbers) // len(values)))} is {shown}, which is not a number"
    )
