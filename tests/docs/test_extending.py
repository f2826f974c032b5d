"""examples/extending: every family that users can extend has a recipe, and every recipe trains."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.mpi import PYTHON, mpirun
from support.programs import recipes as program

from fedmpi import catalogue
from fedmpi.comm import SoloComm
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.records import read_metrics
from fedmpi.train import Run

TOP = Path(__file__).parents[2]
PROGRAM = TOP / "tests/support/programs/recipes.py"
RECIPES = program.RECIPES

# The place of a recipe's class in a configuration, as `fedmpi list` prints it; some families have two recipes.
HOMES = {
    "local_rule": "local",
    "aggregator": "aggregate",
    "robust_rule": "aggregate",
    "transform": "updates",
    "server_optimizer": "server.optimizer",
    "codec": "exchange.up.codec",
    "selector": "select",
    "plan": "exchange.plan",
    "dataset": "data",
    "model": "model",
    "loss": "objective.loss",
    "metric": "objective.metrics",
    "sampler": "local.sampler",
    "schedule": "local.schedule",
    "workload": "local.amount",
    "measurement": "records.measure",
    "sink": "records.sinks",
    "callback": "callbacks",
    "partition": "data.partition",
    "policy": "engine.policy",
    "attack": "attack",
}
# Families without a recipe: privacy and its masks, torch's optimizers, silos one by one, engines and their small parts.
NO_RECIPE = {
    "privacy",
    "secure",
    "local.optimizer",
    "runner",
    "engine",
    "engine.staleness",
    "engine.clock",
    "engine.clock.compute",
}


def test_every_family_that_takes_members_from_outside_has_a_recipe():
    assert RECIPES.keys() == HOMES.keys()
    # Callbacks are functions of users only, so `fedmpi list` has no family of them.
    assert set(HOMES.values()) | NO_RECIPE == {key for _, key in catalogue.FAMILIES.values()} | {"callbacks"}


@pytest.fixture
def at_top(monkeypatch):
    monkeypatch.chdir(TOP)
    monkeypatch.syspath_prepend(str(TOP))


def run(name, out, **other):
    with Run(build(Config, {**program.values_of(name), "out": str(out), **other}), comm=SoloComm()) as done:
        return list(done), done


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name, tmp_path, at_top):
    records, done = run(name, tmp_path)
    assert records[-1]["round"] == 2 and records[-1]["accuracy"] > 0.4
    assert done.code, "the run directory keeps the recipe's source"
    assert f"examples.extending.{name}:" in (tmp_path / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.mpi
def test_recipes_train_alike_on_one_rank_and_on_two(tmp_path):
    """Robust rule, codec and plan exchange something in this run."""
    names = ["robust_rule", "codec", "plan", "server_optimizer", "selector", "dataset"]
    found = {}
    for n in (1, 2):
        done = mpirun(n, PYTHON, str(PROGRAM), str(tmp_path / str(n)), *names, cwd=TOP, timeout_s=120)
        assert done.rc == 0, done.tails
        found[n] = json.loads(next(line for line in done.out.splitlines() if line.startswith("{")))
    for name in names:
        assert found[1][name] == pytest.approx(found[2][name], rel=1e-3), name


def recipe(name):
    return importlib.import_module(f"examples.extending.{name}")


def test_centralized_gradients_have_no_mean(at_top, tmp_path):
    _, done = run("local_rule", tmp_path)
    start = torch.nn.Linear(64, 10)
    before, after = start.weight.detach() * 0, done.model.linear.weight.detach()
    moved = after - run("local_rule", tmp_path / "one", rounds=1)[1].model.linear.weight.detach()
    assert moved.mean(dim=1).abs().max() < 1e-6 < moved.abs().max() and before.sum() == 0


def test_the_mean_around_the_median_leaves_out_what_lies_far_off(at_top):
    rows = torch.tensor([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], [1e9, -1e9], [4.0, 8.0]])
    found = recipe("robust_rule").MeanAroundMedian(hostile=1).combine(rows, None)
    assert found.tolist() == [2.5, 6.5]


@pytest.mark.parametrize("bare", [False, True])
def test_int16_gives_back_what_it_is_given_up_to_half_a_step(bare, at_top):
    codec = recipe("codec").Int16()
    x, residual = torch.randn(1001), torch.randn(1001)
    payload, out = torch.zeros(codec.max_bytes(1001), dtype=torch.uint8), torch.empty(1001)
    vectors = [v.numpy() for v in (x, payload, residual, out)] if bare else [x, payload, residual, out]
    wanted = 0.5 * x + residual
    assert codec.encode(vectors[0], vectors[1], 0, 0.5, vectors[2]) == codec.max_bytes(1001)
    codec.decode(vectors[1], vectors[3])
    step = float(wanted.abs().max()) / 32767
    assert (out - wanted).abs().max() <= 0.51 * step
    torch.testing.assert_close(out + residual, wanted)
    codec.add(vectors[1], vectors[3], weight=2.0)
    torch.testing.assert_close(out, 3 * (wanted - residual))


def test_lion_steps_by_signs(at_top):
    lion = recipe("server_optimizer").Lion(lr=0.1, beta1=0.5, beta2=0.5)
    params, mean = torch.zeros(3), torch.tensor([1.0, -2.0, 0.0])
    new, state = lion.step(params, mean.clone(), lion.init(params))
    torch.testing.assert_close(new, 0.1 * mean.sign())
    torch.testing.assert_close(state.m_P, mean / 2)
    assert params.abs().sum() == 0


def test_blocks_take_turns(tmp_path, at_top):
    records, _ = run("selector", tmp_path, rounds=3)
    assert [r["cohort"] for r in records] == [["silo-0", "silo-2"], ["silo-1"], ["silo-0", "silo-2"]]


def test_figures_of_recipes_are_in_records_and_files(tmp_path, at_top):
    records, _ = run("measurement", tmp_path / "a")
    assert records[-1]["longest"] >= 1
    records, _ = run("metric", tmp_path / "b")
    assert 0 < records[-1]["Brier"] < 1
    run("sink", tmp_path / "c")
    lines = (tmp_path / "c/figures.csv").read_text().splitlines()
    assert lines[0] == "round,train_loss,accuracy" and len(lines) == 3
    assert float(lines[2].split(",")[1]) == read_metrics(tmp_path / "c")[-1]["train_loss"]
    run("callback", tmp_path / "d")
    lines = (tmp_path / "d/slow.txt").read_text().splitlines()
    assert [line.split(" took ")[0] for line in lines] == ["round 1 of 2", "round 2 of 2"]


def test_work_grows_and_the_rate_falls(at_top, tmp_path):
    records, _ = run("workload", tmp_path, rounds=4)
    steps = [r["silos"]["silo-0"]["num_steps"] for r in records]
    assert steps == [steps[0], 2 * steps[0], 3 * steps[0], 3 * steps[0]]
    assert [recipe("schedule").Polynomial(power=2.0).lr(1.0, t, 2) for t in (1, 2)] == [1.0, 0.25]


def test_a_flipflop_order_goes_back_and_forth(at_top):
    orders = [recipe("sampler").FlipFlop().order(0, "a", epoch, 50) for epoch in range(4)]
    assert np.array_equal(orders[0], orders[1][::-1]) and not np.array_equal(orders[0], orders[2])


def test_a_clamped_update_has_no_value_beyond_the_limit(at_top, tmp_path):
    _, one = run("transform", tmp_path / "1", rounds=1)
    _, two = run("transform", tmp_path / "2", rounds=2)
    moved = (two.parameters - one.parameters).abs().max()
    assert 0.049 < moved <= 0.05 + 1e-6


def test_a_round_without_a_quorum_ends_the_run(at_top):
    class Outcome:
        cohort = ("a", "b", "c", "d")
        num_taken = 1

    quorum = recipe("policy").Quorum()
    assert quorum.objection(Outcome) == "1 updates are usable, 2 are needed"
    Outcome.num_taken = 2
    assert quorum.objection(Outcome) == ""


def test_the_hub_has_its_share(at_top):
    labels = np.zeros(100, dtype=int)
    parts = recipe("partition").Hub(share=0.6).split(labels, labels[:10], 3, np.random.default_rng(0))
    assert [len(part.train) for part in parts] == [60, 20, 20]
    assert sorted(np.concatenate([part.train for part in parts])) == list(range(100))
