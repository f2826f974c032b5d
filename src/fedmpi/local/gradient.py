"""Gradient steps from the global parameters."""

from __future__ import annotations

import torch

from fedmpi.components import NonNegativeFloat, component
from fedmpi.flat import FlatModel
from fedmpi.local.base import LocalSilo, Round, Work, descend
from fedmpi.types import Contribution


@component
class Sgd(Work):
    """Gradient steps from the global parameters: ClientUpdate of FedAvg (McMahan et al. 2017, Algorithm 1).

    Deviations: any optimizer of torch.optim in place of plain SGD, a step count in place of epochs, gradient clipping.
    """

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        return descend(self, silo, model, params_P, round)


@component
class FedProx(Work):
    """Steps on the loss and mu/2 |w - w_t|^2 (Li et al. 2020, Federated Optimization in Heterogeneous Networks,
    Algorithm 2).

    Deviations: silos are weighted by their samples, and taken with equal probability, as in FedAvg; the subproblem is
    solved for a set amount of work in place of gamma-inexactly.
    """

    mu: NonNegativeFloat = 0.01  # of the proximal term; 0 is FedAvg

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        pairs = model.pairs(params_P)

        def pull() -> None:
            for param, start in pairs:
                if param.grad is not None:
                    param.grad.add_(param, alpha=self.mu).sub_(start, alpha=self.mu)

        return descend(self, silo, model, params_P, round, pull)


RULES = {"sgd": Sgd, "fedprox": FedProx}
