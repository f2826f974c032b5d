"""Plan shared_memory with too little shared memory: all ranks learn it before anything is allocated."""

import math
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedmpi import flat
from fedmpi.comm import SoloComm
from fedmpi.comm.machine import room
from fedmpi.comm.threads import on_ranks
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.config import ExchangeSection
from fedmpi.exchange.shared_memory import SharedMemory
from fedmpi.flat import FlatModel
from fedmpi.server import FedAvg, FedAvgM, NoState, Server
from fedmpi.types import Contribution

MIB = 1 << 20


@pytest.fixture
def docker(monkeypatch):
    """64 MiB, all free."""
    at = SimpleNamespace(f_bavail=64, f_frsize=MIB, f_blocks=64)
    monkeypatch.setattr(os, "statvfs", lambda path: at)
    return at


def test_ranks_of_a_host_need_room_for_what_they_want_together(docker):
    def work(ranks):
        return room(ranks, 30 * MIB), room(ranks, 40 * MIB), room(ranks, 50 * MIB if ranks.rank else 0), room(ranks, 0)

    enough, short, alone, nothing = zip(*on_ranks(2, work), strict=True)
    assert set(enough + alone + nothing) == {""}
    assert len(set(short)) == 1 and "64 MiB free and its ranks need 80 MiB" in short[0] and "/dev/shm" in short[0]


def test_memory_without_a_limit_has_room(docker):
    docker.f_blocks = 0
    assert on_ranks(2, lambda ranks: room(ranks, 1 << 50)) == ["", ""]


def test_what_the_plan_takes_is_counted(monkeypatch):
    made = []

    def shared(self, num_elements, dtype, owner=None):
        made.append(num_elements * dtype.itemsize)
        return [torch.zeros(num_elements, dtype=dtype)]

    monkeypatch.setattr(SoloComm, "shared", shared)
    for reduction in ("fast", "reproducible"):
        made.clear()
        section, params_P = ExchangeSection(plan="shared_memory", reduction=reduction), torch.zeros(100_000)
        exchange = SharedMemory(section, SoloComm(), params_P, ExchangeContext(1.0))
        exchange.delta()
        exchange.home(params_P, NoState())
        counted = SharedMemory.shared_bytes(section, params_P, 0, True)
        assert 0 <= sum(made) - counted <= 64  # weights beside the sums


SIZE = 5000


class Vector(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, SIZE))


def steps(ranks, optimizer, idle=(), reads=()):
    """Three rounds of ranks that train in place, but for the idle ones; some read their delta before it is added.
    The parameters, and of every round: whether the delta was left to the plan, the model is said to hold the new
    parameters, and does."""
    made = SharedMemory(ExchangeSection(plan="shared_memory"), ranks, torch.zeros(SIZE), ExchangeContext(3.0))
    own, seen = made.delta(), []
    model = FlatModel(Vector(), allocate=lambda num, dtype: own)
    params_P, state = made.home(torch.linspace(-1, 1, SIZE), optimizer.init(torch.zeros(SIZE)))
    for number in (1, 2, 3):
        trains, left = ranks.rank not in idle, False
        made.begin(number, int(trains))
        model.lends = made.subtracts
        if trains:
            model.load(params_P)
            draw = torch.Generator().manual_seed(10 * number + ranks.rank)
            with torch.no_grad():
                model.module.w.add_(torch.randn(SIZE, generator=draw))
            trained, before = model.params(), params_P.clone()
            given = model.give(Contribution("a", number, 1.0 + ranks.rank, torch.empty(0), 0.0, 1, 1), params_P)
            left = given.untaken
            if ranks.rank in reads:
                assert torch.equal(given["delta"], trained - before) and not given.untaken
            assert math.isnan(given.norm) or given.norm == pytest.approx(float((trained - before).norm()), rel=1e-6)
            made.add(given)
        params_P, state = made.finish(params_P, Server(optimizer), state)
        if made.wrote_model:
            model.hold(params_P)
        seen.append((left, made.wrote_model, torch.equal(own, params_P)))
    return params_P.clone(), seen


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("optimizer", [FedAvg(), FedAvg(lr=0.5), FedAvgM()], ids=["adds", "scales", "momentum"])
def test_compiled_rounds_have_the_same_bits_and_models_that_trained_hold_them(num_ranks, optimizer, monkeypatch):
    plain = on_ranks(num_ranks, lambda ranks: steps(ranks, optimizer))
    monkeypatch.setattr(flat, "COMPILED", 1)
    compiled = on_ranks(num_ranks, lambda ranks: steps(ranks, optimizer))
    mixed = on_ranks(num_ranks, lambda ranks: steps(ranks, optimizer, reads={1}))
    for (params_P, seen), (same_P, seen_too), (mixed_P, mixed_seen) in zip(plain, compiled, mixed, strict=True):
        assert torch.equal(params_P, same_P) and torch.equal(params_P, mixed_P) and params_P.std() > 0.5
        assert seen == [(False, True, True)] * 3
        assert seen_too == mixed_seen == [(True, True, True)] * 3


def test_a_contribution_gives_no_delta_once_its_memory_is_written_again(monkeypatch):
    monkeypatch.setattr(flat, "COMPILED", 1)
    model = FlatModel(Vector())
    params_P, model.lends = model.params(), True
    given = model.give(Contribution("a", 1, 1.0, torch.empty(0), 0.0, 1, 1), params_P)
    assert given.untaken and given.norm == 0.0
    model.load(params_P)
    assert not given.untaken
    given.vector_Q  # noqa: B018
    assert torch.equal(model.params(), params_P), "nothing was subtracted from what was loaded"


def test_a_rank_that_did_not_train_does_not_hold_the_parameters():
    (_, first), (_, second), (_, idle) = on_ranks(3, lambda ranks: steps(ranks, FedAvg(), idle={2}))
    assert first == second == [(False, True, True)] * 3 and idle == [(False, False, False)] * 3
