"""Whether all ranks have the same configuration and versions, and if not, what differs and where it comes from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fedmpi.comm import Comm, ranks_text
from fedmpi.components import written
from fedmpi.config import Config, flatten, origin_of
from fedmpi.differences import common, digest
from fedmpi.yamlfile import variables_in

_SHOWN = 3  # most values in the line
MUST_MATCH = ("fedmpi", "torch", "numpy")  # packages


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


def mixed(comm: Comm, versions: Mapping[str, str]) -> str:
    """A line about packages of which the ranks have different versions and that change figures or messages; empty if
    all have the same. Builds of one version, such as 2.8.0+cpu and 2.8.0+cu128, count as the same. Collective."""
    mine = json.dumps([[name, versions[name].partition("+")[0]] for name in MUST_MATCH])
    rows = comm.gather(hashlib.sha256(mine.encode()).digest())
    others = [rank for rank, row in enumerate(rows) if row != rows[0]]
    if not others:
        return ""
    there, here = (json.loads(comm.broadcast_text(mine, rank)) for rank in (0, others[0]))
    told = [
        f"{name} is {old} on rank 0 and {new} on rank {others[0]} ({comm.hosts[others[0]]})"
        for (name, old), (_, new) in zip(there, here, strict=True)
        if old != new
    ]
    same = "install the same on all hosts (jobs/wheelhouse.sh)"
    return f"versions differ: rank 0 against {ranks_text(others)}: {', '.join(told)}; {same}"


def _difference(there: Mapping[str, Any], here: Mapping[str, Any], rank: int) -> tuple[str, list[str]]:
    """Text about the first values that differ, and the variables that these come from."""
    nothing = ["not set", ""]
    told: list[str] = []
    variables: dict[str, None] = {}
    for key in [*there, *(key for key in here if key not in there)]:
        (old, old_origin), (new, new_origin) = there.get(key, nothing), here.get(key, nothing)
        if old != new:
            told.append(f"{key} is {written(old)} on rank 0 and {written(new)} on rank {rank}")
            variables |= dict.fromkeys(variables_in(old_origin) + variables_in(new_origin))
    more = f", and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    return ", ".join(told[:_SHOWN]) + more, list(variables)
