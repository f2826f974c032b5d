"""Modules of one's own in whole runs: what they draw, assign anew, share and make late."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import config, figures, put_back, run  # noqa: F401

from fedmpi import results
from fedmpi.flat import sha256
from fedmpi.local import Round

HALVES = {"rounds": 12, "local": {"lr": 0.1, "epochs": 1, "batch_size": 32}, "data": {"name": "digits", "silos": 3}}


def drift(out, model, **other):
    local = {"lr": 0.01, "epochs": None, "steps": 2, "batch_size": 8}
    return config(out, data={"name": "modules:Drifts"}, model=model, local=local, **other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_of_half_precision_learns_digits_as_one_of_float32_does(dtype, tmp_path):
    found = {}
    for name in ("float32", dtype):
        records, _ = run(config(tmp_path / name, **HALVES, model={"name": "modules:Cast", "dtype": name}))
        found[name] = records
    norms = [record["delta_norm"] for record in found[dtype]]
    assert len(set(norms)) == len(norms) and norms[-1] < norms[0], "every round has a delta of its own"
    assert norms == pytest.approx([record["delta_norm"] for record in found["float32"]], rel=0.05)
    assert found[dtype][-1]["accuracy"] == pytest.approx(found["float32"][-1]["accuracy"], abs=0.02)


def draws():
    return torch.rand(2).tolist(), np.random.randn(3).tolist(), random.random()


def all_set(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    np.random.randn()  # numpy keeps the second number of a pair


@pytest.mark.parametrize("always", [False, True])
def test_numbers_drawn_without_a_generator_are_keyed_and_the_process_gets_its_own_back(always, tmp_path):
    shas, told = [], []
    for seed, out in enumerate(("a", "b")):
        all_set(seed)
        expected = draws()
        all_set(seed)
        how = drift(
            tmp_path / out, {"name": "modules:Jitter", "always": always}, select={"name": "uniform", "fraction": 0.75}
        )
        records, done = run(how)
        assert draws() == expected
        shas.append(sha256(done.params_P))
        told.append([figures(record) for record in records])
        all_set(seed)
        again = results.evaluate(tmp_path / out)
        assert again["loss"] == records[-1]["loss"], "a checkpoint draws as its round did"
        assert draws() == expected
    assert shas[0] == shas[1] and told[0] == told[1]


def test_a_silo_draws_the_same_whoever_drew_before(tmp_path):
    """Which is what makes numbers of ranks alike: there every rank has other silos."""
    _, done = run(drift(tmp_path, {"name": "modules:Jitter", "always": True}, rounds=1), rounds=1)
    fed, deltas = done._federation, []
    for silos in (["s0", "s1", "s2"], ["s2"]):
        draws()
        for silo in silos:
            this = replace(fed.silos[silo], cursor=0, kept={})
            round = Round(1, 1, 0, fed.objective.loss, lambda: None)
            delta_P = fed.rule.train(this, fed.model, done.params_P, round).delta_P
        deltas.append(delta_P.clone())
    assert torch.equal(*deltas)


def test_data_of_ones_own_that_draw_without_a_generator_are_the_same_in_every_run(tmp_path):
    fingerprints = set()
    for seed in (1, 2):
        all_set(seed)
        how = config(tmp_path / str(seed), data={"name": "modules:Drawn"}, rounds=1)
        records, done = run(how)
        fingerprints.add(done.fingerprint)
        assert results.evaluate(tmp_path / str(seed))["loss"] == records[-1]["loss"]
    assert len(fingerprints) == 1
