"""How outputs lie beside targets: where the class dimension is, which shapes agree, which targets count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from fedmpi.errors import ConfigError
from fedmpi.types import Task

Tensor = torch.Tensor
Count = Callable[[Tensor], "int | Tensor"]

CLASS_TASKS: tuple[Task, ...] = ("classification", "next_token")
IGNORES_NOTHING = -(2**31)  # torch wants a number; this one is never a class


@dataclass(frozen=True)
class Targets:
    """A task's targets beside the outputs of its model."""

    task: Task
    classes: Literal["first", "last"] | None = None  # dimension of the logits: 1, the last one, or found by shape
    ignore_index: int | None = None  # the class of targets that do not count; None: all count

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [M, classes] and classes [M], one row a target; of other tasks the outputs in the targets' shape, and
        the targets. ConfigError for shapes that do not agree, or agree in two ways."""
        if self.task not in CLASS_TASKS:
            return alike(outputs, targets), targets
        if outputs.ndim == 2 and outputs.shape[:1] == targets.shape:
            return outputs, targets
        if outputs.ndim == targets.ndim > 1:  # targets with a dimension of 1 where the logits have their classes
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
                "dimension 1 or in the last; say objective.classes: first, or last"
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
        """Of rows, those whose target counts."""
        counts = self.counts(classes)
        return logits[counts], classes[counts]

    def counts(self, targets: Tensor) -> Tensor:
        """Which targets count."""
        return torch.ne(targets, IGNORES_NOTHING if self.ignore_index is None else self.ignore_index)

    def some_ignored(self, targets: Tensor) -> bool:
        """Are there targets that do not count?"""
        can = self.ignore_index is not None and self.task in CLASS_TASKS
        return can and not bool(self.counts(targets).all())

    def counter(self, targets: Tensor) -> Count:
        """How many targets of a batch count, for batches of these; without a look at them where all do."""
        if not self.some_ignored(targets):
            return torch.Tensor.numel
        return lambda batch: self.counts(batch).sum()


def alike(outputs: Tensor, targets: Tensor) -> Tensor:
    """The outputs in the targets' shape, [N] and [N, 1] being the same; else they would spread to [N, N]."""
    if outputs.shape == targets.shape:
        return outputs
    one, other = ([n for n in tensor.shape if n != 1] for tensor in (outputs, targets))
    if one != other or outputs.shape[:1] != targets.shape[:1]:
        raise ConfigError(f"the model gives {list(outputs.shape)} numbers where the targets are {list(targets.shape)}")
    return outputs.reshape(targets.shape)
