"""Settings of single silos: each trains as if all had its settings, on any number of ranks."""

import json
from typing import Any

import pytest
import torch
from support.mpi import PYTHON, mpirun
from support.runs import config, everything, refused, run

from fedmpi import checkpoint
from fedmpi.components import build, to_dict
from fedmpi.config import Config, load
from fedmpi.differences import differences
from fedmpi.errors import ConfigError

OWN = {"lr": 0.02, "batch_size": 4, "epochs": 2, "clip": 0.5}
DOTTED = {f"local.{key}": value for key, value in OWN.items()}


BUFFERED = {"engine": {"name": "buffered", "size": 3, "clock": "virtual"}}


def rows(out, **how):
    (record, *_), _ = run(config(out, 1, **how))
    return {silo: (row["delta_norm"], row["train_loss"], row["num_steps"]) for silo, row in record["silos"].items()}


@pytest.mark.parametrize(
    "local", [{}, {"name": "fedprox", "mu": 0.1}, {"name": "scaffold"}, {"name": "ditto"}], ids=str
)
@pytest.mark.parametrize(
    "other", [{}, {"engine": {"name": "buffered", "size": 3, "clock": "virtual"}}], ids=["", "buffered"]
)
def test_a_silo_trains_as_if_all_had_its_settings(tmp_path, local, other):
    common = rows(tmp_path / "a", local=local, **other)
    changed = rows(tmp_path / "b", local={**local, **OWN}, **other)
    mixed = rows(tmp_path / "c", local=local, silos={"s1": DOTTED}, **other)
    assert mixed == {"s0": common["s0"], "s1": changed["s1"], "s2": common["s2"]} and common["s1"] != changed["s1"]
    nested = rows(tmp_path / "d", local=local, silos={"s1": {"local": OWN}}, **other)
    assert nested == mixed


def test_steps_replace_epochs_for_one_silo_and_a_restart_trains_on_alike(tmp_path):
    how = {"silos": {"s2": {"local.steps": 3}}}
    records, _ = run(config(tmp_path / "a", 4, **how))
    assert [r["silos"]["s2"]["num_steps"] for r in records] == [3] * 4 and records[0]["silos"]["s0"]["num_steps"] == 3
    run(config(tmp_path / "b", 4, **how), rounds=2)
    run(config(tmp_path / "b", 4, **how))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    run(config(tmp_path / "c", 4))
    assert everything(tmp_path / "a") != everything(tmp_path / "c")
    assert "silos.s2.local.steps is 3 there and 2 here" in refused(
        config(tmp_path / "a", 6, silos={"s2": {"local.steps": 2}})
    )


@pytest.mark.parametrize("rule", ["scaffold", "gradient_correction"])
def test_control_variates_are_gradients_whatever_a_silos_rate_is(tmp_path, rule):
    """One step over all samples: the kept vector is the gradient at the first parameters."""
    name = {"scaffold": "control", "gradient_correction": "gradient"}[rule]
    kept = {}
    for lr in (0.1, 0.003):
        local = {"name": rule, "epochs": None, "steps": 1, "batch_size": None}
        how = config(tmp_path / str(lr), 1, local=local, silos={"s1": {"local.lr": lr}}, checkpoint={"every": 1})
        run(how)
        kept[lr] = checkpoint.read_silos(tmp_path / str(lr), 1, ["s0", "s1"])
    for silo in ("s0", "s1"):
        one, two = (next(t for key, t in kept[lr][silo].items() if name in key) for lr in kept)
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
        assert one.abs().max() > 0.01


RECORD = {"privacy": {"name": "record", "clip": 1.0, "sigma": 1.0, "delta": 1e-5}}
BENCHMARK = {"local": {"name": "scaffold", "lr": 1, "epochs": 1, "variant": "benchmark"}}
QFFL = {"aggregate": {"name": "qffl", "q": 1, "lr": 0.1}}
AMOUNT = {"local": {"name": "sgd", "lr": 1, "epochs": 1, "amount": {"name": "by_silo", "silos": {"s1": 3}}}}


@pytest.mark.parametrize(
    ("own", "how", "message"),
    [
        ({"local.momentum": 1}, {}, "silos.s1: 'local.momentum' cannot differ between silos; available: local.lr, "),
        ({"local.lrr": 1}, {}, "silos.s1: 'local.lrr' cannot differ between silos; did you mean 'local.lr'?"),
        ({"lr": 1}, {}, "silos.s1: 'lr' cannot differ between silos; available: local.lr, "),
        ({"model.lr": 1}, {}, "silos.s1: 'model.lr' cannot differ between silos"),
        ({"local": {"mu": 1}}, {}, "silos.s1: 'local.mu' cannot differ between silos"),
        ({}, {}, "silos.s1: expected keys and values, such as local.lr: 0.01"),
        ({"local.lr": -1}, {}, "silos.s1.local.lr: input should be greater than 0, got -1"),
        ({"local.lr": 1}, {"aggregate": "fednova"}, "silos: aggregate: fednova divides deltas by"),
        (
            {"local.lr": 1},
            {"aggregate": {"name": "qffl", "q": 1, "lr": 0.1}},
            "silos: aggregate: qffl divides deltas by",
        ),
        ({"local.epochs": 2}, BENCHMARK, "silos: scaffold's variant benchmark needs silos that take equal steps"),
        ({"local.lr": 1}, RECORD, "silos: with privacy: record the account needs the same local settings"),
        ({"local.epochs": 2}, AMOUNT, "silos: 's1' is in local.amount.silos too"),
    ],
)
def test_what_cannot_differ_is_refused_in_one_line(own, how, message):
    with pytest.raises(ConfigError) as caught:
        build(Config, {"silos": {"s1": own}, **how})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_silo_is_refused(tmp_path):
    said = refused(config(tmp_path, 1, silos={"s11": {"local.lr": 1}}))
    assert said == "silos: no silo 's11'; did you mean 's1'?"


def test_fednova_takes_other_batches_and_epochs():
    build(Config, {"silos": {"s1": {"local.epochs": 3, "local.batch_size": 4}}, "aggregate": "fednova"})


def test_a_silo_may_have_a_rate_here_and_epochs_in_amount():
    found: Any = build(Config, {"silos": {"s1": {"local.lr": 0.5}}, **AMOUNT})
    assert found.rule.of("s1").lr == 0.5


def test_settings_survive_files_and_overrides(tmp_path):
    (tmp_path / "a.yaml").write_text("silos: {s1: {local.lr: 0.5}}\n")
    found, _ = load(tmp_path / "a.yaml", ["silos.s2.local.epochs=3"])
    rule: Any = found.rule
    assert rule.of("s1").lr == 0.5 and rule.of("s2").epochs == 3
    again = build(Config, json.loads(json.dumps(to_dict(found))))
    assert differences(to_dict(found), again) == []
    before = to_dict(Config())
    del before["silos"]
    assert differences(before, Config()) == []


PROGRAM = """
import sys
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.flat import sha256
from fedmpi.train import Run
values = {"rounds": 2, "out": sys.argv[1], "data": {"name": "digits", "silos": 4}, "model": "logistic",
          "local": {"name": "sgd", "lr": 0.1, "epochs": 1}, "exchange": {"reduction": "reproducible"},
          "silos": {"silo-1": {"local.lr": 0.01}, "silo-3": {"local.batch_size": 8, "local.steps": 5}}}
with Run(build(Config, values)) as run:
    records = list(run)
if run.comm.rank == 0:
    print("bits", sha256(run.parameters), records[-1]["silos"]["silo-3"]["num_steps"])
"""


@pytest.mark.mpi
def test_any_number_of_ranks_gives_the_same_bits(tmp_path):
    found = set()
    for n in (1, 3):
        done = mpirun(n, PYTHON, "-c", PROGRAM, str(tmp_path / str(n)), timeout_s=120)
        assert done.rc == 0, done.tails
        found.add(next(line for line in done.out.splitlines() if line.startswith("bits")))
    assert len(found) == 1 and found.pop().endswith(" 5")
