"""Ends a run by its figures: divergence, and a metric that has reached its target or no longer improves.

For divergence, a round's training loss and the norm of its deltas are compared with those of earlier rounds.

Every rank has these figures before the round's vectors are sent. So all ranks reach the same verdict while the state is
still that of the round before. Checkpoints hold the figures of earlier rounds, so a resumed run gives up in the same
round as an uninterrupted one.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
import torch

from fedmpi.components import NonNegativeFloat, PositiveInt, component, did_you_mean
from fedmpi.errors import ConfigError
from fedmpi.state import StateTensor

if TYPE_CHECKING:
    from fedmpi.config import Config

ENOUGH = 3  # earlier rounds needed before a norm is compared

TRAIN_LOSS = "train_loss"  # the metric that needs no test data

Factor = Annotated[float, pydantic.Field(gt=1, allow_inf_nan=False)]


@component
class EarlySection:
    """When a run ends before its last round: exit code 0, with model.safetensors, as after the last round."""

    metric: str | None = None
    """record key that decides, such as macro_f1 or loss; null: the metric that decides the best round"""
    target: Annotated[float, pydantic.Field(allow_inf_nan=False)] | None = None
    """end once the metric is at least this, or at most if lower is better; null: no target"""
    patience: PositiveInt | None = None
    """end after this many evaluations in a row without a new best value; null: never"""
    min_delta: NonNegativeFloat = 0.0
    """an evaluation counts as a new best only if it is better than the last best by more than this"""

    @pydantic.model_validator(mode="after")
    def _some(self) -> EarlySection:
        if self.target is None and self.patience is None:
            raise ValueError("give 'target', 'patience' or both")
        return self

    def conflicts(self, config: Config) -> str | None:
        """Refuses what must know the last round beforehand."""
        regions = config.exchange.regions
        if config.transport.apart and config.engine.arrivals and self.metric != TRAIN_LOSS:
            return (
                "stop.early: with transport: files and engine: buffered silos score different versions; take metric: "
                f"{TRAIN_LOSS}"
            )
        if regions is not None and regions.every > 1:
            return "stop.early: with exchange.regions.every the regions differ in most rounds; take every: 1"
        if config.evaluate.finetune is not None:
            return "stop.early: evaluate.finetune tunes after the last round, which must be known beforehand"
        if config.privacy is not None:
            return "stop.early: the metric has no noise, so the number of rounds would tell of it; leave out privacy"
        return None


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
    early: EarlySection | None = None
    """end a run early, in good order, by a metric; see `fedmpi list stop.early`"""

    def conflicts(self, config: Config) -> str | None:
        """What `early` does not go with."""
        return None if self.early is None else self.early.conflicts(config)


class Progress:
    """The best value of a metric so far, and how many evaluations in a row were no better."""

    def __init__(self, section: EarlySection, metric: str, maximize: bool, every: int, rounds: int) -> None:
        """`metric` is a record's key; `every` is the number of rounds between evaluations."""
        self._section, self._metric, self._sign = section, metric, 1.0 if maximize else -1.0
        self._every, self._rounds = every, rounds
        self._best = self._last = -math.inf  # higher is better
        self._stale = 0

    @classmethod
    def of(cls, config: Config, best: str, better: Mapping[str, bool], tested: bool) -> Progress | None:
        """Progress for `stop.early`, if there is one. `best` is the key that decides the best round, `better` says of
        each metric's key whether higher is better, `tested` whether any silo has test data. Raises ConfigError."""
        section = config.stop.early
        if section is None:
            return None
        metric = section.metric or best
        known = {**better, "loss": False, TRAIN_LOSS: False}
        if metric not in known:
            raise ConfigError(f"stop.early.metric: records have no '{metric}'{did_you_mean(metric, known)}")
        if metric != TRAIN_LOSS and not tested:
            raise ConfigError(f"stop.early.metric: no silo has test data, so there is no {metric}; take {TRAIN_LOSS}")
        return cls(section, metric, known[metric], config.evaluate.every, config.rounds)

    def hear(self, record: Mapping[str, Any]) -> None:
        """Take up a round's record. A round that is not evaluated does not count."""
        number = record["round"]
        if number % self._every and number != self._rounds:
            return
        value = record.get(self._metric)
        self._last = -math.inf if value is None or math.isnan(value) else self._sign * value
        if self._last > self._best + self._section.min_delta:
            self._best, self._stale = self._last, 0
        else:
            self._stale += 1

    @property
    def ended(self) -> str:
        """Why the run ends here; empty if it goes on."""
        section, value = self._section, self._sign * self._last
        if section.target is not None and self._last >= self._sign * section.target:
            return f"{self._metric} is {value:.6g}, and stop.early.target is {section.target:g}"
        if section.patience is not None and self._stale >= section.patience:
            best = "none so far" if math.isinf(self._best) else f"{self._sign * self._best:.6g}"
            num = f"{self._stale} evaluation{'s' if self._stale > 1 else ''}"
            return f"{self._metric} has not improved for {num} (best: {best}; stop.early)"
        return ""

    def state(self) -> Iterator[StateTensor]:
        """The figures, and the metric's name."""
        name = torch.tensor(list(self._metric.encode()), dtype=torch.uint8)
        yield StateTensor(("early_metric",), name, grows=True)
        figures = torch.tensor([self._best, self._last, self._stale], dtype=torch.float64)
        yield StateTensor(("early",), figures, grows=True)

    def restore(self, figures: Mapping[str, list[float]]) -> None:
        """Restore the figures of a checkpoint. Those of another metric do not count."""
        self._best = self._last = -math.inf
        self._stale = 0
        if bytes(map(int, figures.get("early_metric", ()))).decode() == self._metric:
            self._best, self._last, stale = figures["early"]
            self._stale = int(stale)


class Health:
    """The figures of all good rounds so far, and the number of bad rounds since; with `early`, a metric's progress."""

    def __init__(self, section: StopSection, early: Progress | None = None) -> None:
        self.section, self._early = section, early
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
        if self._early is not None:
            yield from self._early.state()

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Restore the figures of a checkpoint."""
        figures = {name: tensor.tolist() for (name,), tensor, *_ in stored}
        (self._first,), self.doubts = figures["first"], int(figures["doubts"][0])
        self._losses, self._norms = figures["losses"], figures["norms"]
        if self._early is not None:
            self._early.restore(figures)

    @property
    def ended(self) -> str:
        """Why a metric ends the run after the last round; empty if it does not."""
        return "" if self._early is None else self._early.ended

    def hear(self, record: Mapping[str, Any]) -> None:
        """Take up the record of a committed round."""
        if self._early is not None:
            self._early.hear(record)

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
