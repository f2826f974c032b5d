"""Small numbers of a round that everybody must know: a table that every rank fills in its rows of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


class StatusTable:
    """Small numbers of a round that everybody must know: a row per rank, a row per silo, and counts, all float64.

    Every rank fills in its own rows; `share` makes them everybody's in one small collective. Sums are then taken in
    silo order on every rank, so a record does not depend on where silos live. Counts are whole numbers that are added
    up over all silos, which is exact in any order.
    """

    def __init__(
        self,
        num_ranks: int,
        rank_columns: Sequence[str],
        num_silos: int,
        silo_columns: Sequence[str],
        num_counts: int = 0,
    ):
        self._rank_columns = {name: i for i, name in enumerate(rank_columns)}
        self._silo_columns = {name: i for i, name in enumerate(silo_columns)}
        self._split = num_ranks * len(rank_columns)
        self._end = self._split + num_silos * len(silo_columns)
        self._values = np.zeros(self._end + num_counts)

    def _view(self, per_rank: bool) -> np.ndarray:
        columns = self._rank_columns if per_rank else self._silo_columns
        part = self._values[: self._split] if per_rank else self._values[self._split : self._end]
        return part.reshape(-1, len(columns))

    @property
    def counts(self) -> np.ndarray:
        """The counts of this rank's silos, to be added to; of all silos once shared."""
        return self._values[self._end :]

    @property
    def num_bytes(self) -> int:
        """What a rank hands to the collective."""
        return self._values.nbytes

    def clear(self) -> None:
        self._values[:] = 0.0

    def set_rank(self, rank: int, **values: float) -> None:
        for name, value in values.items():
            self._view(True)[rank, self._rank_columns[name]] = value

    def set_silo(self, silo: int, **values: float) -> None:
        for name, value in values.items():
            self._view(False)[silo, self._silo_columns[name]] = value

    def rank(self, column: str) -> np.ndarray:
        """One value per rank, [n]."""
        return self._view(True)[:, self._rank_columns[column]]

    def silo(self, column: str) -> np.ndarray:
        """One value per silo, in the federation's order, [K]."""
        return self._view(False)[:, self._silo_columns[column]]

    def share(self, over: Callable[[np.ndarray], np.ndarray]) -> None:
        self._values = over(self._values)
