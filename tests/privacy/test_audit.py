"""Audits: the bound's numbers, canaries that are found without privacy, and a bound below the account with it."""

import json
import math
from dataclasses import replace

import pytest
import torch
from support.runs import Blobs, config, put_back  # noqa: F401
from typer.testing import CliRunner

from fedmpi.aggregate import Mean
from fedmpi.audit import Canaried, _largest, audit, lower_bound, p_value
from fedmpi.cli import app
from fedmpi.errors import ConfigError
from fedmpi.layout import DELTA
from fedmpi.privacy import Bounded, DpSgd, SiloPrivacy
from fedmpi.types import SiloData


def overfits(out, epochs=30, **other):
    """A net that learns its samples by heart."""
    local = {"lr": 0.1, "epochs": epochs, "batch_size": 32}
    model = {"name": "mlp", "hidden": [64]}
    data = {"name": "digits", "silos": 2}
    return config(out, 3, data, model=model, local=local, aggregate={"name": "mean", "weights": "uniform"}, **other)


def test_bounds_are_those_of_the_paper():
    # All of r guesses correct under pure DP: p = (e^eps / (1 + e^eps))^r.
    assert p_value(50, 20, 20, 1.0, 0.0) == pytest.approx((1 / (1 + 2.718281828459045**-1)) ** 20)
    assert p_value(50, 20, 15, 1.0, 1e-3) > p_value(50, 20, 15, 1.0, 0.0)
    assert lower_bound(100, 100, 50, 0.0, 0.95) == 0.0
    assert 2.9 < lower_bound(100, 100, 99, 0.0, 0.95) < 3.1  # 3.0: binomial with rate 0.9534
    assert lower_bound(100, 100, 99, 1e-3, 0.95) < lower_bound(100, 100, 99, 0.0, 0.95)


def test_canaries_are_found_without_privacy(tmp_path):
    told = audit(overfits(tmp_path), canaries=80, scale=2.0)
    assert told["epsilon_at_least"] > 1.0 and told["epsilon_at_most"] is None
    assert told["correct"] > 0.9 * told["guesses"]


def test_with_privacy_the_bound_lies_below_the_account(tmp_path):
    private = {"name": "record", "clip": 1.0, "epsilon": 1.0, "delta": 1e-5}
    told = audit(overfits(tmp_path, 5, privacy=private), canaries=80, scale=2.0)
    assert told["epsilon_at_least"] <= told["epsilon_at_most"] <= 1.0
    assert told["correct"] < 0.8 * told["guesses"]


def test_rates_and_steps_do_not_tell_how_many_canaries_are_in(tmp_path, monkeypatch):
    # Neighbours differ in one canary; were n_k, q and the steps those of the rows that are in, they would differ too.
    seen = []

    def batches(self, silo):
        for x, y in drawn(self, silo):
            seen.append((silo.id, self.rate, self.steps, x))
            yield x, y

    drawn = DpSgd.batches
    monkeypatch.setattr(DpSgd, "batches", batches)
    private = {"name": "record", "clip": 1.0, "sigma": 4.0, "delta": 1e-5}
    how = overfits(tmp_path, 2, privacy=private)
    silo = how.data.source(how.seed).silos[0].id
    data = how.data.source(how.seed).open(silo)
    audit(how, silo=silo, canaries=41, scale=2.0)
    num = len(data.x_train) + 41
    assert {(rate, steps) for name, rate, steps, _ in seen if name == silo} == {(32 / num, 2 * math.ceil(num / 32))}
    x, _, inside = Canaried(data=how.data, silo=silo, count=41, scale=2.0).canaries(data, how.seed, 10)
    rows = {row.tobytes() for name, _, _, batch in seen if name == silo for row in batch.numpy()}
    assert {row.numpy().tobytes() for row in x[~inside]}.isdisjoint(rows)
    assert {row.numpy().tobytes() for row in x[inside]} & rows


def test_integer_inputs_are_refused(tmp_path):
    silo = SiloData(*(torch.zeros(3, 2, dtype=torch.int64),) * 4)
    with pytest.raises(ConfigError, match="inputs of silo 'a' are integers"):
        Canaried(data=overfits(tmp_path).data, silo="a", count=8).canaries(silo, 0, 2)


# ------------------------------------------------------------ silos as canaries


def few_steps(out, **other):
    return config(
        out, 3, {"name": "digits", "silos": 4}, model="logistic", local={"lr": 0.1, "epochs": 1}, **UNIFORM, **other
    )


UNIFORM = {"aggregate": {"name": "mean", "weights": "uniform"}}
NOISY = {"name": "silo", "clip": 0.5, "epsilon": 2.0, "delta": 1e-3, "reproducible": True}
ROBIN = {"select": {"name": "round_robin", "count": 21}}


def test_canary_silos_are_found_without_privacy(tmp_path):
    told = audit(few_steps(tmp_path), canaries=80, silos=True)
    assert told["epsilon_at_least"] > 2.0 and told["epsilon_at_most"] is None and told["silo"] is None
    assert told["correct"] > 0.95 * told["guesses"]


@pytest.mark.parametrize(
    "other",
    [
        {"privacy": NOISY},
        {"privacy": NOISY, "secure": {"name": "secagg", "threshold": 4}},
        {"privacy": NOISY | {"bands": 2}, **ROBIN},
        {"privacy": NOISY, "select": {"name": "poisson", "rate": 0.5}},
    ],
    ids=["independent", "masked", "correlated", "poisson"],
)
def test_with_silo_privacy_the_bound_lies_below_the_account(tmp_path, other):
    told = audit(few_steps(tmp_path, **other), canaries=80)
    assert told["epsilon_at_least"] <= told["epsilon_at_most"] <= 2.0
    assert told["correct"] < 0.9 * told["guesses"]


def test_noise_that_is_not_there_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(Bounded, "on_mean", lambda *given: None)
    told = audit(few_steps(tmp_path, privacy=NOISY), canaries=80)
    assert told["epsilon_at_least"] > told["epsilon_at_most"]


def test_a_canary_that_is_out_counts_as_zero_and_one_that_is_in_as_the_clip(tmp_path, monkeypatch):
    sent = {}
    on_silo = Bounded.on_silo

    def spied(self, update, state, about):
        kept = on_silo(self, update, state, about)
        sent.setdefault(update.silo, []).append(update[DELTA].clone())
        return kept

    monkeypatch.setattr(Bounded, "on_silo", spied)
    audit(few_steps(tmp_path, privacy=NOISY), canaries=20)
    norms = {silo: [float(delta_P.norm()) for delta_P in rows] for silo, rows in sent.items() if silo[:6] == "canary"}
    assert len(norms) == 20 and {round(norm, 4) for rows in norms.values() for norm in rows} == {0.0, 0.5}
    assert all(len({round(norm, 4) for norm in rows}) == 1 for rows in norms.values())


def test_what_cannot_be_audited_is_refused(tmp_path):
    how = overfits(tmp_path)
    silos = SiloPrivacy(clip=1.0, sigma=1.0, delta=1e-3)
    with pytest.raises(ConfigError, match="leave --silo out"):
        audit(overfits(tmp_path, privacy=silos), silo="silo-0")
    with pytest.raises(ConfigError, match="follows a fixed clip"):
        audit(overfits(tmp_path, privacy=replace(silos, quantile=0.5)))
    with pytest.raises(ConfigError, match="leave --silos out"):
        audit(overfits(tmp_path, privacy={"name": "record", "clip": 1.0, "sigma": 1.0, "delta": 1e-5}), silos=True)
    with pytest.raises(ConfigError, match="weights: uniform"):
        audit(replace(how, aggregate=Mean()), silos=True)
    with pytest.raises(ConfigError, match="8 canaries"):
        audit(how, canaries=4)
    with pytest.raises(ConfigError, match="canaries need a finite scale"):
        audit(how, scale=-1.0)
    with pytest.raises(ConfigError, match="no silo 'x'"):
        audit(how, silo="x")


def test_the_largest_silo_gets_the_canaries_also_where_no_sizes_are_declared():
    assert [_largest(Blobs(sizes=(20, 50, 30), declared=num).source(0)) for num in (None, 9)] == ["s1", "s0"]


def test_the_command_prints_bound_and_account(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"
    file.write_text("rounds: 1\nprivacy: {name: record, clip: 1.0, sigma: 4, delta: 1.0e-5}\ndevice: {name: cpu}\n")
    done = CliRunner().invoke(app, ["audit", str(file), "--canaries", "8", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output.strip().splitlines()[-1])
    assert told["epsilon_at_least"] == 0.0 < told["epsilon_at_most"] and told["silo"] == "silo-0"
    assert told["epsilon_if_all_right"] == lower_bound(8, 4, 4, 1e-5, 0.95)
