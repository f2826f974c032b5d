"""Training losses: the built-in ones with their arguments, and users' own functions and classes.

    loss: {name: cross_entropy, weight: [1, 4], label_smoothing: 0.1}
    loss: {name: "mine:Focal", gamma: 2}

A loss of a batch is a sum of one term per target, divided by the batch's mass. The mass is the number of targets or,
with class weights, the sum of their targets' weights, as in torch. A silo reports its loss and its mass. So the loss
over all silos, weighted by mass, is exactly that of the pooled samples.

Targets [...] are classes or numbers, logits [M, classes]; M targets.
"""

from __future__ import annotations

import copy
import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import pydantic
import torch
import torch.nn.functional as F

from fedmpi.components import Deferred, Family, NonNegativeFloat, PositiveFloat, component, did_you_mean, import_object
from fedmpi.errors import ConfigError
from fedmpi.targets import IGNORES_NOTHING
from fedmpi.trust import check_factory
from fedmpi.types import Task

Tensor = torch.Tensor


class Loss:
    """A built-in loss, as a function of outputs and targets whose shapes match (targets.py)."""

    tasks: ClassVar[tuple[Task, ...]] = ()

    @property
    def class_weights(self) -> tuple[float, ...] | None:
        """The weight of each class, if the mass of a batch is the sum of its targets' weights; None: their number."""
        return None

    @abstractmethod
    def __call__(
        self, outputs: Tensor, targets: Tensor, reduction: str = "mean", ignore: int = IGNORES_NOTHING
    ) -> Tensor:
        """The loss; `reduction` is mean, sum or none, as in torch. `ignore` is a class without a term."""

    def fits(self, num_classes: int) -> None:
        """Raise ConfigError if the loss does not fit data of so many classes."""

    def mass(self, targets: Tensor, counts: Tensor | None = None) -> Tensor:
        """The mass of targets, a scalar; `counts` is the mask of those that count, in their shape. None: all."""
        weights = self.class_weights
        assert weights is not None
        found = classes_to(weights, targets)
        return found.sum() if counts is None else torch.where(counts, found, 0.0).sum()


def classes_to(weights: tuple[float, ...], targets: Tensor) -> Tensor:
    """The weight of each target, float64; 0 for what is no class."""
    table = as_tensor(weights, targets.device, torch.float64)
    inside = (targets >= 0) & (targets < len(weights))
    return torch.where(inside, table[torch.where(inside, targets, 0)], 0.0)


@functools.lru_cache(maxsize=32)
def as_tensor(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The values as a tensor, made once."""
    return torch.tensor(values, device=device, dtype=dtype)


@component
class CrossEntropy(Loss):
    """Cross entropy of logits and classes. With `weight` a batch's loss is sum_i w(y_i) l_i / sum_i w(y_i), as in
    torch."""

    tasks = ("classification", "next_token")

    weight: tuple[NonNegativeFloat, ...] | None = None
    """weight of each class, in their order; null: 1 each"""
    label_smoothing: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    """share of a target's probability that is spread evenly over all classes"""

    @pydantic.model_validator(mode="after")
    def _some_weight(self) -> CrossEntropy:
        if self.weight is not None and not any(self.weight):
            raise ValueError("weight: all weights are 0")
        if self.weight is not None and not all(self.weight) and self.label_smoothing:
            raise ValueError("label_smoothing does not go with a weight of 0: such a target would still have a loss")
        return self

    @property
    def class_weights(self) -> tuple[float, ...] | None:
        return self.weight

    def fits(self, num_classes: int) -> None:
        if self.weight is not None and len(self.weight) != num_classes:
            raise ConfigError(
                f"objective.loss.weight: {len(self.weight)} weights, and the data have {num_classes} classes; give one "
                "weight per class"
            )

    def __call__(
        self, outputs: Tensor, targets: Tensor, reduction: str = "mean", ignore: int = IGNORES_NOTHING
    ) -> Tensor:
        weight = None
        if self.weight is not None:
            if outputs.shape[-1] != len(self.weight):
                raise ConfigError(
                    f"objective.loss.weight: {len(self.weight)} weights, and the model gives {outputs.shape[-1]} "
                    "numbers per target"
                )
            weight = as_tensor(self.weight, outputs.device, outputs.dtype)
        return F.cross_entropy(
            *(outputs, targets, weight),
            reduction=reduction,
            ignore_index=ignore,
            label_smoothing=self.label_smoothing,
        )


@component
class BinaryCrossEntropy(Loss):
    """Binary cross entropy of logits and targets 0 or 1; the mean is over targets, whatever `pos_weight` is."""

    tasks = ("binary",)

    pos_weight: PositiveFloat | None = None
    """factor of the terms of targets 1, such as (number of 0) / (number of 1); null: 1"""

    def __call__(
        self, outputs: Tensor, targets: Tensor, reduction: str = "mean", ignore: int = IGNORES_NOTHING
    ) -> Tensor:
        one = None if self.pos_weight is None else as_tensor((self.pos_weight,), outputs.device, outputs.dtype)
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction=reduction, pos_weight=one)


@component
class Mse(Loss):
    """Mean squared error; one term per number."""

    tasks = ("regression",)

    def __call__(
        self, outputs: Tensor, targets: Tensor, reduction: str = "mean", ignore: int = IGNORES_NOTHING
    ) -> Tensor:
        return F.mse_loss(outputs, targets, reduction=reduction)


@component
class Mae(Loss):
    """Mean absolute error; one term per number."""

    tasks = ("regression",)

    def __call__(
        self, outputs: Tensor, targets: Tensor, reduction: str = "mean", ignore: int = IGNORES_NOTHING
    ) -> Tensor:
        return F.l1_loss(outputs, targets, reduction=reduction)


@component
class Huber(Loss):
    """Squared error / 2 up to `delta`, and delta (error - delta / 2) beyond: `torch.nn.HuberLoss`."""

    tasks = ("regression",)

    delta: PositiveFloat = 1.0
    """error, in units of the targets, from which the loss grows linearly"""

    def __call__(
        self, outputs: Tensor, targets: Tensor, reduction: str = "mean", ignore: int = IGNORES_NOTHING
    ) -> Tensor:
        return F.huber_loss(outputs, targets, reduction=reduction, delta=self.delta)


class OwnLoss(Deferred):
    """A user's loss, "package.module:function" or "package.module:Class", with its arguments."""

    def function(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss as a function of outputs and targets."""
        if not isinstance(self.target, type):
            return functools.partial(self.target, **self.arguments) if self.arguments else self.target
        made = _made(self.name, self.target, self.arguments, "objective.loss")
        return _Placed(made) if isinstance(made, torch.nn.Module) else made


class _Placed:
    """A user's loss that is a torch module, on the device of the outputs."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module, self._on = module, dict[torch.device, torch.nn.Module]()

    def __call__(self, outputs: Tensor, targets: Tensor) -> Any:
        if (here := self._on.get(outputs.device)) is None:
            here = self._on[outputs.device] = copy.deepcopy(self._module).to(outputs.device)
        return here(outputs, targets)


def _made(name: str, cls: type, arguments: Mapping[str, Any], path: str) -> Any:
    try:
        made = cls(**arguments)
    except Exception as error:  # of the user's code
        raise ConfigError(f"{path}: '{name}': {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    if isinstance(made, torch.nn.Module) and next(made.parameters(), None) is not None:
        raise ConfigError(f"{path}: '{name}' has parameters, which no silo would train; put them into the model")
    return made


def own(name: str, arguments: dict[str, Any], path: str) -> OwnLoss:
    """The user's loss for `name` and its arguments. Raises ConfigError, in one line, if it cannot be one."""
    target = import_object(name, path)
    if not callable(target):
        raise ConfigError(f"{path}: '{name}' cannot be called")
    if isinstance(target, type):
        if not any("__call__" in vars(part) for part in target.__mro__):
            raise ConfigError(f"{path}: '{name}' has no __call__(outputs, targets), so it cannot be a loss")
        _takes(name, target, (), arguments, path)
        _made(name, target, arguments, path)
    elif arguments:
        check_factory(target, name, path, "loss")
        _takes(name, target, (None, None), arguments, path)
    return OwnLoss(name, target, arguments)


def _takes(name: str, target: Any, first: tuple[None, ...], arguments: Mapping[str, Any], path: str) -> None:
    """Raise ConfigError if the target does not take these arguments, after the `first`."""
    try:
        takes = inspect.signature(target)
    except (TypeError, ValueError):  # of a built-in
        return
    if not any(p.kind is p.VAR_KEYWORD for p in takes.parameters.values()):
        for key in arguments:
            if key not in takes.parameters:
                known = list(takes.parameters)[len(first) :]
                raise ConfigError(f"{path}: '{name}' has no '{key}'{did_you_mean(key, known)}")
    try:
        takes.bind(*first, **arguments)
    except TypeError as error:
        raise ConfigError(f"{path}: '{name}': {error}") from None


class _Losses(Family):
    """The built-in losses, and users' own functions and classes."""

    def _instance(self, value: Any) -> Any:
        if not isinstance(value, (str, Mapping, Loss, OwnLoss)):
            raise ConfigError(f"objective.loss: {value!r} is no loss; name your own as 'package.module:function'")
        return super()._instance(value)

    def build(self, value: Any, path: str) -> Any:
        name = value.get("name") if isinstance(value, Mapping) else value
        if not isinstance(name, str) or ":" not in name:
            return super().build(value, path)
        arguments = {k: v for k, v in value.items() if k != "name"} if isinstance(value, Mapping) else {}
        return own(name, arguments, path)


LOSSES = _Losses(
    "loss",
    {
        "cross_entropy": CrossEntropy,
        "binary_cross_entropy": BinaryCrossEntropy,
        "mse": Mse,
        "mae": Mae,
        "huber": Huber,
    },
    Loss,
)
