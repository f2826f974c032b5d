"""The record of a round: a dict, equal on every rank."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

Record = dict[str, Any]

SCHEMA = 1  # version of the record's fields, in `schema`; absent in records of old versions


TIME = "time"  # field that rank 0 adds when it writes a record


def now() -> str:
    """The time in UTC, as ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def plain(value: Any) -> Any:
    """The value with None in place of nan and infinity, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value
