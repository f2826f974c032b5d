"""Rounds of large models, in whose compiled passes no delta may ever be taken, are those of small ones bit for bit."""

from typing import Any

import pytest
from support.runs import OWN, config, figures, put_back, run  # noqa: F401

from fedmpi import flat
from fedmpi.flat import sha256
from fedmpi.local import RULES

MLP = {"model": {"name": "mlp", "hidden": [6]}}
SHARED = ["*", "!linear.*"]
NEEDS: dict[str, dict[str, Any]] = {
    "feddyn": {"server": {"optimizer": {"name": "feddyn", "alpha": 0.01}}},
    "moon": MLP,
    "fedrep": MLP | {"local": {"head_epochs": 1}, "exchange": {"parameters": SHARED}},
    "per_fedavg": {"local": {"inner_lr": 0.05}},
}
WAYS = {
    "plain": {},
    "clip": {"updates": [{"name": "clip", "norm": 0.05}]},
    "max_norm": {"updates": [{"name": "max_norm", "times": 1.01}]},
    "momentum": {"server": {"optimizer": {"name": "fedavgm"}}},
    "average": {"server": {"average": {"decay": 0.5}}},
    "fedexp": {"server": {"optimizer": "fedexp"}},
    "fine-tuned": {"evaluate": {"finetune": {"name": "sgd", "lr": 0.1, "epochs": 1}}},
    "three silos": {"data": {"sizes": [20, 30, 50]}},
    "one of three silos": {"data": {"sizes": [20, 30, 50]}, "select": {"name": "uniform", "fraction": 0.34}},
    "batch norm": {"model": {"name": OWN + "Normed"}},
    "buffer": {"engine": {"name": "synchronous", "policy": {"name": "deadline", "deadline_s": 60, "late": "buffer"}}},
}


def trained(out, how):
    exchange = {"plan": "shared_memory"} | how.get("exchange", {})
    data = {"sizes": [40]} | how.get("data", {})
    rest = {key: value for key, value in how.items() if key not in ("exchange", "data")}
    records, left = run(config(out, 4, data, exchange=exchange, **rest))
    return records, left


def compared(tmp_path, monkeypatch, how):
    plain, before = trained(tmp_path / "plain", how)
    monkeypatch.setattr(flat, "COMPILED", 1)
    fused, after = trained(tmp_path / "fused", how)
    assert len(plain) == len(fused) == 4
    assert sha256(before.parameters) == sha256(after.parameters)
    for one, other in zip(plain, fused, strict=True):
        first, second = figures(one), figures(other)
        for name in ("train_loss", "accuracy", "rejected", "cohort"):
            assert first.get(name) == second.get(name)


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_run(tmp_path, monkeypatch, way):
    compared(tmp_path, monkeypatch, WAYS[way])


@pytest.mark.parametrize("rule", [name for name in RULES.members if name != "fedsgd"])  # which has no epochs
def test_rules(tmp_path, monkeypatch, rule):
    needs = NEEDS.get(rule, {})
    compared(tmp_path, monkeypatch, needs | {"local": needs.get("local", {}) | {"name": rule}})
