"""`exchange.fragments`: one part of the parameters per round, against plain numpy as silos see it; invalid options."""

import numpy as np
import pytest
import torch
from support import reference
from support.runs import config, everything, figures, refused, run

from fedmpi.comm.threads import on_ranks
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.choose import cost, make
from fedmpi.exchange.config import ExchangeSection
from fedmpi.exchange.cost import Sizes
from fedmpi.exchange.fragments import parts, turn
from fedmpi.flat import sha256
from fedmpi.layout import Layout, Segment
from fedmpi.server import OPTIMIZERS, Server
from fedmpi.types import Contribution

WEIGHTS = np.array([3.0, 1.0, 4.0, 2.0])
COHORTS = [[0, 1, 2, 3], [0, 2], [1, 2, 3], [0, 1, 3], [2], [0, 1, 2, 3], [1, 3], [0, 2, 3], [0, 1, 2, 3]]
OWNERS = {1: [0, 0, 0, 0], 2: [0, 1, 1, 0], 3: [2, 0, 0, 1]}
IDS = ["a", "b", "c", "d"]
RATE = 0.3  # share of the way to its target that a silo goes in a round


def drawn(num_params, seed=0):
    """The common start, and each silo's target."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=num_params), rng.normal(size=(4, num_params))


def streaming(w_P, targets_KP, num_parts, server, late, **options):
    """The parameters after each round, as silos see it: x_k are a silo's own parameters."""
    cuts = [len(w_P) * n // num_parts for n in range(num_parts + 1)]
    x_KP, (m, v), w_P = np.tile(w_P, (4, 1)), reference.start(w_P), w_P.copy()
    before_P, after, on_its_way = w_P.copy(), [], None
    for number, cohort in enumerate(COHORTS):
        moved_KP = np.zeros_like(x_KP)
        moved_KP[cohort] = RATE * (targets_KP[cohort] - x_KP[cohort])
        x_KP += moved_KP
        n = number % num_parts
        part = slice(cuts[n], cuts[n + 1])
        sent = x_KP[cohort, part] - w_P[part]
        if on_its_way is not None:  # the round before: the server's step replaces the silo's, its later progress stays
            x_KP[:, on_its_way] = w_P[on_its_way] + moved_KP[:, on_its_way]
        before_P = w_P.copy()
        mean = np.average(sent, axis=0, weights=WEIGHTS[cohort])
        w_P[part], m[part], v[part] = reference.SERVERS[server](w_P[part], mean, m[part], v[part], **options)
        if late:
            on_its_way = part
            after.append(before_P if number + 1 < len(COHORTS) else w_P.copy())
        else:
            x_KP[:, part] = w_P[part]
            after.append(w_P.copy())
    return after


def exchanged(how, start_P, targets_KP, optimizer, num_ranks, layout=None):
    """The parameters after each round on every rank, and the bytes that each rank has counted."""

    def work(comm):
        params_P = torch.from_numpy(start_P).float()
        hosted = [silo for silo, owner in zip(IDS, OWNERS[num_ranks], strict=True) if owner == comm.rank]
        facts = ExchangeContext(float(WEIGHTS.sum()), IDS, hosted, rounds=len(COHORTS), layout=layout)
        exchange = make(how, comm, params_P, facts)
        params_P, state = exchange.home(params_P, optimizer.init(exchange.shard(params_P)))
        found, sent = [], []
        for number, cohort in enumerate(COHORTS, start=1):
            mine = [k for k in cohort if IDS[k] in hosted]
            exchange.begin(number, len(mine))
            for k in mine:
                begun_P = exchange.start(IDS[k], params_P)
                delta_P = (RATE * (torch.from_numpy(targets_KP[k]) - begun_P.double())).float()
                exchange.add(Contribution(IDS[k], number, WEIGHTS[k], delta_P, 0.0, 1, 1))
                delta_P.fill_(torch.nan)  # the next silo overwrites it
            params_P, state = exchange.finish(params_P, Server(optimizer, exchange.layout), state)
            found.append(params_P.clone())
            sent.append(comm.bytes_up + comm.bytes_down)
            comm.barrier()
        exchange.leave()
        return found, np.diff([0, *sent])

    return on_ranks(num_ranks, work)


SERVERS = {
    "fedavg": OPTIMIZERS.build("fedavg", ""),
    "fedavgm": OPTIMIZERS.build({"name": "fedavgm", "lr": 0.7, "beta": 0.5, "nesterov": True}, ""),
}
PLANS = ("root", "replicated", "sharded", "shared_memory")
HOW = [(plan, False) for plan in PLANS] + [(plan, True) for plan in PLANS[:3]]


@pytest.mark.parametrize("num_ranks", OWNERS)
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(("plan", "late"), HOW)
def test_every_round_is_what_silos_see(plan, late, server, num_ranks):
    start_P, targets_KP = drawn(300_001 if plan == "sharded" else 4001)  # each part is cut into two pieces
    options = {} if server == "fedavg" else {"lr": 0.7, "beta": 0.5, "nesterov": True}
    wanted = streaming(start_P, targets_KP, 4, server, late, **options)
    how = ExchangeSection(plan=plan, fragments=4, overlap=late)
    for found, _ in exchanged(how, start_P, targets_KP, SERVERS[server], num_ranks):
        for number, (found_P, wanted_P) in enumerate(zip(found, wanted, strict=True), start=1):
            worst = np.abs(found_P.double().numpy() - wanted_P).max()
            assert worst < 3e-6, f"round {number}: {worst}"


@pytest.mark.parametrize("late", [False, True])
def test_the_same_bits_on_any_number_of_ranks_and_under_every_plan(late):
    start_P, targets_KP = drawn(1003)
    bits = set()
    for plan in PLANS[: 3 if late else 4]:
        for num_ranks in OWNERS:
            how = ExchangeSection(plan=plan, fragments=3, overlap=late, reduction="reproducible")
            for found, _ in exchanged(how, start_P, targets_KP, SERVERS["fedavgm"], num_ranks):
                bits.add(tuple(found_P.numpy().tobytes() for found_P in found))
    assert len(bits) == 1


def test_parts_travel_through_codecs_as_vectors_of_their_own():
    """Bit for bit: each part's exchange, residuals and random bits are those of a run with that part only."""
    start_P, targets_KP = drawn(5000)
    up = {"codec": {"name": "topk", "ratio": 0.1}, "feedback": True}
    down = {"codec": {"name": "int8", "rounding": "stochastic"}, "feedback": True}
    values = {"plan": "sharded", "scope": "silo", "up": up, "down": down}
    how = build(ExchangeSection, {**values, "fragments": 2})
    (found, _), _ = exchanged(how, start_P, targets_KP, SERVERS["fedavg"], 2)

    def alone(comm):
        hosted = [silo for silo, owner in zip(IDS, OWNERS[2], strict=True) if owner == comm.rank]
        facts = ExchangeContext(float(WEIGHTS.sum()), IDS, hosted)
        params_P, ends = torch.from_numpy(start_P).float(), []
        halves = [params_P[part] for part in parts(5000, 2)]
        exchanges = [make(build(ExchangeSection, values), comm, half_S, facts) for half_S in halves]
        x_KP = {k: torch.zeros(5000) for k in range(4)}  # the silos' progress
        for number, cohort in enumerate(COHORTS, start=1):
            n = turn(number, 2)
            exchanges[n].begin(number, 2)
            for k in cohort:
                step_P = (RATE * (torch.from_numpy(targets_KP[k]) - (params_P + x_KP[k]).double())).float()
                x_KP[k] += step_P
                if IDS[k] in hosted:
                    sent_S = x_KP[k][parts(5000, 2)[n]].clone()
                    exchanges[n].add(Contribution(IDS[k], number, WEIGHTS[k], sent_S, 0.0, 1, 1))
            exchanges[n].finish(halves[n], Server(SERVERS["fedavg"]), SERVERS["fedavg"].init(halves[n]))
            for k in range(4):
                x_KP[k][parts(5000, 2)[n]] = 0
            ends.append(params_P.clone())
        return ends

    wanted, _ = on_ranks(2, alone)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("late", [False, True])
def test_statistics_travel_exactly_in_the_part_that_they_lie_in(late):
    """One lies across two parts. They become the silos' mean, for any server optimizer."""
    start_P, targets_KP = drawn(4000)
    beside = Segment("bn.running_mean", 900, 1100, "exact", averaged=True)
    layout = Layout((Segment("delta", 0, 4000, "delta"), beside))
    how = build(ExchangeSection, {"plan": "sharded", "fragments": 4, "overlap": late, "up": {"codec": "int8"}})
    wanted = streaming(start_P, targets_KP, 4, "fedavg", late)[-1]
    for found, _ in exchanged(how, start_P, targets_KP, SERVERS["fedavgm"], 2, layout):
        error_P = np.abs(found[-1].double().numpy() - wanted)
        assert error_P[900:1100].max() < 1e-6 < error_P[:900].max()


@pytest.mark.parametrize("plan", PLANS[:3])
def test_a_round_sends_the_bytes_of_a_part(plan):
    start_P, targets_KP = drawn(40_000)
    sent = {}
    for fragments in (1, 4):
        how = ExchangeSection(plan=plan, fragments=fragments)
        counted = [bytes_T for _, bytes_T in exchanged(how, start_P, targets_KP, SERVERS["fedavg"], 2)]
        promised = cost(how, Sizes(40_000, 4, 2)).traffic
        assert sum(counted).tolist() == [promised.up + promised.down] * len(COHORTS)
        sent[fragments] = promised.up + promised.down
    assert sent[4] == pytest.approx(sent[1] / 4, rel=1e-3)


# ---------------------------------------------------------------- runs

MOVING = {
    "select": {"name": "uniform", "count": 2},
    "server": {"optimizer": "fedavgm"},
    "local": {"optimizer": {"name": "SGD", "momentum": 0.9}, "keep_optimizer": True},
}
RUNS = {
    "replicated": {"exchange": {"plan": "replicated", "fragments": 3}, **MOVING},
    "shared memory": {"exchange": {"plan": "shared_memory", "fragments": 4}, **MOVING},
    "average": {"exchange": {"fragments": 3}, "server": {"optimizer": "fedadam", "average": {"decay": 0.5}}},
    "codecs": {
        "exchange": {
            "plan": "sharded",
            "fragments": 3,
            "up": {"codec": {"name": "topk", "ratio": 0.3}, "feedback": True},
            "down": {"codec": "int8", "feedback": True},
        },
        **MOVING,
    },
    "overlap with codecs": {
        "exchange": {
            "plan": "sharded",
            "scope": "silo",
            "fragments": 2,
            "overlap": True,
            "up": {"codec": {"name": "topk", "ratio": 0.3}, "feedback": True},
        },
        **MOVING,
    },
    "a centre": {
        "exchange": {"plan": "sharded", "scope": "silo", "fragments": 2},
        "aggregate": {"name": "centered_clipping"},
    },
    "all that a silo may keep": {
        "exchange": {"fragments": 3},
        "model": "support.runs:Normed",
        "local": {"last_batch": "merge"},
    },
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("left", [1, 3])
def test_a_run_that_is_left_goes_on_with_the_same_bits(tmp_path, name, left):
    values = {**RUNS[name], "checkpoint": {"every": 1, "keep": 9}}
    records, whole = run(config(tmp_path / "whole", 7, **values))
    before, _ = run(config(tmp_path / "left", 7, **values), rounds=left)
    after, again = run(config(tmp_path / "left", 7, **values))
    assert [*map(figures, before + after)] == [*map(figures, records)]
    assert sha256(again.parameters) == sha256(whole.parameters)
    assert everything(tmp_path / "left") == everything(tmp_path / "whole")


def test_plans_are_measured_on_parts(tmp_path):
    records, done = run(config(tmp_path, exchange={"plan": "measure", "fragments": 2}))
    assert sorted(done.plan.seconds) == ["replicated", "root", "sharded", "shared_memory"] and len(records) == 4


def test_one_fragment_is_a_run_without_a_word_of_it(tmp_path):
    said, half = {"fragments": 1}, {"fragments": 2}
    shas = [sha256(run(config(tmp_path / str(n), exchange=e))[1].parameters) for n, e in enumerate([{}, said, half])]
    assert shas[0] == shas[1] != shas[2]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"exchange": {"fragments": 2, "regions": {}}}, "fragments do not work with regions"),
        ({"local": {"name": "scaffold", "lr": 0.1, "epochs": 1}}, "the control of scaffold must travel with the whole"),
        ({"aggregate": "fednova"}, "aggregate: fednova looks at one round, and a fragment holds several"),
        ({"aggregate": {"name": "mean", "weights": "steps"}}, "aggregate: weights: steps counts those of one round"),
        ({"server": {"optimizer": "fedexp"}}, "fedexp uses the norms of whole deltas of one round"),
        (
            {"updates": [{"name": "noise", "sigma": 1.0, "where": "mean"}]},
            "noise on the mean is scaled to one round",
        ),
        (
            {"exchange": {"fragments": 2, "scope": "silo", "plan": "sharded"}, "records": {"gram": True}},
            "records.gram: not available with exchange.fragments: no rank sees whole deltas",
        ),
    ],
)
def test_what_needs_whole_deltas_refuses_fragments_in_one_line(values, said):
    local = {"name": "sgd", "lr": 0.1, "epochs": 1}
    with pytest.raises(ConfigError) as caught:
        build(Config, {"exchange": {"fragments": 2}, "local": local, **values})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_more_fragments_than_parameters_are_refused(tmp_path):
    said = refused(config(tmp_path, exchange={"fragments": 11}))
    assert said == "exchange.fragments: 11, but only 10 parameters are shared"
