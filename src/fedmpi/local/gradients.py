"""The gradient of one batch, whole or in parts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedmpi.flat import FlatModel
from fedmpi.targets import Count, number_of

Batch = tuple[torch.Tensor, torch.Tensor]
BatchLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gradient(model: FlatModel, batch: Batch, batch_loss: BatchLoss, precision: str = "float32") -> torch.Tensor:
    """The detached loss of one batch, which lies on the model's device; adds its gradient to the parameters' `.grad`.

    All rules compute their gradients here.
    """
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = batch_loss(*batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def accumulated_gradient(
    model: FlatModel, batch: Batch, batch_loss: BatchLoss, precision: str, micro_batch: int, count: Count
) -> torch.Tensor:
    """As `gradient`, in parts of at most `micro_batch` samples whose sizes differ by one at most. A part's loss counts
    by its mass, so the sum is the gradient of the mean over the whole batch."""
    x, y = batch
    num_parts = -(-len(x) // micro_batch)
    whole = number_of(count(y)) or 1
    total = torch.zeros((), device=model.device)
    for xs, ys in zip(x.tensor_split(num_parts), y.tensor_split(num_parts), strict=True):
        share = number_of(count(ys)) / whole
        loss = gradient(model, (xs, ys), lambda x, y: batch_loss(x, y) * share, precision)  # noqa: B023
        total = total + loss
    return total
