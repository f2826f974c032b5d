"""Corrections that rules add to gradients before each step, for `correct` of `local_steps`."""

from __future__ import annotations

import torch

from fedmpi.flat import FlatModel
from fedmpi.local.base import Correct


def corrected(model: FlatModel, by_P: torch.Tensor, scale: float = 1.0) -> Correct:
    """A `correct` for `local_steps`: g becomes `scale` g + `by_P`, in place. `by_P` [P] is read at every step."""
    pairs = model.pairs(by_P)

    def correct() -> None:
        grads, parts = _graded(pairs)
        if scale != 1.0:
            torch._foreach_mul_(grads, scale)
        torch._foreach_add_(grads, parts)

    return correct


def pulled(model: FlatModel, mu: float, by_P: torch.Tensor) -> Correct:
    """A `correct` for `local_steps`: g becomes g + mu w + `by_P`, in place. `by_P` [P] is read at every step.

    With `by_P` = -mu z this is the gradient of mu/2 |w - z|^2, which pulls the parameters w towards z.
    """
    pairs = model.pairs(by_P)
    whole = [(param, part) for param, part in pairs if param.dtype == part.dtype]
    halves = [(param, part) for param, part in pairs if param.dtype != part.dtype]

    def correct() -> None:
        for param, part in halves:  # in float32, so that at w = z rounding adds no pull
            if param.grad is not None:
                param.grad.add_(torch.add(part, param.to(part.dtype), alpha=mu))
        if not whole:
            return
        grads, parts = _graded(whole)
        torch._foreach_add_(grads, [param for param, _ in whole if param.grad is not None], alpha=mu)
        torch._foreach_add_(grads, parts)

    return correct


def _graded(
    pairs: list[tuple[torch.nn.Parameter, torch.Tensor]],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The gradients of the parameters that have one, and their parts of the vector."""
    found = [(param.grad, part) for param, part in pairs if param.grad is not None]
    return [grad for grad, _ in found], [part for _, part in found]
