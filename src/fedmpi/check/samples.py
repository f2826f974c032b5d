"""What the data of a silo hold, and what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fedmpi.check.findings import Findings
from fedmpi.targets import CLASS_TASKS
from fedmpi.types import Samples, SiloData, Source, blocks

_ROWS = 20_000  # most samples of a part that are compared with the other part
_SOME = 0.1  # share of test samples that may equal training samples by chance, as in tables of few columns


@dataclass(frozen=True)
class Look:
    """One silo's data in figures."""

    num_train: int
    num_test: int
    features: int  # values per sample
    missing: int  # values that are NaN or infinite, or were filled in, in training and test samples
    labels: tuple[int, ...]  # training samples (targets) per class; empty for regression


def look(silo: str, data: SiloData, source: Source, ignored: int | None, found: Findings) -> Look | None:
    """The figures of an opened silo; what is wrong is noted in `found`. `ignored` is the class that
    counts in no loss. None if samples and targets do not belong together."""
    who = f"silo '{silo}'"
    missing = source.filled.get(silo, 0)
    for part, x, y in (("training", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
        if len(x) != len(y):
            found.fault(f"{who}: {len(x)} {part} samples, but {len(y)} targets; give every sample one target")
            return None
        _types(who, part, x, y, source, found)
        if bad := _not_finite(x):
            missing += bad
            found.fault(
                f"{who}: {bad} of {math.prod(x.shape)} values of its {part} samples are NaN or infinite; fill "
                "them in, or leave these samples out"
            )
        if bad := _not_finite(y):
            found.fault(f"{who}: {bad} of its {part} targets are NaN or infinite; leave these samples out")
        elif len(y):
            _in_range(who, part, y, source, ignored, found)
    labels = histogram(data.y_train, source)
    if source.task in ("classification", "binary") and len(labels) > 1 and sum(map(bool, labels)) == 1:
        only = next(label for label, count in enumerate(labels) if count)
        found.warn(f"{who}: all {len(data.y_train)} training labels are {only}; it cannot learn to tell classes apart")
    elif source.task == "regression" and len(data.y_train) > 1 and bool((data.y_train == data.y_train[0]).all()):
        found.warn(f"{who}: all training targets are equal; check the column or array of the target")
    _leaks(who, data, found)
    return Look(len(data.x_train), len(data.x_test), math.prod(source.shape), missing, labels)


def histogram(y: torch.Tensor, source: Source) -> tuple[int, ...]:
    """Targets per class; those outside the classes, such as ignored ones, are left out. Empty for regression."""
    if source.task == "regression":
        return ()
    classes = 2 if source.task == "binary" else source.num_classes
    flat = y.flatten()
    inside = flat[(flat >= 0) & (flat < classes)].long()
    return tuple(torch.bincount(inside, minlength=classes).tolist())


def _types(who: str, part: str, x: Samples, y: torch.Tensor, source: Source, found: Findings) -> None:
    """Notes samples and targets of a type that the model or the loss will not take."""
    wanted = torch.int64 if source.task == "next_token" else torch.float32
    for what, tensor, right in (
        ("samples", x, wanted),
        ("targets", y, torch.int64 if source.task in CLASS_TASKS else torch.float32),
    ):
        if tensor.dtype != right:
            name = str(right).removeprefix("torch.")
            method = {"float32": "float()", "int64": "long()"}[name]
            text = f"{who}: its {part} {what} are {str(tensor.dtype).removeprefix('torch.')}, and task {source.task} "
            told = f"{text}takes {name}; convert them with .{method}"
            (found.warn if what == "samples" and source.task != "next_token" else found.fault)(told)


def _not_finite(samples: Samples) -> int:
    return sum(int((~torch.isfinite(one)).sum()) for one in blocks(samples) if one.is_floating_point())


def _in_range(who: str, part: str, y: torch.Tensor, source: Source, ignored: int | None, found: Findings) -> None:
    """Notes labels outside the declared classes."""
    if source.task == "regression":
        return
    classes = 2 if source.task == "binary" else source.num_classes
    flat = y.flatten() if ignored is None else y[y != ignored]
    bad = flat[(flat < 0) | (flat >= classes) | (flat % 1 != 0)]
    if len(bad):
        most = f"declare {int(flat.max()) + 1} classes, or " if float(flat.max()) >= classes and classes > 2 else ""
        found.fault(
            f"{who}: {len(bad)} of its {len(flat)} {part} labels are not from 0 to {classes - 1} (such as "
            f"{bad[0].item():g}); {most}correct the labels"
        )


def _leaks(who: str, data: SiloData, found: Findings) -> None:
    """Notes samples that are in the training part and in the test part."""
    values = math.prod(data.x_train.shape[1:])
    if not len(data.x_test) or max(len(data.x_train), len(data.x_test)) > _ROWS or values < 3:
        return
    train = {row for block in blocks(data.x_train) for row in _keys(block)}
    both = sum(row in train for block in blocks(data.x_test) for row in _keys(block))
    if both > _SOME * len(data.x_test):
        share = f"{both} of its {len(data.x_test)} test samples"
        found.warn(f"{who}: {share} are training samples too, so its test figures are too good; split it again")


def _keys(rows: torch.Tensor) -> Iterator[int]:
    """A number for each row; equal rows have the same."""
    for row in rows.contiguous().flatten(1):
        yield hash(row.numpy().tobytes())
