"""Rules that give each silo a personal model.

    personal layers         FedRep; FedPer and FedBN need no rule, see docs/personalization.md
    a full personal model   Ditto, APFL: kept beside the shared parameters, never sent
    a good starting point   Per-FedAvg: good after a few steps of the silo's own; Reptile is `sgd` with a server lr

A full personal model is kept as `own_params` [P]. Its other state (personal layers, statistics, optimizer) is kept as
`own_` and its name.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import pydantic
import torch
from torch.func import functional_call

from fedmpi.components import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, component
from fedmpi.errors import ConfigError
from fedmpi.flat import Entry, FlatModel
from fedmpi.local.base import GradientRule, LocalSilo, Round, local_steps
from fedmpi.local.corrections import pulled
from fedmpi.local.gradients import gradient
from fedmpi.local.optimizers import plain_step
from fedmpi.local.workload import Whole
from fedmpi.types import Contribution

OWN = "own_"


def unprefixed(silo: LocalSilo, prefix: str = OWN) -> LocalSilo:
    """The silo with the kept state of its second model: entries that start with `prefix`, renamed without it."""
    return replace(silo, kept={n.removeprefix(prefix): t for n, t in silo.kept.items() if n.startswith(prefix)})


def prefixed(kept: Mapping[str, torch.Tensor], prefix: str = OWN) -> dict[str, torch.Tensor]:
    """The same entries with `prefix` before their names; the inverse of `unprefixed`."""
    return {prefix + name: tensor for name, tensor in kept.items()}


@component
class Ditto(GradientRule):
    """A personal model v_k beside the global one: v_k steps along g(v_k) + lam (v_k - w_t), w as in FedAvg (Li et al.
    2021, Ditto, Algorithm 1). lam 0 trains v_k alone; a larger lam keeps it closer to the global model.

    Deviations: v_k starts from w_t of the silo's first round instead of w_0; both models see the same batches; any
    optimizer of torch.optim. Two gradients per step: twice the time of `sgd`.
    """

    kept_vectors: ClassVar[int] = 1
    lam: NonNegativeFloat = 0.1
    """lambda: strength of the pull of v_k towards the global model"""
    personal_lr: PositiveFloat | None = None
    """step size of v_k; null: lr"""
    personal_steps: PositiveInt | None = None
    """s: steps of v_k per round, independent of `amount`; null: as many as the global model's"""

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        own = unprefixed(silo)
        v_P = own.kept.pop("params", params_P).to(model.device)
        pull = pulled(model, self.lam, model.as_loaded(params_P) * -self.lam)
        moved_P = local_steps(self._personal_work(), own, model, v_P, round, pull)["delta"]
        own.kept["params"] = v_P + moved_P
        contribution = local_steps(self, silo, model, params_P, round)
        silo.kept |= prefixed(own.kept)
        return contribution

    def most_batches(self, silo: str, rounds: int) -> float:
        return max(super().most_batches(silo, rounds), (self.personal_steps or 0) * rounds)

    def _personal_work(self) -> GradientRule:
        lr = self.personal_lr or self.lr
        if self.personal_steps is None:
            return replace(self, lr=lr)
        return replace(self, lr=lr, steps=self.personal_steps, epochs=None, amount=Whole())

    def personal(self, silo: LocalSilo, params_P: torch.Tensor) -> torch.Tensor | None:
        """v_k [P]; None before the silo has trained."""
        return silo.kept.get("own_params")


@component
class Apfl(GradientRule):
    """A personal model alpha v_k + (1 - alpha) w: v_k is the silo's own, w as in FedAvg (Deng et al. 2020, Adaptive
    Personalized Federated Learning, Algorithm 1).

    Each step updates w along g(w); v_k along the gradient of the mixture's loss by v_k, alpha g(mixture); and alpha
    along the one by alpha, <v_k - w, g(mixture)>, with step size lr and clamped to 0..1. All three use the values
    before the step. With `adapt: false` alpha is fixed: the interpolation of Mansour et al. 2020 (MAPPER), who take
    alpha from a grid and update w along the mixture's gradient.

    Deviations: v_k starts from w_t of the silo's first round; w is weighted by samples; any optimizer of torch.optim,
    v_k's starts anew every round; statistics (batch normalization) are v_k's own in training and mixed like the
    parameters in use. Two gradients per step: twice the time of `sgd`.
    """

    kept_vectors: ClassVar[int] = 1
    splits: ClassVar[bool] = False
    reads_rate: ClassVar[bool] = True
    alpha: Fraction = 0.5
    """share of v_k (the first one, if it adapts)"""
    adapt: bool = True
    """train alpha along its gradient, separately for each silo"""

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        module, device = model.module, model.device
        own = unprefixed(silo)
        fresh = {"params": params_P, "alpha": torch.tensor(self.alpha, dtype=torch.float64), **model.first_personal}
        kept = {name: own.kept.get(name, first).to(device, copy=True) for name, first in fresh.items()}
        alpha = kept["alpha"].requires_grad_(self.adapt)
        tensors = model.named(kept["params"], kept)
        in_module = model.tensors
        leaves = {e.name: tensors[e.name].requires_grad_() for e in model.entries if e.trainable and e.name in tensors}
        mixed = {e.name for e in model.entries if e.kind == "shared" and e.trainable}
        statistics = tensors.keys() - leaves.keys()
        dtypes = {e.name: e.dtype for e in model.entries}
        rate = self.rate(round)
        optimizer = self.optimizer.target(leaves.values(), lr=rate, **self.optimizer.arguments)
        step = plain_step(optimizer)

        def mixture() -> dict[str, torch.Tensor]:
            found = dict(tensors)
            for name in mixed:
                found[name] = alpha * leaves[name] + (1 - alpha) * in_module[name].detach()
            return model.with_views({name: tensor.to(dtypes[name]) for name, tensor in found.items()})

        def personal_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            found = mixture()
            optimizer.zero_grad()
            gradient(model, (x, y), lambda x, y: round.loss(functional_call(module, found, (x,)), y), self.precision)
            for name in statistics:
                if found[name] is not tensors[name]:  # a half-precision copy
                    tensors[name].copy_(found[name])
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(leaves.values(), self.clip)
            with torch.no_grad():
                step()
                if alpha.grad is not None:
                    alpha.sub_(alpha.grad, alpha=rate).clamp_(0, 1)
                    alpha.grad = None
            return round.loss(module(x), y)

        contribution = local_steps(self, silo, model, params_P, round, batch_loss=personal_step)
        silo.kept |= prefixed({name: tensor.detach() for name, tensor in kept.items()})
        return contribution

    def personal(self, silo: LocalSilo, params_P: torch.Tensor) -> torch.Tensor | None:
        """alpha v_k + (1 - alpha) w, [P]; None before the silo has trained."""
        if "own_params" not in silo.kept:
            return None
        return torch.lerp(params_P, silo.kept["own_params"].to(params_P.device), float(silo.kept["own_alpha"]))


@component
class FedRep(GradientRule):
    """Train the head with the body frozen, then the body with the head frozen (Collins et al. 2021, Algorithm 1). The
    head is what `exchange.parameters` leaves out; only the body's delta is sent.

    `epochs` or `steps` count for the body; the paper takes one. Deviations: any optimizer of torch.optim; deltas are
    weighted by samples; the body's batches continue after the head's. A step is one gradient of one part.
    """

    head_epochs: PositiveInt | None = None
    """passes over the silo's samples for the head, independent of `amount`; or give `head_steps`"""
    head_steps: PositiveInt | None = None
    """batches for the head"""
    head_lr: PositiveFloat | None = None
    """step size of the head; null: lr"""

    @pydantic.model_validator(mode="after")
    def _one_head(self) -> FedRep:
        if (self.head_epochs is None) == (self.head_steps is None):
            raise ValueError("give either 'head_epochs' or 'head_steps'")
        return self

    def suits(self, module: torch.nn.Module, entries: Sequence[Entry], ids: Sequence[str]) -> None:
        """Raise ConfigError if the model has no personal head or no shared body to train."""
        super().suits(module, entries, ids)
        kinds = {entry.kind for entry in entries if entry.trainable}
        if "personal" not in kinds:
            raise ConfigError(
                "local: fedrep trains a head that stays with its silo, but all trained parameters are shared; leave "
                "the head out with exchange.parameters, such as ['*', '!head.*']"
            )
        if "shared" not in kinds:
            raise ConfigError("local: fedrep trains a shared body, but no trained parameter is shared")

    def most_batches(self, silo: str, rounds: int) -> float:
        return math.inf if self.head_steps is None else super().most_batches(silo, rounds) + self.head_steps * rounds

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        at_head = unprefixed(silo, "head_")
        at_head.kept |= {name: silo.kept[name] for name in model.first_personal if name in silo.kept}
        lr, epochs, steps = self.head_lr or self.lr, self.head_epochs, self.head_steps
        work = replace(self, lr=lr, epochs=epochs, steps=steps, amount=Whole())
        with _only(model, "personal"):
            head = local_steps(work, at_head, model, params_P, round)
        silo.cursor = at_head.cursor
        silo.kept |= {name: tensor for name, tensor in at_head.kept.items() if name in model.first_personal}
        with _only(model, "shared"):
            body = local_steps(self, silo, model, params_P, round)
        silo.kept |= prefixed({n: t for n, t in at_head.kept.items() if n not in model.first_personal}, "head_")
        num_samples = head.num_samples + body.num_samples
        num_targets = head.counted + body.counted
        body.loss = (head.loss * head.counted + body.loss * body.counted) / (num_targets or 1)
        body.normalizer = body.num_gradients
        body.num_samples, body.num_steps = num_samples, head.num_steps + body.num_steps
        body.num_targets = num_targets
        return body


@contextlib.contextmanager
def _only(model: FlatModel, kind: str) -> Iterator[None]:
    """Freeze all parameters but those of this kind; trainable again on exit."""
    still = [model.tensors[e.name] for e in model.entries if e.trainable and e.kind != kind]
    for tensor in still:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in still:
            tensor.requires_grad_(True)


@component
class PerFedAvg(GradientRule):
    """A global model that is good after one gradient step per silo: steps of lr along g(w - inner_lr g(w, D), D')
    (Fallah et al. 2020, Personalized Federated Learning: A Meta-Learning Approach, Algorithm 1, first order: the
    paper's approximation (i), without the Hessian).

    A silo's personal model is one step away; `evaluate.finetune: {name: sgd, lr: INNER_LR, steps: 1}` scores it.
    Deviations: D and D' are the halves of one batch (both the whole batch if it has fewer than four samples); any
    optimizer of torch.optim; deltas are weighted by samples. Two gradients per step, of half a batch each.
    """

    inner_lr: PositiveFloat
    """alpha: step size of the silo's own step"""
    splits: ClassVar[bool] = False

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        module = model.module
        trained = {name: param for name, param in module.named_parameters() if param.requires_grad}

        def after_a_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            half = (len(x) + 1) // 2
            first, second = (slice(half), slice(half, None)) if len(x) > 3 else (slice(None), slice(None))
            loss = round.loss(module(x[first]), y[first])
            grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            moved = {  # autograd.grad returns constants here, which makes this first order
                name: param if grad is None else param - self.inner_lr * grad
                for (name, param), grad in zip(trained.items(), grads, strict=True)
            }
            return round.loss(functional_call(module, moved, (x[second],)), y[second])

        return local_steps(self, silo, model, params_P, round, batch_loss=after_a_step)


RULES = {"ditto": Ditto, "apfl": Apfl, "fedrep": FedRep, "per_fedavg": PerFedAvg}
