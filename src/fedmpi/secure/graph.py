"""Who shares masks with whom: a regular graph on a circle in random order (Bell et al. 2020, SecAgg+).

With n silos, masks between all pairs cost every silo n-1 key streams. In a graph where each silo has k neighbours they
cost k. The sum is still safe as long as the honest silos that remain are connected. The order on the circle comes from
all public keys, so nobody can choose his neighbours.

A silo of the circle has the k/2 next ones on each side as neighbours. The honest ones come apart only if k/2
consecutive silos are lost or corrupt; if that happens to a share f of all silos, the probability is at most n f^(k/2).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

FROM = 16  # silos, from which on the graph may have fewer edges than all pairs
SIGMA = 40  # 2^-40 bounds the probability that the honest silos come apart
BAD = 1 / 3  # share of silos that are lost or corrupt for which that holds


def degree(num_silos: int) -> int:
    """Neighbours of each silo: n - 1, or an even number with which honest silos come apart with at most 2^-40.

    >>> degree(5), degree(40), degree(100), degree(10_000)
    (4, 39, 60, 68)
    """
    if num_silos < FROM:
        return num_silos - 1
    half = math.ceil((SIGMA + math.log2(num_silos)) / math.log2(1 / BAD))
    return min(num_silos - 1, 2 * half)


def neighbours(publics: Sequence[bytes], num: int) -> list[list[int]]:
    """The neighbours of each silo, by index, in order; `num` must be even, or all others.

    >>> [len(some) for some in neighbours([bytes([i]) for i in range(7)], 4)]
    [4, 4, 4, 4, 4, 4, 4]
    """
    size = len(publics)
    if num >= size - 1:
        return [[j for j in range(size) if j != i] for i in range(size)]
    if num < 2 or num % 2:
        raise ValueError(f"{num} neighbours: an even number, or all")
    seed = hashlib.sha256(b"fedmpi circle" + b"".join(publics)).digest()
    circle = sorted(range(size), key=lambda i: hashlib.sha256(seed + i.to_bytes(8, "big")).digest())
    found: list[list[int]] = [[] for _ in range(size)]
    for place, silo in enumerate(circle):
        steps = range(1, num // 2 + 1)
        found[silo] = sorted({circle[(place + sign * step) % size] for step in steps for sign in (1, -1)})
    return found


def connected(nodes: Collection[int], edges: Mapping[int, Iterable[int]] | Sequence[Iterable[int]]) -> bool:
    """Whether these nodes hang together by edges between them.

    >>> connected([0, 1], {0: [1], 1: [0]}), connected([0, 2], {0: [1], 1: [0, 2], 2: [1]})
    (True, False)
    """
    there = set(nodes)
    if not there:
        return True
    seen = {first := next(iter(there))}
    waiting = [first]
    while waiting:
        for other in edges[waiting.pop()]:
            if other in there and other not in seen:
                seen.add(other)
                waiting.append(other)
    return seen == there
