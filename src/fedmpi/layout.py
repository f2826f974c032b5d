"""The layout of the flat vector that is exchanged: named segments, each with a role.

delta       the model's shared parameters (in a contribution: how far they moved); the first P elements
auxiliary   a vector as long as the parameters that follows them (a control variate, ...)
exact       a part of the delta that no codec touches: statistics, frozen parameters, what `exchange.exact` names

>>> layout = Layout((Segment("delta", 0, 4, "delta"), Segment("1.running_var", 2, 4, "exact", averaged=True),
...                  Segment("control", 4, 8, "auxiliary", "population")))
>>> layout.num_params, layout.size, layout.exact, list(layout.of(range(8), "control"))
(4, 8, (slice(2, 4, None),), [4, 5, 6, 7])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar, cast

Vector = TypeVar("Vector", bound=Any)  # a tensor, an array, ...
Role = Literal["delta", "auxiliary", "exact"]
Normaliser = Literal["cohort", "population"]

DELTA = "delta"  # the name of the delta's segment


@dataclass(frozen=True)
class Segment:
    """Elements `start` to `stop` of the vector."""

    name: str
    start: int
    stop: int
    role: Role
    normaliser: Normaliser = "cohort"  # divides the sum by the weight of the cohort that took part, or of all silos
    averaged: bool = False  # becomes the mean of the silos' values; the server's optimizer never steps it
    still: bool = False  # usually does not move: a frozen parameter
    non_negative: bool = False  # a variance: must not become negative by rounding
    decay: float = 1.0  # for an auxiliary vector: each round it becomes decay * old + gain * the silos' mean
    gain: float = 1.0

    @property
    def place(self) -> slice:
        """The segment's slice of the vector."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Layout:
    """The segments of a vector: the delta, then auxiliary ones; exact ones lie inside the delta."""

    segments: tuple[Segment, ...]

    @classmethod
    def whole(cls, size: int) -> Layout:
        """The layout of a vector that holds only a delta."""
        return cls((Segment(DELTA, 0, size, "delta"),))

    @cached_property
    def num_params(self) -> int:
        """P, the number of elements of the delta."""
        return sum(segment.stop - segment.start for segment in self.segments if segment.role == "delta")

    @cached_property
    def size(self) -> int:
        """Q, the number of elements of the whole vector."""
        return max((segment.stop for segment in self.segments), default=0)

    @cached_property
    def auxiliaries(self) -> tuple[Segment, ...]:
        """The auxiliary segments, in order."""
        return tuple(segment for segment in self.segments if segment.role == "auxiliary")

    @cached_property
    def exact(self) -> tuple[slice, ...]:
        """Parts that are always sent exactly beside a lossy codec."""
        return self._places(lambda segment: segment.role == "exact" and not segment.still)

    @cached_property
    def still(self) -> tuple[slice, ...]:
        """Parts that are sent exactly beside a codec, but only in rounds in which they moved."""
        return self._places(lambda segment: segment.still)

    @cached_property
    def averaged(self) -> tuple[slice, ...]:
        """Parts that the server averages and never steps."""
        return self._places(lambda segment: segment.averaged)

    @cached_property
    def non_negative(self) -> tuple[slice, ...]:
        """Parts whose values are never negative."""
        return self._places(lambda segment: segment.non_negative)

    @cached_property
    def steps_alone(self) -> bool:
        """Whether the server's optimizer steps the whole delta."""
        return not self.averaged and not self.non_negative

    def of(self, vector_Q: Vector, name: str) -> Vector:
        """A view of the delta or of the named auxiliary vector. Raises KeyError, which lists the names."""
        for segment in self.segments:
            if segment.name == name and segment.role != "exact":
                return cast(Vector, vector_Q[segment.place])
        raise KeyError(f"no '{name}' travels; available: {', '.join(self.names)}")

    def params(self, vector_Q: Vector) -> Vector:
        """A view of the parameters in one of the server's vectors, [P]."""
        return cast(Vector, vector_Q[: self.num_params])

    @property
    def names(self) -> list[str]:
        """Names of the delta and of the auxiliary vectors."""
        return [segment.name for segment in self.segments if segment.role != "exact"]

    def part(self, place: slice) -> Layout:
        """The layout of a part of the vector, as a vector of its own.

        >>> layout = Layout((Segment("delta", 0, 6, "delta"), Segment("bn.running_var", 2, 5, "exact", averaged=True)))
        >>> layout.part(slice(3, 6)).size, layout.part(slice(3, 6)).averaged
        (3, (slice(0, 2, None),))
        """
        cut = (
            replace(one, start=max(0, one.start - place.start), stop=min(one.stop, place.stop) - place.start)
            for one in self.segments
            if max(one.start, place.start) < min(one.stop, place.stop)
        )
        return Layout(tuple(cut))

    def as_delta(self) -> Layout:
        """The same vector as one delta, for sums that become plain means; `non_negative` parts stay."""
        kept = (replace(segment, averaged=False, still=False) for segment in self.segments if segment.non_negative)
        return Layout((Segment(DELTA, 0, self.size, "delta"), *kept))

    def _places(self, chosen: Callable[[Segment], bool]) -> tuple[slice, ...]:
        return joined(segment.place for segment in self.segments if chosen(segment))


def joined(places: Iterable[slice]) -> tuple[slice, ...]:
    """The slices in order, with adjacent ones merged.

    >>> joined([slice(4, 6), slice(0, 2), slice(2, 3)])
    (slice(0, 3, None), slice(4, 6, None))
    """
    found: list[slice] = []
    for place in sorted(places, key=lambda place: place.start):
        if place.start < place.stop:
            adjoins = found and found[-1].stop == place.start
            found.append(slice(found.pop().start if adjoins else place.start, place.stop))
    return tuple(found)


def within(places: Sequence[slice], start: int, num: int) -> Iterator[slice]:
    """Where the slices overlap the `num` elements from `start` on, counted from `start`.

    >>> list(within([slice(0, 3), slice(7, 9)], 2, 6))
    [slice(0, 1, None), slice(5, 6, None)]
    """
    for place in places:
        there = slice(max(0, place.start - start), min(num, place.stop - start))
        if there.start < there.stop:
            yield there
