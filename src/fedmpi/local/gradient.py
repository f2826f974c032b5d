"""Gradient steps from the global parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch

from fedmpi.components import NonNegativeFloat, PositiveFloat, PositiveInt, component
from fedmpi.flat import Entry, FlatModel, refuse_frozen
from fedmpi.local.base import GradientRule, LocalRule, LocalSilo, Round, local_steps, shortest, whole_gradient
from fedmpi.local.corrections import pulled
from fedmpi.schedules import SCHEDULES, Constant, Schedule
from fedmpi.targets import number_of
from fedmpi.types import Contribution

MU_STEP = 0.1  # change of an adaptive mu
FALLS = 5  # decreases of the loss in a row that lower it


@component
class Sgd(GradientRule):
    """Gradient steps from the global parameters: ClientUpdate of FedAvg (McMahan et al. 2017, Algorithm 1).

    With the aggregator `mean` and the server `fedavg` this is FedAvg. With a selector that takes one silo after another
    it is cyclic weight transfer (Chang et al. 2018, Distributed deep learning networks among institutions for medical
    imaging): each silo continues from the parameters of the silo before. Deviations: any optimizer of torch.optim
    instead of plain SGD, a number of steps instead of epochs, gradient clipping.
    """

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        return local_steps(self, silo, model, params_P, round)


@component
class FedSgd(LocalRule):
    """FedSGD: one step along the gradient over all of the silo's samples (McMahan et al. 2017, section 2).

    This is the form that averages parameters: C is the selector's fraction, E = 1, B infinite.

    Deviations: gradient clipping; the gradient may be accumulated over batches.
    """

    whole_batches = ("merge",)
    refuses_partial = "its one step takes the gradient of all samples"

    lr: PositiveFloat
    """step size at the schedule's start"""
    schedule: Annotated[Schedule, SCHEDULES] = Constant()
    """learning rate over rounds"""
    clip: PositiveFloat | None = None
    """largest norm of the gradient; null: no clipping"""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: forward and backward passes under autocast; parameters, the step and metrics stay float32"""
    batch_size: PositiveInt | None = None
    """samples per batch of the accumulated gradient; null: all at once"""
    last_batch: Literal["keep", "merge"] = "keep"
    """a short last batch: keep it, or merge it into the batch before"""

    @property
    def takes_all(self) -> bool:
        return self.batch_size is None

    def suits(self, module: torch.nn.Module, entries: Sequence[Entry], ids: Sequence[str]) -> None:
        """Raise ConfigError if the model has no parameters to train."""
        refuse_frozen(entries)

    def smallest_batch(self, silo: str, num_samples: int, rounds: int) -> int:
        """Number of samples of the smallest batch."""
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
        num_targets = number_of(round.count(silo.data.y_train))
        return Contribution(
            *(silo.id, round.number, silo.weight, vector_Q, loss, num_samples, 1),
            num_targets=num_targets,
            layout=model.layout,
        )


@component
class FedProx(GradientRule):
    """Steps on the loss + mu/2 |w - w_t|^2, with a fixed or adaptive mu (Li et al. 2020, Federated Optimization in
    Heterogeneous Networks, Algorithm 2; section 5.3).

    An adaptive mu grows by 0.1 when the loss grows, and shrinks by 0.1 after the loss has decreased five times in a
    row.

    Deviations: silos are weighted by their samples and drawn with equal probability, as in FedAvg; the subproblem gets
    a fixed number of steps or epochs instead of a gamma-inexact solution. Each silo has its own adaptive mu, which
    follows the silo's mean training loss over the rounds it took part in, instead of the global loss; it starts to
    count again after it shrank, and stays at 0 or above. FedNova's normaliser counts the proximal term as Wang et al.
    2020 do (local/optimizers.py), for any optimizer that is linear in the gradients.
    """

    mu: NonNegativeFloat = 0.01
    """weight of the proximal term (the first one, if adaptive); 0 gives FedAvg"""
    adaptive: bool = False
    """adapt mu to the silo's loss"""

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        kept = silo.kept.get("proximal") if self.adaptive else None  # mu, the last loss, how often in a row it fell
        mu, last, falls = (self.mu, None, 0) if kept is None else (kept[0].item(), kept[1].item(), int(kept[2]))
        correct = pulled(model, mu, model.as_loaded(params_P) * -mu) if mu else None
        contribution = local_steps(self, silo, model, params_P, round, correct, pull=self.rate(round) * mu)
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
