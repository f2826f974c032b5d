"""Users' own metrics: functions, classes with states, and torchmetrics classes."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from fedmpi.components import Deferred, import_object
from fedmpi.errors import ConfigError
from fedmpi.metrics.scorers import NOTHING, Scorer, silo_mean
from fedmpi.targets import CLASS_TASKS
from fedmpi.types import Task

Tensor = torch.Tensor

STATES = ("init", "update", "compute")  # methods of a class with states


@dataclass(frozen=True)
class Function(Scorer):
    """A user's function of all outputs and targets of a silo."""

    name: str
    maximize: bool | None
    function: Callable[[Tensor, Tensor], Any]
    pools = False
    whole = True
    num_counts = 0
    adds_up = True

    def weight(self, value: float, sums_S: np.ndarray) -> float:
        return 1.0

    def update(self, state: Any, outputs: Tensor, targets: Tensor) -> Any:
        return float(self.function(outputs, targets))

    def value(self, state: Any) -> float:
        return float(state)

    def of_all(self, values_K: np.ndarray, sums_KS: np.ndarray, counts_C: np.ndarray) -> dict[str, Any]:
        return silo_mean(self, values_K)


class OwnStates(Scorer):
    """A user's class whose state is one tensor of counts or sums."""

    adds_up = True

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

    def parts(self, state: Any) -> tuple[np.ndarray, np.ndarray]:
        flat = state.detach().cpu().reshape(-1).double().numpy()
        return (flat, NOTHING) if self.num_counts else (NOTHING, flat)

    def value(self, state: Any) -> float:
        return float(self._metric.compute(state.cpu()))

    def of_all(self, values_K: np.ndarray, sums_KS: np.ndarray, counts_C: np.ndarray) -> dict[str, Any]:
        whole = torch.from_numpy(counts_C if self.num_counts else sums_KS.sum(axis=0))
        return {self.key: float(self._metric.compute(whole.to(self._first.dtype).reshape(self._first.shape)))}


class Torchmetric(Scorer):
    """A torchmetrics metric; pooled if all its states are tensors that reduce by sum, max or min."""

    REDUCTIONS: ClassVar[dict[str, str]] = {"dim_zero_sum": "sum", "dim_zero_max": "max", "dim_zero_min": "min"}

    def __init__(self, name: str, metric: Any, maximize: bool, task: Task, num_classes: int) -> None:
        self.name, self.maximize, self._metric, self._task = name, maximize, metric, task
        # Convert outputs to probabilities here, because torchmetrics would decide this anew for each batch.
        self.of_logits = any(c.__module__.startswith("torchmetrics.classification") for c in type(metric).__mro__)
        self.of_logits = self.of_logits and task != "regression"
        ways = {n: self.REDUCTIONS.get(getattr(r, "__name__", "")) for n, r in metric._reductions.items()}
        plain = all(way and isinstance(metric._defaults[n], torch.Tensor) for n, way in ways.items())
        self.pools = plain and bool(ways)
        self._ways = {n: str(way) for n, way in ways.items()} if self.pools else {}
        self._like = self._tried(num_classes)
        counts = [n for n, way in self._ways.items() if way == "sum" and not self._like[n].is_floating_point()]
        self._counts, self._sums = counts, [n for n in self._ways if n not in counts]
        self.num_counts = sum(self._like[n].numel() for n in self._counts)
        self.num_sums = sum(self._like[n].numel() for n in self._sums)
        self.adds_up = not self.pools or all(self._ways[n] == "sum" for n in self._sums)

    def weight(self, value: float, sums_S: np.ndarray) -> float:
        return 0.0 if self.pools else 1.0

    def _tried(self, num_classes: int) -> dict[str, Tensor]:
        """The states after two samples, because some states take their size from the data."""
        metric = self.init("cpu")
        labels = torch.tensor([0, 1])
        outputs = torch.eye(2, num_classes) if self._task in CLASS_TASKS else labels.float()
        if self._task == "regression":
            outputs = labels.float() if num_classes == 1 else torch.eye(2, num_classes)
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metric.update(outputs, outputs + 1 if self._task == "regression" else labels)
        return {name: getattr(metric, name).detach().clone() for name in self._ways}

    def init(self, device: torch.device | str) -> Any:
        metric = copy.deepcopy(self._metric).to(device)
        metric.reset()
        return metric

    def update(self, state: Any, outputs: Tensor, targets: Tensor) -> Any:
        if self.of_logits and bool(((outputs >= 0) & (outputs <= 1)).all()):
            outputs = outputs.sigmoid() if self._task == "binary" else outputs.softmax(-1)
        state.update(outputs, targets.long() if self._task == "binary" else targets)
        return state

    def parts(self, state: Any) -> tuple[np.ndarray, np.ndarray]:
        return self._flat(state, self._counts), self._flat(state, self._sums)

    def _flat(self, state: Any, names: list[str]) -> np.ndarray:
        found = {name: getattr(state, name).detach().cpu() for name in names}
        for name, tensor in found.items():
            if tensor.numel() != (num := self._like[name].numel()):
                raise TypeError(f"the state '{name}' has {tensor.numel()} numbers in place of {num}")
        return np.concatenate([NOTHING, *(tensor.double().numpy().ravel() for tensor in found.values())])

    def value(self, state: Any) -> float:
        return float(state.compute())

    def of_all(self, values_K: np.ndarray, sums_KS: np.ndarray, counts_C: np.ndarray) -> dict[str, Any]:
        if not self.pools:
            return silo_mean(self, values_K)
        metric = self.init("cpu")
        reduced = iter(sums_KS.T)
        counts = iter(counts_C)
        for name, way in self._ways.items():
            like = self._like[name]
            if name in self._counts:
                flat = [next(counts) for _ in range(like.numel())]
            else:
                flat = [getattr(np, way)(next(reduced)) for _ in range(like.numel())]
            setattr(metric, name, torch.tensor(np.array(flat)).to(like.dtype).reshape(like.shape))
        metric._update_count = 1  # else it warns that nothing was added
        return {self.key: float(metric.compute())}


class Own(Deferred):
    """A user's metric, "package.module:function" or "package.module:Class", with its arguments."""

    @property
    def maximize(self) -> bool:
        """Whether higher is better."""
        return bool(self.arguments["maximize"])

    def scorer(self, task: Task, num_classes: int) -> Scorer:
        short, cls = self.name.rpartition(":")[2].rpartition(".")[2], self.target
        if not isinstance(cls, type):
            return Function(short, self.maximize, cls)
        arguments = {name: value for name, value in self.arguments.items() if name != "maximize"}
        metric = _made(self.name, cls, arguments, "objective.metrics")
        if is_torchmetric(cls):
            return Torchmetric(short, metric, self.maximize, task, num_classes)
        return OwnStates(short, metric, self.maximize)


def _made(name: str, cls: type, arguments: Mapping[str, Any], path: str) -> Any:
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: '{name}': {' '.join(str(error).split())}") from None


def is_torchmetric(cls: type) -> bool:
    """Whether it is a torchmetrics class or a subclass of one; does not import the package."""
    return any(part.__module__.partition(".")[0] == "torchmetrics" for part in cls.__mro__)


def find(name: str, arguments: dict[str, Any], path: str) -> Own:
    """The metric for `name` and its fields. Raises ConfigError, in one line, if it cannot be one."""
    target = import_object(name, path)
    if not callable(target):
        raise ConfigError(f"{path}: '{name}' cannot be called")
    is_class = isinstance(target, type)
    if is_class and not is_torchmetric(target) and not all(hasattr(target, m) for m in STATES):
        raise ConfigError(f"{path}: '{name}' lacks one of {', '.join(STATES)}, so it cannot be a metric")
    maximize = arguments.pop("maximize", None)
    if is_class:
        metric = _made(name, target, arguments, path)
        said = getattr(metric, "higher_is_better" if is_torchmetric(target) else "maximize", None)
        maximize = said if maximize is None else maximize
    if not isinstance(maximize, bool):
        raise ConfigError(
            f"{path}: is a higher '{name}' better? say so: {{name: \"{name}\", maximize: true}}, or false"
        )
    if not is_class and arguments:
        raise ConfigError(f"{path}: '{name}' is a function and takes no '{next(iter(arguments))}'")
    return Own(name, target, arguments | {"maximize": maximize})
