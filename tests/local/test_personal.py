"""The silos' own models: what is scored, what is kept, what never leaves."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from support.equations import BATCH, IDS, samples
from support.mpi import launch
from support.personal import TUNE, Normed, config, done
from torch import nn

import fedmpi
from fedmpi import results
from fedmpi.assembly import build_module
from fedmpi.errors import ConfigError
from fedmpi.flat import FlatModel, entries, sha256
from fedmpi.local import RULES, LocalSilo, Round
from fedmpi.plan import plan
from fedmpi.records import read_metrics
from fedmpi.types import SiloData

RULES_WITH_MODELS = {
    "ditto": {"name": "ditto", "lam": 0.5, "steps": 4},
    "apfl": {"name": "apfl", "epochs": 1},
}


def mae(w_P, silo):
    data = samples(silo)
    error = data.x_test.numpy() @ w_P[:-1] + w_P[-1] - data.y_test.numpy()
    return float(np.abs(error).mean()), float((error**2).mean()), len(error)


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("name", RULES_WITH_MODELS)
def test_figures_of_own_models_stand_beside_the_global_ones(tmp_path, name):
    select = {"name": "uniform", "fraction": 0.4}
    chosen = config(tmp_path / "a", RULES_WITH_MODELS[name], rounds=2, select=select, checkpoint={"every": 1})
    records, run = done(chosen)
    rule, last = chosen.local, records[-1]
    met = {silo for record in records for silo in record["cohort"]}
    assert 0 < len(met) < len(IDS)
    scores, weights = [], []
    for silo, row in last["silos"].items():
        assert row["mae"] == pytest.approx(mae(run.final_P.numpy(), silo)[0])
        own_P = rule.personal(run.silos[silo], run.final_P)
        assert (own_P is None) == (silo not in met) == ("personal_mae" not in row) == ("personal_loss" not in row)
        if own_P is not None:
            found = mae(own_P.numpy(), silo)
            assert (row["personal_mae"], row["personal_loss"]) == pytest.approx(found[:2])
            scores.append(found[:2])
            weights.append(found[2])
    assert (last["personal_mae"], last["personal_loss"]) == pytest.approx(
        tuple(np.average(scores, axis=0, weights=weights))
    )
    silo, value = last["personal_worst"]["silo"], last["personal_worst"]["personal_mae"]
    assert value == last["silos"][silo]["personal_mae"] == max(r.get("personal_mae", 0) for r in last["silos"].values())
    again = results.evaluate(tmp_path / "a")
    for key in ("mae", "loss", "worst", "personal_mae", "personal_loss", "personal_worst"):
        assert again[key] == last[key]
    assert read_metrics(tmp_path / "a")[-1].items() > last.items()


def test_rows_have_personal_figures_only_where_there_is_a_model_of_ones_own(tmp_path):
    records, _ = done(config(tmp_path, rounds=1))
    assert "personal" not in json.dumps(records)


def test_the_plan_counts_what_silos_keep(tmp_path):
    plain, own = (plan(config(tmp_path, local), {}, 2) for local in (None, RULES_WITH_MODELS["ditto"]))
    assert own["checkpoint_bytes"] - plain["checkpoint_bytes"] == 5 * 4 * 8  # silos, parameters, float64
    figures = 2 * 2 * 5 * 6 * 8  # there and back, of 2 ranks: 6 personal figures of 5 silos
    assert own["bytes_control"] - plain["bytes_control"] == figures


@pytest.mark.parametrize("name", RULES_WITH_MODELS)
def test_a_resumed_run_is_an_undisturbed_one(tmp_path, name):
    local = RULES_WITH_MODELS[name] | {"optimizer": {"name": "SGD", "momentum": 0.5}}
    whole, _ = done(config(tmp_path / "whole", local, rounds=4))
    done(config(tmp_path / "parts", local, rounds=2))
    rest, run = done(config(tmp_path / "parts", local, rounds=4))
    assert run.resumed == 2 and [r["round"] for r in rest] == [3, 4]
    for a, b in zip(whole[2:], rest, strict=True):
        assert (a["silos"], a["personal_worst"]) == (b["silos"], b["personal_worst"])


# ---------------------------------------------------------------- fine-tuning


def test_fine_tuning_scores_what_a_silo_makes_of_the_last_model_and_changes_nothing(tmp_path):
    plain, before = done(config(tmp_path / "plain"))
    tuned, after = done(config(tmp_path / "tuned", evaluate={"finetune": TUNE}))
    assert sha256(before.final_P) == sha256(after.final_P)
    assert all(before.silos[k].cursor == after.silos[k].cursor for k in IDS)
    assert all(not silo.kept for silo in after.silos.values())
    assert "personal" not in json.dumps(tuned[:-1])
    for silo, row in tuned[-1]["silos"].items():
        w, data = after.final_P.numpy().copy(), samples(silo)
        x, y = data.x_train.numpy(), data.y_train.numpy()
        for start in [*range(0, len(x), BATCH)] * 2:
            part = slice(start, start + BATCH)
            error = x[part] @ w[:-1] + w[-1] - y[part]
            w = w - 0.02 * 2 * np.append(x[part].T @ error, error.sum()) / len(error)
        assert (row["personal_mae"], row["personal_loss"]) == pytest.approx(mae(w, silo)[:2])
        assert {k: v for k, v in row.items() if "personal" not in k} == plain[-1]["silos"][silo]


def test_fine_tuning_is_keyed(tmp_path):
    tune = {"name": "sgd", "lr": 0.05, "steps": 1, "batch_size": 3}
    one, again = (done(config(tmp_path / name, evaluate={"finetune": tune}))[0][-1] for name in "ab")
    other = done(config(tmp_path / "c", evaluate={"finetune": tune}, local={"name": "sgd", "steps": 5}))[0][-1]
    assert one["silos"] == again["silos"] and other["personal_mae"] != one["personal_mae"]
    stored = fedmpi.config.load(tmp_path / "a" / "config.yaml")[0].evaluate.finetune
    assert stored == config(tmp_path, evaluate={"finetune": tune}).evaluate.finetune


def test_fine_tuning_takes_a_rule_that_trains_alone(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluate.finetune: scaffold trains with what other silos send"):
        config(tmp_path, evaluate={"finetune": {"name": "scaffold", "lr": 0.1, "steps": 1}})
    with pytest.raises(ConfigError, match=r"evaluate.finetune: no local rule 'sgdd'; did you mean 'sgd'"):
        config(tmp_path, evaluate={"finetune": {"name": "sgdd", "lr": 0.1, "steps": 1}})
    assert config(tmp_path, evaluate={"finetune": None}).evaluate.finetune is None


# ---------------------------------------------------------------- personal layers


def test_all_but_batch_norm_finds_it_by_its_type():
    found = {e.name: e.kind for e in entries(Normed(), "all_but_batch_norm")}
    assert {n for n, kind in found.items() if kind == "shared"} == {
        "body.weight",
        "body.bias",
        "head.weight",
        "head.bias",
    }
    assert {n for n, kind in found.items() if kind == "personal"} == {
        *("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    }
    assert found["norm.num_batches_tracked"] == "integers"
    nested = nn.Sequential(nn.Sequential(nn.Conv1d(2, 3, 1), nn.SyncBatchNorm(3)), nn.GroupNorm(1, 3))
    kinds = [e.kind for e in entries(nested, "all_but_batch_norm")]
    assert kinds == ["shared"] * 2 + ["personal"] * 4 + ["integers"] + ["shared"] * 2
    with pytest.raises(ConfigError, match=r"all_but_batch_norm, but the model has no batch normalization"):
        entries(nn.Linear(2, 2), "all_but_batch_norm")


def test_fedbn_leaves_every_silo_its_own_normalization(tmp_path):
    """Li et al. 2021, Algorithm 1: FedAvg over the rest; so one silo's round is SGD on its whole model."""
    chosen = config(
        tmp_path,
        {"name": "sgd", "epochs": 1, "sampler": "in_order"},
        model="support.personal:Normed",
        exchange={"parameters": "all_but_batch_norm"},
        rounds=2,
    )
    records, run = done(chosen)
    fed = run.federation
    own, ends = {}, None
    for _ in range(2):
        trained = {}
        for silo in IDS:
            torch.manual_seed(0)
            module = Normed()
            with torch.no_grad():
                for name, tensor in module.state_dict().items():
                    tensor.copy_(build_module(chosen, None).state_dict()[name])
                    tensor.copy_((own.get(silo, {}) | (ends or {})).get(name, tensor))
            data, optimizer = samples(silo), torch.optim.SGD(module.parameters(), lr=0.05)
            for start in range(0, len(data.x_train), BATCH):
                optimizer.zero_grad()
                x, y = data.x_train[start : start + BATCH], data.y_train[start : start + BATCH]
                nn.functional.mse_loss(module(x), y).backward()
                optimizer.step()
            trained[silo] = module.state_dict()
            own[silo] = {n: t for n, t in trained[silo].items() if n.startswith("norm.")}
        n = {silo: len(samples(silo).x_train) for silo in IDS}
        shared = [e.name for e in fed.model.entries if e.kind == "shared"]
        ends = {name: sum(n[s] * trained[s][name] for s in IDS) / sum(n.values()) for name in shared}
    found = fed.model.named(run.final_P, fed.model.first_personal)
    assert all(torch.allclose(found[name], ends[name], atol=1e-12) for name in ends)
    for silo in IDS:
        kept = fed.model.named(run.final_P, run.silos[silo].kept)
        assert all(torch.allclose(kept[name].double(), t.double(), atol=1e-12) for name, t in own[silo].items())
    assert records[-1]["silos"]["a"]["loss"] > 0


def test_variances_stay_positive_under_a_server_with_momentum(tmp_path):
    chosen = config(
        tmp_path,
        {"name": "sgd", "epochs": 2, "lr": 0.005},
        model="support.personal:Normed",
        rounds=12,
        server={"optimizer": {"name": "fedavgm", "beta": 0.9}},
    )
    records, run = done(chosen)
    model = run.federation.model
    assert model.shared(run.parameters)["norm.running_var"].min() > 0
    assert all(np.isfinite(record["loss"]) for record in records if "loss" in record)


def test_fedrep_needs_a_head_that_stays_and_a_body_that_does_not(tmp_path):
    local = {"name": "fedrep", "steps": 1, "head_steps": 1}
    with pytest.raises(ConfigError, match=r"local: fedrep trains a head that stays with its silo, but all"):
        done(config(tmp_path / "a", local))
    with pytest.raises(ConfigError, match=r"local: fedrep trains a head"):
        plan(config(tmp_path / "a", local), {}, 2)
    with pytest.raises(ConfigError, match=r"local: give either 'head_epochs' or 'head_steps'"):
        config(tmp_path / "a", {"name": "fedrep", "steps": 1})


# ---------------------------------------------------------------- contract of rules


class Everything(nn.Module):
    """Statistics, an integer, dropout, a head."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.body(x))).relu())


RULES_AND_SHARED = [
    (values, parameters)
    for values in (
        {"name": "ditto", "epochs": 1, "personal_steps": 2},
        {"name": "apfl", "epochs": 1, "clip": 1.0},
        {"name": "fedrep", "epochs": 1, "head_steps": 2},
        {"name": "per_fedavg", "inner_lr": 0.1, "epochs": 1},
        {"name": "adagrad_norm", "epochs": 1},
        {"name": "sgd", "steps": 9, "amount": {"name": "by_loss", "target": 0.2}},
        {"name": "ditto", "epochs": 3, "amount": "drawn"},
    )
    for parameters in ("all", "trainable", "all_but_batch_norm", ["*", "!head.*"])
    if values["name"] != "fedrep" or parameters not in ("all", "trainable")  # it needs something personal
]


@pytest.mark.parametrize(("values", "parameters"), RULES_AND_SHARED, ids=str)
def test_a_rule_writes_nothing_that_is_not_its_own(values, parameters):
    torch.manual_seed(3)
    model = FlatModel(Everything(), parameters)
    rule = RULES.build({"lr": 0.1, "batch_size": 5, **values}, "local")
    x, params_P = torch.randn(23, 4), model.params()
    data = SiloData(x, torch.arange(23) % 2, x, torch.arange(23) % 2)
    requires = [p.requires_grad for p in model.module.parameters()]

    def rounds():
        kept, cursor, found = {}, 0, []
        for number in (1, 2, 3):
            calls = []
            silo = LocalSilo("a", data, 23.0, cursor, dict(kept))
            before = {name: (tensor, tensor.clone()) for name, tensor in kept.items()}
            about = Round(number, 3, 7, nn.functional.cross_entropy, partial(calls.append, 1))
            done = rule.train(silo, model, params_P, about)
            assert torch.equal(params_P, start_P) and len(calls) >= done.num_steps
            assert silo.cursor - cursor == done.num_samples > 0
            assert all(torch.equal(now, then) for now, then in before.values())
            assert not any(t.requires_grad for t in silo.kept.values())
            assert [p.requires_grad for p in model.module.parameters()] == requires
            found += [done["delta"].clone(), torch.tensor(done.loss)]
            kept, cursor = silo.kept, silo.cursor
        assert all(torch.isfinite(t).all() for t in found)
        return [*found, *(kept[name] for name in sorted(kept))]

    start_P = params_P.clone()
    assert all(torch.equal(a, b) for a, b in zip(rounds(), rounds(), strict=True))


def test_broken_off_in_the_head_everything_is_trained_again():
    model = FlatModel(Everything(), ["*", "!head.*"])
    rule = RULES.build({"name": "fedrep", "lr": 0.1, "steps": 1, "head_steps": 1}, "local")
    x = torch.randn(8, 4)
    silo = LocalSilo("a", SiloData(x, torch.arange(8) % 2, x, torch.arange(8) % 2), 8.0)

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        rule.train(silo, model, model.params(), Round(1, 1, 0, nn.functional.cross_entropy, stop))
    assert all(p.requires_grad for p in model.module.parameters()) and silo.cursor == 0 and not silo.kept


def trained_once(values):
    """A round of a rule on a model with its own head: the contribution, and how many batches were begun."""
    rule = RULES.build({"lr": 0.1, "batch_size": 4, **values}, "local")
    model, x, begun = FlatModel(Everything(), ["*", "!head.*"]), torch.randn(8, 4), []
    silo = LocalSilo("a", SiloData(x, torch.arange(8) % 2, x, torch.arange(8) % 2), 8.0)
    about = Round(1, 1, 0, nn.functional.cross_entropy, lambda: begun.append(1))
    return rule.train(silo, model, model.params(), about), len(begun)


def test_what_fednova_divides_by_is_the_bodys_gradients_with_their_momentum():
    momentum = {"name": "SGD", "momentum": 0.9}
    found, _ = trained_once({"name": "fedrep", "head_steps": 2, "steps": 3, "optimizer": momentum})
    assert found.normalizer == pytest.approx(1 + 1.9 + 2.71)


@pytest.mark.parametrize(
    "values", [{"name": "ditto", "steps": 3, "personal_steps": 7}, {"name": "fedrep", "steps": 3, "head_steps": 7}]
)
def test_an_amount_is_of_the_shared_model_where_the_own_one_has_a_number(values):
    _, begun = trained_once({**values, "amount": {"name": "by_silo", "silos": {"a": 2}}})
    assert begun == 7 + 2


# ---------------------------------------------------------------- nothing leaves


@pytest.mark.parametrize("case", ["ditto", "apfl", "fedrep"])
@pytest.mark.parametrize("n", (2, 3))
@pytest.mark.mpi
def test_what_is_personal_is_never_handed_to_mpi(case, n, tmp_path_factory):
    """And each rank evaluates the checkpoint where its silos' data are, see programs/personal.py."""
    folder = tmp_path_factory.getbasetemp() / "secrets"
    told = launch("personal", n, str(folder)).check(case)
    assert told["buffers"] > 20 and told["shared"] > 0 and told["secret"] == 0
