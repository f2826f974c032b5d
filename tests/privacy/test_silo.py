"""Silo-level differential privacy: whole runs against plain numpy given the same noise, and what is refused."""

import math

import numpy as np
import pytest
import torch
from support.runs import OWN, config, figures, put_back, refused, run  # noqa: F401
from torch import nn

import fedmpi
from fedmpi import rng
from fedmpi.comm import SoloComm
from fedmpi.components import build, to_dict
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.layout import Layout, Segment
from fedmpi.privacy import Bounded, Spending, account
from fedmpi.privacy.noise import BLOCK, add_noise, coefficients, inverse, secret_generator

SIZES = (20, 30, 50, 12, 25, 16)
SILO = {"name": "silo", "clip": 0.05, "sigma": 0.7, "delta": 1e-3, "reproducible": True}
LR = 0.5


def private(out, rounds=5, **other):
    """A run of one whole-gradient step per silo and round."""
    data = {"name": OWN + "Blobs", "sizes": list(SIZES)}
    local = {"name": "sgd", "lr": LR, "epochs": 1, "batch_size": None}
    section = SILO | other.pop("privacy", {})
    other = {"aggregate": {"name": "mean", "weights": "uniform"}} | other
    return config(out, rounds, data, local=local, privacy=section, **other)


# ------------------------------------------------------------ plain DP-FedAvg


def blobs(index):
    draw = torch.Generator().manual_seed(index)
    x, y = torch.randn(SIZES[index], 4, generator=draw), torch.arange(SIZES[index]) % 2
    return (x + y[:, None]).double().numpy(), y.numpy()


def step(params, x, y):
    """The delta of a step along the gradient of the mean cross-entropy; parameters are weights [2, 4], then bias."""
    weights, bias = params[:8].reshape(2, 4), params[8:]
    logits = x @ weights.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return -LR * np.concatenate([(p.T @ x).ravel() / len(y), p.mean(0)])


def secret_of(number, purpose="privacy"):
    return f"{rng.key(0, purpose=purpose, round=number):016x}"


def normals(secret, step=0):
    return secret_generator(secret, "noise", step, 0).standard_normal(10)


def plain(params, rounds, cohort_of, weight_of, part, clip=0.05, noise_of=lambda t: normals(secret_of(t))):
    """DP-FedAvg: clip, weighted sum, noise, a fixed divisor."""
    weights = np.array([weight_of(n) for n in SIZES])
    for t in range(1, rounds + 1):
        total = np.zeros(10)
        for k in cohort_of(t):
            delta = step(params, *blobs(k))
            total += weights[k] * delta * min(1.0, clip / np.linalg.norm(delta))
        total += 0.7 * clip * max(weight_of(10**9), weights.max()) * noise_of(t)
        params = params + total / (part * weights.sum())
    return params


def run_first(tmp_path):
    """The parameters before the first round."""
    with fedmpi.Run(private(tmp_path / "first", 1), comm=SoloComm()) as begun:
        return begun.parameters.double().numpy().copy()


def same(how, expected):
    records, done = run(how)
    np.testing.assert_allclose(done.parameters.double().numpy(), expected, rtol=0, atol=2e-6)
    return records


def everyone(t):
    return range(6)


def test_all_silos_with_equal_weights(tmp_path):
    expected = plain(run_first(tmp_path), 5, everyone, lambda n: 1.0, 1.0)
    records = same(private(tmp_path / "a"), expected)
    spent = [record["epsilon"] for record in records]
    dp = account.library()
    for done, epsilon in enumerate(spent, start=1):
        assert epsilon == pytest.approx(dp.gaussian_mechanism.get_epsilon_gaussian(0.7 / done**0.5, 1e-3), rel=1e-12)
    assert {record["delta"] for record in records} == {1e-3}


def drawn(t, rate=0.3):
    draw = secret_generator(secret_of(t), "select")
    return [int(k) for k in np.flatnonzero(draw.random(6) < rate)]


def test_a_poisson_sample_weighted_by_samples_up_to_a_bound(tmp_path):
    select, rounds = {"name": "poisson", "rate": 0.3}, 8
    assert [] in [drawn(t) for t in range(1, rounds + 1)]  # a round of nothing but noise
    expected = plain(run_first(tmp_path), rounds, drawn, lambda n: min(n, 25.0), 0.3)
    how = private(tmp_path / "a", rounds, select=select, aggregate={"name": "mean", "max_samples": 25})
    records = same(how, expected)
    dp = account.library()
    whole = dp.pld.PLDAccountant()
    whole.compose(dp.PoissonSampledDpEvent(0.3, dp.GaussianDpEvent(0.7)), rounds)
    assert records[-1]["epsilon"] == pytest.approx(whole.get_epsilon(1e-3), rel=1e-8)


def test_correlated_noise_is_the_matrix_mechanism(tmp_path):
    bands, rounds = 3, 7
    c = coefficients(bands)
    matrix = sum(np.diag(np.full(rounds - k, c[k]), -k) for k in range(bands))
    segment = secret_of(1, "privacy segment")
    z = np.stack([normals(segment, t) for t in range(rounds)])
    noise = np.linalg.norm(c) * np.linalg.solve(matrix, z)
    expected = plain(
        run_first(tmp_path),
        rounds,
        lambda t: [(2 * (t - 1) + i) % 6 for i in range(2)],
        lambda n: 1.0,
        2 / 6,
        noise_of=lambda t: noise[t - 1],
    )
    how = private(tmp_path / "a", rounds, privacy={"bands": bands}, select={"name": "round_robin", "count": 2})
    records = same(how, expected)
    # Whatever one silo sends in its turns, every third round, moves C x by at most |c| sqrt(turns).
    turns = np.zeros(rounds)
    turns[::bands] = 1
    sensitivity = np.linalg.norm(matrix @ turns)
    assert sensitivity <= np.linalg.norm(c) * math.sqrt(math.ceil(rounds / bands)) + 1e-12
    effective = 0.7 / math.sqrt(math.ceil(rounds / bands))
    dp = account.library()
    assert records[-1]["epsilon"] == pytest.approx(dp.gaussian_mechanism.get_epsilon_gaussian(effective, 1e-3))


def test_an_adaptive_clip_follows_the_noised_quantile(tmp_path):
    params, clip, gamma, rate = run_first(tmp_path), 0.05, 0.5, 0.2
    of_count = max(6 / 20, 2 * 0.7)
    sigma = (0.7**-2 - (2 * of_count) ** -2) ** -0.5
    for t in range(1, 5):
        deltas = [step(params, *blobs(k)) for k in range(6)]
        norms = np.array([np.linalg.norm(delta) for delta in deltas])
        total = sum(delta * min(1.0, clip / norm) for delta, norm in zip(deltas, norms, strict=True))
        params = params + (total + sigma * clip * normals(secret_of(t))) / 6
        noise = of_count * secret_generator(secret_of(t), "count").standard_normal()
        clip *= math.exp(-rate * (((norms <= clip) - 0.5).sum() / 6 + noise / 6 + 0.5 - gamma))
    records = same(private(tmp_path / "a", 4, privacy={"quantile": 0.5}), params)
    dp = account.library()  # both queries together are one Gaussian of the multiplier asked for
    assert records[-1]["epsilon"] == pytest.approx(dp.gaussian_mechanism.get_epsilon_gaussian(0.35, 1e-3), rel=1e-12)


def test_a_silo_left_out_moves_sum_and_count_by_what_the_account_says(tmp_path):
    # Andrew et al. 2021: the count changes by 1/2 if a silo is left out of it, whatever its norm.
    how = private(tmp_path, privacy={"quantile": 0.5})
    assert "left out of every sum and count" in how.privacy.sentence(how)
    sigma, of_count = how.privacy.split(0.7, 6.0)
    spending = Spending(tmp_path / "p", 1e-3)
    spending.sigmas, spending.expected, spending.secret = {"": 0.7}, 6.0, "s"
    transform = Bounded(how.privacy, spending)

    def count(*norms):
        after = transform.follow(np.array(norms), transform.init())["norm"][0]
        return -math.log(after / 0.05) / 0.2 * 6

    for norm in (0.01, 9.0, math.nan):
        moved = abs(count(0.02, 3.0, norm) - count(0.02, 3.0))
        assert moved == pytest.approx(0.5, abs=1e-9)
        assert math.hypot(1 / sigma, moved / of_count) == pytest.approx(1 / 0.7)


# ------------------------------------------------------------ frozen parameters


class Leaks(nn.Module):
    """Its frozen parameter takes on the mean of the samples, though no gradient moves it."""

    def __init__(self, inputs=4):
        super().__init__()
        self.last, self.seen = nn.Linear(inputs, 2), nn.Linear(inputs, 2).requires_grad_(False)
        nn.init.zeros_(self.seen.weight)

    def forward(self, x):
        if self.training:
            self.seen.weight.copy_(x.mean(0).expand(2, -1))
        return self.last(x)


@pytest.mark.parametrize("exact", [(), ("seen.weight",)])
def test_a_frozen_parameter_that_moves_in_training_is_not_told(tmp_path, exact):
    how = private(tmp_path, 2, model="privacy.test_silo:Leaks", exchange={"exact": list(exact)})
    _, done = run(how)
    model = done.federation.model
    model.load(done.parameters)
    assert not model.module.seen.weight.any() and model.module.last.weight.any()


# ------------------------------------------------------------ noise


LAYOUT = Layout((Segment("delta", 0, 3 * BLOCK, "delta"), Segment("frozen", 40, 90, "exact", True, still=True)))


@pytest.mark.parametrize(("bands", "step"), [(1, 0), (4, 0), (4, 6)])
def test_noise_has_its_variance_whatever_the_slices_and_leaves_frozen_elements(bands, step):
    whole_P = torch.zeros(2 * BLOCK + 77, dtype=torch.float64)
    add_noise(whole_P, 0, 3.0, "secret", LAYOUT, bands, step)
    for cut in (1, 50, BLOCK, BLOCK + 1):
        parts_P = torch.zeros_like(whole_P)
        add_noise(parts_P[:cut], 0, 3.0, "secret", LAYOUT, bands, step)
        add_noise(parts_P[cut:], cut, 3.0, "secret", LAYOUT, bands, step)
        assert torch.equal(parts_P, whole_P)
    assert not whole_P[40:90].any()
    expected = 9.0 * (coefficients(bands) ** 2).sum() * (inverse(bands, step + 1) ** 2).sum()
    assert float(whole_P.square().sum()) / (len(whole_P) - 50) == pytest.approx(expected, rel=0.02)


def test_noise_differs_between_rounds_secrets_and_starts(tmp_path):
    finals = []
    for name in ("a", "b"):
        _, done = run(private(tmp_path / name, 2, privacy={"reproducible": False}))
        finals.append(done.parameters.clone())
    assert not torch.equal(*finals)
    assert len({float(normals(secret_of(t), s)[0]) for t in (1, 2) for s in (0, 1)}) == 4


# ------------------------------------------------------------ what nothing sound can be said about


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"aggregate": "mean"}, "any influence; give aggregate.max_samples"),
        ({"aggregate": {"name": "mean", "weights": "steps"}}, "has no bound"),
        ({"aggregate": "median", "exchange": {"scope": "silo"}}, "needs aggregate: mean"),
        ({"aggregate": {"name": "fednova"}}, "needs aggregate: mean"),
        ({"updates": [{"name": "clip", "norm": 1.0}]}, "leave out updates"),
        ({"select": {"name": "uniform", "fraction": 0.5}}, "the account of uniform is not known"),
        ({"select": {"name": "available", "traces": {}, "inner": "all"}}, "the account of available is not known"),
        ({"engine": {"name": "buffered", "size": 2}}, "needs engine: synchronous"),
        ({"engine": {"name": "synchronous", "policy": {"name": "deadline", "deadline_s": 5.0}}}, "policy: all"),
        ({"server": {"optimizer": "fedexp"}}, "fedexp reads what carries no noise"),
        ({"local": {"name": "scaffold", "lr": 0.1, "epochs": 1}}, "scaffold sends more than the clipped delta"),
        ({"exchange": {"up": {"codec": "int8"}}}, "int8 changes updates after the clip"),
        ({"exchange": {"up": {"codec": "bf16"}}}, "bf16 changes updates after the clip"),
        ({"exchange": {"overlap": True}}, "without overlap"),
        ({"attack": {"name": "sign_flip", "silos": ["s0"]}, "experimental": True}, "with attack"),
        ({"privacy": {"bands": 2}}, "bands above 1 need select: round_robin"),
        ({"privacy": {"quantile": 0.5, "count_sigma": 0.3}}, "too small for sigma"),
        ({"privacy": {"quantile": 0.5}, "disclose": "pooled"}, "privacy reads the norm of each silo"),
        ({"privacy": {"sigma": None}}, "give 'sigma', 'epsilon' or both"),
    ],
)
def test_what_has_no_sound_account_is_refused_in_one_line(tmp_path, changes, says):
    local = changes.pop("local", None)
    with pytest.raises(ConfigError) as caught:
        how = private(tmp_path, **changes)
        if local is not None:
            build(Config, to_dict(how) | {"local": local})
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_batch_statistics_and_turns_that_come_too_soon_are_refused(tmp_path):
    assert "is a statistic" in refused(private(tmp_path, model=OWN + "Normed"))
    how = private(tmp_path, privacy={"bands": 4}, select={"name": "round_robin", "count": 2})
    assert "a silo takes part every 3 rounds" in refused(how)
