"""One protocol for state: whatever has `state` and `restore` survives a checkpoint, also on other ranks and plans."""

import itertools

import numpy as np
import pytest
import torch
from support.exchanges import section
from support.runs import config, put_back, run  # noqa: F401

import fedmpi
from fedmpi import checkpoint, keeper
from fedmpi.comm import SoloComm
from fedmpi.comm.threads import on_ranks
from fedmpi.errors import ConfigError, FedmpiError
from fedmpi.exchange import chunks
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.choose import make
from fedmpi.state import (
    Arrays,
    Holders,
    OfSilos,
    StateTensor,
    Vectors,
    gathered,
    handed_over,
    scattered,
    under,
    within,
)

P = 20_000  # five pieces, the last one short
CPU = torch.device("cpu")
NAMES = ["", "/", "#", "a/b", "exchange", "é\ud800", "\0", "x" * 999]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(chunks, "SHORTEST", 4096)


# One holder for each placement, as a newcomer would write it.


class Privacy:
    """A privacy accountant: only rank 0 spends."""

    def __init__(self, rank):
        self.spent = torch.zeros(2, dtype=torch.float64) if rank == 0 else None

    def state(self):
        return [StateTensor(("spent",), self.spent, "root")] if self.spent is not None else []

    def restore(self, stored):
        for one in stored:
            self.spent = one.tensor


class Centre:
    """An aggregator's vector, divided like the server's state."""

    def __init__(self, exchange, length):
        self.part = exchange.shard(torch.zeros(length)).clone()

    def state(self):
        return [StateTensor(("centre",), self.part, "sharded")]

    def restore(self, stored):
        """Does nothing: the tensor was filled in place."""


class Quantile:
    """A clip that follows the norms: equal on all ranks, with a history that grows."""

    def __init__(self):
        self.norm, self.history = torch.tensor(1.0), []

    def state(self):
        history = torch.tensor(self.history, dtype=torch.float64)
        return [StateTensor(("norm",), self.norm), StateTensor(("history",), history, grows=True)]

    def restore(self, stored):
        (_, self.norm, *_), (_, history, *_) = stored
        self.history = history.tolist()


class Momenta:
    """State of every silo, with a shape of its own."""

    def __init__(self, silos):
        self.of = {silo: None for silo in silos}

    def state(self):
        return [StateTensor(("m",), m, "per_silo", silo) for silo, m in self.of.items() if m is not None]

    def restore(self, stored):
        self.of |= {one.silo: one.tensor for one in stored}


SILOS = ["a", "b", "c/#", ""]


def hosted(comm):
    """The silos of this rank; with three ranks one has none."""
    return [silo for k, silo in enumerate(SILOS) if (2 * k) % comm.size == comm.rank]


def federation(comm, plan, length=P):
    """An exchange, and new holders of every placement."""
    facts = ExchangeContext(1.0, SILOS, hosted(comm))
    exchange = make(section(plan), comm, torch.zeros(P), facts)
    found = {name: Quantile() for name in NAMES}
    return exchange, Holders(
        found, privacy=Privacy(comm.rank), centre=Centre(exchange, length), momenta=Momenta(hosted(comm))
    )


WHOLE_P = torch.linspace(-1, 1, P)
OWN = {silo: torch.full((k + 1, 2), float(k)) for k, silo in enumerate(SILOS)}


def trained(comm, root, plan, length):
    """Ranks whose state has changed write it."""
    exchange, found = federation(comm, plan, length)
    found["centre"].part.copy_(exchange.shard(WHOLE_P[:length]))
    if comm.rank == 0:
        found["privacy"].spent.copy_(torch.tensor([0.5, 0.25]))
    for number, name in enumerate(NAMES):
        found[name].norm.fill_(number)
        found[name].history = [1.0] * number
    found["momenta"].of = {silo: OWN[silo] for silo in hosted(comm)}
    writer = checkpoint.Writer(root, comm.rank)
    writer.start(3, gathered(found, exchange, comm.rank))
    writer.join()
    rows = comm.gather(writer.digests)
    writer.close(1.0)
    if comm.rank == 0:
        ranks = [[silo for k, silo in enumerate(SILOS) if (2 * k) % comm.size == rank] for rank in range(comm.size)]
        checkpoint.seal(root, 3, rows, ranks, {"ranks": comm.size})


def resumed(comm, root, plan, length):
    """Other ranks read it, and return it."""
    exchange, found = federation(comm, plan, length)
    stored = checkpoint.read_state(root, 3) if comm.rank == 0 else []
    tensors = scattered(stored, found, exchange, comm)
    for silo, kept in checkpoint.read_silos(root, 3, hosted(comm)).items():
        tensors += [StateTensor(key, tensor, "per_silo", silo) for key, tensor in kept.items()]
    found.restore(tensors)
    assert torch.equal(found["centre"].part, exchange.shard(WHOLE_P[:length]))
    assert (found["privacy"].spent is None) == (comm.rank > 0)
    for number, name in enumerate(NAMES):
        assert found[name].norm == number and found[name].history == [1.0] * number
    assert found["momenta"].of.keys() == set(hosted(comm))
    assert all(torch.equal(m, OWN[silo]) for silo, m in found["momenta"].of.items())
    return {(one.key, one.silo): one.tensor.clone() for one in gathered(found, exchange, comm.rank)}


@pytest.mark.parametrize(("before", "after"), [*itertools.product((1, 2, 3), repeat=2)])
@pytest.mark.parametrize(
    ("plan", "other"), [("sharded", "sharded"), ("root", "sharded"), ("sharded", "replicated"), ("replicated", "root")]
)
def test_holders_of_every_placement_resume_on_other_ranks_and_plans(tmp_path, before, after, plan, other):
    length = P if plan == other else P // 2 + 7
    on_ranks(before, lambda comm: trained(comm, tmp_path, plan, length))
    checkpoint.check(tmp_path, 3)
    again = on_ranks(after, lambda comm: resumed(comm, tmp_path, other, length))
    assert torch.equal(again[0][("centre", "centre"), ""], WHOLE_P[:length])
    assert again[0][("privacy", "spent"), ""].tolist() == [0.5, 0.25]
    assert {silo for rank in again for key, silo in rank if key == ("momenta", "m")} == set(SILOS)


# ---------------------------------------------------------------- mismatches


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({}, "the checkpoint's v/x is absent, this run's torch.float32 of"),
        ({"x": torch.zeros(P - 1)}, "the checkpoint's v/x is torch.float32 of [19999], this run's torch.float32 of"),
        ({"x": torch.zeros(P, dtype=torch.float64)}, "the checkpoint's v/x is torch.float64 of [20000], this run's"),
        ({"x": torch.zeros(P), "y": torch.zeros(2)}, "the checkpoint's v/y is not of this run"),
    ],
)
@pytest.mark.parametrize("placement", ["replicated", "sharded", "root"])
def test_a_checkpoint_of_other_tensors_is_refused_alike_on_all_ranks(num_ranks, stored, says, placement):
    def work(comm):
        exchange = make(section("sharded"), comm, torch.zeros(P), ExchangeContext(1.0))
        mine = exchange.shard(torch.zeros(P)) if placement == "sharded" else torch.zeros(P)
        found = Holders(v=Vectors({"x": mine} if placement != "root" or comm.rank == 0 else {}, placement))
        try:
            scattered([StateTensor(("v", name), tensor) for name, tensor in stored.items()], found, exchange, comm)
        except FedmpiError as error:
            return error
        return None

    errors = on_ranks(num_ranks, work)
    assert all(isinstance(error, ConfigError) and error.agreed and says in str(error) for error in errors), errors


def test_what_nobody_keeps_is_refused():
    with pytest.raises(ConfigError, match="the checkpoint's gone/x is not of this run"):
        Holders(here=Vectors({}, "replicated")).restore([StateTensor(("gone", "x"), torch.zeros(1), "per_silo", "a")])


def test_two_tensors_under_one_key_are_refused_when_they_are_written():
    class Twice:
        def state(self):
            return [StateTensor(("x",), torch.zeros(1), "per_silo", "a")] * 2

        def restore(self, stored): ...

    exchange = make(section("sharded"), SoloComm(), torch.zeros(P), ExchangeContext(1.0))
    with pytest.raises(ValueError, match="t/x of silo a is kept twice"):
        gathered(Holders(t=Twice()), exchange, 0)


def test_keys_of_two_holders_never_meet():
    """Even if their names, joined with those of their tensors, are equal."""
    found = Holders({name: Vectors({other: torch.zeros(1) for other in NAMES}, "replicated") for name in NAMES})
    assert len({one.key for one in found.state()}) == len(NAMES) ** 2
    nested = Holders({"a": found, "a/b": found})
    assert len({one.key for one in nested.state()}) == 2 * len(NAMES) ** 2
    assert [one.key for one in within("a", under("a", found.state()))] == [one.key for one in found.state()]


def test_arrays_come_and_go_and_what_is_no_number_is_named():
    before, after = Arrays({"seen": np.arange(3), "b": np.array(2.5)}), Arrays({"gone": np.zeros(2)})
    after.restore(list(before.state()))
    assert after.arrays.keys() == {"b", "seen"} and after.arrays["seen"].tolist() == [0, 1, 2]
    assert after.arrays["b"].shape == () and all(one.grows for one in before.state())
    with pytest.raises(FedmpiError, match=r"'names' .*not a number"):
        list(Arrays({"names": np.array(["a"])}).state())


def test_rows_of_silos_keep_the_dict_of_their_owner():
    rows = {"a": torch.ones(2), "gone": torch.ones(1)}
    holder, kept = OfSilos("delta", rows, CPU), rows
    holder.restore([StateTensor(("delta",), torch.zeros(3), "per_silo", "b")])
    assert kept.keys() == {"b"} and holder.rows is rows
    assert [(one.key, one.silo) for one in holder.state()] == [(("delta",), "b")]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_what_a_silos_new_rank_has_no_use_for_is_handed_to_rank_0(num_ranks):
    def work(comm):
        some = [StateTensor(("level 1", name), OWN[silo], "per_silo", silo) for silo in hosted(comm) for name in "xy"]
        return handed_over(some, comm)

    taken, *others = on_ranks(num_ranks, work)
    assert others == [[]] * (num_ranks - 1)
    assert sorted((one.silo, one.key[1]) for one in taken) == sorted((silo, name) for silo in SILOS for name in "xy")
    assert all(torch.equal(one.tensor, OWN[one.silo]) and one.placement == "per_silo" for one in taken)


# ---------------------------------------------------------------- in a run


class Accountant:
    """Counts the rounds of its checkpoints; nothing in the project knows it."""

    def __init__(self):
        self.steps = 0

    def state(self):
        return [StateTensor(("steps",), torch.tensor(self.steps))]

    def restore(self, stored):
        self.steps = int(stored[0].tensor)


def test_a_holder_of_ones_own_is_in_every_checkpoint_once_it_is_in_the_list(tmp_path, monkeypatch):
    ours, accountant = keeper.holders, Accountant()
    monkeypatch.setattr(keeper, "holders", lambda *about: Holders(ours(*about), accountant=accountant))
    with fedmpi.Run(config(tmp_path, 4), comm=SoloComm()) as first:
        for record in first:
            accountant.steps = 10 * record["round"]
            if record["round"] == 3:
                break
    assert checkpoint.read_server(tmp_path, 3)["accountant", "steps"] == 30
    accountant.steps = 0
    with fedmpi.Run(config(tmp_path, 4), comm=SoloComm()) as again:
        assert again.resumed == 3 and accountant.steps == 30
        list(again)
    monkeypatch.setattr(keeper, "holders", ours)
    with pytest.raises(ConfigError, match="the checkpoint's accountant/steps is not of this run"):
        fedmpi.Run(config(tmp_path, 5), comm=SoloComm())
