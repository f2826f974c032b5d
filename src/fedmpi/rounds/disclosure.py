"""`disclose`: which figures of single silos leave their rank, and which sums replace them.

    silo     every rank knows every silo's loss, norm and test figures
    cohort   every rank knows the cohort and whose updates were rejected; everything else is summed
    pooled   only sums; the cohort is still known, because every rank draws it

Pooled figures are the same at every level, up to rounding. MPI adds the sums up on the way, so who reads the network
learns the figures of a rank that hosts one silo, unless `secure` masks them. Every rank always knows the silos' numbers
of training samples: placement and weights need them. `secure` implies pooled; whose updates are in the sum is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from fedmpi.errors import ConfigError
from fedmpi.records import StatusTable
from fedmpi.records.table import Column, Pooling

Disclose = Literal["silo", "cohort", "pooled"]

# What each level discloses of single silos. Components name what they read in `reads`.
SHOWN: dict[Disclose, frozenset[str]] = {"cohort": frozenset({"taken"}), "pooled": frozenset()}
READY_SUMS = (
    *("taken", "rejected", "targets", "loss", "not_finite", "norm", "samples", "steps", "weight", "sent"),
    *("normalizer", "square"),
)


def hiding(disclose: Disclose, masked: bool) -> str:
    """The setting that hides figures, for an error: `disclose`, or `secure`, which implies pooled (`masked`)."""
    return f"secure implies disclose: {disclose}" if masked else f"disclose: {disclose}"


def showing(masked: bool) -> str:
    """The setting that would show figures."""
    return "leave secure out" if masked else "disclose: silo"


def refuse_hidden(disclose: Disclose, readers: Sequence[tuple[str, Any]], masked: bool = False) -> None:
    """Raise ValueError if a component reads per-silo figures that `disclose` hides. `readers` are (configuration key,
    component) pairs; `masked`: under `secure`."""
    if disclose == "silo":
        return
    for key, component in readers:
        reads = component.reads
        if reads is None:
            raise ValueError(
                f"{hiding(disclose, masked)}, and {key} does not say what it reads of single silos "
                "(reads = frozenset(...))"
            )
        if hidden := sorted(set(reads) - SHOWN[disclose]):
            raise ValueError(
                f"{hiding(disclose, masked)}, but {key} reads the {' and the '.join(hidden)} of each silo; take "
                f"another, or {showing(masked)}"
            )


def ready_pooling(disclose: Disclose, masked: bool = False, served: Sequence[str] = ()) -> Pooling | None:
    """The training columns that are disclosed and the sums of the rest; None if all columns are disclosed. Masks are
    made between silos whose updates are taken, so these are known if sums are `masked`. The sum of norms is left out
    then: the sums of three norms and of their squares can leave single norms only a narrow range. `served`: columns
    that the server of silos in jobs of their own fills in itself."""
    shown = {"cohort": ("taken", "rejected"), "pooled": ("taken", *served) if masked else ()}
    sums = tuple(name for name in READY_SUMS if not masked or name != "norm")
    return None if disclose == "silo" else Pooling(shown[disclose], sums, _add_up_masked if masked else _add_up)


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


def _add_up_masked(column: Column) -> dict[str, float]:
    """The sums under masks. There is no sum of losses if one of them is not finite: it could be that of one silo."""
    lost = (column("taken") > 0) & (column("targets") > 0) & ~np.isfinite(column("loss"))
    return _add_up(column) | ({"loss": np.nan} if lost.any() else {})


class Heard(NamedTuple):
    """Figures of the silos whose updates were accepted: arrays [S], or arrays [1] of sums and means if pooled."""

    weights: np.ndarray
    sent: np.ndarray
    normalizers: np.ndarray  # pooled: mean weighted by `weights`
    start_losses: np.ndarray  # pooled: nan
    norms: np.ndarray  # pooled: root mean square weighted by `sent`


def heard(ready: StatusTable) -> Heard:
    """Figures of the accepted updates of the round in `ready`."""
    if not ready.pools:
        taken = ready.silo("taken") > 0
        return Heard(*(ready.silo(name)[taken] for name in ("weight", "sent", "normalizer", "start_loss", "norm")))
    weight, sent = ready.sum("weight"), ready.sum("sent")
    norm = float(np.sqrt(ready.sum("square") / sent)) if sent else 0.0
    pooled = (weight, sent, ready.sum("normalizer") / weight if weight else 0.0, np.nan, norm)
    return Heard(*(np.array([value]) for value in pooled))


def refuse_metrics(disclose: Disclose, scorers: Sequence[Any], masked: bool = False) -> None:
    """Raise ConfigError for a metric that sums over silos cannot give, unless `disclose` is silo. `masked`: under
    `secure`."""
    if disclose == "silo":
        return
    for scorer in scorers:
        if not scorer.adds_up:
            raise ConfigError(
                f"objective.metrics: {scorer.name} needs the rows of each silo, and {hiding(disclose, masked)}, so "
                f"that only sums leave a rank; take another metric, or {showing(masked)}"
            )
