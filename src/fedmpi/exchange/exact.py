"""Values that are sent exactly beside a lossy codec: statistics, and what `exchange.exact` names.

Values that the server averages but does not step (buffers such as running variances) do not survive a codec: an error
of one quantization step can make a variance negative. So the codec sees 0 in their place, and the values themselves are
summed in float64 in a small transfer of their own. If the way down has a codec, a second transfer returns the owners'
new values. This works alike for every plan, region and scope; with `scope: silo` the values are sent silo by silo.

Shared frozen parameters are treated the same way. They may be millions, so they are sent only if one has changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from fedmpi.aggregate.base import products
from fedmpi.comm import Comm
from fedmpi.layout import Layout

ROOM = 1 << 20  # values of all silos in one transfer
_NOTHING = torch.zeros(0, dtype=torch.float64)


class Places:
    """Parts of a vector, concatenated: E elements."""

    def __init__(self, parts: Sequence[slice]) -> None:
        self.parts = sorted(parts, key=lambda part: part.start)
        self._starts = [part.start for part in self.parts]
        self._ends = [0]
        for part in self.parts:
            self._ends.append(self._ends[-1] + part.stop - part.start)

    def __len__(self) -> int:
        return self._ends[-1]

    def of(self, vector_P: torch.Tensor) -> torch.Tensor:
        """The values of these parts, [E]."""
        return torch.cat([vector_P[part] for part in self.parts]) if self.parts else vector_P[:0]

    def within(self, start: int, size: int) -> Iterator[tuple[slice, slice]]:
        """Where these parts overlap a piece of the vector: the slice in the piece, and the slice of the E elements."""
        number = max(0, bisect_right(self._starts, start) - 1)
        for part, end in zip(self.parts[number:], self._ends[number:], strict=False):
            low, high = max(part.start, start), min(part.stop, start + size)
            if part.start >= start + size:
                return
            if low < high:
                yield slice(low - start, high - start), slice(end + low - part.start, end + high - part.start)


class Exact:
    """The exact values of one exchange.

    Call begin, take for every silo, mean (or gather and combine), put; and for the way down step, keep and land.
    """

    def __init__(self, layout: Layout, comm: Comm) -> None:
        self._comm = comm
        self._parts, self._still = Places(layout.exact), Places(layout.still)
        self._all = [*self._parts.parts, *self._still.parts]
        self._rows: dict[int, torch.Tensor] = {}  # by slot: exact values, then those of frozen parameters
        self._moved = False  # whether a frozen value changed on this rank
        self._sent: list[tuple[Places, torch.Tensor | None]] = []  # places and their means this round; None: all 0
        self._read: list[tuple[Places, torch.Tensor | None]] = []  # places and rows this round, until `combine`
        self._new: list[torch.Tensor] = []
        self._before: list[torch.Tensor] = []

    def begin(self) -> None:
        """Forget the last round."""
        self._rows.clear()
        self._moved = False

    def take(self, slot: int, share: float, delta_P: torch.Tensor) -> None:
        """Add a silo's values, times its share, to the slot's; set them to 0 in the delta."""
        values = torch.cat([self._parts.of(delta_P), self._still.of(delta_P)]).double().cpu().mul_(share)
        self._moved = self._moved or bool(values[len(self._parts) :].any())
        self._rows[slot] = self._rows[slot].add_(values) if slot in self._rows else values
        for part in self._all:
            delta_P[part].zero_()

    def mean(self, senders: Sequence[int], weight: float, one_by_one: bool) -> None:
        """Compute the means on every rank. Collective. `senders` lists all ranks' senders in order."""
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
        """Bring every silo's values to every rank, for an aggregator that reads them. Collective.

        Rows of `centre` follow the silos'; each rank passes its own pieces of the centre with their starts.
        """
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
        """Inner products of the gathered rows, [K, K], to add to those of the deltas."""
        return sum((products(rows_KE) for _, rows_KE in self._read if rows_KE is not None), np.zeros(()))

    def combine(self, combine: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Reduce the gathered rows to one with the aggregator's `combine`."""
        self._sent = [(places, None if rows is None else combine(rows).double()) for places, rows in self._read]
        self._read = []

    def _one_by_one(self, senders: Sequence[int]) -> Iterator[tuple[Places, Iterator[torch.Tensor] | None]]:
        """The places sent this round, each with its senders' values in chunks; None: all 0. Collective."""
        moved = self._summed(torch.tensor([float(self._moved)], dtype=torch.float64)).any()
        num = len(self._parts)
        yield self._parts, self._chunks(slice(0, num), senders)
        if len(self._still):
            yield self._still, self._chunks(slice(num, num + len(self._still)), senders) if moved else None

    def _chunks(self, there: slice, senders: Sequence[int]) -> Iterator[torch.Tensor]:
        """Every sender's values in the order of senders, for any number of ranks the same, [K, values of a chunk]."""
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
        """Write the means into a piece of the mean."""
        for places, means in self._sent:
            for here, there in places.within(start, len(mean_S)):
                mean_S[here] = 0.0 if means is None else means[there].to(mean_S)

    # ------------------------------------------------------------ the way down

    def step(self, params_P: torch.Tensor) -> None:
        """Prepare for the owners' new values, and save the frozen values before the codec's step is added."""
        self._before = [places.of(params_P) if means is None else params_P[:0] for places, means in self._sent]
        self._new = [torch.zeros(len(places), dtype=torch.float64) for places, _ in self._sent]

    def keep(self, new_S: torch.Tensor, start: int) -> None:
        """Take an owner's new values of a piece."""
        for (places, _), new_E in zip(self._sent, self._new, strict=True):
            for here, there in places.within(start, len(new_S)):
                new_E[there] = new_S[here].to(new_E)

    def blank(self, values: torch.Tensor, start: int) -> None:
        """Set these values to 0 in a piece, [S], or in rows of it, [K, S], because the codec must not see them."""
        for places in (self._parts, self._still):
            for here, _there in places.within(start, values.shape[-1]):
                values[..., here] = 0.0

    def land(self, params_P: torch.Tensor) -> None:
        """Write the owners' new values into all ranks' parameters, and restore frozen ones. Collective."""
        for (places, means), new_E, before_E in zip(self._sent, self._new, self._before, strict=True):
            if not len(places):
                continue
            values_E = before_E if means is None else self._summed(new_E).to(params_P)
            for here, there in places.within(0, len(params_P)):
                params_P[here] = values_E[there]
