"""Values that travel beside a lossy codec as they are: statistics, and what `exchange.exact` names.

What the server averages and never steps (buffers such as running variances) does not survive a codec: a variance that
is a step too low is below 0. So a codec sees 0 in its place, and the values themselves are added up in float64 in one
small transfer of their own; where the way down has a codec, the owners' new values come back in another one. It is the
same for every plan, region and scope; of silos that travel one by one, one by one.

Frozen parameters that are shared are such values too, and may be millions: they are sent where one has moved.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import torch

from fedmpi.comm import Comm
from fedmpi.layout import Layout

Each = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # rows [K, S] and weights [K] to one row [S]
ROOM = 1 << 20  # values of all silos that travel at a time


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

    def __init__(self, layout: Layout, comm: Comm, each: Each | None) -> None:
        self._comm, self._each = comm, each
        self._parts, self._still = Places(layout.exact), Places(layout.still)
        self._all = [*self._parts.parts, *self._still.parts]
        self._rows: dict[int, torch.Tensor] = {}  # by slot: values, and behind them those of what should stand still
        self._moved = False  # has any of that moved here?
        self._sent: list[tuple[Places, torch.Tensor | None]] = []  # this round's places and their means; None: all 0
        self._new: list[torch.Tensor] = []

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

    def mean(self, slots: Sequence[int], shares: Sequence[float], weight: float, one_by_one: bool) -> None:
        """Their means on every rank: a call of all ranks. `slots` are those of all ranks in their order, with what they
        were multiplied with."""
        num = len(self._parts)
        flag = torch.tensor([float(self._moved)], dtype=torch.float64)
        if not one_by_one:
            total = torch.zeros(num + 1, dtype=torch.float64)
            for row in self._rows.values():
                total[:num] += row[:num]
            total[num] = flag[0]
            total = self._summed(total)
            flag = total[num:]
            self._sent = [(self._parts, total[:num] / weight)]
        else:
            flag = self._summed(flag)
            self._sent = [(self._parts, self._one_by_one(slice(0, num), slots, shares, weight))]
        if not len(self._still):
            return
        there = slice(num, num + len(self._still))
        if not flag.any():
            self._sent.append((self._still, None))
        elif one_by_one:
            self._sent.append((self._still, self._one_by_one(there, slots, shares, weight)))
        else:
            rows = [row[there] for row in self._rows.values()]
            total = sum(rows[1:], rows[0]) if rows else torch.zeros(len(self._still), dtype=torch.float64)
            self._sent.append((self._still, self._summed(total) / weight))

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        total = torch.empty_like(values)
        self._comm.allreduce(values.contiguous(), total)
        return total

    def _one_by_one(self, there: slice, slots: Sequence[int], shares: Sequence[float], weight: float) -> torch.Tensor:
        """What becomes of every silo's values, in the order of slots: the same for any number of ranks."""
        shares_K = torch.tensor(shares, dtype=torch.float64)
        step = max(1, ROOM // len(slots))
        found = []
        for start in range(there.start, there.stop, step):
            part = slice(start, min(start + step, there.stop))
            rows_KE = torch.zeros(len(slots), part.stop - part.start, dtype=torch.float64)
            for row_E, slot in zip(rows_KE, slots, strict=True):
                if slot in self._rows:
                    row_E.copy_(self._rows[slot][part])
            rows_KE = self._summed(rows_KE.view(-1)).view(rows_KE.shape)
            if self._each is None:
                found.append(rows_KE.sum(0).div_(weight))
            else:
                found.append(self._each(rows_KE.div_(shares_K[:, None]).float(), shares_K.float()).double())
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)

    def put(self, mean_S: torch.Tensor, start: int) -> None:
        """The means into a piece of the mean."""
        for places, means in self._sent:
            for here, there in places.within(start, len(mean_S)):
                mean_S[here] = 0.0 if means is None else means[there].to(mean_S)

    # ------------------------------------------------------------ the way down

    def step(self) -> None:
        """Begin to keep what the owners' steps give."""
        self._new = [torch.zeros(len(places), dtype=torch.float64) for places, _ in self._sent]

    def keep(self, new_S: torch.Tensor, start: int) -> None:
        """An owner's new values."""
        for (places, _), new_E in zip(self._sent, self._new, strict=True):
            for here, there in places.within(start, len(new_S)):
                new_E[there] = new_S[here].to(new_E)

    def blank(self, step_S: torch.Tensor, start: int) -> None:
        """0 where the codec has nothing to encode."""
        for places, _ in self._sent:
            for here, _there in places.within(start, len(step_S)):
                step_S[here] = 0.0

    def land(self, params_P: torch.Tensor, before_P: list[torch.Tensor]) -> None:
        """The owners' new values into everybody's parameters: a call of all ranks. What stood still is put back."""
        for (places, means), new_E, before_E in zip(self._sent, self._new, before_P, strict=True):
            if not len(places):
                continue
            values_E = before_E if means is None else self._summed(new_E).to(params_P)
            for here, there in places.within(0, len(params_P)):
                params_P[here] = values_E[there]

    def before(self, params_P: torch.Tensor) -> list[torch.Tensor]:
        """What stood still, before the codec's steps are added."""
        return [places.of(params_P) if means is None else params_P[:0] for places, means in self._sent]
