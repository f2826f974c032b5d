"""Record-level differential privacy: whole runs against plain numpy given the same draws, and what is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from privacy.test_silo import SIZES, blobs, run_first, step
from privacy.test_silo import private as silo_level
from support.runs import OWN, Blobs, config, put_back, refused, run  # noqa: F401
from torch import nn

from fedmpi import plan, rng
from fedmpi.components import build, component, to_dict
from fedmpi.config import Config
from fedmpi.data.heart_disease import HeartDisease
from fedmpi.errors import ConfigError
from fedmpi.privacy import Use, account, epsilon
from fedmpi.privacy.noise import secret_generator

RECORD = {"name": "record", "clip": 0.4, "sigma": 0.9, "delta": 1e-3, "reproducible": True}
LR, SIZE = 0.5, 8


def private(out, rounds=3, **other):
    data = {"name": OWN + "Blobs", "sizes": list(SIZES)}
    local = {"name": "sgd", "lr": LR, "epochs": 1, "batch_size": SIZE} | other.pop("local", {})
    section = RECORD | other.pop("privacy", {})
    other = {"aggregate": {"name": "mean", "weights": "uniform"}} | other
    return config(out, rounds, data, local=local, privacy=section, **other)


def plain(params, rounds, steps_of, sigma=0.9):
    """DP-SGD in every silo, then the mean."""
    for t in range(1, rounds + 1):
        deltas = []
        for k, num in enumerate(SIZES):
            (x, y), now = blobs(k), params.copy()
            secret = f"{rng.key(0, purpose='privacy', round=t, silo=f's{k}'):016x}"
            for number in range(steps_of(num)):
                rows = secret_generator(secret, "sample", number).random(num) < SIZE / num
                total = np.zeros(10)
                for i in np.flatnonzero(rows):
                    gradient = -step(now, x[i : i + 1], y[i : i + 1]) / LR
                    total += gradient * min(1.0, 0.4 / np.linalg.norm(gradient))
                draw = secret_generator(secret, "noise", number)
                noise = [draw.standard_normal(n, dtype=np.float32) for n in (8, 2)]  # weights, then bias
                now -= LR * (total + sigma * 0.4 * np.concatenate(noise)) / SIZE
            deltas.append(now - params)
        params = params + np.mean(deltas, axis=0)
    return params


@pytest.mark.parametrize("amount", [{"epochs": 1}, {"epochs": None, "steps": 2}])
def test_a_run_is_plain_dp_sgd(tmp_path, amount):
    def steps_of(num):
        return amount.get("steps") or math.ceil(num / SIZE)

    expected = plain(run_first(tmp_path), 3, steps_of)
    records, done = run(private(tmp_path / "a", local=amount))
    np.testing.assert_allclose(done.parameters.double().numpy(), expected, rtol=0, atol=3e-6)
    worst = max(epsilon({Use(0.9, SIZE / num): 3 * steps_of(num)}, 1e-3) for num in SIZES)
    assert records[-1]["epsilon"] == pytest.approx(worst, rel=1e-9)
    rows = {row["silo"]: row["count"] for row in json.loads((tmp_path / "a/privacy.json").read_text())["uses"]}
    assert rows == {f"s{k}": 3 * steps_of(num) for k, num in enumerate(SIZES)}


def test_no_figure_without_noise_is_told(tmp_path):
    records, _ = run(private(tmp_path, 2))
    for record in records:
        assert record["train_loss"] is None
        for k, num in enumerate(SIZES):
            row = record["silos"][f"s{k}"]
            assert row["train_loss"] is None and row["num_samples"] == math.ceil(num / SIZE) * SIZE


def test_each_silo_gets_the_noise_that_its_own_target_needs(tmp_path):
    how = private(tmp_path, 2, privacy={"sigma": None, "epsilon": 3.0})
    told = plan.plan(build(Config, to_dict(how) | {"data": to_dict(how)["data"] | {"declared": 20}}), {}, 2)["budget"]
    assert len(told["silos"]) == 6 and all(2.9 < row["epsilon"] <= 3.0 for row in told["silos"].values())
    with pytest.raises(ConfigError, match="declares no num_samples"):
        plan.plan(how, {}, 2)
    records, _ = run(how)
    rows = json.loads((tmp_path / "privacy.json").read_text())["uses"]
    assert len({row["sigma"] for row in rows}) > 1
    assert all(2.9 < epsilon({Use(r["sigma"], r["rate"]): r["count"]}, 1e-3) <= 3.0 for r in rows)
    assert 2.9 < records[-1]["epsilon"] <= 3.0


def test_only_the_cohort_spends_and_lossy_codecs_may_follow(tmp_path):
    select = {"name": "round_robin", "count": 2}
    run(private(tmp_path, 3, select=select, exchange={"plan": "sharded", "up": {"codec": "int8"}}))
    rows = {row["silo"]: row["count"] for row in json.loads((tmp_path / "privacy.json").read_text())["uses"]}
    assert rows == {f"s{k}": math.ceil(num / SIZE) for k, num in enumerate(SIZES)}


def test_with_changing_cohorts_each_silo_spends_what_the_library_says_of_its_own_steps(tmp_path):
    records, _ = run(private(tmp_path, 4, select={"name": "uniform", "fraction": 0.5}))
    rounds = {f"s{k}": sum(f"s{k}" in record["cohort"] for record in records) for k in range(len(SIZES))}
    assert len({*rounds.values()}) > 1
    dp, spent = account.library(), []
    for k, num in enumerate(SIZES):
        whole = dp.pld.PLDAccountant()
        if rounds[f"s{k}"]:
            step = dp.PoissonSampledDpEvent(SIZE / num, dp.GaussianDpEvent(0.9))
            whole.compose(step, rounds[f"s{k}"] * math.ceil(num / SIZE))
        spent.append(whole.get_epsilon(1e-3))
    assert records[-1]["epsilon"] == pytest.approx(max(spent), rel=1e-8)


def test_who_is_told_the_number_of_records_is_said(tmp_path):
    """It is in what a run writes, also where figures of single silos are not told."""
    how = private(tmp_path, 1, disclose="pooled")
    records, _ = run(how)
    assert [records[0]["silos"][f"s{k}"]["num_train"] for k in range(len(SIZES))] == list(SIZES)
    rates = [row["rate"] for row in json.loads((tmp_path / "privacy.json").read_text())["uses"]]
    assert [round(SIZE / rate) for rate in rates] == list(SIZES)
    assert "not covered are the number of records of each silo" in how.privacy.sentence(how)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"local": {"name": "fedprox", "lr": 0.1, "epochs": 1}}, "needs local: sgd"),
        ({"local": {"name": "sgd", "lr": 0.1, "epochs": 1, "amount": "drawn"}}, "needs local.amount: whole"),
        ({"evaluate": {"finetune": {"name": "sgd", "lr": 0.1, "epochs": 1}}}, "finetune trains without noise"),
        ({"select": {"name": "power_of_choice", "count": 2}}, "reads losses"),
        ({"aggregate": {"name": "qffl", "lr": 0.1}}, "sends the loss"),
        ({"engine": {"name": "buffered", "size": 2}}, "needs engine: synchronous"),
    ],
)
def test_what_has_no_sound_account_is_refused_in_one_line(tmp_path, changes, says):
    with pytest.raises(ConfigError) as caught:
        build(Config, to_dict(private(tmp_path)) | changes)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@component
class Fitted(Blobs):
    """Data whose preprocessing looked at the training rows."""

    def source(self, seed):
        return replace(super().source(seed), fitted=True)


def test_preprocessing_fitted_to_training_rows_is_refused(tmp_path):
    data = {"name": "privacy.test_record:Fitted", "sizes": list(SIZES), "declared": 20}
    how = build(Config, to_dict(private(tmp_path / "a")) | {"data": data})
    assert "normalise: fixed" in refused(how)
    with pytest.raises(ConfigError, match="one record changes all others"):
        plan.plan(how, {}, 2)
    whole = silo_level(tmp_path / "b", 1)
    run(build(Config, to_dict(whole) | {"data": data | {"declared": None}}))  # a silo is protected as a whole
    for normalise, fitted in (("fitted", True), ("fixed", False)):
        assert HeartDisease(normalise=normalise).source(0).fitted == fitted


class Keeps(nn.Module):
    """A shared buffer takes on the mean of the samples, without BatchNorm."""

    seen: torch.Tensor

    def __init__(self, writes, inputs=4):
        super().__init__()
        self.writes, self.last = writes, nn.Linear(inputs, 2)
        self.register_buffer("seen", torch.zeros(inputs))

    def forward(self, x):
        if self.training and self.writes == "into":
            self.seen.copy_(x.detach().mean(0))
        elif self.training:
            self.seen = x.detach().mean(0)
        return self.last(x)


@pytest.mark.parametrize("writes", ["into", "anew"])
def test_a_buffer_that_takes_on_the_samples_is_not_told(tmp_path, writes):
    """It would leave its silo without noise: the run is refused, or the buffer stays as it was."""
    how = private(tmp_path, 2, model={"name": "privacy.test_record:Keeps", "writes": writes})
    if writes == "into":
        assert refused(how) == (
            "privacy: record takes gradients of single samples, and this model has none: its forward pass writes into "
            "'seen'; let it write into no tensor of the model"
        )
        return
    _, done = run(how)
    done.federation.model.load(done.parameters)
    assert not done.federation.model.module.seen.any() and done.parameters.any()


def test_batch_normalization_is_refused(tmp_path):
    assert "'norm' mixes samples" in refused(private(tmp_path, model=OWN + "Normed"))
