"""The configuration: what differs from the defaults, and all of it."""

from __future__ import annotations

from fedmpi.components import to_dict, written
from fedmpi.config import Config, flatten
from fedmpi.report.blocks import Section, Table
from fedmpi.report.reading import RunData


def configuration(run: RunData) -> Section:
    defaults = flatten(to_dict(Config()))
    flat = run.flat
    other = {k: v for k, v in flat.items() if k != "out" and (k not in defaults or defaults[k] != v)}
    rows = [[key, written(value), written(defaults[key]) if key in defaults else "-"] for key, value in other.items()]
    whole = [[key, written(value)] for key, value in flat.items()]
    blocks = [
        Table(["key", "value", "default"], rows, caption="What differs from the default configuration"),
        Table(["key", "value"], whole, folded=f"All {len(whole)} keys"),
    ]
    return Section("configuration", "Configuration", blocks)
