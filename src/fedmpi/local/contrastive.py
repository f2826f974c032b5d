"""MOON: gradient steps with a loss that compares representations of several models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F

from fedmpi.components import NonNegativeFloat, PositiveFloat, component, did_you_mean
from fedmpi.errors import ConfigError
from fedmpi.flat import Entry, FlatModel
from fedmpi.local.base import GradientRule, LocalSilo, Round, kept_vector, local_steps
from fedmpi.types import Contribution


@component
class Moon(GradientRule):
    """Steps on the loss plus mu times a model-contrastive loss (Li, He and Song 2021, MOON, Algorithm 1).

    The contrastive loss is the batch's mean of
    -log(e^(sim(z, z_glob)/tau) / (e^(sim(z, z_glob)/tau) + e^(sim(z, z_prev)/tau))), where sim is the cosine
    similarity, and z, z_glob and z_prev are representations by the current model, the global model, and the model that
    the silo last sent.

    The representation is the input of the model's last Linear layer, or the output of the module named `features`. The
    paper uses a projection head there; the model must bring its own. Deviations: no contrastive loss in a silo's first
    round, which has no previous model; the two fixed models run in evaluation mode (no dropout, running statistics of
    normalisation), with the silo's current personal parameters.
    """

    mu: NonNegativeFloat = 1.0
    """weight of the contrastive loss; 0 gives FedAvg"""
    temperature: PositiveFloat = 0.5
    """tau"""
    features: str | None = None
    """module whose output is the representation; null: the input of the last Linear layer"""
    kept_vectors: ClassVar[int] = 1
    splits: ClassVar[bool] = False

    def suits(self, module: torch.nn.Module, entries: Sequence[Entry], ids: Sequence[str]) -> None:
        """Raise ConfigError if the model has no representation to compare."""
        super().suits(module, entries, ids)
        if self.features is not None:
            known = dict(module.named_modules())
            if self.features not in known:
                raise ConfigError(
                    f"local.features: the model has no module '{self.features}'{did_you_mean(self.features, known)}"
                )
            return
        last = _last_linear(module)
        if last is None:
            raise ConfigError("local.features: the model has no Linear layer; name the module whose output to compare")
        if {id(p) for p in module.parameters()} <= {id(p) for p in last.parameters()}:
            raise ConfigError("local: moon compares hidden representations, and this model is a single layer")

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        previous_P, module = kept_vector(silo, "previous", params_P), model.module
        seen: list[torch.Tensor] = []
        handle = self._watch(module, seen)

        def representation(named: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            torch.func.functional_call(module, named, (x,))
            return seen.pop().flatten(1)

        def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            outputs = module(x)
            z = seen.pop().flatten(1)
            module.eval()
            with torch.no_grad():
                z_others = [representation(named, x) for named in fixed]
            module.train()
            sims = torch.stack([F.cosine_similarity(z, other) for other in z_others]) / self.temperature
            return round.loss(outputs, y) + self.mu * (sims.logsumexp(0) - sims[0]).mean()

        try:
            if previous_P is None or not self.mu:
                contribution = local_steps(self, silo, model, params_P, round)
            else:
                fixed = [model.shared(params_P), model.shared(previous_P)]
                contribution = local_steps(self, silo, model, params_P, round, batch_loss=loss)
        finally:
            handle.remove()
        silo.kept["previous"] = params_P + contribution["delta"]
        return contribution

    def _watch(self, module: torch.nn.Module, seen: list[torch.Tensor]) -> torch.utils.hooks.RemovableHandle:
        """Install a hook: every forward pass replaces the contents of `seen` by its representation."""

        def keep(found: torch.Tensor) -> None:
            seen[:] = [found]

        if self.features is not None:
            return module.get_submodule(self.features).register_forward_hook(lambda m, args, output: keep(output))
        last = _last_linear(module)
        assert last is not None
        return last.register_forward_pre_hook(lambda m, args: keep(args[0]))


def _last_linear(module: torch.nn.Module) -> torch.nn.Linear | None:
    """The Linear layer that the model registered last, or None."""
    found = [part for part in module.modules() if isinstance(part, torch.nn.Linear)]
    return found[-1] if found else None


RULES = {"moon": Moon}
