"""What is minimised and what is measured: losses and metrics, chosen by task or by name.

    objective = resolve(Objective(), source.task)
    objective.loss(outputs, targets).backward()
    loss, metric, num_samples = objective.evaluate(model, x_test, y_test, batch_size=256, device="cpu")

| task           | outputs               | targets                       | loss                 | metric             |
|----------------|-----------------------|-------------------------------|----------------------|--------------------|
| classification | [N, classes] logits   | [N] int64                     | cross_entropy        | accuracy           |
| binary         | [N] logits            | [N] float32, 0 or 1           | binary_cross_entropy | accuracy at 0.5    |
| regression     | [N] or [N, targets]   | as the outputs, float32       | mse                  | mae                |
| next_token     | [N, T, symbols]       | [N, T] int64                  | cross_entropy        | accuracy per token |

What is built in is a mean over terms (samples, tokens, or targets of samples), so a test set is scored batch by batch
and no outputs are kept. Your own function, "package.module:function", is called as `function(outputs, targets)` and
need be no mean of batches (a survival loss, a concordance index): to score a test set it gets all of its outputs and
targets at once, on the CPU. As a training loss it gets batches on the model's device and returns a scalar tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fedmpi.components import component, import_object, nearest
from fedmpi.errors import ConfigError
from fedmpi.types import Task

Tensor = torch.Tensor


@component
class Objective:
    """Loss and metric by name; None takes the task's own (table in this module's docstring)."""

    loss: str | None = None  # minimised in training: a name or "package.module:function"; null: by task
    metric: str | None = None  # measured on test sets: a name or "package.module:function"; null: by task
    maximize: bool | None = None  # is higher better? null: known of names; for your own, not in regression


def cross_entropy(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Of logits over the last dimension; one term a target."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction=reduction)


def binary_cross_entropy(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Of logits; one term a sample."""
    return F.binary_cross_entropy_with_logits(_like(outputs, targets), targets, reduction=reduction)


def mse(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Mean squared error; one term a number."""
    return F.mse_loss(_like(outputs, targets), targets, reduction=reduction)


def mae(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Mean absolute error; one term a number."""
    return F.l1_loss(_like(outputs, targets), targets, reduction=reduction)


def accuracy(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Share of targets whose logit is the largest; one term a target."""
    return _reduced(outputs.argmax(-1) == targets, reduction)


def accuracy_at_half(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Share of samples whose probability lies on the target's side of 0.5; 0.5 itself counts as 0."""
    return _reduced((_like(outputs, targets) > 0) == (targets > 0.5), reduction)


def _reduced(hits: Tensor, reduction: str) -> Tensor:
    return hits.double().mean() if reduction == "mean" else hits


def _like(outputs: Tensor, targets: Tensor) -> Tensor:
    """The outputs in the targets' shape, [N] and [N, 1] being the same; else they would spread to [N, N]."""
    if outputs.numel() != targets.numel():
        raise ConfigError(f"the model gives {list(outputs.shape)} numbers where the targets are {list(targets.shape)}")
    return outputs.reshape(targets.shape)


Terms = Callable[..., Tensor]

LOSSES: dict[str, dict[Task, Terms]] = {
    "cross_entropy": {"classification": cross_entropy, "next_token": cross_entropy},
    "binary_cross_entropy": {"binary": binary_cross_entropy},
    "mse": {"regression": mse},
    "mae": {"regression": mae},
}
METRICS: dict[str, dict[Task, Terms]] = {
    "accuracy": {"classification": accuracy, "binary": accuracy_at_half, "next_token": accuracy},
    "mae": {"regression": mae},
    "mse": {"regression": mse},
}
DEFAULTS: dict[Task, tuple[str, str]] = {
    "classification": ("cross_entropy", "accuracy"),
    "binary": ("binary_cross_entropy", "accuracy"),
    "regression": ("mse", "mae"),
    "next_token": ("cross_entropy", "accuracy"),
}


@dataclass(frozen=True)
class Score:
    """A loss or a metric: a mean over terms (built in), or a function of a whole test set."""

    name: str
    function: Callable[..., Any]
    is_mean: bool


@dataclass(frozen=True)
class Resolved:
    """A task's loss and metric, ready to be called."""

    loss_score: Score
    metric_score: Score
    maximize: bool  # is a higher metric better?

    @property
    def loss_name(self) -> str:
        """What the loss is called in records."""
        return self.loss_score.name

    @property
    def metric_name(self) -> str:
        """What the metric is called in records."""
        return self.metric_score.name

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The training loss: a scalar, the mean over the batch."""
        loss: Tensor = self.loss_score.function(outputs, targets)
        return loss

    def evaluate(
        self,
        model: torch.nn.Module,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        device: torch.device | str,
        between: Callable[[], Any] = lambda: None,
    ) -> tuple[float, float, int]:
        """Loss, metric and number of samples of one silo's whole test set; (nan, nan, 0) if it is empty.

        `between` is called before every batch.

        The model is on `device`; x and y may be elsewhere. Sums are float64. Modes of modules are as they were.
        """
        if len(x) == 0:
            return math.nan, math.nan, 0
        scores = (self.loss_score, self.metric_score)
        sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in scores]
        kept: list[Tensor] = []
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(x), batch_size):
                    between()
                    outputs = model(x[start : start + batch_size].to(device))
                    targets = y[start : start + batch_size].to(device)
                    for total, score in zip(sums, scores, strict=True):
                        if score.is_mean:
                            total += score.function(outputs, targets, reduction="none").sum(dtype=torch.float64)
                    if not all(score.is_mean for score in scores):
                        kept.append(outputs.cpu())
                loss, metric = (
                    float(total) / y.numel() if score.is_mean else float(score.function(torch.cat(kept), y.cpu()))
                    for total, score in zip(sums, scores, strict=True)
                )
        finally:
            for module, training in modes:
                module.training = training
        return loss, metric, len(x)


def resolve(objective: Objective, task: Task) -> Resolved:
    """The loss and metric for a task. ConfigError: no such name, or a name that is for other tasks.

    >>> resolve(Objective(), "regression").metric_name
    'mae'
    >>> resolve(Objective(loss="mse"), "binary")
    Traceback (most recent call last):
    fedmpi.errors.ConfigError: objective.loss: 'mse' is for regression, the data's task is binary
    """
    loss, metric = DEFAULTS[task]
    loss_score = _score("loss", LOSSES, objective.loss or loss, task)
    metric_score = _score("metric", METRICS, objective.metric or metric, task)
    maximize = objective.maximize
    if maximize is None:
        maximize = metric_score.name not in ("mae", "mse") if metric_score.is_mean else task != "regression"
    return Resolved(loss_score, metric_score, maximize)


def _score(what: str, known: Mapping[str, Mapping[Task, Terms]], name: str, task: Task) -> Score:
    if ":" in name:
        function = import_object(name, f"objective.{what}")
        if not callable(function):
            raise ConfigError(f"objective.{what}: '{name}' cannot be called")
        return Score(name.rpartition(":")[2], function, is_mean=False)
    if name not in known:
        raise ConfigError(f"objective.{what}: no {what} '{name}'{nearest(name, known)}")
    if task not in known[name]:
        raise ConfigError(f"objective.{what}: '{name}' is for {' and '.join(known[name])}, the data's task is {task}")
    return Score(name, known[name][task], is_mean=True)
