"""What a round of a plan sends, and what the exchange keeps in memory: computed, for `fedmpi plan` and for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedmpi.exchange.base import MANY
from fedmpi.exchange.chunks import Grid, stripes_per_batch
from fedmpi.exchange.config import ExchangeSection
from fedmpi.exchange.sharded import COLUMNS
from fedmpi.exchange.upload import AHEAD
from fedmpi.exchange.weights import behind

_DTYPES = {4: torch.float32, 8: torch.float64}


@dataclass(frozen=True)
class Traffic:
    """Vector payload of one round, in bytes over all ranks; what stays on its rank is none. Of payloads that may be
    shorter it is the most that they can be."""

    up: int
    down: int
    control: int  # small tables that go before and after the vectors
    collectives: str


def traffic(
    section: ExchangeSection,
    num_params: int,
    param_bytes: int,
    num_ranks: int,
    vectors: Sequence[int] = (),
    num_silos: int = 0,
    num_exact: int | None = None,
) -> Traffic:
    """What a round sends in which all silos take part; `vectors` is how many each rank sends (`num_vectors`),
    `num_exact` how many values travel beside a lossy codec, None where there is nothing of the kind.

    >>> traffic(ExchangeSection(plan="root"), 1000, 4, 4)
    Traffic(up=12072, down=12000, control=0, collectives='Reduce + Bcast')
    """
    word = 8 if section.reduction == "reproducible" and section.scope == "rank" else param_bytes
    limbs = behind(num_ranks, _DTYPES[word] if word == param_bytes else torch.int64)[1] * word
    sums = num_params * word + limbs
    if num_ranks == 1:
        return Traffic(0, 0, 0, "none")
    if section.plan == "window":
        return Traffic(0, 0, 0, "shared memory of one node")
    beside = 0  # both ways: it is added up over ranks
    if section.lossy and num_exact is not None:
        rows = num_silos if section.scope == "silo" else 1
        beside = 8 * num_ranks * (1 + num_exact * (rows + (not section.down.plain)))
    if section.plan == "sharded":
        grid, others = Grid(num_params, num_ranks), num_ranks - 1
        up = _per_piece(section.up.plain, section.up.codec, grid, word)
        down = _per_piece(section.down.plain, section.down.codec, grid, param_bytes)
        sent = sum(
            count * sum(size for piece, size in enumerate(up) if piece % num_ranks != rank)
            for rank, count in enumerate(vectors or [1] * num_ranks)
        )
        table = COLUMNS * (num_silos if section.scope == "silo" else num_ranks)
        if not section.up.codec.fixed:
            table += num_ranks * max(vectors or [1]) * grid.num_pieces
        if not section.down.codec.fixed:
            table += grid.num_stripes * num_ranks
        if not (section.up.plain and section.down.plain):
            table += num_ranks
        return Traffic(
            sent + beside, others * sum(down) + beside, 2 * 8 * table * num_ranks, "Ialltoallv + Iallgatherv"
        )
    if section.plan == "root":
        others = num_ranks - 1
        return Traffic(others * sums, others * num_params * param_bytes, 0, "Reduce + Bcast")
    if not section.up.plain:
        grid = Grid(num_params, num_ranks)
        sums = grid.num_pieces * _stride(section.up.codec, grid) + limbs
    control = 0 if section.up.plain else 2 * 8 * num_ranks * num_ranks
    return Traffic(num_ranks * sums + beside, num_ranks * sums + beside, control, "Allreduce")


def num_vectors(section: ExchangeSection, silos: Sequence[int]) -> list[int]:
    """How many vectors each rank sends, given how many silos it hosts."""
    return list(silos) if section.scope == "silo" else [min(1, num) for num in silos]


def _per_piece(plain: bool, codec: object, grid: Grid, word: int) -> list[int]:
    sizes = [grid.size(piece) for piece in range(grid.num_pieces)]
    return [size * word if plain else codec.max_bytes(size) for size in sizes]  # type: ignore[attr-defined]


def _stride(codec: object, grid: Grid) -> int:
    return -(-codec.max_bytes(grid.length) // 4) * 4  # type: ignore[attr-defined, no-any-return]


def memory(
    section: ExchangeSection, num_params: int, param_bytes: int, num_ranks: int, num_silos: int, most_vectors: int = 1
) -> int:
    """Bytes of the exchange's own buffers on a rank that hosts `num_silos`: what it folds, sends, receives and keeps
    for feedback. `most_vectors` is the most that any rank sends."""
    word = 8 if section.reduction == "reproducible" and section.scope == "rank" else param_bytes
    if section.plan == "window":
        return (num_params + 1) * word
    if section.regions is not None:  # of a rank that leads a region
        across = memory(replace(section, regions=None), num_params, param_bytes, num_ranks, 1)
        return across + (1 + 3 + (len(section.regions.levels) > 2)) * num_params * param_bytes
    grid = Grid(num_params, num_ranks)
    vector = num_params * param_bytes
    if section.plan == "sharded":
        stride = grid.length * word if section.up.plain else _stride(section.up.codec, grid)
        folds = section.scope == "rank" and (num_silos > 1 or word != param_bytes)
        wide = 8 * num_params * (folds and num_silos > MANY and word == 4)
        own = num_silos if section.scope == "silo" else min(1, num_silos)
        rows = stripes_per_batch(grid, section.up, section.down)
        places = -(-grid.num_stripes // rows) * rows * num_ranks
        payloads = 0 if section.up.plain and section.scope == "rank" else own * places * stride
        down = 0 if section.down.plain else places * _stride(section.down.codec, grid)
        residuals = (own * (1 + (section.scope == "silo")) if section.up.feedback else 0) * vector
        residuals += vector // num_ranks if section.down.feedback else 0
        arrived = (AHEAD + 1) * most_vectors * num_ranks * rows * stride
        return folds * num_params * word + wide + payloads + down + residuals + arrived
    if not section.up.plain:
        payload = grid.num_pieces * _stride(section.up.codec, grid)
        return 2 * payload + (2 + section.up.feedback) * vector
    if section.reduction == "reproducible":
        return 2 * (num_params + 1) * 8 + vector
    return 2 * (num_params + 1) * param_bytes
