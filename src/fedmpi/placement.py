"""Placement of silos on ranks. It depends on declared facts only, so every rank computes it without a message."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence

from fedmpi.errors import ConfigError
from fedmpi.membership import Membership, same_host
from fedmpi.types import Silo


def place(silos: Sequence[Silo], hosts: Sequence[str], dedicated: bool = False) -> Membership:
    """The membership at the start of a run: longest processing time first, each silo on the rank with the fewest
    samples so far.

    `hosts` is every rank's host name. A silo with a `host` goes to a rank there (the domain may be left out); the
    others go to ranks without pinned silos. A silo of undeclared size counts as the mean of the others. Raises
    ConfigError if a pinned host has no rank, or no rank is left for other silos.

    >>> place([Silo("a", 10), Silo("b", 40), Silo("c", 20), Silo("d", 10)], ["n1", "n1"]).ranks
    [1, 0, 1, 1]
    """
    declared = [s.num_samples for s in silos if s.num_samples is not None]
    typical = sum(declared) / len(declared) if declared else 1.0
    sizes = [float(s.num_samples) if s.num_samples is not None else typical for s in silos]
    able = range(1 if dedicated else 0, len(hosts))
    if not able:
        raise ConfigError("server.dedicated: needs at least 2 ranks, since rank 0 then hosts no silo")
    load = dict.fromkeys(able, 0.0)
    ranks = [0] * len(silos)
    largest_first = sorted(range(len(silos)), key=lambda i: (-sizes[i], i))
    for i in (i for i in largest_first if silos[i].host is not None):
        here = [r for r in able if same_host(silos[i].host, hosts[r])]
        if not here:
            there = ", ".join(sorted(set(hosts)))
            raise ConfigError(f"silo '{silos[i].id}' is pinned to host '{silos[i].host}', but ranks are on: {there}")
        ranks[i] = min(here, key=lambda r: (load[r], r))
        load[ranks[i]] += sizes[i]
    # A rank with pinned silos opens no others: it is its site's. A rank that is alone hosts everything.
    pinned_to = {ranks[i] for i in largest_first if silos[i].host is not None}
    free = [(0.0, r) for r in able if r not in pinned_to or len(able) == 1]
    heapq.heapify(free)
    for i in (i for i in largest_first if silos[i].host is None):
        if not free:
            raise ConfigError(f"silo '{silos[i].id}' has no rank: pinned silos hold them all; start more ranks")
        busy, ranks[i] = heapq.heappop(free)
        heapq.heappush(free, (busy + sizes[i], ranks[i]))
    return Membership(0, {silo.id: (rank,) for silo, rank in zip(silos, ranks, strict=True)})


def adopted(
    stay: Mapping[str, tuple[int, ...]],
    orphans: Sequence[Silo],
    silos: Sequence[Silo],
    num_train: Mapping[str, int],
    hosts: Sequence[str],
    dedicated: bool = False,
    among: Collection[int] | None = None,
) -> dict[str, tuple[int, ...]]:
    """The ranks that take over the `orphans`, silos whose rank is gone: the largest silo first, each to the rank with
    the fewest samples. Silos that no rank may open, of `among` if given, are left out. `stay` are the teams of the
    other silos.

    >>> a, b, c = Silo("a"), Silo("b"), Silo("c", host="n2")
    >>> adopted({"a": (0,)}, [b, c], [a, b, c], {"a": 3, "b": 2, "c": 1}, ["n1", "n1"])
    {'b': (1,)}
    >>> adopted({}, [b], [b], {"b": 2}, ["n1", "n1", "n1"], among={2})
    {'b': (2,)}
    """
    pins = {silo.id: silo.host for silo in silos}
    able = range(1 if dedicated and len(hosts) > 1 else 0, len(hosts))
    load, kinds = dict.fromkeys(able, 0), {rank: set[bool]() for rank in able}  # whether its silos are pinned
    for name, (rank, *_) in stay.items():
        if rank in load:
            load[rank] += num_train[name]
            kinds[rank].add(pins[name] is not None)
    found: dict[str, int] = {}
    for silo in sorted(orphans, key=lambda one: -num_train[one.id]):
        kind = {silo.host is not None}
        # A rank that hosts pinned silos hosts no others, unless it is alone.
        may = [r for r in able if same_host(silo.host, hosts[r]) and (len(able) == 1 or kinds[r] <= kind)]
        may = [r for r in may if among is None or r in among]
        if may:
            rank = found[silo.id] = min(may, key=lambda r: (load[r], r))
            load[rank] += num_train[silo.id]
            kinds[rank] |= kind
    return {silo.id: (found[silo.id],) for silo in orphans if silo.id in found}
