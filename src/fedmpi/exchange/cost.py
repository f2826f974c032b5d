"""What a plan's cost depends on, and what it is: computed, for `fedmpi plan` and for tests. Each plan answers for
itself (`Exchange.cost`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from fedmpi.exchange.weights import behind

if TYPE_CHECKING:
    from fedmpi.aggregate import Aggregator
    from fedmpi.exchange.config import ExchangeSection

_DTYPES = {4: torch.float32, 8: torch.float64}


@dataclass(frozen=True)
class Sizes:
    """A round in which all silos take part, on a rank."""

    num_elements: int  # of a vector that travels: the shared parameters, and auxiliary vectors
    element_bytes: int
    num_ranks: int
    vectors: Sequence[int] = ()  # how many each rank sends (`num_vectors`); empty: one each
    num_silos: int = 0  # of the federation
    num_exact: int | None = None  # values that travel beside a lossy codec; None: there is nothing of the kind
    rank: int = 0  # whose memory is counted
    hosted: int = 1  # silos of that rank
    num_states: int = 0  # vectors of the server optimizer's state
    num_stepped: int = 0  # elements of each
    aggregator: Aggregator | None = None  # one that reads deltas one by one

    @property
    def vector_bytes(self) -> int:
        """Of one that travels."""
        return self.num_elements * self.element_bytes

    @property
    def most_vectors(self) -> int:
        """That any rank sends."""
        return max(self.vectors or [1])

    @property
    def state_bytes(self) -> int:
        """Of the server's state, whole."""
        return self.num_states * self.num_stepped * self.element_bytes


@dataclass(frozen=True)
class Traffic:
    """Vector payload of one round, in bytes over all ranks; what stays on its rank is none. Of payloads that may be
    shorter it is the most that they can be."""

    up: int
    down: int
    control: int  # small tables that go before and after the vectors
    collectives: str


class Cost(NamedTuple):
    """What a round sends, and the bytes of what the exchange keeps in a rank's memory, by name."""

    traffic: Traffic
    memory: dict[str, int]


def num_vectors(section: ExchangeSection, silos: Sequence[int]) -> list[int]:
    """How many vectors each rank sends, given how many silos it hosts."""
    return list(silos) if section.scope == "silo" else [min(1, num) for num in silos]


def word_bytes(section: ExchangeSection, sizes: Sizes) -> int:
    """Of an element of a sum: an integer in the ring."""
    return 8 if section.reduction == "reproducible" and section.scope == "rank" else sizes.element_bytes


def limbs_bytes(section: ExchangeSection, sizes: Sizes) -> int:
    """Of the weight behind a sum."""
    word = word_bytes(section, sizes)
    return behind(sizes.num_ranks, _DTYPES[word] if word == sizes.element_bytes else torch.int64)[1] * word


def exact_bytes(section: ExchangeSection, sizes: Sizes) -> int:
    """Of what travels beside a lossy codec, each way: it is added up over ranks."""
    if not section.lossy or sizes.num_exact is None:
        return 0
    rows = sizes.num_silos if section.scope == "silo" else 1
    return 8 * sizes.num_ranks * (1 + sizes.num_exact * (rows + (not section.down.plain)))
