"""Losses and metrics: built-in ones against formulas on the whole set, user functions, and rejected input."""

import math

import numpy as np
import pytest
import torch
from support.modules import Fixed

from fedmpi.components import build, to_dict
from fedmpi.errors import ConfigError
from fedmpi.losses import LOSSES
from fedmpi.objectives import DEFAULTS, Objective
from fedmpi.objectives import resolve as resolved

N = 53
CLASSES = {"classification": 5, "binary": 1, "regression": 2, "next_token": 6}


def resolve(objective, task):
    return resolved(objective, task, CLASSES[task])


def evaluate(objective, *args):
    """Loss, the value of the deciding metric, and test samples."""
    tally = objective.score(*args)
    return (
        tally.loss,
        tally.figures(objective.scorers)[objective.best.name],
        tally.samples,
    )


def test_set(task):
    rng = torch.Generator().manual_seed(3)
    shape = {"classification": (N, 5), "binary": (N,), "regression": (N, 2), "next_token": (N, 4, 6)}[task]
    outputs = torch.randn(shape, generator=rng)
    if task in ("classification", "next_token"):
        return outputs, torch.randint(shape[-1], shape[:-1], generator=rng)
    targets = torch.randn(shape, generator=rng)
    return outputs, (targets > 0).float() if task == "binary" else targets


test_set.__test__ = False  # type: ignore[attr-defined]


def by_hand(task, outputs, targets):
    o, t = outputs.double().numpy(), targets.numpy()
    if task == "binary":
        return np.mean(np.log1p(np.exp(o)) - t * o), np.mean((1 / (1 + np.exp(-o)) > 0.5) == t)
    if task == "regression":
        return np.mean((o - t) ** 2), np.mean(np.abs(o - t))
    o, t = o.reshape(-1, o.shape[-1]), t.ravel()
    return np.mean(np.log(np.exp(o).sum(1)) - o[np.arange(len(t)), t]), np.mean(o.argmax(1) == t)


@pytest.fixture(params=list(DEFAULTS))
def task(request):
    return request.param


@pytest.mark.parametrize("batch_size", [1, 7, N, 1000])
def test_batches_score_as_the_whole_set(task, batch_size):
    outputs, targets = test_set(task)
    model, objective = Fixed(), resolve(Objective(), task)
    loss, metric, num_samples = evaluate(objective, model, outputs, targets, batch_size, "cpu")
    want_loss, want_metric = by_hand(task, outputs, targets)
    assert (loss, metric) == (pytest.approx(want_loss, rel=1e-6), pytest.approx(want_metric, rel=1e-6))
    assert num_samples == N and len(model.batches) == math.ceil(N / batch_size)
    assert float(objective.loss(outputs, targets)) == pytest.approx(want_loss, rel=1e-6)
    if task != "regression":
        assert metric == round(metric * targets.numel()) / targets.numel()  # counts stay exact


def test_training_loss_is_a_scalar_with_a_gradient(task):
    outputs, targets = test_set(task)
    outputs.requires_grad_()
    loss = resolve(Objective(), task).loss(outputs, targets)
    loss.backward()
    assert loss.shape == () and bool(outputs.grad.any())


def test_modes_are_restored_one_by_one(task):
    model = Fixed()
    evaluate(resolve(Objective(), task), model, *test_set(task), 10, "cpu")
    assert model.training and model.noise.training and not model.frozen.training


def test_modes_are_restored_after_an_error():
    model = Fixed()
    with pytest.raises(ConfigError, match=r"the model gives \[10, 2\] numbers where the targets are \[10\]"):
        evaluate(resolve(Objective(), "regression"), model, torch.randn(20, 2), torch.randn(20), 10, "cpu")
    assert model.training


def test_empty_test_set(task):
    outputs, targets = test_set(task)
    loss, metric, num_samples = evaluate(resolve(Objective(), task), Fixed(), outputs[:0], targets[:0], 8, "cpu")
    assert math.isnan(loss) and math.isnan(metric) and num_samples == 0


@pytest.mark.parametrize(("of", "flat"), [("binary", (4,)), ("regression", (4,))])
def test_a_column_counts_as_a_vector(of, flat):
    outputs, targets = torch.tensor([1.0, -1, 2, 3]), torch.tensor([1.0, 0, 0, 1])
    objective = resolve(Objective(), of)
    assert objective.loss(outputs[:, None], targets) == objective.loss(outputs, targets[:, None])
    assert objective.loss(outputs[:, None], targets) == objective.loss(outputs, targets)


def test_accuracy_at_half_counts_half_as_0():
    x, y = torch.tensor([0.0, 0.0, 1e-6, -1e-6]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert evaluate(resolve(Objective(), "binary"), Fixed(), x, y, 4, "cpu")[1] == 0.5


def test_every_loss_works_for_every_task_it_is_for():
    for name, cls in LOSSES.members.items():
        for of in getattr(cls, "tasks"):  # noqa: B009  of every loss's class
            loss, metric, _ = evaluate(resolve(Objective(loss=name), of), Fixed(), *test_set(of), 10, "cpu")
            assert math.isfinite(loss) and math.isfinite(metric)


def test_direction_of_the_metric():
    assert {of: resolve(Objective(), of).maximize for of in DEFAULTS} == {
        "classification": True,
        "binary": True,
        "regression": False,
        "next_token": True,
    }
    for maximize in (True, False):
        own = {"name": "statistics:mean", "maximize": maximize}
        assert resolve(build(Objective, {"metrics": [own]}), "regression").maximize is maximize


RANKED = {"name": "own_scores:ranked", "maximize": True}


def test_your_own_functions_see_the_whole_test_set(tmp_path, monkeypatch):
    (tmp_path / "own_scores.py").write_text(
        "seen = []\n"
        "def ranked(outputs, targets):\n"
        "    seen.append(len(outputs))\n"
        "    above = (outputs[:, None] > outputs) == (targets[:, None] > targets)\n"
        "    return above.double().mean()\n"
        "def spread(outputs, targets):\n"
        "    seen.append(len(targets))\n"
        "    return (outputs - targets).std()\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import own_scores  # type: ignore[import-not-found]

    outputs, targets = test_set("binary")
    both = resolve(build(Objective, {"loss": "own_scores:spread", "metrics": [RANKED]}), "binary")
    loss, metric, num_samples = evaluate(both, Fixed(), outputs, targets, 7, "cpu")
    assert own_scores.seen == [N, N] and num_samples == N
    assert (loss, metric) == (float((outputs - targets).std()), float(own_scores.ranked(outputs, targets)))
    assert (both.loss_name, both.metric_name) == ("spread", "silo_mean_ranked")
    assert float(both.loss(outputs[:9], targets[:9])) == float((outputs[:9] - targets[:9]).std())
    mixed = resolve(build(Objective, {"metrics": [RANKED]}), "binary")
    assert evaluate(mixed, Fixed(), outputs, targets, 7, "cpu")[:2] == (
        pytest.approx(by_hand("binary", outputs, targets)[0], rel=1e-6),
        metric,
    )
    with pytest.raises(ConfigError, match=r"objective\.metrics\.0: 'own_scores:number' cannot be called"):
        build(Objective, {"metrics": "own_scores:number"}, "objective")


@pytest.mark.parametrize(
    ("fields", "of", "message"),
    [
        ({"loss": "cross_entrpy"}, "binary", "objective.loss: no loss 'cross_entrpy'; did you mean 'cross_entropy'?"),
        (
            {"metrics": ["acuracy"]},
            "binary",
            "objective.metrics.0: no metric 'acuracy'; did you mean 'accuracy'?",
        ),
        ({"loss": "mse"}, "binary", "objective.loss: 'mse' is for regression, the data's task is binary"),
        (
            {"loss": "cross_entropy"},
            "regression",
            "objective.loss: 'cross_entropy' is for classification and next_token, the data's task is regression",
        ),
        (
            {"metrics": ["accuracy", "mae"]},
            "next_token",
            "objective.metrics.1: 'mae' is for regression, the data's task is next_token; available: accuracy, top_k, "
            "log_loss, perplexity",
        ),
        (
            {"loss": "nowhere:f"},
            "binary",
            "objective.loss: cannot import 'nowhere:f': No module named 'nowhere'; modules are looked for in the "
            "current folder and on PYTHONPATH",
        ),
        (
            {"metrics": "statistics:mean"},
            "binary",
            "objective.metrics.0: is a higher 'statistics:mean' better? say so: "
            '{name: "statistics:mean", maximize: true}, or false',
        ),
        (
            {"metric": "accuracy"},
            "binary",
            "objective: configuration has no 'metric'; write metrics: [NAME]",
        ),
        (
            {"maximize": True},
            "binary",
            "objective: configuration has no 'maximize'; write it with the metric, metrics: [{name: "
            '"package.module:function", maximize: true}]',
        ),
        ({"metrics": ["auc", "auc"]}, "binary", "objective.metrics: 'auc' is given twice"),
        (
            {"metrics": [{"name": "operator:loss", "maximize": True}]},
            "binary",
            "objective.metrics.0: cannot import 'operator:loss': module 'operator' has no attribute 'loss'",
        ),
        (
            {"metrics": "confusion_matrix"},
            "binary",
            "objective.metrics: confusion_matrix is no number; add one that tells the best round",
        ),
        ({"best": "auc"}, "binary", "objective.best: no metric 'auc' that is a number; available: accuracy"),
        (
            {"metrics": {"name": "top_k", "k": 5}},
            "classification",
            "top_k: the data have 5 classes, so with k 5 every target is a hit",
        ),
        (
            {"metrics": {"name": "collections:Counter", "maximize": True}},
            "classification",
            "objective.metrics.0: 'collections:Counter' lacks one of init, update, compute, so it cannot be a metric",
        ),
    ],
)
def test_refusals_are_one_line(fields, of, message):
    with pytest.raises(ConfigError) as caught:
        resolve(build(Objective, fields, "objective"), of)
    assert str(caught.value) == message


def test_mapping_round_trip():
    objective = build(Objective, {"loss": "mae", "metrics": ["r2", {"name": "top_k", "k": 3}, RANKED_BY_MEAN]})
    assert build(Objective, to_dict(objective), "objective") == objective
    assert to_dict(objective)["metrics"] == [{"name": "r2"}, {"name": "top_k", "k": 3}, RANKED_BY_MEAN]


RANKED_BY_MEAN = {"name": "statistics:mean", "maximize": False}
