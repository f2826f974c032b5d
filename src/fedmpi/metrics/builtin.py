"""The built-in metrics, each with the tasks that it supports."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from fedmpi.components import PositiveInt, component
from fedmpi.errors import ConfigError
from fedmpi.metrics.scorers import Counts, Determination, Mean, Scorer
from fedmpi.targets import CLASS_TASKS, IGNORES_NOTHING
from fedmpi.types import Task

Tensor = torch.Tensor

LABELLED: tuple[Task, ...] = ("classification", "binary")


class Metric(Protocol):
    """A metric that a configuration names."""

    tasks: ClassVar[tuple[Task, ...]]

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        """The scorer for a task; in regression, `num_classes` is the number of targets."""
        ...


def hits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether the target's logit is the largest, per target."""
    return outputs.argmax(-1) == targets


def hits_at_half(outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether the probability is on the target's side of 0.5; 0.5 itself counts as 0."""
    return (outputs > 0) == (targets > 0.5)


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    """-log of the probability of each target."""
    if targets.is_floating_point():
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    return F.cross_entropy(outputs, targets, reduction="none", ignore_index=IGNORES_NOTHING)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared errors."""
    return F.mse_loss(outputs, targets, reduction="none")


def _confusion(task: Task, num_classes: int) -> tuple[int, Callable[[Tensor, Tensor], Tensor]]:
    """The number of classes, and a function that counts predictions by class, [classes * classes]."""
    num = 2 if task == "binary" else num_classes

    def count(outputs: Tensor, targets: Tensor) -> Tensor:
        if task == "binary":
            outputs, targets = outputs.reshape(-1) > 0, (targets.reshape(-1) > 0.5).long()
        else:
            _as_many(outputs, num)
            outputs = outputs.argmax(-1)
        return torch.bincount(targets * num + outputs, minlength=num * num)

    return num, count


def _as_many(outputs: Tensor, num_classes: int) -> None:
    if outputs.shape[-1] != num_classes:
        raise ConfigError(f"the model gives logits of {outputs.shape[-1]} classes, the data have {num_classes}")


@component
class Accuracy:
    """Share of targets whose logit is the largest; binary: on the target's side of probability 0.5."""

    tasks: ClassVar[tuple[Task, ...]] = ("classification", "binary", "next_token")

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        return Mean("accuracy", True, hits_at_half if task == "binary" else hits)


@component
class BalancedAccuracy:
    """Mean recall over the classes that occur."""

    tasks: ClassVar[tuple[Task, ...]] = LABELLED

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        num, count = _confusion(task, num_classes)

        def figure(counts: np.ndarray) -> float:
            matrix = counts.reshape(num, num)
            of_class = matrix.sum(1)
            there = of_class > 0
            return float((np.diag(matrix)[there] / of_class[there]).mean()) if there.any() else math.nan

        return Counts("balanced_accuracy", True, num * num, count, figure)


@component
class MacroF1:
    """Mean F1 (harmonic mean of precision and recall) over the classes that occur or are predicted."""

    tasks: ClassVar[tuple[Task, ...]] = LABELLED

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        num, count = _confusion(task, num_classes)

        def figure(counts: np.ndarray) -> float:
            matrix = counts.reshape(num, num)
            both = matrix.sum(0) + matrix.sum(1)
            there = both > 0
            return float((2 * np.diag(matrix)[there] / both[there]).mean()) if there.any() else math.nan

        return Counts("macro_f1", True, num * num, count, figure)


@component
class TopK:
    """Share of targets whose logit is among the k largest; its key is `top_5_accuracy` for k = 5."""

    tasks: ClassVar[tuple[Task, ...]] = CLASS_TASKS
    k: PositiveInt = 5
    """number of largest logits that count as a hit"""

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        if self.k >= num_classes:
            raise ConfigError(f"top_k: the data have {num_classes} classes, so with k {self.k} every target is a hit")

        def found(outputs: Tensor, targets: Tensor) -> Tensor:
            own = outputs.gather(-1, targets[:, None])
            above = (outputs > own).sum(-1)
            before = torch.arange(outputs.shape[-1], device=outputs.device) < targets[:, None]
            return above + ((outputs == own) & before).sum(-1) < self.k  # among equal logits the first class counts

        return Mean(f"top_{self.k}_accuracy", True, found)


@component
class Auc:
    """Area under the ROC curve; with several classes, the mean over one-vs-rest curves of those that occur.

    Counts log-odds in bins, the same number for each power of two between 2^-10 and 2^6. Samples in one bin count as
    equal, so the error is at most half the share of pairs in the same bin; records have that bound as `auc_within`.
    """

    tasks: ClassVar[tuple[Task, ...]] = LABELLED
    bins: PositiveInt | None = None
    """bins of log-odds; null: 4096, fewer with more than 16 classes"""

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        num = 1 if task == "binary" else num_classes
        half = max(16, (self.bins or max(256, min(4096, 65536 // num))) // 2)

        def count(outputs: Tensor, targets: Tensor) -> Tensor:
            if task == "binary":
                odds, positive = outputs.reshape(-1, 1).double(), targets.reshape(-1, 1) > 0.5
            else:
                _as_many(outputs, num)
                odds, positive = log_odds(outputs), F.one_hot(targets, num) > 0
            if not bool(torch.isfinite(odds).all()):
                raise FloatingPointError("outputs are not finite")
            place = binned(odds, half) + 2 * half * positive + 4 * half * torch.arange(num, device=odds.device)
            return torch.bincount(place.reshape(-1), minlength=4 * half * num)

        return Counts(
            "auc", True, 4 * half * num, count,
            lambda counts: area(counts.reshape(num, 2, -1))[0], lambda counts: area(counts.reshape(num, 2, -1))[1],
        )  # fmt: skip


def log_odds(logits: Tensor) -> Tensor:
    """log(p / (1 - p)) of the softmax of logits [M, classes], in float64."""
    logits = logits.double()
    top, at = logits.max(-1, keepdim=True)
    shares = (logits - top).exp()
    others = shares.sum(-1, keepdim=True) - shares
    rest = shares.scatter(-1, at, 0.0).sum(-1, keepdim=True)  # for the largest logit, without cancellation
    others = others.scatter(-1, at, rest)
    return logits - top - others.clamp(min=1e-300).log()


def binned(odds: Tensor, half: int) -> Tensor:
    """The bin of each number, 0 to 2 half - 1, in increasing order."""
    mantissa, exponent = torch.frexp(odds.abs())
    octave = exponent - 1 + (2 * mantissa - 1)  # close to log2, and monotone
    place = ((octave + 10) * (half / 16)).long().clamp(0, half - 1)
    place = torch.where(odds.abs() < 2.0**-10, 0, place)
    return torch.where(odds < 0, half - 1 - place, half + place)


def area(counts: np.ndarray) -> tuple[float, float]:
    """The mean area under the curves of histograms [classes, (negative, positive), bins], and its largest error.

    >>> area(np.array([[[2, 1, 0], [0, 1, 2]]]))
    (0.9444444444444444, 0.05555555555555555)
    """
    negative, positive = counts[:, 0].astype(float), counts[:, 1].astype(float)
    pairs = negative.sum(1) * positive.sum(1)
    there = pairs > 0
    if not there.any():
        return math.nan, math.nan
    below = negative.cumsum(1) - negative
    inside = (negative * positive).sum(1)[there] / pairs[there] / 2
    found = (below * positive).sum(1)[there] / pairs[there] + inside
    return float(found.mean()), float(inside.mean())


@component
class LogLoss:
    """Mean of -log of the target's probability, for any training loss; per token for next_token."""

    tasks: ClassVar[tuple[Task, ...]] = ("classification", "binary", "next_token")

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        return Mean("log_loss", False, cross_entropies)


@component
class ConfusionMatrix:
    """Counts by target class (rows) and predicted class (columns), for all silos only; not a number, so it cannot be
    `best`."""

    tasks: ClassVar[tuple[Task, ...]] = LABELLED

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        num, count = _confusion(task, num_classes)
        return Counts(
            "confusion_matrix", None, num * num, count,
            lambda counts: [[int(n) for n in row] for row in counts.reshape(num, num)],
        )  # fmt: skip


@component
class Precision:
    """Share of true positives among those predicted 1; undefined if none is predicted 1."""

    tasks: ClassVar[tuple[Task, ...]] = ("binary",)

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        _, count = _confusion(task, num_classes)
        return Counts("precision", True, 4, count, lambda counts: _ratio(counts[3], counts[1] + counts[3]))


@component
class Recall:
    """Share of targets of 1 that are predicted 1; undefined if there are none."""

    tasks: ClassVar[tuple[Task, ...]] = ("binary",)

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        _, count = _confusion(task, num_classes)
        return Counts("recall", True, 4, count, lambda counts: _ratio(counts[3], counts[2] + counts[3]))


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else math.nan


@component
class Mse:
    """Mean squared error."""

    tasks: ClassVar[tuple[Task, ...]] = ("regression",)

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        return Mean("mse", False, squares)


@component
class Rmse:
    """Root of the mean squared error."""

    tasks: ClassVar[tuple[Task, ...]] = ("regression",)

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        return Mean("rmse", False, squares, math.sqrt)


@component
class Mae:
    """Mean absolute error."""

    tasks: ClassVar[tuple[Task, ...]] = ("regression",)

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        return Mean("mae", False, lambda outputs, targets: F.l1_loss(outputs, targets, reduction="none"))


@component
class R2:
    """Coefficient of determination, averaged over the targets; undefined if a target is constant."""

    tasks: ClassVar[tuple[Task, ...]] = ("regression",)

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        return Determination(num_classes)


@component
class Perplexity:
    """e to the power of the loss per token."""

    tasks: ClassVar[tuple[Task, ...]] = ("next_token",)

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        return Mean("perplexity", False, cross_entropies, _exp)


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


METRICS: dict[str, type] = {
    "accuracy": Accuracy,
    "balanced_accuracy": BalancedAccuracy,
    "macro_f1": MacroF1,
    "top_k": TopK,
    "auc": Auc,
    "log_loss": LogLoss,
    "confusion_matrix": ConfusionMatrix,
    "precision": Precision,
    "recall": Recall,
    "mse": Mse,
    "rmse": Rmse,
    "mae": Mae,
    "r2": R2,
    "perplexity": Perplexity,
}
