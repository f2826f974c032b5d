"""Values that are sent exactly beside lossy codecs: statistics, configured patterns, and frozen parameters."""

import numpy as np
import pytest
import torch
from support.exchanges import EXACT, LAYOUT, STILL, P, there
from support.runs import OWN, config, put_back, refused, run  # noqa: F401

from fedmpi.aggregate import AGGREGATORS
from fedmpi.codecs import CODECS
from fedmpi.comm.threads import on_ranks
from fedmpi.components import build
from fedmpi.exchange import chunks
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.choose import cost, make
from fedmpi.exchange.config import ExchangeSection
from fedmpi.exchange.cost import Sizes, num_vectors
from fedmpi.exchange.exact import Places
from fedmpi.flat import sha256
from fedmpi.layout import Layout, Segment
from fedmpi.server import OPTIMIZERS, FedAvg, NoState, Server
from fedmpi.types import Contribution

SILOS = 5
WEIGHTS = (3.0, 1.0, 2.0, 5.0, 4.0)
LOSSY = [name for name in CODECS.members if name != "identity"]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """So that values lie across the border of two pieces."""
    monkeypatch.setattr(chunks, "SHORTEST", 4096)


def drawn(moves=False):
    draw = torch.Generator().manual_seed(1)
    start_P, deltas_KP = torch.randn(P, generator=draw), 1e-2 * torch.randn(SILOS, P, generator=draw)
    deltas_KP[:, there(EXACT)] *= 1e4  # statistics, of another magnitude
    deltas_KP[:, there(STILL)] *= moves
    return start_P, deltas_KP


def one_round(how, num_ranks, start_P, deltas_KP, aggregator=None, server="fedavg"):
    optimizer = OPTIMIZERS.build(server, "")

    def work(comm):
        ids = list("abcde")
        mine = [k for k in range(SILOS) if k % num_ranks == comm.rank]
        params_P = start_P.clone()
        facts = ExchangeContext(sum(WEIGHTS), ids, [ids[k] for k in mine], 7, aggregator, layout=LAYOUT)
        exchange = make(how, comm, params_P, facts)
        state = optimizer.init(exchange.shard(params_P))
        exchange.begin(1, len(mine))
        for k in mine:
            exchange.add(Contribution(ids[k], 1, WEIGHTS[k], deltas_KP[k].clone(), 0.0, 1, 1))
        before = comm.bytes_up, comm.bytes_down
        params_P, _ = exchange.finish(params_P, Server(optimizer), state)
        return params_P, [b - a for a, b in zip(before, (comm.bytes_up, comm.bytes_down), strict=True)]

    return on_ranks(num_ranks, work)


def mean_of(deltas_KP):
    return torch.from_numpy(np.average(deltas_KP.double().numpy(), axis=0, weights=WEIGHTS))


def section(name, way, scope, feedback=False):
    channel = {"codec": name, "feedback": feedback}
    ways = {"up": channel} if way == "up" else {"down": channel} if way == "down" else {"up": channel, "down": channel}
    return build(ExchangeSection, {"plan": "sharded", "scope": scope, **ways})


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("scope", ["rank", "silo"])
@pytest.mark.parametrize("way", ["up", "both"])
@pytest.mark.parametrize("name", LOSSY)
def test_what_is_exact_arrives_as_it_is_beside_every_codec(name, way, scope, num_ranks):
    start_P, deltas_KP = drawn()
    done = one_round(section(name, way, scope), num_ranks, start_P, deltas_KP)
    exact, still = there(EXACT), there(STILL)
    wanted_P = start_P + mean_of(deltas_KP).float()
    for params_P, _ in done:
        assert torch.equal(params_P, done[0][0])
        torch.testing.assert_close(params_P[exact], wanted_P[exact], rtol=2e-7, atol=1e-6)
        assert torch.equal(params_P[still], start_P[still])  # not even the sign of 0 changes
        assert not torch.allclose(params_P[~exact & ~still], wanted_P[~exact & ~still], rtol=0, atol=1e-7)


@pytest.mark.parametrize("scope", ["rank", "silo"])
@pytest.mark.parametrize("way", ["up", "both"])
def test_what_stands_still_as_a_rule_arrives_as_it_is_where_it_moves(way, scope):
    start_P, deltas_KP = drawn(moves=True)
    still = there(STILL)
    for params_P, _ in one_round(section("sign", way, scope), 3, start_P, deltas_KP):
        torch.testing.assert_close(params_P[still], (start_P + mean_of(deltas_KP).float())[still], rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_linear_codec_that_mpi_sums_leaves_them_alone_too(num_ranks):
    start_P, deltas_KP = drawn()
    how = build(ExchangeSection, {"plan": "replicated", "up": {"codec": "randk"}})
    for params_P, _ in one_round(how, num_ranks, start_P, deltas_KP):
        exact = there(EXACT)
        torch.testing.assert_close(params_P[exact], (start_P + mean_of(deltas_KP).float())[exact], rtol=2e-7, atol=1e-6)
        assert torch.equal(params_P[there(STILL)], start_P[there(STILL)])


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_an_aggregator_that_reads_each_reads_them_as_they_are(num_ranks):
    start_P, deltas_KP = drawn()
    median = AGGREGATORS.build("median", "")
    for params_P, _ in one_round(section("int4", "up", "silo"), num_ranks, start_P, deltas_KP, median):
        exact = there(EXACT)
        assert torch.equal(params_P[exact], (start_P + deltas_KP.median(dim=0).values)[exact])


@pytest.mark.parametrize("scope", ["rank", "silo"])
def test_with_a_scope_of_silos_they_too_are_the_same_for_any_number_of_ranks(scope):
    start_P, deltas_KP = drawn(moves=True)
    shas = {sha256(one_round(section("int8", "both", scope), n, start_P, deltas_KP)[0][0]) for n in (1, 2, 3, 5)}
    assert len(shas) == 1 or scope == "rank"


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("scope", ["rank", "silo"])
@pytest.mark.parametrize("way", ["up", "both"])
def test_their_bytes_are_what_was_counted(way, scope, num_ranks):
    how = section("int8", way, scope)
    done = one_round(how, num_ranks, *drawn())
    hosted = [len(range(rank, SILOS, num_ranks)) for rank in range(num_ranks)]
    num = int(there(EXACT).sum())
    said = cost(how, Sizes(P, 4, num_ranks, num_vectors(how, hosted), SILOS, num)).traffic
    assert [said.up, said.down] == [sum(spent[way] for _, spent in done) for way in (0, 1)]


def test_places_know_what_of_them_lies_in_a_piece():
    places = Places([slice(7, 9), slice(0, 3)])
    whole = torch.arange(10)
    assert places.of(whole).tolist() == [0, 1, 2, 7, 8]
    for start in range(10):
        for size in range(1, 10 - start + 1):
            for here, among in places.within(start, size):
                assert whole[start : start + size][here].tolist() == places.of(whole)[among].tolist()
    assert [list(places.within(s, 2)) for s in (3, 5)] == [[], []] and len(list(places.within(2, 6))) == 2


# ---------------------------------------------------------------- whole runs

NORMED = {"model": {"name": OWN + "Normed"}}
WAYS = {
    "int4 up": {"plan": "sharded", "up": {"codec": "int4"}},
    "sign both ways, fed back": {
        "plan": "sharded", "up": {"codec": "sign", "feedback": True}, "down": {"codec": "sign", "feedback": True},
    },
    "top-k of silos": {"plan": "sharded", "scope": "silo", "up": {"codec": "topk", "feedback": True}},
    "random places": {"plan": "replicated", "up": {"codec": "randk"}},
    "down alone": {"plan": "sharded", "down": {"codec": "int4"}},
    "behind training": {"plan": "sharded", "overlap": True, "up": {"codec": "int4"}, "down": {"codec": "int4"}},
    "in a region": {"plan": "sharded", "regions": {"levels": [{"up": {"codec": "int4"}}]}, "down": {"codec": "int4"}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_statistics_are_those_of_a_run_without_codecs_and_variances_never_below_0(tmp_path, way):
    overlap = {"exchange": {"overlap": True, "plan": "sharded"}} if way == "behind training" else {}
    _, plain = run(config(tmp_path / "plain", 1, **NORMED, **overlap))
    _, done = run(config(tmp_path / "lossy", 1, exchange=WAYS[way], **NORMED))
    for name in ("norm.running_mean", "norm.running_var", "base.weight"):
        torch.testing.assert_close(done.model.state_dict()[name], plain.model.state_dict()[name], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(done.model.head.weight, plain.model.head.weight, rtol=0, atol=1e-6)
    records, later = run(config(tmp_path / "later", 6, exchange=WAYS[way], **NORMED))
    assert bool((later.model.norm.running_var >= 0).all()) and all(np.isfinite(r["loss"]) for r in records)


def test_what_a_pattern_names_travels_exactly(tmp_path):
    lossy = {"plan": "sharded", "up": {"codec": "int4"}, "exact": ["head.*", "norm.*", "!norm.weight"]}
    _, plain = run(config(tmp_path / "plain", 1, **NORMED))
    _, done = run(config(tmp_path / "lossy", 1, exchange=lossy, **NORMED))
    torch.testing.assert_close(done.model.head.weight, plain.model.head.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(done.model.norm.bias, plain.model.norm.bias, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(done.model.norm.weight, plain.model.norm.weight, rtol=0, atol=1e-7)


def test_a_pattern_that_names_nothing_shared_is_refused_and_without_a_codec_none_changes_a_bit(tmp_path):
    wrong = config(tmp_path, 1, exchange={"exact": ["haed.*"]}, **NORMED)
    assert refused(wrong).startswith("exchange.exact: 'haed.*' matches nothing that is shared")
    ends = [
        sha256(run(config(tmp_path / str(len(exact)), 2, exchange={"exact": exact}, **NORMED))[1].parameters)
        for exact in ([], ["*"])
    ]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("block", [3, 12])
def test_a_variance_is_never_below_0_whatever_is_rounded(block):
    params_P, mean_P = torch.ones(12), torch.full((12,), -1.0 - 1e-6)
    statistics = [Segment(f"{i}", i, i + 2, "exact", averaged=True, non_negative=i == 4) for i in range(2, 8, 2)]
    server = Server(FedAvg(), Layout((Segment("delta", 0, 12, "delta"), *statistics)))
    new_P = torch.cat(
        [
            server.step(params_P[start : start + block], mean_P[start : start + block].clone(), NoState(), start)[0]
            for start in range(0, 12, block)
        ]
    )
    assert new_P[4:6].tolist() == [0.0, 0.0] and bool((new_P[[0, 1, 2, 3, 6, 7, 8]] < 0).all())
