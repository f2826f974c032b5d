"""The exchange of asynchronous rounds: the same bits on any number of ranks."""

import math

import pytest
import torch

from fedmpi.aggregate import AGGREGATORS
from fedmpi.comm import SoloComm
from fedmpi.comm.threads import on_ranks
from fedmpi.components import build
from fedmpi.errors import ExchangeError
from fedmpi.exchange.arrivals import Arrivals
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.config import ExchangeSection
from fedmpi.server import FedAvg, FedAvgM, NoState, Server
from fedmpi.types import Contribution

FEEDBACK = {"codec": {"name": "topk", "ratio": 0.3, "values": "int8"}, "feedback": True}
CODED = {"up": FEEDBACK, "down": {"codec": "int8", "feedback": True}}
CENTRED = {"name": "centered_clipping", "tau": 0.05}


def exchanged(comm, weights, optimizer, rejected=(), num=300_000, planned=None, mean=0.0, **how):
    """Parameters after a round in which silo i, on rank i modulo the ranks, brings update i; all silos in turn. The
    engine planned for so many updates (None: for all)."""
    ids = [f"s{i}" for i in range(len(weights))]
    params_P = torch.linspace(-1, 1, num)
    facts = ExchangeContext(
        10.0,
        ids,
        [silo for i, silo in enumerate(ids) if i % comm.size == comm.rank],
        aggregator=how.get("aggregator"),
        arrivals=True,
    )
    exchange = Arrivals(how.get("section", ExchangeSection(plan="root")), comm, params_P, facts)
    state = optimizer.init(exchange.shard(params_P))
    for number in (1, 2):
        exchange.begin(number, planned or len(ids))
        for i, silo in enumerate(ids):
            if i % comm.size == comm.rank and i in rejected:
                exchange.reject()
            elif i % comm.size == comm.rank:
                delta_P = mean + torch.randn(num, generator=torch.Generator().manual_seed(10 * number + i))
                update = Contribution(silo, number, weights[i], delta_P, 0.0, 1, 1)
                exchange.bring(exchange.packed(update, number, None)[0], weights[i], 1.0)
                delta_P.fill_(torch.nan)  # the next silo reuses it
        exchange.expect(ids, [i % comm.size for i in range(len(ids))])
        exchange.fetched({silo: (number - (i == 0 or i == number == 1),) for i, silo in enumerate(ids)})
        before_P = params_P.clone()
        params_P, state = exchange.finish(params_P, Server(optimizer, scale=0.5), state)
        if comm.rank == 0:
            assert torch.equal(exchange.older("s0", number - 1), before_P)
            kept = [one.silo for one in exchange.holders["start"].state()]
            assert kept == ["s0", *(["s1"] if number == comm.size == 1 else [])]
            with pytest.raises(ExchangeError, match="silo 's2'"):
                exchange.older("s2", number - 1)
    return params_P


@pytest.mark.parametrize("optimizer", [FedAvg(lr=0.8), FedAvgM()])
@pytest.mark.parametrize("rejected", [(), (0, 3)])
def test_a_round_has_the_same_bits_on_any_number_of_ranks(optimizer, rejected):
    weights = (1.0, 2.5, 0.3, 4.0, 1.0)
    alone = exchanged(SoloComm(), weights, optimizer, rejected)
    for num_ranks in (2, 3):
        for params_P in on_ranks(num_ranks, lambda comm: exchanged(comm, weights, optimizer, rejected)):
            assert torch.equal(params_P, alone)
    w, v = torch.linspace(-1, 1, 300_000).double(), torch.zeros(300_000, dtype=torch.float64)
    for number in (1, 2):
        brought = [i for i in range(5) if i not in rejected]
        total = sum(weights[i] for i in brought)
        deltas = [
            torch.randn(300_000, generator=torch.Generator().manual_seed(10 * number + i)).double() for i in range(5)
        ]
        mean = 0.5 * sum(weights[i] / total * deltas[i] for i in brought)
        v = 0.9 * v + mean
        w = w + (0.8 * mean if isinstance(optimizer, FedAvg) else v)
    assert torch.allclose(alone.double(), w, atol=1e-6)


@pytest.mark.parametrize("case", ["codecs", "median", "norm_bound", "centre"])
def test_codecs_and_rules_that_read_each_update_have_the_same_bits_on_any_number_of_ranks(case):
    section = build(ExchangeSection, CODED if case == "codecs" else {})
    rules = {"median": "median", "norm_bound": {"name": "norm_bound", "quantile": 0.5}, "centre": CENTRED}
    how = {"section": section, "aggregator": AGGREGATORS.build(rules[case], "") if case in rules else None}
    weights = (1.0, 2.5, 0.3, 4.0, 1.0)
    alone = exchanged(SoloComm(), weights, FedAvgM(), (2,), **how)
    for num_ranks in (2, 3):
        for params_P in on_ranks(num_ranks, lambda comm: exchanged(comm, weights, FedAvgM(), (2,), **how)):
            assert torch.equal(params_P, alone)


def test_a_single_update_is_added_in_one_pass_with_the_same_result():
    server = Server(FedAvg(lr=0.5), scale=math.sqrt(0.5))
    w, delta = torch.randn(1000), torch.randn(1000)
    wanted, _ = server.step(w, delta.clone(), NoState())
    assert server.gain == 0.5 * math.sqrt(0.5) and Server(FedAvgM()).gain is None
    assert torch.allclose(w + server.gain * delta, wanted, atol=1e-7)


@pytest.mark.parametrize("planned", [None, 2])
def test_more_updates_than_float32_sums_well_are_summed_in_float64(planned):
    """Also if they come in a window, unplanned."""
    weights = (1.0,) * 1000
    found = exchanged(SoloComm(), weights, FedAvg(), num=2000, planned=planned, mean=1.0)
    w = torch.linspace(-1, 1, 2000).double()
    for number in (1, 2):
        draws = [
            torch.randn(2000, generator=torch.Generator().manual_seed(10 * number + i)).double() for i in range(1000)
        ]
        w += 0.5 * (1.0 + torch.stack(draws).mean(0))
    assert torch.allclose(found.double(), w, atol=4e-7, rtol=0)
