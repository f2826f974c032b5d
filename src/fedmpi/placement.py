"""Which rank hosts which silo. A function of declared facts, so every rank computes the same without a message."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from fedmpi.errors import ConfigError
from fedmpi.types import Silo


def place(silos: Sequence[Silo], hosts: Sequence[str], dedicated: bool = False) -> list[int]:
    """The rank of each silo: longest processing time first, each to the rank with the least to do so far.

    `hosts` is every rank's host. A silo with a `host` goes to a rank there (its name may be given without the domain);
    the others go to ranks that host no pinned one. A silo whose size is not declared counts as the mean of the others.
    Raises ConfigError when a pinned host has no rank, or nobody is left to host silos.

    >>> place([Silo("a", 10), Silo("b", 40), Silo("c", 20), Silo("d", 10)], ["n1", "n1"])
    [1, 0, 1, 1]
    """
    declared = [s.num_samples for s in silos if s.num_samples is not None]
    typical = sum(declared) / len(declared) if declared else 1.0
    sizes = [float(s.num_samples) if s.num_samples is not None else typical for s in silos]
    able = range(1 if dedicated else 0, len(hosts))
    if not able:
        raise ConfigError("server.dedicated: needs at least 2 ranks, since rank 0 then hosts no silo")
    load = dict.fromkeys(able, 0.0)
    owners = [0] * len(silos)
    largest_first = sorted(range(len(silos)), key=lambda i: (-sizes[i], i))
    for i in (i for i in largest_first if silos[i].host is not None):
        here = [r for r in able if _same_host(silos[i].host, hosts[r])]
        if not here:
            there = ", ".join(sorted(set(hosts)))
            raise ConfigError(f"silo '{silos[i].id}' is pinned to host '{silos[i].host}', but ranks are on: {there}")
        owners[i] = min(here, key=lambda r: (load[r], r))
        load[owners[i]] += sizes[i]
    # A rank that a site pinned its silos to opens those and no others; one process by itself is all silos.
    pinned_to = {owners[i] for i in largest_first if silos[i].host is not None}
    free = [(0.0, r) for r in able if r not in pinned_to or len(able) == 1]
    heapq.heapify(free)
    for i in (i for i in largest_first if silos[i].host is None):
        if not free:
            raise ConfigError(f"silo '{silos[i].id}' has no rank: pinned silos hold them all; start more ranks")
        busy, owners[i] = heapq.heappop(free)
        heapq.heappush(free, (busy + sizes[i], owners[i]))
    return owners


def _same_host(wanted: str | None, host: str) -> bool:
    return wanted is None or wanted == host or (("." not in wanted) and wanted == host.partition(".")[0])
