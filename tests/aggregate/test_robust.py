"""Robust aggregators: against their equations on whole vectors, against byzfl, and over ranks that are threads."""

import numpy as np
import pytest
import torch
from support.equations import robust
from support.exchanges import EXACT, LAYOUT
from support.exchanges import P as P_EXACT
from support.exchanges import there as chosen
from support.runs import config, put_back, refused, run  # noqa: F401
from support.sharded import P, drawn, section
from support.sharded import run as over_rounds

from fedmpi import rng
from fedmpi.aggregate import AGGREGATORS, Cohort
from fedmpi.aggregate.base import distances, products
from fedmpi.comm.threads import on_ranks
from fedmpi.components import to_dict
from fedmpi.errors import ConfigError
from fedmpi.exchange import chunks
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.choose import make
from fedmpi.exchange.chunks import Coder, Grid
from fedmpi.exchange.sharded import Sharded
from fedmpi.exchange.upload import AHEAD
from fedmpi.server import OPTIMIZERS, Server
from fedmpi.types import Contribution

SEED = 7


def order(num, round=1):
    return rng.generator(SEED, purpose="bucketing", round=round).permutation(num)


# Name: (configuration, the reference on whole vectors, given the round and the last result).
CASES = {
    "median": ({"name": "median"}, lambda x, t, v: robust.median(x)),
    "trimmed_mean": ({"name": "trimmed_mean", "fraction": 0.2}, lambda x, t, v: robust.trimmed_mean(x, 0.2)),
    "sign_vote": ({"name": "sign_vote", "hostile": 1}, lambda x, t, v: robust.sign_vote(x)),
    "krum": ({"name": "krum", "hostile": 1}, lambda x, t, v: robust.krum(x, 1)),
    "multi_krum": ({"name": "multi_krum", "hostile": 1, "m": 3}, lambda x, t, v: robust.multi_krum(x, 1, 3)),
    "bulyan": ({"name": "bulyan", "hostile": 1}, lambda x, t, v: robust.bulyan(x, 1)),
    "geometric_median": ({"name": "geometric_median", "hostile": 1}, lambda x, t, v: robust.geometric_median(x)),
    "centered_clipping": (
        {"name": "centered_clipping", "hostile": 1, "tau": 0.8, "iterations": 3},
        lambda x, t, v: robust.centered_clipping(x, tau=0.8, iterations=3, centre=v),
    ),
    "norm_bound": ({"name": "norm_bound", "norm": 0.9}, lambda x, t, v: robust.norm_bound(x, norm=0.9)),
    "bucketing": (
        {"name": "bucketing", "size": 2, "inner": {"name": "krum", "hostile": 0}},
        lambda x, t, v: robust.krum(robust.buckets(x, 2, order(len(x), t)), 0),
    ),
    "bucketing, median": (
        {"name": "bucketing", "size": 3, "inner": "median"},
        lambda x, t, v: robust.median(robust.buckets(x, 3, order(len(x), t))),
    ),
    "bucketing, centered_clipping": (
        {"name": "bucketing", "inner": {"name": "centered_clipping", "tau": 0.8}},
        lambda x, t, v: robust.centered_clipping(robust.buckets(x, 2, order(len(x), t)), tau=0.8, centre=v),
    ),
    "nearest_neighbour_mixing": (
        {"name": "nearest_neighbour_mixing", "hostile": 1, "inner": {"name": "geometric_median"}},
        lambda x, t, v: robust.geometric_median(robust.nearest_mixed(x, 1)),
    ),
    "nearest_neighbour_mixing, trimmed_mean": (
        {"name": "nearest_neighbour_mixing", "hostile": 1, "inner": {"name": "trimmed_mean", "fraction": 0.2}},
        lambda x, t, v: robust.trimmed_mean(robust.nearest_mixed(x, 1), 0.2),
    ),
    "bucketing, nearest_neighbour_mixing, bulyan": (
        {
            "name": "bucketing",
            "inner": {"name": "nearest_neighbour_mixing", "hostile": 1, "inner": {"name": "bulyan", "hostile": 0}},
        },
        lambda x, t, v: robust.bulyan(robust.nearest_mixed(robust.buckets(x, 2, order(len(x), t)), 1), 0),
    ),
}


def member(given):
    return AGGREGATORS.build(given, "aggregate")


def aggregated(aggregator, x, centre=None, round=1, state=None):
    """One round of the aggregator on whole vectors."""
    rows_KP = torch.from_numpy(np.asarray(x))
    if aggregator.centre:
        centre = np.zeros(rows_KP.shape[1]) if centre is None else centre
        rows_KP = torch.cat([rows_KP, torch.from_numpy(centre)[None].to(rows_KP)])
    gram_KK = products(rows_KP) if aggregator.needs == "gram" else None
    cohort = Cohort([str(k) for k in range(len(x))], round, SEED)
    weights, _ = aggregator.row_weights(gram_KK, cohort, aggregator.init() if state is None else state)
    return aggregator.combine(rows_KP, weights).numpy()


def rows(num=11, length=300, seed=0, apart=0.05):
    """Silos with something in common; norms around 1."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=length) / length**0.5 + apart * draw.normal(size=(num, length))


def test_every_member_that_reads_deltas_has_a_case():
    assert AGGREGATORS.members.keys() - {"mean", "fednova", "qffl"} == {name for name in CASES if "," not in name}


def test_distances_are_symmetric_though_products_are_rounded_in_two_ways():
    gram_KK = np.random.default_rng(0).normal(size=(20, 300))
    gram_KK = gram_KK @ gram_KK.T * (1 + 1e-15 * np.triu(np.ones((20, 20)), 1))
    assert (gram_KK != gram_KK.T).any()
    assert (distances(gram_KK) == distances(gram_KK).T).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_a_member_is_its_equation(name, seed):
    given, equation = CASES[name]
    aggregator, v = member(given), np.zeros(300)
    for t in (1, 2, 3):
        x = rows(seed=10 * seed + t)
        found, wanted = aggregated(aggregator, x, v, t), equation(x, t, v)
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
        v = wanted


@pytest.fixture(scope="module")
def byzfl(byzfl):
    """Only its aggregators."""
    return byzfl("aggregators")


# Krum sums over K - f - 2 nearest others in the paper and here, over K - f - 1 in byzfl: its f is one more.
ORACLES = {
    "median": ({"name": "median"}, lambda b: b.Median()),
    "trimmed_mean": ({"name": "trimmed_mean", "fraction": 0.2}, lambda b: b.TrMean(f=2)),
    "krum": ({"name": "krum", "hostile": 2}, lambda b: b.Krum(f=3)),
    "multi_krum": ({"name": "multi_krum", "hostile": 2, "m": 8}, lambda b: b.MultiKrum(f=3)),
    "geometric_median": (
        {"name": "geometric_median", "iterations": 5, "smoothing": 0.1},
        lambda b: b.GeometricMedian(nu=0.1, T=5),
    ),
    "centered_clipping": (
        {"name": "centered_clipping", "tau": 0.7, "iterations": 2},
        lambda b: b.CenteredClipping(L=2, tau=0.7),
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mixing", ["", "nearest_neighbour_mixing"])
@pytest.mark.parametrize("name", ORACLES)
def test_a_member_is_byzfls(byzfl, name, mixing, seed):
    given, oracle = ORACLES[name]
    x, theirs = rows(seed=seed), oracle(byzfl)
    if mixing:
        given = {"name": mixing, "hostile": 2, "inner": given}
    wanted = theirs(byzfl.NNM(f=2)(x) if mixing else x)
    np.testing.assert_allclose(aggregated(member(given), x), wanted, rtol=1e-5, atol=1e-5)


def test_bucketing_and_norm_bounding_are_byzfls(byzfl, monkeypatch):
    x = rows()
    monkeypatch.setattr(np.random, "permutation", lambda rows: rows[order(len(rows))])
    wanted = byzfl.Median()(byzfl.Bucketing(s=2)(x))
    given = {"name": "bucketing", "size": 2, "inner": "median"}
    np.testing.assert_allclose(aggregated(member(given), x), wanted, rtol=1e-5, atol=1e-5)
    clipped = byzfl.Average()(byzfl.Clipping(c=0.9)(x.copy()))
    np.testing.assert_allclose(aggregated(member({"name": "norm_bound", "norm": 0.9}), x), clipped, rtol=1e-5)


# ------------------------------------------------------------ contract of all

HOSTILE = 2
SCALED = ("centered_clipping", "norm_bound")  # their radius is in units of deltas
ROBUST = {
    "median": {},
    "trimmed_mean": {"fraction": 0.2},
    "krum": {"hostile": HOSTILE},
    "multi_krum": {"hostile": HOSTILE},
    "bulyan": {"hostile": HOSTILE},
    "geometric_median": {"hostile": HOSTILE},
    "centered_clipping": {"hostile": HOSTILE, "tau": 0.5, "iterations": 30},
    "nearest_neighbour_mixing": {"hostile": HOSTILE, "inner": {"name": "krum", "hostile": HOSTILE}},
}


@pytest.mark.parametrize("size", [1e5, 1e-3, -3.0, float(2**17)])
@pytest.mark.parametrize("name", ROBUST)
def test_hostile_rows_of_any_size_do_not_take_the_result_out_of_where_the_honest_are(name, size):
    x = rows()
    honest = x[HOSTILE:]
    x[:HOSTILE] = size * np.random.default_rng(1).normal(size=x[:HOSTILE].shape)
    spread = np.linalg.norm(honest - honest.mean(0), axis=1).max()
    found = aggregated(member({"name": name, **ROBUST[name]}), x)
    assert np.linalg.norm(found - honest.mean(0)) < 1.5 * spread


def test_votes_and_bounded_norms_are_moved_by_no_more_than_they_say():
    x = rows(apart=0.001)
    x[:2] = -1e5
    assert np.array_equal(aggregated(member("sign_vote"), x), np.sign(x[2:].mean(0)))
    bounded, honest = aggregated(member({"name": "norm_bound", "norm": 2.0}), x), x[2:].sum(0) / len(x)
    assert np.linalg.norm(bounded - honest) <= 2 * 2.0 / len(x) + 1e-12


# Bucketing draws. Of the two last candidates of Bulyan, each is the other's nearest, and the first is taken.
@pytest.mark.parametrize("name", [name for name in CASES if "bucketing" not in name and "bulyan" not in name])
def test_the_order_of_silos_does_not_matter(name):
    x, turned = rows(), np.random.default_rng(3).permutation(11)
    aggregator = member(CASES[name][0])
    np.testing.assert_allclose(aggregated(aggregator, x[turned]), aggregated(aggregator, x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith(SCALED)])
def test_deltas_ten_times_as_long_give_a_result_ten_times_as_long(name):
    x, aggregator = rows(), member(CASES[name][0])
    times = 1 if name == "sign_vote" else 10
    np.testing.assert_allclose(aggregated(aggregator, 10 * x), times * aggregated(aggregator, x), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if name != "sign_vote"])
def test_silos_that_agree_are_heard(name):
    one = rows(1)[0] / 3  # within every radius
    np.testing.assert_allclose(aggregated(member(CASES[name][0]), np.tile(one, (11, 1))), one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_member_reads_any_slice_of_the_coordinates(name):
    x, aggregator = torch.from_numpy(rows()).float(), member(CASES[name][0])
    if aggregator.centre:
        x = torch.cat([x, torch.zeros(1, x.shape[1])])
    weights, _ = aggregator.row_weights(products(x), Cohort([str(k) for k in range(11)], 1, SEED), aggregator.init())
    whole = aggregator.combine(x, weights)
    parts = [aggregator.combine(x[:, part].contiguous(), weights) for part in (slice(0, 7), slice(7, 300))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_a_member_is_its_configuration(name):
    aggregator = member(CASES[name][0])
    assert member({"name": name.partition(",")[0], **to_dict(aggregator)}) == aggregator


@pytest.mark.parametrize(
    ("given", "silos", "why"),
    [
        ({"name": "krum", "hostile": 5}, 12, "krum with hostile: 5 needs 13 silos or more, and has 12"),
        ({"name": "multi_krum", "hostile": 1, "m": 5}, 5, r"m: multi_krum would average 5 of 5 .* take 4 or less"),
        ({"name": "bulyan", "hostile": 2}, 10, "bulyan with hostile: 2 needs 11 silos or more, and has 10"),
        ({"name": "geometric_median", "hostile": 2}, 4, "geometric_median with hostile: 2 needs 5 silos"),
        ({"name": "centered_clipping", "hostile": 2}, 4, "centered_clipping with hostile: 2 needs 5 silos"),
        ({"name": "norm_bound", "hostile": 1}, 2, "norm_bound with hostile: 1 needs 3 silos"),
        ({"name": "sign_vote", "hostile": 1}, 2, "sign_vote with hostile: 1 needs 3 silos"),
        (
            {"name": "bucketing", "inner": {"name": "krum", "hostile": 5}},
            24,
            "krum with hostile: 5 needs 13 silos or more, and has 12, 24 mixed to 12",
        ),
        (
            {"name": "nearest_neighbour_mixing", "hostile": 3, "inner": "median"},
            6,
            "nearest_neighbour_mixing with hostile: 3 needs 7 silos",
        ),
    ],
)
def test_so_few_silos_are_refused_by_name(given, silos, why):
    with pytest.raises(ConfigError, match=f"^aggregate[.:] ?{why}"):
        member(given).suits(silos)
    member(given).suits(silos + 1)


@pytest.mark.parametrize("name", ["bucketing", "nearest_neighbour_mixing"])
@pytest.mark.parametrize("inner", ["mean", "fednova"])
def test_what_only_adds_up_is_no_inner_rule(name, inner):
    more = {"hostile": 1} if name == "nearest_neighbour_mixing" else {}
    with pytest.raises(ConfigError, match=f"^aggregate: {inner} only adds up"):
        member({"name": name, "inner": inner, **more})


def test_the_bound_follows_the_quantile_of_norms():
    """Andrew et al. 2021: C <- C exp(-eta (b - gamma))."""
    aggregator = member({"name": "norm_bound", "norm": 5.0, "quantile": 0.5, "rate": 0.3})
    draw, state, bound = np.random.default_rng(0), aggregator.init(), 5.0
    for t in range(1, 60):
        x = draw.normal(size=(9, 20)) * draw.uniform(0.2, 1.0, size=(9, 1))
        norms = np.linalg.norm(x, axis=1)
        weights, state = aggregator.row_weights(x @ x.T, Cohort(list("abcdefghi"), t), state)
        np.testing.assert_allclose(weights, np.minimum(1, bound / norms) / 9)
        bound *= np.exp(-0.3 * ((norms <= bound).mean() - 0.5))
        assert state["norm"] == pytest.approx(bound)
    assert 1.5 < bound < 4.0


# ------------------------------------------------------------ plan sharded


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(chunks, "SHORTEST", 4096)


def decoded(how, deltas_RKP):
    """What arrives of the deltas."""
    grid, arrived = Grid(P, 1), torch.zeros_like(deltas_RKP)
    coder = Coder(how.up, grid, SEED, torch.device("cpu"), "up")
    for number, deltas_KP in enumerate(deltas_RKP, start=1):
        for k, silo in enumerate("abcde"):
            coder.start(number, silo)
            for piece, part in enumerate(grid):
                payload = torch.zeros(coder.stride, dtype=torch.uint8)
                size = coder.encode(deltas_KP[k][part].contiguous(), payload, piece, 1.0, None)
                coder.decode(payload[:size], arrived[number - 1, k][part], piece)
    return arrived.double().numpy()


@pytest.mark.parametrize("up", [{}, {"codec": "int8"}])
@pytest.mark.parametrize("name", CASES)
def test_over_ranks_a_member_is_its_equation_on_what_arrived_and_the_same_bits_for_any_number_of_them(name, up):
    given, equation = CASES[name]
    given = {**given, "hostile": 0} if name == "bulyan" else given  # five silos
    equation = (lambda x, t, v: robust.bulyan(x, 0)) if name == "bulyan" else equation
    if "nearest_neighbour_mixing, bulyan" in name:
        equation = lambda x, t, v: robust.bulyan(  # noqa: E731
            robust.nearest_mixed(robust.buckets(x, 2, order(len(x), t)), 1), 0
        )
    start_P, deltas_RKP = drawn(1 if "bulyan" in name else 3)  # its equation works by coordinate
    deltas_RKP[:, :, ::7] += 1e-2  # what they have in common
    deltas_RKP[:, 3] *= 50.0
    how = section(up, scope="silo")
    done = [over_rounds(how, start_P, deltas_RKP, n, aggregator=member(given)) for n in (1, 2, 3)]
    assert len({rank[0].numpy().tobytes() for ranks in done for rank in ranks}) == 1
    arrived, wanted, v = decoded(how, deltas_RKP), start_P.double().numpy(), 0.0
    for t, x in enumerate(arrived, start=1):
        v = equation(x, t, v)
        wanted = wanted + v
    np.testing.assert_allclose(done[0][0][0].numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_what_is_held_until_the_weights_are_known_is_a_ranks_share_of_all_deltas():
    _, deltas_RKP = drawn(1)

    def held(name, num_ranks):
        def work(comm):
            hosted = [silo for k, silo in enumerate("abcde") if k % comm.size == comm.rank]
            aggregator = member({"name": name, **({"hostile": 1} if name == "krum" else {})})
            context = ExchangeContext(5.0, list("abcde"), hosted, SEED, aggregator)
            params_P, optimizer = torch.zeros(P), OPTIMIZERS.build("fedavg", "")
            exchange = make(section(scope="silo"), comm, params_P, context)
            exchange.begin(1, len(hosted))
            for silo in hosted:
                delta_P = deltas_RKP[0]["abcde".index(silo)].clone()
                exchange.add(Contribution(silo, 1, 1.0, delta_P, 0.0, 1, 1))
            exchange.finish(params_P, Server(optimizer), optimizer.init(params_P))
            assert isinstance(exchange, Sharded)
            return sum(len(memory) for memory, _ in exchange._upload._arrived)

        return on_ranks(num_ranks, work)

    grid, most = Grid(P, 2), 3  # vectors that a rank sends
    assert held("krum", 2) == [grid.num_stripes * most * 2 * grid.length] * 2
    assert all(num <= (AHEAD + 1) * most * 2 * grid.length for num in held("median", 2))


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("name", ["krum", "centered_clipping", "geometric_median"])
def test_what_travels_beside_a_codec_counts_in_distances_and_moves_with_the_rest(name, num_ranks):
    """Two rounds in which one silo is an outlier only in values that no codec sees."""
    draw = torch.Generator().manual_seed(2)
    deltas_RKP = 1e-3 * torch.randn(2, 5, P_EXACT, generator=draw)
    exact = chosen(EXACT)
    deltas_RKP[:, :, ~exact] = deltas_RKP[:, :1, ~exact]  # equal except for them
    deltas_RKP[:, :, exact] += torch.randn(2, 5, int(exact.sum()), generator=draw)
    deltas_RKP[:, 2, exact] += 100.0
    given = {"krum": {"hostile": 1}, "centered_clipping": {"tau": 2.0}, "geometric_median": {}}[name]
    how = section({"codec": "bf16"}, scope="silo")

    def work(comm):
        ids, params_P, optimizer = list("abcde"), torch.zeros(P_EXACT), OPTIMIZERS.build("fedavg", "")
        mine = [k for k in range(5) if k % comm.size == comm.rank]
        aggregator = member({"name": name, **given})
        context = ExchangeContext(5.0, ids, [ids[k] for k in mine], SEED, aggregator, layout=LAYOUT)
        exchange = make(how, comm, params_P, context)
        for number, deltas_KP in enumerate(deltas_RKP, start=1):
            exchange.begin(number, len(mine))
            for k in mine:
                exchange.add(Contribution(ids[k], number, 1.0, deltas_KP[k].clone(), 0.0, 1, 1))
            params_P, _ = exchange.finish(params_P, Server(optimizer), optimizer.init(params_P))
        return params_P

    done = on_ranks(num_ranks, work)
    assert all(torch.equal(params_P, done[0]) for params_P in done)
    equation, wanted, v = getattr(robust, name), np.zeros(P_EXACT), np.zeros(P_EXACT)
    for deltas_KP in deltas_RKP:
        rows_KP = deltas_KP.bfloat16().double().numpy()
        rows_KP[:, exact] = deltas_KP[:, exact]
        more = {"centre": v} if name == "centered_clipping" else {"hostile": 1}
        v = equation(rows_KP, **{**given, **more})
        wanted += v
    np.testing.assert_allclose(done[0].numpy(), wanted, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------ whole runs

SHARDED = {"plan": "sharded", "scope": "silo"}


@pytest.mark.parametrize("name", ["krum", "bucketing", "centered_clipping"])
def test_a_run_trains_with_it(name, tmp_path):
    more = {"krum": {"hostile": 0}, "bucketing": {"inner": {"name": "norm_bound", "norm": 9.0}}}.get(name, {})
    records, _ = run(config(tmp_path, 4, aggregate={"name": name, **more}, exchange=SHARDED))
    assert records[-1]["train_loss"] < records[0]["train_loss"]


def test_it_needs_every_delta_by_itself(tmp_path):
    with pytest.raises(ConfigError, match=r"^aggregate: krum reads each delta; it needs exchange.scope: silo and plan"):
        config(tmp_path, 2, aggregate={"name": "krum", "hostile": 0})


def test_a_vote_of_signs_is_refused_where_statistics_would_be_voted_on(tmp_path):
    from support.runs import OWN

    how = {"aggregate": "sign_vote", "exchange": SHARDED, "model": OWN + "Normed"}
    assert "sign_vote gives a direction, and 'norm.running_mean' is a statistic" in refused(config(tmp_path, 2, **how))


@pytest.mark.parametrize(
    "given",
    [
        {"name": "centered_clipping", "tau": 0.05},
        {"name": "bucketing", "inner": {"name": "centered_clipping", "tau": 0.05}},
        {"name": "norm_bound", "norm": 0.02, "quantile": 0.5, "rate": 1.0},
    ],
)
def test_a_run_that_is_resumed_goes_on_with_what_the_aggregator_keeps(given, tmp_path):
    def how(rounds):
        return config(tmp_path / "resumed", rounds, aggregate=given, exchange=SHARDED)

    whole = run(config(tmp_path / "whole", 4, aggregate=given, exchange=SHARDED))[1]
    half = run(how(2))[1]
    resumed = run(how(4))[1]
    assert torch.equal(resumed.parameters, whole.parameters) and not torch.equal(half.parameters, whole.parameters)
    kept, again = (
        {one.key: one.tensor for one in done.federation.exchange.holders.state()} for done in (whole, resumed)
    )
    assert kept.keys() == again.keys() & {("centre", "result"), ("aggregator", "norm")} and kept
    assert all(torch.equal(kept[key], again[key]) and kept[key].any() for key in kept)
