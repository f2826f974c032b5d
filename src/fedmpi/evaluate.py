"""Evaluation: every silo scores the global model on its own test data, and its personal one; only figures leave it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedmpi import rng
from fedmpi.flat import FlatModel
from fedmpi.local import LocalRule, LocalSilo, Round
from fedmpi.local.personal import beside
from fedmpi.objectives import Resolved


def evaluation_key(seed: int, round: int, silo: str) -> int:
    """What a model that draws when it is evaluated draws by, in a run and whenever its checkpoint is evaluated."""
    return rng.key(seed, purpose="evaluate", round=round, silo=silo)


def evaluate_silo(
    model: FlatModel,
    objective: Resolved,
    silo: LocalSilo,
    batch_size: int,
    between: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """Loss, metric and number of test samples of one silo, with the model's shared parameters and its own rest."""
    model.load_personal(silo.kept)
    x, y = silo.data.x_test, silo.data.y_test
    loss, metric, tests = objective.evaluate(model.module, x, y, batch_size, model.device, between)
    return {"loss": loss, "metric": metric, "tests": tests} if tests else {"tests": 0}


def personal_model(rule: LocalRule, silo: LocalSilo, params_P: torch.Tensor) -> tuple[torch.Tensor, LocalSilo] | None:
    """The parameters that the silo would use for itself, and the silo with the rest of that model; None where it has
    none but the global model."""
    find = getattr(rule, "personal", None)
    own_P = None if find is None else find(silo, params_P)
    return None if own_P is None else (own_P, replace(silo, kept=silo.kept | beside(silo).kept))


def fine_tuned(
    rule: LocalRule, model: FlatModel, silo: LocalSilo, params_P: torch.Tensor, round: Round
) -> tuple[torch.Tensor, LocalSilo]:
    """The global parameters as the rule trains them on for this silo alone, and the silo with its layers after that.

    Nothing of it outlives the evaluation: the silo's state and cursor stay. Order and dropout are keyed by a seed of
    their own, and batches begin with an epoch.
    """
    layers = {name: tensor for name, tensor in silo.kept.items() if name in model.first_personal}
    own = replace(silo, cursor=0, kept=layers)
    round = replace(round, seed=rng.key(round.seed, purpose="finetune", round=round.number))
    return params_P + rule.train(own, model, params_P, round).delta_P[: model.num_shared], own


def pooled(values: np.ndarray, counts: np.ndarray) -> float | None:
    """The mean over all test samples: of a loss or a metric that is a mean over samples, exactly the pooled figure;
    of any other, the mean of the silos' figures weighted by their test samples. None without samples.

    >>> pooled(np.array([1.0, 4.0]), np.array([2, 1]))
    2.0
    """
    total = float(counts.sum())
    return float((values * counts).sum() / total) if total else None


def worst_silo(silos: Mapping[str, Mapping[str, Any]], metric: str, maximize: bool) -> dict[str, Any] | None:
    """The silo that the model serves worst, and its metric."""
    scored = {silo: row[metric] for silo, row in silos.items() if metric in row and math.isfinite(row[metric])}
    if not scored:
        return None
    silo = (min if maximize else max)(scored, key=lambda s: scored[s])
    return {"silo": silo, metric: scored[silo]}
