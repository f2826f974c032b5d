"""A table of small numbers that every rank needs in a round; each rank fills in its own rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Column = Callable[[str], np.ndarray]  # a column of the silos' rows by name, [K]


@dataclass(frozen=True)
class Pooling:
    """What a rank shares instead of its silos' rows: some columns, and sums over its silos."""

    shown: tuple[str, ...]  # columns that are shared per silo
    sums: tuple[str, ...]  # names of the sums
    add_up: Callable[[Column], Mapping[str, float]]  # computes the sums; rows not filled in are 0


class Cover(Protocol):
    """Hides a rank's figures from the others, which see only the sum over all ranks (secure/session.py)."""

    def on(self, values: np.ndarray) -> np.ndarray:
        """This rank's figures, covered."""
        ...

    def off(self, summed: np.ndarray) -> np.ndarray:
        """The sums of the figures, from the sum of what `on` gave on every rank."""
        ...

    def width(self, num: int) -> int:
        """How many numbers `on` gives for so many figures."""
        ...


class StatusTable:
    """A table of small numbers: a row per rank, a row per silo, and counts, all float64.

    Each rank fills in its own rows; `share` gives every rank all rows in one small collective. Every rank then sums in
    silo order, so a record does not depend on placement. Counts are integers summed over all silos, exact in any order.

    With `pooling` only its columns and sums leave a rank. After `share` other columns are nan, even a rank's own rows,
    so that all ranks compute the same results. With a `cover`, sums and counts are added up under it, if they `may`.
    """

    def __init__(
        self,
        num_ranks: int,
        rank_columns: Sequence[str],
        num_silos: int,
        silo_columns: Sequence[str],
        num_counts: int = 0,
        pooling: Pooling | None = None,
        cover: Cover | None = None,
    ):
        self._pooling, self._cover = pooling, cover
        self._sums: dict[str, float] = {}
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
        """The counts of this rank's silos, to be added to in place; after `share` those of all silos."""
        return self._values[self._end :]

    @property
    def num_bytes(self) -> int:
        """Bytes that a rank gives to the collective."""
        if (pooling := self._pooling) is None:
            return self._values.nbytes
        num_silos = (self._end - self._split) // max(1, len(self._silo_columns))
        hidden = self.num_hidden if self._cover is None else self._cover.width(self.num_hidden)
        return (self._split + num_silos * len(pooling.shown) + hidden) * self._values.itemsize

    @property
    def num_hidden(self) -> int:
        """Counts and pooled sums: what a cover hides."""
        return len(self.counts) + (0 if self._pooling is None else len(self._pooling.sums))

    def hidden(self) -> np.ndarray:
        """The counts, and the pooled sums of this rank's silos: what a cover hides, [num_hidden]."""
        assert self._pooling is not None
        sums = self._pooling.add_up(self.silo)
        return np.concatenate([self.counts, np.array([sums[name] for name in self._pooling.sums])])

    def shown(self, silo: int) -> dict[str, float]:
        """A silo's row, of what others see of it: if rows are pooled, the columns that are shown."""
        row = self.row(silo)
        return row if self._pooling is None else {name: row[name] for name in self._pooling.shown}

    def clear(self) -> None:
        self._values[:] = 0.0

    def set_rank(self, rank: int, **values: float) -> None:
        for name, value in values.items():
            self._view(True)[rank, self._rank_columns[name]] = value

    def set_silo(self, silo: int, **values: float) -> None:
        for name, value in values.items():
            self._view(False)[silo, self._silo_columns[name]] = value

    def row(self, silo: int) -> dict[str, float]:
        """A silo's row by column."""
        return dict(zip(self._silo_columns, self._view(False)[silo].tolist(), strict=True))

    def rank(self, column: str) -> np.ndarray:
        """One value per rank, [n]."""
        return self._view(True)[:, self._rank_columns[column]]

    def silo(self, column: str) -> np.ndarray:
        """One value per silo, in the federation's order, [K]."""
        return self._view(False)[:, self._silo_columns[column]]

    def sum(self, name: str) -> float:
        """A pooled sum over all silos. Raises KeyError if rows are not pooled."""
        return self._sums[name]

    @property
    def pools(self) -> bool:
        """Whether ranks share sums instead of rows."""
        return self._pooling is not None

    def share(self, over: Callable[[np.ndarray], np.ndarray], may: Callable[[], bool] = lambda: True) -> None:
        """Give every rank all rows, or the sums in their place. Collective.

        With a cover this takes two steps: first the ranks' rows and the columns that are shown, then what is hidden. In
        between `may` says, from what is known by then and so alike on every rank, whether sums may be uncovered. If
        not, nothing more leaves a rank: sums are nan, and counts 0.
        """
        if (pooling := self._pooling) is None:
            self._values = over(self._values)
            return
        hidden = self.hidden()
        known = [self._values[: self._split], *(self.silo(name) for name in pooling.shown)]
        if self._cover is None:
            *known, hidden = _together(over, [*known, hidden])
            self._known(known)
        else:
            self._known(_together(over, known))
            hidden = self._cover.off(over(self._cover.on(hidden))) if may() else self._nothing()
        self._values[self._end :], of_all = np.split(hidden, [len(self.counts)])
        self._sums = dict(zip(pooling.sums, of_all.tolist(), strict=True))

    def _known(self, parts: Sequence[np.ndarray]) -> None:
        """Fill in the ranks' rows and the columns that are shown; all other columns are nan."""
        assert self._pooling is not None
        self._values[: self._split], self._values[self._split : self._end] = parts[0], np.nan
        for name, column in zip(self._pooling.shown, parts[1:], strict=True):
            self._view(False)[:, self._silo_columns[name]] = column

    def _nothing(self) -> np.ndarray:
        """What stands for hidden figures that were not uncovered."""
        nothing = np.full(self.num_hidden, np.nan)
        nothing[: len(self.counts)] = 0.0
        return nothing


def _together(over: Callable[[np.ndarray], np.ndarray], parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The parts, after one collective over all of them."""
    ends = np.cumsum([len(part) for part in parts])
    return np.split(over(np.concatenate(parts)), ends[:-1])
