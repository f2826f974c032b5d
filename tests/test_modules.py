"""Users' modules in whole runs: what they draw, reassign, share and create late."""

import random
import re
import time
import timeit
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.modules import Follower, Freezes, Remembers, Tied, Unsaved, Views, Weights
from support.runs import config, figures, put_back, refused, run  # noqa: F401

from fedmpi import results
from fedmpi.components import build, to_dict
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.flat import FlatModel, sha256
from fedmpi.local import LocalSilo, Round, Sgd
from fedmpi.local.base import whole_gradient
from fedmpi.local.samplers import InOrder
from fedmpi.models import make
from fedmpi.opening import fingerprint
from fedmpi.plan import plan
from fedmpi.types import SiloData

HALVES = {"rounds": 12, "local": {"lr": 0.1, "epochs": 1, "batch_size": 32}, "data": {"name": "digits", "silos": 3}}


def drift(out, model, **other):
    local = {"lr": 0.01, "epochs": None, "steps": 2, "batch_size": 8}
    return config(out, data={"name": "support.modules:Drifts"}, model=model, local=local, **other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_of_half_precision_learns_digits_as_one_of_float32_does(dtype, tmp_path):
    found = {}
    for name in ("float32", dtype):
        records, _ = run(config(tmp_path / name, **HALVES, model={"name": "support.modules:Cast", "dtype": name}))
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
    np.random.randn()  # numpy caches the second number of a pair


@pytest.mark.parametrize("always", [False, True])
def test_numbers_drawn_without_a_generator_are_keyed_and_the_process_gets_its_own_back(always, tmp_path):
    shas, told = [], []
    for seed, out in enumerate(("a", "b")):
        all_set(seed)
        expected = draws()
        all_set(seed)
        how = drift(
            tmp_path / out,
            {"name": "support.modules:Jitter", "always": always},
            select={"name": "uniform", "fraction": 0.75},
        )
        records, done = run(how)
        assert draws() == expected
        shas.append(sha256(done.parameters))
        told.append([figures(record) for record in records])
        all_set(seed)
        again = results.evaluate(tmp_path / out)
        assert again["loss"] == records[-1]["loss"], "a checkpoint draws as its round did"
        assert draws() == expected
    assert shas[0] == shas[1] and told[0] == told[1]


def test_a_silo_draws_the_same_whoever_drew_before(tmp_path):
    """On several ranks each has other silos, so this is why the number of ranks does not matter."""
    _, done = run(drift(tmp_path, {"name": "support.modules:Jitter", "always": True}, rounds=1), rounds=1)
    fed, deltas = done.federation, []
    for silos in (["s0", "s1", "s2"], ["s2"]):
        draws()
        for silo in silos:
            this = replace(fed.silos[silo], cursor=0, kept={})
            round = Round(1, 1, 0, fed.objective.loss, lambda: None)
            delta_P = fed.rule.train(this, fed.model, done.parameters, round).vector_Q
        deltas.append(delta_P.clone())
    assert torch.equal(*deltas)


def test_data_of_ones_own_that_draw_without_a_generator_are_the_same_in_every_run(tmp_path):
    fingerprints = set()
    for seed in (1, 2):
        all_set(seed)
        how = config(tmp_path / str(seed), data={"name": "support.modules:Drawn"}, rounds=1)
        records, done = run(how)
        fingerprints.add(fingerprint(done.federation.facts_KF))
        assert results.evaluate(tmp_path / str(seed))["loss"] == records[-1]["loss"]
    assert len(fingerprints) == 1


# ---------------------------------------------------------------- tensors that move

RING = {"exchange": {"reduction": "reproducible"}, "rounds": 3}


def trained(out, model, **other):
    """SHA-256 of the parameters, records, and the run; its checkpoint evaluates to the figures of training."""
    records, done = run(drift(out, model, **{**RING, **other}))
    again = results.evaluate(out)
    assert again["loss"] == records[-1]["loss"] and again["mae"] == records[-1]["mae"]
    return sha256(done.parameters), [figures(record) for record in records], done


@pytest.mark.parametrize("how", ["assigned", "data"])
def test_a_buffer_that_is_assigned_anew_counts_like_one_that_is_written_in_place(how, tmp_path):
    plain = trained(tmp_path / "plain", {"name": "support.modules:Statistic", "how": "in place"})
    other = trained(tmp_path / "other", {"name": "support.modules:Statistic", "how": how})
    assert other[:2] == plain[:2]
    kept = [{n: t.tolist() for n, t in silo.kept.items()} for silo in other[2].federation.silos.values()]
    assert kept == [{"fedmpi/integers_int16": [6]}] * 4, "an integer buffer too"
    saved = load_file(tmp_path / "other" / "model.safetensors")
    assert saved["mean"].min() > 0.5 and saved["calls"].tolist() == [0]


@pytest.mark.parametrize(("how", "plain"), [("always in place", "always"), ("always", "always in place")])
def test_what_an_evaluation_writes_goes_to_no_other_silo(how, plain, tmp_path):
    """A silo alone on its rank would not find it, so figures would depend on the number of ranks."""
    first, second = (
        trained(tmp_path / name, {"name": "support.modules:Statistic", "how": name}) for name in (how, plain)
    )
    assert first[:2] == second[:2]
    record, done = first[1][-1], first[2]
    fed = done.federation
    for name in ("s3", "s1"):  # in another order, one by one
        fresh = FlatModel(make(done.config.model, None))
        fresh.load(done.parameters)
        fresh.load_personal(fed.silos[name].kept)
        x, y = fed.silos[name].data.x_test, fed.silos[name].data.y_test
        with torch.no_grad():
            loss = float((fresh.module.eval()(x) - y).square().mean())
        assert record["silos"][name]["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("how", ["data", "flatten"])
def test_weights_whose_memory_is_exchanged_in_forward_train_as_those_that_stay(how, tmp_path):
    plain = trained(tmp_path / "plain", {"name": "support.modules:Weights", "how": ""})
    assert trained(tmp_path / "other", {"name": "support.modules:Weights", "how": how})[:2] == plain[:2]
    model = FlatModel(Weights(how))
    params_P = model.params()
    model.module(torch.ones(2, 3))
    model.load(params_P + 1)  # after a forward pass that moved the weights
    assert torch.equal(model.params(), params_P + 1)
    torch.testing.assert_close(model.take_delta(params_P), torch.ones_like(params_P))


REFUSED = {
    ("Statistic", "shape"): "model: 'mean' was float32 [3] and becomes float32 [1, 3] in a forward pass",
    ("Statistic", "dtype"): "model: 'mean' was float32 [3] and becomes float64 [3] in a forward pass",
    ("Statistic", "gone"): "model: 'mean' is gone after a forward pass",
    ("Weights", "replaced"): "model: the parameter 'one.weight' is replaced by another in a forward pass",
    ("Weights", "late"): "model: 'three.bias' (and 1 more) is made in a forward pass",
    ("Weights", "late in training"): "model: 'two.scale' is made in a forward pass",
    ("Weights", "made anew"): "model: 'two.weight' is made anew in a forward pass",
    ("Tied", "transposed"): "model: 'dec.weight' is a view of 'enc.weight', and it is trained",
    ("Tied", "partly"): "model: 'enc.weight' and 'dec.weight' share some of their memory",
    ("Tied", "expanded"): "model: 'dec.weight' repeats its memory (expand) and is trained",
    ("Starts", "meta"): "model: 'linear.weight' is on the meta device",
    ("Starts", "nan"): "model: 'linear.weight' starts with values that are not finite",
    ("Starts", "mask"): "model: 'mask' starts with values that are not finite; a buffer that is not to be sent",
    ("Starts", "frozen"): "model: no parameter of it requires a gradient",
    ("Starts", "unused"): "model: 'never.weight' is lazy, and forward passes no sample to it",
}


@pytest.mark.parametrize(("name", "how"), REFUSED)
def test_what_cannot_be_mended_is_refused_by_name_before_the_first_round(name, how, tmp_path):
    said = refused(drift(tmp_path, {"name": f"support.modules:{name}", "how": how}))
    assert said.startswith(REFUSED[name, how])


def test_what_only_training_shows_ends_the_round_by_name(tmp_path):
    model = FlatModel(Weights("late in training"))
    params_P = model.params()
    model.module.train()(torch.ones(2, 3))
    with pytest.raises(ConfigError, match=r"'two.scale' is made in a forward pass"):
        model.take_delta(params_P)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", [{}, {"name": "apfl"}, {"name": "per_fedavg", "inner_lr": 0.001}, {"name": "scaffold", "option": "I"}]
)
def test_weights_tied_by_memory_train_as_those_tied_by_object(rule, tmp_path):
    local = {"name": "sgd", "lr": 0.001, "steps": 2, "batch_size": 8, "optimizer": "Adam" if not rule else "SGD"} | rule
    found = []
    for how in ("object", "data", "parameter", "numpy"):
        how_ = drift(tmp_path / how, {"name": "support.modules:Tied", "how": how}, rounds=3)
        how_ = build(Config, {**to_dict(how_), "local": local})
        records, done = run(how_)
        assert results.evaluate(tmp_path / how)["loss"] == records[-1]["loss"]
        saved = load_file(tmp_path / how / "model.safetensors")
        assert torch.equal(saved["enc.weight"], saved["dec.weight"]) and len(done.parameters) == 9
        assert done.model.enc.weight.data_ptr() == done.model.dec.weight.data_ptr(), "after the run too"
        found.append([figures(record) for record in records])
    assert found[0] == found[1] == found[2] == found[3]


def test_memory_side_by_side_is_not_shared(tmp_path):
    model = FlatModel(Tied("side by side"))
    assert model.num_shared == 18 and len(model.entries) == 2


def test_views_stay_views_of_what_they_are_views_of(tmp_path):
    alone = Views()
    model = FlatModel(alone)
    assert [e.name for e in model.entries] == ["table", "linear.weight", "linear.bias"]
    model.load(torch.arange(24.0))
    module = model.module
    assert torch.equal(module.last, module.table[3]) and torch.equal(module.column, module.table[:, 1])
    assert torch.equal(module.weight_t, module.linear.weight.t()) and torch.equal(module.row, module.linear.weight[0])
    model.leave()
    module.table.fill_(7.0)
    assert (module.last == 7).all() and (module.column == 7).all()
    params_P = model.params()
    model.load(params_P + 1)  # after the run it is a normal model
    assert torch.equal(model.params(), params_P + 1) and torch.equal(module.last, module.table[3])
    assert torch.equal(model.take_delta(params_P), torch.ones_like(params_P))
    twin = FlatModel(Views()).twin()
    assert len(twin.entries) == 3 and twin.module.last.data_ptr() == twin.module.table[3].data_ptr()
    records, done = run(drift(tmp_path, "support.modules:Views"))
    assert results.evaluate(tmp_path)["loss"] == records[-1]["loss"]
    assert done.model.last.abs().min() > 0.5


@pytest.mark.parametrize("how", ["buffer", "attribute"])
def test_what_is_not_saved_goes_from_no_silo_to_another_and_is_said(how, tmp_path, caplog):
    first = trained(tmp_path / "all", {"name": "support.modules:Unsaved", "how": how}, rounds=1)
    assert "model: 'mean' changes in training and is not saved" in caplog.text
    fed = first[2].federation
    for name in ("s3", "s0"):  # as if it were alone on its rank
        fresh = FlatModel(Unsaved(how))
        start_P = torch.zeros(4)
        deltas = [
            fed.rule.train(
                replace(fed.silos[name], cursor=0, kept={}), model, start_P, Round(1, 1, 0, fed.objective.loss, int)
            ).vector_Q.clone()
            for model in (fed.model, fresh)
        ]
        assert torch.equal(*deltas)


@pytest.mark.parametrize(
    "how",
    [
        *("number", "none", "late", "list", "dict", "array", "generator", "torch generator"),
        *("empty buffer", "late buffer"),
    ],
)
def test_what_a_module_remembers_in_plain_attributes_goes_from_no_silo_to_another(how, tmp_path, caplog):
    first = trained(tmp_path / "all", {"name": "support.modules:Remembers", "how": how}, rounds=1)
    known = how in ("list", "dict", "number", "array", "generator", "torch generator")
    assert ("model: 'mean' changes in training and is not saved" in caplog.text) == known
    fed = first[2].federation
    for name in ("s3", "s0"):  # as if it were alone on its rank
        fresh = FlatModel(Remembers(how))
        deltas = [
            fed.rule.train(
                replace(fed.silos[name], cursor=0, kept={}),
                model,
                torch.zeros(4),
                Round(1, 1, 0, fed.objective.loss, int),
            ).vector_Q.clone()
            for model in (fed.model, fresh)
        ]
        assert torch.equal(*deltas)


@pytest.mark.parametrize("how", ["in place", "data"])
def test_a_frozen_parameter_that_training_writes_is_shared_or_refused_by_name(how, tmp_path):
    model = {"name": "support.modules:Follower", "how": how}
    said = refused(drift(tmp_path / "a", model, exchange={"parameters": "trainable"}))
    assert said.startswith("model: the frozen parameter 'slow.weight' is written in a forward pass and is not shared")
    trained(tmp_path / "b", model)
    alone = FlatModel(Follower(how), "trainable")  # only a later forward pass writes it
    alone.load(params_P := alone.params())
    alone.module.train()(torch.ones(2, 3))
    with pytest.raises(ConfigError, match=r"'slow.weight' is written"):
        alone.take_delta(params_P)
    records, _ = run(drift(tmp_path / "c", {**model, "how": "moved"}, exchange={"parameters": "trainable"}))
    assert len(records) == 4


def test_a_table_that_is_made_when_it_is_needed_is_nobodys_business(tmp_path, caplog):
    trained(tmp_path, "support.modules:Cache")
    assert "changes in training" not in caplog.text


def test_lazy_layers_are_made_before_the_vector(tmp_path):
    _, records, done = trained(tmp_path, "support.modules:Lazy")
    assert len(done.parameters) == 4 * 3 + 4 + 4 * 4 + 4 + 1
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert plan(done.config, {}, 2)["shared_parameters"] == len(done.parameters)


def test_an_extra_state_is_left_alone_and_one_that_changes_is_refused(tmp_path):
    trained(tmp_path / "a", {"name": "support.modules:Extra", "inputs": 3, "outputs": 1})
    assert sorted(load_file(tmp_path / "a" / "model.safetensors")) == ["bias", "weight"]
    results.export(tmp_path / "a", tmp_path / "m.pt")
    assert torch.load(tmp_path / "m.pt", weights_only=False)["_extra_state"]["version"] == 3
    said = refused(drift(tmp_path / "b", {"name": "support.modules:Extra", "inputs": 3, "outputs": 1, "counts": True}))
    assert said.startswith("model: the extra state of 'Extra' changes")


def test_looking_whether_all_is_in_place_costs_microseconds():
    model = FlatModel(torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(50))))
    best = min(timeit.repeat(model.settle, timer=time.process_time, number=20, repeat=10)) / 20
    assert best < 100 * 5e-6  # for a hundred tensors; one takes about 0.3 us


# ---------------------------------------------------------------- a last batch of one sample


def blobs(out, model="support.modules:Normed", sizes=(17, 16), **local):
    other = {key: local.pop(key) for key in ("evaluate", "rounds") if key in local}
    return config(out, data={"sizes": list(sizes)}, model=model, local=local, **{"rounds": 2, **other})


@pytest.mark.parametrize(
    ("local", "says"),
    [
        (
            {},
            "silo 's0': 17 samples in batches of 8 leave one of a single sample, .* local.last_batch to drop or merge",
        ),
        ({"batch_size": 1}, r"silo 's0' \(and 1 more\): local.batch_size is 1, .* take 2 or more"),
        ({"sizes": (16, 1)}, "silo 's1' has one training sample, .*leave it out"),
        ({"sizes": (16, 1), "last_batch": "drop", "batch_size": None}, "silo 's1' has one training sample"),
        ({"epochs": None, "steps": 2, "rounds": 2}, "17 samples in batches of 8"),
        ({"name": "scaffold", "epochs": None, "steps": 1, "option": "I"}, "17 samples in batches of 8"),
        ({"name": "per_fedavg", "inner_lr": 0.1}, "17 samples in batches of 8"),
        ({"model": {"name": "support.modules:Normed", "own": True}}, "the result is not a number"),
        (
            {"last_batch": "merge", "evaluate": {"finetune": {"name": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 8}}},
            "evaluate.finetune.last_batch",
        ),
    ],
)
def test_a_batch_of_one_sample_is_refused_where_the_model_cannot_have_one(local, says, tmp_path):
    assert re.search(says, refused(blobs(tmp_path, **local)))


@pytest.mark.parametrize(
    "local",
    [
        {"last_batch": "drop"},
        {"last_batch": "merge"},
        {"batch_size": None},
        {"epochs": None, "steps": 1},  # two rounds that never reach the end of the epoch
        {"model": "logistic"},
        {"model": "support.modules:PlainNorm"},
        {"name": "scaffold", "option": "I", "last_batch": "drop"},
        {"name": "mime_lite", "last_batch": "merge"},
        {"name": "per_fedavg", "inner_lr": 0.1, "last_batch": "merge"},
        {"name": "ditto", "personal_steps": 5, "last_batch": "drop"},
    ],
)
def test_what_the_model_can_have_trains(local, tmp_path):
    records, _ = run(blobs(tmp_path, **local))
    assert len(records) == 2 and not any(record["rejected"] for record in records)


def test_fedsgd_merges_a_lone_sample(tmp_path):
    local = {"name": "fedsgd", "lr": 0.1, "batch_size": 8}
    values = to_dict(blobs(tmp_path))
    said = refused(build(Config, {**values, "local": local}))
    assert said.endswith("set local.last_batch to merge, or another local.batch_size")
    records, _ = run(build(Config, {**values, "local": local | {"last_batch": "merge"}}))
    assert records[-1]["silos"]["s0"]["num_samples"] == 17


@pytest.mark.parametrize(("last", "sizes"), [("keep", [3, 3, 2]), ("drop", [3, 3]), ("merge", [3, 5])])
@pytest.mark.parametrize("amount", [{"epochs": 2}, {"steps": 5}])
def test_what_becomes_of_a_short_last_batch(last, sizes, amount):
    work = Sgd(lr=0.1, batch_size=3, last_batch=last, sampler=InOrder(), **amount)
    x = torch.arange(8.0)
    silo = LocalSilo("a", SiloData(x, x, x, x), 8.0)
    rows, rounds = [], []
    for _ in range(2):
        found = [batch.tolist() for batch, _ in work.batches(silo, 0)]
        rounds.append(len(found))
        rows += found
    assert rounds == ([2 * len(sizes)] * 2 if "epochs" in amount else [5, 5])
    assert [len(batch) for batch in rows] == (sizes * 9)[: len(rows)]
    of_an_epoch = list(range(sum(sizes)))
    flat = [int(v) for batch in rows for v in batch]
    assert flat == (of_an_epoch * 9)[: len(flat)]
    assert work.smallest_batch("a", 8, 100) == min(sizes) and work.smallest_batch("a", 2, 100) == 2


def test_a_whole_gradient_is_the_same_however_its_samples_are_cut():
    module = torch.nn.Linear(4, 2)
    model = FlatModel(module)
    x, y = torch.randn(9, 4), torch.arange(9) % 2
    silo = LocalSilo("a", SiloData(x, y, x, y), 9.0)
    round = Round(1, 1, 0, torch.nn.functional.cross_entropy, lambda: None)
    found = []
    for size, merge in ((None, False), (4, False), (4, True), (20, True)):
        whole_gradient(silo, model, model.params(), round, size, merge=merge)
        found.append(module.weight.grad.clone())
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0])


def test_a_layer_that_a_forward_pass_freezes_is_trained_by_the_next_silo_too(tmp_path):
    done = trained(tmp_path / "all", {"name": "support.modules:Freezes"}, rounds=1)[2]
    fed, deltas = done.federation, []
    for silo in fed.silos.values():  # as if each were alone on its rank
        fresh = FlatModel(Freezes())
        start_P = fresh.params()
        alone, round = replace(silo, cursor=0, kept={}), Round(1, 1, 0, fed.objective.loss, int)
        deltas.append(fed.rule.train(alone, fresh, start_P, round).vector_Q.double() * silo.weight)
        assert deltas[-1][:9].any()
    mean_P = sum(deltas) / sum(silo.weight for silo in fed.silos.values())
    torch.testing.assert_close(done.parameters.double(), start_P.double() + mean_P, rtol=0, atol=1e-6)
