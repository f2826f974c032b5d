"""What is measured on test sets, and how the figures of silos become one of all.

    metrics: [accuracy, {name: top_k, k: 5}, {name: "mine:dice", maximize: true}]

A metric of states is pooled exactly: states are added up over batches and over silos, and the figure is computed of the
sum. What is built in is such a metric, and so is

    a torchmetrics class whose states all reduce by sum, max or min: "torchmetrics.regression:MeanSquaredError"
    a class of your own, "package.module:Class", with `maximize` and
        init()                           -> a tensor of zeros, integer (counts) or floating (sums)
        update(state, outputs, targets)  -> the state with a batch added
        compute(state)                   -> the figure; nan where it is undefined

A function, "package.module:function", is called as `function(outputs, targets)` with all of a silo's outputs and
targets on the CPU. Of all silos there is then only the mean of their figures, each silo alike, and it is called so:
`silo_mean_dice`. The same holds for a torchmetrics class with other states.

How states travel: counts are added up on each rank and then over ranks, which is exact in any order. Other numbers
have a row per silo, and every rank pools them in silo order. So a figure has the same bits on any number of ranks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from fedmpi.components import Deferred, Family, PositiveInt, component, import_object, nearest
from fedmpi.errors import ConfigError
from fedmpi.targets import CLASS_TASKS
from fedmpi.types import Task

Tensor = torch.Tensor

SILO_MEAN = "silo_mean_"  # what begins the key of a figure that is no pooled one but the mean over silos
WITHIN = "_within"  # what ends the key of a binned figure's error bound
LABELLED: tuple[Task, ...] = ("classification", "binary")
NOTHING = np.zeros(0)


def of_silo(key: str) -> str:
    """What a record's figure is called in the row of a silo.

    >>> of_silo("personal_silo_mean_dice")
    'personal_dice'
    """
    return key.replace(SILO_MEAN, "", 1)


def pooled(values: np.ndarray, counts: np.ndarray) -> float | None:
    """The mean over all that was counted, of the means of silos. None where nothing was.

    >>> pooled(np.array([1.0, 4.0]), np.array([2, 1]))
    2.0
    """
    total = float(counts.sum())
    return float((np.where(counts > 0, values, 0.0) * counts).sum() / total) if total else None


# ---------------------------------------------------------------- how a metric is scored


class Scorer:
    """A metric at work. `update` is called for every batch of a silo, then `finish` tells what of it travels."""

    name: str  # in the row of a silo
    maximize: bool | None  # is higher better? None: it is no number
    pools = True  # is the figure of all that of the pooled samples?
    whole = False  # are all of a silo's outputs wanted at once?
    num_counts: int  # integers that are added up over silos
    num_sums = 0  # numbers that have a row per silo

    @property
    def key(self) -> str:
        """What the figure of all silos is called."""
        return self.name if self.pools else SILO_MEAN + self.name

    def init(self, device: torch.device | str) -> Any:
        """The state of no samples."""
        return None

    def update(self, state: Any, outputs: Tensor, targets: Tensor) -> Any:
        """The state with more samples, rows as `Targets.rows` gives them; for `whole`, the figure of them all."""
        raise NotImplementedError

    def finish(self, state: Any) -> tuple[float, np.ndarray, np.ndarray]:
        """A silo's value, its counts and its sums."""
        raise NotImplementedError

    def shown(self, value: float) -> float:
        """The figure that a silo's value stands for."""
        return value

    def of_all(self, values_K: np.ndarray, sums_KS: np.ndarray, counts_C: np.ndarray) -> dict[str, Any]:
        """The record's figures of the silos that were tested, rows in silo order."""
        raise NotImplementedError


@dataclass(frozen=True)
class Mean(Scorer):
    """The mean over terms: of samples, tokens or numbers."""

    name: str
    maximize: bool | None
    terms: Callable[[Tensor, Tensor], Tensor]
    then: Callable[[float], float] | None = None  # what becomes of the mean
    num_counts = 0
    num_sums = 1

    def init(self, device: torch.device | str) -> Any:
        return torch.zeros((), dtype=torch.float64, device=device), 0

    def update(self, state: Any, outputs: Tensor, targets: Tensor) -> Any:
        terms = self.terms(outputs, targets)
        return state[0] + terms.sum(dtype=torch.float64), state[1] + terms.numel()

    def finish(self, state: Any) -> tuple[float, np.ndarray, np.ndarray]:
        total, num = state
        return float(total) / num if num else math.nan, NOTHING, np.array([float(num)])

    def shown(self, value: float) -> float:
        return value if self.then is None else self.then(value)

    def of_all(self, values_K: np.ndarray, sums_KS: np.ndarray, counts_C: np.ndarray) -> dict[str, Any]:
        mean = pooled(values_K, sums_KS[:, 0])
        return {self.key: None if mean is None else self.shown(mean)}


@dataclass(frozen=True)
class Counts(Scorer):
    """A figure of counts."""

    name: str
    maximize: bool | None
    num_counts: int
    count: Callable[[Tensor, Tensor], Tensor]
    figure: Callable[[np.ndarray], Any]
    within: Callable[[np.ndarray], float] | None = None  # how far the figure may be off

    def init(self, device: torch.device | str) -> Any:
        return torch.zeros(self.num_counts, dtype=torch.int64, device=device)

    def update(self, state: Any, outputs: Tensor, targets: Tensor) -> Any:
        return state + self.count(outputs, targets)

    def finish(self, state: Any) -> tuple[float, np.ndarray, np.ndarray]:
        counts = state.cpu().numpy()
        return self.figure(counts) if self.maximize is not None else math.nan, counts, NOTHING

    def of_all(self, values_K: np.ndarray, sums_KS: np.ndarray, counts_C: np.ndarray) -> dict[str, Any]:
        found = {self.key: self.figure(counts_C)}
        return found if self.within is None else found | {self.key + WITHIN: self.within(counts_C)}


@dataclass(frozen=True)
class Determination(Scorer):
    """R squared: of every target its number, mean, squares about the mean, and squared errors, which merge without
    loss (Chan, Golub and LeVeque 1979, Updating Formulae and a Pairwise Algorithm, equation 2.1)."""

    num_targets: int
    name: str = "r2"
    maximize: bool | None = True
    num_counts = 0

    @property
    def num_sums(self) -> int:  # type: ignore[override]
        return 4 * self.num_targets

    def init(self, device: torch.device | str) -> Any:
        return torch.zeros(4, self.num_targets, dtype=torch.float64, device=device)

    def update(self, state: Any, outputs: Tensor, targets: Tensor) -> Any:
        truth = targets.reshape(len(targets), -1).double()
        if truth.shape[1] != self.num_targets:
            raise ConfigError(f"r2: targets are {list(targets.shape)}, the data have {self.num_targets} a sample")
        errors = (outputs.reshape(truth.shape).double() - truth).square().sum(0)
        mean = truth.mean(0)
        num = torch.full_like(mean, len(truth))
        return merged(state, torch.stack([num, mean, (truth - mean).square().sum(0), errors]))

    def finish(self, state: Any) -> tuple[float, np.ndarray, np.ndarray]:
        return self._figure(state), NOTHING, state.cpu().numpy().reshape(-1)

    def _figure(self, state: Tensor) -> float:
        num, _, squares, errors = state.cpu()
        return float((1 - errors / squares).mean()) if bool((num > 1).all() and (squares > 0).all()) else math.nan

    def of_all(self, values_K: np.ndarray, sums_KS: np.ndarray, counts_C: np.ndarray) -> dict[str, Any]:
        state = self.init("cpu")
        for sums_S in sums_KS:
            state = merged(state, torch.from_numpy(sums_S.reshape(4, -1)))
        return {self.key: self._figure(state)}


def merged(one: Tensor, other: Tensor) -> Tensor:
    """The number, mean, squares about the mean and squared errors of two sets together, [4, targets] each."""
    num = one[0] + other[0]
    if not bool(other[0].any()):
        return one
    step = other[1] - one[1]
    share = other[0] / num
    squares = one[2] + other[2] + step.square() * one[0] * share
    return torch.stack([num, one[1] + step * share, squares, one[3] + other[3]])


@dataclass(frozen=True)
class Function(Scorer):
    """A user's own function of all of a silo's outputs."""

    name: str
    maximize: bool | None
    function: Callable[[Tensor, Tensor], Any]
    pools = False
    whole = True
    num_counts = 0

    def update(self, state: Any, outputs: Tensor, targets: Tensor) -> Any:
        return float(self.function(outputs, targets))

    def finish(self, state: Any) -> tuple[float, np.ndarray, np.ndarray]:
        return state, NOTHING, NOTHING

    def of_all(self, values_K: np.ndarray, sums_KS: np.ndarray, counts_C: np.ndarray) -> dict[str, Any]:
        return silo_mean(self, values_K)


def silo_mean(scorer: Scorer, values_K: np.ndarray) -> dict[str, Any]:
    """The mean over the silos where the figure is defined."""
    there = values_K[~np.isnan(values_K)]
    return {scorer.key: float(there.mean()) if there.size else None}


class OwnStates(Scorer):
    """A user's own class of one tensor of counts or sums."""

    def __init__(self, name: str, metric: Any, maximize: bool) -> None:
        self.name, self.maximize, self._metric = name, maximize, metric
        first = metric.init()
        if not isinstance(first, torch.Tensor) or first.dtype.is_complex or bool(first.any()):
            raise ConfigError(f"'{name}'.init() gives no tensor of zeros")
        self._first = first
        self.num_counts = 0 if first.dtype.is_floating_point else first.numel()
        self.num_sums = first.numel() - self.num_counts

    def init(self, device: torch.device | str) -> Any:
        return self._first.to(device, copy=True)

    def update(self, state: Any, outputs: Tensor, targets: Tensor) -> Any:
        after = self._metric.update(state, outputs, targets)
        if not isinstance(after, torch.Tensor) or (after.shape, after.dtype) != (self._first.shape, self._first.dtype):
            raise TypeError(f"'{self.name}'.update() must return a tensor like that of init()")
        return after

    def finish(self, state: Any) -> tuple[float, np.ndarray, np.ndarray]:
        flat = state.detach().cpu().reshape(-1)
        value = float(self._metric.compute(state.cpu()))
        return (value, flat.numpy(), NOTHING) if self.num_counts else (value, NOTHING, flat.double().numpy())

    def of_all(self, values_K: np.ndarray, sums_KS: np.ndarray, counts_C: np.ndarray) -> dict[str, Any]:
        whole = torch.from_numpy(counts_C if self.num_counts else sums_KS.sum(axis=0))
        return {self.key: float(self._metric.compute(whole.to(self._first.dtype).reshape(self._first.shape)))}


class Torchmetric(Scorer):
    """A metric of torchmetrics: pooled where all of its states are tensors that reduce by sum, max or min."""

    REDUCTIONS: ClassVar[dict[str, str]] = {"dim_zero_sum": "sum", "dim_zero_max": "max", "dim_zero_min": "min"}

    def __init__(self, name: str, metric: Any, maximize: bool, task: Task) -> None:
        self.name, self.maximize, self._metric, self._task = name, maximize, metric, task
        ways = {n: self.REDUCTIONS.get(getattr(r, "__name__", "")) for n, r in metric._reductions.items()}
        plain = all(way and isinstance(metric._defaults[n], torch.Tensor) for n, way in ways.items())
        self.pools = plain and bool(ways)
        self._ways = {n: str(way) for n, way in ways.items()} if self.pools else {}
        self._counts = [n for n, way in self._ways.items() if way == "sum" and not self._default(n).is_floating_point()]
        self._sums = [n for n in self._ways if n not in self._counts]
        self.num_counts = sum(self._default(n).numel() for n in self._counts)
        self.num_sums = sum(self._default(n).numel() for n in self._sums)

    def _default(self, name: str) -> Tensor:
        found: Tensor = self._metric._defaults[name]
        return found

    def init(self, device: torch.device | str) -> Any:
        metric = copy.deepcopy(self._metric).to(device)
        metric.reset()
        return metric

    def update(self, state: Any, outputs: Tensor, targets: Tensor) -> Any:
        state.update(outputs, targets.long() if self._task == "binary" else targets)
        return state

    def finish(self, state: Any) -> tuple[float, np.ndarray, np.ndarray]:
        parts = [
            torch.cat([getattr(state, n).detach().cpu().reshape(-1).double() for n in names]).numpy()
            if names
            else NOTHING
            for names in (self._counts, self._sums)
        ]
        return float(state.compute()), parts[0], parts[1]

    def of_all(self, values_K: np.ndarray, sums_KS: np.ndarray, counts_C: np.ndarray) -> dict[str, Any]:
        if not self.pools:
            return silo_mean(self, values_K)
        metric = self.init("cpu")
        reduced = iter(sums_KS.T)
        counts = iter(counts_C)
        for name, way in self._ways.items():
            default = self._default(name)
            if name in self._counts:
                flat = [next(counts) for _ in range(default.numel())]
            else:
                flat = [getattr(np, way)(next(reduced)) for _ in range(default.numel())]
            setattr(metric, name, torch.tensor(np.array(flat)).to(default.dtype).reshape(default.shape))
        metric._update_count = 1  # or it warns that nothing was added
        return {self.key: float(metric.compute())}


# ---------------------------------------------------------------- what is built in


class Metric(Protocol):
    """A metric that is chosen by name."""

    tasks: ClassVar[tuple[Task, ...]]

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        """The metric at work for a task; `num_classes` is the number of targets in regression."""
        ...


def hits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Is the target's logit the largest?"""
    return outputs.argmax(-1) == targets


def hits_at_half(outputs: Tensor, targets: Tensor) -> Tensor:
    """Does the probability lie on the target's side of 0.5? 0.5 itself counts as 0."""
    return (outputs > 0) == (targets > 0.5)


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    """-log of the probability of each target."""
    if targets.is_floating_point():
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    return F.cross_entropy(outputs, targets, reduction="none", ignore_index=-(2**31))


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared errors."""
    return F.mse_loss(outputs, targets, reduction="none")


def _confusion(task: Task, num_classes: int) -> tuple[int, Callable[[Tensor, Tensor], Tensor]]:
    """How many classes there are, and a function that counts predictions by class, [classes * classes]."""
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
    """Mean over the classes that occur of the share of their targets that is found."""

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
    """Mean over the classes that occur or are predicted of the harmonic mean of precision and recall."""

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
    k: PositiveInt = 5  # how many classes are looked at

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        if self.k >= num_classes:
            raise ConfigError(f"top_k: the data have {num_classes} classes, so with k {self.k} every target is a hit")

        def found(outputs: Tensor, targets: Tensor) -> Tensor:
            own = outputs.gather(-1, targets[:, None])
            above = (outputs > own).sum(-1)
            before = torch.arange(outputs.shape[-1], device=outputs.device) < targets[:, None]
            return above + ((outputs == own) & before).sum(-1) < self.k  # of equal logits the first class counts

        return Mean(f"top_{self.k}_accuracy", True, found)


@component
class Auc:
    """Area under the ROC curve, of many classes each against the rest and the mean over those that occur.

    It is counted in bins of the log-odds, as many to every power of two between 2^-10 and 2^6. Two samples in one bin
    count as equal, so the figure is off by at most half the share of pairs that share a bin: `auc_within`.
    """

    tasks: ClassVar[tuple[Task, ...]] = LABELLED
    bins: PositiveInt | None = None  # of log-odds; null: 4096, fewer with more than 16 classes

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
    rest = shares.scatter(-1, at, 0.0).sum(-1, keepdim=True)  # of the largest, without the difference's rounding
    others = others.scatter(-1, at, rest)
    return logits - top - others.clamp(min=1e-300).log()


def binned(odds: Tensor, half: int) -> Tensor:
    """The bin of each number, 0 to 2 half - 1 in their order."""
    mantissa, exponent = torch.frexp(odds.abs())
    octave = exponent - 1 + (2 * mantissa - 1)  # about log2, and as monotone
    place = ((octave + 10) * (half / 16)).long().clamp(0, half - 1)
    place = torch.where(odds.abs() < 2.0**-10, 0, place)
    return torch.where(odds < 0, half - 1 - place, half + place)


def area(counts: np.ndarray) -> tuple[float, float]:
    """The mean area under the curves of histograms [classes, negative and positive, bins], and how far it may be off.

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
    """Mean of -log of the probability of the target, whatever the training loss is; of next_token, per token."""

    tasks: ClassVar[tuple[Task, ...]] = ("classification", "binary", "next_token")

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        return Mean("log_loss", False, cross_entropies)


@component
class ConfusionMatrix:
    """Targets by class (rows) and predicted class (columns), of all silos only; no number, so it cannot be `best`."""

    tasks: ClassVar[tuple[Task, ...]] = LABELLED

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        num, count = _confusion(task, num_classes)
        return Counts(
            "confusion_matrix", None, num * num, count,
            lambda counts: [[int(n) for n in row] for row in counts.reshape(num, num)],
        )  # fmt: skip


@component
class Precision:
    """Share of those predicted 1 that are 1; undefined where none is predicted."""

    tasks: ClassVar[tuple[Task, ...]] = ("binary",)

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        _, count = _confusion(task, num_classes)
        return Counts("precision", True, 4, count, lambda counts: _ratio(counts[3], counts[1] + counts[3]))


@component
class Recall:
    """Share of those that are 1 that are predicted 1; undefined where none is."""

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
    """Coefficient of determination, the mean over targets of a sample; undefined where a target does not vary."""

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


class Own(Deferred):
    """A user's own metric, "package.module:function" or "package.module:Class", and what it is called with."""

    @property
    def maximize(self) -> bool:
        """Is higher better?"""
        return bool(self.arguments["maximize"])

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        short, cls = self.name.rpartition(":")[2].rpartition(".")[2], self.target
        if not isinstance(cls, type):
            return Function(short, self.maximize, cls)
        arguments = {name: value for name, value in self.arguments.items() if name != "maximize"}
        try:
            metric: Any = cls(**arguments)
            if is_torchmetric(cls):
                return Torchmetric(short, metric, self.maximize, task)
            return OwnStates(short, metric, self.maximize)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"objective.metrics: '{self.name}': {error}") from None


def is_torchmetric(cls: type) -> bool:
    """Is it a class of torchmetrics, or made from one? Asks without importing the package."""
    return any(part.__module__.partition(".")[0] == "torchmetrics" for part in cls.__mro__)


class _Metrics(Family):
    """The metrics that are built in, and users' own functions and classes."""

    def build(self, value: Any, path: str) -> Any:
        name = value.get("name") if isinstance(value, Mapping) else value
        if not isinstance(name, str) or ":" not in name:
            return super().build(value, path)
        arguments = {k: v for k, v in value.items() if k != "name"} if isinstance(value, Mapping) else {}
        target = import_object(name, path)
        if not callable(target):
            raise ConfigError(f"{path}: '{name}' cannot be called")
        is_class = isinstance(target, type)
        if is_class and not is_torchmetric(target) and not all(hasattr(target, m) for m in STATES):
            raise ConfigError(f"{path}: '{name}' lacks one of {', '.join(STATES)}, so it cannot be a metric")
        maximize = arguments.pop("maximize", None)
        if maximize is None and is_class:
            maximize = getattr(target, "higher_is_better" if is_torchmetric(target) else "maximize", None)
        if not isinstance(maximize, bool):
            raise ConfigError(
                f"{path}: is a higher '{name}' better? say so: {{name: \"{name}\", maximize: true}}, or false"
            )
        if not is_class and arguments:
            raise ConfigError(f"{path}: '{name}' is a function and takes no '{next(iter(arguments))}'")
        return Own(name, target, arguments | {"maximize": maximize})


STATES = ("init", "update", "compute")

METRICS = _Metrics(
    "metric",
    {
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
    },
)


def for_task(metric: Any, task: Task, num_classes: int, path: str) -> Scorer:
    """The metric at work. ConfigError where it is for other tasks."""
    if not isinstance(metric, Own) and task not in metric.tasks:
        others = [name for name, cls in METRICS.members.items() if task in cls.tasks]  # type: ignore[attr-defined]
        name = METRICS.name_of(metric)
        raise ConfigError(
            f"{path}: '{name}' is for {' and '.join(metric.tasks)}, the data's task is {task}{nearest('', others)}"
        )
    scorer: Scorer = metric.scorer(task, num_classes)
    return scorer
