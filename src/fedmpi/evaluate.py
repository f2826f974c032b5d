"""Evaluation: every silo scores the global model on its own test data; only figures leave it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedmpi.flat import FlatModel
from fedmpi.local import LocalSilo
from fedmpi.objectives import Resolved


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
