"""Attacks: each against its equation in plain numpy; which silos are hostile; attacks need a second consent."""

import math

import numpy as np
import pytest
import torch
from support import reference, runs
from support.runs import put_back  # noqa: F401

import fedmpi
from fedmpi import rng
from fedmpi.attacks import ATTACKS, Alie, Ipm, LabelFlip, Mimic, Noise, SignFlip, edit_of
from fedmpi.comm import SoloComm
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.types import SiloData

IDS = [f"s{k}" for k in range(7)]
NEEDS = {"noise": {"sigma": 0.5}}
OMNISCIENT = ["alie", "ipm", "mimic"]


def made(name, **fields):
    return ATTACKS.build({"name": name, **NEEDS.get(name, {}), **fields}, "attack")


def rows(num=7, size=11, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(num, size)).astype(np.float32))


def z_max(n, m):
    """Baruch et al. 2019, Algorithm 3: the largest z with Phi(z) < (n - m - s) / (n - m), by bisection."""
    s = math.floor(n / 2 + 1) - m
    low, high = -9.0, 9.0
    for _ in range(60):
        z = (low + high) / 2
        low, high = (z, high) if (1 + math.erf(z / math.sqrt(2))) / 2 < (n - m - s) / (n - m) else (low, z)
    return low


# What hostile silos send, given the honest silos' deltas, by the papers' equations.
EQUATIONS = {
    "alie": lambda honest_HS, n, m: honest_HS.mean(0) - z_max(n, m) * honest_HS.std(0, ddof=1),
    "ipm": lambda honest_HS, n, m: -0.1 * honest_HS.sum(0) / (n - m),
    "mimic": lambda honest_HS, n, m: honest_HS[0],
}


# --- the equations ---


@pytest.mark.parametrize("name", OMNISCIENT)
def test_hostile_rows_are_those_of_the_paper_and_honest_ones_stay(name):
    before = rows().numpy().astype(np.float64)
    after = rows()
    edit_of(made(name, silos=["s1", "s4"]), IDS)(after, IDS)
    honest = [0, 2, 3, 5, 6]
    assert np.array_equal(after[honest].numpy(), rows()[honest].numpy())
    wanted = EQUATIONS[name](before[honest], 7, 2)
    for k in (1, 4):
        np.testing.assert_allclose(after[k].numpy(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OMNISCIENT)
def test_a_slice_of_the_rows_gives_that_slice_of_the_attack(name):
    """Owners of pieces see slices: together they must do what one owner of the whole vector does."""
    edit, whole, parts = edit_of(made(name, count=3), IDS), rows(), rows()
    edit(whole, IDS)
    for part in (slice(0, 4), slice(4, 11)):
        piece = parts[:, part].contiguous()
        edit(piece, IDS)
        parts[:, part] = piece
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("name", OMNISCIENT)
def test_a_round_without_hostile_or_without_honest_silos_stays_as_it_came(name):
    edit = edit_of(made(name, silos=["s1", "s4"]), IDS)
    for heard in (["s0", "s2", "s3"], ["s1", "s4"]):
        after = rows(len(heard))
        edit(after, heard)
        assert torch.equal(after, rows(len(heard)))
    one_honest = rows(3)
    edit(one_honest, ["s1", "s3", "s4"])
    assert torch.isfinite(one_honest).all() and torch.equal(one_honest[1], rows(3)[1])


def test_z_max_is_the_papers_and_finite_where_no_quantile_is():
    for n, m in ((25, 5), (50, 12), (10, 2), (11, 5)):
        assert abs(Alie.z_max(n, m) - z_max(n, m)) < 1e-9
    assert all(math.isfinite(Alie.z_max(n, m)) for n in range(2, 12) for m in range(1, n))
    edit, after = edit_of(Alie(count=2, z=1.5), IDS), rows()
    edit(after, IDS)
    honest = rows()[:5].numpy()
    np.testing.assert_allclose(after[6], honest.mean(0) - 1.5 * honest.std(0, ddof=1), rtol=1e-5, atol=1e-6)


def test_attacks_are_byzfls(byzfl):
    byzfl = byzfl("attacks")
    honest = rows(5)
    pairs = [
        (Alie(count=1, z=1.5), byzfl.ALittleIsEnough(-1.5)),
        (Ipm(count=1, epsilon=0.5), byzfl.InnerProductManipulation(0.5)),
        (Mimic(count=1, target="s3"), byzfl.Mimic(3)),
    ]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours.on_honest(honest, IDS[:5], 2), theirs(honest), rtol=1e-5, atol=1e-5)
    flipped = honest[0].clone()
    SignFlip(count=1).on_delta(flipped, 0)
    np.testing.assert_allclose(flipped, byzfl.SignFlipping()(honest[:1]), rtol=1e-5)


def test_mimic_copies_its_target_and_another_where_it_is_not_heard():
    edit, after = edit_of(Mimic(count=2, target="s3"), IDS), rows()
    edit(after, IDS)
    assert torch.equal(after[5], rows()[3]) and torch.equal(after[6], rows()[3])
    after = rows(4)
    edit(after, ["s1", "s2", "s5", "s6"])
    assert torch.equal(after[3], rows(4)[0])


def test_a_delta_is_flipped_or_drowned_in_keyed_noise():
    delta = rows()[0].clone()
    SignFlip(count=1, scale=4).on_delta(delta, 5)
    assert torch.equal(delta, -4 * rows()[0])
    first, again, other = (torch.ones(10_000) for _ in range(3))
    for noise, key in ((first, 6), (again, 6), (other, 1 << 63)):
        Noise(count=1, sigma=0.5).on_delta(noise, key)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert abs(first.std().item() - 0.5) < 0.02 and abs(first.mean().item()) < 0.02


def test_labels_are_flipped_in_training_alone():
    y = torch.tensor([0, 1, 9, -100, 4])
    data = SiloData(torch.zeros(5, 1), y, torch.zeros(5, 1), y)
    flipped = LabelFlip(count=1).on_data(data, 10)
    assert flipped.y_train.tolist() == [9, 8, 0, -100, 5] and flipped.y_test.tolist() == y.tolist()
    assert y.tolist() == [0, 1, 9, -100, 4]
    binary = data._replace(y_train=torch.tensor([0.0, 1.0]))
    assert LabelFlip(count=1).on_data(binary, 1).y_train.tolist() == [1.0, 0.0]


# --- which silos are hostile ---


@pytest.mark.parametrize("name", ATTACKS.members)
def test_every_attack_says_who_is_hostile(name):
    assert made(name, count=2).hostile(IDS) == {"s5", "s6"}
    assert made(name, silos=["s3"]).hostile(IDS) == {"s3"}
    for fields, says in (
        ({}, "either 'silos' or 'count'"),
        ({"silos": ["s1"], "count": 1}, "either 'silos' or 'count'"),
        ({"silos": ["t1"]}, "no silo 't1'; available: s0, s1"),
        ({"silos": []}, "0 of 7 silos are hostile"),
        ({"count": 7}, "7 of 7 silos are hostile"),
        ({"count": 9}, "7 of 7 silos are hostile"),
    ):
        with pytest.raises(ConfigError, match=says):
            made(name, **fields).hostile(IDS)
    cls = ATTACKS.members[name]
    writes = [method for method in ("on_data", "on_delta", "on_honest") if method in vars(cls)]
    assert len(writes) == 1 and made(name, count=2).omniscient == (writes == ["on_honest"]) == (name in OMNISCIENT)
    assert "20" in (cls.__doc__ or "")  # the paper's year


def test_a_target_is_an_honest_silo():
    for target, says in (("s6", "'s6' is hostile itself"), ("x", "no silo 'x'")):
        with pytest.raises(ConfigError, match=says):
            Mimic(count=1, target=target).hostile(IDS)


def test_no_attack_without_experimental():
    with pytest.raises(ConfigError, match=r"attack: ipm .* for experiments only; set experimental: true"):
        build(Config, {"attack": {"name": "ipm", "count": 1}})
    assert build(Config, {}).attack is None and not build(Config, {}).experimental


# --- in a run ---

HOSTILE = ["s1", "s4"]


def one_round(out, **other):
    """One full-batch step of six silos with one vote each: start, each silo's delta by the reference, end."""
    local = {"lr": 0.5, "epochs": None, "steps": 1, "batch_size": None}
    fields = {"data": {"sizes": [12] * 6}, "local": local, "aggregate": {"name": "mean", "weights": "uniform"}} | other
    how = runs.config(out, 1, **fields)
    with fedmpi.Run(how, comm=SoloComm()) as run:
        w_P = run.parameters.double().numpy().copy()
        (record,) = list(run)
        end_P = run.parameters.numpy().copy()
    plain = how.data.source(how.seed)
    deltas = {}
    for silo in plain.silos:
        x, y, *_ = plain.open(silo.id)
        if isinstance(how.attack, LabelFlip) and silo.id in HOSTILE:
            y = 1 - y
        deltas[silo.id] = -0.5 * reference.softmax_gradient(w_P, x.double().numpy(), y.numpy())
    return w_P, deltas, end_P, record


def sent(name, deltas):
    """What arrives from every silo [K, P], by the papers' equations, given what each would send by the reference."""
    honest_HP = np.array([delta for silo, delta in deltas.items() if silo not in HOSTILE])

    def by(silo, delta_P):
        if silo not in HOSTILE or name == "label_flip":
            return delta_P
        if name == "sign_flip":
            return -delta_P
        if name == "noise":
            key = rng.key(0, purpose="attack", round=1, silo=silo) >> 1
            return 0.5 * torch.randn(len(delta_P), generator=torch.Generator().manual_seed(key)).numpy()
        return EQUATIONS[name](honest_HP, len(deltas), len(HOSTILE))

    return np.array([by(silo, delta_P) for silo, delta_P in deltas.items()])


@pytest.mark.parametrize("name", ["sign_flip", "label_flip", "noise"])
@pytest.mark.parametrize("plan", ["replicated", "sharded"])
def test_a_round_under_attack_is_the_mean_of_what_the_paper_has_hostile_silos_send(tmp_path, caplog, name, plan):
    attack = {"name": name, "silos": HOSTILE, **NEEDS.get(name, {})}
    w_P, deltas, end_P, record = one_round(tmp_path, attack=attack, experimental=True, exchange={"plan": plan})
    np.testing.assert_allclose(end_P, w_P + sent(name, deltas).mean(0), atol=2e-6)
    assert np.abs(end_P - w_P - np.mean(list(deltas.values()), 0)).max() > 1e-3 or name == "label_flip"
    assert record["experiment"] == f"attack {name} by s1, s4"
    assert f"an experiment, not for use: attack {name} by s1, s4" in caplog.text


def test_hostile_silos_may_train_by_a_rule_of_their_own(tmp_path):
    """As in Karimireddy et al.'s benchmark: honest silos send momentum, hostile ones the flipped gradient itself."""
    kept = {"steps": 1, "epochs": None, "batch_size": None, "keep_optimizer": True}
    honest = {"name": "sgd", "lr": 0.5, **kept, "optimizer": {"name": "SGD", "momentum": 0.9}}
    attack = {
        "name": "sign_flip",
        "silos": ["s1", "s4"],
        "local": {"name": "sgd", "lr": 0.25, "steps": 1, "batch_size": None},
    }
    uniform = {"name": "mean", "weights": "uniform"}
    how = runs.config(
        tmp_path, 2, {"sizes": [12] * 6}, local=honest, aggregate=uniform, attack=attack, experimental=True
    )
    with fedmpi.Run(how, comm=SoloComm()) as run:
        w_P = run.parameters.double().numpy().copy()
        list(run)
        end_P = run.parameters.numpy()
    source, momentum_KP = runs.Blobs(sizes=(12,) * 6).source(0), np.zeros((6, len(w_P)))
    for _ in range(2):
        data = [source.open(silo.id) for silo in source.silos]
        gradients = [reference.softmax_gradient(w_P, d.x_train.double().numpy(), d.y_train.numpy()) for d in data]
        momentum_KP = 0.9 * momentum_KP + np.array(gradients)
        w_P = w_P + np.mean(
            [
                0.25 * g if k in (1, 4) else -0.5 * m
                for k, (g, m) in enumerate(zip(gradients, momentum_KP, strict=True))
            ],
            0,
        )
    np.testing.assert_allclose(end_P, w_P, atol=2e-6)


@pytest.mark.parametrize("name", OMNISCIENT)
@pytest.mark.parametrize("plan", ["sharded", "auto"])
@pytest.mark.parametrize("aggregate", [{"name": "mean", "weights": "uniform"}, "median"], ids=["mean", "median"])
def test_aggregators_get_what_an_omniscient_attacker_sends(tmp_path, name, aggregate, plan):
    attack = {"name": name, "silos": HOSTILE}
    exchange = {"plan": plan, "scope": "silo"}
    how = {"attack": attack, "experimental": True, "exchange": exchange, "records": {"gram": "matrix"}}
    w_P, deltas, end_P, record = one_round(tmp_path, aggregate=aggregate, **how)
    arrived_KP = sent(name, deltas)
    wanted_P = np.median(arrived_KP, 0) if aggregate == "median" else arrived_KP.mean(0)
    np.testing.assert_allclose(end_P, w_P + wanted_P, atol=2e-6)
    norms_K = np.linalg.norm(arrived_KP, axis=1)
    np.testing.assert_allclose(
        record["cosines"]["rows"], arrived_KP @ arrived_KP.T / np.outer(norms_K, norms_K), atol=1e-4
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "it needs exchange: {plan: sharded, scope: silo}"),
        ({"exchange": {"plan": "auto", "scope": "rank"}}, "it needs exchange: {plan: sharded, scope: silo}"),
        ({"exchange": {"plan": "sharded", "scope": "silo", "up": {"codec": "bf16"}}}, "remove exchange.up.codec"),
        ({"exchange": {"plan": "sharded", "scope": "silo"}, "local": {"name": "scaffold"}}, "take a rule that sends"),
    ],
)
def test_an_omniscient_attack_is_refused_where_it_would_not_take_place(tmp_path, fields, says):
    with pytest.raises(ConfigError, match=f"^attack: ipm reads what honest silos send.*{says}"):
        runs.config(tmp_path, attack={"name": "ipm", "count": 1}, experimental=True, **fields)


def test_a_rule_of_hostile_silos_must_send_what_the_others_send_and_be_of_use(tmp_path):
    own = {"name": "scaffold", "lr": 0.1, "steps": 1}
    with pytest.raises(ConfigError, match="attack: label_flip has a local rule that sends other vectors"):
        runs.config(tmp_path, attack={"name": "label_flip", "count": 1, "local": own}, experimental=True)
    attack = {"name": "ipm", "count": 1, "local": own | {"name": "sgd"}}
    with pytest.raises(ConfigError, match=r"attack: ipm sends nothing of what .*; remove attack\.local"):
        runs.config(tmp_path, attack=attack, experimental=True, exchange={"plan": "sharded", "scope": "silo"})


def test_without_an_attack_no_record_speaks_of_one_and_experimental_alone_changes_nothing(tmp_path):
    w_P, deltas, end_P, record = one_round(tmp_path / "a")
    np.testing.assert_allclose(end_P, w_P + np.mean(list(deltas.values()), 0), atol=2e-6)
    assert "experiment" not in record
    assert np.array_equal(one_round(tmp_path / "b", experimental=True)[2], end_P)


def test_a_run_under_attack_is_resumed_as_one_and_not_without(tmp_path):
    how = {"attack": {"name": "noise", "sigma": 0.1, "count": 1}, "experimental": True}
    whole, _ = runs.run(runs.config(tmp_path / "whole", 4, **how))
    runs.run(runs.config(tmp_path / "part", 4, **how), 2)
    rest, _ = runs.run(runs.config(tmp_path / "part", 4, **how))
    assert list(map(runs.figures, rest)) == list(map(runs.figures, whole[2:]))
    assert "attack" in runs.refused(runs.config(tmp_path / "part", 4))


def test_labels_of_a_regression_cannot_be_flipped(tmp_path):
    attack = {"name": "label_flip", "count": 1}
    data = {"task": "regression"}
    text = runs.refused(runs.config(tmp_path, data=data, attack=attack, experimental=True))
    assert text == "attack: label_flip is for classification and binary, not regression"
