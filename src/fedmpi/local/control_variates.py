"""Gradient steps corrected by vectors that silos keep or that are sent with the delta."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import pydantic
import torch

from fedmpi import server
from fedmpi.aggregate import Mean
from fedmpi.components import Decay, NonNegativeFloat, PositiveFloat, called, component
from fedmpi.flat import FlatModel
from fedmpi.local.base import (
    GradientRule,
    LocalSilo,
    Round,
    gradient_vector,
    kept_vector,
    local_steps,
    whole_gradient,
)
from fedmpi.local.corrections import corrected, pulled
from fedmpi.local.optimizers import num_gradients
from fedmpi.types import Auxiliary, Contribution

if TYPE_CHECKING:
    from fedmpi.config import Config


def _reads_gradients(rule: GradientRule) -> None:
    """Raise ValueError for settings under which the distance moved does not give the round's mean gradient."""
    if num_gradients(rule.optimizer, 1) is None:
        raise ValueError(f"optimizer: this rule needs one that is linear in the gradients, not {rule.optimizer.name}")
    if rule.varies:
        raise ValueError(f"step_schedule: {called(rule)} needs one learning rate for all steps of a round")
    if rule.keep_optimizer:
        raise ValueError(
            "keep_optimizer: this rule would count gradients of earlier rounds as this round's; leave it false"
        )


def _mean_gradient(
    rule: GradientRule,
    contribution: Contribution,
    round: Round,
    by_P: torch.Tensor | None,
    before_P: torch.Tensor | None,
) -> torch.Tensor:
    """The mean of the silo's gradients in the round, without the correction `by`; a new vector [P]. If lr is 0: a copy
    of `before`.

    It is (w_t - w_k) / (lr |a|_1) - by, so gradients are weighted as the optimizer weights them. |a|_1 is the number of
    steps for plain SGD. Momentum rho moves further with the same gradients: dividing by the number of steps would make
    a control variate 1 / (1 - rho) times too large.
    """
    if not (rate := rule.rate(round)):  # the end of a schedule: no step moved the parameters
        return contribution["delta"].clone() if before_P is None else before_P.clone()
    mean_P = contribution["delta"] * (-1 / (contribution.num_gradients * rate))
    return mean_P if by_P is None else mean_P.sub_(by_P)


@component
class Scaffold(GradientRule):
    """Steps along g - c_k + c (Karimireddy et al. 2020, SCAFFOLD, Algorithm 1, Options I and II).

    c_k is the silo's control variate, c the mean over all silos. The new c_k is the gradient at w_t over all of the
    silo's samples (option I, one more pass over them) or c_k - c + (w_t - w_k) / (lr |a|_1) (option II). c changes by
    1/K times the sum of the changes of c_k. |a|_1 is the number of steps for plain SGD, as in the paper. Deviations:
    with momentum |a|_1 is FedNova's (local/optimizers.py), because option II diverges otherwise; deltas are weighted by
    samples unless the aggregator's weights are uniform.

    `variant: benchmark` is the algorithm that FLamby's benchmark runs under this name (Ogier du Terrail et al. 2022),
    to reproduce its numbers. Before a round c_k grows by (w_t - e_k) / (server_lr lr |a|_1), where e_k is the last
    round's w_t plus server_lr times the silo's last delta. Steps go along g - c_k; only deltas are sent.
    """

    option: Literal["I", "II"] = "II"
    """how c_k is computed: I from a full gradient, II from the delta"""
    variant: Literal["paper", "benchmark"] = "paper"
    """benchmark: FLamby's variant"""
    server_lr: PositiveFloat = 1.0
    """only for the benchmark variant: the lr of server.optimizer"""

    def conflicts(self, config: Config) -> str | None:
        """The benchmark variant needs the server's step size to equal `server_lr`."""
        optimizer = config.server.optimizer
        told = isinstance(optimizer, server.FedAvg) and optimizer.lr == self.server_lr
        if self.variant == "benchmark" and not told:
            return (
                f"server.optimizer: scaffold's variant benchmark needs fedavg with lr {self.server_lr}, its "
                "local.server_lr"
            )
        if self.variant == "benchmark" and self.by_delay is not None:
            return f"local.amount: by_delay does not go with scaffold: {self.refuses_partial}"
        return super().conflicts(config)

    @property
    def refuses_partial(self) -> str:
        """The benchmark's control variates compare where the silo went with where all went."""
        return "its variant benchmark needs silos that take equal steps" if self.variant == "benchmark" else ""

    @property
    def auxiliaries(self) -> tuple[Auxiliary, ...]:
        return () if self.variant == "benchmark" else (Auxiliary("control", "population"),)

    @property
    def kept_vectors(self) -> int:
        return 2 if self.variant == "benchmark" else 1

    @pydantic.model_validator(mode="after")
    def _has_gradients(self) -> Scaffold:
        if self.option == "II":
            _reads_gradients(self)
        elif self.variant == "benchmark":
            raise ValueError("option: the benchmark variant has option II only")
        return self

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        if self.variant == "benchmark":
            return self._benchmark(silo, model, params_P, round)
        c_P, before_P = round.auxiliary["control"], kept_vector(silo, "control", params_P)
        by_P = c_P.clone() if before_P is None else c_P - before_P
        after_P = None
        if self.option == "I":
            whole_gradient(silo, model, params_P, round, self.pass_size, self.precision, self.last_batch != "keep")
            after_P = gradient_vector(model, params_P)
        contribution = local_steps(self, silo, model, params_P, round, corrected(model, by_P))
        if after_P is None:
            after_P = _mean_gradient(self, contribution, round, by_P, before_P)
        change_P = contribution["control"]
        change_P.copy_(after_P)
        if before_P is not None:
            change_P.sub_(before_P)
        silo.kept["control"] = after_P
        return contribution

    def most_batches(self, silo: str, rounds: int) -> float:
        return math.inf if self.option == "I" else super().most_batches(silo, rounds)

    def _benchmark(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        c_P, end_P = kept_vector(silo, "control", params_P), kept_vector(silo, "end", params_P)
        if end_P is not None and silo.kept["moved"] > 0:
            c_P = (params_P - end_P).div_(silo.kept["moved"].item()).add_(0.0 if c_P is None else c_P)
        correct = None if c_P is None else corrected(model, -c_P)
        contribution = local_steps(self, silo, model, params_P, round, correct)
        silo.kept["end"] = torch.add(params_P, contribution["delta"], alpha=self.server_lr)
        silo.kept["moved"] = torch.tensor(
            self.server_lr * self.rate(round) * contribution.num_gradients, dtype=torch.float64
        )
        if c_P is not None:
            silo.kept["control"] = c_P
        return contribution


@component
class FedDyn(GradientRule):
    """Steps on the loss - <h_k, w> + alpha/2 |w - w_t|^2 (Acar et al. 2021, FedDyn, Algorithm 1).

    h_k is the paper's grad L_k(theta_k^{t-1}). After the round it decreases by alpha (w_k - w_t). The rule needs the
    server optimizer `feddyn` with the same alpha.

    Deviations: the subproblem gets a fixed number of steps or epochs instead of an exact solution; the mean and the
    server's h use the aggregator's weights, which need not be uniform.
    """

    alpha: PositiveFloat = 0.01
    """weight of the dynamic regulariser; equal to the server's alpha"""
    kept_vectors: ClassVar[int] = 1
    server_step: ClassVar[type[server.ServerOptimizer]] = server.FedDyn
    refuses_partial: ClassVar[str] = "its h_k takes what a silo did in a round for a solved subproblem"

    def conflicts(self, config: Config) -> str | None:
        """feddyn needs its own server optimizer, whose h is a mean over all silos in every round."""
        optimizer, exchange = config.server.optimizer, config.exchange
        if not isinstance(optimizer, server.FedDyn) or optimizer.alpha != self.alpha:
            needed = f"{{optimizer: {{name: feddyn, alpha: {self.alpha}}}}}"
            return f"server.optimizer: the rule feddyn needs server: {needed}"
        if not isinstance(config.aggregate, Mean) or config.aggregate.weights == "steps":
            return "aggregate: feddyn needs mean, with weights uniform (the paper's) or samples"
        if config.select.unbiased:
            return (
                f"select: {called(config.select)} counts silos by 1/probability, and feddyn's server adds "
                "up the changes of the cohort's h; take a selector that draws silos with equal probability"
            )
        if exchange.goes_on or (exchange.regions is not None and exchange.regions.every > 1):
            return (
                "exchange: feddyn's server needs the updates of every round; no overlap, no fragments, regions.every: 1"
            )
        return super().conflicts(config)

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        h_P = kept_vector(silo, "dynamic", params_P)
        by_P = model.as_loaded(params_P) * -self.alpha
        if h_P is not None:
            by_P.sub_(h_P)
        contribution = local_steps(self, silo, model, params_P, round, pulled(model, self.alpha, by_P))
        moved_P = contribution["delta"] * -self.alpha
        silo.kept["dynamic"] = moved_P if h_P is None else moved_P.add_(h_P)
        pull = self.rate(round) * self.alpha
        contribution.normalizer = num_gradients(self.optimizer, contribution.num_steps, pull)
        return contribution


@component
class GradientCorrection(GradientRule):
    """Steps along g + alpha (g' - g_k'): g' is the cohort's mean gradient of the last round, g_k' the silo's last one.

    SCAFFOLD's correction (Karimireddy et al. 2020, Algorithm 1, Option II) with gradients of the last round instead of
    control variates. With alpha 1, full participation and uniform weights the two are the same. A silo's mean gradient
    is (w_t - w_k) / (lr |a|_1) minus the correction. There is no correction in a silo's first round.
    """

    alpha: NonNegativeFloat = 1.0
    """weight of the correction; 0 gives FedAvg"""
    auxiliaries: ClassVar[tuple[Auxiliary, ...]] = (Auxiliary("gradient", "cohort", decay=0.0, gain=1.0),)
    kept_vectors: ClassVar[int] = 1

    @pydantic.model_validator(mode="after")
    def _has_gradients(self) -> GradientCorrection:
        _reads_gradients(self)
        return self

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        own_P = kept_vector(silo, "gradient", params_P)
        by_P = None if own_P is None else (round.auxiliary["gradient"] - own_P).mul_(self.alpha)
        correct = None if by_P is None else corrected(model, by_P)
        contribution = local_steps(self, silo, model, params_P, round, correct)
        new_P = _mean_gradient(self, contribution, round, by_P, own_P)
        contribution["gradient"].copy_(new_P)
        silo.kept["gradient"] = new_P
        return contribution


@component
class MimeLite(GradientRule):
    """Steps along (1 - beta) g + beta m (Karimireddy et al. 2021, Mime, Algorithm 1: MimeLite with SGDm).

    Breaking the centralized barrier for cross-device federated learning. m is the server's momentum. It is constant
    during a round and then becomes beta m + (1 - beta) times the mean of the silos' full gradients at w_t, which take
    one more pass over the silo's samples. Deviation: the mean uses the aggregator's weights, samples by default.
    """

    beta: Decay = 0.9
    """decay of m"""

    @property
    def auxiliaries(self) -> tuple[Auxiliary, ...]:
        return (Auxiliary("momentum", "cohort", decay=self.beta, gain=1 - self.beta),)

    @pydantic.model_validator(mode="after")
    def _plain(self) -> MimeLite:
        if self.optimizer.target is not torch.optim.SGD or self.optimizer.arguments.get("momentum", 0):
            raise ValueError(
                "optimizer: mime_lite keeps the momentum on the server; local steps need SGD without momentum"
            )
        return self

    def most_batches(self, silo: str, rounds: int) -> float:
        return math.inf  # the full gradient reads all samples

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        whole_gradient(silo, model, params_P, round, self.pass_size, self.precision, self.last_batch != "keep")
        gradient_P = gradient_vector(model, params_P)
        correct = corrected(model, round.auxiliary["momentum"] * self.beta, scale=1 - self.beta)
        contribution = local_steps(self, silo, model, params_P, round, correct)
        contribution["momentum"].copy_(gradient_P)
        return contribution


RULES = {
    "scaffold": Scaffold,
    "feddyn": FedDyn,
    "gradient_correction": GradientCorrection,
    "mime_lite": MimeLite,
}
