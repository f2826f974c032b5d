"""Accumulated gradients, learning rates within a round, and bfloat16 passes, against plain loops in float64."""

from dataclasses import replace

import pytest
import torch
from support.runs import OWN, config, figures, refused, run
from torch import nn

from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.flat import FlatModel
from fedmpi.local import RULES, LocalSilo, Round
from fedmpi.local.base import local_steps
from fedmpi.objectives import Objective, resolve
from fedmpi.schedules import SCHEDULES
from fedmpi.types import SiloData

N, SIZE = 21, 8  # batches of 8, 8 and 5 samples


def module(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def silo(dtype=torch.float64, ignored=0):
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, 4, generator=rng, dtype=dtype), torch.randint(3, (N,), generator=rng)
    y[:ignored] = -100
    return LocalSilo("a", SiloData(x, y, x[:0], y[:0]), 1.0)


def trained(values, loss="cross_entropy", dtype=torch.float64, ignored=0, rounds=2):
    """The delta, loss, steps and cursor of the last round."""
    rule = RULES.build({"name": "sgd", "lr": 0.5, "batch_size": SIZE, "sampler": "in_order", **values}, "local")
    one, model = silo(dtype, ignored), FlatModel(module(dtype))
    criterion = resolve(build(Objective, {"loss": loss}), "classification", 3).criterion(one.data.y_train)
    params_P = model.params().clone()
    for number in range(1, rounds + 1):
        round = Round(number, rounds, 0, criterion.loss, lambda: None, count=criterion.count)
        found = rule.train(one, model, params_P, round)
    return found["delta"].clone(), found.loss, (found.num_steps, found.num_samples, one.cursor, found.counted)


@pytest.mark.parametrize("micro", [1, 3, 5, 7])
@pytest.mark.parametrize("ignored", [0, 10])
@pytest.mark.parametrize(
    "how",
    [
        {"epochs": 2},
        {"epochs": 1, "clip": 0.1},
        {"steps": 4, "optimizer": {"name": "Adam"}},
        {"name": "fedprox", "mu": 0.3, "epochs": 1},
        {"epochs": 1, "last_batch": "merge"},
    ],
    ids=str,
)
def test_accumulated_passes_are_one_big_batch(how, ignored, micro):
    weighted = {"name": "cross_entropy", "weight": [0.2, 1.0, 3.0]}
    for loss in ("cross_entropy", weighted):
        whole, parts = (trained({**how, **more}, loss, ignored=ignored) for more in ({}, {"micro_batch": micro}))
        torch.testing.assert_close(parts[0], whole[0], rtol=1e-9, atol=1e-12)
        assert parts[1] == pytest.approx(whole[1], rel=1e-12) and parts[2] == whole[2]


def test_a_micro_batch_is_never_larger_than_said_and_a_batch_that_fits_is_one_pass():
    sizes = []

    def watched(outputs, targets):
        sizes.append(len(outputs))
        return nn.functional.cross_entropy(outputs, targets)

    rule = RULES.build({"name": "sgd", "lr": 0.1, "batch_size": SIZE, "epochs": 1, "micro_batch": 5}, "local")
    model = FlatModel(module())
    rule.train(silo(), model, model.params().clone(), Round(1, 1, 0, watched, lambda: None))
    assert sizes == [4, 4, 4, 4, 5]


def test_a_rule_that_replaces_the_loss_of_a_batch_is_refused():
    """Otherwise its passes would be those of plain steps."""
    rule = RULES.build({"name": "sgd", "lr": 0.1, "batch_size": SIZE, "epochs": 1, "micro_batch": 5}, "local")
    model = FlatModel(module())
    round = Round(1, 1, 0, nn.functional.cross_entropy, lambda: None)
    with pytest.raises(ConfigError, match="micro_batch: sgd computes with a whole batch"):
        local_steps(rule, silo(), model, model.params().clone(), round, batch_loss=lambda x, y: model.module(x).sum())


SCHEDULED = [
    ({"name": "cosine"}, lambda j, n: 0.5 * (1 + torch.cos(torch.tensor(torch.pi * j / n, dtype=torch.float64)))),
    ({"name": "linear", "floor": 0.0}, lambda j, n: (n - j - 1) / n),
    ({"name": "step", "every": 2, "factor": 0.3}, lambda j, n: 0.3 ** (j // 2)),
]


@pytest.mark.parametrize(
    ("schedule", "factor"), SCHEDULED, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
@pytest.mark.parametrize("optimizer", [{"name": "SGD", "momentum": 0.5}, {"name": "Adam"}], ids=lambda o: o["name"])
def test_the_rate_follows_the_schedule_over_the_steps_of_every_round(schedule, factor, optimizer):
    model, data = module(), silo().data
    chosen = getattr(torch.optim, optimizer["name"])(
        model.parameters(), lr=1.0, **{k: v for k, v in optimizer.items() if k != "name"}
    )
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    batches = [slice(i, i + SIZE) for i in range(0, N, SIZE)] * 2
    round_rate = SCHEDULES.build({"name": "linear"}, "").lr(0.5, 1, 2)
    for j, rows in enumerate(batches):
        chosen.param_groups[0]["lr"] = float(round_rate * factor(j, len(batches)))
        chosen.zero_grad()
        nn.functional.cross_entropy(model(data.x_train[rows]), data.y_train[rows]).backward()
        chosen.step()
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    how = {"epochs": 2, "optimizer": optimizer, "schedule": "linear", "step_schedule": schedule}
    one, two = silo(), FlatModel(module())
    rule = RULES.build({"name": "sgd", "lr": 0.5, "batch_size": SIZE, "sampler": "in_order", **how}, "local")
    found = rule.train(one, two, two.params().clone(), Round(1, 2, 0, nn.functional.cross_entropy, lambda: None))
    torch.testing.assert_close(found["delta"], moved, rtol=1e-9, atol=1e-12)


RECORD = {"privacy": {"name": "record", "clip": 1, "sigma": 1, "delta": 1e-5}}
DEADLINE = {"engine": {"policy": {"name": "deadline", "deadline_s": 9}}}
ONE_RATE = "needs one learning rate for all steps of a round"


@pytest.mark.parametrize(
    ("local", "other", "message"),
    [
        ({"name": "moon", "micro_batch": 4}, {}, "micro_batch: moon computes with a whole batch; take a smaller"),
        ({"name": "apfl", "micro_batch": 4}, {}, "micro_batch: apfl computes with a whole batch"),
        ({"name": "per_fedavg", "inner_lr": 1, "micro_batch": 4}, {}, "micro_batch: per_fedavg computes"),
        ({"name": "scaffold", "step_schedule": "cosine"}, {}, f"step_schedule: scaffold {ONE_RATE}"),
        ({"name": "gradient_correction", "step_schedule": "cosine"}, {}, f"gradient_correction {ONE_RATE}"),
        ({"name": "apfl", "step_schedule": "cosine"}, {}, f"step_schedule: apfl {ONE_RATE}"),
        ({"step_schedule": "step"}, {"aggregate": "fednova"}, "local.step_schedule: fednova divides deltas"),
        ({"step_schedule": "step", "amount": {"name": "seconds", "seconds": 1}}, {}, "with amount: seconds"),
        ({"step_schedule": "step"}, RECORD, "local.step_schedule: privacy: record"),
        ({"micro_batch": 2}, RECORD, "local.micro_batch: privacy: record"),
        ({"precision": "bf16"}, RECORD, "local.precision: float32"),
        ({"step_schedule": "step"}, DEADLINE, "its learning rate changes within a round (local.step_schedule)"),
    ],
)
def test_what_it_does_not_go_with_is_refused(local, other, message):
    with pytest.raises(ConfigError) as caught:
        build(Config, {"local": {"name": "sgd", "lr": 0.1, "epochs": 1, **local}, **other})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_batch_normalization_cannot_take_passes_over_one_sample(tmp_path):
    normed = {"model": {"name": OWN + "Normed"}, "local": {"last_batch": "drop", "micro_batch": 1}}
    assert "local.micro_batch is 1, which leaves a pass over one sample" in refused(config(tmp_path, 1, **normed))
    assert run(config(tmp_path, 1, **{**normed, "local": {"last_batch": "drop", "micro_batch": 4}}))[0]


# ---------------------------------------------------------------- bfloat16


def test_a_bfloat16_pass_is_torchs_autocast_and_parameters_stay_float32():
    model, data = module(torch.float32), silo(torch.float32).data
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    chosen = torch.optim.SGD(model.parameters(), lr=0.5)
    for rows in (slice(i, i + SIZE) for i in range(0, N, SIZE)):
        chosen.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(data.x_train[rows])
            loss = nn.functional.cross_entropy(outputs.float(), data.y_train[rows])
        assert outputs.dtype == torch.bfloat16
        loss.backward()
        chosen.step()
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    found = trained({"epochs": 1, "precision": "bf16"}, dtype=torch.float32, rounds=1)[0]
    assert found.dtype == torch.float32 and torch.equal(found, moved)
    plain = trained({"epochs": 1}, dtype=torch.float32, rounds=1)[0]
    assert not torch.equal(found, plain) and (found - plain).norm() < 0.05 * plain.norm()


def test_metrics_of_a_run_in_bfloat16_are_computed_in_float32(tmp_path):
    (low, *_), done = run(config(tmp_path / "a", 1, local={"precision": "bf16"}))
    source = done.config.data.source(0)
    data = [source.open(one.id) for one in source.silos]
    assert done.parameters.dtype == torch.float32
    with torch.no_grad():
        loss = nn.functional.cross_entropy(
            done.model(torch.cat([d.x_test for d in data])), torch.cat([d.y_test for d in data])
        )
    assert low["loss"] == pytest.approx(float(loss), rel=1e-6)
    (high, *_), _ = run(config(tmp_path / "b", 1))
    assert figures(low) != figures(high)
    again = run(replace(config(tmp_path / "c", 1, local={"precision": "bf16"})))[0][0]
    assert figures(again) == figures(low)
