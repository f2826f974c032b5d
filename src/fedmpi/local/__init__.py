"""Local rules: how a silo turns global parameters into a contribution. A rule knows no cohort and no rank.

    base        what they share: the silo, the round, batches, the loop over them, the gradient of one
    samplers    the order of a silo's samples
    runners     how the silos of a rank train: one after the other
    optimizers  torch's, what is kept of one, how many gradients its steps hold
    gradient    steps from the global parameters: FedAvg's own, FedSGD, FedProx
    control     steps corrected by vectors that silos keep or that travel with the delta: SCAFFOLD, FedDyn, Mime
    contrast    steps that compare what models make of a batch: MOON
    personal    a model of its own for every silo: Ditto, APFL, FedRep, Per-FedAvg
    adaptive    steps whose length a silo finds for itself: AdaGrad-norm
    amounts     how much of its work a silo does in a round, whatever its rule

A rule is one class in one of these files and one line in the dict at its bottom.
"""

from __future__ import annotations

from fedmpi.components import Family
from fedmpi.local import adagrad_norm, contrastive, control_variates, gradient, personal
from fedmpi.local.base import GradientRule, LocalRule, LocalSilo, Round, local_steps
from fedmpi.local.gradient import Sgd
from fedmpi.local.optimizers import plain_step
from fedmpi.local.runners import RUNNERS, Sequential, SiloRunner
from fedmpi.local.samplers import Sampler

RULES = Family(
    "local rule",
    {**gradient.RULES, **control_variates.RULES, **contrastive.RULES, **personal.RULES, **adagrad_norm.RULES},
    LocalRule,
    defaults=True,
)

__all__ = [
    "RULES",
    "RUNNERS",
    "GradientRule",
    "LocalRule",
    "LocalSilo",
    "Round",
    "Sampler",
    "Sequential",
    "Sgd",
    "SiloRunner",
    "local_steps",
    "plain_step",
]
