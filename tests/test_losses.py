"""Losses with arguments: against torch on the pooled samples, users' own with arguments, and refused ones."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.runs import config, run

from fedmpi.components import build, to_dict
from fedmpi.config import Config
from fedmpi.differences import differences
from fedmpi.errors import ConfigError
from fedmpi.losses import LOSSES, CrossEntropy
from fedmpi.objectives import Objective, resolve

WEIGHT = [0.5, 3.0, 0.0]
SMOOTH = {"name": "cross_entropy", "weight": [0.5, 3.0, 0.25], "label_smoothing": 0.1}


def criterion(loss, task, classes, targets):
    return resolve(build(Objective, {"loss": loss}, "objective"), task, classes).criterion(targets)


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def labels(num, ignored=0):
    y = torch.arange(num) * 7 % 3
    y[:ignored] = -100
    return y


@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize("loss", [{"name": "cross_entropy", "weight": WEIGHT}, SMOOTH], ids=["weight", "smooth"])
def test_weighted_batches_pool_to_the_loss_of_all_samples(loss, ignored):
    """Batches of uneven size and mass: the mean weighted by mass is torch's weighted mean over all of them."""
    z, y = drawn(23, 3), labels(23, ignored)
    found = criterion(loss, "classification", 3, y)
    weight = torch.tensor(loss["weight"], dtype=torch.float64)
    arguments = {"weight": weight, "label_smoothing": loss.get("label_smoothing", 0.0)}
    parts = [(found.loss(z[i : i + 4], y[i : i + 4]), found.count(y[i : i + 4])) for i in range(0, 23, 4)]
    assert float(sum(mass for _, mass in parts)) == pytest.approx(float(weight[y[y >= 0]].sum()), rel=1e-14)
    pooled = sum(value * mass for value, mass in parts) / sum(mass for _, mass in parts)
    assert float(pooled) == pytest.approx(float(F.cross_entropy(z, y, **arguments)), rel=1e-13)
    assert float(found.loss(z, y)) == pytest.approx(float(F.cross_entropy(z, y, **arguments)), rel=1e-13)


def test_a_batch_of_targets_without_weight_has_loss_and_gradient_0():
    z, y = drawn(4, 3).requires_grad_(), torch.full((4,), 2)
    found = criterion({"name": "cross_entropy", "weight": WEIGHT}, "classification", 3, y)
    loss = found.loss(z, y)
    loss.backward()
    assert float(loss.detach()) == 0.0 == float(found.count(y)) and not bool(z.grad.any())


def test_targets_without_weight_count_in_metrics():
    """A silo whose test targets all have weight 0 has no loss, and still its part of the accuracy."""
    objective = resolve(build(Objective, {"loss": {"name": "cross_entropy", "weight": WEIGHT}}), "classification", 3)
    model, x, y = torch.nn.Identity(), drawn(6, 3), torch.tensor([2, 2, -100, 2, 2, 2])
    tally = objective.score(model, x, y, 4, "cpu")
    right = (x.argmax(1) == y)[y >= 0]
    assert tally.targets == 0 and tally.loss != tally.loss
    assert tally.values["accuracy"] == pytest.approx(float(right.double().mean())) and "accuracy" in tally.parts
    assert objective.score(model, x, torch.full((6,), -100), 4, "cpu").parts == {}


def test_pixels_and_symbols_are_weighted_one_by_one():
    for task, z, y in (
        ("classification", drawn(2, 3, 5), labels(10).view(2, 5)),
        ("next_token", drawn(2, 5, 3), labels(10).view(2, 5)),
    ):
        found = criterion({"name": "cross_entropy", "weight": WEIGHT}, task, 3, y)
        rows = z.movedim(1, -1) if task == "classification" else z
        wanted = F.cross_entropy(rows.reshape(-1, 3), y.flatten(), torch.tensor(WEIGHT).double())
        assert float(found.loss(z, y)) == pytest.approx(float(wanted), rel=1e-13)


@pytest.mark.parametrize(
    ("loss", "task", "wanted"),
    [
        ({"name": "huber", "delta": 0.3}, "regression", lambda z, y: F.huber_loss(z, y, delta=0.3)),
        ("mse", "regression", F.mse_loss),
        ("mae", "regression", F.l1_loss),
        (
            {"name": "binary_cross_entropy", "pos_weight": 2.5},
            "binary",
            lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=torch.tensor(2.5).double()),
        ),
    ],
)
def test_losses_over_numbers_are_torchs_and_pool_by_their_number(loss, task, wanted):
    z, y = drawn(11), (drawn(11) > 0.2).double()
    found = criterion(loss, task, 1, y)
    parts = [(found.loss(z[i : i + 4], y[i : i + 4]), found.count(y[i : i + 4])) for i in (0, 4, 8)]
    assert float(sum(value * num for value, num in parts) / 11) == pytest.approx(float(wanted(z, y)), rel=1e-13)


@pytest.mark.parametrize(
    "how",
    [{}, {"disclose": "pooled"}, {"engine": {"name": "buffered", "size": 3, "clock": "virtual"}}],
    ids=["silo", "pooled", "buffered"],
)
def test_the_figures_of_a_run_are_those_of_the_pooled_samples(tmp_path, how):
    """lr is too small to move anything, so training and test losses are those of the first parameters."""
    loss = {"name": "cross_entropy", "weight": [0.5, 4.0], "label_smoothing": 0.2}
    local = {"lr": 1e-12, "batch_size": 7}
    (record,), done = run(config(tmp_path, 1, objective={"loss": loss}, local=local, **how))
    source = done.config.data.source(0)
    data = [source.open(silo.id) for silo in source.silos]
    arguments = {"weight": torch.tensor(loss["weight"]), "label_smoothing": 0.2}
    with torch.no_grad():
        for key, x, y in (("train_loss", 0, 1), ("loss", 2, 3)):
            z, classes = done.model(torch.cat([one[x] for one in data])), torch.cat([one[y] for one in data])
            assert record[key] == pytest.approx(float(F.cross_entropy(z, classes, **arguments)), rel=1e-5), key


def test_one_step_over_all_samples_is_the_same_for_any_batch_size(tmp_path):
    def stepped(name, size=None, **objective):
        values = to_dict(config(tmp_path / name, 1, objective=objective))
        how = build(Config, values | {"local": {"name": "fedsgd", "lr": 1.0, "batch_size": size}})
        return run(how)[1].parameters

    loss = {"name": "cross_entropy", "weight": [0.2, 5.0]}
    whole = stepped("whole", loss=loss)
    torch.testing.assert_close(stepped("parts", 3, loss=loss), whole, rtol=1e-5, atol=1e-6)
    assert (whole - stepped("plain")).abs().max() > 1e-3


OWN_CODE = """
import torch
import torch.nn.functional as F
class Focal:
    def __init__(self, gamma=2.0):
        self.gamma = gamma
    def __call__(self, outputs, targets):
        terms = F.cross_entropy(outputs, targets, reduction="none")
        return ((1 - (-terms).exp()) ** self.gamma * terms).mean()
class Weighted(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight, dtype=torch.float64))
    def forward(self, outputs, targets):
        return F.cross_entropy(outputs, targets, self.weight.to(outputs))
class Trained(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.centre = torch.nn.Parameter(torch.zeros(2))
    def forward(self, outputs, targets):
        return outputs.sum()
class Uncalled:
    pass
def smooth(outputs, targets, by=0.0):
    return F.cross_entropy(outputs, targets, label_smoothing=by)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)


def test_own_losses_take_arguments(mine):
    z, y = drawn(9, 3), labels(9)
    for loss, wanted in (
        ({"name": "own_losses:Focal", "gamma": 0.0}, F.cross_entropy(z, y)),
        (
            {"name": "own_losses:Weighted", "weight": [1.0, 2.0, 3.0]},
            F.cross_entropy(z, y, torch.tensor([1.0, 2, 3]).double()),
        ),
        ({"name": "own_losses:smooth", "by": 0.3}, F.cross_entropy(z, y, label_smoothing=0.3)),
        ("own_losses:smooth", F.cross_entropy(z, y)),
    ):
        assert float(criterion(loss, "classification", 3, y).loss(z, y)) == pytest.approx(float(wanted), rel=1e-6)
    objective = build(Objective, {"loss": {"name": "own_losses:Focal", "gamma": 3.0}})
    assert to_dict(objective)["loss"] == {"name": "own_losses:Focal", "gamma": 3.0}
    assert build(Objective, to_dict(objective)) == objective


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            {"name": "own_losses:Focal", "gama": 1},
            "objective.loss: 'own_losses:Focal' has no 'gama'; did you mean 'gamma'?",
        ),
        (
            {"name": "own_losses:Weighted"},
            "objective.loss: 'own_losses:Weighted': missing a required argument: 'weight'",
        ),
        (
            "own_losses:Trained",
            "objective.loss: 'own_losses:Trained' has parameters, which no silo would train; put them into the model",
        ),
        (
            "own_losses:Uncalled",
            "objective.loss: 'own_losses:Uncalled' has no __call__(outputs, targets), so it cannot be a loss",
        ),
        (
            {"name": "own_losses:smooth", "bye": 1},
            "objective.loss: 'own_losses:smooth' has no 'bye'; did you mean 'by'?",
        ),
        (
            {"name": "cross_entropy", "weights": [1, 2, 3]},
            "objective.loss: loss 'cross_entropy' has no 'weights'; did you mean 'weight'?",
        ),
        (
            {"name": "cross_entropy", "weight": [1, 2]},
            "objective.loss.weight: 2 weights, and the data have 3 classes; give one weight per class",
        ),
        ({"name": "cross_entropy", "weight": [0, 0, 0]}, "objective.loss: weight: all weights are 0"),
        (
            {"name": "cross_entropy", "weight": [1, -2, 1]},
            "objective.loss.weight.1: input should be greater than or equal to 0, got -2",
        ),
        (
            {"name": "cross_entropy", "label_smoothing": 1},
            "objective.loss.label_smoothing: input should be less than 1, got 1",
        ),
        (
            {"name": "cross_entropy", "weight": WEIGHT, "label_smoothing": 0.1},
            "objective.loss: label_smoothing does not go with a weight of 0: such a target would still have a loss",
        ),
        ({"name": "huber"}, "objective.loss: 'huber' is for regression, the data's task is classification"),
    ],
)
def test_refusals_are_one_line(mine, loss, message):
    with pytest.raises(ConfigError) as caught:
        criterion(loss, "classification", 3, labels(3))
    assert str(caught.value) == message


def test_an_output_without_a_weight_is_named():
    found = criterion({"name": "cross_entropy", "weight": WEIGHT}, "classification", 3, labels(4))
    with pytest.raises(ConfigError, match=r"objective\.loss\.weight: 3 weights, and the model gives 4 numbers"):
        found.loss(drawn(4, 4), labels(4))


def test_weights_cancel_in_the_loss_of_one_sample_so_privacy_of_records_refuses_them():
    values = {
        "local": {"name": "sgd", "lr": 0.1, "steps": 1},
        "privacy": {"name": "record", "clip": 1.0, "sigma": 1.0, "delta": 1e-5},
    }
    build(Config, {**values, "objective": {"loss": {"name": "cross_entropy", "label_smoothing": 0.1}}})
    with pytest.raises(ConfigError, match=r"leave out objective\.loss\.weight"):
        build(Config, {**values, "objective": {"loss": {"name": "cross_entropy", "weight": [1.0, 2.0]}}})


def test_a_loss_that_an_earlier_version_stored_by_its_name_is_the_same():
    now = Config(objective=Objective(loss=CrossEntropy()))
    stored = json.loads(json.dumps(to_dict(now)))
    stored["objective"]["loss"] = "cross_entropy"
    assert differences(stored, now) == []
    other = replace(now, objective=Objective(loss=CrossEntropy(label_smoothing=0.5)))
    assert differences(stored, other) == ["objective.loss.label_smoothing is 0.0 there and 0.5 here"]


def test_a_python_object_that_no_configuration_can_name_is_refused():
    with pytest.raises(ConfigError, match=r"name your own as 'package\.module:function'"):
        Objective(loss=F.mse_loss)
    assert Objective(loss="mse").loss == LOSSES.build("mse", "")
