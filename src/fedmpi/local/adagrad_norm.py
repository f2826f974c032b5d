"""AdaGrad-norm: each silo adapts its own step size."""

from __future__ import annotations

import pydantic
import torch

from fedmpi.components import PositiveFloat, component
from fedmpi.flat import FlatModel
from fedmpi.local.base import GradientRule, LocalSilo, Round, local_steps
from fedmpi.local.optimizers import num_gradients
from fedmpi.types import Contribution

SUM = "squared_norms"  # key of b^2 in the silo's kept state


@component
class AdaGradNorm(GradientRule):
    """Steps of lr / b along g, where b^2 is eps plus the squared norms of all gradients so far, this one included (Ward
    et al. 2019, AdaGrad Stepsizes, Algorithm 1). lr need not be tuned to the problem.

    Each silo has its own sum, which continues over all rounds that the silo trains in, so a silo that trains more often
    takes shorter steps. FedNova's normaliser is then the sum of 1 / b, weighted by momentum. Deviation: any optimizer
    of torch.optim, which gets g / b as the gradient. No clipping: g / b is never longer than 1.
    """

    eps: PositiveFloat = 1e-2
    """b^2 before the first gradient"""

    @pydantic.model_validator(mode="after")
    def _not_clipped(self) -> AdaGradNorm:
        if self.clip is not None:
            raise ValueError(
                "clip: adagrad_norm divides gradients by their norms, so there is nothing to clip; leave it out"
            )
        return self

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        before = silo.kept.get(SUM, torch.tensor(self.eps, dtype=torch.float64))
        total = before.to(model.device, torch.float64, copy=True)  # b^2
        lengths: list[torch.Tensor] = []
        trained = [p for p in model.module.parameters() if p.requires_grad]

        def scale() -> None:
            grads = [p.grad for p in trained if p.grad is not None]
            total.add_(torch.stack(torch._foreach_norm(grads)).double().square_().sum())
            factor = total.rsqrt()
            torch._foreach_mul_(grads, factor)
            lengths.append(factor)

        contribution = local_steps(self, silo, model, params_P, round, scale)
        silo.kept[SUM] = total
        found = torch.stack(lengths).tolist()
        held = num_gradients(self.optimizer, len(found), lengths=found)
        contribution.normalizer = sum(found) if held is None else held
        return contribution


RULES = {"adagrad_norm": AdaGradNorm}
