"""A record: what a round says of itself, the same on every rank."""

from __future__ import annotations

import math
from typing import Any

Record = dict[str, Any]

SCHEMA = 1  # of a record, as its field `schema`; a record of before has none


def plain(value: Any) -> Any:
    """The value with None for what JSON does not know: nan and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value
