"""Reduces what a piece's owner received to one row, in the order of senders, in float32.

Sums of more than `MANY` vectors use float64, and integer sums stay in their ring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fedmpi.aggregate.base import Aggregator, Cohort, Weights, products
from fedmpi.codecs import bare
from fedmpi.comm import Comm
from fedmpi.exchange.base import MANY, ExchangeContext
from fedmpi.exchange.chunks import Coder, Grid
from fedmpi.exchange.exact import Exact
from fedmpi.exchange.upload import Sender
from fedmpi.state import Arrays

Came = Sequence[tuple[Sender, Any]]  # what arrived for a piece; payloads are `bare`
Divide = Callable[[Sequence[torch.Tensor], float, torch.Tensor], None]  # from integer rows to their mean


class Accumulator:
    """Turns the received rows of each piece into one: their weighted mean, or the aggregator's result."""

    def __init__(
        self,
        grid: Grid,
        rank: int,
        coder: Coder | None,
        params_P: torch.Tensor,
        facts: ExchangeContext,
        divide: Divide | None,
    ) -> None:
        self.facts, self.coder, self.grid, self.device = facts, coder, grid, params_P.device
        self.aggregator = facts.aggregator
        self.learns = self.aggregator is not None and self.aggregator.needs == "gram"
        self.state = Arrays({} if self.aggregator is None else self.aggregator.init())  # kept between rounds
        self.centre: torch.Tensor | None = None  # my pieces of the last round's result, if the aggregator reads it
        if self.aggregator is not None and self.aggregator.centre:
            self.centre = torch.zeros(grid.num_owned(rank), dtype=params_P.dtype, device=self.device)
        self.gram_KK: np.ndarray | None = None  # inner products of the silos' rows, for the round's record
        self._products: dict[int, np.ndarray] = {}  # inner products by piece
        self._weights: Weights = None
        self._mean = torch.zeros(grid.length, dtype=params_P.dtype, device=self.device)
        self._rows = torch.zeros(0, dtype=params_P.dtype, device=self.device)
        self._divide = divide  # for sums in the integer ring

    def begin(self, senders: Sequence[Sender], weight: float, round: int) -> None:
        """Start a round that receives these vectors; `weight` is their total."""
        ids = self.facts.ids
        self._weight, self._num = weight, len(senders)
        self._cohort = Cohort([ids[s.number] for s in senders] if self.aggregator else (), round, self.facts.seed)
        self.gram_KK = np.zeros((self._num, self._num)) if self.facts.gram else None

    # ------------------------------------------------------------ the weight of each row

    def learn(self, piece: int, came: Came, exact: Exact | None) -> None:
        """Compute the inner products of a piece's rows, before any rows are combined."""
        rows_KS = self._decoded(piece, came)
        if exact is not None:
            exact.blank(rows_KS, self.grid.part(piece).start)
        self._products[piece] = products(rows_KS)

    def weigh(self, comm: Comm, exact: Exact | None) -> None:
        """Compute the aggregator's row weights from all inner products. Collective."""
        assert self.aggregator is not None
        if not self.learns:
            self._weights, self.state.arrays = self.aggregator.row_weights(None, self._cohort, self.state.arrays)
            return
        # Sum piece by piece, so that the order is the same for any number of ranks.
        num = self._num + (self.centre is not None)
        grams = np.zeros((self.grid.num_pieces, num, num))
        for piece, gram in self._products.items():
            grams[piece] = gram
        self._products.clear()
        gram = comm.share(grams.reshape(-1)).reshape(grams.shape).sum(axis=0)
        if exact is not None:
            gram = gram + exact.products()
        if self.gram_KK is not None:
            self.gram_KK = gram[: self._num, : self._num]
        self._weights, self.state.arrays = self.aggregator.row_weights(gram, self._cohort, self.state.arrays)
        _as_on_rank_0((self._weights, self.state.arrays), comm)

    def parts_of_centre(self, rank: int) -> list[tuple[int, torch.Tensor]] | None:
        """My pieces of the centre, each with its start in the vector; None if the aggregator has no centre."""
        if self.centre is None:
            return None
        pieces = self.grid.owned(rank)
        return [(self.grid.part(piece).start, self.centre[self.grid.kept(piece)]) for piece in pieces]

    # ------------------------------------------------------------ from many rows to one

    def mean(self, piece: int, came: Came, exact: Exact | None) -> torch.Tensor:
        """The mean of a piece, or the aggregator's result, [S]; valid until the next call."""
        mean_S, part = self._mean[: self.grid.size(piece)], self.grid.part(piece)
        if self.aggregator is None and self.facts.edit is None:
            self._sum_up(piece, came, mean_S)
        elif self.aggregator is None:
            factors_K = torch.tensor([sender.factor / self._weight for sender, _ in came]).to(mean_S)
            torch.mv(self._decoded(piece, came).T, factors_K, out=mean_S)
        else:
            mean_S.copy_(self.combine(self._decoded(piece, came)))
        if self.gram_KK is not None and not self.learns and part.start < self.facts.gram:
            self.gram_KK += products(self._decoded(piece, came)[: self._num, : self.facts.gram - part.start])
        if exact is not None:
            exact.put(mean_S, part.start)
        if self.centre is not None:
            self.centre[self.grid.kept(piece)] = mean_S
        return mean_S

    def combine(self, rows_KS: torch.Tensor) -> torch.Tensor:
        """The aggregator's result for these rows, [S]."""
        assert self.aggregator is not None
        return self.aggregator.combine(rows_KS, self._weights)

    def shared_gram(self, comm: Comm) -> np.ndarray | None:
        """Inner products of the round's deltas for its record, [K, K]; None if nobody asked. Collective."""
        if self.gram_KK is None or self.learns:
            return self.gram_KK
        return comm.share(self.gram_KK.reshape(-1)).reshape(self.gram_KK.shape)

    def _sum_up(self, piece: int, came: Came, mean_S: torch.Tensor) -> None:
        """Write the weighted mean into `mean_S`, adding one sender after the other."""
        weight = self._weight
        if self._divide is not None:
            self._divide([ring_S for _, ring_S in came], weight, mean_S)
        elif self.coder is not None:
            sum_S, wide_S = bare(mean_S.zero_()), None
            for number, (sender, payload_B) in enumerate(came):
                if number and not number % MANY:
                    wide_S = mean_S.double() if wide_S is None else wide_S.add_(mean_S)
                    mean_S.zero_()
                self.coder.add_or_note(payload_B, sum_S, piece, sender.factor / weight)
            if wide_S is not None:
                mean_S.copy_(wide_S.add_(mean_S))
        elif len(came) > MANY:
            total_S = torch.zeros(len(mean_S), dtype=torch.float64, device=self.device)
            for sender, values_S in came:
                total_S.add_(values_S.to(self.device), alpha=sender.factor / weight)
            mean_S.copy_(total_S)
        else:
            (first, values_S), *others = came
            torch.mul(values_S.to(self.device), first.factor / weight, out=mean_S)
            for sender, values_S in others:
                mean_S.add_(values_S.to(self.device), alpha=sender.factor / weight)

    def _decoded(self, piece: int, came: Came) -> torch.Tensor:
        """Every sender's values of a piece, then the centre's if there is one, [K, S]."""
        size, num = self.grid.size(piece), len(came) + (self.centre is not None)
        if len(self._rows) < num * size:
            self._rows = torch.zeros(num * size, dtype=self._rows.dtype, device=self.device)
        rows_KS = self._rows[: num * size].view(num, size)
        for row_S, (_, values) in zip(rows_KS, came, strict=False):
            if self.coder is not None:
                self.coder.add_or_note(values, bare(row_S.zero_()), piece, 1.0)
            else:
                row_S.copy_(values)
        if self.facts.edit is not None:
            self.facts.edit(rows_KS[: len(came)], [self.facts.ids[sender.number] for sender, _ in came])
        if self.centre is not None:
            rows_KS[-1] = self.centre[self.grid.kept(piece)]
        return rows_KS


def num_learned(aggregator: Aggregator, num_silos: int, num_pieces: int) -> int:
    """How many numbers ranks share to compute row weights, in a round with `num_silos` silos."""
    if aggregator.needs != "gram":
        return 0
    rows = num_silos + aggregator.centre
    weights = aggregator.row_weights(np.eye(rows), Cohort([""] * num_silos), aggregator.init())
    return num_pieces * rows**2 + sum(array.size for array in _arrays(weights))


def _arrays(value: Any) -> Iterator[np.ndarray]:
    """All arrays inside a weights or state value."""
    if isinstance(value, np.ndarray):
        yield value
    else:
        for part in value.values() if isinstance(value, dict) else value:
            yield from _arrays(part)


def _as_on_rank_0(values: Any, comm: Comm) -> None:
    """Overwrite the arrays with rank 0's: other processors may round, and so decide, differently. Collective."""
    arrays = [*_arrays(values)]
    flat = np.concatenate([np.zeros(0), *(array.astype(np.float64).reshape(-1) for array in arrays)])
    flat = comm.share(flat if comm.rank == 0 else np.zeros_like(flat))
    for array in arrays:
        array[...] = flat[: array.size].reshape(array.shape)
        flat = flat[array.size :]
