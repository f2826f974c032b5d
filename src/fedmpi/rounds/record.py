"""The outcome of a round and its record, from figures that every rank has."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedmpi.evaluate import PERSONAL
from fedmpi.metrics.scorers import pooled
from fedmpi.outcome import PARTIAL, RoundOutcome, members
from fedmpi.records import PHASES, SCHEMA, Record, plain
from fedmpi.rounds.agreement import may_uncover, silos_taken
from fedmpi.rounds.disclosure import heard
from fedmpi.rounds.federation import Federation
from fedmpi.transforms import CHECKS


def training_outcome(fed: Federation, number: int, cohort: Sequence[str], lossless: Collection[str]) -> RoundOutcome:
    """The outcome of training, before any vector is sent. `lossless` names the silos whose loss was not finite before
    training. A silo whose loss is not finite afterwards is left out of the mean loss and listed with them."""
    ready = fed.ready
    cohort_K = members(fed.ids, cohort)
    if ready.pools:
        return _pooled_outcome(fed, number, cohort_K)
    rejected, taken, targets, losses = (ready.silo(name) for name in ("rejected", "taken", "targets", "loss"))
    finite = np.isfinite(losses)
    late_K = ready.silo("late").astype(np.int64) if "late" in fed.told else None
    taken_K = taken > 0
    if late_K is not None:  # the update that was taken of a late or rejected silo is one of an earlier round
        taken_K = taken_K & cohort_K & (rejected == 0) & (late_K <= PARTIAL)
        taken = taken_K.astype(np.float64)
    loss = pooled(np.where(finite, losses, 0.0), targets * taken * finite)
    norm = pooled(ready.silo("norm"), taken)
    no_loss = {*lossless, *(fed.ids[i] for i in np.flatnonzero(~finite).tolist())}

    def told(name: str, of_K: np.ndarray = taken_K) -> np.ndarray:
        return np.where(of_K, ready.silo(name), np.nan)

    return RoundOutcome(
        round=number,
        ids=fed.ids,
        cohort_K=cohort_K,
        rejected_K=rejected > 0,
        loss_K=told("loss", taken_K & finite & (targets > 0)),  # no targets, no loss
        norm_K=told("norm"),
        samples_K=told("samples"),
        steps_K=told("steps"),
        loss=plain(loss),
        norm=plain(norm),
        not_finite=[silo for silo in fed.ids if silo in no_loss],
        num_rejected=int((rejected > 0).sum()),
        num_not_finite=len(no_loss),
        late_K=late_K,
    )


def _pooled_outcome(fed: Federation, number: int, cohort_K: np.ndarray) -> RoundOutcome:
    """The outcome if only sums of the training figures left their ranks."""
    ready = fed.ready
    blank_K = np.full(len(fed.ids), np.nan)
    norm: float | None
    if fed.secure is None:
        targets, taken, num_not_finite = (ready.sum(name) for name in ("targets", "taken", "not_finite"))
        num_rejected, norm = int(ready.sum("rejected")), ready.sum("norm") / taken if taken else None
    elif may_uncover(fed):
        targets, num_not_finite = ready.sum("targets"), ready.sum("not_finite")
        norm = float(heard(ready).norms[0])  # the root mean square, because it tells less of single norms
    else:  # only who was taken is known
        targets = num_not_finite = 0.0
        norm = None
    late_K, told = None, dict[str, Any]()
    if fed.secure is not None and fed.secure.apart:
        told = {"summed": silos_taken(fed)}
        late_K, num_rejected = ready.silo("late").astype(np.int64), int(ready.silo("rejected").sum())
    elif fed.secure is not None:
        num_rejected = int((cohort_K & ~(ready.silo("taken") > 0)).sum())
    return RoundOutcome(
        round=number,
        ids=fed.ids,
        cohort_K=cohort_K,
        rejected_K=ready.silo("rejected") > 0 if fed.disclose == "cohort" else None,
        loss_K=blank_K,
        norm_K=blank_K,
        samples_K=blank_K,
        steps_K=blank_K,
        loss=plain(ready.sum("loss") / targets) if targets else None,
        norm=plain(norm),
        num_rejected=num_rejected,
        num_not_finite=int(num_not_finite),
        late_K=late_K,
        told=told,
        given_up="" if fed.remote is None else fed.remote.given_up,
    )


def make_record(fed: Federation, outcome: RoundOutcome) -> tuple[RoundOutcome, Record]:
    """The outcome with test figures added, and the round's record."""
    done = fed.done
    scored, figures = fed.scores.figures(done, fed.ids)
    own: dict[str, dict[str, Any]] = {}
    if fed.scores.personal:
        own, of_own = fed.scores.figures(done, fed.ids, PERSONAL)
        figures |= of_own
    record: Record = {"schema": SCHEMA, "round": outcome.round, "cohort": outcome.cohort}
    if outcome.rejected_K is not None:
        record["rejected"] = outcome.rejected
    else:
        record["num_rejected"] = outcome.num_rejected
    if outcome.late_K is not None:
        record |= {"deadline_s": outcome.deadline_s, "late": outcome.late}
        stale_K = fed.ready.silo("stale") if "stale" in fed.told else np.zeros(0)
        if stale_K.any():
            record["stale"] = {silo: int(s) for silo, s in zip(fed.ids, stale_K.tolist(), strict=True) if s}
    record |= outcome.told
    if outcome.given_up:
        record["given_up"] = outcome.given_up
    if fed.private is not None:
        record |= {"epsilon": fed.private.epsilon, "delta": fed.private.delta}
    if outcome.repeats:
        record["repeats"] = outcome.repeats
    if fed.experiment:
        record["experiment"] = fed.experiment
    if set((by := fed.rejected_by).values()) - {CHECKS}:
        record["rejected_by"] = by
    if outcome.not_finite:
        record["not_finite"] = list(outcome.not_finite)
    elif outcome.num_not_finite:
        record["num_not_finite"] = outcome.num_not_finite
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
    record["silos"] = _rows(fed, outcome, scored, own)
    record = {name: plain(value) for name, value in record.items()}
    return replace(outcome, rows=record["silos"]), record


def _rows(
    fed: Federation,
    outcome: RoundOutcome,
    scored: Mapping[str, Mapping[str, Any]],
    own: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """The record's row of each silo."""
    ranks = fed.membership.ranks
    rows: dict[str, dict[str, Any]] = {
        silo: {"rank": rank, "num_train": num} for silo, rank, num in zip(fed.ids, ranks, fed.num_train, strict=True)
    }
    if fed.disclose != "silo":
        return rows
    # Lists: indexing numpy arrays one element at a time is slow for ten thousand silos.
    taken, losses, norms, samples, steps = (
        getattr(outcome, name).tolist() for name in ("taken_K", "loss_K", "norm_K", "samples_K", "steps_K")
    )
    tests = fed.done.silo("tests").tolist()
    for i, (silo, row) in enumerate(rows.items()):
        if taken[i]:
            row["train_loss"] = losses[i]
            row["num_samples"] = int(samples[i])
            row["num_steps"] = int(steps[i])
            row["delta_norm"] = norms[i]
        if silo in scored:
            row |= {"num_test": int(tests[i]), **scored[silo], **own.get(silo, {})}
    return rows
