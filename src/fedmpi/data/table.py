"""Reads one silo's CSV or Parquet file: columns that are read by name. Nothing is guessed or filled in: values
that are missing or not numbers are reported with column and line."""

from __future__ import annotations

import csv
import importlib.util
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmpi.components import did_you_mean
from fedmpi.errors import ConfigError

SEPARATORS = {",": "','", ";": "';'", "\t": "a tab", "|": "'|'"}
MISSING = ("", "na", "n/a", "nan", "null", "none", "?", "-", ".")
_SHOWN = 12  # maximum number of names in a message

Cells = npt.NDArray[np.str_]


@dataclass(frozen=True)
class Columns:
    """The columns of x and y, as configured in `Files`."""

    targets: Sequence[str]
    features: Sequence[str] | None
    levels: Mapping[str, Sequence[Any]]
    separator: str
    unlabelled: bool = False  # whether the columns of y may be missing
    fills: bool = False  # whether missing numbers become NaN, and are filled in later
    indicators: Sequence[str] = ()  # numeric columns of which a further one tells where they are missing

    def numeric(self, names: Sequence[str]) -> list[str]:
        """The numeric columns of x, in order: the configured ones, or else all others, sorted by name."""
        if self.features is not None:
            return list(self.features)
        return sorted(set(names) - {*self.targets, *self.levels})

    def of_x(self, numeric: Sequence[str]) -> tuple[str, ...]:
        """The names of the columns of x; a column in `levels` has one."""
        return (*numeric, *self.levels, *(f"{name} is missing" for name in self.indicators))


@dataclass(frozen=True)
class Table:
    """The content of a CSV file."""

    # Numeric columns first, then one per level of each column in `levels`, then one per column in `indicators`.
    x_NX: npt.NDArray[np.float32]
    y: Cells  # [N], or [N, targets] if there are several; text as in the file
    columns: tuple[str, ...]  # the columns of x
    lines: tuple[int, ...]  # line number of every row


def read_csv(path: Path, where: str, columns: Columns) -> Table:
    """Reads the columns of x and y. Raises ConfigError.

    Without `features`, the numeric columns are all others, sorted by name: files with the same columns in another order
    give the same x.
    """
    names, rows, lines = _rows(_text(path, where), where, columns.separator)
    return table_of(names, lambda name: np.array([row[names.index(name)] for row in rows], str), lines, where, columns)


def table_of(
    names: list[str],
    column: Callable[[str], Any],
    lines: Sequence[int],
    where: str,
    columns: Columns,
    num: int | None = None,
) -> Table:
    """The table of a file with these columns. `column` gives the cells of one: text, or numbers with NaN for those that
    are missing. `lines`: of its rows; without lines there are `num` rows. Raises ConfigError."""
    num = len(lines) if num is None else num

    def place(row: int) -> str:
        return f"line {lines[row]}" if lines else f"row {row}"

    numeric = columns.numeric(names)
    if columns.unlabelled and not {*columns.targets} <= {*names}:
        columns = replace(columns, targets=())
    _check_names(names, [*columns.targets, *numeric, *columns.levels], where, columns)
    cells = {n: column(n) for n in {*columns.targets, *numeric, *columns.levels}}
    cells |= {n: _texts(cells[n]) for n in {*columns.targets, *columns.levels}}
    x = _numbers({name: cells[name] for name in numeric}, where, place, columns.fills)
    for name, values in columns.levels.items():
        code = codes(cells[name], values, f"{where}: column '{name}'", place)
        x += [(code == i).astype(np.float32) for i in range(len(values))]
    if others := [name for name in columns.indicators if name not in numeric]:
        raise ConfigError(
            f"{where}: data.indicators: '{others[0]}' is no numeric column{did_you_mean(others[0], numeric)}"
        )
    x += [np.isnan(x[numeric.index(name)]).astype(np.float32) for name in columns.indicators]
    x_NX = np.stack(x, axis=1) if x else np.empty((num, 0), np.float32)
    y = np.stack([cells[name] for name in columns.targets], axis=1) if columns.targets else np.empty((num, 0), str)
    return Table(x_NX, y[:, 0] if len(columns.targets) == 1 else y, columns.of_x(numeric), tuple(lines))


def _text(path: Path, where: str) -> str:
    content = path.read_bytes()
    if not content.strip():
        raise ConfigError(f"{where} is empty")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{where} is UTF-16; save it as UTF-8")
    if b"\0" in content or content.startswith((b"PK\x03\x04", b"\x1f\x8b")):
        raise ConfigError(f"{where} is not text; a spreadsheet or an archive must be saved as CSV first")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{where} is not UTF-8 in line {line} (byte {content[error.start]:#x}); save it as UTF-8"
        ) from None


def _rows(text: str, where: str, separator: str) -> tuple[list[str], list[list[str]], list[int]]:
    """The header's names, the rows below it, and the line on which each row ends. Raises ConfigError."""
    # Strict: otherwise a quote that is never closed would swallow the rest of the file as one cell.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names: list[str] | None = None
    rows, lines = [], []
    try:
        for row in reader:
            if names is None:
                names = [name.strip() for name in row]
            elif len(row) == len(names) > 1 and not "".join(row).strip():
                raise ConfigError(f"{where} has only empty cells in line {reader.line_num}; leave the line out")
            elif len(row) == len(names):
                rows.append(row)
                lines.append(reader.line_num)
            elif "".join(row).strip():
                raise ConfigError(f"{where} has {len(row)} cells in line {reader.line_num}, its header {len(names)}")
    except csv.Error as error:
        raise ConfigError(f"{where} cannot be read as CSV at line {reader.line_num}: {error}") from None
    names = names or []
    others = [s for s in SEPARATORS if s != separator and len(names) == 1 and s in names[0]]
    if others:
        used, asked = SEPARATORS[others[0]], SEPARATORS.get(separator, repr(separator))
        told = repr(others[0]).replace("'", '"')
        raise ConfigError(f"{where} has {used} between its columns, not {asked}; set data.separator: {told}")
    if names and all(_number(name) is not None for name in names):
        raise ConfigError(f"{where} begins with numbers; its first line must name the columns")
    if not rows:
        raise ConfigError(f"{where} has a header line and no rows")
    return names, rows, lines


def _check_names(names: list[str], wanted: list[str], where: str, columns: Columns) -> None:
    """Raises ConfigError unless every wanted column exists exactly once."""
    if missing := [name for name in wanted if name not in names]:
        asked = {*columns.targets, *(columns.features or ()), *columns.levels}
        others = [name for name in names if name and name not in asked]
        close = {name: hint for name in missing if "did you mean" in (hint := did_you_mean(name, others))}
        of_target = dict.fromkeys(columns.targets, " (data.target)")
        told = ", ".join(f"'{name}'{of_target.get(name, '')}{close.get(name, '')}" for name in missing[:_SHOWN])
        left = (
            "" if not others or (len(close) == len(missing) and set(columns.targets) <= set(names)) else listed(others)
        )
        left = left and f"; other columns: {left}"
        raise ConfigError(f"{where} has no column{'s' if len(missing) > 1 else ''} {told}{left}")
    for name in wanted:
        if names.count(name) > 1:
            at = ", ".join(str(i + 1) for i, other in enumerate(names) if other == name)
            raise ConfigError(f"{where}: columns {at} are all called '{name}'; rename or remove all but one")
    if columns.features is None and "" in names:
        raise ConfigError(
            f"{where} has no name for its column {names.index('') + 1} (an index, as pandas writes it? index=False "
            "leaves it out); name it, remove it, or name those to use in data.features"
        )


def _number(cell: str) -> np.float32 | None:
    """The number in a cell; None if it is no number or not finite in float32."""
    try:
        with np.errstate(over="ignore"):
            value = np.float32(cell)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _texts(cells: npt.NDArray[Any]) -> Cells:
    """Cells as text; missing numbers are empty."""
    if cells.dtype.kind != "f":
        return cells
    return np.array(["" if np.isnan(value) else str(plain(value)) for value in cells.tolist()], str)


def _numbers(
    columns: Mapping[str, npt.NDArray[Any]], where: str, place: Callable[[int], str], fills: bool
) -> list[npt.NDArray[np.float32]]:
    """The columns as numbers; missing ones are NaN with `fills`. Raises ConfigError with columns and lines of cells
    that are not numbers."""
    found, wrong = [], []
    for name, cells in columns.items():
        if cells.dtype.kind == "f":
            with np.errstate(over="ignore"):
                numbers = cells.astype(np.float32)
            if np.isfinite(numbers[~np.isnan(cells)] if fills else numbers).all():
                found.append(numbers)
                continue
            cells = _texts(cells)
        lacks = np.isin(np.char.lower(np.char.strip(cells)), MISSING) & fills
        cells = np.where(lacks, "0", cells)
        try:
            with np.errstate(over="ignore"):
                values = cells.astype(np.float32)
        except ValueError:
            values = np.array([np.nan], np.float32)
        if np.isfinite(values).all():
            values[lacks] = np.nan
            found.append(values)
        else:
            wrong.append(_what_is_wrong(name, cells, place))
    if wrong:
        remedies = [remedy for _, remedy in wrong]
        told = [what if remedy in remedies[i + 1 : 3] else what + remedy for i, (what, remedy) in enumerate(wrong[:3])]
        more = f"; and {len(wrong) - 3} more columns" if len(wrong) > 3 else ""
        raise ConfigError(f"{where}: {'; '.join(told)}{more}")
    return found


def _what_is_wrong(name: str, cells: Cells, place: Callable[[int], str]) -> tuple[str, str]:
    """Text on the cells of a column that are not numbers, and what to do about them."""
    bad = [i for i, cell in enumerate(cells) if _number(cell) is None]
    first = [f"{place(i)} is {_shown(cells[i])}" for i in bad[:3]]
    more = f" ({len(bad)} cells of {len(cells)})" if len(bad) > 3 else ""
    told = f"column '{name}': {', '.join(first)}{more}"
    kinds = {str(cells[i]).strip() for i in bad}
    if all(kind.lower() in MISSING for kind in kinds):
        return (
            told,
            "; missing values are not filled in: give a number, set data.missing, or leave the line or column out",
        )
    if all(re.fullmatch(r"[-+]?\d+,\d+", kind) for kind in kinds):
        return told, "; write a decimal point"
    if all(isinstance(plain(kind), str) for kind in kinds) and len(bad) == len(cells):
        return told, "; a column of text goes into data.levels, with all its values"
    return told, "; every cell must be a finite number"


def _shown(cell: str) -> str:
    text = str(cell)
    return "empty" if not text.strip() else repr(text if len(text) < 40 else f"{text[:37]}...")


def codes(
    cells: npt.NDArray[Any], values: Sequence[Any], where: str, place: Callable[[int], str] = str
) -> npt.NDArray[np.int64]:
    """The position in `values` of every cell; "1", 1 and "1.0" are equal. `place` names a row, for the ConfigError.

    >>> codes(np.array(["b", "2.0", "b"]), [2, "b"], "").tolist()
    [1, 0, 1]
    """
    position = {plain(value): i for i, value in enumerate(values)}
    flat = np.asarray(cells).ravel()
    found, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
    for cell, index in sorted(zip(found, first, strict=True), key=lambda pair: int(pair[1])):
        if plain(cell) not in position:
            row = int(index) // (len(flat) // len(cells))
            text = cell.decode(errors="backslashreplace") if isinstance(cell, bytes) else str(cell)
            raise ConfigError(f"{where}: {place(row)} is {_shown(text)}, which is not one of {listed(values)}")
    return np.array([position[plain(cell)] for cell in found], np.int64)[inverse].reshape(np.shape(cells))


def listed(values: Sequence[Any]) -> str:
    """Names or values, for a message."""
    return ", ".join(map(str, values[:_SHOWN])) + (f", ... ({len(values)} in all)" if len(values) > _SHOWN else "")


def plain(value: Any) -> int | float | str:
    """A value in canonical form: a number if it is one, however it is written; else text without surrounding blanks.

    >>> plain("1.0") == plain(1) == plain(True) == plain(b" 1") == plain("true")
    True
    """
    text = (value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)).strip()
    if text.lower() in ("true", "false"):
        return int(text.lower() == "true")
    try:
        return int(text)  # int first: float64 cannot hold identifiers of more than 53 bits
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return text
    return number if np.isfinite(number) else text


def read_parquet(path: Path, where: str, columns: Columns) -> Table:
    """The same of a Parquet file, whose rows have no lines. Raises ConfigError."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"{where}: Parquet needs another package: pip install 'fedmpi[parquet]'")
    pyarrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    try:
        names = list(parquet.read_schema(path).names)
        wanted = {*columns.targets, *columns.numeric(names), *columns.levels} & {*names}
        table = parquet.read_table(path, columns=sorted(wanted))
    except (pyarrow.ArrowException, ValueError) as error:
        raise ConfigError(f"{where} cannot be read as .parquet: {' '.join(str(error).split())[:300]}") from None

    def column(name: str) -> npt.NDArray[Any]:
        cells = table[name]
        kind, types = cells.type, pyarrow.types
        if types.is_integer(kind) and cells.null_count == 0:
            return np.array([str(value) for value in cells.to_pylist()]) if name in exact else _floats(cells)
        if types.is_floating(kind) or types.is_integer(kind) or types.is_decimal(kind):
            return _floats(cells)
        return np.array(["" if value is None else str(value) for value in cells.to_pylist()], str)

    exact = {*columns.targets, *columns.levels}  # identifiers may have more digits than a float64
    if not table.num_rows:
        raise ConfigError(f"{where} has no rows")
    return table_of(names, column, (), where, columns, table.num_rows)


def _floats(cells: Any) -> npt.NDArray[np.float64]:
    numbers = [np.nan if value is None else float(value) for value in cells.to_pylist()]
    return np.array(numbers, np.float64)
