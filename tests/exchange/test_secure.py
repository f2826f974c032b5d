"""Sums under masks in the exchange's collectives: what they give, and what is on the wire."""

import itertools
import pickle
import resource

import numpy as np
import pytest
import torch
from support.exchanges import section
from support.runs import OWN, Blobs, config, put_back, refused, run  # noqa: F401

import fedmpi
from fedmpi import results
from fedmpi.changes import asked_for
from fedmpi.comm import SoloComm
from fedmpi.comm.threads import ThreadComm, on_ranks
from fedmpi.components import component
from fedmpi.errors import ConfigError, Diverged, ExchangeError, NoCohort, SiloError
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.choose import cost, make
from fedmpi.exchange.cost import Sizes
from fedmpi.exchange.dense import Replicated
from fedmpi.records import StatusTable
from fedmpi.requests import Request
from fedmpi.rounds import READY_SILO
from fedmpi.rounds.disclosure import ready_pooling
from fedmpi.secure.masks import KeyPair
from fedmpi.secure.ring import Ring
from fedmpi.secure.secagg import SecAgg
from fedmpi.secure.session import Session
from fedmpi.server import FedAvg, NoState, Server
from fedmpi.transforms import Transform
from fedmpi.types import Contribution

SHORT, LONG = 777, 150_000  # LONG: three pieces
PLANS = ("root", "replicated", "sharded")
SPREADS = ([1, 1, 1, 1, 1, 1, 1, 1], [1, 1e6, 3, 1e3, 1, 1e6, 7, 1e5])


def drawn(num, size=SHORT, norm=1.0):
    deltas_KP = torch.randn(num, size, generator=torch.Generator().manual_seed(num))
    return deltas_KP * (norm / deltas_KP.norm(dim=1, keepdim=True))


def masked(
    plan,
    deltas_KP,
    weights,
    owners,
    num_ranks,
    bits=32,
    rounds=(None,),
    bound=1.0,
    spy=None,
    num=None,
    noise=None,
    span=float("inf"),
    **how,
):
    """The change of the parameters in each round, and the bytes counted; the cohort of a round is None for all."""
    ids = [f"s{i}" for i in range(len(deltas_KP))]
    size = deltas_KP.shape[1]

    def work(comm):
        here = [silo for silo, rank in zip(ids, owners, strict=True) if rank == comm.rank]
        ring = Ring.of(bits, bound, len(ids), how.get("fragments", 1), span=span)
        secure = Session(comm, ids, owners, ring, 2, num)
        if spy is not None:
            spy(comm, secure)
        facts = ExchangeContext(float(sum(weights)), ids, here, secure=secure, rounds=len(rounds))
        params_P = torch.zeros(size)
        exchange, state, found = make(section(plan, **how), comm, params_P, facts), NoState(), []
        params_P, state = exchange.home(params_P, state)
        before = comm.counted()
        for number, cohort in enumerate(rounds, start=1):
            cohort = ids if cohort is None else [ids[i] for i in cohort]
            exchange.begin(number, sum(silo in cohort for silo in here))
            for silo in here:
                if silo in cohort:
                    i = ids.index(silo)
                    exchange.add(Contribution(silo, number, weights[i], deltas_KP[i].clone(), 0.0, 1, 1))
            exchange.meet(cohort)
            if not how:  # a step from 0 has the bits of the mean
                params_P.zero_()
            started_P = params_P.clone()
            params_P, state = exchange.finish(params_P, Server(FedAvg(), exchange.layout), state)
            found.append(params_P - started_P)
        exchange.settle()
        exchange.leave()
        return found, np.subtract(comm.counted(), before), ring

    return on_ranks(num_ranks, work)


def mean(deltas_KP, weights, cohort=None):
    kept = list(range(len(weights))) if cohort is None else list(cohort)
    return torch.from_numpy(np.average(deltas_KP[kept].double().numpy(), axis=0, weights=np.array(weights)[kept]))


def close(found_P, deltas_KP, weights, ring, cohort=None):
    """Within the stated error, and the rounding of float32."""
    exact_P = mean(deltas_KP, weights, cohort)
    num = len(weights) if cohort is None else len(cohort)
    share = 1.0 if cohort is None else sum(weights[i] for i in cohort) / sum(weights)
    bound = ring.error(num, share) + 3e-7 * float(exact_P.abs().max())
    assert float((found_P.double() - exact_P).abs().max()) <= bound
    assert float(found_P.abs().max()) > 100 * bound


@pytest.mark.parametrize("weights", SPREADS)
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("plan", PLANS)
def test_the_masked_mean_is_the_plain_one_to_the_quantisation(plan, bits, weights):
    for num, num_ranks in ((2, 2), (3, 3), (4, 2), (8, 4), (8, 3)):
        deltas_KP, owners = drawn(num), [i % num_ranks for i in range(num)]
        done = masked(plan, deltas_KP, weights[:num], owners, num_ranks, bits)
        for found, _, ring in done:
            close(found[0], deltas_KP, weights[:num], ring)


@pytest.mark.parametrize("weights", SPREADS)
@pytest.mark.parametrize("plan", PLANS)
def test_with_16_bits_the_masked_mean_is_the_plain_one_of_cut_updates(plan, weights):
    for num, num_ranks in ((2, 2), (4, 2), (8, 3)):
        deltas_KP, owners = drawn(num), [i % num_ranks for i in range(num)]
        deltas_KP[1, :3] = torch.tensor([0.9, -0.9, 0.5])  # beyond the span
        cut_KP = deltas_KP.clamp(-0.2, 0.2)
        done = masked(plan, deltas_KP, weights[:num], owners, num_ranks, 16, span=0.2)
        for found, _, ring in done:
            assert (ring.unit, ring.span) == (2.0**15, 0.2)
            off_P = found[0].double() - mean(cut_KP, weights[:num])
            assert float(off_P.abs().max()) < ring.error(num) + 1e-7
            assert abs(float(off_P.mean())) < 4 * num**0.5 / ring.unit / SHORT**0.5  # right on average
            assert float((found[0].double() - mean(deltas_KP, weights[:num])).abs().max()) > 10 * ring.error(num)


def test_collectives_do_not_sum_16_bit_words():
    """Open MPI's sums of them saturate."""
    for way in (SoloComm().allreduce, SoloComm().reduce):
        with pytest.raises(ExchangeError, match="no collective sums"):
            way(torch.zeros(2, dtype=torch.int16), torch.zeros(2, dtype=torch.int16))


def test_with_16_bits_a_coordinate_below_one_step_is_kept_on_average():
    deltas_KP = torch.full((2, LONG), 0.3 / 2**13)  # 0.3 steps for a silo of weight 1/2: 0.15
    found_P = masked("replicated", deltas_KP, [1, 1], [0, 1], 2, 16, span=1.0)[0][0][0]
    assert float(found_P.mean()) == pytest.approx(0.3 / 2**13, rel=0.02) and len(found_P.unique()) == 3


@pytest.mark.parametrize("plan", PLANS)
def test_a_long_vector_in_pieces_and_a_rank_without_silos(plan):
    deltas_KP = drawn(4, LONG)
    for found, _, ring in masked(plan, deltas_KP, [1, 2, 3, 4], [1, 1, 3, 2], 4):
        close(found[0], deltas_KP, [1, 2, 3, 4], ring)


@pytest.mark.parametrize("plan", PLANS)
def test_whoever_is_left_of_a_cohort_has_the_exact_sum_of_those(plan):
    """Every set of two silos or more, one after the other, with one set-up."""
    cohorts = [some for size in (2, 3, 4, 5) for some in itertools.combinations(range(5), size)]
    deltas_KP, weights = drawn(5), [1, 2, 3, 4, 5]
    for found, _, ring in masked(plan, deltas_KP, weights, [0, 0, 1, 2, 2], 3, rounds=cohorts):
        for got_P, cohort in zip(found, cohorts, strict=True):
            close(got_P, deltas_KP, weights, ring, cohort)


def test_the_graph_of_many_silos_gives_the_same_sums():
    deltas_KP, weights = drawn(20, 100), [1.0] * 20
    for num in (None, 8):
        for found, _, ring in masked("sharded", deltas_KP, weights, [i % 3 for i in range(20)], 3, num=num):
            close(found[0], deltas_KP, weights, ring)


@pytest.mark.parametrize("plan", PLANS)
def test_sums_have_the_same_bits_on_any_number_of_ranks(plan):
    deltas_KP, weights = drawn(6), [1, 2, 3, 4, 5, 6]
    bits = set()
    for num_ranks in (1, 2, 3, 6):
        owners = [i % num_ranks for i in range(6)]
        bits |= {done[0][0].numpy().tobytes() for done in masked(plan, deltas_KP, weights, owners, num_ranks)}
    assert len(bits) == 1


@pytest.mark.parametrize("plan", PLANS)
def test_the_largest_updates_fit_even_if_all_point_the_same_way(plan):
    for bits in (32, 64):
        for sign in (1.0, -1.0):
            deltas_KP = torch.zeros(8, 50)
            deltas_KP[:, 7] = sign * 4.0  # what the checks let in at most: 4 C
            done = masked(plan, deltas_KP, [1.0] * 8, [0, 1] * 4, 2, bits)
            assert done[0][0][0][7] == sign * 4.0


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("how", [{"overlap": True}, {"fragments": 3}, {"fragments": 2, "overlap": True}])
def test_overlap_and_fragments_give_what_they_give_without_masks(plan, how):
    deltas_KP, weights = drawn(4), [1, 2, 3, 4]
    rounds = [None] * 5
    with_masks = masked(plan, deltas_KP, weights, [0, 1, 1, 2], 3, rounds=rounds, **how)[0][0]

    def plain(comm):
        ids = [f"s{i}" for i in range(4)]
        params_P = torch.zeros(SHORT)
        facts = ExchangeContext(10.0, ids, [], rounds=5)
        exchange, state, found = make(section(plan, **how), comm, params_P, facts), NoState(), []
        params_P, state = exchange.home(params_P, state)
        for number in range(1, 6):
            exchange.begin(number, 4)
            for i, silo in enumerate(ids):
                exchange.add(Contribution(silo, number, weights[i], deltas_KP[i].clone(), 0.0, 1, 1))
            started_P = params_P.clone()
            params_P, state = exchange.finish(params_P, Server(FedAvg(), exchange.layout), state)
            found.append(params_P - started_P)
        exchange.settle()
        exchange.leave()
        return found

    for one, two in zip(with_masks, on_ranks(1, plain)[0], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-7)
    assert any(change.abs().max() > 0.01 for change in with_masks)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("plan", PLANS)
def test_bytes_are_what_the_ranks_counted(plan, bits, num_ranks):
    done = masked(plan, drawn(3), [1.0] * 3, [i % num_ranks for i in range(3)], num_ranks, bits)
    said = cost(section(plan), Sizes(SHORT, 4, num_ranks, secure_bits=bits)).traffic
    assert (said.up, said.down) == tuple(sum(counted[i] for _, counted, _ in done) for i in (0, 1))


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("plan", PLANS)
def test_compiled_passes_change_no_bit(plan, bits, monkeypatch):
    deltas_KP, weights, span = drawn(3, LONG), [1, 2, 3], 0.01
    before = masked(plan, deltas_KP, weights, [0, 1, 2], 3, bits, span=span)[0][0][0]
    monkeypatch.setattr("fedmpi.flat.COMPILED", 1)
    assert torch.equal(before, masked(plan, deltas_KP, weights, [0, 1, 2], 3, bits, span=span)[0][0][0])
    assert torch.equal(
        before, masked(plan, deltas_KP, weights, [0, 1, 1], 2, bits, span=span)[0][0][0]
    )  # one folds two


# ------------------------------------------------------------ what is on the wire


class Wire:
    """What every rank passes to collectives for vectors, as unsigned words."""

    def __init__(self, monkeypatch):
        self.sent = {}
        begin = ThreadComm._begin

        def listening(comm, lane, kind, value, land):
            if kind in ("reduce", "allreduce", "alltoall"):
                parts = value if isinstance(value, list) else [value]
                self.sent.setdefault(comm.rank, []).extend(part.copy() for part in parts if part.dtype.kind == "u")
            return begin(comm, lane, kind, value, land)

        monkeypatch.setattr(ThreadComm, "_begin", listening)

    def words(self, rank):
        return np.concatenate([part.view(np.uint8) for part in self.sent[rank]])


def chi_square(numbers, num=256):
    """Of the values that bytes (or numbers below `num`) have, in standard deviations from its mean."""
    counts = np.bincount(numbers, minlength=num)
    expected = counts.sum() / num
    return float(((counts - expected) ** 2 / expected).sum() - (num - 1)) / (2 * (num - 1)) ** 0.5


DELTAS = {
    "nothing": torch.zeros(3, LONG),
    "one_value": torch.full((3, LONG), LONG**-0.5),
    "noise": drawn(3, LONG),
}


@pytest.mark.parametrize("what", DELTAS)
@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("plan", PLANS)
def test_what_a_rank_sends_is_uniform_whatever_it_holds(plan, bits, what, monkeypatch):
    wire = Wire(monkeypatch)
    masked(plan, DELTAS[what], [1, 2, 3], [0, 1, 2], 3, bits)
    for rank in range(3):
        assert len(wire.words(rank)) > bits * LONG // 22
        assert abs(chi_square(wire.words(rank))) < 6
    one, two = (np.concatenate([part.view(np.uint16) for part in wire.sent[rank]]).astype(float) for rank in (0, 1))
    assert abs(np.corrcoef(one[: len(two)], two[: len(one)])[0, 1]) < 6 / min(len(one), len(two)) ** 0.5


@pytest.mark.parametrize("words", [1e5, 1e7])
def test_ten_million_words_that_a_rank_sends_are_uniform(words, monkeypatch):
    """Every bit, every byte at each place of a word, and neighbouring bytes, of updates that are all equal."""
    wire, size = Wire(monkeypatch), int(words)
    masked("replicated", torch.full((2, size), size**-0.5), [1, 2], [0, 1], 2)
    sent = np.concatenate([part.view(np.uint32) for part in wire.sent[1]])
    assert len(sent) > size
    places = sent.view(np.uint8).reshape(-1, 4)
    assert all(abs(chi_square(places[:, place])) < 6 for place in range(4))
    assert abs(chi_square(sent.view(np.uint16), 1 << 16)) < 6
    ones = np.array([np.count_nonzero(sent & np.uint32(1 << bit)) for bit in range(32)])
    assert (np.abs(ones - len(sent) / 2) < 6 * len(sent) ** 0.5 / 2).all()
    later = sent[1:].astype(float) - 2.0**31
    assert abs(float(np.dot(later, sent[:-1] - 2.0**31)) / float(np.dot(later, later))) < 6 / len(sent) ** 0.5


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("plan", PLANS)
def test_no_part_of_a_stream_is_used_twice(plan, bits, monkeypatch):
    """If it were, the difference of two pieces would be that of the update's."""
    monkeypatch.setattr("fedmpi.comm.base.BLOCK_BYTES", 1 << 16)
    wire = Wire(monkeypatch)
    masked(plan, DELTAS["nothing"], [1, 2, 3], [0, 1, 2], 3, bits, rounds=[None] * 2)
    for rank in range(3):
        words = np.concatenate([part[: len(part) // 2 * 2].view(np.uint64) for part in wire.sent[rank]])
        assert len(np.unique(words)) == len(words) > LONG // 2


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_update_looks_different_in_every_round(plan, monkeypatch):
    wire = Wire(monkeypatch)
    masked(plan, drawn(2), [1, 1], [0, 1], 2, rounds=[None] * 2)
    sent = wire.sent[1]
    first, second = (np.concatenate(half) for half in (sent[: len(sent) // 2], sent[len(sent) // 2 :]))
    assert (first == second).sum() <= 8  # 777 words: equal by chance, once in 5 million


@pytest.mark.parametrize("plan", PLANS)
def test_masks_that_do_not_cancel_raise_and_give_no_number(plan):
    """Rank 1 has lost count of the sums: the round fails."""

    def spy(comm, secure):
        if comm.rank == 1:
            secure._counts["vector"] = 7

    with pytest.raises(ExchangeError, match="do not cancel"):
        masked(plan, drawn(3), [1, 1, 1], [0, 1, 2], 3, spy=spy)


@pytest.mark.parametrize("plan", PLANS)
def test_without_masks_both_tests_fail(plan, monkeypatch):
    """The test of uniformity can fail: without masks it does."""
    wire = Wire(monkeypatch)
    masked(plan, DELTAS["one_value"], [1, 2, 3], [0, 1, 2], 3, spy=lambda comm, secure: secure._secrets.clear())
    assert all(chi_square(wire.words(rank)) > 1e4 for rank in range(3))


def test_ranks_that_disagree_about_the_sum_get_an_error_and_no_number():
    def work(comm):
        ids = ["a", "b", "c"]
        secure = Session(comm, ids, [0, 1, 2], Ring.of(32, 1.0, 3), 2)
        params_P = torch.zeros(5)
        exchange = make(
            section("replicated"), comm, params_P, ExchangeContext(3.0, ids, [ids[comm.rank]], secure=secure)
        )
        exchange.begin(1, 1)
        exchange.add(Contribution(ids[comm.rank], 1, 1.0, torch.ones(5), 0.0, 1, 1))
        exchange.meet(ids if comm.rank else ids[:2])
        exchange.finish(params_P, Server(FedAvg()), NoState())

    with pytest.raises(ExchangeError, match="do not cancel"):
        on_ranks(3, work)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("plan", PLANS)
def test_limbs_of_the_weight_say_no_more_than_its_sum(plan, bits, monkeypatch):
    """Sums of limbs that were masked one by one are the same with any keys: more equations than one for the weights."""
    seen, allreduce, reduce = set(), ThreadComm.allreduce, ThreadComm.reduce

    def listening(way):
        def listen(comm, source, target):
            way(comm, source, target)
            if comm.rank == 0 and len(target) < 20:
                seen.add(tuple(target.tolist()))

        return listen

    monkeypatch.setattr(ThreadComm, "allreduce", listening(allreduce))
    monkeypatch.setattr(ThreadComm, "reduce", listening(reduce))
    for _ in range(8):
        done = masked(plan, drawn(3), [0.7, 0.3, 1.9], [0, 1, 2], 3, bits)
    if bits > 16:
        close(done[0][0][0], drawn(3), [0.7, 0.3, 1.9], done[0][2])
    assert len({limbs[-1] for limbs in seen}) == 1 and len(seen) > 1


# ------------------------------------------------------------ figures


TAKEN = {"taken": 1, "samples": 8, "steps": 2, "normalizer": 2, "weight": 1, "sent": 1, "targets": 4}


def figures(num_ranks, secure, losses):
    """The sums of a table of one silo per rank, and what each rank passes to the collective."""

    def work(comm):
        session = Session(comm, [f"s{i}" for i in range(num_ranks)], range(num_ranks), Ring.of(32, 1.0, 4), 2)
        cover = session if secure else None
        pooling = ready_pooling("pooled", masked=secure)
        board = StatusTable(num_ranks, ("status",), num_ranks, READY_SILO, 3, pooling, cover)
        board.set_silo(comm.rank, **TAKEN, loss=losses[comm.rank], norm=0.1 * comm.rank)
        board.counts[:] = comm.rank, 1, 2**40
        passed = []

        def over(values):
            passed.append(values.copy())
            return comm.share(values)

        board.share(over)
        assert board.num_bytes == sum(part.nbytes for part in passed) and len(passed) == 1 + secure
        return {name: board.sum(name) for name in pooling.sums}, board.counts.tolist(), board, np.concatenate(passed)

    return on_ranks(num_ranks, work)


def test_figures_under_masks_are_those_without():
    losses = [0.7, 1e-9, 3.5e30, 0.1]
    for num_ranks in (1, 2, 4):
        plain, hidden = figures(num_ranks, False, losses)[0], figures(num_ranks, True, losses)[0]
        assert plain[0].keys() - hidden[0].keys() == {"norm"}
        for name, value in hidden[0].items():
            assert value == pytest.approx(plain[0][name], rel=1e-15), name
        assert plain[1] == hidden[1]
        assert hidden[2].silo("taken").tolist() == [1] * num_ranks and np.isnan(hidden[2].silo("loss")).all()


def test_a_figure_that_is_not_finite_makes_its_sum_nan_and_no_other():
    sums = figures(3, True, [0.5, 1e300, 0.1])[1][0]
    assert np.isnan(sums["loss"]) and sums["square"] == pytest.approx(0.05)


def test_a_figure_of_one_rank_is_nowhere_in_what_it_passes_on():
    first, second = (figures(2, True, [0.7, 0.3])[0][3] for _ in range(2))
    hidden = slice(2 + 2, None)  # behind the ranks' rows and `taken`
    assert (first[hidden] == second[hidden]).sum() == 0  # new keys, other words
    words = np.concatenate([figures(2, True, [0.7, 0.3])[0][3][hidden] for _ in range(60)]).astype(np.uint64)
    low = words.view(np.uint8).reshape(-1, 9, 8)  # 8 digits of 28 bits, and 40 bits
    assert abs(chi_square(low[:, :8, :3].reshape(-1))) < 6 and abs(chi_square(low[:, 8, :5].reshape(-1))) < 6


def test_digits_of_a_sum_say_no_more_than_the_sum():
    """Whatever the summands are, even their signs: here the sums of digits are those of 2^224 in two parts."""

    def work(comm):
        session, seen = Session(comm, ["a", "b"], [0, 1], Ring.of(32, 1.0, 2), 2), set()
        for value in (0.0, 0.75, -5.0, 2.0**-40, 3e38):
            summed = comm.share(session.on(np.array([value if comm.rank else -value])))
            assert session.off(summed).tolist() == [0.0]
            seen.add(tuple(summed[:8].tolist()))
        return seen

    (seen,) = on_ranks(2, work)[0]
    assert seen == (2.0**28, *[2.0**28 - 1] * 7)


def test_figures_that_may_not_be_seen_stay_where_they_are():
    """Only what is shown leaves a rank; the next sums are right again."""

    def work(comm):
        session = Session(comm, ["a", "b", "c"], [0, 1, 2], Ring.of(32, 1.0, 3), 2)
        board = StatusTable(3, ("status",), 3, READY_SILO, 1, ready_pooling("pooled", masked=True), session)
        found = []
        for status in (1, 0):
            board.clear()
            board.set_rank(comm.rank, status=comm.rank * status)
            board.set_silo(comm.rank, **TAKEN, loss=0.7 + comm.rank)
            board.counts[:] = 5
            passed = []

            def over(values, passed=passed):
                passed.append(values.copy())
                return comm.share(values)

            board.share(over, lambda: board.rank("status").max() == 0)
            found.append((board.sum("loss"), board.counts.tolist(), board.silo("taken").tolist(), len(passed)))
            if status:
                assert {*passed[0].tolist()} <= {0.0, 1.0, 2.0} and np.isnan(board.silo("loss")).all()
        return found

    for refused_, allowed in on_ranks(3, work):
        assert np.isnan(refused_[0]) and refused_[1:] == ([0.0], [1, 1, 1], 1)
        assert allowed == (pytest.approx(4 * (0.7 + 1.7 + 2.7)), [15.0], [1, 1, 1], 2)


def test_figures_whose_masks_do_not_cancel_raise():
    def work(comm):
        session = Session(comm, ["a", "b"], [0, 1], Ring.of(32, 1.0, 2), 2)
        session._counts["figures"] = comm.rank
        session.off(comm.share(session.on(np.ones(3))))

    with pytest.raises(ExchangeError, match="do not cancel"):
        on_ranks(2, work)


# ------------------------------------------------------------ who may be summed


def test_a_sum_of_too_few_or_cut_off_silos_is_not_revealed():
    def work(comm):
        ids = [f"s{i}" for i in range(16)]
        whole = Session(comm, ids, [i % 4 for i in range(16)], Ring.of(32, 1.0, 16), 3)
        ring = Session(comm, ids, [i % 16 for i in range(16)], Ring.of(32, 1.0, 16), 2, num=4)
        circle = {i: set(some) for i, some in enumerate(ring._near)}
        far = next(j for j in range(16) if j not in circle[0] | {0})
        return whole.objection(ids[:2]), whole.objection(ids[:3]), ring.objection([ids[0], ids[far]])

    few, enough, apart = on_ranks(16, work)[0]
    assert "2 updates are usable" in few and not enough and "not connected" in apart


def test_no_two_sums_share_a_stream():
    def work(comm):
        session = Session(comm, ["a", "b"], [0, 1], Ring.of(64, 1.0, 2), 2)
        found = []
        for what in ("vector", "weight", "figures") * 3:
            masks = session.masks(what, ["a", "b"], 64)
            masks.add(words := np.zeros(4, np.uint64))
            found.append(words if comm.rank == 0 else -words)
        return found

    one, two = on_ranks(2, work)
    assert len({words.tobytes() for words in one}) == 9
    assert all((a == b).all() for a, b in zip(one, two, strict=True))


def test_what_a_rank_can_subtract_is_said():
    def alone(owners, threshold):
        ids = [f"s{i}" for i in range(len(owners))]
        return on_ranks(3, lambda comm: Session(comm, ids, owners, Ring.of(32, 1.0, 5), threshold).alone())[0]

    assert "may be one silo" in alone([0, 1], 2) and "take secure.threshold: 4" in alone([0, 0, 1, 2, 2], 3)
    assert not alone([0, 1, 2], 3) and not alone([0, 0, 1, 2, 2], 4)
    assert "sees every update" in alone([1, 1, 1], 3)


def test_keys_do_not_leave_their_rank(monkeypatch):
    """All that set-up and rounds pass to collectives holds no secret of any rank."""
    passed, secrets = [], []
    begin = ThreadComm._begin

    def listening(comm, lane, kind, value, land):
        values = value if isinstance(value, list) else [value]
        passed.extend(v.tobytes() if isinstance(v, np.ndarray) else repr(v).encode() + bytes(v) if
                      isinstance(v, bytes) else repr(v).encode() for v in values)  # fmt: skip
        return begin(comm, lane, kind, value, land)

    made = KeyPair.__init__

    def noted(pair, private=None):
        made(pair, private)
        secrets.append(pair.private_bytes())

    monkeypatch.setattr(ThreadComm, "_begin", listening)
    monkeypatch.setattr(KeyPair, "__init__", noted)

    def spy(comm, secure):
        secrets.extend(secure._secrets.values())
        assert not any(secret.hex() in repr(secure) for secret in secure._secrets.values())
        with pytest.raises(TypeError, match="stay in memory"):
            pickle.dumps(secure)

    masked("sharded", drawn(3), [1, 2, 3], [0, 1, 2], 3, spy=spy)
    whole = b"".join(passed)
    assert len(secrets) == 3 + 6 and len(whole) > 3 * 4 * SHORT
    assert not any(secret in whole or secret.hex().encode() in whole for secret in secrets)


# ------------------------------------------------------------ configurations


class Own(Replicated):
    """A user's plan, whose `finish` might send anything."""


@component
class Picky(Transform):
    """Accepts the updates of the first silos."""

    num: int

    def on_silo(self, update, state, about):
        return int(update.silo[1:]) < self.num


CLIP = {"updates": [{"name": "clip", "norm": 1.0}]}
REFUSED = {
    "robust": ({"aggregate": "median", "exchange": {"scope": "silo"}}, "sends each silo's update by itself; take rank"),
    "median": (
        {"aggregate": {"name": "krum", "hostile": 0}},
        "aggregate krum reads single updates, and only their sum is seen; take mean",
    ),
    "topk": ({"exchange": {"up": {"codec": "topk"}}}, "codec's payloads do not add up"),
    "regions": ({"exchange": {"regions": {}}}, "leads it; leave it out"),
    "shared": ({"exchange": {"plan": "shared_memory"}}, "does not sum under masks"),
    "own": ({"exchange": {"plan": "exchange.test_secure:Own"}}, "Own does not sum under masks"),
    "measure": ({"exchange": {"plan": "measure"}}, "without masks"),
    "buffered": ({"engine": {"name": "buffered", "size": 2}}, "one by one; take engine: synchronous"),
    "privacy": (
        {"privacy": {"name": "silo", "sigma": 1.0, "clip": 1.0, "delta": 1e-5, "quantile": 0.5}, "updates": []},
        "sized for equal weights",
    ),
    "deadline": ({"engine": {"name": "synchronous", "policy": "deadline"}}, "differ by one silo"),
    "continue": ({"on_failure": "continue"}, "differ by one silo"),
    "kept": ({"on_failure": "adopt", "local": {"name": "scaffold"}}, "copies vectors that silos keep"),
    "parts": ({"on_failure": "respawn", "exchange": {"fragments": 2}}, "copies vectors that silos keep"),
    "personal": (
        {"on_failure": "adopt", "model": OWN + "Normed", "exchange": {"parameters": ["*", "!head.*"]}},
        "copies 'head.weight' to other ranks",
    ),
    "cohort": ({"disclose": "cohort"}, "disclose: cohort asks for more; leave disclose out"),
    "silo": ({"disclose": "silo"}, "only sums are told, and disclose: silo asks for more; leave disclose out"),
    "norms": ({"select": {"name": "norm", "count": 2}}, "take another, or leave secure out"),
    "gram": ({"records": {"gram": True}}, "single updates"),
    "few_bits": ({"updates": [], "secure": {"name": "secagg", "bits": 16}}, "16 needs `updates: clip`"),
    "few_noise": (
        {
            "secure": {"name": "secagg", "bits": 16},
            "privacy": {"name": "silo", "sigma": 1.0, "clip": 1.0, "delta": 1e-5},
            "updates": [],
            "aggregate": {"name": "mean", "weights": "uniform"},
        },
        "16 rounds at random",
    ),
    "largest": ({"secure": {"name": "secagg", "largest": 0.1}}, "goes with bits: 16"),
    "few_parts": ({"secure": {"name": "secagg", "bits": 16}, "exchange": {"fragments": 2}}, "fragments: 1"),
    "few_control": ({"secure": {"name": "secagg", "bits": 16}, "local": {"name": "scaffold"}}, "would cut control"),
    "bits": ({"updates": [], "secure": {"name": "secagg", "bits": 32}}, "needs `updates: clip`"),
    "noise": (
        {"updates": [*CLIP["updates"], {"name": "noise", "sigma": 0.1}], "secure": {"name": "secagg", "bits": 32}},
        "after all noise",
    ),
    "odd": ({"secure": {"name": "secagg", "neighbours": 3}}, "secure.neighbours: input should be a multiple of 2"),
    "threshold": ({"secure": {"name": "secagg", "threshold": 4}}, "a cohort may be 3"),
    "lone": ({"select": {"name": "uniform", "count": 1}}, "secure implies disclose: pooled, but a cohort may be"),
    "adaptive": ({"updates": [{"name": "clip", "norm": 1.0, "quantile": 0.5}]}, "reads the norm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_reads_single_silos_is_refused_in_one_line(tmp_path, name):
    other, why = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        run(config(tmp_path, **({"secure": "secagg"} | CLIP | other)))
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_on_one_rank_a_secure_run_is_the_pooled_one_to_the_quantisation(tmp_path):
    plain, one = run(config(tmp_path / "plain", disclose="pooled", **CLIP))
    for bits in (32, 64):
        hidden, two = run(config(tmp_path / str(bits), secure={"name": "secagg", "bits": bits}, **CLIP))
        torch.testing.assert_close(one.parameters, two.parameters, rtol=0, atol=1e-6)
        for before, after in zip(plain, hidden, strict=True):
            for key in ("train_loss", "loss", "accuracy"):
                assert after[key] == pytest.approx(before[key], rel=1e-4), key
            assert 0 < after["delta_norm"] <= 1.0
            assert before.keys() == after.keys()


def test_a_round_with_too_few_usable_updates_is_given_up(tmp_path):
    how = {"data": {"infinite": "s1"}, **CLIP}
    run(config(tmp_path / "two", 2, secure={"name": "secagg", "threshold": 2}, **how))
    with pytest.raises(NoCohort, match=r"2 updates are usable.*rejected \(s1\): not finite.*smaller secure.threshold"):
        run(config(tmp_path / "three", 2, secure={"name": "secagg", "threshold": 3}, **how))


@pytest.fixture
def uncovered(monkeypatch):
    """Sums of figures that were uncovered."""
    kept, off = [], Session.off

    def noted(session, summed):
        kept.append(off(session, summed))
        return kept[-1]

    monkeypatch.setattr(Session, "off", noted)
    return kept


def test_no_figures_are_seen_of_too_few_updates(tmp_path, uncovered):
    for num in (2, 1, 0):  # accepted updates
        picky = {"name": "exchange.test_secure:Picky", "num": num}
        how = {"updates": [*CLIP["updates"], picky], "secure": {"name": "secagg", "threshold": 3}}
        with pytest.raises((NoCohort, Diverged)):
            run(config(tmp_path / str(num), 2, **how))
    assert not uncovered


@pytest.mark.parametrize("at", ["train", "evaluate"])
def test_no_figures_are_seen_of_a_round_in_which_a_silo_fails(tmp_path, uncovered, monkeypatch, at):
    """The repeated round would show how the sums differ."""

    def fails(*arguments):
        raise RuntimeError("no luck")

    where = {"train": "training.check_contribution", "evaluate": "evaluation.evaluate_silo"}[at]
    monkeypatch.setattr(f"fedmpi.rounds.{where}", fails)
    with pytest.raises(SiloError, match="no luck"):
        run(config(tmp_path, 2, secure="secagg", **CLIP))
    assert len(uncovered) == (at == "evaluate")  # those of training


def test_a_loss_that_is_not_finite_hides_those_that_may_be_of_one_silo():
    sums = figures(3, True, [0.5, np.inf, np.nan])[1][0]
    assert np.isnan(sums["loss"]) and (sums["not_finite"], sums["targets"]) == (2, 4)


@component
class PartlyTested(Blobs):
    """Test data at the first silos."""

    num_tested: int = 2

    def opened(self, index, name):
        data = super().opened(index, name)
        num = 4 * (index < self.num_tested)
        return data._replace(x_test=data.x_test[:num], y_test=data.y_test[:num])


def test_test_figures_of_too_few_silos_are_refused(tmp_path):
    for num in (0, 1, 2, 3):
        how = {"data": {"name": "exchange.test_secure:PartlyTested", "num_tested": num}, "secure": "secagg", **CLIP}
        how = config(tmp_path / str(num), 1, **how)
        if num in (0, 3):
            run(how)
            continue
        with pytest.raises(ConfigError, match=f"^secure: {num} of the silos have test data, and secure.threshold is 3"):
            run(how)


def test_a_silo_with_nearly_all_of_the_weight_is_named(tmp_path, caplog):
    run(config(tmp_path / "few", 1, {"sizes": [30, 30, 30]}, secure="secagg", **CLIP))
    assert "of the weight of all" not in caplog.text
    run(config(tmp_path / "one", 1, {"sizes": [20, 20, 160]}, secure="secagg", **CLIP))
    assert "secure: silo 's2' has 80% of the weight of all" in caplog.text


def test_a_process_with_keys_leaves_no_core_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        run(config(tmp_path, 1, secure="secagg", **CLIP))
        assert resource.getrlimit(resource.RLIMIT_CORE) == (0, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


def test_fewer_neighbours_than_are_safe_give_a_warning():
    assert "4 are fewer than 15" in SecAgg(neighbours=4).sparse(16)
    assert SecAgg(neighbours=4).sparse(5) == SecAgg().sparse(100) == SecAgg(neighbours=60).sparse(100) == ""


def test_a_run_keeps_its_silos(tmp_path):
    """When its members are set anew, and when it is resumed."""
    how = config(tmp_path, 2, secure="secagg", **CLIP)
    with fedmpi.Run(config(tmp_path, 1, secure="secagg", **CLIP), comm=SoloComm()) as one:
        list(one)
        fewer = one.membership.without("s1")
        with pytest.raises(ConfigError, match=r"^secure: a run keeps its silos"):
            one.rebuild(fewer)
        assert len(one.membership.ids) == 3
    with pytest.raises(ConfigError, match=r"^secure: a resumed run keeps its silos"):
        fedmpi.Run(how, comm=SoloComm(), membership=fewer)
    assert [record["round"] for record in run(how)[0]] == [2]


def test_figures_of_a_checkpoint_do_not_leave_a_rank_without_masks(tmp_path):
    run(config(tmp_path, 1, secure="secagg", **CLIP))

    def evaluate(comm):
        with pytest.raises(ConfigError) as caught:
            results.evaluate(tmp_path, comm=comm)
        return str(caught.value)

    told = on_ranks(2, evaluate)
    assert all(one.startswith("secure: a rank's figures would leave it without masks") for one in told)


def test_silos_neither_join_nor_leave(tmp_path):
    out = tmp_path / "run"
    how = config(out, 2, secure="secagg", **CLIP)
    with fedmpi.Run(how, comm=SoloComm()) as one, pytest.raises(ConfigError, match="neither join nor leave"):
        asked_for(Request("0", "retire", "s1"), one._spec, one.federation)
