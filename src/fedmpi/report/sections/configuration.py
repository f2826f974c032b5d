"""The configuration: what differs from the defaults, and all of it."""

from __future__ import annotations

import json
from typing import Any

from fedmpi.components import to_dict
from fedmpi.config import Config, flatten
from fedmpi.report.blocks import Section, Table
from fedmpi.report.reading import RunData


def told(value: Any) -> str:
    """A value as a configuration file has it.

    >>> told("digits"), told(None), told([1, "a"]), told(True)
    ('digits', 'null', '[1, "a"]', 'true')
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def configuration(run: RunData) -> Section:
    defaults = flatten(to_dict(Config()))
    flat = run.flat
    other = {k: v for k, v in flat.items() if k != "out" and (k not in defaults or defaults[k] != v)}
    rows = [[key, told(value), told(defaults[key]) if key in defaults else "-"] for key, value in other.items()]
    whole = [[key, told(value)] for key, value in flat.items()]
    blocks = [
        Table(["key", "value", "default"], rows, caption="What differs from the default configuration"),
        Table(["key", "value"], whole, folded=f"All {len(whole)} keys"),
    ]
    return Section("configuration", "Configuration", blocks)
