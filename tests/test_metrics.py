"""Metrics against scikit-learn on the pooled samples, whatever silos, batches and ranks they are in."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from test_objectives import Fixed

from fedmpi.components import build
from fedmpi.evaluate import PERSONAL, Scores
from fedmpi.metrics import METRICS
from fedmpi.objectives import Objective, resolve
from fedmpi.records import Board, plain

SIZES = (40, 1, 17, 0, 90)  # of silos; one is empty and one has a single sample
IDS = [f"s{i}" for i in range(len(SIZES))]
SKEW = (0.0, 0.4, 1.5, 0.0, -1.0)  # silos' outputs lie apart, so that means over silos are not the pooled figures
CLASSES = {"classification": 4, "binary": 1, "regression": 2, "next_token": 6}


def samples(task, seed=0):
    """Outputs and targets of every silo."""
    rng = np.random.default_rng(seed)
    found = []
    for size, skew in zip(SIZES, SKEW, strict=True):
        num = CLASSES[task]
        if task in ("classification", "next_token"):
            shape = (size,) if task == "classification" else (size, 5)
            targets = rng.choice(
                num, size=shape, p=np.roll(np.geomspace(1, 8, num), int(10 * skew)) / np.geomspace(1, 8, num).sum()
            )
            outputs = rng.normal(size=(*shape, num)) + 1.3 * np.eye(num)[targets] + skew * np.arange(num)
        elif task == "binary":
            targets = rng.random(size) < 0.35
            outputs = rng.normal(size=size) + 1.5 * targets - 0.7 + skew
        else:
            targets = rng.normal(size=(size, num)) * 3 + 1e4 * (1 + skew)
            outputs = targets + rng.normal(size=(size, num))
        dtype = torch.int64 if task in ("classification", "next_token") else torch.float32
        found.append((torch.tensor(outputs, dtype=torch.float32), torch.tensor(targets, dtype=dtype)))
    return found


def scored(fields, task, silos, num_ranks=1, batch_size=7):
    """Rows of silos, figures of all and the objective; the silos are dealt out to ranks, and have models of their own
    that are the global one."""
    objective = resolve(build(Objective, fields, "objective"), task, CLASSES[task])
    scores, ids = Scores(objective), [f"s{i}" for i in range(len(silos))]
    boards = [Board(num_ranks, (), len(silos), scores.columns, scores.num_counts) for _ in range(num_ranks)]
    for i, (outputs, targets) in enumerate(silos):
        tally = objective.score(Fixed(), outputs, targets, batch_size, "cpu")
        for prefix in ("", PERSONAL):
            scores.enter(boards[(i * 7) % num_ranks], i, tally, prefix)
    given: list[np.ndarray] = []
    for board in boards:
        board.share(lambda values: given.append(values) or values)  # type: ignore[func-returns-value]
    boards[0].share(lambda values: np.sum(given, axis=0))
    rows, found = scores.figures(boards[0], ids)
    own_rows, own = scores.figures(boards[0], ids, PERSONAL)
    assert {silo: {PERSONAL + k: plain(v) for k, v in row.items()} for silo, row in rows.items()} == plain(own_rows)
    assert {k: found[k.removeprefix(PERSONAL)] for k in own if not k.endswith(NAMED)} == {
        k: v for k, v in own.items() if not k.endswith(NAMED)
    }
    return rows, found, objective


NAMED = ("worst", "undefined", "raised")  # figures that name others


def whole(silos):
    outputs, targets = (torch.cat(parts) for parts in zip(*silos, strict=True))
    return outputs.double().numpy(), targets.numpy()


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_scikit(name, task, silos):
    z, y = whole(silos)
    if task == "next_token":
        z, y = z.reshape(-1, z.shape[-1]), y.reshape(-1)
    if task == "regression":
        return {
            "mse": lambda: sk.mean_squared_error(y, z),
            "rmse": lambda: sk.mean_squared_error(y, z) ** 0.5,
            "mae": lambda: sk.mean_absolute_error(y, z),
            "r2": lambda: sk.r2_score(y.astype(float), z),
        }[name]()
    p = 1 / (1 + np.exp(-z)) if task == "binary" else softmax(z)
    guess = z > 0 if task == "binary" else z.argmax(-1)
    labels = np.arange(2 if task == "binary" else z.shape[-1])
    return {
        "accuracy": lambda: sk.accuracy_score(y, guess),
        "balanced_accuracy": lambda: sk.balanced_accuracy_score(y, guess),
        "macro_f1": lambda: sk.f1_score(y, guess, average="macro"),
        "top_k": lambda: sk.top_k_accuracy_score(y, z, k=2, labels=labels),
        "auc": lambda: sk.roc_auc_score(
            y, p, **({} if task == "binary" else {"multi_class": "ovr", "average": "macro"})
        ),
        "log_loss": lambda: sk.log_loss(y, p, labels=labels),
        "perplexity": lambda: math.exp(sk.log_loss(y, p, labels=labels)),
        "confusion_matrix": lambda: sk.confusion_matrix(y, guess, labels=labels).tolist(),
        "precision": lambda: sk.precision_score(y, guess),
        "recall": lambda: sk.recall_score(y, guess),
    }[name]()


CASES = [(name, task) for name, cls in METRICS.members.items() for task in vars(cls)["tasks"]]


@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_figure_of_all_is_scikits_on_the_pooled_samples(name, task):
    silos = samples(task)
    metric = {"name": name, "k": 2} if name == "top_k" else {"name": name}
    other = "accuracy" if task != "regression" else "mae"
    fields = {"metrics": [metric] if name == other else [metric, other]}
    rows, found, objective = scored(fields, task, silos)
    key = objective.scorers[0].key
    wanted = by_scikit(name, task, silos)
    if name == "confusion_matrix":
        assert found[key] == wanted and objective.best.name == "accuracy"
        assert not any(key in row for row in rows.values())
    elif name == "auc":
        assert abs(found[key] - wanted) <= found["auc_within"] < 0.01
    else:
        assert found[key] == pytest.approx(wanted, rel=1e-5 if name == "r2" else 1e-6)
    # The same bits for any number of ranks, and whatever the batches.
    assert scored(fields, task, silos, num_ranks=3)[1] == found
    if name not in ("log_loss", "perplexity", "mse", "rmse", "mae", "r2"):
        assert scored(fields, task, silos, batch_size=1000)[1][key] == found[key]
    assert rows.keys() == {"s0", "s1", "s2", "s4"}
