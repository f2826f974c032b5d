"""The record of a round, from figures that every rank has."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from fedmpi.evaluate import PERSONAL
from fedmpi.metrics.scorers import pooled
from fedmpi.records import PHASES, Record, gradient_diversity, plain
from fedmpi.rounds.federation import READY_SILO, Federation


def training_figures(fed: Federation, lossless: set[str]) -> tuple[float | None, float | None]:
    """Training loss and mean norm of deltas of those that were heard; None where no loss is finite. Silos whose loss is
    not are left out and join the `lossless`."""
    taken, targets, losses = (fed.ready.silo(name) for name in ("taken", "targets", "loss"))
    finite = np.isfinite(losses)
    lossless.update(fed.ids[int(i)] for i in np.flatnonzero(~finite))
    loss = pooled(np.where(finite, losses, 0.0), targets * taken * finite)
    norm = pooled(fed.ready.silo("norm"), taken)
    return plain(loss), plain(norm)


def make_record(
    fed: Federation,
    number: int,
    cohort: Sequence[str],
    loss: float | None,
    norm: float | None,
    lossless: Collection[str],
) -> Record:
    """What the round says of itself, from figures that every rank has."""
    ready, done = fed.ready, fed.done
    tests = done.silo("tests").tolist()
    rejected = [silo for silo, no in zip(fed.ids, ready.silo("rejected"), strict=True) if no]
    in_cohort = set(cohort)
    of_ready = {name: ready.silo(name).tolist() for name in READY_SILO}  # ten thousand silos: no numpy per number
    scored, figures = fed.scores.figures(done, fed.ids)
    own: dict[str, dict[str, Any]] = {}
    if fed.scores.personal:
        own, of_own = fed.scores.figures(done, fed.ids, PERSONAL)
        figures |= of_own
    silos: dict[str, dict[str, Any]] = {}
    ranks = fed.membership.ranks
    for i, silo in enumerate(fed.ids):
        row: dict[str, Any] = {"rank": ranks[i], "num_train": fed.num_train[i]}
        if silo in in_cohort and of_ready["taken"][i]:
            # Where no target counts there is no loss.
            row["train_loss"] = of_ready["loss"][i] if of_ready["targets"][i] else None
            row["num_samples"] = int(of_ready["samples"][i])
            row["num_steps"] = int(of_ready["steps"][i])
            row["delta_norm"] = of_ready["norm"][i]
        if silo in scored:
            row |= {"num_test": int(tests[i]), **scored[silo], **own.get(silo, {})}
        silos[silo] = row
    record: Record = {"round": number, "cohort": list(cohort), "rejected": rejected}
    if lossless:
        record["not_finite"] = [silo for silo in fed.ids if silo in lossless]
    record |= {"train_loss": loss, "delta_norm": norm, **_gradient_diversity(fed)}
    record |= figures
    seconds = {name: float(done.rank(name).max()) for name in PHASES}
    record["seconds"] = {"round": float(sum(done.rank(name) for name in PHASES).max()), **seconds}  # type: ignore[union-attr]
    record["seconds"] |= {name: float(done.rank(name).max()) for name in fed.exchange.figures()}
    for name, column in (("bytes_up", "up"), ("bytes_down", "down"), ("bytes_control", "control")):
        record[name] = int(done.rank(column).sum())
    record["peak_rss_bytes"] = [int(v) for v in done.rank("rss")]
    record["silos"] = silos
    return {name: plain(value) for name, value in record.items()}


def _gradient_diversity(fed: Federation) -> dict[str, Any]:
    """What the deltas' inner products say, where they were asked for."""
    gram_KK = fed.exchange.gram
    if gram_KK is None:
        return {}
    heard = [silo for silo, sent in zip(fed.ids, fed.ready.silo("sent"), strict=True) if sent]
    return gradient_diversity(gram_KK, heard if fed.gram == "matrix" else None)
