"""Reads a configuration and finds all its faults: a value that is refused is noted, taken out, and the rest read."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmpi.check.findings import Findings
from fedmpi.components import build
from fedmpi.config import Config, flatten, values_of
from fedmpi.errors import ConfigError

_MOST = 50  # faults of one configuration


@dataclass(frozen=True)
class Reading:
    """A configuration, with defaults in place of what was refused."""

    config: Config
    origins: Mapping[str, str]  # of each value, see config.load
    left_out: tuple[str, ...] = ()  # dotted keys that were refused

    def lacks(self, *sections: str) -> bool:
        """Whether one of these top-level keys was refused as a whole, so that its default says nothing."""
        return any(section in self.left_out for section in sections)


def read(path: str | Path, overrides: Sequence[str], found: Findings) -> Reading | None:
    """The configuration; its faults are noted in `found`. None if nothing can be read."""
    try:
        values, origins = values_of(path, overrides)
    except ConfigError as error:
        found.fault(str(error))
        return None
    left_out: list[str] = []
    while len(left_out) < _MOST:
        try:
            return Reading(build(Config, values), origins, tuple(left_out))
        except ConfigError as error:
            found.fault(str(error))
            repaired = _without_culprit(values, str(error))
        if repaired is None:
            return None
        key, values = repaired
        left_out.append(key)
    return None


def _without_culprit(values: dict[str, Any], said: str) -> tuple[str, dict[str, Any]] | None:
    """The key that an error is about, and the values without it."""
    for key in dict.fromkeys(_suspects(values, said)):
        rest = copy.deepcopy(values)
        _remove(rest, key)
        try:
            build(Config, rest)
        except ConfigError as error:
            text = str(error)
            # Without a value that its section requires there would be another fault, of our own making.
            section, _, last = key.rpartition(".")
            required = text.endswith(" needs it") and text.startswith(key)
            required |= bool(section) and text.startswith(f"{section}: ") and f"'{last}'" in text and text != said
            if text == said or required:
                continue
        return key, rest
    return None


def _suspects(values: Mapping[str, Any], said: str) -> Iterator[str]:
    """Dotted keys that may be at fault, the likeliest first: those that the error names, then all sections."""
    keys = _keys(values)
    path = re.match(r"[\w.]*", said)
    named = path[0].strip(".") if path else ""
    quoted = re.findall(r"has no '([^']+)'", said)
    yield from (key for part in quoted for key in keys if key in (part, f"{named}.{part}"))
    while named:
        if named in keys:
            yield named
        named = named.rpartition(".")[0]
    yield from (key for key in keys if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", said))
    yield from values


def _keys(values: Mapping[str, Any]) -> Collection[str]:
    """All dotted keys, of sections too."""
    leaves = flatten(values)
    parts = [key.split(".") for key in leaves]
    return dict.fromkeys(".".join(some[:n]) for some in parts for n in range(len(some), 0, -1))


def _remove(values: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    for part in parents:
        values = values[part]
    del values[last]
