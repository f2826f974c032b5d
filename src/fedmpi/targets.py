"""Matching of outputs and targets: the class dimension, compatible shapes, ignored targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from fedmpi.errors import ConfigError
from fedmpi.types import Task

Tensor = torch.Tensor
Count = Callable[[Tensor], "int | Tensor"]  # number of targets in a batch, or the sum of their weights

CLASS_TASKS: tuple[Task, ...] = ("classification", "next_token")
IGNORES_NOTHING = -(2**31)  # torch wants a number; this one is never a class


@dataclass(frozen=True)
class Targets:
    """How a task's outputs and targets match."""

    task: Task
    classes: Literal["first", "last"] | None = None  # class dimension: 1, the last; None: found from the shapes
    ignore_index: int | None = None  # target class to ignore; None: none

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [M, classes] and classes [M], one row per target; for regression and binary tasks the outputs in the
        targets' shape, and the targets. Raises ConfigError for shapes that do not match, or match in two ways."""
        if self.task not in CLASS_TASKS:
            return alike(outputs, targets), targets
        if outputs.ndim == 2 and outputs.shape[:1] == targets.shape:
            return outputs, targets
        if outputs.ndim == targets.ndim > 1:  # targets have size 1 in the class dimension
            dim = -1 if self.classes == "last" else 1
            targets = targets.squeeze(dim)
            if outputs.ndim == 2 and outputs.shape[:1] == targets.shape:
                return outputs, targets
        shape = outputs.shape
        last = outputs.ndim > 1 and shape[:-1] == targets.shape and self.classes != "first"
        first = outputs.ndim > 1 and shape[:1] + shape[2:] == targets.shape and self.classes != "last"
        if last and first and self.task != "next_token":  # [N, T, symbols] is what next_token documents
            raise ConfigError(
                f"the model gives {list(shape)} where the targets are {list(targets.shape)}: classes may be in "
                "dimension 1 or in the last; set objective.classes to first or last"
            )
        if not (last or first):
            wanted = {"first": "[N, classes, ...]", "last": "[N, ..., classes]"}.get(self.classes or "")
            raise ConfigError(
                f"the model gives {list(shape)} where the targets are {list(targets.shape)}; logits are "
                f"{wanted or '[N, classes, ...] or [N, ..., classes]'} for targets [N, ...]"
            )
        logits = outputs if last else outputs.movedim(1, -1)
        return logits.flatten(0, -2), targets.flatten()

    def counted(self, logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The rows whose target is not ignored."""
        counts = self.counts(classes)
        return logits[counts], classes[counts]

    def counts(self, targets: Tensor) -> Tensor:
        """Mask of the targets that are not ignored, bool, in the shape of `targets`."""
        return torch.ne(targets, IGNORES_NOTHING if self.ignore_index is None else self.ignore_index)

    def some_ignored(self, targets: Tensor) -> bool:
        """Whether any target is ignored."""
        can = self.ignore_index is not None and self.task in CLASS_TASKS
        return can and not bool(self.counts(targets).all())

    def counter(self, targets: Tensor) -> Count:
        """A function that counts the targets of a batch, ignored ones left out; cheap if none is ignored."""
        if not self.some_ignored(targets):
            return torch.Tensor.numel
        return lambda batch: self.counts(batch).sum()


def alike(outputs: Tensor, targets: Tensor) -> Tensor:
    """The outputs in the targets' shape; [N] and [N, 1] are the same. Without it torch would broadcast to [N, N].
    Raises ConfigError if the shapes do not match."""
    if outputs.shape == targets.shape:
        return outputs
    one, other = ([n for n in tensor.shape if n != 1] for tensor in (outputs, targets))
    if one != other or outputs.shape[:1] != targets.shape[:1]:
        raise ConfigError(f"the model gives {list(outputs.shape)} numbers where the targets are {list(targets.shape)}")
    return outputs.reshape(targets.shape)


def number_of(mass: int | Tensor) -> int | float:
    """A number of targets or the sum of their weights, as a number; a float only if it is a sum of weights."""
    if isinstance(mass, Tensor):
        return float(mass) if mass.is_floating_point() else int(mass)
    return mass
