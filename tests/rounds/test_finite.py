"""Losses that are not finite: the silo is named and left out, and the run continues until no silo is left."""

import numpy as np
import pytest
import torch
from support.runs import config, put_back, run  # noqa: F401

import fedmpi
from fedmpi.aggregate import AGGREGATORS, Aggregator, CohortSummary
from fedmpi.comm import SoloComm
from fedmpi.components import component
from fedmpi.errors import Diverged
from fedmpi.outcome import RoundOutcome
from fedmpi.selection import SELECTORS
from fedmpi.types import Contribution, Silo, SiloData, Source

HERE = "rounds.test_finite:"  # how configurations name this module's components
IDS = ["s0", "s1", "s2"]


@component
class Wild:
    """Three silos; the loss of the named ones is infinite in float32, and clipping makes their updates 0."""

    wild: tuple[str, ...] = ("s1",)

    def source(self, seed):
        return Source("regression", (3,), 1, tuple(Silo(name) for name in IDS), self.opened)

    def opened(self, name):
        draw = torch.Generator().manual_seed(int(name[1]))
        x = torch.randn(24, 3, generator=draw)
        y = x.sum(1)
        if name in self.wild:
            y[0] = 3e38
        return SiloData(x[:16], y[:16], x[16:], y[16:])


def wild(out, wild=("s1",), rounds=3, **other):
    data = {"name": HERE + "Wild", "wild": list(wild)}
    return config(out, rounds, data, local={"lr": 0.05, "clip": 1.0}, **other)


def test_a_silo_whose_training_loss_is_infinite_is_named_and_its_loss_left_out(tmp_path):
    records, _ = run(wild(tmp_path))
    for record in records:
        assert record["not_finite"] == ["s1"] and record["rejected"] == []
        assert record["silos"]["s1"]["train_loss"] is None
        assert record["train_loss"] == np.mean([record["silos"][silo]["train_loss"] for silo in ("s0", "s2")])
    assert records[-1]["loss"] < records[0]["loss"]


def test_a_run_ends_where_nobody_s_loss_is_finite(tmp_path):
    with pytest.raises(Diverged, match="its training loss is not finite"):
        run(wild(tmp_path, IDS))


def test_rounds_without_such_a_silo_say_nothing_of_it(tmp_path):
    records, _ = run(wild(tmp_path, ()))
    assert all("not_finite" not in record for record in records)


def test_a_candidate_whose_fresh_loss_is_not_finite_is_named_and_comes_last(tmp_path):
    select = {"name": "power_of_choice", "fraction": 0.34, "num_candidates": 3}
    records, _ = run(wild(tmp_path, select=select))
    assert [record["not_finite"] for record in records] == [["s1"]] * 3
    assert all(record["cohort"] != ["s1"] for record in records)


def test_a_silo_that_never_tells_a_finite_loss_is_not_chosen_for_ever():
    """Power-of-choice by last losses: infinite before the first participation, finite after it."""
    selector = SELECTORS.build({"name": "power_of_choice", "count": 1, "num_candidates": 3, "losses": "last"}, "select")
    state = selector.init([5, 5, 5])
    told = {"s0": {"train_loss": 3.0}, "s1": {"train_loss": None}, "s2": {"train_loss": 1.0}}
    state = selector.observe(IDS, state, RoundOutcome.of(IDS, 1, IDS, rows=told))
    assert selector.select(IDS, state, None, np.random.default_rng(0)).cohort == ["s0"]
    again = selector.observe(IDS, state, RoundOutcome.of(IDS, 2, ["s0"], rows={"s0": {"train_loss": None}}))
    assert again["loss"][0] == 3.0  # its last finite one counts


def test_fairness_of_degree_0_does_not_look_at_losses():
    fair = AGGREGATORS.build({"name": "qffl", "q": 0, "lr": 0.1}, "aggregate")
    one = Contribution("a", 1, 1.0, torch.ones(1), 0.0, 1, 1, start_loss=float("nan"))
    assert fair.weight(one) == 1.0
    heard = CohortSummary(np.ones(2), np.ones(2), np.ones(2), np.array([np.nan, 1.0]), np.ones(2), 2.0)
    assert fair.scale(heard) == pytest.approx(1.0)


def test_fairness_rejects_by_name_whoever_s_loss_of_the_global_parameters_is_not_finite(tmp_path):
    records, _ = run(wild(tmp_path, aggregate={"name": "qffl", "q": 1, "lr": 0.05}))
    assert [record["rejected"] for record in records] == [["s1"]] * 3


@component
class Endless(Aggregator):
    """A mean that is multiplied by a value that is not finite."""

    def base(self, silo, num_samples):
        return 1.0

    def weight(self, contribution):
        return contribution.weight

    def scale(self, heard):
        return float("nan")


def test_a_scale_that_is_no_number_ends_the_run_before_the_parameters_are_touched(tmp_path):
    how = config(tmp_path, 2, aggregate=HERE + "Endless")
    started = fedmpi.Run(how, comm=SoloComm())
    before_P = started.parameters.clone()
    with pytest.raises(Diverged, match=r"^round 1: Endless would multiply the mean of the updates by nan$"):
        list(started)
    assert torch.equal(started.parameters, before_P)
    started.close()
