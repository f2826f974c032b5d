"""A trial of the model on a few samples before training, on a copy: errors that would show rounds later, or never, are
refused with a message."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedmpi.errors import ConfigError
from fedmpi.module import Places, Tie, saved, ties
from fedmpi.objectives import LossAndMetrics
from fedmpi.types import SiloData


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
