"""Detects divergence: compares a round's training loss and the norm of its deltas with earlier rounds.

Every rank has these figures before the round's vectors are sent. So all ranks reach the same verdict while the state is
still that of the round before. Checkpoints hold the figures of earlier rounds, so a resumed run gives up in the same
round as an uninterrupted one.
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

ENOUGH = 3  # earlier rounds needed before a norm is compared

Factor = Annotated[float, pydantic.Field(gt=1, allow_inf_nan=False)]


@component
class StopSection:
    """When a diverging run gives up: exit code 1, with the last good round on disk. null: never."""

    not_finite: bool = True
    """give up at once when the training loss is not finite"""
    loss_factor: Factor | None = 100.0
    """bad round: its training loss exceeds this many times the median, and the first loss"""
    norm_factor: Factor | None = 100.0
    """bad round: the mean norm of its deltas exceeds this many times the median"""
    patience: PositiveInt = 3
    """give up after this many bad rounds in a row"""


class Health:
    """The figures of all good rounds so far, and the number of bad rounds since."""

    def __init__(self, section: StopSection) -> None:
        self.section = section
        self.doubts = 0  # bad rounds in a row, up to now
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
        """Restore the figures of a checkpoint."""
        figures = {name: tensor.tolist() for (name,), tensor, *_ in stored}
        (self._first,), self.doubts = figures["first"], int(figures["doubts"][0])
        self._losses, self._norms = figures["losses"], figures["norms"]

    def suspects(self, loss: float | None, norm: float | None) -> bool:
        """Whether the round would count as bad. Changes nothing."""
        return (loss is None and self.section.not_finite) or bool(self._reasons(loss, norm))

    def look(self, number: int, loss: float | None, norm: float | None) -> str:
        """Record a round. Returns why the run should give up; empty if it should not. None means not finite."""
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
        """Why the round looks bad; empty if it does not."""
        section, why = self.section, []
        # Cohorts differ, and one with an easy task may have a far lower loss, so compare with the median, not the
        # minimum. The loss of an untrained model is no divergence.
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
    """The median of sorted values; infinite if there are fewer than `enough`."""
    return values[len(values) // 2] if len(values) >= enough else math.inf
