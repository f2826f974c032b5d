"""The record of a round: a dict, equal on every rank."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

Record = dict[str, Any]

SCHEMA = 1  # version of the record's fields, in `schema`; absent in records of old versions


SENT = {"up": "bytes_up", "down": "bytes_down", "tables": "bytes_control"}  # the parts of what ranks send and receive

TIME = "time"  # field that rank 0 adds when it writes a record


def now() -> str:
    """The time in UTC, as ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def sent_bytes(record: Record) -> int:
    """All bytes of a round, of all ranks together: vectors up and down, and tables. Parts that are not known count 0.

    >>> sent_bytes({"round": 1, "bytes_up": 3000, "bytes_down": 3000, "bytes_control": 500})
    6500
    """
    return sum(record.get(field) or 0 for field in SENT.values())


def plain(value: Any) -> Any:
    """The value with None in place of nan and infinity, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value
