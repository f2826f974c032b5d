"""How the aggregate moves the global parameters: the server optimizers.

    params_P, state = optimizer.step(params_P, mean_P, state)

P parameters, or any slice of them: every step is elementwise, so that shards of the vector step by themselves and give
the bits that the whole would. `mean_P` is the mean delta (local minus global) and is ADDED: papers that write a pseudo
gradient (global minus local) subtract it. A step never writes `params_P`; it takes over the memory of `mean_P` for the
new parameters and the memory of `state` for the new state, and allocates one block and nothing of the model's size.

Every operation here is one of + - * / and the square root, each correctly rounded, so ranks on different processors
that take the same step hold the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from fedmpi.components import Decay, Family, NonNegativeFloat, PositiveFloat, component

Tensor = torch.Tensor

BLOCK_CPU = 1 << 18  # elements; five blocks of float32 stay in cache, four times as fast as whole vectors
BLOCK_DEVICE = 1 << 24  # elements; large enough that launching kernels costs nothing


class NoState(NamedTuple):
    """Nothing is kept from round to round."""


class Momentum(NamedTuple):
    """The running sum of deltas."""

    v_P: Tensor


class Moments(NamedTuple):
    """The running mean of deltas, and the sum or mean of their squares."""

    m_P: Tensor
    v_P: Tensor


class ServerOptimizer(Protocol):
    """What the round asks of a server optimizer; states are NamedTuples of tensors as long as the parameters."""

    def init(self, params_P: Tensor) -> Any:
        """The state before the first step."""
        ...

    def step(self, params_P: Tensor, mean_P: Tensor, state: Any) -> tuple[Tensor, Any]:
        """New parameters and new state, in the memory of `mean_P` and of `state`."""
        ...


@component
class FedAvg:
    """w + lr mean: the server as SGD (McMahan et al. 2017, Algorithm 1; with lr, Reddi et al. 2021, Algorithm 1).

    >>> w, delta = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.5])
    >>> FedAvg().step(w, delta, NoState())[0]
    tensor([1.5000, 1.5000])
    """

    lr: PositiveFloat = 1.0  # step size; 1 is the plain mean of the silos' parameters

    def init(self, params_P: Tensor) -> NoState:
        """Nothing."""
        return NoState()

    def step(self, params_P: Tensor, mean_P: Tensor, state: NoState) -> tuple[Tensor, NoState]:
        """New parameters, in the memory of `mean_P`."""
        for w, delta, _ in _blocks(params_P, mean_P):
            delta.mul_(self.lr).add_(w)
        return mean_P, state


@component
class FedAvgM:
    """v = beta v + delta, w + lr v: momentum on the server (Hsu et al. 2019, FedAvgM; it has no algorithm number).

    Reddi et al. 2021, Algorithm 1 with SGD of momentum as ServerOpt is the same. Not Nesterov, and not damped by
    1 - beta. The paper has no lr; 1 is the paper.

    >>> w, optimizer = torch.zeros(1), FedAvgM(beta=0.5)
    >>> w, state = optimizer.step(w, torch.ones(1), optimizer.init(w))
    >>> optimizer.step(w, torch.ones(1), state)[0]
    tensor([2.5000])
    """

    lr: PositiveFloat = 1.0  # step size
    beta: Decay = 0.9  # decay of the sum of the deltas

    def init(self, params_P: Tensor) -> Momentum:
        """v = 0."""
        return Momentum(torch.zeros_like(params_P))

    def step(self, params_P: Tensor, mean_P: Tensor, state: Momentum) -> tuple[Tensor, Momentum]:
        """New parameters in the memory of `mean_P`, new state in that of `state`."""
        for w, delta, v, _ in _blocks(params_P, mean_P, state.v_P):
            v.mul_(self.beta).add_(delta)
            torch.mul(v, self.lr, out=delta).add_(w)
        return mean_P, state


@component
class FedAdagrad:
    """Adagrad on the server (Reddi et al. 2021, Algorithm 2): v = v + delta**2; v starts at tau**2 unless v0 is given.

    beta1 is 0 by default, as in the paper's experiments; Algorithm 2 has it for every variant.
    """

    lr: PositiveFloat = 1e-2  # step size
    beta1: Decay = 0.0  # decay of the mean of the deltas
    tau: PositiveFloat = 1e-3  # added to the square root: smaller is more adaptive
    v0: NonNegativeFloat | None = None  # where v starts; null: tau**2

    def init(self, params_P: Tensor) -> Moments:
        """m = 0, v = v0."""
        return _moments(params_P, self.v0, self.tau)

    def step(self, params_P: Tensor, mean_P: Tensor, state: Moments) -> tuple[Tensor, Moments]:
        """New parameters in the memory of `mean_P`, new state in that of `state`."""

        def accumulate(v: Tensor, square: Tensor, spare: Tensor) -> None:
            v.add_(square)

        return _algorithm_2(self, params_P, mean_P, state, accumulate)


@component
class FedAdam:
    """Adam on the server (Reddi et al. 2021, Algorithm 2): v starts at tau**2 unless v0 is given, no bias correction.

    v = beta2 v + (1 - beta2) delta**2

    >>> w, optimizer = torch.zeros(1), FedAdam(lr=1.0, beta1=0.0, beta2=0.75, tau=1e-9, v0=0.0)
    >>> optimizer.step(w, torch.ones(1), optimizer.init(w))[0]
    tensor([2.])
    """

    lr: PositiveFloat = 1e-2  # step size
    beta1: Decay = 0.9  # decay of the mean of the deltas
    beta2: Decay = 0.99  # decay of the mean of their squares
    tau: PositiveFloat = 1e-3  # added to the square root: smaller is more adaptive
    v0: NonNegativeFloat | None = None  # where v starts; null: tau**2

    def init(self, params_P: Tensor) -> Moments:
        """m = 0, v = v0."""
        return _moments(params_P, self.v0, self.tau)

    def step(self, params_P: Tensor, mean_P: Tensor, state: Moments) -> tuple[Tensor, Moments]:
        """New parameters in the memory of `mean_P`, new state in that of `state`."""

        def decay(v: Tensor, square: Tensor, spare: Tensor) -> None:
            v.mul_(self.beta2).add_(square.mul_(1 - self.beta2))

        return _algorithm_2(self, params_P, mean_P, state, decay)


@component
class FedYogi:
    """Yogi on the server (Reddi et al. 2021, Algorithm 2): v starts at tau**2 unless v0 is given, no bias correction.

    v = v - (1 - beta2) delta**2 sign(v - delta**2)
    """

    lr: PositiveFloat = 1e-2  # step size
    beta1: Decay = 0.9  # decay of the mean of the deltas
    beta2: Decay = 0.99  # how slowly v follows their squares
    tau: PositiveFloat = 1e-3  # added to the square root: smaller is more adaptive
    v0: NonNegativeFloat | None = None  # where v starts; null: tau**2

    def init(self, params_P: Tensor) -> Moments:
        """m = 0, v = v0."""
        return _moments(params_P, self.v0, self.tau)

    def step(self, params_P: Tensor, mean_P: Tensor, state: Moments) -> tuple[Tensor, Moments]:
        """New parameters in the memory of `mean_P`, new state in that of `state`."""

        def approach(v: Tensor, square: Tensor, spare: Tensor) -> None:
            sign = torch.sub(v, square, out=spare).sign_()
            v.sub_(square.mul_(1 - self.beta2).mul_(sign))

        return _algorithm_2(self, params_P, mean_P, state, approach)


def _moments(params_P: Tensor, v0: float | None, tau: float) -> Moments:
    return Moments(torch.zeros_like(params_P), torch.full_like(params_P, tau**2 if v0 is None else v0))


def _algorithm_2(
    optimizer: FedAdagrad | FedAdam | FedYogi,
    params_P: Tensor,
    mean_P: Tensor,
    state: Moments,
    follow: Callable[[Tensor, Tensor, Tensor], None],
) -> tuple[Tensor, Moments]:
    """The lines that the variants share; `follow(v, square, spare)` moves v in place and may use up the other two."""
    for w, delta, m, v, scratch in _blocks(params_P, mean_P, state.m_P, state.v_P):
        m.mul_(optimizer.beta1).add_(torch.mul(delta, 1 - optimizer.beta1, out=scratch))
        follow(v, torch.mul(delta, delta, out=scratch), delta)
        root = _sqrt(v, out=scratch).add_(optimizer.tau)
        torch.div(m, root, out=delta).mul_(optimizer.lr).add_(w)
    return mean_P, state


def _blocks(*vectors_P: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching blocks of the vectors, each tuple with a scratch block of the same length at its end."""
    num_params = vectors_P[0].numel()
    block = min(num_params, BLOCK_CPU if vectors_P[0].device.type == "cpu" else BLOCK_DEVICE)
    scratch = torch.empty_like(vectors_P[0][:block])
    for start in range(0, num_params, max(block, 1)):
        parts = [vector[start : start + block] for vector in vectors_P]
        yield *parts, scratch[: parts[0].numel()]


def _sqrt(v: Tensor, out: Tensor) -> Tensor:
    """Square roots, correctly rounded. On a CPU by numpy: torch's come from MKL, often one bit off."""
    if v.device.type == "cpu":
        np.sqrt(v.numpy(), out=out.numpy())
        return out
    return torch.sqrt(v, out=out)


OPTIMIZERS = Family(
    "server optimizer",
    {
        "fedavg": FedAvg,
        "fedavgm": FedAvgM,
        "fedadagrad": FedAdagrad,
        "fedadam": FedAdam,
        "fedyogi": FedYogi,
    },
)
