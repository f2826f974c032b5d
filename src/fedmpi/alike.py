"""Whether all ranks have read the same configuration, and if not, which values differ and where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedmpi.comm import Comm, ranks_text
from fedmpi.config import Config, common, digest, flatten, origin_of
from fedmpi.yamlfile import variables_in

_SHOWN = 3  # most values in the line


def unlike(comm: Comm, config: Config, origins: Mapping[str, str]) -> str:
    """A line about how the configurations of the ranks differ; empty if they are the same. Collective; the same on
    every rank."""
    rows = comm.gather(digest(config))
    others = [rank for rank, row in enumerate(rows) if row != rows[0]]
    if not others:
        return ""
    values = flatten(common(config))
    mine = json.dumps({key: [value, origin_of(key, origins)] for key, value in values.items()})
    there, here = (json.loads(comm.broadcast_text(mine, rank)) for rank in (0, others[0]))
    told, variables = _difference(there, here, others[0])
    why = "give all ranks the same file and overrides"
    if variables:
        names = ", ".join(f"${{{name}}}" for name in variables)
        why = f"{names} {'is' if len(variables) == 1 else 'are'} not the same on all ranks; take what all share"
    return f"the configuration differs: rank 0 against {ranks_text(others)}: {told}; {why}"


def _difference(there: Mapping[str, Any], here: Mapping[str, Any], rank: int) -> tuple[str, list[str]]:
    """Text about the first values that differ, and the variables that these come from."""
    nothing = ["not set", ""]
    told: list[str] = []
    variables: dict[str, None] = {}
    for key in [*there, *(key for key in here if key not in there)]:
        (old, old_origin), (new, new_origin) = there.get(key, nothing), here.get(key, nothing)
        if old != new:
            told.append(f"{key} is {old} on rank 0 and {new} on rank {rank}")
            variables |= dict.fromkeys(variables_in(old_origin) + variables_in(new_origin))
    more = f", and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    return ", ".join(told[:_SHOWN]) + more, list(variables)
