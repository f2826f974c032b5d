"""Which figures of single silos leave their rank, and what leaves it in their place.

    silo     all of them: every rank knows every silo's loss, norm and test figures
    cohort   which silos took part and whose update was rejected; of all else sums
    pooled   sums alone, and who was drawn, which no message tells

The figures of all silos are then the same up to rounding. A sum is over the silos of all ranks; MPI adds it up on its
way, so that of a rank with one silo somebody who reads the network learns that silo's. Numbers of training samples are
known to all under each: placement and weights rest on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from fedmpi.errors import ConfigError
from fedmpi.records import StatusTable
from fedmpi.records.table import Column, Pooling

Disclose = Literal["silo", "cohort", "pooled"]

# What components may say that they read of single silos, and what each level has of it.
SHOWN: dict[Disclose, frozenset[str]] = {"cohort": frozenset({"taken"}), "pooled": frozenset()}
READY_SUMS = (
    *("taken", "rejected", "targets", "loss", "not_finite", "norm", "samples", "steps", "weight", "sent"),
    *("normalizer", "square"),
)


def refuse_hidden(disclose: Disclose, readers: Sequence[tuple[str, Any]]) -> None:
    """ValueError where a component, given with its key, reads of single silos what does not leave their rank."""
    if disclose == "silo":
        return
    for key, component in readers:
        reads = component.reads
        if reads is None:
            raise ValueError(
                f"disclose: {disclose}, and {key} does not say what it reads of single silos (reads = frozenset(...))"
            )
        if hidden := sorted(set(reads) - SHOWN[disclose]):
            raise ValueError(
                f"disclose: {disclose}, but {key} reads the {' and the '.join(hidden)} of each silo; take another, or "
                "disclose: silo"
            )


def ready_pooling(disclose: Disclose) -> Pooling | None:
    """What of training leaves a rank."""
    shown = {"cohort": ("taken", "rejected"), "pooled": ()}
    return None if disclose == "silo" else Pooling(shown[disclose], READY_SUMS, _add_up)


def _add_up(column: Column) -> dict[str, float]:
    taken = column("taken") > 0
    columns = ("loss", "targets", "norm", "samples", "steps", "weight", "sent", "normalizer")
    loss, targets, norm, samples, steps, weight, sent, normalizer = (column(name)[taken] for name in columns)
    finite = np.isfinite(loss)
    targets = targets * finite
    return {
        "taken": float(taken.sum()),
        "rejected": float((column("rejected") > 0).sum()),
        "targets": float(targets.sum()),
        "loss": float((np.where(targets > 0, loss, 0.0) * targets).sum()),
        "not_finite": float((~finite).sum()),
        "norm": float(norm.sum()),
        "samples": float(samples.sum()),
        "steps": float(steps.sum()),
        "weight": float(weight.sum()),
        "sent": float(sent.sum()),
        "normalizer": float((weight * normalizer).sum()),
        "square": float((sent * norm**2).sum()),
    }


class Heard(NamedTuple):
    """What is known of the silos whose updates were taken: arrays [S], or [1] with sums and means where rows are
    pooled."""

    weights: np.ndarray
    sent: np.ndarray
    normalizers: np.ndarray  # pooled: their mean by weight
    start_losses: np.ndarray  # pooled: nan
    norms: np.ndarray  # pooled: the root of the mean square by what was sent


def heard(ready: StatusTable) -> Heard:
    """Of the round that `ready` tells of."""
    if not ready.pools:
        taken = ready.silo("taken") > 0
        return Heard(*(ready.silo(name)[taken] for name in ("weight", "sent", "normalizer", "start_loss", "norm")))
    weight, sent = ready.sum("weight"), ready.sum("sent")
    norm = float(np.sqrt(ready.sum("square") / sent)) if sent else 0.0
    pooled = (weight, sent, ready.sum("normalizer") / weight if weight else 0.0, np.nan, norm)
    return Heard(*(np.array([value]) for value in pooled))


def refuse_metrics(disclose: Disclose, scorers: Sequence[Any]) -> None:
    """ConfigError for a metric whose figure of all silos is no sum."""
    if disclose == "silo":
        return
    for scorer in scorers:
        if not scorer.adds_up:
            raise ConfigError(
                f"objective.metrics: {scorer.name} of all silos is made from rows of each, and disclose: {disclose} "
                "lets only sums leave a rank; take another metric, or disclose: silo"
            )
