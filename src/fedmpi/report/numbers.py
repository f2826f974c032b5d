"""Numbers as text with units, and series with fewer points."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import numpy as np

MOST_POINTS = 400  # of a line in a chart and of its table


def number(value: Any, digits: int = 4) -> str:
    """A number as text: integers with thousands separated, others with `digits` decimals.

    >>> number(12345), number(0.91236), number(1e-7), number(None), number(3.0)
    ('12,345', '0.9124', '1.000e-07', '-', '3.0000')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value and not 10.0**-digits <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{digits}f}"


def seconds(value: float) -> str:
    """A duration.

    >>> seconds(0.0123), seconds(3.25), seconds(754), seconds(7300), seconds(200000)
    ('12.3 ms', '3.25 s', '12 min 34 s', '2 h 1 min', '2 d 7 h')
    """
    if not math.isfinite(value):
        return "-"
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    if value < 60:
        return f"{value:.3g} s"
    for unit, name, rest, rest_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if value >= unit:
            whole, left = divmod(int(value), unit)
            return f"{whole} {name} {left // rest} {rest_name}"
    raise AssertionError


def size(value: float) -> str:
    """A number of bytes, in powers of 1000.

    >>> size(950), size(77056), size(1.5e9)
    ('950 B', '77.1 kB', '1.50 GB')
    """
    if not math.isfinite(value):
        return "-"
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {name}" if abs(value) >= 10 * unit else f"{value / unit:.2f} {name}"
    return f"{value:.0f} B"


def moment(unix_s: float) -> str:
    """A time of day, in UTC.

    >>> moment(0)
    '1970-01-01 00:00:00 UTC'
    """
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


_SPELLED = {"auc": "AUC", "r2": "R²", "mse": "MSE", "rmse": "RMSE", "mae": "MAE", "macro_f1": "macro F1"}


def spelled(name: str, first: bool = True) -> str:
    """The name of a figure as text; `first`: it begins a heading.

    >>> spelled("accuracy"), spelled("personal_auc"), spelled("top_5_accuracy", first=False)
    ('Accuracy', 'Personal AUC', 'top 5 accuracy')
    """
    head, rest = ("personal ", name.removeprefix("personal_")) if name.startswith("personal_") else ("", name)
    text = head + _SPELLED.get(rest, rest.replace("_", " "))
    return text[:1].upper() + text[1:] if first else text


def plural(count: int, noun: str) -> str:
    """
    >>> plural(1, "silo"), plural(2000, "silo")
    ('1 silo', '2,000 silos')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: list[str], most: int = 5) -> str:
    """
    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most:,} more"


def thin(num: int, *series: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """Indices of at most about `most` of `num` points: the first, the last, and in equal stretches the smallest and the
    largest value of each series, so that no spike is lost. A stretch without a finite value keeps its first point.

    >>> thin(1000, np.arange(1000.0), most=8).tolist()
    [0, 249, 250, 499, 500, 749, 750, 999]
    """
    if num <= most:
        return np.arange(num)
    chosen = {0, num - 1}
    for stretch in np.array_split(np.arange(num), max(1, most // (2 * max(1, len(series))))):
        for values in series:
            finite = stretch[np.isfinite(values[stretch])]
            some = (finite[values[finite].argmin()], finite[values[finite].argmax()]) if finite.size else stretch[:1]
            chosen.update(int(i) for i in some)
        if not series:
            chosen.add(int(stretch[0]))
    return np.array(sorted(chosen))


def stretches(num: int, most: int) -> list[np.ndarray]:
    """`num` rounds in at most `most` groups of neighbours, as indices."""
    return [part for part in np.array_split(np.arange(num), min(num, most)) if part.size] if num else []
