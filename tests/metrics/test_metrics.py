"""Metrics against scikit-learn on the pooled samples, for any distribution over silos, batches and ranks."""

import logging
import math
import re
import sys

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from support.modules import Fixed
from support.runs import config, put_back, refused, run  # noqa: F401

from fedmpi import results
from fedmpi.components import build, import_object
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.evaluate import PERSONAL, Scores
from fedmpi.flat import FlatModel, sha256
from fedmpi.local import RULES, LocalSilo, Round
from fedmpi.metrics import METRICS
from fedmpi.metrics.builtin import area, binned, log_odds
from fedmpi.objectives import Objective, resolve
from fedmpi.records import StatusTable, plain
from fedmpi.targets import Targets
from fedmpi.types import SiloData

SIZES = (40, 1, 17, 0, 90)  # of silos; one is empty and one has a single sample
IDS = [f"s{i}" for i in range(len(SIZES))]
SKEW = (0.0, 0.4, 1.5, 0.0, -1.0)  # silos' outputs differ, so that means over silos are not the pooled figures
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
    """Rows of silos, figures of all and the objective. Ranks share the silos, whose own models equal the global one."""
    objective = resolve(build(Objective, fields, "objective"), task, CLASSES[task])
    scores, ids = Scores(objective), [f"s{i}" for i in range(len(silos))]
    boards = [StatusTable(num_ranks, (), len(silos), scores.columns, scores.num_counts) for _ in range(num_ranks)]
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
    figures = {k: plain(v) for k, v in own.items() if not k.endswith(NAMED)}
    assert {k: plain(found[k.removeprefix(PERSONAL)]) for k in figures} == figures
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
    # The same bits for any number of ranks and any batches.
    assert scored(fields, task, silos, num_ranks=3)[1] == found
    if name not in ("log_loss", "perplexity", "mse", "rmse", "mae", "r2"):
        assert scored(fields, task, silos, batch_size=1000)[1][key] == found[key]
    assert rows.keys() == {"s0", "s1", "s2", "s4"}


def test_two_silos_that_are_each_perfect_are_not_perfect_together():
    silos = [
        (torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])),
        (torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])),
    ]
    rows, found, _ = scored({"metrics": "auc"}, "binary", silos)
    assert [row["auc"] for row in rows.values()] == [1.0, 1.0] and found["auc"] == 0.75 and found["auc_within"] == 0


def test_the_error_bound_of_a_binned_area_holds_where_outputs_are_all_alike():
    rng = np.random.default_rng(5)
    for scale, bins in ((1e-4, 4096), (1e-3, 64), (1.0, 64), (50.0, 32)):
        y = torch.tensor(rng.random(300) < 0.4).float()
        z = torch.tensor(rng.normal(size=300) * scale + scale * y.numpy(), dtype=torch.float32)
        found = scored({"metrics": {"name": "auc", "bins": bins}}, "binary", [(z, y)])[1]
        assert abs(found["auc"] - sk.roc_auc_score(y, z)) <= found["auc_within"] + 1e-12


def test_bins_are_in_the_order_of_what_is_in_them():
    odds = torch.tensor(np.sort(np.random.default_rng(0).normal(size=2000) * np.geomspace(1e-6, 1e3, 2000)))
    places = binned(odds, 2048)
    assert bool((places.diff() >= 0).all()) and places.min() >= 0 and places.max() < 4096
    assert int(binned(torch.tensor([0.0]), 2048)) > int(binned(torch.tensor([-1e-9]), 2048))


def test_log_odds_keep_their_digits_where_one_class_is_all_but_certain():
    logits = torch.tensor([[40.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert log_odds(logits)[0].tolist() == pytest.approx([40 - math.log(1 + math.e), -40, -39], rel=1e-12)
    assert log_odds(logits)[1].tolist() == pytest.approx([-math.log(2)] * 3)
    assert area(np.zeros((2, 2, 4)))[0] != area(np.zeros((2, 2, 4)))[0]  # nan if there is nothing


def test_r2_keeps_its_digits_where_targets_lie_far_from_zero():
    rng = np.random.default_rng(2)
    targets = torch.tensor(rng.normal(size=(400, 2)) + 1e9, dtype=torch.float64)
    outputs = targets + torch.tensor(rng.normal(size=(400, 2)) * 0.5)
    silos = list(zip(outputs.split([100, 1, 299]), targets.split([100, 1, 299]), strict=True))
    found = scored({"metrics": "r2"}, "regression", silos)[1]
    assert found["r2"] == pytest.approx(sk.r2_score(targets - 1e9, outputs - 1e9), rel=1e-7)


def test_a_silo_where_a_figure_is_undefined_is_named_and_counts_for_all():
    silos = [
        (torch.tensor([0.5, 0.2]), torch.tensor([1.0, 1.0])),  # no pair to compare
        (torch.tensor([0.3, 0.1, 0.7]), torch.tensor([0.0, 0.0, 1.0])),
    ]
    rows, found, _ = scored({"metrics": ["auc", "recall"]}, "binary", silos)
    outputs, targets = whole(silos)
    assert math.isnan(rows["s0"]["auc"]) and found["undefined"] == {"auc": ["s0"]} and "raised" not in found
    assert found["auc"] == pytest.approx(sk.roc_auc_score(targets, outputs)) and found["worst"] == {
        "silo": "s1",
        "auc": 1.0,
    }


# ---------------------------------------------------------------- users' own


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_metrics.py").write_text(
        "import torch\n"
        "class Dice:\n"
        "    maximize = True\n"
        "    def __init__(self, positive=1):\n"
        "        self.positive = positive\n"
        "    def init(self):\n"
        "        return torch.zeros(2, dtype=torch.int64)\n"
        "    def update(self, state, outputs, targets):\n"
        "        guess, truth = outputs.argmax(-1) == self.positive, targets == self.positive\n"
        "        return state + torch.stack([2 * (guess & truth).sum(), guess.sum() + truth.sum()])\n"
        "    def compute(self, state):\n"
        "        return int(state[0]) / int(state[1])\n"
        "class Bias:\n"
        "    maximize = False\n"
        "    def init(self):\n"
        "        return torch.zeros(2, dtype=torch.float64)\n"
        "    def update(self, state, outputs, targets):\n"
        "        errors = (outputs - targets).double()\n"
        "        return state + torch.stack([errors.sum(), errors.new_tensor(errors.numel())])\n"
        "    def compute(self, state):\n"
        "        return state[0] / state[1]\n"
        "class Shrinks(Bias):\n"
        "    def update(self, state, outputs, targets):\n"
        "        return state[:1]\n"
        "class Loud(Bias):\n"
        "    def init(self):\n"
        "        return torch.ones(2)\n"
        "class silo_mean_spread(Bias):\n"
        "    pass\n"
        "def spread(outputs, targets):\n"
        "    if len(outputs) < 2:\n"
        "        raise ValueError('two samples at least')\n"
        "    return (outputs - targets).std()\n"
        "def broken(outputs, targets):\n"
        "    return outputs.nowhere\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_metrics", raising=False)
    return "own_metrics:"


def test_a_class_of_counts_is_pooled_exactly_though_it_raises_where_a_silo_has_none(own):
    silos = samples("classification")
    silos[1] = (torch.tensor([[5.0, 0, 0, 0]]), torch.tensor([0]))  # no class 1: 0/0
    z, y = whole(silos)
    fields = {"metrics": own + "Dice"}
    rows, found, _ = scored(fields, "classification", silos)
    guess = z.argmax(-1)
    assert found["Dice"] == pytest.approx(sk.f1_score(y == 1, guess == 1), rel=1e-14)
    assert found["raised"] == {"Dice": ["s1"]} and math.isnan(rows["s1"]["Dice"])
    assert scored(fields, "classification", silos, num_ranks=4)[1] == found
    other = {"metrics": {"name": own + "Dice", "positive": 2, "maximize": False}}
    found, objective = scored(other, "classification", silos)[1:]
    assert found["Dice"] == pytest.approx(sk.f1_score(y == 2, guess == 2)) and not objective.maximize


def test_a_class_of_sums_is_pooled_exactly(own):
    silos = samples("regression")
    z, y = whole(silos)
    found = scored({"metrics": own + "Bias"}, "regression", silos)[1]
    assert found["Bias"] == pytest.approx((z - y).mean(), rel=1e-6)
    assert scored({"metrics": own + "Bias"}, "regression", silos, num_ranks=3)[1] == found


def test_a_function_is_the_mean_over_silos_and_called_so(own):
    silos = samples("regression")
    fields = {"metrics": ["mae", {"name": own + "spread", "maximize": False}], "best": "silo_mean_spread"}
    rows, found, objective = scored(fields, "regression", silos)
    each = [float((z - y).std()) for z, y in silos if len(y) > 1]
    assert found["silo_mean_spread"] == pytest.approx(np.mean(each), rel=1e-12) and "spread" in rows["s0"]
    assert found["raised"] == {"spread": ["s1"]} and objective.metric_name == "silo_mean_spread"
    assert found["worst"]["spread"] == max(each)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "Loud"}, "gives no tensor of zeros"),
        ({"name": "Dice", "positve": 2}, "unexpected keyword argument 'positve'"),
        ({"name": "spread", "maximize": True, "k": 2}, "is a function and takes no 'k'"),
        ({"name": "silo_mean_spread"}, "records use 'silo_mean_spread' for something else"),
        ({"name": "spread"}, "is a higher 'own_metrics:spread' better?"),
    ],
)
def test_what_cannot_be_a_metric_is_refused(own, fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        scored({"metrics": fields | {"name": own + fields["name"]}}, "regression", [])


def test_a_state_that_changes_its_shape_is_an_error_of_the_metric(own):
    found = scored({"metrics": ["mae", own + "Shrinks"]}, "regression", samples("regression"))[1]
    assert found["Shrinks"] != found["Shrinks"] and found["raised"] == {"Shrinks": ["s0", "s1", "s2", "s4"]}
    assert found["mae"] > 0


def test_a_metric_that_raises_everywhere_is_refused_before_training_and_elsewhere_costs_its_value(
    own, tmp_path, caplog
):
    everywhere = {"metrics": ["accuracy", {"name": own + "broken", "maximize": True}]}
    text = refused(config(tmp_path / "a", objective=everywhere))
    assert "objective.metrics: 'broken' raised on every silo's samples: AttributeError: 'Tensor' object has no" in text
    assert not (tmp_path / "a" / "metrics.jsonl").exists()
    here = {"metrics": [{"name": "support.runs:needs_five", "maximize": True}, "accuracy"]}
    with caplog.at_level(logging.WARNING, "fedmpi"):
        records, _ = run(config(tmp_path / "b", 2, objective=here))
    assert [r["raised"] for r in records] == [{"needs_five": ["s0"]}] * 2
    assert "round 2, silo 's0': needs_five raised ValueError: five at least" in caplog.text
    assert records[0]["silos"]["s0"]["needs_five"] is None and records[0]["silo_mean_needs_five"] == 5.5
    assert results.inspect(tmp_path / "b")["best"]["silo_mean_needs_five"] == 5.5
    assert results.choose(tmp_path / "b", "best") == results.inspect(tmp_path / "b")["best"]["round"]
    evaluated = results.evaluate(tmp_path / "b")
    assert {k: records[1][k] for k in evaluated if k not in ("silos", "round")} == {
        k: v for k, v in evaluated.items() if k not in ("silos", "round")
    }


def test_best_says_so_where_no_checkpoint_has_a_value(tmp_path):
    blobs = {"name": "support.runs:Blobs", "sizes": [20, 30], "task": "classification"}
    objective = {"metrics": [{"name": "support.runs:nowhere", "maximize": True}]}
    records, _ = run(config(tmp_path, 2, data=blobs, objective=objective))
    assert records[1]["silo_mean_nowhere"] is None and records[1]["undefined"] == {"nowhere": ["s0", "s1"]}
    assert results.inspect(tmp_path)["best"] is None
    with pytest.raises(ConfigError, match="no whole checkpoint has a value of silo_mean_nowhere, so none is best"):
        results.choose(tmp_path, "best")


# ---------------------------------------------------------------- torchmetrics


@pytest.mark.parametrize(
    ("name", "fields", "task"),
    [
        ("torchmetrics.classification:MulticlassAUROC", {"num_classes": 4, "thresholds": 50}, "classification"),
        ("torchmetrics.classification:MulticlassF1Score", {"num_classes": 4, "average": "macro"}, "classification"),
        ("torchmetrics:Accuracy", {"task": "multiclass", "num_classes": 4}, "classification"),
        ("torchmetrics.classification:BinaryAveragePrecision", {"thresholds": 100}, "binary"),
        ("torchmetrics.regression:ExplainedVariance", {}, "regression"),
        ("torchmetrics.regression:R2Score", {}, "regression"),
        ("torchmetrics.regression:MeanAbsolutePercentageError", {}, "regression"),
    ],
)
@pytest.mark.filterwarnings("ignore:pkg_resources")
def test_metrics_of_torchmetrics_whose_states_add_up_are_pooled_exactly(name, fields, task):
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    silos = samples(task)
    outputs, targets = (torch.cat(parts) for parts in zip(*silos, strict=True))
    metric = import_object(name)(**fields)
    metric.update(outputs, targets.long() if task == "binary" else targets)
    found, objective = scored({"metrics": {"name": name} | fields}, task, silos)[1:]
    assert found[name.partition(":")[2]] == pytest.approx(float(metric.compute()), rel=1e-4)
    assert objective.maximize is bool(metric.higher_is_better)
    assert scored({"metrics": {"name": name} | fields}, task, silos, num_ranks=3)[1] == found


@pytest.mark.parametrize(
    ("name", "fields", "task"),
    [
        ("torchmetrics.classification:BinaryAccuracy", {}, "binary"),
        ("torchmetrics:F1Score", {"task": "binary"}, "binary"),
        ("torchmetrics.classification:BinaryAUROC", {}, "binary"),
        ("torchmetrics.classification:BinaryCalibrationError", {}, "binary"),
        (
            "torchmetrics.classification:MulticlassAUROC",
            {"num_classes": 4, "thresholds": 50},
            "classification",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:pkg_resources")
def test_torchmetrics_takes_no_batch_of_logits_for_probabilities(name, fields, task):
    """torchmetrics would convert a batch whose outputs all lie between 0 and 1."""
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    silos = [s for s in samples(task) if len(s[0]) > 1]
    silos[0] = (silos[0][0].sigmoid() * 0.9, silos[0][1])
    outputs, targets = (torch.cat(parts) for parts in zip(*silos, strict=True))
    fields = {"name": name} | fields
    figures = [scored({"metrics": fields}, task, silos, batch_size=size)[1] for size in (1, 7, 100)]
    key = next(key for key in figures[0] if key.endswith(name.partition(":")[2]))
    assert figures[0][key] == pytest.approx(figures[1][key], rel=1e-6) == pytest.approx(figures[2][key], rel=1e-6)
    probable = outputs.sigmoid() if task == "binary" else outputs.softmax(-1)
    metric = import_object(name)(**{k: v for k, v in fields.items() if k != "name"})
    if not key.startswith("silo_mean"):
        metric.update(probable, targets.long())
        assert figures[0][key] == pytest.approx(float(metric.compute()), rel=1e-5)


def test_metrics_of_torchmetrics_with_other_states_are_means_over_silos():
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    silos = [s for s in samples("binary") if len(s[0]) > 1]
    fields = {"name": "torchmetrics.classification:BinaryAUROC"}  # without bins it keeps all outputs
    found = scored({"metrics": fields}, "binary", silos)[1]
    each = [torchmetrics.functional.auroc(z, y.long(), task="binary").item() for z, y in silos]
    assert found["silo_mean_BinaryAUROC"] == pytest.approx(np.mean(each), rel=1e-6) and "BinaryAUROC" not in found


def test_metrics_of_torchmetrics_pool_their_least_and_largest(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    (tmp_path / "own_range.py").write_text(
        "import torch, torchmetrics\n"
        "class Range(torchmetrics.Metric):\n"
        "    higher_is_better = False\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.add_state('least', torch.tensor(torch.inf), dist_reduce_fx='min')\n"
        "        self.add_state('largest', torch.tensor(-torch.inf), dist_reduce_fx='max')\n"
        "        self.add_state('num', torch.tensor(0), dist_reduce_fx='sum')\n"
        "    def update(self, outputs, targets):\n"
        "        self.least = torch.minimum(self.least, outputs.min())\n"
        "        self.largest = torch.maximum(self.largest, outputs.max())\n"
        "        self.num += outputs.numel()\n"
        "    def compute(self):\n"
        "        return (self.largest - self.least) * self.num\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    silos = samples("regression")
    outputs = torch.cat([z for z, _ in silos])
    found = scored({"metrics": "own_range:Range"}, "regression", silos, num_ranks=2)[1]
    assert found["Range"] == pytest.approx(float((outputs.max() - outputs.min()) * outputs.numel()), rel=1e-6)


# ---------------------------------------------------------------- ignored targets


@pytest.mark.parametrize("task", ["classification", "next_token"])
def test_targets_that_are_ignored_count_in_no_figure(task):
    rng, names = np.random.default_rng(4), ["accuracy", "log_loss", {"name": "top_k", "k": 2}]
    names += ["auc", "confusion_matrix"] if task == "classification" else ["perplexity"]
    silos, kept = [], []
    for outputs, targets in samples(task):
        away = torch.tensor(rng.random(targets.shape) < 0.4)
        kept.append((outputs[~away], targets[~away]))
        silos.append((outputs, targets.masked_fill(away, -100)))
    silos[1] = (silos[1][0], torch.full_like(silos[1][1], -100))  # a silo with only ignored targets
    kept[1] = (kept[1][0][:0], kept[1][1][:0])
    rows, found, _ = scored({"metrics": names}, task, silos)
    z, y = whole(kept)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, z.argmax(-1)), rel=1e-14)
    assert found["loss"] == pytest.approx(sk.log_loss(y, softmax(z), labels=range(z.shape[-1])), rel=1e-6)
    assert found["log_loss"] == pytest.approx(found["loss"], rel=1e-12)
    assert found["undefined"]["accuracy"] == ["s1"] and math.isnan(rows["s1"]["loss"])
    if task == "classification":
        assert found["confusion_matrix"] == sk.confusion_matrix(y, z.argmax(-1)).tolist()
    with pytest.raises(IndexError, match=r"out of bounds"):
        scored({"ignore_index": None}, task, silos)


def ignoring(out, rule, silos=("s0", "s1", "s2")):
    data = {"name": "support.runs:Ignoring", "silos": silos}
    return build(Config, {"out": str(out), "rounds": 1, "data": data, "model": "logistic", "local": rule})


IN_ORDER = {"batch_size": 2, "epochs": 1, "sampler": "in_order"}


@pytest.mark.parametrize(
    "rule",
    [
        {"name": "sgd", **IN_ORDER},
        {"name": "fedsgd", "batch_size": 3},
        {"name": "ditto", **IN_ORDER},
        {"name": "apfl", **IN_ORDER},
        {"name": "per_fedavg", "inner_lr": 1e-9, "epochs": 1, "batch_size": 4, "sampler": "in_order"},
    ],
    ids=lambda rule: str(rule["name"]),
)
def test_a_training_loss_is_the_mean_of_the_targets_that_count(tmp_path, rule):
    """Some of them, none of a batch, none of a silo: with lr 0 the loss is that of the first parameters."""
    (record,), done = run(ignoring(tmp_path, rule | {"lr": 1e-12}))
    source, losses, counts = done.config.data.source(0), {}, {}
    for silo in ("s0", "s1", "s2"):
        x, y = source.open(silo)[:2]
        x, y = x[y >= 0], y[y >= 0]
        counts[silo] = len(y)
        losses[silo] = torch.nn.functional.cross_entropy(done.model(x), y, reduction="sum").item()
    assert counts == {"s0": 5, "s1": 12, "s2": 0}
    exact = rule["name"] != "per_fedavg"  # it uses the halves of batches
    for silo in ("s0", "s1"):
        assert record["silos"][silo]["train_loss"] == pytest.approx(losses[silo] / counts[silo], rel=1e-6) or not exact
    assert record["train_loss"] == pytest.approx(sum(losses.values()) / 17, rel=1e-6) or not exact
    assert record["silos"]["s2"]["train_loss"] is None and bool(torch.isfinite(done.parameters).all())
    assert "not_finite" not in record and record["rejected"] == []


def test_a_round_in_which_no_target_counts_says_nothing_of_divergence(tmp_path):
    (record,), _ = run(ignoring(tmp_path, {"name": "sgd", "lr": 0.1, **IN_ORDER}, ["s2"]))
    assert record["train_loss"] is None and record["delta_norm"] == 0.0 and record["rejected"] == []


@pytest.mark.parametrize("ignored", [0, 7])
def test_the_loss_of_a_long_batch_of_float16_is_finite(ignored):
    """Sums of 48,000 terms exceed float16."""
    x = torch.zeros(48, 1000, dtype=torch.int64)
    y = torch.arange(48_000).view(48, 1000) % 4
    y[0, :ignored] = -100
    data, criterion = SiloData(x, y, x[:0], y[:0]), resolve(Objective(), "next_token", 4).criterion(y)
    losses = []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        model = FlatModel(torch.nn.Embedding(4, 4).to(dtype))
        round = Round(1, 1, 0, criterion.loss, lambda: None, count=criterion.count)
        rule = RULES.build({"name": "sgd", "lr": 0.1, "steps": 1, "batch_size": None}, "local")
        losses.append(rule.train(LocalSilo("a", data, 1.0), model, model.params(), round).loss)
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_one_whole_batch_steps_along_the_gradient_of_the_targets_that_count(tmp_path):
    start = run(ignoring(tmp_path / "a", {"name": "fedsgd", "lr": 1e-30}))[1]
    weight, bias = start.model.state_dict().values()
    x, y = start.config.data.source(0).open("s0")[:2]
    loss = torch.nn.functional.cross_entropy(x @ weight.requires_grad_().T + bias, y)
    grad = torch.autograd.grad(loss, weight)[0]
    for size in (None, 3):
        rule = {"name": "fedsgd", "lr": 1.0, "batch_size": size}
        stepped = run(ignoring(tmp_path / str(size), rule, ["s0"]))[1]
        moved = next(iter(stepped.model.state_dict().values())) - weight
        assert torch.allclose(moved, -grad, atol=1e-6)


# ---------------------------------------------------------------- the dimension of classes


def test_logits_with_their_classes_first_and_last_train_and_score_alike(tmp_path):
    names = ["accuracy", "log_loss", "auc", "confusion_matrix", "macro_f1", {"name": "top_k", "k": 2}]
    found = {}
    for last in (False, True):
        how = config(
            tmp_path / str(last), 2, data={"name": "support.runs:Pixels"},
            model={"name": "support.runs:pixel_net", "last": last},
            objective={"metrics": names},
        )  # fmt: skip
        records, done = run(how)
        found[last] = sha256(done.parameters), [{k: r[k] for k in ("loss", *NAMES_OF_ALL)} for r in records]
    assert found[False] == found[True]


NAMES_OF_ALL = ("accuracy", "log_loss", "auc", "confusion_matrix", "macro_f1", "top_2_accuracy")


def test_where_classes_may_be_in_either_dimension_it_has_to_be_said(tmp_path):
    model, data = {"name": "support.runs:pixel_net", "last": False}, {"name": "support.runs:Pixels", "side": 3}
    text = refused(config(tmp_path / "a", data=data, model=model))
    assert text.endswith("classes may be in dimension 1 or in the last; set objective.classes to first or last")
    losses = []
    for classes in ("first", "last"):
        how = config(tmp_path / classes, 8, data=data, model=model, objective={"classes": classes})
        losses.append(run(how)[0][-1]["loss"])
    assert losses[0] < 0.9 * losses[1]  # a transposed one trains on nonsense
    how = config(tmp_path / "b", data={"name": "support.runs:Pixels"}, model=model, objective={"classes": "last"})
    assert "logits are [N, ..., classes] for targets [N, ...]" in refused(how)


@pytest.mark.parametrize(
    ("task", "outputs", "targets"),
    [
        ("classification", (6, 3), (5,)),
        ("classification", (6, 3), (3, 6)),
        ("classification", (6, 3, 4, 2), (6, 2, 4)),
        ("classification", (1, 3), (6,)),
        ("next_token", (2, 3, 4), (3, 2)),
        ("binary", (2, 6), (6, 2)),
        ("binary", (1, 6), (6,)),
        ("regression", (4, 2, 3), (4, 3, 2)),
        ("regression", (6, 1, 2), (6, 2, 2)),
    ],
)
def test_shapes_that_do_not_agree_are_refused(task, outputs, targets):
    found = Targets(task)
    with pytest.raises(ConfigError, match=re.escape(f"{list(outputs)}")):
        found.rows(torch.zeros(outputs), torch.zeros(targets))


@pytest.mark.parametrize(
    ("task", "classes", "outputs", "targets", "rows"),
    [
        ("classification", None, (6, 3), (6, 1), 6),
        ("classification", None, (6, 3, 4, 2), (6, 1, 4, 2), 48),
        ("classification", "last", (6, 4, 2, 3), (6, 4, 2, 1), 48),
        ("next_token", None, (2, 5, 5), (2, 5), 10),
        ("next_token", None, (2, 7, 5), (2, 5), 10),
    ],
)
def test_shapes_that_agree_are_rows_of_logits(task, classes, outputs, targets, rows):
    logits, found = Targets(task, classes).rows(torch.zeros(outputs), torch.zeros(targets, dtype=torch.int64))
    assert len(logits) == rows and found.shape == (rows,)
