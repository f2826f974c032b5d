"""Values that travel beside a lossy codec as they are: statistics, and what `exchange.exact` names.

What the server averages and never steps (buffers such as running variances) does not survive a codec: a variance that
is a step too low is below 0. So a codec sees 0 in its place, and the values themselves are added up in float64 in one
small transfer of their own; where the way down has a codec, the owners' new values come back in another one. It is the
same for every plan, region and scope; of silos that travel one by one, one by one.

Frozen parameters that are shared are such values too, and may be millions: they are sent where one has moved.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from fedmpi.aggregate.base import products
from fedmpi.comm import Comm
from fedmpi.layout import Layout

ROOM = 1 << 20  # values of all silos that travel at a time
_NOTHING = torch.zeros(0, dtype=torch.float64)


class Places:
    """Parts of a vector, laid side by side: E elements."""

    def __init__(self, parts: Sequence[slice]) -> None:
        self.parts = sorted(parts, key=lambda part: part.start)
        self._starts = [part.start for part in self.parts]
        self._ends = [0]
        for part in self.parts:
            self._ends.append(self._ends[-1] + part.stop - part.start)

    def __len__(self) -> int:
        return self._ends[-1]

    def of(self, vector_P: torch.Tensor) -> torch.Tensor:
        """Their values, [E]."""
        return torch.cat([vector_P[part] for part in self.parts]) if self.parts else vector_P[:0]

    def within(self, start: int, size: int) -> Iterator[tuple[slice, slice]]:
        """Those of a piece of the vector: where in the piece, and where among the E."""
        number = max(0, bisect_right(self._starts, start) - 1)
        for part, end in zip(self.parts[number:], self._ends[number:], strict=False):
            low, high = max(part.start, start), min(part.stop, start + size)
            if part.start >= start + size:
                return
            if low < high:
                yield slice(low - start, high - start), slice(end + low - part.start, end + high - part.start)


class Exact:
    """One exchange's values; begin, take of every silo, mean, put; and for the way down keep and land."""

    def __init__(self, layout: Layout, comm: Comm) -> None:
        self._comm = comm
        self._parts, self._still = Places(layout.exact), Places(layout.still)
        self._all = [*self._parts.parts, *self._still.parts]
        self._rows: dict[int, torch.Tensor] = {}  # by slot: values, and behind them those of what should stand still
        self._moved = False  # has any of that moved here?
        self._sent: list[tuple[Places, torch.Tensor | None]] = []  # this round's places and their means; None: all 0
        self._read: list[tuple[Places, torch.Tensor | None]] = []  # this round's rows, until they become one
        self._new: list[torch.Tensor] = []
        self._before: list[torch.Tensor] = []

    def begin(self) -> None:
        """Forget the last round."""
        self._rows.clear()
        self._moved = False

    def take(self, slot: int, share: float, delta_P: torch.Tensor) -> None:
        """A silo's values, or where a slot holds several their weighted sum; in the delta there is 0 then."""
        values = torch.cat([self._parts.of(delta_P), self._still.of(delta_P)]).double().cpu().mul_(share)
        self._moved = self._moved or bool(values[len(self._parts) :].any())
        self._rows[slot] = self._rows[slot].add_(values) if slot in self._rows else values
        for part in self._all:
            delta_P[part].zero_()

    def mean(self, senders: Sequence[int], weight: float, one_by_one: bool) -> None:
        """Their means on every rank: a call of all ranks. `senders` are those of all ranks in their order."""
        if not one_by_one:
            rows = [*self._rows.values()]
            total = torch.zeros(len(self._parts) + 1, dtype=torch.float64)
            for row in rows:
                total[:-1] += row[: len(self._parts)]
            total[-1] = float(self._moved)
            total = self._summed(total)
            self._sent = [(self._parts, total[:-1] / weight)]
            if not len(self._still):
                return
            still = [row[len(self._parts) :] for row in rows]
            summed = sum(still[1:], still[0]) if still else torch.zeros(len(self._still), dtype=torch.float64)
            self._sent.append((self._still, self._summed(summed) / weight if total[-1] else None))
            return
        self._sent = []
        for places, chunks in self._one_by_one(senders):
            means = None if chunks is None else torch.cat([*(rows.sum(0).div_(weight) for rows in chunks), _NOTHING])
            self._sent.append((places, means))

    def gather(
        self, senders: Sequence[int], shares: Sequence[float], centre: Iterable[tuple[int, torch.Tensor]] | None
    ) -> None:
        """Every silo's values on every rank, for an aggregator that reads them, and behind them those of its `centre`,
        of which each rank has pieces with their starts. A call of all ranks."""
        shares_K, pieces = torch.tensor(shares, dtype=torch.float64), None if centre is None else [*centre]
        self._read = []
        for places, chunks in self._one_by_one(senders):
            if chunks is None:
                self._read.append((places, None))
                continue
            rows_KE = torch.cat([*(rows.div_(shares_K[:, None]).float() for rows in chunks)], dim=1)
            if pieces is not None:
                centre_E = torch.zeros(len(places), dtype=torch.float64)
                for start, values_S in pieces:
                    for here, there in places.within(start, len(values_S)):
                        centre_E[there] = values_S[here].to(centre_E)
                rows_KE = torch.cat([rows_KE, self._summed(centre_E)[None].float()])
            self._read.append((places, rows_KE))

    def products(self) -> np.ndarray:
        """Inner products of what was gathered, [K, K]: these values are part of the deltas too."""
        return sum((products(rows_KE) for _, rows_KE in self._read if rows_KE is not None), np.zeros(()))

    def combine(self, combine: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """What was gathered becomes one row."""
        self._sent = [(places, None if rows is None else combine(rows).double()) for places, rows in self._read]
        self._read = []

    def _one_by_one(self, senders: Sequence[int]) -> Iterator[tuple[Places, Iterator[torch.Tensor] | None]]:
        """The places that travel this round, and the senders' values there, some at a time; None: all 0."""
        moved = self._summed(torch.tensor([float(self._moved)], dtype=torch.float64)).any()
        num = len(self._parts)
        yield self._parts, self._chunks(slice(0, num), senders)
        if len(self._still):
            yield self._still, self._chunks(slice(num, num + len(self._still)), senders) if moved else None

    def _chunks(self, there: slice, senders: Sequence[int]) -> Iterator[torch.Tensor]:
        """Every sender's values in the order of senders, the same for any number of ranks, [K, values of a chunk]."""
        step = max(1, ROOM // len(senders))
        for start in range(there.start, max(there.stop, there.start + 1), step):
            part = slice(start, min(start + step, there.stop))
            rows_KE = torch.zeros(len(senders), part.stop - part.start, dtype=torch.float64)
            for row_E, sender in zip(rows_KE, senders, strict=True):
                if sender in self._rows:
                    row_E.copy_(self._rows[sender][part])
            yield self._summed(rows_KE.view(-1)).view(rows_KE.shape)

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        total = torch.empty_like(values)
        if len(values):
            self._comm.allreduce(values.contiguous(), total)
        return total

    def put(self, mean_S: torch.Tensor, start: int) -> None:
        """The means into a piece of the mean."""
        for places, means in self._sent:
            for here, there in places.within(start, len(mean_S)):
                mean_S[here] = 0.0 if means is None else means[there].to(mean_S)

    # ------------------------------------------------------------ the way down

    def step(self, params_P: torch.Tensor) -> None:
        """Begin to keep what the owners' steps give, and keep what stands still before the codec's steps are added."""
        self._before = [places.of(params_P) if means is None else params_P[:0] for places, means in self._sent]
        self._new = [torch.zeros(len(places), dtype=torch.float64) for places, _ in self._sent]

    def keep(self, new_S: torch.Tensor, start: int) -> None:
        """An owner's new values."""
        for (places, _), new_E in zip(self._sent, self._new, strict=True):
            for here, there in places.within(start, len(new_S)):
                new_E[there] = new_S[here].to(new_E)

    def blank(self, values: torch.Tensor, start: int) -> None:
        """0 where a codec has nothing to encode, or had nothing to decode: in a row, or in all of [K, S]."""
        for places in (self._parts, self._still):
            for here, _there in places.within(start, values.shape[-1]):
                values[..., here] = 0.0

    def land(self, params_P: torch.Tensor) -> None:
        """The owners' new values into everybody's parameters: a call of all ranks. What stood still is put back."""
        for (places, means), new_E, before_E in zip(self._sent, self._new, self._before, strict=True):
            if not len(places):
                continue
            values_E = before_E if means is None else self._summed(new_E).to(params_P)
            for here, there in places.within(0, len(params_P)):
                params_P[here] = values_E[there]
