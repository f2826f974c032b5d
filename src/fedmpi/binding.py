"""Cores and NUMA nodes that ranks may run on, as their launcher has bound them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedmpi.comm import Comm

_NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True)
class Bound:
    """What a rank may run on."""

    rank: int
    host: str
    machine: str  # equal for ranks on one host
    cores: tuple[int, ...]  # empty if the system does not say
    cores_of_host: int
    nodes: tuple[str, ...]  # NUMA nodes of these cores
    num_nodes: int  # of the host


def my_cores() -> list[int]:
    """The cores that this process may run on; empty if the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def numa() -> dict[str, list[int]]:
    """The cores of each NUMA node; empty if the system does not say."""
    nodes: dict[str, list[int]] = {}
    with contextlib.suppress(OSError):
        for folder in sorted(_NODES.iterdir()):
            if folder.name.startswith("node") and folder.name[4:].isdigit():
                with contextlib.suppress(OSError, ValueError):
                    spans = [
                        part.partition("-") for part in (folder / "cpulist").read_text().strip().split(",") if part
                    ]
                    nodes[folder.name[4:]] = [core for a, _, b in spans for core in range(int(a), int(b or a) + 1)]
    return nodes


def nodes_of(cores: Sequence[int], numa: Mapping[str, Sequence[int]]) -> list[str]:
    """The NUMA nodes that some of the cores are of.

    >>> nodes_of([1, 2], {"0": [0, 1], "1": [2, 3], "2": [4, 5]})
    ['0', '1']
    """
    return [name for name, its in numa.items() if {*cores} & {*its}]


def bound(comm: Comm) -> list[Bound]:
    """What all ranks may run on. Collective."""
    cores, nodes, rank = my_cores(), numa(), comm.rank
    mine = Bound(
        rank,
        comm.hosts[rank],
        comm.machines[rank].hex(),
        tuple(cores),
        os.cpu_count() or 1,
        tuple(nodes_of(cores, nodes)),
        len(nodes),
    )
    rows = comm.gather_values(asdict(mine))
    return [Bound(**{**row, "cores": tuple(row["cores"]), "nodes": tuple(row["nodes"])}) for row in rows]


def told(rows: Sequence[Bound]) -> str:
    """How ranks are bound, in short; empty if each may run on all cores of its host, or the system does not say.

    >>> one = Bound(0, "a", "m", (0, 1), 8, ("0",), 2)
    >>> told([one]), told([Bound(0, "a", "m", (0, 1), 2, ("0",), 1)])
    ('bound to 2 of 8 cores each, on one NUMA node', '')
    """
    if not all(row.cores for row in rows) or all(len(row.cores) >= row.cores_of_host for row in rows):
        return ""
    num, num_all = _from_to([len(row.cores) for row in rows]), _from_to([row.cores_of_host for row in rows])
    text = f"bound to {num} of {num_all} cores each"
    if max(row.num_nodes for row in rows) > 1:
        text += ", on one NUMA node" if all(len(row.nodes) < 2 for row in rows) else ", some across NUMA nodes"
    return text


def _from_to(numbers: Sequence[int]) -> str:
    return "-".join(str(number) for number in sorted({min(numbers), max(numbers)}))


def collisions(rows: Sequence[Bound]) -> list[str]:
    """Pairs of ranks of a host that are bound to one core alone although others are free, each as a line."""
    found = []
    for machine in dict.fromkeys(row.machine for row in rows):
        some = [row for row in rows if row.machine == machine]
        if len(some) > len({core for row in some for core in row.cores}):
            continue  # more ranks than cores must share
        owners: dict[int, int] = {}
        for row in some:
            for core in row.cores if len(row.cores) == 1 else ():
                if core in owners:
                    found.append(
                        f"host {row.host}: ranks {owners[core]} and {row.rank} are both bound to core {core}, and "
                        "others are free; use mpirun --map-by core --bind-to core"
                    )
                owners.setdefault(core, row.rank)
    return found


def spans(cores: Sequence[int]) -> str:
    """Core numbers in short.

    >>> spans([0, 1, 2, 5])
    '0-2,5'
    """
    parts: list[list[int]] = []
    for core in cores:
        if parts and core == parts[-1][1] + 1:
            parts[-1][1] = core
        else:
            parts.append([core, core])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in parts)
