"""Uneven local work: its results, and invalid options."""

import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.equations import BATCH, samples
from torch import nn

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.flat import FlatModel
from fedmpi.local import RULES, LocalSilo, Round
from fedmpi.local.adagrad_norm import SUM
from fedmpi.plan import plan
from fedmpi.types import Silo, SiloData, Source

CENTRES = {"a": 1.0, "b": -2.0, "c": 4.0}


@dataclass(frozen=True)
class Bowls:
    """Silos whose losses are (w - c)^2, with equal sample counts: the optimum of the sum is the mean of the centres."""

    def source(self, seed):
        return Source("regression", (1,), 1, tuple(Silo(name, 4) for name in CENTRES), self.opened)

    def opened(self, name):
        x, y = torch.ones(4, 1, dtype=torch.float64), torch.full((4,), CENTRES[name], dtype=torch.float64)
        return SiloData(x, y, x, y)


def slope():
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    return nn.Sequential(layer, nn.Flatten(0))


def bowls(out, **other):
    values = {
        "rounds": 300,
        "out": str(out),
        "data": "local.test_adaptive:Bowls",
        "model": "local.test_adaptive:slope",
        "device": {"name": "cpu"},
        "evaluate": {"every": 300},
        "checkpoint": {"every": 300},
        "records": {"trace": False},
        **other,
    }
    return build(Config, values)


@pytest.mark.slow
def test_a_silo_with_ten_times_the_steps_pulls_the_mean_away_and_fednova_not(tmp_path):
    ends = {}
    for aggregate in ("mean", "fednova"):
        local = {"name": "sgd", "lr": 0.005, "steps": 1, "amount": {"name": "by_silo", "silos": {"c": 10}}}
        chosen = bowls(tmp_path / aggregate, local=local, aggregate=aggregate)
        with fedmpi.Run(chosen, comm=SoloComm()) as run:
            taken = [{k: row["num_steps"] for k, row in record["silos"].items()} for record in run]
            ends[aggregate] = float(run.parameters[0])
    assert all(steps == {"a": 1, "b": 1, "c": 10} for steps in taken)
    # One step goes 0.01 of the way, ten steps 1 - 0.99^10 of it: the fixed point is where they balance.
    pulls = {"a": 0.01, "b": 0.01, "c": 1 - 0.99**10}
    biased = sum(pulls[k] * c for k, c in CENTRES.items()) / sum(pulls.values())
    assert ends["mean"] == pytest.approx(biased, abs=0.01) and biased > 3.2
    # FedNova's fixed point is the optimum, 1, except for the curvature of ten steps: (1 - 0.99^10) / 10 against 0.01.
    assert abs(ends["fednova"] - 1.0) < 0.08 < abs(ends["mean"] - 1.0) / 25


def silo_of(name="a"):
    data = samples(name)
    return LocalSilo(name, data, float(len(data.x_train)))


def work(**values):
    return RULES.build({"name": "sgd", "lr": 0.05, "batch_size": BATCH, **values}, "local")


def about(number=1):
    return Round(number, 9, 0, nn.functional.mse_loss, lambda: None)


def model_of():
    module = nn.Sequential(nn.Linear(3, 1, dtype=torch.float64), nn.Flatten(0))
    return FlatModel(module)


def test_a_time_budget_ends_between_batches_and_the_next_round_goes_on_there():
    model, silo = model_of(), silo_of()
    rule = work(epochs=50, amount={"name": "seconds", "seconds": 0.05})
    slow = Round(1, 9, 0, nn.functional.mse_loss, lambda: time.sleep(0.03))
    done = rule.train(silo, model, model.params(), slow)
    assert 1 <= done.num_steps <= 3 and silo.cursor == done.num_samples
    first = silo.cursor
    done = rule.train(silo, model, model.params(), slow)
    assert silo.cursor == first + done.num_samples
    quick = work(steps=4, amount={"name": "seconds", "seconds": 1000})
    assert quick.train(silo, model, model.params(), about()).num_steps == 4
    late = work(steps=4, amount={"name": "seconds", "seconds": 1e-9})
    assert late.train(silo, model, model.params(), about()).num_steps == 1


def test_a_time_budget_is_refused_where_bits_are_to_be_the_same(tmp_path):
    local = {"name": "sgd", "lr": 0.1, "steps": 1, "amount": {"name": "seconds", "seconds": 1}}
    with pytest.raises(ConfigError, match=r"exchange.reduction: reproducible does not go with local.amount: seconds"):
        bowls(tmp_path, local=local, exchange={"plan": "root", "reduction": "reproducible"})
    assert bowls(tmp_path, local=local).local.amount.seconds == 1


def test_an_amount_of_a_silo_that_is_none_is_refused(tmp_path):
    local = {"name": "sgd", "lr": 0.1, "steps": 1, "amount": {"name": "by_silo", "silos": {"site-c": 10}}}
    with pytest.raises(ConfigError, match=r"local.amount.silos: no silo 'site-c'"):
        plan(bowls(tmp_path, local=local), {}, 1)


def test_drawn_amounts_are_keyed_by_silo_and_round():
    rule = work(steps=6, amount="drawn")
    taken = {(name, n): rule.amount.of(6, silo_of(name), about(n)) for name in "abcde" for n in range(1, 9)}
    assert taken == {(name, n): rule.amount.of(6, silo_of(name), about(n)) for name in "abcde" for n in range(1, 9)}
    assert set(taken.values()) == set(range(1, 7))
    assert [taken["a", n] for n in range(1, 9)] != [taken["b", n] for n in range(1, 9)]


@pytest.mark.parametrize("amount", [{"name": "by_loss", "target": 0.5}, "drawn"])
def test_a_resumed_run_takes_as_much_as_an_undisturbed_one(tmp_path, amount):
    local = {"name": "adagrad_norm", "lr": 0.1, "steps": 7, "batch_size": 3, "amount": amount}
    records = {}
    for name, rounds in (("whole", (6,)), ("parts", (3, 6))):
        for last in rounds:
            with fedmpi.Run(bowls(tmp_path / name, local=local, rounds=last), comm=SoloComm()) as run:
                records[name] = list(run)
                records[f"{name}_P"] = run.parameters.clone()
    assert torch.equal(records["whole_P"], records["parts_P"])
    for a, b in zip(records["whole"][3:], records["parts"], strict=True):
        assert {k: row["num_steps"] for k, row in a["silos"].items()} == {
            k: row["num_steps"] for k, row in b["silos"].items()
        }


def test_adagrad_norm_never_steps_further_than_its_rate_and_is_not_clipped():
    model, silo = model_of(), silo_of("b")
    rule = RULES.build({"name": "adagrad_norm", "lr": 0.5, "steps": 1, "eps": 1e-9}, "local")
    start_P, sums = model.params() + 100, []
    for number in (1, 2, 3):
        kept = dict(silo.kept)
        done = rule.train(silo, model, start_P, about(number))
        assert float(done.vector_Q.norm()) <= 0.5 + 1e-12
        assert SUM not in kept or float(silo.kept[SUM]) > float(kept[SUM])
        sums.append(float(silo.kept[SUM]))
    assert np.all(np.diff(sums) > 0)
    with pytest.raises(ConfigError, match=r"local: clip: adagrad_norm divides gradients by their norms"):
        RULES.build({"name": "adagrad_norm", "lr": 0.5, "steps": 1, "clip": 1.0}, "local")
