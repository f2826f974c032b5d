"""Optimizers of local rules: torch.optim and EmaSGD, the state kept between rounds, and FedNova's normaliser."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from fedmpi.components import Deferred, Family, did_you_mean
from fedmpi.errors import ConfigError
from fedmpi.flat import HALF, RESERVED

KEPT = f"{RESERVED}optimizer_"  # then NUMBER_NAME: keys of an optimizer's state in a silo's kept state


class EmaSGD(torch.optim.Optimizer):
    """SGD with an exponential mean of gradients: m = beta m + (1 - beta) g, w = w - lr m; m starts at 0, no bias
    correction.

    torch.optim.SGD instead sums gradients (buf = momentum buf + g); with `dampening` buf starts at the first gradient.
    """

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float = 1e-3, beta: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {beta}")
        if weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step, in place."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "mean" not in state:
                    state["mean"] = torch.zeros_like(param)
                gradient = param.grad
                if group["weight_decay"]:
                    gradient = gradient.add(param, alpha=group["weight_decay"])
                mean = state["mean"].mul_(group["beta"]).add_(gradient, alpha=1 - group["beta"])
                param.add_(mean, alpha=-group["lr"])


def _spare_compiler() -> None:
    """Keep torch from importing its compiler when an optimizer is made.

    torch imports it and sympy, 800 modules and over a second on every rank, only to exclude a few methods from
    compilation.
    """
    if "torch._dynamo" not in sys.modules:
        for method in ("add_param_group", "zero_grad"):
            plain = inspect.unwrap(getattr(torch.optim.Optimizer, method))
            plain.__dynamo_disable = plain  # type: ignore[attr-defined]


def plain_step(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """The optimizer's step without the wrappers that import the compiler. Call it under torch.no_grad()."""
    return functools.partial(inspect.unwrap(type(optimizer).step), optimizer)


_spare_compiler()


class _TorchOptimizers(Family):
    """The optimizers of torch.optim that need no closure, as {name: SGD, momentum: 0.9}, and EmaSGD."""

    def __init__(self) -> None:
        closed = ("Optimizer", "LBFGS", "SparseAdam")
        found = {n: c for n, c in vars(torch.optim).items() if isinstance(c, type) and n not in closed}
        found = {n: c for n, c in found.items() if issubclass(c, torch.optim.Optimizer)}
        super().__init__("optimizer", found | {"EmaSGD": EmaSGD}, outside=False)

    def build(self, value: Any, path: str) -> Deferred:
        if isinstance(value, Deferred):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ConfigError(f"{path}: needs a 'name' from torch.optim: {', '.join(self.members)}")
        arguments = {k: v for k, v in value.items() if k != "name"}
        cls = self.find(value["name"], path)
        takes = [n for n in inspect.signature(cls).parameters if n not in ("params", "lr")]
        for name in arguments:
            if name == "lr":
                raise ConfigError(f"{path}.lr: the learning rate is local.lr")
            if name not in takes:
                raise ConfigError(f"{path}: optimizer '{cls.__name__}' has no '{name}'{did_you_mean(str(name), takes)}")
        try:
            cls([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.1, **arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{path}: {error}") from None
        return Deferred(value["name"], cls, arguments)


TORCH_OPTIMIZERS = _TorchOptimizers()


def num_gradients(
    optimizer: Deferred, num_steps: int, pull: float = 0.0, lengths: Sequence[float] | None = None
) -> float | None:
    """FedNova's normaliser |a|_1: the sum of the weights that gradients have in the delta of `num_steps` steps, in
    units of lr (Wang et al. 2020, Tackling the Objective Inconsistency Problem, section 4). None if a step is not
    linear in the gradients.

    tau steps of SGD give tau; with momentum rho (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho); with a proximal term
    (1 - (1 - pull)^tau) / pull, where `pull` is lr mu. One recursion gives all of these, Nesterov momentum, dampening
    and EmaSGD: h(j) is how far a gradient has moved the parameters j steps after its own. Weight decay counts as part
    of the loss. `lengths` [num_steps] are factors that gradients were multiplied with before the optimizer saw them.
    Gradients of earlier rounds in a kept momentum buffer are not counted.

    >>> sgd = torch.optim.SGD
    >>> num_gradients(Deferred("SGD", sgd, {}), 3), num_gradients(Deferred("SGD", sgd, {"momentum": 0.5}), 3)
    (3.0, 4.25)
    >>> num_gradients(Deferred("SGD", sgd, {}), 2, pull=0.25), num_gradients(Deferred("Adam", torch.optim.Adam, {}), 3)
    (1.75, None)
    """
    takes, nesterov = optimizer.arguments, False
    if optimizer.target is EmaSGD:
        rho = float(takes.get("beta", 0.9))
        enters = first = 1 - rho
    elif optimizer.target is torch.optim.SGD and not takes.get("maximize", False):
        rho = float(takes.get("momentum", 0.0))
        enters, first = (1 - float(takes.get("dampening", 0.0)) if rho else 1.0), 1.0
        nesterov = bool(takes.get("nesterov", False))
    else:
        return None
    if not rho and not pull:
        return first * (float(num_steps) if lengths is None else math.fsum(lengths))
    total = moved = buffer = 0.0
    for j in range(num_steps):
        gradient = 1.0 if j == 0 else -pull * moved
        buffer = rho * buffer + (gradient if j == 0 else enters * gradient)
        moved += gradient + rho * buffer if nesterov else buffer
        length = 1.0 if lengths is None else lengths[num_steps - 1 - j]
        total += abs(moved) * length * (first if j == num_steps - 1 else enters)  # the last h is the first gradient's
    return total


def state_to_keep(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """A copy of an optimizer's state, by key for the silo's kept state. Half precision is stored as float32."""
    kept = {}
    for number, param in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for name, value in optimizer.state.get(param, {}).items():
            if value is not None:
                tensor = torch.as_tensor(value).detach()
                dtype = torch.float32 if tensor.dtype in HALF else tensor.dtype
                kept[f"{KEPT}{number}_{name}"] = tensor.to(dtype, copy=True)
    return kept


def put_back(optimizer: torch.optim.Optimizer, kept: Mapping[str, torch.Tensor]) -> None:
    """Load what `state_to_keep` returned into a new optimizer. It copies: later steps do not change `kept`."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in kept.items():
        if name.startswith(KEPT):
            number, _, key = name.removeprefix(KEPT).partition("_")
            param = params[int(number)]
            group = next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))
            on_device = group.get("capturable") or group.get("fused") or key != "step"  # as torch loads a state
            device = param.device if on_device else "cpu"
            dtype = param.dtype if value.dtype == torch.float32 and param.dtype in HALF and value.dim() else value.dtype
            optimizer.state[param][key] = value.to(device, dtype, copy=True)
