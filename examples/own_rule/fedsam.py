"""A local rule: how a silo trains."""

from typing import ClassVar

import torch
from torch import Tensor

from fedmpi.components import PositiveFloat, component
from fedmpi.flat import FlatModel
from fedmpi.local.base import GradientRule, LocalSilo, Round, local_steps
from fedmpi.types import Contribution


@component
class FedSam(GradientRule):  # lr, epochs or steps, batch_size, optimizer, schedule, ... are GradientRule's
    """Sharpness-aware steps at every silo (Qu et al. 2022, FedSAM; the step is that of Foret et al. 2021, SAM).

    A step follows the gradient at w + rho g / |g|, where g is the batch's gradient at w: the worst point nearby.
    """

    rho: PositiveFloat = 0.05
    """Distance to that point."""
    splits: ClassVar[bool] = False  # a step needs its whole batch, so `micro_batch` is refused

    def train(self, silo: LocalSilo, model: FlatModel, params_P: Tensor, round: Round) -> Contribution:
        module = model.module
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}

        def loss_nearby(x: Tensor, y: Tensor) -> Tensor:
            grads = torch.autograd.grad(round.loss(module(x), y), list(trained.values()))
            norm = torch.stack([g.norm() for g in grads]).norm().clamp(min=1e-12)
            nearby = {name: p + self.rho / norm * g for (name, p), g in zip(trained.items(), grads, strict=True)}
            return round.loss(torch.func.functional_call(module, nearby, (x,)), y)

        return local_steps(self, silo, model, params_P, round, batch_loss=loss_nearby)
