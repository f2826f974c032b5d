"""Losses and metrics, chosen by task or by name.

    objective = resolve(Objective(), source.task, source.num_classes)
    objective.loss(outputs, targets).backward()
    tally = objective.score(model, x_test, y_test, batch_size=256, device="cpu")

| task           | outputs                                | targets                | loss                 | metric     |
|----------------|----------------------------------------|------------------------|----------------------|------------|
| classification | logits [N, classes] or [N, classes, *] | [N] or [N, *], int64   | cross_entropy        | accuracy   |
| binary         | logits [N]                             | [N] float32, 0 or 1    | binary_cross_entropy | accuracy   |
| regression     | [N] or [N, targets]                    | like outputs, float32  | mse                  | mae        |
| next_token     | logits [N, T, symbols]                 | [N, T], int64          | cross_entropy        | accuracy   |

The class dimension of logits is 1, as in torch, or the last one. It is found from the shapes; if they are ambiguous,
`classes` must say. Targets equal to `ignore_index` count in no loss and no metric.

Built-in losses (losses.py) are means over targets, so a test set is scored batch by batch and no outputs are kept. A
user's loss, "package.module:function", is called as `function(outputs, targets)` and need not be a mean over batches (a
survival loss, for example). In training it gets batches on the model's device and returns a scalar. To score a test set
it gets all outputs and targets at once, on the CPU; the loss of all silos is then the mean weighted by their targets.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch

from fedmpi.components import component, did_you_mean
from fedmpi.errors import ConfigError
from fedmpi.flat import HALF
from fedmpi.losses import LOSSES, BinaryCrossEntropy, CrossEntropy, Loss, Mse, OwnLoss
from fedmpi.metrics import METRICS, for_task
from fedmpi.metrics.builtin import Accuracy, Mae, Metric
from fedmpi.metrics.own import Torchmetric
from fedmpi.metrics.scorers import SILO_MEAN, Scorer
from fedmpi.targets import CLASS_TASKS, IGNORES_NOTHING, Count, Targets, number_of
from fedmpi.types import Samples, Task

Tensor = torch.Tensor


@component
class Objective:
    """The training loss and the metrics; null takes the task's default."""

    loss: Annotated[Loss, LOSSES] | None = None
    """training loss: a name, or a mapping such as {name: cross_entropy, label_smoothing: 0.1}; your own:
    "package.module:function", or a class with arguments; null: by task"""
    metrics: list[Annotated[Metric, METRICS]] | None = None
    """metrics on test sets: names, or mappings such as {name: top_k, k: 5} and {name: "mine:dice", maximize: true}"""
    best: str | None = None
    """record key of the metric that decides the best round; null: the first numeric one"""
    ignore_index: int | None = -100
    """target class to ignore in losses and metrics; null: none"""
    classes: Literal["first", "last"] | None = None
    """class dimension of the logits: 1 or the last; null: found from the shapes"""

    MOVED: ClassVar[Mapping[str, str]] = {
        "metric": "write metrics: [NAME]",
        "maximize": 'write it with the metric, metrics: [{name: "package.module:function", maximize: true}]',
    }


DEFAULTS: dict[Task, tuple[Loss, Metric]] = {
    "classification": (CrossEntropy(), Accuracy()),
    "binary": (BinaryCrossEntropy(), Accuracy()),
    "regression": (Mse(), Mae()),
    "next_token": (CrossEntropy(), Accuracy()),
}
MOST_METRICS = 24  # two bits each in a float64
LOSS = "loss"  # key in `Tally.raised` of a user's loss


@dataclass(frozen=True)
class Criterion:
    """A silo's training loss, and a function that gives the mass of a batch's targets: their number, or with class
    weights the sum of their weights."""

    loss: Callable[[Tensor, Tensor], Tensor]
    count: Count = torch.Tensor.numel


@dataclass
class Tally:
    """Results of one silo's evaluation."""

    samples: int
    loss: float = math.nan  # mean over the targets, ignored ones left out
    targets: float = 0  # mass of the targets: their number or the sum of their weights, ignored ones left out
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # by metric: counts and sums
    values: dict[str, float] = field(default_factory=dict)  # by metric, before conversion for display
    raised: dict[str, str] = field(default_factory=dict)  # by metric, or `loss`: the exception of its code

    def fail(self, name: str, error: Exception) -> None:
        """Record that a metric, or the loss, raised. Raises a ConfigError again: the data do not fit."""
        if isinstance(error, ConfigError):
            raise error
        self.raised[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def figures(self, scorers: Sequence[Scorer]) -> dict[str, float]:
        """The silo's own figures, by name."""
        return {s.name: s.shown(self.values.get(s.name, math.nan)) for s in scorers}


@dataclass(frozen=True)
class LossAndMetrics:
    """A task's loss and metrics, ready to be called."""

    targets: Targets
    loss_name: str  # name of the loss in records
    loss_function: Callable[..., Tensor]  # a built-in Loss, or a user's function of outputs and targets
    built_in: Loss | None  # the loss, unless it is a user's
    scorers: tuple[Scorer, ...]
    best: Scorer  # the metric that decides the best round

    @property
    def metric_name(self) -> str:
        """Record key of the metric that decides the best round."""
        return self.best.key

    @property
    def maximize(self) -> bool:
        """Whether a higher value of that metric is better."""
        return bool(self.best.maximize)

    @property
    def own_loss(self) -> bool:
        """Whether the loss is a user's."""
        return self.built_in is None

    @property
    def weighs(self) -> bool:
        """Whether targets have class weights in the loss."""
        return self.built_in is not None and self.built_in.class_weights is not None

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The training loss: a scalar, the mean over the batch's targets, ignored ones left out."""
        one_tensor(outputs)
        if self.own_loss:
            loss: Tensor = self.loss_function(outputs, targets)
            return loss
        outputs, targets = self._rows(outputs, targets)
        if self.targets.task in CLASS_TASKS and self.targets.ignore_index is not None:
            return self.loss_function(outputs, targets, ignore=self.targets.ignore_index)
        return self.loss_function(outputs, targets)

    def _rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and targets with matching shapes; half precision as float32, because float16 overflows at 65504."""
        outputs, targets = self.targets.rows(outputs, targets)
        return outputs.float() if outputs.dtype in HALF else outputs, targets

    def criterion(self, targets: Tensor) -> Criterion:
        """The training loss for batches of these targets. A batch without mass has loss 0."""
        if not (self.weighs or self.targets.some_ignored(targets)):
            return Criterion(self.loss)
        return Criterion(self.loss if self.own_loss else self._guarded, self._counter(targets))

    def _counter(self, targets: Tensor) -> Count:
        """A function that gives the mass of a batch of these targets."""
        if self.built_in is None or not self.weighs:
            return self.targets.counter(targets)
        loss, drops = self.built_in, self.targets.some_ignored(targets)
        return lambda batch: loss.mass(batch, self.targets.counts(batch) if drops else None)

    def _guarded(self, outputs: Tensor, targets: Tensor) -> Tensor:
        rows, classes = self._rows(outputs, targets)
        ignore = IGNORES_NOTHING if self.targets.ignore_index is None else self.targets.ignore_index
        total: Tensor = self.loss_function(rows, classes, reduction="sum", ignore=ignore)
        if self.built_in is None or not self.weighs:
            return total / self.targets.counts(classes).sum().clamp(min=1)
        mass = self.built_in.mass(classes, self.targets.counts(classes)).to(total.dtype)
        return total / torch.where(mass > 0, mass, 1.0)

    def mean_loss(
        self, model: torch.nn.Module, x: Samples, y: Tensor, batch_size: int, device: torch.device | str,
        between: Callable[[], Any] = lambda: None,
    ) -> float:  # fmt: skip
        """The loss only, computed as in `score`. Raises what a user's loss raises."""
        tally = Tally(len(x))
        with _evaluating(model):
            self._run(tally, (), model, x, y, batch_size, device, between)
        return tally.loss

    def score(
        self, model: torch.nn.Module, x: Samples, y: Tensor, batch_size: int, device: torch.device | str,
        between: Callable[[], Any] = lambda: None,
    ) -> Tally:  # fmt: skip
        """Loss and metrics of one silo's test set.

        `between` is called before every batch. The model is on `device`; x and y may be elsewhere. Sums are float64.
        Modules keep their training modes. Exceptions of a user's loss or metric are recorded in the tally.
        """
        tally = Tally(len(x))
        with _evaluating(model):
            self._run(tally, self.scorers, model, x, y, batch_size, device, between)
        return tally

    def _run(
        self, tally: Tally, scorers: Sequence[Scorer], model: torch.nn.Module, x: Samples, y: Tensor, batch_size: int,
        device: torch.device | str, between: Callable[[], Any],
    ) -> None:  # fmt: skip
        if not (num := len(x)):
            return
        drops = self.targets.some_ignored(y)
        tally.targets = number_of(self._counter(y)(y))
        total = torch.zeros((), dtype=torch.float64, device=device)
        states = {scorer.name: scorer.init(device) for scorer in scorers}
        by_batch = [scorer for scorer in scorers if not scorer.whole]
        keeps = self.own_loss or len(by_batch) < len(scorers)
        kept: list[Tensor] = []
        for start in range(0, num, batch_size):
            between()
            outputs = one_tensor(model(x[start : start + batch_size].to(device)))
            targets = y[start : start + batch_size].to(device)
            if keeps:
                kept.append(outputs.cpu())
            if self.own_loss and not by_batch:
                continue
            outputs, targets = self._rows(outputs, targets)
            if drops:
                outputs, targets = self.targets.counted(outputs, targets)
                if not len(targets):
                    continue
            if not self.own_loss:
                total += self.loss_function(outputs, targets, reduction="none").sum(dtype=torch.float64)
            for scorer in by_batch:
                if scorer.name not in tally.raised:
                    try:
                        states[scorer.name] = scorer.update(states[scorer.name], outputs, targets)
                    except Exception as error:
                        tally.fail(scorer.name, error)
        if keeps:
            outputs, targets = torch.cat(kept), y.cpu()
        some = not drops or bool(self.targets.counts(y).any())  # targets of weight 0 count in metrics
        for scorer in scorers if some else ():
            name = scorer.name
            if name not in tally.raised:
                try:
                    state = scorer.update(states[name], outputs, targets) if scorer.whole else states[name]
                    tally.parts[name] = scorer.parts(state)
                    tally.values[name] = scorer.value(state)  # may raise even if the state is fine
                except Exception as error:
                    tally.fail(name, error)
        if not self.own_loss:
            tally.loss = float(total) / tally.targets if tally.targets else math.nan
            return
        try:
            tally.loss = float(self.loss_function(outputs, targets))
        except Exception as error:
            if not scorers:  # mean_loss
                raise
            tally.fail(LOSS, error)


def one_tensor(outputs: Any) -> Tensor:
    """The outputs, if they are one tensor. Raises ConfigError that says what the model returned instead.

    >>> one_tensor({"logits": torch.zeros(1)})
    Traceback (most recent call last):
    fedmpi.errors.ConfigError: model: it returns a dict with logits; return the outputs alone, one tensor
    """
    if isinstance(outputs, Tensor):
        return outputs
    what = "nothing" if outputs is None else f"a {type(outputs).__name__}"
    if isinstance(outputs, Mapping):
        what += f" with {', '.join(map(str, outputs))}"
    elif isinstance(outputs, (tuple, list)):
        what += f" of {len(outputs)} ({', '.join(type(part).__name__ for part in outputs[:4])})"
    raise ConfigError(f"model: it returns {what}; return the outputs alone, one tensor")


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; on exit each module gets its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def resolve(objective: Objective, task: Task, num_classes: int) -> LossAndMetrics:
    """The loss and metrics for a task. Raises ConfigError for an unknown name, or one for another task.

    >>> resolve(Objective(), "regression", 1).metric_name
    'mae'
    >>> resolve(Objective(loss=Mse()), "binary", 1)
    Traceback (most recent call last):
    fedmpi.errors.ConfigError: objective.loss: 'mse' is for regression, the data's task is binary
    """
    loss, metric = DEFAULTS[task]
    loss = objective.loss or loss
    built_in = None if isinstance(loss, OwnLoss) else _for_task(loss, task, num_classes)
    loss_name = loss.name.rpartition(":")[2] if isinstance(loss, OwnLoss) else LOSSES.name_of(loss)
    function = loss.function() if isinstance(loss, OwnLoss) else loss
    wanted = objective.metrics or [metric]
    if len(wanted) > MOST_METRICS:
        raise ConfigError(f"objective.metrics: {len(wanted)} of them, {MOST_METRICS} at most")
    scorers = tuple(for_task(m, task, num_classes, f"objective.metrics.{i}") for i, m in enumerate(wanted))
    for scorer in scorers if built_in is None else ():
        if isinstance(scorer, Torchmetric):
            scorer.of_logits = False  # with a user's loss the model may return probabilities
    targets = Targets(task, objective.classes, objective.ignore_index if task in CLASS_TASKS else None)
    return LossAndMetrics(targets, loss_name, function, built_in, scorers, _best(objective.best, scorers))


def _best(name: str | None, scorers: Sequence[Scorer]) -> Scorer:
    """The metric that decides the best round. Raises ConfigError for names given twice or already used in records."""
    names = [s.name for s in scorers]
    for one in names:
        if names.count(one) > 1:
            raise ConfigError(f"objective.metrics: '{one}' is given twice")
    for scorer in scorers:
        if scorer.name in TAKEN_OF_SILOS or scorer.key in TAKEN or scorer.name.startswith(("personal_", SILO_MEAN)):
            other = f"records use '{scorer.name}' for something else"
            raise ConfigError(f"objective.metrics: {other}; give your metric another name")
    numbers = {s.key: s for s in scorers if s.maximize is not None}
    if name is None and not numbers:
        raise ConfigError(f"objective.metrics: {', '.join(names)} is no number; add one that tells the best round")
    if name is None:
        return next(iter(numbers.values()))
    if name not in numbers:
        raise ConfigError(f"objective.best: no metric '{name}' that is a number{did_you_mean(name, numbers)}")
    return numbers[name]


# names with another meaning in a silo's row, and in a record
TAKEN_OF_SILOS = ("rank", "loss", "train_loss", "delta_norm", "num_train", "num_test", "num_samples", "num_steps")
TAKEN = (
    *(
        "loss",
        "train_loss",
        "delta_norm",
        "round",
        "cohort",
        "rejected",
        "late",
        "deadline_s",
        "stale",
        "repeats",
        "rejected_by",
        "worst",
        "spread",
        "seconds",
        "silos",
    ),
    *("auc_within", "diversity", "cosine", "cosines", "undefined", "raised", "not_finite", "peak_rss_bytes"),
    *("time", "bytes_up", "bytes_down", "bytes_control", "summed", "given_up", "scored_by", "scores_given_up"),
)


def _for_task(loss: Loss, task: Task, num_classes: int) -> Loss:
    """The loss. Raises ConfigError if it is for another task, or does not fit the classes."""
    if task not in loss.tasks:
        name = LOSSES.name_of(loss)
        raise ConfigError(f"objective.loss: '{name}' is for {' and '.join(loss.tasks)}, the data's task is {task}")
    loss.fits(num_classes)
    return loss
