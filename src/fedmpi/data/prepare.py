"""Preparation of inputs: missing values are filled in and columns scaled, with statistics of training samples only.

Statistics are those of one silo, or of all silos together. The latter come from exact sums: they do not depend on which
rank hosts which silo, and only sums over a rank's silos leave a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fedmpi.data.stream import FileSamples
from fedmpi.errors import ConfigError
from fedmpi.types import Samples, SiloData

if TYPE_CHECKING:
    from fedmpi.comm import Comm

Array = npt.NDArray[np.float64]
Scale = Literal["standard", "minmax"]
Missing = Literal["error", "zero", "mean", "median"]

CONSTANT = 1e-12  # a deviation below this share of the mean is rounding
BLOCK_BYTES = 8 << 20
LIMB_BITS = 32
NUM_LIMBS = 68  # of any float64, counted from the smallest one


class Statistics(NamedTuple):
    """What is done to a column: missing values become `fill`, then x becomes (x - shift) / width."""

    fill: Array
    shift: Array
    width: Array


@dataclass(frozen=True)
class Preparation:
    """How inputs of one shape are prepared. A column is an entry of a sample [F], or a channel of one [C, ...]."""

    shape: tuple[int, ...]
    scale: Scale | None = None
    missing: Missing = "error"
    as_they_are: int = 0  # last columns, which do not change: one-hot columns and indicators

    @property
    def fits(self) -> bool:
        """Whether it depends on training samples."""
        return self.scale is not None or self.missing in ("mean", "median")

    @property
    def changes(self) -> bool:
        """Whether it does anything."""
        return self.scale is not None or self.missing != "error"

    def statistics(
        self, samples: Sequence[Samples], total: Callable[[Sequence[Array]], Array], ends: Callable[[Array], Array]
    ) -> Statistics:
        """From the training samples of some silos. `total` adds up arrays of silos, here and elsewhere; `ends` takes
        the elementwise maximum. The median takes more than sums: `samples` are then all there are."""
        if not self.fits:
            return self.none
        zeros = np.zeros(self.shape[0])
        sums = total([self._sums(x, lambda v: v) for x in samples])
        num, mean = sums[0], _divided(sums[1], sums[0])
        fill = mean if self.missing == "mean" else self._medians(samples) if self.missing == "median" else zeros
        if self.scale is None:
            return self._spared(Statistics(fill, zeros, zeros + 1))
        if self.scale == "standard":
            squares = total([self._sums(x, lambda v: np.square(v - mean)) for x in samples])[1]
            width = np.sqrt(_divided(squares, num))
            constant, shift = width <= CONSTANT * np.abs(mean), mean
        else:
            most = ends(
                np.max([self._ends(x) for x in samples], axis=0) if samples else np.full((2, len(mean)), -np.inf)
            )
            there = num > 0
            low, high = np.where(there, -most[0], 0.0), np.where(there, most[1], 0.0)
            width, shift = high - low, low
            constant = width == 0
        return self._spared(Statistics(fill, shift, np.where(constant, 1.0, width)))

    def of_one(self, data: SiloData) -> Statistics:
        """From one silo's training samples."""
        return self.statistics([data.x_train], lambda sums: sums[0], lambda ends: ends)

    @property
    def none(self) -> Statistics:
        """Those of a preparation that depends on no training sample."""
        return Statistics(np.zeros(self.shape[0]), np.zeros(self.shape[0]), np.ones(self.shape[0]))

    def told(self, found: Statistics) -> dict[str, Any]:
        """What `apply` does, as plain values for a file that goes with a model."""
        does = "along the first axis of a sample: x, or fill where it is missing, minus shift, divided by width"
        return {"inputs": does, **{name: values.tolist() for name, values in found._asdict().items()}}

    def apply(self, data: SiloData, found: Statistics) -> SiloData:
        """The data with prepared inputs; streamed ones are prepared as they are read."""
        if not self.changes:
            return data
        fill, shift, width = (self._along(values) for values in found)

        def prepared(x: torch.Tensor) -> torch.Tensor:
            values = x.numpy().astype(np.float64)
            values = (np.where(np.isnan(values), fill, values) - shift) / width
            return torch.from_numpy(values.astype(np.float32))

        def all_of(x: Samples) -> Samples:
            if isinstance(x, FileSamples):
                return x.through(prepared)
            parts = [prepared(block) for block in self._blocks(x)]
            return torch.cat(parts) if parts else torch.empty(tuple(x.shape), dtype=torch.float32)

        return data._replace(x_train=all_of(data.x_train), x_test=all_of(data.x_test))

    def _along(self, values: Array) -> Array:
        return values.reshape(-1, *(1,) * (len(self.shape) - 1))

    def _spared(self, found: Statistics) -> Statistics:
        """The last columns stay as they are."""
        first = self.shape[0] - self.as_they_are
        for values, neutral in zip(found, (0.0, 0.0, 1.0), strict=True):
            values[first:] = neutral
        return found

    def _blocks(self, x: Samples) -> Iterator[torch.Tensor]:
        """The same rows together for any storage, so that sums have the same bits."""
        step = max(1, BLOCK_BYTES // (4 * int(np.prod(self.shape))))
        for start in range(0, len(x), step):
            yield x[start : start + step]

    def _columns(self, x: Samples) -> Iterator[Array]:
        """Blocks as float64 [rows, columns, values]."""
        for block in self._blocks(x):
            yield block.numpy().reshape(len(block), self.shape[0], -1).astype(np.float64)

    def _sums(self, x: Samples, of: Callable[[Array], Array]) -> Array:
        """Numbers of values that are there, and the sums of a function of them: [2, F]."""
        sums = np.zeros((2, self.shape[0]))
        for block in self._columns(x):
            with np.errstate(invalid="ignore"):
                values = of(block.swapaxes(1, 2).reshape(-1, self.shape[0]))
            there = ~np.isnan(values)
            sums += there.sum(0), np.where(there, values, 0.0).sum(0)
        return sums

    def _medians(self, samples: Sequence[Samples]) -> Array:
        """The median of each column's values that are there, [F]; 0 for a column without values."""
        blocks = [block.swapaxes(1, 2).reshape(-1, self.shape[0]) for x in samples for block in self._columns(x)]
        there = [column[~np.isnan(column)] for column in np.concatenate(blocks).T]
        return np.array([np.median(values) if len(values) else 0.0 for values in there])

    def _ends(self, x: Samples) -> Array:
        """-minimum and maximum of each column, [2, F]; -inf for a column without values."""
        ends = np.full((2, self.shape[0]), -np.inf)
        for block in self._columns(x):
            there = [np.where(np.isnan(block), -np.inf, values).max((0, 2)) for values in (-block, block)]
            ends = np.maximum(ends, there)
        return ends


class Pooled:
    """Statistics over all silos. They are agreed on once, when a run starts, and then read from its directory."""

    def __init__(self, how: Preparation, read: Callable[[str], SiloData]) -> None:
        self._how, self._read = how, read
        self._held: dict[str, SiloData] = {}  # files that were read for the statistics
        self._found: Statistics | None = None

    @property
    def known(self) -> bool:
        """Whether the ranks have agreed on them."""
        return self._found is not None

    @property
    def found(self) -> Statistics:
        """The statistics. Raises ConfigError before the ranks have agreed."""
        if self._found is None:
            raise ConfigError("data.statistics: pooled statistics are not known yet")
        return self._found

    def read(self, silo: str) -> None:
        """Reads a silo's file, and keeps it until it is opened."""
        self._held[silo] = self._read(silo)

    def take(self, silo: str) -> SiloData:
        """The silo's samples, not prepared."""
        return self._held.pop(silo) if silo in self._held else self._read(silo)

    def agree(self, comm: Comm) -> None:
        """Computes them from the files that the ranks have read. Collective."""
        self._found = self._how.statistics(
            [data.x_train for data in self._held.values()],
            lambda parts: exact_sum(parts, (2, self._how.shape[0]), comm.share),
            lambda ends: _most(ends, comm),
        )

    def told(self) -> dict[str, list[float]]:
        """As plain values."""
        return {name: values.tolist() for name, values in self.found._asdict().items()}

    def load(self, values: Mapping[str, Any]) -> None:
        """From plain values. Raises ConfigError if they do not fit."""
        try:
            found = Statistics(*(np.array(values[name], np.float64) for name in Statistics._fields))
        except (KeyError, TypeError, ValueError):
            raise ConfigError("data.statistics: the run directory lacks the pooled statistics") from None
        if any(column.shape != (self._how.shape[0],) for column in found):
            raise ConfigError("data.statistics: the run directory has those of other columns")
        self._found = found


def exact_sum(parts: Sequence[Array], shape: tuple[int, ...], share: Callable[[Array], Array]) -> Array:
    """The sum of arrays over all ranks, each element rounded once: the same for any order and any number of ranks.

    Every number becomes an integer, a multiple of the smallest float64, whose limbs of 32 bits are added separately.

    >>> exact_sum([np.array([1e16]), np.array([1.0]), np.array([-1e16])], (1,), lambda limbs: limbs).tolist()
    [1.0]
    """
    size = int(np.prod(shape))
    limbs = np.zeros((size, NUM_LIMBS))
    for part in parts:
        for i, value in enumerate(part.ravel().tolist()):
            exact = Fraction(value) * 2**1074
            whole, sign = abs(exact.numerator), 1 if exact >= 0 else -1
            place = 0
            while whole:
                limbs[i, place] += sign * (whole & (2**LIMB_BITS - 1))
                whole >>= LIMB_BITS
                place += 1
    limbs = share(limbs.reshape(-1)).reshape(size, NUM_LIMBS)
    totals = [sum(int(limb) << (LIMB_BITS * place) for place, limb in enumerate(row)) for row in limbs.tolist()]
    return np.array([float(Fraction(total, 2**1074)) for total in totals]).reshape(shape)


def _divided(sums: Array, num: Array) -> Array:
    return np.divide(sums, num, out=np.zeros_like(sums), where=num > 0)


def _most(ends: Array, comm: Comm) -> Array:
    """The elementwise maximum over ranks. Collective."""
    rows = comm.gather(np.ascontiguousarray(ends, np.float64).tobytes())
    most: Array = np.max([np.frombuffer(row, np.float64) for row in rows], axis=0).reshape(ends.shape)
    return most
