"""The exchange: what ranks fold, send and divide, on one rank and on ranks that are threads of this process."""

import numpy as np
import pytest
import torch
from support import reference
from support.exchanges import section

from fedmpi import comm as ranks
from fedmpi.comm import SoloComm, blocks
from fedmpi.comm.threads import on_ranks
from fedmpi.errors import ConfigError, ExchangeError, FedmpiError
from fedmpi.exchange.base import LARGEST_NORM, UNIT, ExchangeContext
from fedmpi.exchange.choose import cost, make
from fedmpi.exchange.cost import Sizes
from fedmpi.server import OPTIMIZERS, Server
from fedmpi.types import Contribution


def drawn(num_silos, num_params, seed=0, dtype=torch.float32):
    """Start, deltas of many magnitudes, and unequal weights."""
    rng = np.random.default_rng(seed)
    deltas_KP = rng.normal(size=(num_silos, num_params)) * 10.0 ** rng.uniform(-12, 2, size=(num_silos, num_params))
    start_P = torch.from_numpy(rng.normal(size=num_params)).to(dtype)
    return start_P, torch.from_numpy(deltas_KP).to(dtype), rng.integers(1, 1000, size=num_silos)


def run(how, start_P, rounds, weights, owners, num_ranks, server="fedavg"):
    """Parameters and counters of every rank after `rounds`, each a mapping from silo to delta."""
    optimizer = OPTIMIZERS.build(server, "")

    def work(comm):
        params_P = start_P.clone()
        ids = [str(k) for k in range(len(owners))]
        hosted = [silo for silo, owner in zip(ids, owners, strict=True) if owner == comm.rank]
        exchange = make(how, comm, params_P, ExchangeContext(float(sum(weights)), ids, hosted))
        state = optimizer.init(exchange.shard(params_P))
        for number, cohort in enumerate(rounds, start=1):
            exchange.begin(number, sum(owners[k] == comm.rank for k in cohort))
            for k, delta_P in cohort.items():
                if owners[k] == comm.rank:
                    exchange.add(Contribution(str(k), number, float(weights[k]), delta_P.clone(), 0.0, 1, 1))
            params_P, state = exchange.finish(params_P, Server(optimizer), state)
        return params_P, (comm.bytes_up, comm.bytes_down), state

    return on_ranks(num_ranks, work)


def all_of(deltas_KP):
    return [dict(enumerate(deltas_KP))]


PLANS = [(plan, reduction) for plan in ("root", "replicated", "sharded") for reduction in ("fast", "reproducible")]
PARTITIONS = [(1, [0] * 5), (2, [0, 0, 1, 1, 1]), (3, [2, 0, 2, 1, 0]), (4, [3, 3, 3, 3, 3]), (5, [4, 2, 0, 1, 3])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_ranks", "owners"), PARTITIONS)
@pytest.mark.parametrize(("plan", "reduction"), PLANS)
def test_every_plan_is_the_reference_mean_on_every_rank(plan, reduction, num_ranks, owners, dtype):
    start_P, deltas_KP, weights = drawn(5, 1000, dtype=dtype)
    done = run(section(plan, reduction), start_P, all_of(deltas_KP), weights, owners, num_ranks)
    locals_KP = start_P.double().numpy() + deltas_KP.double().numpy()
    expected_P = start_P.double().numpy() + reference.mean_delta(start_P.double().numpy(), locals_KP, weights)
    largest_P = np.abs(locals_KP).max(0) + deltas_KP.abs().max(0).values.numpy()
    bound_P = 4 * torch.finfo(dtype).eps * largest_P + (5 / UNIT) * (1 + largest_P)
    assert (np.abs(done[0][0].double().numpy() - expected_P) <= bound_P).all()
    assert all(torch.equal(params_P, done[0][0]) for params_P, *_ in done)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ring_gives_the_same_bits_for_any_number_of_ranks_and_any_owners(seed, dtype):
    start_P, deltas_KP, weights = drawn(6, 3000, seed, dtype)
    rng = np.random.default_rng(seed)
    cohorts = [{k: deltas_KP[k] for k in rng.permutation(6)[:4].tolist()} for _ in range(3)]

    def bits(plan, num_ranks):
        owners = rng.integers(num_ranks, size=6)
        done = run(section(plan, "reproducible"), start_P, cohorts, weights, owners, num_ranks, "fedadam")
        return [params_P.numpy().tobytes() for params_P, *_ in done]

    found = {
        b
        for num_ranks in (1, 1, 2, 3, 4, 5, 5)
        for plan in ("root", "replicated", "sharded")
        for b in bits(plan, num_ranks)
    }
    assert len(found) == 1


@pytest.mark.parametrize("cohort", [range(8), (3,), (1, 6)])
def test_the_ring_is_as_near_to_the_exact_mean_as_it_says(cohort):
    _, deltas_KP, weights = drawn(8, 5000, dtype=torch.float64)
    start_P = torch.zeros(5000, dtype=torch.float64)
    done = run(section(reduction="reproducible"), start_P, [{k: deltas_KP[k] for k in cohort}], weights, [0] * 8, 1)
    kept = list(cohort)
    exact_P = np.average(deltas_KP[kept].numpy(), axis=0, weights=weights[kept])
    # Half a unit for each delta and each weight, relative to the cohort's share of all weight.
    unit = len(kept) * 0.5 / UNIT * weights.sum() / weights[kept].sum()
    bound_P = unit * (1 + np.abs(exact_P)) + 1e-15 * np.abs(deltas_KP[kept].numpy()).max(0)
    assert (np.abs(done[0][0].numpy() - exact_P) <= 1.01 * bound_P).all()


def test_the_ring_has_room_for_the_largest_deltas_that_are_let_in():
    delta_P = torch.tensor([LARGEST_NORM, -LARGEST_NORM, 1.0], dtype=torch.float64)
    done = run(
        section(reduction="reproducible"), torch.zeros(3).double(), all_of([delta_P] * 4), [1, 2, 3, 1], [0, 1, 1, 2], 3
    )
    np.testing.assert_allclose(done[2][0], delta_P, rtol=1e-12)


@pytest.mark.parametrize("server", OPTIMIZERS.members)
def test_stepping_at_the_root_and_on_every_rank_gives_the_same_bits(server):
    start_P, deltas_KP, weights = drawn(5, 500)
    rounds = [dict(enumerate(deltas_KP * 0.5**r)) for r in range(3)]
    root, everywhere = (run(section(plan), start_P, rounds, weights, [0, 1, 2, 0, 1], 3, server) for plan in
                        ("root", "replicated"))  # fmt: skip
    assert all(torch.equal(a[0], b[0]) for a, b in zip(root, everywhere, strict=True))
    assert not torch.equal(root[0][0], start_P)
    assert all(torch.equal(a, b) for a, b in zip(root[0][2], everywhere[2][2], strict=True))


@pytest.mark.parametrize(("plan", "reduction"), PLANS)
def test_the_mean_is_over_the_cohort_and_ranks_without_a_silo_in_it_add_nothing(plan, reduction):
    start_P, deltas_KP, weights = drawn(5, 300)
    rounds = [{1: deltas_KP[1], 4: deltas_KP[4]}, {0: deltas_KP[0]}, {2: deltas_KP[2], 3: deltas_KP[3]}]
    done = run(section(plan, reduction), start_P, rounds, weights, [0, 1, 0, 1, 1], 3)
    expected_P = start_P.double().numpy()
    for cohort in rounds:
        kept = list(cohort)
        expected_P = expected_P + np.average(deltas_KP[kept].double().numpy(), axis=0, weights=weights[kept])
    np.testing.assert_allclose(done[2][0], expected_P, rtol=1e-6, atol=1e-6)


def test_weights_are_what_contributions_carry_not_the_samples_they_visited():
    optimizer, params_P = OPTIMIZERS.build("fedavg", ""), torch.zeros(2)
    exchange = make(section(), SoloComm(), params_P, ExchangeContext(400.0))
    exchange.begin()
    exchange.add(Contribution("a", 1, 300.0, torch.tensor([1.0, 0.0]), 0.0, num_samples=1, num_steps=1))
    exchange.add(Contribution("b", 1, 100.0, torch.tensor([0.0, 1.0]), 0.0, num_samples=999, num_steps=99))
    assert exchange.finish(params_P, Server(optimizer), optimizer.init(params_P))[0].tolist() == [0.75, 0.25]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize(("plan", "reduction"), PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_traffic_is_what_the_ranks_counted(plan, reduction, num_ranks, dtype, monkeypatch):
    monkeypatch.setattr(ranks, "BLOCK_BYTES", 256)
    start_P, deltas_KP, weights = drawn(2, 777, dtype=dtype)
    how = section(plan, reduction)
    done = run(how, start_P, all_of(deltas_KP) * 2, weights, [0, num_ranks - 1], num_ranks)
    vectors = [int(r in (0, num_ranks - 1)) for r in range(num_ranks)]
    said = cost(how, Sizes(777, dtype.itemsize, num_ranks, vectors)).traffic
    assert (2 * said.up, 2 * said.down) == tuple(sum(counted[i] for _, counted, _ in done) for i in (0, 1))
    assert (said.up > 0) == (num_ranks > 1)


@pytest.mark.parametrize("element_bytes", [1, 4, 8, 3 * ranks.BLOCK_BYTES])
@pytest.mark.parametrize("num_elements", [0, 1, 1 << 20, (1 << 20) + 1, 5_000_001])
def test_blocks_cover_in_order_and_none_is_too_large(num_elements, element_bytes):
    num_elements = min(num_elements, 1000) if element_bytes > 8 else num_elements
    found = list(blocks(num_elements, element_bytes))
    assert [s.start for s in found] == [0, *(s.stop for s in found)][: len(found)]
    assert sum(s.stop - s.start for s in found) == num_elements
    assert all(0 < (s.stop - s.start) * element_bytes <= max(ranks.BLOCK_BYTES, element_bytes) for s in found)


def test_blocks_of_vectors_beyond_two_to_the_31_elements_are_counts_that_mpi_takes():
    num_elements = (1 << 33) + 5
    found = list(blocks(num_elements, 4))
    assert found[-1].stop == num_elements and len(found) == -(-num_elements * 4 // ranks.BLOCK_BYTES)
    assert max(s.stop - s.start for s in found) < 1 << 31


def test_a_round_to_which_nobody_contributes_is_an_error():
    with pytest.raises(ExchangeError, match="no weight arrived"):
        run(section(), torch.zeros(3), [{}], [1.0], [0], 2)


def test_verify_names_the_rank_that_holds_other_parameters():
    def work(comm):
        params_P, optimizer = torch.full((3,), float(comm.rank == 2)), OPTIMIZERS.build("fedavg", "")
        exchange = make(section(verify=True), comm, params_P, ExchangeContext(1.0))
        exchange.begin()
        exchange.add(Contribution("a", 1, 1.0, torch.ones(3), 0.0, 1, 1))
        exchange.finish(params_P, Server(optimizer), optimizer.init(params_P))

    with pytest.raises(ExchangeError, match=r"verify: the parameters differs: rank 0 against rank 2$"):
        on_ranks(3, work)


def test_every_fact_of_an_exchange_changes_its_fingerprint():
    def of(how=None, num_params=5, dtype=torch.float32, round=1, cohort=("a", "b")):
        exchange = make(how or section(), SoloComm(), torch.zeros(num_params, dtype=dtype), ExchangeContext(1.0))
        exchange.begin(round)
        return exchange.fingerprint(cohort)

    others = [of(section("root")), of(section(reduction="reproducible")), of(num_params=6), of(dtype=torch.float64)]
    others += [of(round=2), of(cohort=("b", "a")), of(cohort=("a",))]
    assert of() == of() and len({of(), *others}) == 8 and all(0 <= f < 2**32 and f % 1 == 0 for f in others)


@pytest.mark.parametrize(
    "vector", [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int16), torch.zeros(3, 2)[:, 0]]
)
def test_a_vector_that_mpi_would_sum_wrongly_is_refused(vector):
    with pytest.raises(ExchangeError, match=r"no collective sums|contiguous host memory"):
        on_ranks(2, lambda comm: comm.allreduce(vector, vector))


@pytest.mark.parametrize(("kind", "raised"), [(ConfigError, ConfigError), (ValueError, FedmpiError)])
def test_what_fails_on_one_rank_is_the_same_error_on_every_rank(kind, raised):
    def fails(comm):
        def work():
            if comm.rank == 1:
                raise kind("no such file")
            return comm.rank

        with pytest.raises(FedmpiError) as caught:
            comm.collectively(work)
        return type(caught.value), str(caught.value)

    (answer,) = set(on_ranks(3, fails))
    assert answer[0] is raised and answer[1].startswith("rank 1: ") and "no such file" in answer[1]
    assert on_ranks(3, lambda comm: comm.collectively(lambda: comm.rank)) == [0, 1, 2]
