"""What local rules share: a silo and what it keeps, the round as a rule sees it, the loop over batches.

Samples are visited in an order that is keyed by (seed, silo, epoch); the cursor, how many samples the silo has visited
since the run began, is silo state. So a silo trains the same wherever it lives and whenever it is restarted.
"""

from __future__ import annotations

import itertools
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import pydantic
import torch

from fedmpi import rng
from fedmpi.components import Deferred, PositiveFloat, PositiveInt, called, component, did_you_mean
from fedmpi.errors import ConfigError
from fedmpi.flat import HALF, Entry, FlatModel, refuse_frozen
from fedmpi.local.optimizers import KEPT, TORCH_OPTIMIZERS, num_gradients, plain_step, put_back, state_to_keep
from fedmpi.local.samplers import SAMPLERS, Sampler, Shuffle, no_order, order_of
from fedmpi.local.workload import LOSS, WORKLOADS, Amount, BySilo, Whole
from fedmpi.schedules import SCHEDULES, Constant, Schedule
from fedmpi.targets import Count
from fedmpi.types import Auxiliary, Contribution, SiloData

if TYPE_CHECKING:
    from fedmpi.config import Config
    from fedmpi.server import ServerOptimizer

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class LocalSilo:
    """A silo that this rank hosts: its data and what it keeps from round to round."""

    id: str
    data: SiloData
    weight: float
    cursor: int = 0  # training samples visited since the run began
    # By name: personal parameters, under names that begin with flat.RESERVED, and what its rule keeps from round to
    # round, under any others; empty before it first trained. A rule puts new tensors under a name and never writes into
    # those that are there: the round may yet be broken off.
    kept: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """What a rule may know of the round it trains in."""

    number: int  # 1 to `rounds`
    rounds: int
    seed: int
    loss: Loss
    check: Callable[[], None]  # a safe point: called between batches, may raise to break the round off
    auxiliary: Mapping[str, torch.Tensor] = field(default_factory=dict)  # the rule's vectors as they are now, [P]
    count: Count = torch.Tensor.numel  # how many targets of a batch its loss is the mean of
    # Asked after each step where a round may end before the silo does: is it over? Then the work done so far counts.
    over: Callable[[], bool] | None = None


class LocalRule:
    """How a silo turns global parameters into a contribution. Members say `train`, and what else is other than here."""

    @property
    def auxiliaries(self) -> tuple[Auxiliary, ...]:
        """Vectors that travel with the delta. `train` finds what they are now in `round.auxiliary` and writes what the
        silo sends into the contribution's vector of that name."""
        return ()

    @property
    def kept_vectors(self) -> int:
        """How many vectors as long as the parameters a silo keeps, for `fedmpi plan`."""
        return 0

    @property
    def optimizer(self) -> Deferred | None:
        """Of torch, that steps; None: there is none."""
        return None

    @property
    def precision(self) -> str:
        """In which a model computes: float32, or bf16, which needs a GPU."""
        return "float32"

    @property
    def timed(self) -> bool:
        """Does what a silo does hang on a clock?"""
        return False

    @property
    def is_personal(self) -> bool:
        """Does it make silos models of their own?"""
        return type(self).personal is not LocalRule.personal

    def personal(self, silo: LocalSilo, params_P: torch.Tensor) -> torch.Tensor | None:
        """The parameters [P] that the silo would use for itself, or None before it has any; records then give personal
        figures beside the global ones. What of the personal model is not shared is kept under `own_` and its name
        (personal.py)."""
        return None

    def smallest_batch(self, silo: str, num_samples: int, rounds: int) -> int | None:
        """Samples of the smallest batch that a silo of so many trains on in so many rounds; None: not known."""
        return None

    @property
    def whole_batches(self) -> tuple[str, ...]:
        """The values of its field `last_batch` that leave no short batch; empty: it has no such field."""
        return ()

    @property
    def carries_over(self) -> bool:
        """Do gradients of earlier rounds go into a round's delta?"""
        return False

    @property
    def refuses_partial(self) -> str:
        """Why a round may not end a silo early and count what it has done (`Round.over`); empty if it may."""
        return "it does not say that it asks `round.over` (refuses_partial)"

    @property
    def server_step(self) -> type[ServerOptimizer] | None:
        """The server's half of the same algorithm, which goes with no other rule."""
        return None

    def conflicts(self, config: Config) -> str | None:
        """Why the rest of a configuration does not go with it, in one line; None where it does."""
        exchange, rule, names = config.exchange, called(self), ", ".join(a.name for a in self.auxiliaries)
        if exchange.reduction == "reproducible" and self.timed:
            return "exchange.reduction: reproducible, but local.amount: seconds is what no clock repeats"
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
        """ConfigError where the rule cannot do with the model, what it shares or these silos."""

    @abstractmethod
    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        """Train the silo from params_P, which is not written; the contribution's delta lives in the model's memory.

        Reads and writes the silo's cursor and kept state. Raises what `round.check` raises.
        """


LastBatch = Literal["keep", "drop", "merge"]


def shortest(num_samples: int, batch_size: int | None, last_batch: LastBatch) -> int:
    """Samples of the shortest batch of an epoch.

    >>> shortest(65, 32, "keep"), shortest(65, 32, "merge"), shortest(65, None, "keep"), shortest(1, 32, "drop")
    (1, 32, 65, 1)
    """
    size = min(batch_size or num_samples, num_samples)
    rest = num_samples % size
    return rest if rest and last_batch == "keep" else size


@component
class GradientRule(LocalRule):
    """The fields that every rule of gradient steps has: how much, with what, how fast."""

    whole_batches = ("drop", "merge")

    lr: PositiveFloat
    """step size at the schedule's start"""
    epochs: PositiveInt | None = None
    """passes over the silo's samples per round; or give `steps`"""
    steps: PositiveInt | None = None
    """batches per round; they run on across rounds, an epoch's last may be short"""
    batch_size: PositiveInt | None = 32
    """samples per step; null: the whole silo"""
    last_batch: LastBatch = "keep"
    """of an epoch, where it is short: keep it, drop its samples, or merge them into the batch before; a single sample
    is too few for batch normalization"""
    optimizer: Annotated[Deferred, TORCH_OPTIMIZERS] = Deferred("SGD", torch.optim.SGD, {})
    """of torch.optim, new every round"""
    schedule: Annotated[Schedule, SCHEDULES] = Constant()
    """of lr over rounds"""
    clip: PositiveFloat | None = None
    """largest norm of what a step goes along, a rule's corrections in it; null: any"""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: autocast on CUDA"""
    sampler: Annotated[Sampler, SAMPLERS] = Shuffle()
    """the order of a silo's samples"""
    keep_optimizer: bool = False
    """a silo's optimizer goes on where its last round left it, in place of a new one"""
    amount: Annotated[Amount, WORKLOADS] = Whole()
    """how much of `epochs` or `steps` a silo does in a round"""

    @pydantic.model_validator(mode="after")
    def _one_amount(self) -> GradientRule:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either 'epochs' or 'steps'")
        return self

    @property
    def timed(self) -> bool:
        return self.amount.limit_s < math.inf

    @property
    def refuses_partial(self) -> str:
        return ""

    @property
    def carries_over(self) -> bool:
        if not self.keep_optimizer:
            return False
        one, two = (num_gradients(self.optimizer, steps) for steps in (1, 2))
        return one is not None and two != 2 * one  # as it is with momentum

    def rate(self, round: Round) -> float:
        """The learning rate of a round."""
        return self.schedule.lr(self.lr, round.number, round.rounds)

    def suits(self, module: torch.nn.Module, entries: Sequence[Entry], ids: Sequence[str]) -> None:
        """ConfigError for a model without parameters to train, and for an amount of a silo that is none."""
        refuse_frozen(entries)
        if isinstance(self.amount, BySilo) and (others := sorted(self.amount.silos.keys() - set(ids))):
            raise ConfigError(f"local.amount.silos: no silo '{others[0]}'{did_you_mean(others[0], ids)}")

    def most_batches(self, silo: str, rounds: int) -> float:
        """How many batches a silo takes in so many rounds, at most, as far as `steps` tell."""
        steps = self.amount.silos.get(silo, self.steps) if isinstance(self.amount, BySilo) else self.steps
        return math.inf if self.steps is None or steps is None else steps * rounds

    def smallest_batch(self, silo: str, num_samples: int, rounds: int) -> int:
        """Samples of the smallest batch that a silo meets in so many rounds."""
        size = min(self.batch_size or num_samples, num_samples)
        if self.most_batches(silo, rounds) <= num_samples // size:
            return size  # it never comes to an epoch's end
        return shortest(num_samples, self.batch_size, self.last_batch)

    def batches(
        self, silo: LocalSilo, seed: int, amount: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This round's batches from the silo's cursor on, `amount` epochs or steps of them (None: all that the rule is
        given); the cursor moves as they are taken."""
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
            if len(order) < min(start + size, n):  # one that ends early is enough where the run ends there too
                raise no_order(self.sampler, silo.id, epoch, f"{len(order)} indices", n)
            rows = order[start : start + size]
            if self.last_batch != "keep" and 0 < (rest := n - start - len(rows)) < size:
                if self.last_batch == "merge":
                    rows = order[start:n]
                else:
                    silo.cursor += rest
            silo.cursor += len(rows)
            steps_left -= steps_left > 0
            yield x[rows], y[rows]
            if time.monotonic() >= until_s:
                return

    def num_batches(self, cursor: int, num_samples: int, amount: int | None = None) -> int:
        """How many batches `batches` gives from a cursor on, whatever the clock says."""
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
    """Make the model the silo's at the start of its round; its trained parameters come back."""
    model.load(params_P)
    model.load_personal(silo.kept)
    model.module.train()
    # Dropout, augmentation and the like draw from generators without a name: a silo draws the same on every rank.
    rng.set_all(rng.key(round.seed, purpose="train", round=round.number, silo=silo.id))
    return [p for p in model.module.parameters() if p.requires_grad]


Batch = tuple[torch.Tensor, torch.Tensor]
BatchLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gradient(model: FlatModel, batch: Batch, batch_loss: BatchLoss, precision: str = "float32") -> torch.Tensor:
    """Forward, loss and backward of one batch, which is on the model's device: the gradient is added to `.grad` of the
    parameters, and the loss comes back, without its graph.

    Every gradient that a rule descends along is made here.
    """
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        loss = batch_loss(*batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def whole_gradient(
    silo: LocalSilo,
    model: FlatModel,
    params_P: torch.Tensor,
    round: Round,
    batch_size: int | None,
    precision: str = "float32",
    merge: bool = False,
) -> float:
    """The gradient at params_P over all of the silo's samples, into `.grad` of the parameters; the loss comes back.

    So many samples at a time (null: at once), which matters for memory alone, unless the model has batch statistics;
    `merge` adds those of a short last batch to the one before. Neither cursor nor kept state move.
    """
    trained = load_silo(silo, model, params_P, round)
    x_all, y_all, device = silo.data.x_train, silo.data.y_train, model.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_targets = max(int(round.count(y_all)), 1)
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
    """`.grad` of the shared parameters as one new vector [P], 0 where there is none."""
    vector_P = torch.zeros_like(params_P)
    for param, part in model.pairs(vector_P):
        if param.grad is not None:
            part.copy_(param.grad)
    return vector_P


def kept_vector(silo: LocalSilo, name: str, params_P: torch.Tensor) -> torch.Tensor | None:
    """What the silo keeps under a name, where params_P is; None at first. After a resume it is still on the CPU."""
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
    """The loop over batches that rules share: from params_P on, with the silo's personal parameters.

    `correct` is called without gradients after each backward pass, before clipping and the step: it may change the
    parameters' `.grad` (`model.pairs`). `batch_loss(x, y)` takes the place of the objective's loss of the model's
    outputs. `pull` is lr mu of a proximal term that `correct` adds. The silo's kept state becomes a new dict with its
    personal parameters as they are at the end. Where the round is over after a step, that step is the last.
    """
    module, device = model.module, model.device
    trained = load_silo(silo, model, params_P, round)
    optimizer = work.optimizer.target(trained, lr=work.rate(round), **work.optimizer.arguments)
    if work.keep_optimizer:
        put_back(optimizer, silo.kept)
    step = plain_step(optimizer)
    losses = torch.zeros((), dtype=torch.float64, device=device)
    num_samples = num_steps = 0
    num_targets: int | torch.Tensor = 0
    amount = work.amount.of(work.epochs or work.steps or 1, silo, round)
    first, began_s, part = silo.cursor, time.monotonic(), 1.0

    def loss_of_outputs(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return round.loss(module(x), y)

    for x, y in work.batches(silo, round.seed, amount):
        round.check()
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        for param in trained:  # the optimizer's zero_grad without the profiler's mark, a tenth of a small model's step
            param.grad = None
        loss = gradient(model, (x, y), batch_loss or loss_of_outputs, work.precision)
        if correct is not None:
            with torch.no_grad():
                correct()
        if work.clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, work.clip)
        with torch.no_grad():
            step()
        counted = round.count(y)
        losses += (loss.float() if loss.dtype in HALF else loss) * counted  # float16 ends at 65504
        num_targets = num_targets + counted
        num_samples += len(x)
        num_steps += 1
        if round.over is not None and round.over():
            planned = work.num_batches(first, len(silo.data.x_train), amount)
            part = _part(work, num_steps, planned, time.monotonic() - began_s, pull)
            break
    silo.kept = {**silo.kept, **model.personal()}
    if work.keep_optimizer:
        silo.kept = {n: t for n, t in silo.kept.items() if not n.startswith(KEPT)} | state_to_keep(optimizer)
    targets = int(num_targets)
    loss_mean, held = float(losses) / max(targets, 1), num_gradients(work.optimizer, num_steps, pull)
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
    """The share of the planned gradients that so many steps hold: |a_k|_1 of FedNova over what it was to be. What
    `amount: seconds` would have come to is told by the pace so far."""
    if seconds > 0 and work.amount.limit_s < math.inf:
        planned = min(planned, max(num_steps, math.ceil(num_steps * work.amount.limit_s / seconds)))
    held, whole = (num_gradients(work.optimizer, steps, pull) for steps in (num_steps, planned))
    return num_steps / planned if held is None or not whole else held / whole
