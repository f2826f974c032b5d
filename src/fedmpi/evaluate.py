"""Evaluation: every silo scores the global model, and its personal one, on its own test data. Only figures, sums and
counts leave the silo (metrics/)."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np
import torch

from fedmpi import rng
from fedmpi.errors import ConfigError
from fedmpi.flat import FlatModel
from fedmpi.local import LocalRule, LocalSilo, Round
from fedmpi.local.personal import unprefixed
from fedmpi.metrics.scorers import NOTHING, Scorer, pooled
from fedmpi.objectives import LOSS, MOST_METRICS, LossAndMetrics, Tally
from fedmpi.records import Record, StatusTable
from fedmpi.records.measurements import spread
from fedmpi.records.table import Column, Pooling

log = logging.getLogger("fedmpi")


def evaluation_key(seed: int, round: int, silo: str) -> int:
    """Random key for models that draw numbers in evaluation; the same during a run and for its checkpoint later."""
    return rng.key(seed, purpose="evaluate", round=round, silo=silo)


def evaluate_silo(
    model: FlatModel,
    objective: LossAndMetrics,
    silo: LocalSilo,
    batch_size: int,
    between: Callable[[], Any] = lambda: None,
) -> Tally:
    """Scores the model's shared parameters, with the silo's personal tensors, on the silo's test set."""
    model.load_personal(silo.kept)
    x, y = silo.data.x_test, silo.data.y_test
    return objective.score(model.module, x, y, batch_size, model.device, between)


def personal_model(rule: LocalRule, silo: LocalSilo, params_P: torch.Tensor) -> tuple[torch.Tensor, LocalSilo] | None:
    """The silo's personal parameters [P], and the silo with the other tensors of that model; None if the silo only uses
    the global model."""
    own_P = rule.personal(silo, params_P)
    return None if own_P is None else (own_P, replace(silo, kept=silo.kept | unprefixed(silo).kept))


Tuning = tuple[LocalRule, Round]  # rule that fine-tunes the last model on every silo, and the round


def own_model(
    rule: LocalRule, model: FlatModel, silo: LocalSilo, params_P: torch.Tensor, tuning: Tuning | None
) -> tuple[torch.Tensor, LocalSilo] | None:
    """The parameters [P] of the silo's own model, and the silo with the other tensors of that model.

    With `tuning` they are fine-tuned; else those of the local rule; else the global ones with personal layers, where
    `params_P` and `silo` themselves are returned. None if the silo only uses the global model."""
    if tuning is not None:
        return fine_tuned(tuning[0], model, silo, params_P, tuning[1])
    if (found := personal_model(rule, silo, params_P)) is not None:
        return found
    return (params_P, silo) if model.is_personal(silo.kept) else None


def load_own(rule: LocalRule, model: FlatModel, silo: LocalSilo, params_P: torch.Tensor, tuning: Tuning | None) -> bool:
    """Loads the silo's own model, or the global one; returns whether it is its own. Raises ConfigError if the model
    would have personal layers that were never trained."""
    own = own_model(rule, model, silo, params_P, tuning)
    if own is None and model.has_personal:
        raise ConfigError(f"silo '{silo.id}' has not trained yet: its personal layers are as they began")
    own_P, own_silo = own or (params_P, silo)
    model.load(own_P)
    model.load_personal(own_silo.kept)
    return own is not None


def fine_tuned(
    rule: LocalRule, model: FlatModel, silo: LocalSilo, params_P: torch.Tensor, round: Round
) -> tuple[torch.Tensor, LocalSilo]:
    """The global parameters after fine-tuning on this silo alone, and the silo with its fine-tuned layers.

    Has no lasting effect: the silo's state and cursor stay unchanged. Data order and dropout use a separate seed, and
    batches start with a new epoch.
    """
    layers = {name: tensor for name, tensor in silo.kept.items() if name in model.first_personal}
    own = replace(silo, cursor=0, kept=layers)
    round = replace(round, seed=rng.key(round.seed, purpose="finetune", round=round.number))
    model.thaw()
    return params_P + rule.train(own, model, params_P, round)["delta"], own


def worst_silo(silos: Mapping[str, Mapping[str, Any]], metric: str, maximize: bool) -> dict[str, Any] | None:
    """The silo with the worst metric, and that metric; None if no silo has a finite one."""
    scored = {silo: row[metric] for silo, row in silos.items() if metric in row and math.isfinite(row[metric])}
    if not scored:
        return None
    silo = (min if maximize else max)(scored, key=lambda s: scored[s])
    return {"silo": silo, metric: scored[silo]}


def tell(when: str, silo: str, tally: Tally) -> None:
    """Logs the exceptions of a user's loss or metrics, whose values are then missing."""
    for name, error in tally.raised.items():
        log.warning("%s, silo '%s': %s raised %s", when, silo, name, error)


PERSONAL = "personal_"  # prefix of the figures of the silos' own models
# Bits in the column `raised`: of the first metric that raised, and of the first whose counts and sums are missing.
RAISED, LOST = 1, 1 << MOST_METRICS + 1


@dataclass(frozen=True)
class Scores:
    """The layout of evaluations on a board that ranks share, and the figures that a record makes of them.

    board = StatusTable(num_ranks, rank_columns, num_silos, scores.columns, scores.num_counts)
    scores.enter(board, i, tally)                   the evaluation of silo i, on the rank that has it
    board.share(comm.share)
    rows, figures = scores.figures(board, ids)      per silo, and over all; the same on every rank
    """

    objective: LossAndMetrics
    personal: bool = True  # whether silos may have models of their own
    pools: bool = False  # whether only sums over silos leave a rank

    @classmethod
    def of(
        cls, objective: LossAndMetrics, rule: LocalRule, finetune: LocalRule | None, layers: bool, pools: bool = False
    ) -> Scores:
        """Scores with personal figures if the rule, fine-tuning or personal `layers` may produce any."""
        return cls(objective, layers or finetune is not None or rule.is_personal, pools)

    @property
    def better(self) -> dict[str, bool]:
        """Whether higher is better, by the record key of each metric that is a number."""
        found = {one.key: one.maximize for one in self.objective.scorers if one.maximize is not None}
        return found | {PERSONAL + key: maximize for key, maximize in found.items() if self.personal}

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """Column names of a silo's row."""
        one = ["tests", "targets", "loss", "raised"]
        for i, scorer in enumerate(self.objective.scorers):
            one += [f"value/{i}", *(f"sum/{i}/{j}" for j in range(scorer.num_sums))]
        return tuple(prefix + name for prefix in self._prefixes for name in one)

    @functools.cached_property
    def pooling(self) -> Pooling | None:
        """The sums of rows that leave a rank; None if the rows themselves do."""
        if not self.pools:
            return None
        names = ["silos", "tests", "targets", "loss", "failed"]
        for i, scorer in enumerate(self.objective.scorers):
            names += [f"{what}/{i}" for what in ("weight", "value", "there", "undefined", "raised")]
            names += [f"sum/{i}/{j}" for j in range(scorer.num_sums)]
        return Pooling((), tuple(prefix + name for prefix in self._prefixes for name in names), self._add_up)

    def _add_up(self, column: Column) -> dict[str, float]:
        """Sums over a rank's silos, by name."""
        sums: dict[str, float] = {}
        for prefix in self._prefixes:
            tested = column(f"{prefix}tests") > 0
            raised = column(f"{prefix}raised")[tested].astype(np.int64)
            failed = raised & (RAISED << len(self.objective.scorers)) > 0
            loss, targets = column(f"{prefix}loss")[tested], column(f"{prefix}targets")[tested]
            targets = np.where(failed, 0.0, targets)
            found = {"silos": tested.sum(), "tests": column(f"{prefix}tests").sum(), "targets": targets.sum()}
            found |= {"loss": (np.where(targets > 0, loss, 0.0) * targets).sum(), "failed": failed.sum()}
            for i, scorer in enumerate(self.objective.scorers):
                broken, there = raised & (RAISED << i) > 0, raised & (LOST << i) == 0
                values = column(f"{prefix}value/{i}")[tested]
                rows = [column(f"{prefix}sum/{i}/{j}")[tested] for j in range(scorer.num_sums)]
                sums_KS = np.stack(rows, axis=1) if rows else np.zeros((len(values), 0))
                defined = there & ~np.isnan(values)
                pairs = zip(values[defined].tolist(), sums_KS[defined], strict=True)
                weights = np.array([scorer.weight(value, row_S) for value, row_S in pairs])
                counted = np.where(weights > 0, values[defined], 0.0)
                found |= {f"weight/{i}": weights.sum(), f"value/{i}": (counted * weights).sum()}
                found |= {f"there/{i}": there.sum(), f"raised/{i}": broken.sum()}
                found[f"undefined/{i}"] = (np.isnan(values) & ~broken).sum()
                found |= {f"sum/{i}/{j}": total for j, total in enumerate(sums_KS[there].sum(axis=0).tolist())}
            sums |= {prefix + name: float(value) for name, value in found.items()}
        return sums

    def _pooled_figures(self, board: StatusTable, prefix: str) -> Record:
        """Figures over all silos, computed from sums; for undefined or raising metrics, the number of silos."""

        def total(name: str) -> float:
            return board.sum(prefix + name)

        if not total("tests"):
            return {}
        found: Record = {f"{prefix}loss": total("loss") / total("targets") if total("targets") else None}
        undefined, threw = {}, {LOSS: int(total("failed"))}
        start = self._prefixes.index(prefix) * self._num_counts
        for i, scorer in enumerate(self.objective.scorers):
            weight = total(f"weight/{i}")
            values = np.array([total(f"value/{i}") / weight if weight else np.nan])
            sums_KS = np.array([[total(f"sum/{i}/{j}") for j in range(scorer.num_sums)]])
            rows = slice(0, 1 if total(f"there/{i}") else 0)
            counts = board.counts[start : start + scorer.num_counts]
            start += scorer.num_counts
            figures = _of_all(scorer, values[rows], sums_KS[rows], counts)
            found |= {prefix + key: value for key, value in figures.items()}
            if scorer.maximize is not None:
                undefined[prefix + scorer.name] = int(total(f"undefined/{i}"))
                threw[prefix + scorer.name] = int(total(f"raised/{i}"))
        for key, numbers in (("undefined", undefined), ("raised", threw)):
            some = {name: number for name, number in numbers.items() if number}
            found |= {prefix + key: some} if some else {}
        return found

    @property
    def num_counts(self) -> int:
        """Number of counts on the board."""
        return len(self._prefixes) * self._num_counts

    @property
    def _prefixes(self) -> tuple[str, ...]:
        return ("", PERSONAL) if self.personal else ("",)

    @property
    def _num_counts(self) -> int:
        return sum(scorer.num_counts for scorer in self.objective.scorers)

    def enter(self, board: StatusTable, silo: int, tally: Tally, prefix: str = "") -> None:
        """Enters a silo's tally for the global model or, with the prefix, its own. Call once per round: counts add."""
        if not tally.samples:
            return
        scorers = self.objective.scorers
        row = {"tests": tally.samples, "targets": tally.targets, "loss": tally.loss}
        raised = RAISED << len(scorers) if LOSS in tally.raised else 0
        start = self._prefixes.index(prefix) * self._num_counts
        for i, scorer in enumerate(scorers):
            name = scorer.name
            row[f"value/{i}"] = tally.values.get(name, math.nan)
            raised |= (RAISED << i if name in tally.raised else 0) | (0 if name in tally.parts else LOST << i)
            counts, sums = tally.parts.get(name, (NOTHING, NOTHING))
            for j, number in enumerate(sums.tolist()):
                row[f"sum/{i}/{j}"] = number
            if len(counts):
                board.counts[start : start + scorer.num_counts] += counts
            start += scorer.num_counts
        board.set_silo(silo, **{prefix + name: value for name, value in row.items()}, **{prefix + "raised": raised})

    def figures(
        self, board: StatusTable, ids: Sequence[str], prefix: str = ""
    ) -> tuple[dict[str, dict[str, Any]], Record]:
        """Each tested silo's figures, and those over all: of the global model or, with the prefix, of the silos' own.

        Both are empty if nothing was tested; the first is empty if only sums leave a rank."""
        if self.pools:
            return {}, self._pooled_figures(board, prefix)
        tests = board.silo(f"{prefix}tests")
        if not tests.any():
            return {}, {}
        scorers = self.objective.scorers
        tested = np.flatnonzero(tests)
        names = [ids[i] for i in tested.tolist()]
        raised = board.silo(f"{prefix}raised")[tested].astype(np.int64)
        losses, targets = board.silo(f"{prefix}loss")[tested], board.silo(f"{prefix}targets")[tested]
        failed = raised & (RAISED << len(scorers)) > 0
        rows: dict[str, dict[str, Any]] = {silo: {} for silo in names}
        for silo, loss in zip(names, losses.tolist(), strict=True):
            rows[silo][f"{prefix}loss"] = loss
        found: Record = {f"{prefix}loss": pooled(losses, np.where(failed, 0, targets))}
        undefined: dict[str, list[str]] = {}
        threw = {LOSS: list(compress(names, failed))} if failed.any() else {}
        start = self._prefixes.index(prefix) * self._num_counts
        for m, scorer in enumerate(scorers):
            broken, there = raised & (RAISED << m) > 0, raised & (LOST << m) == 0
            values = board.silo(f"{prefix}value/{m}")[tested]
            sums = np.zeros((len(tested), scorer.num_sums))
            for j in range(scorer.num_sums):
                sums[:, j] = board.silo(f"{prefix}sum/{m}/{j}")[tested]
            counts = board.counts[start : start + scorer.num_counts]
            start += scorer.num_counts
            found |= {prefix + key: v for key, v in _of_all(scorer, values[there], sums[there], counts).items()}
            if scorer.maximize is None:
                continue
            for silo, value in zip(names, values.tolist(), strict=True):
                rows[silo][prefix + scorer.name] = scorer.shown(value)
            if broken.any():
                threw[prefix + scorer.name] = list(compress(names, broken))
            if (nowhere := np.isnan(values) & ~broken).any():
                undefined[prefix + scorer.name] = list(compress(names, nowhere))
        best = self.objective.best
        found[f"{prefix}worst"] = worst_silo(rows, prefix + best.name, self.objective.maximize)
        if not prefix:
            of_best = np.array([row[best.name] for row in rows.values()])
            found["spread"] = spread(of_best, self.objective.maximize)
        found |= {f"{prefix}undefined": undefined} if undefined else {}
        return rows, found | ({f"{prefix}raised": threw} if threw else {})


def _of_all(scorer: Scorer, values_K: np.ndarray, sums_KS: np.ndarray, counts_C: np.ndarray) -> dict[str, Any]:
    """Figures over all silos; None if the metric raises: a user's code may not handle the summed parts."""
    try:
        return scorer.of_all(values_K, sums_KS, counts_C)
    except Exception as error:
        log.warning("%s of all silos: %s: %s", scorer.name, type(error).__name__, error)
        return {scorer.key: None}
