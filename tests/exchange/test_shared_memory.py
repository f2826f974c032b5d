"""Plan shared_memory with too little shared memory: all ranks learn it before anything is allocated."""

import os
from types import SimpleNamespace

import pytest
import torch

from fedmpi.comm import SoloComm
from fedmpi.comm.machine import room
from fedmpi.comm.threads import on_ranks
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.config import ExchangeSection
from fedmpi.exchange.shared_memory import SharedMemory
from fedmpi.server import NoState

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
