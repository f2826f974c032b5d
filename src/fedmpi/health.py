"""Does the run still learn? A round's training loss and the norms of its deltas, against those of the rounds before.

The figures are those that every rank has before a round's vectors travel, so all ranks come to the same verdict while
the state is still that of the round before. Checkpoints hold those of earlier rounds, so a resumed run gives up in the
round in which it would have without having been stopped.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import Annotated

import pydantic
import torch

from fedmpi.components import PositiveInt, component
from fedmpi.state import StateTensor

ENOUGH = 3  # earlier rounds, before a norm is compared with theirs

Factor = Annotated[float, pydantic.Field(gt=1, allow_inf_nan=False)]


@component
class StopSection:
    """When a run gives up because it diverges: it ends with exit code 1, the last good round on disk. null: never."""

    not_finite: bool = True
    """at once, when the training loss is not finite"""
    loss_factor: Factor | None = 100.0
    """when the training loss is so many times its median and above the first"""
    norm_factor: Factor | None = 100.0
    """when the mean norm of deltas is so many times its median"""
    patience: PositiveInt = 3
    """rounds, one after the other, of which one of the two holds"""


class Health:
    """The figures of all rounds so far that were good, and for how many rounds they have not been."""

    def __init__(self, section: StopSection) -> None:
        self.section = section
        self.doubts = 0  # rounds, up to now, that looked bad
        self._first = math.inf
        self._losses: list[float] = []  # sorted
        self._norms: list[float] = []  # sorted

    def state(self) -> Iterator[StateTensor]:
        """All figures."""
        for name, value in (("first", self._first), ("doubts", self.doubts)):
            yield StateTensor((name,), torch.tensor([value], dtype=torch.float64))
        for name, values in (("losses", self._losses), ("norms", self._norms)):
            yield StateTensor((name,), torch.tensor(values, dtype=torch.float64), grows=True)

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Those of a checkpoint."""
        figures = {name: tensor.tolist() for (name,), tensor, *_ in stored}
        (self._first,), self.doubts = figures["first"], int(figures["doubts"][0])
        self._losses, self._norms = figures["losses"], figures["norms"]

    def suspects(self, loss: float | None, norm: float | None) -> bool:
        """Would the round look bad? Nothing is taken in."""
        return (loss is None and self.section.not_finite) or bool(self._reasons(loss, norm))

    def look(self, number: int, loss: float | None, norm: float | None) -> str:
        """Take in a round; why the run should be given up, or nothing. None: not finite."""
        if loss is None and self.section.not_finite:
            self.doubts += 1
            return f"round {number}: the run has diverged: its training loss is not finite (stop.not_finite)"
        if why := self._reasons(loss, norm):
            self.doubts += 1
            if self.doubts >= self.section.patience:
                rounds = f" in round {self.doubts} of such" if self.doubts > 1 else ""
                return f"round {number}: the run has diverged: {' and '.join(why)}{rounds}"
            return ""
        self.doubts = 0
        if loss is not None:
            self._first = loss if math.isinf(self._first) else self._first
            bisect.insort(self._losses, loss)
        if norm is not None:
            bisect.insort(self._norms, norm)
        return ""

    def _reasons(self, loss: float | None, norm: float | None) -> list[str]:
        """What of a round looks bad."""
        section, why = self.section, []
        # Cohorts differ: rounds of silos with an easy task may be far below all others, so it is not the best of them
        # that counts, and what an untrained model has is no divergence.
        median, factor = _median(self._losses, 1), section.loss_factor
        if loss is not None and factor is not None and loss > max(factor * median, self._first) and median > 0:
            why.append(
                f"its training loss {loss:.4g} is more than stop.loss_factor = {factor:g} times the median, "
                f"{median:.4g}"
            )
        median = _median(self._norms, ENOUGH)
        if norm is not None and section.norm_factor is not None and norm > section.norm_factor * median > 0:
            why.append(
                f"the mean norm of its deltas {norm:.4g} is more than stop.norm_factor = {section.norm_factor:g} times "
                f"the median, {median:.4g}"
            )
        return why


def _median(values: Sequence[float], enough: int) -> float:
    """Of values in order; infinite where there are too few."""
    return values[len(values) // 2] if len(values) >= enough else math.inf
