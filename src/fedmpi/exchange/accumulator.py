"""What arrived of a piece becomes one row: at its owner, in the order of senders, in float32.

Sums of very many vectors are added in float64, and those of integers in their ring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fedmpi.codecs import bare
from fedmpi.exchange.base import MANY, ExchangeContext
from fedmpi.exchange.chunks import Coder, Grid
from fedmpi.exchange.upload import Sender

PART = 1 << 13  # elements of every row that are made float64 at a time, so that they stay in cache

Came = Sequence[tuple[Sender, Any]]  # what arrived of a piece: bare where it is a payload
Divide = Callable[[torch.Tensor, float, torch.Tensor], None]


class Accumulator:
    """The rows of one piece after the other: their weighted mean, or what an aggregator makes of them."""

    def __init__(
        self, grid: Grid, coder: Coder | None, params_P: torch.Tensor, facts: ExchangeContext, divide: Divide | None
    ) -> None:
        self.facts, self.coder, self.grid, self.device = facts, coder, grid, params_P.device
        self.gram_KK: np.ndarray | None = None  # inner products of the round's rows, as far as pieces have arrived
        self._mean = torch.zeros(grid.length, dtype=params_P.dtype, device=self.device)
        self._rows = torch.zeros(0, dtype=params_P.dtype, device=self.device)
        self._divide = divide  # of sums in the ring
        self._total = torch.zeros(grid.length, dtype=torch.int64, device=self.device) if divide else None

    def begin(self, num_senders: int, weight: float) -> None:
        """A round in which so many vectors arrive, of this weight together."""
        self._weight = weight
        self.gram_KK = np.zeros((num_senders, num_senders)) if self.facts.gram else None

    def mean(self, piece: int, came: Came) -> torch.Tensor:
        """The mean of a piece, or the aggregator's row; valid until the next piece's."""
        mean_S = self._mean[: self.grid.size(piece)]
        if self.facts.each is None and self.facts.edit is None:
            self._sum_up(piece, came, mean_S)
        elif self.facts.each is None:
            factors_K = torch.tensor([sender.factor / self._weight for sender, _ in came]).to(mean_S)
            torch.mv(self._decoded(piece, came).T, factors_K, out=mean_S)
        else:
            shares_K = torch.tensor([sender.share for sender, _ in came], device=self.device)
            mean_S.copy_(self.facts.each(self._decoded(piece, came), shares_K))
        start = self.grid.part(piece).start
        if self.gram_KK is not None and start < self.facts.gram:
            self.gram_KK += products(self._decoded(piece, came)[:, : self.facts.gram - start])
        return mean_S

    def _sum_up(self, piece: int, came: Came, mean_S: torch.Tensor) -> None:
        """The weighted mean, one sender after the other."""
        weight = self._weight
        if self._total is not None and self._divide is not None:
            total_S = self._total[: len(mean_S)].zero_()
            for _, ring_S in came:
                total_S.add_(ring_S.to(self.device))
            self._divide(total_S, weight, mean_S)
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
        """Every sender's values of a piece, [K, S]."""
        size = self.grid.size(piece)
        if len(self._rows) < len(came) * size:
            self._rows = torch.zeros(len(came) * size, dtype=self._rows.dtype, device=self.device)
        rows_KS = self._rows[: len(came) * size].view(len(came), size)
        for row_S, (_, values) in zip(rows_KS, came, strict=True):
            if self.coder is not None:
                self.coder.add_or_note(values, bare(row_S.zero_()), piece, 1.0)
            else:
                row_S.copy_(values)
        if self.facts.edit is not None:
            self.facts.edit(rows_KS, [self.facts.ids[sender.number] for sender, _ in came])
        return rows_KS


def products(rows_KS: torch.Tensor) -> np.ndarray:
    """Inner products of rows in float64, a part of them at a time, [K, K]."""
    gram_KK = torch.zeros(len(rows_KS), len(rows_KS), dtype=torch.float64, device=rows_KS.device)
    for start in range(0, rows_KS.shape[1], PART):
        exact_KB = rows_KS[:, start : start + PART].double()
        gram_KK.addmm_(exact_KB, exact_KB.T)
    return gram_KK.cpu().numpy()
