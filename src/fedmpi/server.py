"""Server optimizers: how the aggregate moves the global parameters.

    params_P, state = optimizer.step(params_P, mean_P, state)

P is the number of parameters, or of any slice: steps are elementwise, so shards step alone and give the same bits.
`mean_P` is the mean delta (local minus global) and is ADDED; papers that use a pseudo gradient (global minus local)
subtract it. A step never writes `params_P`. It reuses the memory of `mean_P` for the new parameters and of `state` for
the new state, and allocates one small block.

Steps use only + - * / and the square root, each correctly rounded, so ranks on different processors get the same bits.

`Average` is not an optimizer: it averages the parameters over rounds for evaluation.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

import numpy as np
import torch

from fedmpi.aggregate import Mean
from fedmpi.components import Decay, Family, Fraction, NonNegativeFloat, PositiveFloat, called, component
from fedmpi.layout import Layout, within
from fedmpi.schedules import SCHEDULES, Constant, Schedule

if TYPE_CHECKING:
    from fedmpi.config import Config

Tensor = torch.Tensor
OnMean = Callable[[Tensor, int], None]

BLOCK_CPU = 1 << 18  # elements; five blocks of float32 stay in cache, four times as fast as whole vectors
BLOCK_DEVICE = 1 << 24  # elements; large enough that launching kernels costs nothing


class NoState(NamedTuple):
    """No state."""


class Momentum(NamedTuple):
    """The running sum of deltas."""

    v_P: Tensor


class MeanDelta(NamedTuple):
    """The running mean of deltas."""

    m_P: Tensor


class Moments(NamedTuple):
    """The running mean of deltas, and the sum or mean of their squares."""

    m_P: Tensor
    v_P: Tensor


class Dynamic(NamedTuple):
    """The mean over all silos of their h_k (local/control_variates.py)."""

    h_P: Tensor


class ServerOptimizer:
    """Base class of server optimizers. A state is a NamedTuple of tensors [P]."""

    @abstractmethod
    def init(self, params_P: Tensor) -> Any:
        """The state before the first step."""

    def at(self, number: int, rounds: int, fraction: float) -> ServerOptimizer:
        """The optimizer that takes the step of round `number`, counted from 1, of `rounds`. `fraction` is the share of
        all silos' weight whose updates were accepted."""
        return self

    def conflicts(self, config: Config) -> str | None:
        """Why the optimizer cannot work with the rest of the configuration, in one line; None if it can."""
        return None

    @abstractmethod
    def step(self, params_P: Tensor, mean_P: Tensor, state: Any) -> tuple[Tensor, Any]:
        """New parameters [P] and new state, in the memory of `mean_P` and of `state`."""


class ReadsNorms(ServerOptimizer):
    """Base of optimizers whose step depends on the norms of the deltas and of their mean. Their own `step` is the one
    without that knowledge."""

    @abstractmethod
    def knowing(self, squares: float, square: float) -> ServerOptimizer:
        """The optimizer that takes this round's step: `squares` is sum_k p_k |delta_k|^2, where p_k is the weight of
        delta k in the mean; `square` is |mean|^2."""

    def conflicts(self, config: Config) -> str | None:
        why, regions = f"server.optimizer: {called(self)} uses the norms of", config.exchange.regions
        if not isinstance(config.aggregate, Mean):
            return f"{why} deltas and of their weighted mean; it needs aggregate: mean"
        if config.exchange.fragments > 1:
            return f"{why} whole deltas of one round; it needs exchange.fragments: 1"
        if regions is not None and regions.every > 1:
            return f"{why} one round, and exchange.regions.every is {regions.every}"
        return None


@dataclass(frozen=True)
class Server:
    """The server's step of one round, on any slice of the exchanged vector. The optimizer moves the parameters; the
    auxiliary vectors after them follow their own rule (layout.Segment).

    Statistics of batch normalization are not trained: they become the mean of the silos' values, independent of the
    optimizer and `scale`, because momentum or a long step could make variances negative.
    """

    optimizer: ServerOptimizer
    layout: Layout | None = None  # of the exchanged vector; None: parameters only
    scale: float = 1.0  # factor on the mean delta before the optimizer
    share: float = 1.0  # share of all weight in the mean, in this round's units
    sent: float = 1.0  # sent weight / base weight of the accepted updates
    on_mean: OnMean | None = None  # changes elements of the mean delta first; gets them and their start index
    squares: float = 0.0  # sum_k p_k |delta_k|^2, for ReadsNorms

    @property
    def reads_norms(self) -> bool:
        """Whether `look` must see the whole mean, and `knowing` its result, before the first step."""
        return isinstance(self.optimizer, ReadsNorms)

    def look(self, mean_S: Tensor, start: int = 0) -> float:
        """The sum of squares of the parameters among S elements from `start` on, after `on_mean` changed them in
        place."""
        num = len(mean_S) if self.layout is None else max(0, min(len(mean_S), self.layout.num_params - start))
        if num and self.on_mean is not None:
            self.on_mean(mean_S[:num], start)
        parts = (mean_S[i : min(i + BLOCK_CPU, num)].double() for i in range(0, num, BLOCK_CPU))
        return math.fsum(float(torch.dot(part, part)) for part in parts)

    def knowing(self, square: float) -> Server:
        """The server that takes the steps, given the sum of the results of `look`."""
        assert isinstance(self.optimizer, ReadsNorms)
        optimizer = self.optimizer.knowing(self.scale * self.squares, self.scale**2 * square)
        return replace(self, optimizer=optimizer, on_mean=None)

    @property
    def _plain(self) -> bool:
        """Whether parameters are moved by the optimizer and nothing else."""
        return self.scale == 1.0 and self.on_mean is None and (self.layout is None or self.layout.steps_alone)

    @property
    def adds(self) -> bool:
        """Whether the step is params + mean for all elements."""
        optimizer, layout = self.optimizer, self.layout
        alone = layout is None or not layout.auxiliaries
        return self._plain and alone and type(optimizer) is FedAvg and optimizer.lr == 1.0

    @property
    def gain(self) -> float | None:
        """c if the step is params + c mean for all elements, else None."""
        optimizer, layout = self.optimizer, self.layout
        alone = layout is None or (layout.steps_alone and not layout.auxiliaries)
        plain = alone and self.on_mean is None and type(optimizer) is FedAvg
        return optimizer.lr * self.scale if plain and isinstance(optimizer, FedAvg) else None

    def step(self, params_S: Tensor, mean_S: Tensor, state: Any, start: int = 0) -> tuple[Tensor, Any]:
        """New values [S] of the elements from `start` on, and new state, in the memory of `mean_S` and of `state`."""
        layout, stop = self.layout, start + len(mean_S)
        border = stop if layout is None else layout.num_params
        if start < stop <= border and self._plain:  # the common case, without the cost of slicing
            new, _ = self.optimizer.step(params_S, mean_S, state)
            if new.data_ptr() != mean_S.data_ptr():
                mean_S.copy_(new)
            return mean_S, state
        averaged, non_negative = ((), ()) if layout is None else (layout.averaged, layout.non_negative)
        if start < border:
            part = slice(0, min(stop, border) - start)
            mean = mean_S[part]
            if self.on_mean is not None:
                self.on_mean(mean, start)
            means = [(there, params_S[there] + mean[there]) for there in within(averaged, start, part.stop)]
            if self.scale != 1.0:
                mean.mul_(self.scale)
            new, _ = self.optimizer.step(params_S[part], mean, type(state)(*(t[part] for t in state)))
            if new.data_ptr() != mean.data_ptr():
                mean.copy_(new)
            for there, values in means:
                mean[there] = values
            for there in within(non_negative, start, part.stop):
                mean[there].clamp_(min=0.0)
        for auxiliary in () if layout is None else layout.auxiliaries:
            part = slice(max(0, auxiliary.start - start), max(0, min(stop, auxiliary.stop) - start))
            gain = auxiliary.gain * (self.share if auxiliary.normaliser == "population" else self.sent)
            if part.start < part.stop:
                mean_S[part].mul_(gain).add_(params_S[part], alpha=auxiliary.decay)
        return mean_S, state


@component
class Average:
    """The exponential moving average of the parameters over rounds, with bias correction.

    After round t it is a + (w - a) (1 - decay) / (1 - decay**t): the sum of decay**(t - i) w_i over the rounds i up to
    t, divided by the sum of these weights (as Adam corrects its means). With decay 1 all rounds count the same (Polyak
    & Juditsky 1992). It is evaluated only: training continues from the parameters themselves.

    >>> w = torch.tensor([4.0])
    >>> Average(decay=1.0).follow(torch.tensor([1.0]), w, number=3)
    tensor([2.])
    """

    decay: Fraction = 0.99
    """weight of a round relative to the next; 0: only the last round"""

    def conflicts(self, config: Config) -> str | None:
        """It needs the federation's parameters after every round."""
        if config.exchange.overlap:
            return "server.average: with exchange.overlap the parameters of a round arrive a round late"
        if config.exchange.regions is not None and config.exchange.regions.every > 1:
            return "server.average: with exchange.regions.every the parameters of regions differ in between"
        return None

    def follow(self, average_P: Tensor, params_P: Tensor, number: int) -> Tensor:
        """The average after round `number`, counted from 1, in the memory of the one before."""
        gain = 1 / number if self.decay == 1 else (1 - self.decay) / (1 - self.decay**number)
        for a, w, scratch in _blocks(average_P, params_P):
            a.add_(torch.sub(w, a, out=scratch).mul_(gain))
        return average_P


@component
class Scheduled(ServerOptimizer):
    """Base of optimizers with a learning rate schedule."""

    schedule: Annotated[Schedule, SCHEDULES] = Constant()
    """learning rate over rounds"""

    def at(self, number: int, rounds: int, fraction: float) -> Self:
        """The optimizer of one round, with the round's learning rate."""
        before = self.lr  # type: ignore[attr-defined]
        rate = self.schedule.lr(before, number, rounds)
        if rate == before:
            return self
        there = copy.copy(self)
        # Twelve digits: the last bit of a cosine depends on the processor, and all ranks must take the same step.
        # Set without validation: the last round of a cosine may have rate 0.
        object.__setattr__(there, "lr", float(f"{rate:.12g}"))
        return there


@component
class FedAvg(Scheduled):
    """w + lr mean: SGD on the server (McMahan et al. 2017, Algorithm 1; with lr, Reddi et al. 2021, Algorithm 1).

    >>> w, delta = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.5])
    >>> FedAvg().step(w, delta, NoState())[0]
    tensor([1.5000, 1.5000])
    """

    lr: PositiveFloat = 1.0
    """step size; 1 is the plain mean of the silos' parameters"""

    def init(self, params_P: Tensor) -> NoState:
        """Nothing."""
        return NoState()

    def step(self, params_P: Tensor, mean_P: Tensor, state: NoState) -> tuple[Tensor, NoState]:
        """New parameters, in the memory of `mean_P`."""
        for w, delta, _ in _blocks(params_P, mean_P):
            (delta if self.lr == 1.0 else delta.mul_(self.lr)).add_(w)
        return mean_P, state


@component
class FedAvgM(Scheduled):
    """v = beta v + delta, w + lr v: momentum on the server (Hsu et al. 2019, FedAvgM; it has no algorithm number).

    The same as Reddi et al. 2021, Algorithm 1 with SGD with momentum as ServerOpt. There is no damping by 1 - beta (see
    fedgm). lr 1 is the paper, which has no lr. With `nesterov` the step is w + lr (delta + beta v), as in
    torch.optim.SGD: the outer optimizer of DiLoCo (Douillard et al. 2023, Algorithm 1, lr 0.7, beta 0.9).

    >>> w, optimizer = torch.zeros(1), FedAvgM(beta=0.5)
    >>> w, state = optimizer.step(w, torch.ones(1), optimizer.init(w))
    >>> optimizer.step(w, torch.ones(1), state)[0]
    tensor([2.5000])
    """

    lr: PositiveFloat = 1.0
    """step size"""
    beta: Decay = 0.9
    """decay of the sum of the deltas"""
    nesterov: bool = False
    """step by delta + beta v instead of v"""

    def init(self, params_P: Tensor) -> Momentum:
        """v = 0."""
        return Momentum(torch.zeros_like(params_P))

    def step(self, params_P: Tensor, mean_P: Tensor, state: Momentum) -> tuple[Tensor, Momentum]:
        """New parameters in the memory of `mean_P`, new state in that of `state`."""
        for w, delta, v, scratch in _blocks(params_P, mean_P, state.v_P):
            v.mul_(self.beta).add_(delta)
            step = delta.add_(torch.mul(v, self.beta, out=scratch)) if self.nesterov else v
            torch.mul(step, self.lr, out=delta).add_(w)
        return mean_P, state


@component
class FedGM(Scheduled):
    """m = beta m + (1 - beta) delta, w + lr (delta + gamma m): the delta plus damped momentum (Sun et al. 2024, On the
    Role of Server Momentum in Federated Learning, FedGM; quasi-hyperbolic momentum of Ma & Yarats 2019).

    The papers write eta ((1 - nu) delta + nu m), so lr = eta (1 - nu) and gamma = nu / (1 - nu). For a constant delta
    the step converges to lr (1 + gamma) delta for any beta (fedavgm: lr / (1 - beta) delta).

    >>> w, optimizer = torch.zeros(1), FedGM(beta=0.5)
    >>> w, state = optimizer.step(w, torch.ones(1), optimizer.init(w))
    >>> optimizer.step(w, torch.ones(1), state)[0]
    tensor([3.2500])
    """

    lr: PositiveFloat = 1.0
    """step size"""
    beta: Decay = 0.9
    """decay of the mean of the deltas"""
    gamma: NonNegativeFloat = 1.0
    """weight of that mean beside the delta; 0 gives fedavg"""

    def init(self, params_P: Tensor) -> MeanDelta:
        """m = 0."""
        return MeanDelta(torch.zeros_like(params_P))

    def step(self, params_P: Tensor, mean_P: Tensor, state: MeanDelta) -> tuple[Tensor, MeanDelta]:
        """New parameters in the memory of `mean_P`, new state in that of `state`."""
        for w, delta, m, scratch in _blocks(params_P, mean_P, state.m_P):
            m.mul_(self.beta).add_(torch.mul(delta, 1 - self.beta, out=scratch))
            delta.add_(torch.mul(m, self.gamma, out=scratch)).mul_(self.lr).add_(w)
        return mean_P, state


@component
class FedAdagrad(Scheduled):
    """Adagrad on the server (Reddi et al. 2021, Algorithm 2): v = v + delta**2; v starts at tau**2 unless v0 is given.

    beta1 is 0 by default, as in the paper's experiments; Algorithm 2 has beta1 for every variant.
    """

    lr: PositiveFloat = 1e-2
    """step size"""
    beta1: Decay = 0.0
    """decay of the mean of the deltas"""
    tau: PositiveFloat = 1e-3
    """added to the square root: smaller is more adaptive"""
    v0: NonNegativeFloat | None = None
    """where v starts; null: tau**2"""

    def init(self, params_P: Tensor) -> Moments:
        """m = 0, v = v0."""
        return _moments(params_P, self.v0, self.tau)

    def step(self, params_P: Tensor, mean_P: Tensor, state: Moments) -> tuple[Tensor, Moments]:
        """New parameters in the memory of `mean_P`, new state in that of `state`."""

        def accumulate(v: Tensor, square: Tensor, spare: Tensor) -> None:
            v.add_(square)

        return _algorithm_2(self, params_P, mean_P, state, accumulate)


@component
class FedAdam(Scheduled):
    """Adam on the server (Reddi et al. 2021, Algorithm 2): v starts at tau**2 unless v0 is given, no bias correction.

    v = beta2 v + (1 - beta2) delta**2

    >>> w, optimizer = torch.zeros(1), FedAdam(lr=1.0, beta1=0.0, beta2=0.75, tau=1e-9, v0=0.0)
    >>> optimizer.step(w, torch.ones(1), optimizer.init(w))[0]
    tensor([2.])
    """

    lr: PositiveFloat = 1e-2
    """step size"""
    beta1: Decay = 0.9
    """decay of the mean of the deltas"""
    beta2: Decay = 0.99
    """decay of the mean of their squares"""
    tau: PositiveFloat = 1e-3
    """added to the square root: smaller is more adaptive"""
    v0: NonNegativeFloat | None = None
    """where v starts; null: tau**2"""

    def init(self, params_P: Tensor) -> Moments:
        """m = 0, v = v0."""
        return _moments(params_P, self.v0, self.tau)

    def step(self, params_P: Tensor, mean_P: Tensor, state: Moments) -> tuple[Tensor, Moments]:
        """New parameters in the memory of `mean_P`, new state in that of `state`."""

        def decay(v: Tensor, square: Tensor, spare: Tensor) -> None:
            v.mul_(self.beta2).add_(square.mul_(1 - self.beta2))

        return _algorithm_2(self, params_P, mean_P, state, decay)


@component
class FedYogi(Scheduled):
    """Yogi on the server (Reddi et al. 2021, Algorithm 2): v starts at tau**2 unless v0 is given, no bias correction.

    v = v - (1 - beta2) delta**2 sign(v - delta**2)
    """

    lr: PositiveFloat = 1e-2
    """step size"""
    beta1: Decay = 0.9
    """decay of the mean of the deltas"""
    beta2: Decay = 0.99
    """decay in the update of v from their squares"""
    tau: PositiveFloat = 1e-3
    """added to the square root: smaller is more adaptive"""
    v0: NonNegativeFloat | None = None
    """where v starts; null: tau**2"""

    def init(self, params_P: Tensor) -> Moments:
        """m = 0, v = v0."""
        return _moments(params_P, self.v0, self.tau)

    def step(self, params_P: Tensor, mean_P: Tensor, state: Moments) -> tuple[Tensor, Moments]:
        """New parameters in the memory of `mean_P`, new state in that of `state`."""

        def approach(v: Tensor, square: Tensor, spare: Tensor) -> None:
            sign = torch.sub(v, square, out=spare).sign_()
            v.sub_(square.mul_(1 - self.beta2).mul_(sign))

        return _algorithm_2(self, params_P, mean_P, state, approach)


@component
class FedExP(ReadsNorms):
    """w + eta mean with eta = max(1, sum_k p_k |delta_k|^2 / (2 (|mean|^2 + eps))): extrapolation, longer the more the
    deltas diverge (Jhunjhunwala et al. 2023, FedExP, Algorithm 1).

    Deviations: p_k are the aggregator's weights, in the paper 1/K; the paper evaluates the mean of the last two rounds'
    parameters, use `server.average` for a similar mean. With a codec |delta_k| is measured before encoding, |mean|
    after decoding.

    >>> optimizer = FedExP(eps=0.0).knowing(squares=8.0, square=1.0)
    >>> optimizer.step(torch.zeros(2), torch.tensor([1.0, 0.0]), NoState())[0]
    tensor([4., 0.])
    """

    eps: NonNegativeFloat = 1e-3
    """added to |mean|^2; larger gives shorter steps"""

    def init(self, params_P: Tensor) -> NoState:
        """Nothing."""
        return NoState()

    def knowing(self, squares: float, square: float) -> ServerOptimizer:
        """FedAvg with lr eta, rounded to twelve digits because a norm's last bits depend on the processor."""
        below = 2 * (square + self.eps)
        return FedAvg(lr=max(1.0, float(f"{squares / below:.12g}")) if below else 1.0)

    def step(self, params_P: Tensor, mean_P: Tensor, state: NoState) -> tuple[Tensor, NoState]:
        """The step with eta = 1: new parameters, in the memory of `mean_P`."""
        return FedAvg().step(params_P, mean_P, state)


@component
class FedDyn(ServerOptimizer):
    """h = h - alpha (m/K) delta, w + delta - h / alpha (Acar et al. 2021, Algorithm 1): the server of rule `feddyn`.

    delta is the mean over the accepted updates, m/K their share of all silos' weight (of their number with uniform
    weights, as in the paper).

    >>> w, optimizer = torch.zeros(1), FedDyn(alpha=0.5)
    >>> optimizer.at(1, 10, fraction=0.5).step(w, torch.ones(1), optimizer.init(w))
    (tensor([1.5000]), Dynamic(h_P=tensor([-0.2500])))
    """

    alpha: PositiveFloat = 0.01
    """weight of the dynamic regulariser; equal to the rule's alpha"""

    def conflicts(self, config: Config) -> str | None:
        """It needs the local rule `feddyn`."""
        if config.local.server_step is FedDyn:
            return None
        return f"local: the server's feddyn needs local: {{name: feddyn, alpha: {self.alpha}, ...}}"

    def init(self, params_P: Tensor) -> Dynamic:
        """h = 0."""
        return Dynamic(torch.zeros_like(params_P))

    def at(self, number: int, rounds: int, fraction: float) -> ServerOptimizer:
        """The step of a round whose accepted updates have this share of all weight."""
        return _FedDynHeard(self.alpha, fraction)

    def step(self, params_P: Tensor, mean_P: Tensor, state: Dynamic) -> tuple[Tensor, Dynamic]:
        """The step with the updates of all silos: new parameters in the memory of `mean_P`, new state in that of
        `state`."""
        return _FedDynHeard(self.alpha, 1.0).step(params_P, mean_P, state)


@dataclass(frozen=True)
class _FedDynHeard(ServerOptimizer):
    alpha: float
    fraction: float

    def init(self, params_P: Tensor) -> Dynamic:
        return Dynamic(torch.zeros_like(params_P))

    def step(self, params_P: Tensor, mean_P: Tensor, state: Dynamic) -> tuple[Tensor, Dynamic]:
        for w, delta, h, scratch in _blocks(params_P, mean_P, state.h_P):
            h.sub_(torch.mul(delta, self.alpha * self.fraction, out=scratch))
            delta.add_(w).sub_(torch.div(h, self.alpha, out=scratch))
        return mean_P, state


def _moments(params_P: Tensor, v0: float | None, tau: float) -> Moments:
    return Moments(torch.zeros_like(params_P), torch.full_like(params_P, tau**2 if v0 is None else v0))


def _algorithm_2(
    optimizer: FedAdagrad | FedAdam | FedYogi,
    params_P: Tensor,
    mean_P: Tensor,
    state: Moments,
    follow: Callable[[Tensor, Tensor, Tensor], None],
) -> tuple[Tensor, Moments]:
    """Algorithm 2, with v updated in place by `follow(v, square, spare)`, which may overwrite the others."""
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
    if num_params == block:  # most pieces of the exchange; no slicing
        yield *vectors_P, scratch
        return
    for start in range(0, num_params, max(block, 1)):
        parts = [vector[start : start + block] for vector in vectors_P]
        yield *parts, scratch[: parts[0].numel()]


def _sqrt(v: Tensor, out: Tensor) -> Tensor:
    """Square roots, correctly rounded. numpy's on a CPU, because torch's, from MKL, are often one bit off."""
    if v.device.type == "cpu":
        np.sqrt(v.numpy(), out=out.numpy())
        return out
    return torch.sqrt(v, out=out)


OPTIMIZERS = Family(
    "server optimizer",
    {
        "fedavg": FedAvg,
        "fedavgm": FedAvgM,
        "fedgm": FedGM,
        "fedadagrad": FedAdagrad,
        "fedadam": FedAdam,
        "fedyogi": FedYogi,
        "feddyn": FedDyn,
        "fedexp": FedExP,
    },
    ServerOptimizer,
    defaults=True,
)
