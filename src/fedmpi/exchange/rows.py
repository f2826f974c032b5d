"""The updates of a buffer side by side on rank 0, for an aggregator that reads each of them."""

from __future__ import annotations

import json

import numpy as np
import torch

from fedmpi.aggregate.base import Aggregator, Cohort, products
from fedmpi.comm import Comm
from fedmpi.exchange.base import BLOCK
from fedmpi.state import Arrays, Holders, Vectors


class Rows:
    """One row per update, in the order of arrival. A silo that brings two updates has two rows.

    `length` is that of a row on rank 0, and 0 on other ranks.
    """

    def __init__(self, aggregator: Aggregator, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self._aggregator, self._length, self._dtype, self._device = aggregator, length, dtype, device
        self._memory: list[torch.Tensor] = []  # reused
        self._silos: list[str] = []
        self._state = Arrays(aggregator.init())
        self._has_state = bool(self._state.arrays)
        self._centre_P = torch.zeros(length, dtype=dtype, device=device) if aggregator.centre else None
        self.holders = Holders(aggregator=self._state)
        if self._centre_P is not None:
            self.holders["centre"] = Vectors({"last": self._centre_P}, "sharded")

    def begin(self) -> None:
        """Forget the last round's rows."""
        self._silos.clear()

    def add(self, silo: str, delta_P: torch.Tensor, factor: float) -> torch.Tensor:
        """Add `factor` times a delta as a row, and return it, [P]."""
        if len(self._silos) == len(self._memory):
            self._memory.append(torch.empty(self._length, dtype=self._dtype, device=self._device))
        row_P = torch.mul(delta_P, factor, out=self._memory[len(self._silos)])
        self._silos.append(silo)
        return row_P

    def combine(self, mean_P: torch.Tensor, round: int, seed: int) -> None:
        """Write the aggregator's result into `mean_P`."""
        rows = self._memory[: len(self._silos)]
        if self._centre_P is not None:
            rows = [*rows, self._centre_P]
        parts = [slice(start, min(start + BLOCK, self._length)) for start in range(0, self._length, BLOCK)]
        gram: np.ndarray | None = None
        if self._aggregator.needs == "gram":
            gram = sum(
                (products(torch.stack([row[part] for row in rows])) for part in parts),
                np.zeros((len(rows), len(rows))),
            )
        cohort = Cohort(list(self._silos), round, seed)
        weights, self._state.arrays = self._aggregator.row_weights(gram, cohort, self._state.arrays)
        for part in parts:
            mean_P[part].copy_(self._aggregator.combine(torch.stack([row[part] for row in rows]), weights))
        if self._centre_P is not None:
            self._centre_P.copy_(mean_P)

    def share_state(self, comm: Comm) -> None:
        """Give all ranks the aggregator's state of rank 0. Collective."""
        if not self._has_state:
            return
        told = {name: (str(array.dtype), array.tolist()) for name, array in self._state.arrays.items()}
        told = json.loads(comm.broadcast_text(json.dumps(told), 0))
        self._state.arrays = {name: np.array(values, dtype=dtype) for name, (dtype, values) in told.items()}
