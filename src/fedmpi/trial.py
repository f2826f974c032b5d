"""A trial of the model on a few samples before training, on a copy: errors that would show rounds later, or never, are
refused with a message."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedmpi.comm import Comm
from fedmpi.config import Config
from fedmpi.errors import ConfigError, agreed
from fedmpi.module import Places, Tie, saved, ties
from fedmpi.objectives import LossAndMetrics
from fedmpi.types import SiloData

log = logging.getLogger("fedmpi")


@dataclass(frozen=True)
class Subject:
    """The module under trial."""

    module: torch.nn.Module
    device: torch.device
    tied: Mapping[str, Tie]
    is_copy: bool


@contextlib.contextmanager
def subject(module: torch.nn.Module, device: torch.device) -> Iterator[Subject]:
    """A copy of the module on the device; if it cannot be copied, the module itself, restored on exit."""
    tied = ties(module)
    try:
        one = Subject(copy.deepcopy(module).to(device), device, tied, is_copy=True)
    except Exception:  # modules may hold things that cannot be copied, such as computed weights
        here = next((tensor.device for tensor in saved(module).values()), torch.device("cpu"))
        one = Subject(module, here, tied, is_copy=False)
    first = {} if one.is_copy else {name: tensor.detach().clone() for name, tensor in saved(module).items()}
    try:
        yield one
    finally:
        with torch.no_grad():
            for name, tensor in (saved(module) if first else {}).items():
                if name in first:
                    tensor.copy_(first[name])


def few(one: Subject, data: SiloData) -> tuple[torch.Tensor, torch.Tensor]:
    """Two training samples, or one, and their targets."""
    return data.x_train[:2].to(one.device), data.y_train[:2].to(one.device)


def tried(
    one: Subject, objective: LossAndMetrics, silos: Mapping[str, SiloData], still: Collection[str] = ()
) -> list[str]:
    """Run two samples through model and loss, in evaluation and in training mode. Returns the names of tensors that the
    model changes but does not save. Watches that parameters in `still` do not change.

    Raises ConfigError if model and data do not fit, or if a tensor leaves its place and cannot be put back.
    """
    if not silos:
        return []
    data = next(iter(silos.values()))
    places = Places(one.module, one.tied)
    places.watch(still)
    x, y = few(one, data)
    one.module.eval()
    try:
        with torch.no_grad():
            loss = objective.loss(one.module(x), y)
    except ConfigError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"model and data disagree: {text[:300]}") from None
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ConfigError(f"objective.loss: '{objective.loss_name}' does not return one number")
    places.settle()
    one.module.train()
    if one.is_copy:
        _forward(one.module, x)  # its errors are ignored: training raises them, or two samples are too few
        places.settle()
    return places.reset()


def refuse_lone_samples(key: str, rule: Any, rounds: int, one: Subject, silos: Mapping[str, SiloData]) -> None:
    """Raise ConfigError if a silo would get a batch of one sample and the model cannot train on it, as with batch
    normalization. `key` is the rule's configuration key."""
    if rule is None or not one.is_copy:
        return
    found = [name for name, data in silos.items() if rule.smallest_batch(name, len(data.x_train), rounds) == 1]
    if not found:
        return
    name, x = found[0], silos[found[0]].x_train
    two = x[:2] if len(x) > 1 else x[:1].expand(2, *x.shape[1:])
    lone, pair = copy.deepcopy(one.module), copy.deepcopy(one.module)  # forward passes may change the module
    why = _forward(lone, x[:1].to(one.device))
    if not why or _forward(pair, two.to(one.device)):
        return
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    who = f"silo '{name}'{more}"
    cannot = f"and the model cannot be trained on one sample ({why})"
    if len(x) == 1:
        raise ConfigError(f"{who} has one training sample, {cannot}; leave it out, or normalize by groups or layers")
    if rule.micro_batch is not None:
        why = f"{key}.micro_batch is {rule.micro_batch}, which leaves a pass over one sample"
        raise ConfigError(f"{who}: {why}, {cannot}; take another")
    if not rule.whole_batches:
        raise ConfigError(f"{who}: {key} trains on a batch of one sample, {cannot}")
    if rule.batch_size == 1:
        raise ConfigError(f"{who}: {key}.batch_size is 1, {cannot}; take 2 or more")
    raise ConfigError(
        f"{who}: {len(x)} samples in batches of {rule.batch_size} leave one of a single sample, {cannot}; set "
        f"{key}.last_batch to {' or '.join(rule.whole_batches)}, or another {key}.batch_size"
    )


def try_out(
    config: Config,
    one: Subject,
    objective: LossAndMetrics,
    opened: Mapping[str, SiloData],
    still: Collection[str],
    speaks: bool,
) -> None:
    """Runs a few samples of this rank's silos through the model. Only the rank that `speaks` logs warnings."""
    if (changing := tried(one, objective, opened, still)) and speaks:
        log.warning(
            "model: %s changes in training and is not saved; every silo's round begins with its first values",
            ", ".join(f"'{name}'" for name in changing),
        )
    refuse_lone_samples("local", config.rule, config.rounds, one, opened)
    refuse_lone_samples("evaluate.finetune", config.evaluate.finetune, 1, one, opened)
    if opened and config.privacy is not None:
        config.privacy.tries(one.module, objective.loss, *few(one, next(iter(opened.values()))))


def try_metrics(
    one: Subject, objective: LossAndMetrics, opened: Mapping[str, SiloData], batch: int, comm: Comm
) -> None:
    """Tries every metric on two samples; if it raises, on a whole batch, silo by silo. Collective.

    A metric may be undefined on some samples, but one that raises everywhere is refused. Built-in metrics report by
    themselves what does not fit, so they are not tried on more than two samples.
    """
    errors: dict[str, str] = {}

    def attempt() -> None:
        for data in opened.values():
            x, y = (data.x_test, data.y_test) if len(data.x_test) else (data.x_train, data.y_train)
            for num in (2, batch):
                tally = objective.score(one.module, x[:num], y[:num], batch, one.device)
                before = errors or {s.name: "" for s in objective.scorers}
                if not (still := {name: text for name, text in tally.raised.items() if name in before}):
                    errors.clear()
                    return
                errors.clear()
                errors.update(still)

    comm.collectively(attempt)
    names = [scorer.name for scorer in objective.scorers]
    seen = np.zeros(2 * len(names))  # per metric: number of ranks that tried it, and on which it raised every time
    if opened:
        seen[: len(names)] = 1
        seen[len(names) :] = [name in errors for name in names]
    tried, failed = comm.share(seen).reshape(2, -1)
    for name, there, nowhere in zip(names, tried, failed, strict=True):
        if there and there == nowhere:
            first = int(np.argmax(comm.gather_number(name in errors)))
            text = comm.broadcast_text(errors.get(name, ""), first)
            raise agreed(ConfigError(f"objective.metrics: '{name}' raised on every silo's samples: {text}"))


def _forward(module: torch.nn.Module, x: torch.Tensor) -> str:
    """The error of a forward pass with these samples; empty if there is none."""
    try:
        outputs = module(x)
    except Exception as error:
        return " ".join(str(error).split())[:120]
    values = [outputs] if isinstance(outputs, torch.Tensor) else []
    for tensor in itertools.chain(values, module.buffers()):
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            return "the result is not a number"
    return ""
