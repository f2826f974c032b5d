"""How the aggregate moves the global parameters: the server optimizers.

    params_P, state = optimizer.step(params_P, mean_P, state)

P parameters, or any slice of them: every step is elementwise, so that shards of the vector step by themselves and give
the bits that the whole would. `mean_P` is the mean delta (local minus global) and is ADDED: papers that write a pseudo
gradient (global minus local) subtract it. A step never writes `params_P`; it takes over the memory of `mean_P` for the
new parameters and the memory of `state` for the new state, and allocates one block and nothing of the model's size.

Every operation here is one of + - * / and the square root, each correctly rounded, so ranks on different processors
that take the same step hold the same bits.

`Average` is no optimizer: it follows the parameters from round to round, and what it finds is evaluated.
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
    """Nothing is kept from round to round."""


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
    """What the round asks of a server optimizer; states are NamedTuples of tensors as long as the parameters."""

    @abstractmethod
    def init(self, params_P: Tensor) -> Any:
        """The state before the first step."""

    def at(self, number: int, rounds: int, fraction: float) -> ServerOptimizer:
        """What takes this round's step: round `number` of 1 to `rounds`, in which `fraction` of all silos' weight was
        heard."""
        return self

    def conflicts(self, config: Config) -> str | None:
        """Why the rest of a configuration does not go with it, in one line; None where it does."""
        return None

    @abstractmethod
    def step(self, params_P: Tensor, mean_P: Tensor, state: Any) -> tuple[Tensor, Any]:
        """New parameters and new state, in the memory of `mean_P` and of `state`."""


class ReadsNorms(ServerOptimizer):
    """The base of optimizers whose step depends on how long the deltas are, and how long their mean is. By themselves
    they take the step that both leave alone."""

    @abstractmethod
    def knowing(self, squares: float, square: float) -> ServerOptimizer:
        """What takes this round's step: `squares` is sum_k p_k |delta_k|^2, p_k being what the mean weighs the deltas
        with, and `square` is |mean|^2."""

    def conflicts(self, config: Config) -> str | None:
        why, regions = f"server.optimizer: {called(self)} goes by the norms of", config.exchange.regions
        if not isinstance(config.aggregate, Mean):
            return f"{why} deltas and of their weighted mean; it needs aggregate: mean"
        if config.exchange.fragments > 1:
            return f"{why} whole deltas of one round; it needs exchange.fragments: 1"
        if regions is not None and regions.every > 1:
            return f"{why} one round, and exchange.regions.every is {regions.every}"
        return None


@dataclass(frozen=True)
class Server:
    """The server's step of one round, over any slice of the exchanged vector: the parameters, which the optimizer
    moves, and behind them auxiliary vectors, which follow their own rule (layout.Segment).

    What is not trained (statistics of batch normalization) becomes the mean of the silos' values, whatever the
    optimizer and `scale`: momentum or a long step would make variances negative.
    """

    optimizer: ServerOptimizer
    layout: Layout | None = None  # of the exchanged vector; None: all of it is parameters, and all is stepped
    scale: float = 1.0  # of the mean delta, before the optimizer sees it
    share: float = 1.0  # of all weight that the mean is taken over, as shares are counted this round
    sent: float = 1.0  # weight that was sent / base weight of the silos that were heard
    on_mean: OnMean | None = None  # changes elements of the mean delta, given where they begin, before anything else
    squares: float = 0.0  # sum_k p_k |delta_k|^2, for optimizers that read norms

    @property
    def reads_norms(self) -> bool:
        """Must `look` see all of the mean, and `knowing` hear of it, before the first step?"""
        return isinstance(self.optimizer, ReadsNorms)

    def look(self, mean_S: Tensor, start: int = 0) -> float:
        """The sum of squares of those that are parameters of S elements from `start` on, changed by `on_mean` in their
        memory."""
        num = len(mean_S) if self.layout is None else max(0, min(len(mean_S), self.layout.num_params - start))
        if num and self.on_mean is not None:
            self.on_mean(mean_S[:num], start)
        parts = (mean_S[i : min(i + BLOCK_CPU, num)].double() for i in range(0, num, BLOCK_CPU))
        return math.fsum(float(torch.dot(part, part)) for part in parts)

    def knowing(self, square: float) -> Server:
        """The server that takes the steps, given the sum of what `look` gave."""
        assert isinstance(self.optimizer, ReadsNorms)
        optimizer = self.optimizer.knowing(self.scale * self.squares, self.scale**2 * square)
        return replace(self, optimizer=optimizer, on_mean=None)

    def step(self, params_S: Tensor, mean_S: Tensor, state: Any, start: int = 0) -> tuple[Tensor, Any]:
        """New values of S elements from `start` on and new state, in the memory of `mean_S` and of `state`."""
        layout, stop = self.layout, start + len(mean_S)
        border = stop if layout is None else layout.num_params
        plain = self.scale == 1.0 and self.on_mean is None and (layout is None or layout.steps_alone)
        if start < stop <= border and plain:  # most pieces; to slice costs more
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
    """The mean of the parameters over rounds, recent ones more: an exponential moving average without its start's bias.

    a + (w - a) (1 - decay) / (1 - decay**t) after round t: sum_i decay**(t - i) w_i over the rounds i up to t, divided
    by what these weights add up to (as Adam corrects its means). With decay 1 every round counts the same (Polyak &
    Juditsky 1992). Training goes on from the parameters themselves.

    >>> w = torch.tensor([4.0])
    >>> Average(decay=1.0).follow(torch.tensor([1.0]), w, number=3)
    tensor([2.])
    """

    decay: Fraction = 0.99
    """what a round weighs less than the next; 0: the last round's parameters"""

    def conflicts(self, config: Config) -> str | None:
        """Parameters that are not those of the whole federation after the round."""
        if config.exchange.overlap:
            return "server.average: with exchange.overlap the parameters of a round arrive a round late"
        if config.exchange.regions is not None and config.exchange.regions.every > 1:
            return "server.average: with exchange.regions.every the parameters of regions differ in between"
        return None

    def follow(self, average_P: Tensor, params_P: Tensor, number: int) -> Tensor:
        """The average after round `number`, in the memory of the one before."""
        gain = 1 / number if self.decay == 1 else (1 - self.decay) / (1 - self.decay**number)
        for a, w, scratch in _blocks(average_P, params_P):
            a.add_(torch.sub(w, a, out=scratch).mul_(gain))
        return average_P


@component
class Scheduled(ServerOptimizer):
    """The field that every optimizer has besides its own: how `lr` goes over rounds."""

    schedule: Annotated[Schedule, SCHEDULES] = Constant()
    """of lr over rounds"""

    def at(self, number: int, rounds: int, fraction: float) -> Self:
        """The optimizer of one round, with the round's learning rate."""
        before = self.lr  # type: ignore[attr-defined]
        rate = self.schedule.lr(before, number, rounds)
        if rate == before:
            return self
        there = copy.copy(self)
        # Twelve digits: a cosine's last bit depends on the processor, and all ranks are to take the same step. Not
        # checked: the last round of a cosine stands still, at 0.
        object.__setattr__(there, "lr", float(f"{rate:.12g}"))
        return there


@component
class FedAvg(Scheduled):
    """w + lr mean: the server as SGD (McMahan et al. 2017, Algorithm 1; with lr, Reddi et al. 2021, Algorithm 1).

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

    Reddi et al. 2021, Algorithm 1 with SGD of momentum as ServerOpt is the same. Not damped by 1 - beta: that is fedgm.
    The paper has no lr; 1 is the paper. With `nesterov` w + lr (delta + beta v), as torch.optim.SGD has it: the outer
    optimizer of DiLoCo (Douillard et al. 2023, Algorithm 1, lr 0.7, beta 0.9).

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
    """look ahead: step by delta + beta v in place of v"""

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
    """m = beta m + (1 - beta) delta, w + lr (delta + gamma m): the delta, and damped momentum on top of it (Sun et al.
    2024, On the Role of Server Momentum in Federated Learning, FedGM; quasi-hyperbolic momentum of Ma & Yarats 2019).

    The papers write eta ((1 - nu) delta + nu m): that is lr = eta (1 - nu) and gamma = nu / (1 - nu). The same step
    every round, for ever, is lr (1 + gamma) times as long as the delta, whatever beta is; of fedavgm lr / (1 - beta).

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
    """of that mean, besides the delta; 0 is fedavg"""

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

    beta1 is 0 by default, as in the paper's experiments; Algorithm 2 has it for every variant.
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
    """how slowly v follows their squares"""
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
    """w + eta mean with eta = max(1, sum_k p_k |delta_k|^2 / (2 (|mean|^2 + eps))): extrapolation, the further the more
    the deltas point apart (Jhunjhunwala et al. 2023, FedExP, Algorithm 1).

    The paper's p_k are 1/K; here they are the aggregator's weights. It evaluates the mean of the last two rounds'
    parameters; here that is `server.average`, whatever its decay. With a codec |delta_k| is of what a silo made, and
    |mean| of what arrived.

    >>> optimizer = FedExP(eps=0.0).knowing(squares=8.0, square=1.0)
    >>> optimizer.step(torch.zeros(2), torch.tensor([1.0, 0.0]), NoState())[0]
    tensor([4., 0.])
    """

    eps: NonNegativeFloat = 1e-3
    """beside |mean|^2; the larger, the more careful"""

    def init(self, params_P: Tensor) -> NoState:
        """Nothing."""
        return NoState()

    def knowing(self, squares: float, square: float) -> ServerOptimizer:
        """Plain steps of length eta; of twelve digits, since a norm's last bits depend on the processor."""
        below = 2 * (square + self.eps)
        return FedAvg(lr=max(1.0, float(f"{squares / below:.12g}")) if below else 1.0)

    def step(self, params_P: Tensor, mean_P: Tensor, state: NoState) -> tuple[Tensor, NoState]:
        """As with eta = 1: new parameters, in the memory of `mean_P`."""
        return FedAvg().step(params_P, mean_P, state)


@component
class FedDyn(ServerOptimizer):
    """h = h - alpha (m/K) delta, w + delta - h / alpha (Acar et al. 2021, Algorithm 1): the server of rule `feddyn`.

    m/K is the share of all silos that was heard: of their weight where aggregate.weights are not uniform (the paper's
    are). delta is the mean over those that were heard.

    >>> w, optimizer = torch.zeros(1), FedDyn(alpha=0.5)
    >>> optimizer.at(1, 10, fraction=0.5).step(w, torch.ones(1), optimizer.init(w))
    (tensor([1.5000]), Dynamic(h_P=tensor([-0.2500])))
    """

    alpha: PositiveFloat = 0.01
    """of the dynamic regulariser; the rule's too"""

    def conflicts(self, config: Config) -> str | None:
        """Without its rule there is no h."""
        if config.local.server_step is FedDyn:
            return None
        return f"local: the server's feddyn needs local: {{name: feddyn, alpha: {self.alpha}, ...}}"

    def init(self, params_P: Tensor) -> Dynamic:
        """h = 0."""
        return Dynamic(torch.zeros_like(params_P))

    def at(self, number: int, rounds: int, fraction: float) -> ServerOptimizer:
        """Its step in a round in which this share of all weight was heard."""
        return _FedDynHeard(self.alpha, fraction)

    def step(self, params_P: Tensor, mean_P: Tensor, state: Dynamic) -> tuple[Tensor, Dynamic]:
        """As where all silos were heard: new parameters in the memory of `mean_P`, new state in that of `state`."""
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
    if num_params == block:  # pieces of the exchange are, and many
        yield *vectors_P, scratch
        return
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
