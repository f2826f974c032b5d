"""The base classes of local rules, the silo and its state, the round, and the training loop.

The order of samples is keyed by (seed, silo, epoch). The cursor, the number of samples that the silo has visited since
the run began, is part of its state. So a silo trains the same on every rank and after every restart.
"""

from __future__ import annotations

import itertools
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol

import numpy as np
import pydantic
import torch

from fedmpi import rng
from fedmpi.components import Deferred, PositiveFloat, PositiveInt, called, component, did_you_mean
from fedmpi.errors import ConfigError
from fedmpi.flat import HALF, Entry, FlatModel, refuse_frozen
from fedmpi.local.gradients import Batch, BatchLoss, accumulated_gradient, gradient
from fedmpi.local.optimizers import KEPT, TORCH_OPTIMIZERS, num_gradients, plain_step, put_back, state_to_keep
from fedmpi.local.samplers import SAMPLERS, Sampler, Shuffle, no_order, order_of
from fedmpi.local.workload import LOSS, WORKLOADS, Amount, BySilo, Delay, Order, Whole
from fedmpi.schedules import SCHEDULES, Constant, Schedule
from fedmpi.targets import Count, number_of
from fedmpi.types import Auxiliary, Contribution, SiloData, Streamed

if TYPE_CHECKING:
    from fedmpi.config import Config
    from fedmpi.server import ServerOptimizer

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class LocalSilo:
    """A silo that this rank hosts: its data and its state between rounds."""

    id: str
    data: SiloData
    weight: float
    cursor: int = 0  # training samples visited since the run began
    # Tensors by name: personal parameters under names that begin with flat.RESERVED, the rule's own state under other
    # names. Empty before the first training. A rule replaces tensors and never writes into them, because the round may
    # still be dropped.
    kept: dict[str, torch.Tensor] = field(default_factory=dict)


class Guard(Protocol):
    """Trains a silo's round with differential privacy of its records (privacy/record.py)."""

    @property
    def size(self) -> float:
        """Expected samples of a batch."""
        ...

    def batches(self, silo: LocalSilo) -> Iterator[Batch]:
        """The round's batches, in place of the rule's; one may be empty."""
        ...

    def gradient(
        self, module: torch.nn.Module, trained: Sequence[torch.nn.Parameter], loss: Loss, batch: Batch, step: int
    ) -> None:
        """Set the parameters' `.grad` for a batch, in place of `gradient`."""
        ...


@dataclass(frozen=True)
class Round:
    """What a rule knows about the current round."""

    number: int  # 1 to `rounds`
    rounds: int
    seed: int
    loss: Loss
    check: Callable[[], None]  # a safe point, called between batches; raises to end the round early
    auxiliary: Mapping[str, torch.Tensor] = field(default_factory=dict)  # current values by name, [P] each
    # Mass of a batch's targets, which its mean loss is divided by: their number, or the sum of their class weights.
    count: Count = torch.Tensor.numel
    # Whether the round has ended; asked after each step. If so, the silo stops and its work so far counts. None: the
    # round waits for the silo.
    over: Callable[[], bool] | None = None
    # Number of the silo's training, from 1, where a silo may train several times from one round's parameters. None: the
    # round's number.
    training: int | None = None
    guard: Guard | None = None  # how gradients are taken so that the silo's records stay private
    order: Order | None = None  # how much the silo does, if its rule's amount follows delays

    @property
    def draw(self) -> int:
        """The number that keys the silo's random draws."""
        return self.number if self.training is None else self.training


class LocalRule:
    """How a silo turns global parameters into a contribution. A rule overrides `train` and whatever else differs."""

    @property
    def auxiliaries(self) -> tuple[Auxiliary, ...]:
        """Vectors that are sent with the delta, [P] each. `train` reads their current values from `round.auxiliary` and
        writes the silo's values to `contribution[name]`."""
        return ()

    @property
    def kept_vectors(self) -> int:
        """Number of vectors [P] that a silo keeps between rounds, for `fedmpi plan`."""
        return 0

    @property
    def optimizer(self) -> Deferred | None:
        """The torch optimizer that takes the steps; None if there is none."""
        return None

    @property
    def micro_batch(self) -> int | None:
        """Samples per forward and backward pass, if a batch is split; None: batches are whole."""
        return None

    @property
    def precision(self) -> str:
        """Precision of forward and backward passes: float32, or bf16."""
        return "float32"

    @property
    def timed(self) -> bool:
        """Whether the number of steps depends on elapsed time."""
        return False

    @property
    def is_personal(self) -> bool:
        """Whether the rule trains a personal model for each silo."""
        return type(self).personal is not LocalRule.personal

    def personal(self, silo: LocalSilo, params_P: torch.Tensor) -> torch.Tensor | None:
        """The parameters [P] of the silo's personal model; None before it has one. Records then report personal metrics
        beside the global ones. Unshared tensors of the personal model are kept under `own_` + name (personal.py)."""
        return None

    def smallest_batch(self, silo: str, num_samples: int, rounds: int) -> int | None:
        """Samples in the smallest batch of a silo with `num_samples` over all `rounds`; None if unknown."""
        return None

    @property
    def takes_all(self) -> bool:
        """Whether one step takes all of a silo's samples at once, so that they must be in memory."""
        return False

    @property
    def whole_batches(self) -> tuple[str, ...]:
        """Values of the field `last_batch` that avoid a short batch; empty if the rule has no such field."""
        return ()

    @property
    def carries_over(self) -> bool:
        """Whether a round's delta contains gradients of earlier rounds."""
        return False

    @property
    def refuses_partial(self) -> str:
        """Why a round must not stop a silo early and count its partial work (`Round.over`); empty if it may."""
        return "it does not say that it asks `round.over` (refuses_partial)"

    @property
    def by_delay(self) -> Amount | None:
        """The amount of work, if it follows measured delays of silos; None if nothing does."""
        return None

    def orders(self, delays: Mapping[str, Delay | None]) -> dict[str, Order]:
        """What silos are told of trainings that begin now, by `by_delay`; empty if nothing follows delays."""
        return {}

    def num_steps(self, silo: LocalSilo, number: int, rounds: int, seed: int, order: Order | None = None) -> int:
        """Steps that the silo plans for round `number`, in which it is told `order`."""
        raise NotImplementedError

    @property
    def server_step(self) -> type[ServerOptimizer] | None:
        """The server optimizer that belongs to this rule's algorithm and to no other rule; None if there is none."""
        return None

    def conflicts(self, config: Config) -> str | None:
        """Why the rule does not work with the rest of the configuration, in one line; None if it does."""
        exchange, rule, names = config.exchange, called(self), ", ".join(a.name for a in self.auxiliaries)
        if exchange.reduction == "reproducible" and self.timed:
            return "exchange.reduction: reproducible does not go with local.amount: seconds: two runs differ in steps"
        if not names:
            return None
        if exchange.overlap:
            return f"exchange.overlap: the {names} of {rule} must not arrive a round late"
        if exchange.fragments > 1:
            return f"exchange.fragments: the {names} of {rule} must travel with the whole delta"
        if exchange.regions is not None and exchange.regions.every > 1:
            return f"exchange.regions.every: the {names} of {rule} must reach all silos every round"
        for way, channel in (("up", exchange.up), ("down", exchange.down)):
            if channel.codec.chooses:
                return (
                    f"exchange.{way}: {called(channel.codec)} would choose between the delta and the {names} of "
                    f"{rule}, whose units differ; take a codec that sends all values, or chunk_topk or randk"
                )
        return None

    def suits(self, module: torch.nn.Module, entries: Sequence[Entry], ids: Sequence[str]) -> None:
        """Raise ConfigError if the rule does not support the model, its shared entries, or these silos."""

    @abstractmethod
    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        """Train the silo from params_P [P], which stays unchanged, and return its contribution.

        The contribution's vector lies in the model's memory and is valid until the next training. The silo's cursor and
        kept state advance. Raises what `round.check` raises.
        """


LastBatch = Literal["keep", "drop", "merge"]


def shortest(num_samples: int, batch_size: int | None, last_batch: LastBatch) -> int:
    """Samples in the shortest batch of an epoch.

    >>> shortest(65, 32, "keep"), shortest(65, 32, "merge"), shortest(65, None, "keep"), shortest(1, 32, "drop")
    (1, 32, 65, 1)
    """
    size = min(batch_size or num_samples, num_samples)
    rest = num_samples % size
    return rest if rest and last_batch == "keep" else size


@component
class GradientRule(LocalRule):
    """Base class of rules that take gradient steps: their common fields and the batches."""

    whole_batches = ("drop", "merge")
    splits: ClassVar[bool] = True  # whether the gradient of a batch is a mean of gradients of its samples
    reads_rate: ClassVar[bool] = False  # whether the rule needs one learning rate for all steps of a round

    lr: PositiveFloat
    """step size at the schedule's start"""
    epochs: PositiveInt | None = None
    """passes over the silo's samples per round; give this or `steps`"""
    steps: PositiveInt | None = None
    """batches per round; the next round continues in the same epoch, whose last batch may be short"""
    batch_size: PositiveInt | None = 32
    """samples per step; null: all samples of the silo"""
    micro_batch: PositiveInt | None = None
    """samples per forward and backward pass; gradients are accumulated over a step's batch_size samples, which saves
    memory; null: the whole batch at once"""
    last_batch: LastBatch = "keep"
    """a short last batch of an epoch: keep it, drop it, or merge it into the batch before; batch normalization needs
    more than one sample"""
    optimizer: Annotated[Deferred, TORCH_OPTIMIZERS] = Deferred("SGD", torch.optim.SGD, {})
    """optimizer of torch.optim; its state is reset every round, unless `keep_optimizer`"""
    schedule: Annotated[Schedule, SCHEDULES] = Constant()
    """learning rate over rounds"""
    step_schedule: Annotated[Schedule, SCHEDULES] = Constant()
    """learning rate over the steps of a round, starting from the round's; its `rounds` are then steps"""
    clip: PositiveFloat | None = None
    """largest norm of a step's gradient, including the rule's corrections; null: no clipping"""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: forward and backward passes under autocast; parameters, steps and metrics stay float32"""
    sampler: Annotated[Sampler, SAMPLERS] = Shuffle()
    """order of a silo's samples"""
    keep_optimizer: bool = False
    """keep each silo's optimizer state from round to round"""
    amount: Annotated[Amount, WORKLOADS] = Whole()
    """how many of the `epochs` or `steps` a silo takes in a round"""

    @pydantic.model_validator(mode="after")
    def _one_amount(self) -> GradientRule:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either 'epochs' or 'steps'")
        return self

    @pydantic.model_validator(mode="after")
    def _steps_alike(self) -> GradientRule:
        if self.micro_batch is not None and not self.splits:
            raise ValueError(f"micro_batch: {called(self)} computes with a whole batch; take a smaller batch_size")
        if not self.varies:
            return self
        if self.reads_rate:
            raise ValueError(f"step_schedule: {called(self)} needs one learning rate for all steps of a round")
        if self.timed:
            raise ValueError("step_schedule: with amount: seconds the number of steps is not known beforehand")
        return self

    @property
    def pass_size(self) -> int | None:
        """Samples per forward and backward pass; None: all of a batch."""
        return self.batch_size if self.micro_batch is None else self.micro_batch

    @property
    def varies(self) -> bool:
        """Whether the learning rate changes within a round."""
        return self.step_schedule != Constant()

    def conflicts(self, config: Config) -> str | None:
        """Also what the amount of work does not go with."""
        if why := self.amount.conflicts(config):
            return why
        private = config.privacy is not None and config.privacy.of_records
        if private and (self.varies or self.micro_batch is not None):
            field = "step_schedule" if self.varies else "micro_batch"
            return f"local.{field}: privacy: record takes its steps in another way; leave it out"
        if self.varies and config.aggregate.normalises:
            return (
                f"local.step_schedule: {called(config.aggregate)} divides deltas by numbers of gradients, which must "
                "have one learning rate"
            )
        return super().conflicts(config)

    @property
    def timed(self) -> bool:
        return self.amount.limit_s < math.inf

    @property
    def takes_all(self) -> bool:
        return self.batch_size is None

    @property
    def refuses_partial(self) -> str:
        return "its learning rate changes within a round (local.step_schedule)" if self.varies else ""

    @property
    def carries_over(self) -> bool:
        if not self.keep_optimizer:
            return False
        one, two = (num_gradients(self.optimizer, steps) for steps in (1, 2))
        return one is not None and two != 2 * one  # momentum, for example

    @property
    def by_delay(self) -> Amount | None:
        return self.amount if self.amount.follows_delays else None

    def orders(self, delays: Mapping[str, Delay | None]) -> dict[str, Order]:
        most = self.epochs or self.steps or 1
        return {} if self.by_delay is None or not delays else self.by_delay.orders(most, delays)

    def rate(self, round: Round) -> float:
        """The learning rate of the silo in the round."""
        return self.schedule.lr(self.lr, round.number, round.rounds) * self.amount.scale(round)

    def suits(self, module: torch.nn.Module, entries: Sequence[Entry], ids: Sequence[str]) -> None:
        """Raise ConfigError if the model has no trainable parameter, or if `amount` names an unknown silo."""
        refuse_frozen(entries)
        if isinstance(self.amount, BySilo) and (others := sorted(self.amount.silos.keys() - set(ids))):
            raise ConfigError(f"local.amount.silos: no silo '{others[0]}'{did_you_mean(others[0], ids)}")

    def most_batches(self, silo: str, rounds: int) -> float:
        """Upper bound of the batches that a silo takes in `rounds` rounds; inf if only `epochs` is given."""
        steps = self.amount.silos.get(silo, self.steps) if isinstance(self.amount, BySilo) else self.steps
        return math.inf if self.steps is None or steps is None else steps * rounds

    def smallest_batch(self, silo: str, num_samples: int, rounds: int) -> int:
        """Samples in the smallest batch that a silo with `num_samples` gets in `rounds` rounds."""
        size = min(self.batch_size or num_samples, num_samples)
        if self.most_batches(silo, rounds) <= num_samples // size:
            return self._smallest_part(size)  # it never reaches the end of an epoch
        whole, rest = size, shortest(num_samples, self.batch_size, self.last_batch)
        return min(self._smallest_part(whole), self._smallest_part(rest))

    def _smallest_part(self, num_samples: int) -> int:
        """Samples in the smallest micro-batch of a batch."""
        return num_samples if self.micro_batch is None else num_samples // -(-num_samples // self.micro_batch)

    def batches(
        self, silo: LocalSilo, seed: int, amount: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield this round's batches (x, y) from the silo's cursor on, and advance the cursor.

        `amount` is the number of epochs or steps; None: that of the rule. Raises ConfigError for an invalid order of
        the sampler.
        """
        x, y = silo.data.x_train, silo.data.y_train
        n = len(x)
        size = min(self.batch_size or n, n)
        steps_left = -1 if self.steps is None else amount or self.steps
        end = silo.cursor + (amount or self.epochs or 0) * n
        until_s = time.monotonic() + self.amount.limit_s
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        while steps_left > 0 or (steps_left < 0 and silo.cursor < end):
            start = silo.cursor % n
            if epoch != silo.cursor // n:
                epoch = silo.cursor // n
                given = order_of(self.sampler, seed, silo.id, epoch, n)
                order = torch.from_numpy(np.ascontiguousarray(given, dtype=np.int64)).to(x.device)
            if len(order) < min(start + size, n):  # a short order is enough if the run ends before its end
                raise no_order(self.sampler, silo.id, epoch, f"{len(order)} indices", n)
            rows, rest = self._rows_from(order, start, size, n)
            silo.cursor += len(rows) + rest
            steps_left -= steps_left > 0
            batch = x[rows], y[rows]
            more = steps_left > 0 or (steps_left < 0 and silo.cursor < end)
            if more and isinstance(x, Streamed) and silo.cursor // n == epoch:
                x.ahead(self._rows_from(order, silo.cursor % n, size, n)[0])
            yield batch
            if time.monotonic() >= until_s:
                return

    def _rows_from(self, order: torch.Tensor, start: int, size: int, n: int) -> tuple[torch.Tensor, int]:
        """The batch that begins at `start` of an epoch, and how many samples behind it are dropped."""
        rows = order[start : start + size]
        rest = n - start - len(rows)
        if self.last_batch == "keep" or not 0 < rest < size:
            return rows, 0
        return (order[start:n], 0) if self.last_batch == "merge" else (rows, rest)

    def num_steps(self, silo: LocalSilo, number: int, rounds: int, seed: int, order: Order | None = None) -> int:
        about = Round(number, rounds, seed, torch.nn.functional.mse_loss, lambda: None, order=order)
        amount = self.amount.of(self.epochs or self.steps or 1, silo, about)
        return self.num_batches(silo.cursor, len(silo.data.x_train), amount)

    def num_batches(self, cursor: int, num_samples: int, amount: int | None = None) -> int:
        """Number of batches that `batches` yields from a cursor on, without a time limit."""
        if self.steps is not None:
            return amount or self.steps
        n, size, num = num_samples, min(self.batch_size or num_samples, num_samples), 0
        end = cursor + (amount or self.epochs or 0) * n
        while cursor < end:
            left = n - cursor % n
            taken = min(size, left)
            if self.last_batch != "keep" and 0 < left - taken < size:
                taken = left  # merged, or dropped
            cursor += taken
            num += 1
        return num


def load_silo(silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> list[torch.nn.Parameter]:
    """Load the silo's model for the start of its round; returns the trainable parameters."""
    model.load(params_P)
    model.load_personal(silo.kept)
    model.module.train()
    # Dropout, augmentation and the like use the global generators: seeded here, a silo draws the same on every rank.
    rng.set_all(rng.key(round.seed, purpose="train", round=round.draw, silo=silo.id))
    return [p for p in model.module.parameters() if p.requires_grad]


def whole_gradient(
    silo: LocalSilo,
    model: FlatModel,
    params_P: torch.Tensor,
    round: Round,
    batch_size: int | None,
    precision: str = "float32",
    merge: bool = False,
) -> float:
    """The mean loss over all of the silo's samples at params_P; its gradient goes into the parameters' `.grad`.

    `batch_size` samples at a time (None: all at once). This only affects memory, unless the model has batch statistics.
    `merge` joins a short last batch with the one before. The silo's cursor and kept state stay unchanged.
    """
    trained = load_silo(silo, model, params_P, round)
    x_all, y_all, device = silo.data.x_train, silo.data.y_train, model.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_targets = number_of(round.count(y_all)) or 1
    for param in trained:
        param.grad = None
    size = min(batch_size or len(x_all), len(x_all))
    starts = list(range(0, len(x_all), size))
    if merge and len(x_all) % size:
        starts.pop()

    def share_of_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return round.loss(model.module(x), y) * (round.count(y) / num_targets)

    for start, stop in itertools.pairwise([*starts, len(x_all)]):
        round.check()
        x, y = x_all[start:stop].to(device), y_all[start:stop].to(device)
        total += gradient(model, (x, y), share_of_loss, precision)
    return float(total)


def gradient_vector(model: FlatModel, params_P: torch.Tensor) -> torch.Tensor:
    """The gradients of the shared parameters as one new vector [P]; 0 for parameters without `.grad`."""
    vector_P = torch.zeros_like(params_P)
    for param, part in model.pairs(vector_P):
        if param.grad is not None:
            part.copy_(param.grad)
    return vector_P


def kept_vector(silo: LocalSilo, name: str, params_P: torch.Tensor) -> torch.Tensor | None:
    """The silo's kept tensor of that name, on the device of params_P (after a resume it lies on the CPU), or None."""
    found = silo.kept.get(name)
    return None if found is None else found.to(params_P.device)


Correct = Callable[[], None]


def local_steps(
    work: GradientRule,
    silo: LocalSilo,
    model: FlatModel,
    params_P: torch.Tensor,
    round: Round,
    correct: Correct | None = None,
    batch_loss: BatchLoss | None = None,
    pull: float = 0.0,
) -> Contribution:
    """The training loop that rules share: gradient steps from params_P [P] and the silo's personal parameters.

    `correct` may change the parameters' `.grad` (see `model.pairs`); it is called without autograd after each backward
    pass, before clipping and the step. `batch_loss(x, y)` replaces the objective's loss of the model's outputs. `pull`
    is lr mu of a proximal term that `correct` adds. Returns the contribution, and sets `silo.kept` to a new dict with
    the final personal parameters. If the round is over after a step, the loop ends there. Raises what `round.check`
    raises.
    """
    if work.micro_batch is not None and batch_loss is not None:
        raise ConfigError(f"local.micro_batch: {called(work)} computes with a whole batch; take a smaller batch_size")
    module, device = model.module, model.device
    trained = load_silo(silo, model, params_P, round)
    optimizer = work.optimizer.target(trained, lr=work.rate(round), **work.optimizer.arguments)
    if work.keep_optimizer:
        put_back(optimizer, silo.kept)
    step, rate = plain_step(optimizer), work.rate(round)
    losses = torch.zeros((), dtype=torch.float64, device=device)
    num_samples = num_steps = 0
    num_targets: int | torch.Tensor = 0
    amount = work.amount.of(work.epochs or work.steps or 1, silo, round)
    first, began_s, part = silo.cursor, time.monotonic(), 1.0
    planned = work.num_batches(first, len(silo.data.x_train), amount) if work.varies else 0

    def loss_of_outputs(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return round.loss(module(x), y)

    guard = round.guard
    for x, y in work.batches(silo, round.seed, amount) if guard is None else guard.batches(silo):
        round.check()
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        for param in trained:  # like zero_grad, but without its profiler record: a tenth of a small model's step
            param.grad = None
        if guard is None and work.micro_batch is not None and len(x) > work.micro_batch:
            loss = accumulated_gradient(model, (x, y), loss_of_outputs, work.precision, work.micro_batch, round.count)
        elif guard is None:
            loss = gradient(model, (x, y), batch_loss or loss_of_outputs, work.precision)
        else:
            guard.gradient(module, trained, round.loss, (x, y), num_steps)
        if correct is not None:
            with torch.no_grad():
                correct()
        if work.clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, work.clip)
        if work.varies:
            for group in optimizer.param_groups:
                group["lr"] = work.step_schedule.lr(rate, num_steps + 1, planned)
        with torch.no_grad():
            step()
        num_steps += 1
        if guard is not None:
            continue  # losses and numbers of samples carry no noise, so they are not told
        counted = round.count(y)
        losses += (loss.float() if loss.dtype in HALF else loss) * counted  # float16 overflows above 65504
        num_targets = num_targets + counted
        num_samples += len(x)
        if round.over is not None and round.over():
            planned = work.num_batches(first, len(silo.data.x_train), amount)
            part = _part(work, num_steps, planned, time.monotonic() - began_s, pull)
            break
    silo.kept = {**silo.kept, **model.personal()}
    if work.keep_optimizer:
        silo.kept = {n: t for n, t in silo.kept.items() if not n.startswith(KEPT)} | state_to_keep(optimizer)
    if guard is not None:
        num_samples = math.ceil(num_steps * guard.size)
    targets = number_of(num_targets)
    loss_mean, held = float(losses) / (targets or 1), num_gradients(work.optimizer, num_steps, pull)
    if work.amount.reads_loss:
        silo.kept[LOSS] = torch.tensor(loss_mean, dtype=torch.float64)
    contribution = Contribution(
        *(silo.id, round.number, silo.weight, torch.empty(0), loss_mean, num_samples, num_steps, held),
        num_targets=targets,
        part=part,
        layout=model.layout,
    )
    return model.give(contribution, params_P)


def _part(work: GradientRule, num_steps: int, planned: int, seconds: float, pull: float) -> float:
    """Share of the planned gradients in a delta of `num_steps` steps: FedNova's |a_k|_1 over its planned value. With
    `amount: seconds` the planned steps are extrapolated from the pace so far."""
    if seconds > 0 and work.amount.limit_s < math.inf:
        planned = min(planned, max(num_steps, math.ceil(num_steps * work.amount.limit_s / seconds)))
    held, whole = (num_gradients(work.optimizer, steps, pull) for steps in (num_steps, planned))
    return num_steps / planned if held is None or not whole else held / whole
