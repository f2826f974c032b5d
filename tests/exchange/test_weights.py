"""Weights of every size: light silos beside heavy ones, very many, and counts of steps."""

import numpy as np
import pytest
import torch
from support.exchanges import section
from support.runs import config, put_back, refused, run  # noqa: F401

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.comm.threads import on_ranks
from fedmpi.errors import ExchangeError
from fedmpi.exchange import weights
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.choose import make
from fedmpi.server import FedAvg, NoState, Server
from fedmpi.types import Contribution

ALONE = {"select": {"name": "round_robin", "count": 1}}


def ended(out, heavy, reduction, **other):
    spread = {"s0": heavy, "s1": 1.0, "s2": 3.0}
    how = {**ALONE, "aggregate": {"name": "mean", "weights": spread}, "exchange": {"reduction": reduction}, **other}
    return run(config(out, 3, **how))[1].parameters.double().numpy()


@pytest.mark.parametrize("heavy", [1e3, 1e6, 1e9, 1e12, 1e13, 1e15])
def test_a_light_silo_that_is_alone_in_a_cohort_is_not_lost_in_the_ring(tmp_path, heavy):
    ring_P, fast_P = (ended(tmp_path / name, heavy, name) for name in ("reproducible", "fast"))
    assert np.abs(ring_P - fast_P).max() < 1e-6


@pytest.mark.parametrize("reduction", ["fast", "reproducible"])
def test_a_control_variate_counts_every_silo_alike_however_light_it_is(tmp_path, reduction):
    local = {"name": "scaffold", "lr": 0.1, "steps": 3, "epochs": None}
    found = []
    for heavy in (1.0, 1e15):  # alone in their cohorts, weights make no difference
        spread = {"s0": heavy, "s1": 1.0, "s2": 1.0}
        how = config(
            tmp_path / f"{heavy}", 5, local=local, aggregate={"name": "mean", "weights": spread},
            exchange={"reduction": reduction}, **ALONE,
        )  # fmt: skip
        records, done = run(how)
        assert all(record["rejected"] == [] for record in records)
        found.append(done.state.params_Q.numpy())
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_what_the_ring_has_no_room_for_is_refused_by_name(tmp_path):
    spread = {"s0": 1e12, "s1": 1.0, "s2": 1.0}
    how = config(
        tmp_path, 2, {"infinite": "s0"}, aggregate={"name": "mean", "weights": spread},
        exchange={"reduction": "reproducible"},
    )  # fmt: skip
    started = fedmpi.Run(how, comm=SoloComm())
    before_P = started.parameters.clone()
    with pytest.raises(ExchangeError, match=r"^round 1: exchange.reduction: reproducible has no room .*\(s1, s2\)"):
        list(started)
    assert torch.equal(started.parameters, before_P)
    started.close()


def test_a_heavy_silo_among_many_light_ones_has_the_room_that_it_needs(tmp_path):
    """Its delta exceeds 2^18 divided by its share of the silos, but its sum does not."""
    sizes = (8,) * 20
    spread = {f"s{i}": 1e6 if i == 0 else 1.0 for i in range(20)}
    how = config(
        tmp_path, 1, {"sizes": sizes}, local={"lr": 1e5}, aggregate={"name": "mean", "weights": spread},
        exchange={"reduction": "reproducible"},
    )  # fmt: skip
    records, _ = run(how)
    assert 2**18 / 20 < records[0]["silos"]["s0"]["delta_norm"] < 2**18 and records[0]["rejected"] == []


def mean_of(how, deltas_KP, given, num_ranks, total):
    """The parameters of every rank after one round from 0."""
    num_silos, num_params = deltas_KP.shape

    def work(comm):
        params_P = torch.zeros(num_params, dtype=deltas_KP.dtype)
        ids = [str(k) for k in range(num_silos)]
        mine = [k for k in range(num_silos) if k % num_ranks == comm.rank]
        exchange = make(how, comm, params_P, ExchangeContext(total, ids, [ids[k] for k in mine]))
        exchange.begin(1, len(mine))
        for k in mine:
            exchange.add(Contribution(ids[k], 1, given[k], deltas_KP[k].clone(), 0.0, 1, 1))
        return exchange.finish(params_P, Server(FedAvg()), NoState())[0].clone()

    return on_ranks(num_ranks, work) if num_ranks > 1 else [work(SoloComm())]


@pytest.mark.parametrize(
    ("plan", "num_ranks"), [(plan, n) for plan in ("root", "replicated", "sharded") for n in (1, 3)] + [("window", 1)]
)
def test_the_mean_over_ten_thousand_silos_is_right_in_float32(plan, num_ranks):
    draw = torch.Generator().manual_seed(0)
    deltas_KP = torch.cat([torch.ones(10_000, 1), torch.randn(10_000, 3, generator=draw) + 1], dim=1)
    found = mean_of(section(plan), deltas_KP, [1.0] * 10_000, num_ranks, 10_000.0)
    for params_P in found:
        np.testing.assert_allclose(params_P, deltas_KP.double().mean(0), rtol=3e-7)


@pytest.mark.parametrize("codec", ["identity", "bf16"])
def test_the_sum_of_two_thousand_vectors_that_travel_one_by_one_is_right_in_float32(codec):
    deltas_KP = torch.ones(2000, 2)
    how = section("sharded", scope="silo", up={"codec": codec})
    np.testing.assert_allclose(mean_of(how, deltas_KP, [1.0] * 2000, 1, 2000.0)[0], 1.0, rtol=1e-6)


@pytest.mark.parametrize("plan", ["root", "replicated", "sharded"])
def test_weights_far_beyond_one_are_added_up_alike_on_any_number_of_ranks(plan):
    """As if steps were counted: a float64 cannot hold their sum in the ring's units."""
    rng = np.random.default_rng(0)
    given = (rng.uniform(1, 1e5, size=7) * 1e3).tolist()
    deltas_KP = torch.from_numpy(rng.normal(size=(7, 50)) * 1e-3)
    found = {
        params_P.numpy().tobytes()
        for num_ranks in (1, 2, 3, 5)
        for params_P in mean_of(section(plan, "reproducible"), deltas_KP, given, num_ranks, 1.0)
    }
    assert len(found) == 1
    np.testing.assert_allclose(
        np.frombuffer(found.pop()), np.average(deltas_KP.numpy(), axis=0, weights=given), rtol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("num_ranks", [1, 3, 1000, 5000])
def test_limbs_of_weights_add_up_exactly_in_every_type(dtype, num_ranks):
    bits, num = weights.behind(num_ranks, dtype)
    share = (1 - 2**-53) / num_ranks
    limbs = torch.tensor(weights.cut(weights.counted(share), bits, num), dtype=dtype)
    total = torch.zeros(num, dtype=dtype)
    for _ in range(num_ranks):
        total += limbs
    assert weights.whole(total.tolist(), bits) == num_ranks * weights.counted(share)
