"""Noise under masks: the sampler against its formula, runs against plain numpy, how much noise a sum has at least."""

import json
import math
from itertools import accumulate

import numpy as np
import pytest
import torch
from exchange.test_secure import PLANS, drawn, masked
from privacy.test_silo import everyone, plain, private, run_first
from support.runs import OWN, put_back, refused, run  # noqa: F401

from fedmpi import plan
from fedmpi.components import build, to_dict
from fedmpi.config import Config
from fedmpi.errors import ConfigError, FedmpiError
from fedmpi.kernels.discrete import TURNS, discrete_gaussian
from fedmpi.layout import Layout, Segment
from fedmpi.membership import Membership
from fedmpi.privacy import Spending, Use, account, epsilon
from fedmpi.privacy.masked import shares
from fedmpi.secure.noise import BLOCK, NoiseShares, NoiseStream
from fedmpi.secure.ring import LEAST, Ring, Spread

SECURE = {"name": "secagg", "threshold": 4}
KEY = bytes(range(16))


def under_masks(out, rounds=5, **other):
    return private(out, rounds, secure=other.pop("secure", SECURE), **other)


# ------------------------------------------------------------ the sampler


def words(num, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 64, size=num, dtype=np.uint64)


def by_canonne(scale, stream):
    """One value, as the paper's Algorithms 1 to 3 have it, in Python's integers."""

    def below(n):
        while True:
            word = int(next(stream))
            if word >= (1 << 64) % n:
                return word % n

    def exp_minus(p, q):
        k = 1
        while (k == 1 or below(k) == 0) and below(q) < p:
            k += 1
        return k % 2 == 1

    while True:
        low = below(scale)
        if not exp_minus(low, scale):
            continue
        turns = 0
        while turns < TURNS and exp_minus(1, 1):
            turns += 1
        size = low + scale * turns
        if turns >= TURNS or ((negative := below(2) == 1) and size == 0):
            continue
        gamma, rest = divmod((size - scale) ** 2, 2 * scale**2)
        kept = exp_minus(rest, 2 * scale**2)
        if kept and all(exp_minus(1, 1) for _ in range(gamma)):
            return -size if negative else size


@pytest.mark.parametrize("scale", [1, 7, 1 << 25])
def test_the_sampler_gives_the_values_of_the_paper_s_algorithm(scale):
    stream, found = words(20_000), np.zeros(500, np.int64)
    assert discrete_gaussian(scale, stream, found)
    rest = iter(stream)
    assert found.tolist() == [by_canonne(scale, rest) for _ in range(500)]
    assert not discrete_gaussian(scale, stream[:3000], found)  # too few words


@pytest.mark.parametrize("scale", [1, 3, 16])
def test_values_have_the_probabilities_of_a_discrete_gaussian(scale):
    from scipy.stats import chisquare

    found = np.zeros(200_000, np.int64)
    assert discrete_gaussian(scale, words(30 * len(found), 1), found)
    k = np.arange(-4 * scale, 4 * scale + 1)
    p = np.exp(-(k**2) / (2 * scale**2))
    p /= np.exp(-(np.arange(-40 * scale, 40 * scale + 1) ** 2) / (2 * scale**2)).sum()
    seen = np.array([(found == value).sum() for value in k])
    seen, p = np.append(seen, len(found) - seen.sum()), np.append(p, 1 - p.sum())
    assert chisquare(seen, p * len(found)).pvalue > 1e-4


def test_a_large_scale_has_its_moments():
    found = np.zeros(200_000, np.int64)
    assert discrete_gaussian(1 << 20, words(30 * len(found), 2), found)
    x = found / (1 << 20)
    assert (
        abs(x.mean()) < 0.01 and x.var() == pytest.approx(1, abs=0.02) and (x**4).mean() == pytest.approx(3, abs=0.15)
    )


# ------------------------------------------------------------ a silo's share


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_a_share_has_the_same_numbers_in_any_pieces_and_leaves_frozen_elements(dtype):
    num, still = 2 * BLOCK + 77, (slice(40, 90), slice(BLOCK - 3, BLOCK + 5))
    whole = np.zeros(num + 3, dtype)
    NoiseStream(KEY, 1000, still).add(whole, 0, num)
    signed = whole.view(np.int32 if dtype == np.uint32 else np.int64)
    assert not signed[40:90].any() and not signed[BLOCK - 3 : BLOCK + 5].any() and not signed[num:].any()
    assert signed.std() == pytest.approx(1000, rel=0.03) and abs(signed).max() < 6000
    for cut in (1, 60, BLOCK, BLOCK + 1):
        parts, stream = np.zeros_like(whole), NoiseStream(KEY, 1000, still)
        stream.add(parts[cut:], cut, num)  # backwards, too
        stream.add(parts[:cut], 0, num)
        assert np.array_equal(parts, whole)
    other = np.zeros_like(whole)
    NoiseStream(KEY[::-1], 1000, still).add(other, 0, num)
    assert not np.array_equal(other, whole)


def noise(multiplier=1.5, colluding=1, size=777, keys=None):
    layout = Layout((Segment("delta", 0, size, "delta"),))
    number = iter(range(10**6))
    fresh = keys or (lambda silo, round: next(number).to_bytes(16, "big"))
    return NoiseShares(multiplier, 1.0, colluding, fresh, layout)


@pytest.mark.parametrize("there", [3, 5, 8])
@pytest.mark.parametrize("colluding", [0, 1, 2])
def test_what_is_left_without_the_colluding_silos_is_no_less_than_what_is_accounted_for(there, colluding):
    """With rounding in the norm, whichever silos are missing from the sum."""
    shared, factor = noise(colluding=colluding), 2.0**12
    scale = shared.scale(there, factor)
    moved = factor + math.sqrt(777) / 2  # by one silo: its norm, and half a unit in every coordinate
    assert scale * math.sqrt(there - colluding) >= 1.5 * moved > (scale - 1) * math.sqrt(there - colluding)
    silos = [f"s{i}" for i in range(8)]
    streams = shared.streams(silos[:there], silos, 1, factor)
    assert len(streams) == there
    totals = []
    for stream in streams[colluding:]:
        drawn_N = np.zeros(777, np.uint64)
        stream.add(drawn_N, 0, 777)
        totals.append(drawn_N.view(np.int64))
    left = np.sum(totals, axis=0)
    assert left.std() == pytest.approx(scale * math.sqrt(there - colluding), rel=0.12)
    if colluding:
        with pytest.raises(ConfigError, match="only"):
            shared.scale(colluding, factor)


def test_a_rounded_update_moves_the_words_by_no_more_than_is_accounted_for():
    factor, size = 50.0, 40_000  # rounding is most of the norm
    for seed in range(5):
        update = np.random.default_rng(seed).standard_normal(size)
        update *= factor / np.linalg.norm(update)
        assert np.linalg.norm(np.rint(update)) <= factor + math.sqrt(size) / 2
    worst = np.full(size, 0.5 + 1e-9) * factor / (math.sqrt(size) * (0.5 + 1e-9))
    assert np.linalg.norm(np.rint(worst)) <= factor + math.sqrt(size) / 2
    assert noise(size=size).scale(4, factor) * math.sqrt(3) >= 1.5 * (factor + math.sqrt(size) / 2)


# ------------------------------------------------------------ in the sum


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("plan_name", PLANS)
def test_every_plan_sums_the_shares_of_all_silos(plan_name, bits):
    deltas_KP, owners = drawn(5) * 0.9, [0, 0, 1, 2, 2]
    keys = lambda silo, number: bytes([int(silo[1:]), number]) * 8  # noqa: E731
    shared = noise(keys=keys)
    cohorts, bound = (None, [0, 1, 3, 4]), 2.0 ** {32: 6, 64: 38}[bits]  # room for noise

    def with_noise(on_mean):
        def spy(comm, secure):
            secure.noise = shared if on_mean else None

        made = masked(plan_name, deltas_KP, [1.0] * 5, owners, 3, bits=bits, rounds=cohorts, spy=spy, bound=bound)
        return made[0]

    noised, _, ring = with_noise(True)
    clean, _, _ = with_noise(False)
    ids = [f"s{i}" for i in range(5)]
    for number, cohort in enumerate(cohorts, start=1):
        there = ids if cohort is None else [ids[i] for i in cohort]
        total = np.zeros(777, np.uint64)
        for stream in shared.streams(there, ids, number, ring.unit / 5):
            stream.add(total, 0, 777)
        expected = total.view(np.int64) / ring.unit * 5 / len(there)
        found = (noised[number - 1] - clean[number - 1]).double().numpy()
        np.testing.assert_allclose(found, expected, atol=2e-6)
        assert found.std() == pytest.approx(1.5 / len(there) * math.sqrt(len(there) / (len(there) - 1)), rel=0.1)


def test_a_run_is_plain_averaging_with_the_silos_noise_and_figures_of_training_are_not_told(tmp_path):
    how = under_masks(tmp_path / "a")
    records, done = run(how)
    fed = done.federation
    shared, unit = fed.secure.noise, fed.secure.ring.unit

    def noise_of(t):
        total = np.zeros(10, np.uint64)
        for stream in shared.streams(fed.ids, fed.ids, t, unit / 6):
            stream.add(total, 0, 10)
        return total.view(np.int64) * 6 / unit / (0.7 * 0.05)

    expected = plain(run_first(tmp_path), 5, everyone, lambda n: 1.0, 1.0, noise_of=noise_of)
    np.testing.assert_allclose(done.parameters.double().numpy(), expected, rtol=0, atol=2e-6)
    for record in records:
        assert record["train_loss"] is None and record["delta_norm"] is None
    assert records[-1]["epsilon"] == pytest.approx(epsilon({Use(0.7, discrete=True): 5}, 1e-3))
    told = plan.plan(how, {}, 6)
    assert told["budget"]["epsilon"] == pytest.approx(records[-1]["epsilon"])
    assert told["secure"]["noise"] == pytest.approx(shared.scale(6, unit / 6), rel=1e-3)
    again, _ = run(under_masks(tmp_path / "b"))
    assert [r["loss"] for r in again] == [r["loss"] for r in records]  # `reproducible`


def test_a_silo_whose_update_is_rejected_takes_its_share_of_the_noise_with_it(tmp_path, monkeypatch):
    """The others' shares grow, so that the sum has what is accounted for."""
    seen = []
    scale = NoiseShares.scale

    def spied(self, num, factor):
        seen.append((num, scale(self, num, factor)))
        return seen[-1][1]

    monkeypatch.setattr(NoiseShares, "scale", spied)
    data = {"name": OWN + "Blobs", "sizes": [20, 30, 50, 12, 25, 16], "infinite": "s5"}
    values = to_dict(under_masks(tmp_path, 2)) | {"data": data}
    records, _ = run(build(Config, values))
    assert [record["num_rejected"] for record in records] == [1, 1]
    (five,) = {size for num, size in seen if num == 5}
    (six,) = {size for num, size in seen if num == 6}
    assert five * math.sqrt(4) == pytest.approx(six * math.sqrt(5), rel=1e-4)


def test_round_robin_sizes_noise_for_its_cohorts(tmp_path):
    how = under_masks(tmp_path, 4, select={"name": "round_robin", "count": 3}, secure={"name": "secagg"})
    records, done = run(how)
    assert records[-1]["epsilon"] == pytest.approx(epsilon({Use(0.7, 1.0, 2, "x", discrete=True): 4}, 1e-3))
    exchange = done.federation.exchange.masked
    factor = done.federation.secure.ring.unit * 2 / 6  # near, for half of the weight
    assert done.federation.secure.noise.scale(3, factor) == exchange._noise[0]._scale
    assert exchange._noise[0]._scale * math.sqrt(2) == pytest.approx(0.7 * 0.05 * factor, rel=1e-4)


# ------------------------------------------------------------ the ring


def test_the_ring_has_room_for_noise_or_says_no():
    quiet = Ring.of(32, 1.0, 8)
    wide = Ring.of(32, 1.0, 8, noise=Spread(50.0, 20.0, 18.0))
    assert quiet.largest == wide.largest and wide.unit < quiet.unit
    assert wide.unit * (wide.largest + 12 * 50.0) < 2**31
    assert Ring.of(64, 1.0, 8, noise=Spread(50.0, 20.0, 18.0)).unit * 20.0 <= 1 << 24
    with pytest.raises(ConfigError, match="a silo's noise would be"):
        Ring.of(32, 1.0, 8, noise=Spread(1.0, 1e-8, 1e-9))
    with pytest.raises(ConfigError, match="a silo's noise would be"):
        Ring.of(32, 1.0, 8, noise=Spread(1e9, 1.0, 1.0))


def test_sums_that_could_leave_the_ring_are_refused_at_the_start():
    with pytest.raises(ConfigError, match="no room for the noise of 64 silos"):
        noise(multiplier=12.0).fits(Ring(32, 2.0**24, 1.0, 4.0), 64, 64, 2.0**24)
    with pytest.raises(ConfigError, match="has no exact sampler"):
        noise(multiplier=3.0).fits(Ring.of(32, 1.0, 4), 4, 4, 2.0**29)
    shared = noise(multiplier=3.0)
    roomy = Ring.of(32, 1.0, 4, noise=Spread(4.0, 2.2, 1.7))
    shared.fits(roomy, 3, 4, roomy.unit)


@pytest.mark.parametrize(("sigma", "bits"), [(0.7, 32), (300.0, 32), (300.0, 64), (0.05, 64)])
def test_no_noise_of_a_run_leaves_its_ring(tmp_path, sigma, bits):
    """The largest of 10^5 elements, six silos, stays below half of what there is room for."""
    how = under_masks(tmp_path, privacy={"sigma": sigma}, secure=SECURE | {"bits": bits})
    ring = how.secure.ring(how, 6)
    spending = Spending(tmp_path / "p", 1e-3, seed=0)
    spending.sigmas = {"": sigma}
    members = Membership(0, {f"s{i}": (i,) for i in range(6)})
    shared = shares(how.privacy, how, spending, members, ring, Layout((Segment("delta", 0, 10**5, "delta"),)))
    total = np.zeros(10**5, np.int64)
    for stream in shared.streams(members.ids, members.ids, 1, ring.unit / 6):
        assert stream._scale >= LEAST
        drawn_N = np.zeros(10**5, np.uint64)
        stream.add(drawn_N, 0, 10**5)
        total += drawn_N.view(np.int64)
    room = 2 ** (bits - 1) - ring.largest * ring.unit
    assert abs(total).max() < room / 2
    assert total.std() >= sigma * 0.05 * ring.unit / 6 * math.sqrt(6 / 5) * 0.99


# ------------------------------------------------------------ the account


def test_a_discrete_sum_spends_by_concentrated_privacy_and_a_little_more_than_a_gaussian():
    for sigma, count, delta in ((0.7, 5, 1e-3), (2.0, 30, 1e-5), (50.0, 10, 1e-6)):
        rho = count / (2 * sigma**2)
        orders = 1 + np.geomspace(1e-3, 1e4, 200_000)
        # Canonne, Kamath & Steinke 2020, Proposition 12
        bounds = rho * orders + np.log1p(-1 / orders) - (np.log(delta) + np.log(orders)) / (orders - 1)
        found = epsilon({Use(sigma, discrete=True): count}, delta)
        assert found == pytest.approx(bounds.min(), rel=2e-3)
        gaussian = epsilon({Use(sigma): count}, delta)
        assert gaussian <= found <= 1.25 * gaussian
        assert epsilon({Use(sigma, discrete=True): count, Use(sigma): count}, delta) > found


def test_a_target_is_met_and_lines_of_older_accounts_are_read(tmp_path):
    how = under_masks(tmp_path, 4, privacy={"sigma": None, "epsilon": 3.0})
    records, _ = run(how)
    assert len(records) == 4 and 2.9 < records[-1]["epsilon"] <= 3.0
    row = json.loads((tmp_path / "privacy.json").read_text())["uses"][0]
    assert Use.of(row).discrete and Use.of(row) != Use.of({k: v for k, v in row.items() if k != "discrete"})
    with pytest.raises(KeyError):
        Use.of({"sigma": 1.0})


def test_shares_of_real_runs_are_fresh_and_nowhere_on_disk(tmp_path):
    how = under_masks(tmp_path / "a", 2, privacy={"reproducible": False})
    _, done = run(how)
    shared, ids = done.federation.secure.noise, done.federation.ids
    keys = [shared._key_of(silo, number) for silo in ids for number in (1, 1, 2)]
    assert len({*keys}) == len(keys)
    _, other = run(under_masks(tmp_path / "b", 2, privacy={"reproducible": False}))
    assert not torch.equal(done.parameters, other.parameters)


@pytest.mark.parametrize("repeats", [True, False])
def test_a_run_that_repeats_its_noise_is_said_to_protect_nobody(tmp_path, caplog, repeats):
    how = under_masks(tmp_path, 1, privacy={"reproducible": repeats})
    records, _ = run(how)
    told = (plan.plan(how, {}, 6)["budget"]["sentence"], records[0].get("experiment", ""), caplog.text)
    assert ["who knows the seed can remove the noise" in text for text in told] == [repeats] * 3


def test_a_sampler_that_does_not_load_ends_the_run_before_its_first_round(tmp_path, monkeypatch):
    """Not between two collectives of a round, in which the other ranks would wait."""

    def broken(*given):
        raise ImportError("no numba")

    monkeypatch.setattr("fedmpi.kernels.discrete.ready", broken)
    with pytest.raises(FedmpiError, match="no numba"):
        run(under_masks(tmp_path, 1))
    assert not (tmp_path / "privacy.json").exists()


# ------------------------------------------------------------ who is trusted, what is refused


def shares_of(how, tmp_path, ranks):
    spending = Spending(tmp_path / "p", 1e-3)
    spending.sigmas = {"": 0.7}
    members = Membership(0, {f"s{i}": (rank,) for i, rank in enumerate(ranks)})
    return shares(how.privacy, how, spending, members, how.secure.ring(how, 6), Layout.whole(10))


def test_a_rank_may_host_no_more_silos_than_collude(tmp_path):
    how = under_masks(tmp_path)
    shares_of(how, tmp_path, [0, 1, 2, 3, 4, 5])
    with pytest.raises(ConfigError, match="a rank hosts 2 silos and knows the noise of all of them; give 2"):
        shares_of(how, tmp_path, [0, 0, 1, 2, 3, 4])
    two = under_masks(tmp_path, privacy={"colluding": 2})
    assert shares_of(two, tmp_path, [0, 0, 1, 1, 2, 2]).scale(4, 1e6) > shares_of(how, tmp_path, range(6)).scale(4, 1e6)
    shares_of(how, tmp_path, [0] * 6)  # one process sees every update anyway; the session warns
    said = how.privacy.sentence(how)
    assert (
        "counts as zero" in said and "adds its share of the noise before its masks" in said and "1 of the silos" in said
    )
    assert "checksum" not in said  # no rank gets it


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"select": {"name": "poisson", "rate": 0.3}}, "poisson amplifies nothing"),
        ({"aggregate": {"name": "mean", "max_samples": 10}}, "take aggregate.weights: uniform"),
        ({"privacy": {"bands": 2}, "select": {"name": "round_robin", "count": 3}}, "no silo tells; take 1"),
        ({"privacy": {"quantile": 0.5}}, "privacy.quantile reads the norm of each silo"),
        ({"on_failure": "adopt"}, "lets a rank know the noise"),
        ({"on_failure": "continue"}, "take adopt or stop"),
        ({"exchange": {"overlap": True}}, "without overlap"),
        ({"engine": {"name": "buffered", "size": 2}}, "engine: buffered brings updates"),
    ],
)
def test_what_noise_cannot_be_divided_for_is_refused_in_one_line(tmp_path, changes, says):
    with pytest.raises(ConfigError) as caught:
        under_masks(tmp_path, **changes)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_too_many_colluding_silos_are_refused(tmp_path):
    assert "no noise is left" in refused(under_masks(tmp_path, privacy={"colluding": 4}))


def test_a_stopped_run_goes_on_and_spends_no_less(tmp_path):
    run(under_masks(tmp_path, 6), rounds=3)
    records, _ = run(under_masks(tmp_path, 6))
    count = sum(row["count"] for row in json.loads((tmp_path / "privacy.json").read_text())["uses"])
    assert count >= 6 and records[-1]["epsilon"] >= epsilon({Use(0.7, discrete=True): 6}, 1e-3) * (1 - 1e-9)
    spent = [record["epsilon"] for record in records]
    assert spent == list(accumulate(spent, max))
    assert account.by_silo({Use(0.7, discrete=True): 6}) == {"": {Use(0.7, discrete=True): 6}}
