"""What a round came to, and the record that is made of it, from figures that every rank has."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedmpi.evaluate import PERSONAL
from fedmpi.metrics.scorers import pooled
from fedmpi.outcome import RoundOutcome
from fedmpi.records import PHASES, SCHEMA, Record, plain
from fedmpi.rounds.federation import Federation


def training_outcome(fed: Federation, number: int, cohort: Sequence[str], lossless: Collection[str]) -> RoundOutcome:
    """What training has come to, before any vector travels. The `lossless` are silos whose loss was not finite before
    they trained; those with none afterwards are left out of the mean and join them."""
    ready = fed.ready
    chosen = set(cohort)
    cohort_K = np.array([silo in chosen for silo in fed.ids], dtype=bool)
    rejected_K, taken, targets, losses = (ready.silo(name) for name in ("rejected", "taken", "targets", "loss"))
    finite = np.isfinite(losses)
    taken_K = taken > 0
    loss = pooled(np.where(finite, losses, 0.0), targets * taken * finite)
    norm = pooled(ready.silo("norm"), taken)
    no_loss = {*lossless, *(fed.ids[i] for i in np.flatnonzero(~finite).tolist())}

    def told(name: str, of_K: np.ndarray = taken_K) -> np.ndarray:
        return np.where(of_K, ready.silo(name), np.nan)

    return RoundOutcome(
        round=number,
        ids=fed.ids,
        cohort_K=cohort_K,
        rejected_K=rejected_K > 0,
        loss_K=told("loss", taken_K & finite & (targets > 0)),  # where no target counts there is no loss
        norm_K=told("norm"),
        samples_K=told("samples"),
        steps_K=told("steps"),
        loss=plain(loss),
        norm=plain(norm),
        not_finite=[silo for silo in fed.ids if silo in no_loss],
    )


def make_record(fed: Federation, outcome: RoundOutcome) -> tuple[RoundOutcome, Record]:
    """The outcome with test figures, and what the round says of itself."""
    done = fed.done
    tests = done.silo("tests").tolist()
    # Ten thousand silos: no numpy per number.
    taken, losses, norms, samples, steps = (
        getattr(outcome, name).tolist() for name in ("taken_K", "loss_K", "norm_K", "samples_K", "steps_K")
    )
    scored, figures = fed.scores.figures(done, fed.ids)
    own: dict[str, dict[str, Any]] = {}
    if fed.scores.personal:
        own, of_own = fed.scores.figures(done, fed.ids, PERSONAL)
        figures |= of_own
    silos: dict[str, dict[str, Any]] = {}
    ranks = fed.membership.ranks
    for i, silo in enumerate(fed.ids):
        row: dict[str, Any] = {"rank": ranks[i], "num_train": fed.num_train[i]}
        if taken[i]:
            row["train_loss"] = losses[i]
            row["num_samples"] = int(samples[i])
            row["num_steps"] = int(steps[i])
            row["delta_norm"] = norms[i]
        if silo in scored:
            row |= {"num_test": int(tests[i]), **scored[silo], **own.get(silo, {})}
        silos[silo] = row
    record: Record = {"schema": SCHEMA, "round": outcome.round, "cohort": outcome.cohort, "rejected": outcome.rejected}
    if fed.experiment:
        record["experiment"] = fed.experiment
    if outcome.not_finite:
        record["not_finite"] = list(outcome.not_finite)
    measured: dict[str, Any] = {}
    for measurement in fed.measurements:
        measured |= measurement.of(replace(outcome, gram_KK=fed.exchange.gram))
    record |= {"train_loss": outcome.loss, "delta_norm": outcome.norm, **measured}
    record |= figures
    seconds = {name: float(done.rank(name).max()) for name in PHASES}
    record["seconds"] = {"round": float(sum(done.rank(name) for name in PHASES).max()), **seconds}  # type: ignore[union-attr]
    record["seconds"] |= {name: float(done.rank(name).max()) for name in fed.exchange.figures()}
    for name, column in (("bytes_up", "up"), ("bytes_down", "down"), ("bytes_control", "control")):
        record[name] = int(done.rank(column).sum())
    record["peak_rss_bytes"] = [int(v) for v in done.rank("rss")]
    record["silos"] = silos
    record = {name: plain(value) for name, value in record.items()}
    return replace(outcome, rows=record["silos"]), record
