"""Inputs and results of a plan's cost, computed without running it, for `fedmpi plan` and for tests.

Each plan computes its own cost (`Exchange.cost`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from fedmpi.exchange.weights import behind

if TYPE_CHECKING:
    from fedmpi.aggregate import Aggregator
    from fedmpi.exchange.config import ExchangeSection

WORDS = {16: torch.int16, 32: torch.int32, 64: torch.int64}  # of a masked sum, by bits
_DTYPES = {4: torch.float32, 8: torch.float64}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a round in which all silos take part, seen from one rank."""

    num_elements: int  # of one vector that is sent: the shared parameters and auxiliary vectors
    element_bytes: int
    num_ranks: int
    vectors: Sequence[int] = ()  # vectors that each rank sends (`num_vectors`); empty: one each
    num_silos: int = 0  # in the federation
    num_exact: int | None = None  # values that are sent exactly beside a lossy codec; None: no such values
    rank: int = 0  # the rank whose memory is counted
    hosted: int = 1  # silos on that rank
    num_states: int = 0  # vectors in the server optimizer's state
    num_stepped: int = 0  # elements of each of them
    arrivals: int = 0  # updates of a round that reach rank 0 one by one (arrivals.py); 0: the plan's collectives
    secure_bits: int = 0  # of an element of a masked sum; 0: sums are not masked
    aggregator: Aggregator | None = None  # an aggregator that reads each delta; None: a weighted mean

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector that is sent."""
        return self.num_elements * self.element_bytes

    @property
    def most_vectors(self) -> int:
        """The most vectors that any rank sends."""
        return max(self.vectors or [1])

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole server state."""
        return self.num_states * self.num_stepped * self.element_bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes that one round sends, summed over all ranks; what a rank keeps for itself does not count.

    For payloads of variable length, these are upper bounds.
    """

    up: int
    down: int
    control: int  # small tables before and after the vectors
    collectives: str


class Cost(NamedTuple):
    """Bytes that a round sends, and bytes that the exchange keeps in a rank's memory, by name."""

    traffic: Traffic
    memory: dict[str, int]


def num_vectors(section: ExchangeSection, silos: Sequence[int]) -> list[int]:
    """How many vectors each rank sends, given how many silos it hosts."""
    return list(silos) if section.scope == "silo" else [min(1, num) for num in silos]


def word_bytes(section: ExchangeSection, sizes: Sizes) -> int:
    """Bytes of one element of a sum; 8 in the integer ring, 2, 4 or 8 under masks."""
    if sizes.secure_bits:
        return sizes.secure_bits // 8
    return 8 if section.reduction == "reproducible" and section.scope == "rank" else sizes.element_bytes


def limbs_bytes(section: ExchangeSection, sizes: Sizes) -> int:
    """Bytes of the weight that follows a sum."""
    word = word_bytes(section, sizes)
    if sizes.secure_bits:  # and the number of silos
        word = max(4, word)
        return (1 + behind(sizes.num_ranks, WORDS[8 * word])[1]) * word
    return behind(sizes.num_ranks, _DTYPES[word] if word == sizes.element_bytes else torch.int64)[1] * word


def exact_bytes(section: ExchangeSection, sizes: Sizes) -> int:
    """Bytes of the exact values beside a lossy codec, in each direction, summed over ranks."""
    if not section.lossy or sizes.num_exact is None:
        return 0
    rows = sizes.num_silos if section.scope == "silo" else 1
    return 8 * sizes.num_ranks * (1 + sizes.num_exact * (rows + (not section.down.plain)))
