"""Metrics on test sets, and how silos' values become one figure for all.

    metrics: [accuracy, {name: top_k, k: 5}, {name: "mine:dice", maximize: true}]

A metric with states is pooled exactly: states are summed over batches and silos, and the figure is computed from the
sum. All built-in metrics work this way, and so do

    a torchmetrics class whose states all reduce by sum, max or min: "torchmetrics.regression:MeanSquaredError"
    a class of your own, "package.module:Class", with `maximize` and
        init()                           -> a tensor of zeros, integer (counts) or floating (sums)
        update(state, outputs, targets)  -> the state with a batch added
        compute(state)                   -> the figure; nan if it is undefined

A function, "package.module:function", is called as `function(outputs, targets)` with all of a silo's outputs and
targets on the CPU. For all silos there is then only the unweighted mean of the silos' figures, named `silo_mean_dice`.
The same holds for a torchmetrics class with other states.

How states are sent: counts are summed on each rank and then over ranks, which is exact in any order. Other numbers have
one row per silo, and every rank pools them in silo order. So a figure has the same bits for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmpi.components import Family, did_you_mean
from fedmpi.errors import ConfigError
from fedmpi.metrics import builtin, own
from fedmpi.metrics.own import Own
from fedmpi.metrics.scorers import Scorer
from fedmpi.types import Task


class _Metrics(Family):
    """The built-in metrics, and users' own functions and classes."""

    def build(self, value: Any, path: str) -> Any:
        name = value.get("name") if isinstance(value, Mapping) else value
        if not isinstance(name, str) or ":" not in name:
            return super().build(value, path)
        fields = {k: v for k, v in value.items() if k != "name"} if isinstance(value, Mapping) else {}
        return own.find(name, fields, path)


METRICS = _Metrics("metric", builtin.METRICS)


def for_task(metric: Any, task: Task, num_classes: int, path: str) -> Scorer:
    """The scorer of a metric for this task. Raises ConfigError if the metric does not support the task."""
    if not isinstance(metric, Own) and task not in metric.tasks:
        others = [name for name, cls in METRICS.members.items() if task in cls.tasks]  # type: ignore[attr-defined]
        name = METRICS.name_of(metric)
        raise ConfigError(
            f"{path}: '{name}' is for {' and '.join(metric.tasks)}, the data's task is {task}{did_you_mean('', others)}"
        )
    scorer: Scorer = metric.scorer(task, num_classes)
    return scorer
