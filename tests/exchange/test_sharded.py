"""The sharded plan with codecs, over ranks that are threads: against a plain reference, and the same bits for any
number of ranks.
"""

import numpy as np
import pytest
import torch
from support.sharded import OWNERS, WEIGHTS, P, drawn, fed_back_of, run, section

from fedmpi.aggregate import AGGREGATORS
from fedmpi.codecs import CODECS
from fedmpi.comm.threads import on_ranks
from fedmpi.components import build
from fedmpi.errors import ConfigError, FedmpiError
from fedmpi.exchange import chunks
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.choose import cost, make
from fedmpi.exchange.chunks import OF_RANK, Coder, Grid
from fedmpi.exchange.config import Channel, ExchangeSection
from fedmpi.exchange.cost import Sizes, num_vectors
from fedmpi.server import OPTIMIZERS, Server
from fedmpi.state import StateTensor
from fedmpi.types import Contribution

LOSSY = [name for name in CODECS.members if name != "identity"]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """The shortest length that codecs allow; the real length only makes it faster."""
    monkeypatch.setattr(chunks, "SHORTEST", 4096)


def fed_back(codec):
    return {"codec": codec, "feedback": True}


def transcribed(how, start_P, deltas_RKP, server="fedavg"):
    """The reference, one line per sentence of the docstrings: no ranks, no rows."""
    grid, params_P, optimizer = Grid(P, 1), start_P.clone(), OPTIMIZERS.build(server, "")
    up = Coder(how.up, grid, 7, params_P.device, "up")
    down = Coder(how.down, grid, 7, params_P.device, "down")
    residual_KP, lost_P = torch.zeros(5, P), torch.zeros(P)
    state = optimizer.init(params_P)

    def through(coder, vector_P, residual_P, fed):
        decoded_P = torch.zeros(P)
        for piece, part in enumerate(grid):
            payload = torch.zeros(coder.stride, dtype=torch.uint8)
            size = coder.encode(vector_P[part].contiguous(), payload, piece, 1.0, residual_P[part] if fed else None)
            coder.decode(payload[:size], decoded_P[part], piece)
        return decoded_P

    for number, deltas_KP in enumerate(deltas_RKP, start=1):
        mean_P = torch.zeros(P)
        for k, silo in enumerate("abcde"):
            up.start(number, silo)
            decoded_P = through(up, deltas_KP[k], residual_KP[k], how.up.feedback)
            mean_P += decoded_P * np.float32(WEIGHTS[k] / sum(WEIGHTS))
        new_P, state = optimizer.step(params_P, mean_P, state)
        down.start(number)
        params_P = params_P + through(down, new_P - params_P, lost_P, how.down.feedback)
    return params_P


@pytest.mark.parametrize("num_ranks", OWNERS)
@pytest.mark.parametrize("name", ["identity", *LOSSY])
def test_every_codec_both_ways_is_the_transcription_and_all_ranks_hold_the_same_bits(name, num_ranks):
    start_P, deltas_RKP = drawn(3)
    up, down = ({"codec": name, "feedback": name != "identity"} for _ in range(2))
    how = section(up, down, scope="silo")
    done = run(how, start_P, deltas_RKP, num_ranks, "fedavgm")
    assert all(torch.equal(params_P, done[0][0]) for params_P, *_ in done)
    torch.testing.assert_close(done[0][0], transcribed(how, start_P, deltas_RKP, "fedavgm"), rtol=1e-5, atol=1e-5)
    assert not torch.equal(done[0][0], start_P)


@pytest.mark.parametrize("name", ["identity", *LOSSY])
def test_with_a_scope_of_silos_any_number_of_ranks_gives_the_same_bits(name):
    start_P, deltas_RKP = drawn(3)
    channel = {"codec": name, "feedback": name != "identity"}
    how = section(channel, {"codec": name}, scope="silo", reduction="reproducible" if name == "int8" else "fast")
    cohorts = {1: (0, 3), 2: (4, 1, 3), 3: (2,)}
    found = [run(how, start_P, deltas_RKP, n, "fedadam", cohorts) for n in OWNERS]
    assert len({done[0][0].numpy().tobytes() for done in found}) == 1
    kept = [{silo: t for rank in done for silo, t in rank[2].items()} for done in found]
    assert all(set(k) == set(kept[0]) and all(torch.equal(k[s], kept[0][s]) for s in k) for k in kept)
    assert len({tuple(t.numpy().tobytes() for t in done[0][3]) for done in found}) == 1


@pytest.mark.parametrize("scope", ["rank", "silo"])
@pytest.mark.parametrize("name", ["int8", "topk"])
def test_how_many_stripes_travel_together_changes_no_bit(name, scope, monkeypatch):
    start_P, deltas_RKP = drawn(2)
    how = section(fed_back(name), fed_back(name), scope=scope)
    found = []
    for rows in (1, 2, 3):
        monkeypatch.setattr(chunks, "MESSAGE_BYTES", rows * CODECS.build(name, "").max_bytes(4096))
        assert chunks.stripes_per_batch(Grid(P, 2), how.up, how.down) == rows
        found.append(run(how, start_P, deltas_RKP, 2))
    for (params_P, spent, residuals, _), (again_P, sent, kept, _) in zip(
        found[0] * 2, found[1] + found[2], strict=True
    ):
        assert torch.equal(params_P, again_P) and spent == sent
        assert all(torch.equal(residuals[silo], kept[silo]) for silo in residuals)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["int8", "topk", "qsgd", "threshold"])
@pytest.mark.parametrize("scope", ["rank", "silo"])
def test_feedback_loses_nothing_over_rounds(name, num_ranks, scope):
    """What has arrived and the residuals together equal what was sent."""
    _, deltas_RKP = drawn(4)
    done = run(section(fed_back(name), fed_back(name), scope=scope), torch.zeros(P), deltas_RKP, num_ranks)
    shares = torch.tensor(WEIGHTS) / sum(WEIGHTS)
    sent_P = (deltas_RKP * shares[None, :, None]).sum((0, 1))
    kept_P = torch.zeros(P)
    for rank in done:
        for silo, tensor in rank[2].items():
            kept_P += tensor * (shares["abcde".index(silo)] if scope == "silo" else 1.0)
    lost_P = done[0][3][-1]
    torch.testing.assert_close(done[0][0] + lost_P + kept_P, sent_P, rtol=1e-4, atol=2e-6)
    assert kept_P.abs().max() > 1e-5, "a codec that keeps nothing back proves nothing"


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_traffic_of_a_linear_codec_under_plan_replicated_is_what_was_counted(num_ranks):
    start_P, deltas_RKP = drawn(1)
    how = build(ExchangeSection, {"plan": "replicated", "up": {"codec": "randk"}})
    done = run(how, start_P, deltas_RKP, num_ranks)
    said = cost(how, Sizes(P, 4, num_ranks)).traffic
    assert tuple(sum(rank[1][i] for rank in done) for i in range(3)) == (said.up, said.down, said.control)


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
@pytest.mark.parametrize("scope", ["rank", "silo"])
@pytest.mark.parametrize("name", ["identity", "int8", "topk", "uniform", "threshold", "randk"])
def test_traffic_is_what_was_counted_or_the_most_it_can_be(name, scope, num_ranks):
    start_P, deltas_RKP = drawn(1)
    how = section({"codec": name}, {"codec": name}, scope=scope)
    done = run(how, start_P, deltas_RKP, num_ranks)
    hosted = [OWNERS[num_ranks].count(rank) for rank in range(num_ranks)]
    said = cost(how, Sizes(P, 4, num_ranks, num_vectors(how, hosted), 5)).traffic
    up, down, control = (sum(rank[1][i] for rank in done) for i in range(3))
    assert control == said.control
    if CODECS.members[name]().fixed:
        assert (up, down) == (said.up, said.down)
    else:
        assert 0 < up <= said.up and 0 < down <= said.down


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_residuals_of_ranks_move_with_silos_and_add_up(num_ranks):
    start_P, deltas_RKP = drawn(2)
    how = section(fed_back("int4"))
    kept = {silo: t for rank in run(how, start_P, deltas_RKP, num_ranks) for silo, t in rank[2].items()}

    def moved(comm):
        hosted = [silo for silo, owner in zip("abcde", OWNERS[3], strict=True) if owner == comm.rank]
        exchange = make(how, comm, start_P.clone(), ExchangeContext(1.0, list("abcde"), hosted, 7))
        mine = [
            StateTensor((OF_RANK, name), tensor, "per_silo", silo)
            for silo in hosted if silo in kept
            for name, tensor in (("feedback", kept[silo]), ("weight", torch.tensor(weight, dtype=torch.float64)))
        ]  # fmt: skip
        exchange.holders["up"].restore(mine)
        return sum(fed_back_of(exchange).values(), torch.zeros(P))

    for weight in (1.0, 0.5):  # total weight at that time: the unit of a residual
        torch.testing.assert_close(sum(on_ranks(3, moved)), sum(kept.values()) * weight)


def test_what_cannot_be_encoded_before_sizes_are_known_is_an_error_on_all_too():
    start_P, deltas_RKP = drawn(1)
    deltas_RKP[0, 0, 9000] = float("inf")
    with pytest.raises(FedmpiError, match=r"rank 0: exchange.up: values 8192 to 12288: codec 'threshold'"):
        run(section({"codec": "threshold"}), start_P, deltas_RKP, 3, owners=(0, 1, 1, 2, 2))


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("scope", ["rank", "silo"])
def test_what_a_format_cannot_hold_on_one_rank_is_an_error_on_all(way, scope, num_ranks):
    start_P, deltas_RKP = drawn(1)
    deltas_RKP[0, 0, 9000] = 9e5
    how = section(**{way: {"codec": "fp16"}}, scope=scope)
    if way == "up" and scope == "silo":  # raised while the silo trains, as the silo's error
        with pytest.raises(FedmpiError, match=r"exchange\.up: values 8192 to 12288"):
            run(how, start_P, deltas_RKP, 1)
        return
    with pytest.raises(FedmpiError, match=rf"exchange.{way}: values 8192 to 12288: codec 'fp16'"):
        run(how, start_P, deltas_RKP, num_ranks)


@pytest.mark.parametrize("plan", ["replicated", "sharded"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_what_a_linear_codec_refuses_on_one_rank_is_an_error_on_all(plan, num_ranks):
    start_P, deltas_RKP = drawn(1)
    deltas_RKP[0, 0, 9000] = float("inf")
    how = build(ExchangeSection, {"plan": plan, "up": {"codec": "randk"}})

    def refused(comm):
        exchange, optimizer = make(how, comm, start_P.clone(), ExchangeContext(2.0)), OPTIMIZERS.build("fedavg", "")
        exchange.begin(1, 1)
        if comm.rank < 2:
            exchange.add(Contribution("a", 1, 1.0, deltas_RKP[0, 1 - comm.rank], 0.0, 1, 1))
        with pytest.raises(FedmpiError) as caught:
            exchange.finish(start_P.clone(), Server(optimizer), optimizer.init(start_P))
        return str(caught.value)

    (said,) = set(on_ranks(num_ranks, refused))
    assert said.startswith("rank 1: exchange.up: values 8192 to 12288: codec 'randk'")


def test_a_round_that_is_broken_off_leaves_the_residuals_as_they_were():
    start_P, deltas_RKP = drawn(2)
    from fedmpi.comm import SoloComm

    exchange = make(section(fed_back("topk"), scope="silo"), SoloComm(), start_P, ExchangeContext(5.0, ["a"], ["a"]))
    optimizer = OPTIMIZERS.build("fedavg", "")
    exchange.begin(1, 1)
    exchange.add(Contribution("a", 1, 5.0, deltas_RKP[0, 0], 0.0, 1, 1))
    exchange.finish(start_P, Server(optimizer), optimizer.init(start_P))
    before = fed_back_of(exchange)["a"].clone()
    for _ in range(2):
        exchange.begin(2, 1)
        exchange.add(Contribution("a", 2, 5.0, deltas_RKP[1, 0], 0.0, 1, 1))
        assert torch.equal(fed_back_of(exchange)["a"], before)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"plan": "root", "up": {"codec": "int8"}}, "plan root takes no up.codec int8; take sharded"),
        ({"plan": "window", "scope": "silo"}, "plan shared_memory takes no scope: silo; take sharded"),
        ({"plan": "root", "up": {"codec": "randk"}}, "plan root takes no up.codec randk; take replicated or sharded"),
        ({"plan": "replicated", "down": {"codec": "bf16"}}, "plan replicated takes no down.codec bf16; take sharded"),
        ({"plan": "sharded", "up": {"feedback": True}}, "feedback needs a codec that loses something"),
        ({"plan": "sharded", "up": {"codec": "int8", "decay": 0.9}}, "decay needs feedback"),
        ({"plan": "sharded", "reduction": "reproducible", "up": {"codec": "int8"}}, "needs scope: silo"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(given, reason):
    with pytest.raises(ConfigError, match=reason):
        build(ExchangeSection, given)


def test_codecs_refuse_parameters_of_other_types():
    from fedmpi.comm import SoloComm

    for how in (section({"codec": "int8"}), build(ExchangeSection, {"plan": "replicated", "up": {"codec": "randk"}})):
        with pytest.raises(ConfigError, match="codecs take float32"):
            make(how, SoloComm(), torch.zeros(3, dtype=torch.float64), ExchangeContext(1.0))


@pytest.mark.parametrize("up", [{}, {"codec": "bf16"}])
@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_an_aggregator_that_reads_each_sees_every_silo_s_values_on_any_number_of_ranks(name, up):
    start_P, deltas_RKP = drawn(2)
    aggregator = AGGREGATORS.build({"name": name, **({"fraction": 0.2} if name == "trimmed_mean" else {})}, "")
    deltas_RKP[:, 3] = 1e6 * torch.randn(P)  # sends anything at all
    done = [run(section(up, scope="silo"), start_P, deltas_RKP, n, aggregator=aggregator) for n in OWNERS]
    assert len({rank[0].numpy().tobytes() for ranks in done for rank in ranks}) == 1
    rows = deltas_RKP.bfloat16().float() if up else deltas_RKP
    wanted = {
        "median": np.median(rows.double().numpy(), axis=1),
        "trimmed_mean": np.sort(rows.double().numpy(), axis=1)[:, 1:4].mean(axis=1),
    }
    np.testing.assert_allclose(done[0][0][0].numpy(), start_P.numpy() + wanted[name].sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_payloads_of_a_linear_codec_may_be_summed_by_mpi(feedback, num_ranks):
    start_P, deltas_RKP = drawn(3)
    up = {"codec": {"name": "randk", "ratio": 0.1}, "feedback": feedback}
    both = [
        run(build(ExchangeSection, {"plan": plan, "up": up}), start_P, deltas_RKP, num_ranks)
        for plan in ("replicated", "sharded")
    ]
    torch.testing.assert_close(both[0][0][0], both[1][0][0], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(rank[0], both[0][0][0]) for rank in both[0])


@pytest.mark.parametrize("num_elements", [0, 1, 4095, 4096, 4097, 20_000, 262_144 * 64, 262_144 * 64 + 1, 25_000_000])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_the_grid_covers_the_vector_once(num_elements, num_ranks):
    grid = Grid(num_elements, num_ranks)
    parts = list(grid)
    assert [p.start for p in parts] == [0, *(p.stop for p in parts)][: len(parts)]
    assert sum(p.stop - p.start for p in parts) == num_elements
    assert sum(grid.num_owned(rank) for rank in range(num_ranks)) == num_elements
    assert grid.length == Grid(num_elements, 1).length and grid.length % 4096 == 0
    for rank in range(num_ranks):
        kept = [grid.kept(piece) for piece in grid.owned(rank)]
        assert [k.start for k in kept] == [0, *(k.stop for k in kept)][: len(kept)]


def test_decay_takes_off_what_is_kept():
    channel = Channel(codec=CODECS.build("int4", ""), feedback=True, decay=0.5)
    coder = Coder(channel, Grid(300, 1), 0, torch.device("cpu"), "up")
    residual_N, payload_B = torch.full((300,), 0.25), torch.zeros(coder.stride, dtype=torch.uint8)
    decoded_N = torch.zeros(300)
    coder.decode(payload_B[: coder.encode(torch.zeros(300), payload_B, 0, 1.0, residual_N)], decoded_N, 0)
    torch.testing.assert_close(decoded_N + residual_N, torch.full((300,), 0.125))


def test_a_trimmed_mean_that_leaves_nobody_out_is_refused():
    trimmed = AGGREGATORS.build({"name": "trimmed_mean"}, "")
    with pytest.raises(ConfigError, match=r"^aggregate.fraction: 0.1 of 4 silos is less than .* take 0.25 or"):
        trimmed.suits(4)
    trimmed.suits(10)
    AGGREGATORS.build({"name": "trimmed_mean", "fraction": 0.0}, "").suits(4)
