"""Local rules: how a silo turns global parameters into a contribution. A rule knows no cohort and no rank.

    base              the base classes, the silo, the round, batches, the training loop, the gradient of a batch
    samplers          the order of a silo's samples
    runners           how a rank trains its silos: one after the other
    optimizers        torch's optimizers, their kept state, FedNova's normaliser
    gradients         the gradient of one batch, whole or in parts
    gradient          gradient steps from the global parameters: FedAvg's, FedSGD, FedProx
    control_variates  steps corrected by vectors that silos keep or that are sent with the delta: SCAFFOLD, FedDyn, Mime
    contrastive       steps with a loss that compares representations: MOON
    personal          a personal model per silo: Ditto, APFL, FedRep, Per-FedAvg
    adagrad_norm      an adaptive step size per silo: AdaGrad-norm
    by_silo           settings that single silos have for themselves
    workload          how much of its work a silo does in a round, under any rule

A rule is one class in one of these files and one line in the dict at the file's bottom.
"""

from __future__ import annotations

from fedmpi.components import Family
from fedmpi.local import adagrad_norm, contrastive, control_variates, gradient, personal
from fedmpi.local.base import GradientRule, LocalRule, LocalSilo, Round, local_steps
from fedmpi.local.gradient import Sgd
from fedmpi.local.optimizers import plain_step
from fedmpi.local.runners import RUNNERS, Sequential, SiloRunner
from fedmpi.local.samplers import Sampler
from fedmpi.local.workload import Delay, Order

RULES = Family(
    "local rule",
    {**gradient.RULES, **control_variates.RULES, **contrastive.RULES, **personal.RULES, **adagrad_norm.RULES},
    LocalRule,
    defaults=True,
)

__all__ = [
    "RULES",
    "RUNNERS",
    "Delay",
    "GradientRule",
    "LocalRule",
    "LocalSilo",
    "Order",
    "Round",
    "Sampler",
    "Sequential",
    "Sgd",
    "SiloRunner",
    "local_steps",
    "plain_step",
]
