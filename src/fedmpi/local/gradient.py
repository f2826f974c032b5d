"""Gradient steps from the global parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch

from fedmpi.components import NonNegativeFloat, PositiveFloat, PositiveInt, component
from fedmpi.flat import Entry, FlatModel, refuse_frozen
from fedmpi.local.base import GradientRule, LocalRule, LocalSilo, Round, local_steps, pulled, shortest, whole_gradient
from fedmpi.local.optimizers import num_gradients
from fedmpi.schedules import SCHEDULES, Constant, Schedule
from fedmpi.types import Contribution

MU_STEP = 0.1  # by which an adaptive mu rises and falls
FALLS = 5  # of the loss in a row, before it falls


@component
class Sgd(GradientRule):
    """Gradient steps from the global parameters: ClientUpdate of FedAvg (McMahan et al. 2017, Algorithm 1).

    With the aggregator `mean` and the server `fedavg` this IS FedAvg. Under a selector that takes one silo after
    another it is cyclic weight transfer (Chang et al. 2018, Distributed deep learning networks among institutions for
    medical imaging): the mean of one silo is that silo's parameters, which the next one goes on from. Deviations: any
    optimizer of torch.optim in place of plain SGD, a step count in place of epochs, gradient clipping.
    """

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        return local_steps(self, silo, model, params_P, round)


@component
class FedSgd(LocalRule):
    """FedSGD: one step along the gradient of all of the silo's samples (McMahan et al. 2017, section 2).

    In the form that averages parameters; C is the selector's fraction, E = 1, B infinite.

    Deviations: gradient clipping; the gradient may be added up from so many samples at a time.
    """

    whole_batches = ("merge",)

    lr: PositiveFloat
    """step size at the schedule's start"""
    schedule: Annotated[Schedule, SCHEDULES] = Constant()
    """of lr over rounds"""
    clip: PositiveFloat | None = None
    """largest norm of the gradient; null: as it is"""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: autocast on CUDA"""
    batch_size: PositiveInt | None = None
    """samples at a time, which add up to the one gradient; null: all at once"""
    last_batch: Literal["keep", "merge"] = "keep"
    """a short one: keep it, or merge it into the one before it"""

    def suits(self, module: torch.nn.Module, entries: Sequence[Entry], ids: Sequence[str]) -> None:
        """ConfigError for a model without parameters to train."""
        refuse_frozen(entries)

    def smallest_batch(self, silo: str, num_samples: int, rounds: int) -> int:
        """Samples of the smallest batch."""
        return shortest(num_samples, self.batch_size, self.last_batch)

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        merge = self.last_batch == "merge"
        loss = whole_gradient(silo, model, params_P, round, self.batch_size, self.precision, merge)
        trained = [p for p in model.module.parameters() if p.grad is not None]
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, self.clip)
        with torch.no_grad():
            rate = self.schedule.lr(self.lr, round.number, round.rounds)
            for param in trained:
                param.add_(param.grad, alpha=-rate)  # type: ignore[arg-type]
        num_samples = len(silo.data.x_train)
        silo.cursor += num_samples
        silo.kept = {**silo.kept, **model.personal()}
        vector_Q = model.take_delta(params_P)
        num_targets = int(round.count(silo.data.y_train))
        return Contribution(
            *(silo.id, round.number, silo.weight, vector_Q, loss, num_samples, 1),
            num_targets=num_targets,
            layout=model.layout,
        )


@component
class FedProx(GradientRule):
    """Steps on the loss and mu/2 |w - w_t|^2, mu set or adaptive (Li et al. 2020, Algorithm 2; section 5.3).

    Federated Optimization in Heterogeneous Networks. An adaptive mu rises by 0.1 when the loss does, and falls by 0.1
    when the loss has fallen five times in a row.

    Deviations: silos are weighted by their samples, and taken with equal probability, as in FedAvg; the subproblem is
    solved for a set amount of work in place of gamma-inexactly. An adaptive mu is the silo's own: it follows the mean
    training loss of the silo's batches, from one round that it took part in to the next, in place of the global loss;
    after it fell, five more must follow; it never lies below 0. To FedNova a step of SGD with the proximal term counts
    for what Wang et al. 2020 make of it (local/optimizers.py), with any optimizer that is linear in the gradients.
    """

    mu: NonNegativeFloat = 0.01
    """of the proximal term, at first if adaptive; 0 is FedAvg"""
    adaptive: bool = False
    """does mu follow the silo's loss?"""

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        kept = silo.kept.get("proximal") if self.adaptive else None  # mu, the last loss, how often in a row it fell
        mu, last, falls = (self.mu, None, 0) if kept is None else (kept[0].item(), kept[1].item(), int(kept[2]))
        contribution = local_steps(
            self, silo, model, params_P, round, pulled(model, mu, model.as_loaded(params_P) * -mu) if mu else None
        )
        contribution.normalizer = num_gradients(self.optimizer, contribution.num_steps, self.rate(round) * mu)
        if self.adaptive:
            if last is not None and contribution.loss > last:
                mu, falls = mu + MU_STEP, 0
            elif last is not None and contribution.loss < last:
                falls += 1
            else:
                falls = 0
            if falls == FALLS:
                mu, falls = max(0.0, mu - MU_STEP), 0
            silo.kept["proximal"] = torch.tensor([mu, contribution.loss, falls], dtype=torch.float64)
        return contribution


RULES = {"sgd": Sgd, "fedsgd": FedSgd, "fedprox": FedProx}
