"""Which cores a rank shares with which others."""

import os
import socket
from pathlib import Path

import pytest
import torch

from fedmpi import device
from fedmpi.comm import SoloComm, machine


class Two(SoloComm):
    """A rank that equals another one except for its host name."""

    def __init__(self, other: "Two | None", host: str) -> None:
        super().__init__()
        self.hosts, self.other, self.rows = (host,), other, []  # type: ignore[assignment,var-annotated]

    def gather(self, row: bytes) -> list[bytes]:
        self.rows = [row]
        return [row, *(self.other.rows if self.other else [])]


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_hosts_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    first = Two(None, "h1")
    assert device.set_threads(first, reproducible=False) == 4
    assert device.set_threads(Two(first, "h2"), reproducible=False) == 2
    assert device.set_threads(Two(first, "h2"), reproducible=True) == 1
    monkeypatch.setattr(Path, "read_text", lambda path: "another machine")
    assert device.set_threads(Two(first, "h2"), reproducible=False) == 4


def test_hosts_differ_by_boot_name_and_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers on one machine have namespaces of their own, and may have equal names."""
    mine = machine.host_identity()
    assert mine == machine.host_identity() == SoloComm().machines[0] and len(mine) == 32
    found = {mine}
    for target, name, fake in (
        (socket, "gethostname", lambda: "h2"),
        (Path, "read_text", lambda path: "another boot"),
        (os, "readlink", lambda path: path if path.endswith("uts") else ""),
        (os, "readlink", lambda path: path if path.endswith("net") else ""),
    ):
        with monkeypatch.context() as other:
            other.setattr(target, name, fake)
            found.add(machine.host_identity())
    assert len(found) == 5


@pytest.mark.parametrize(("given", "found"), [("1", 1), ("3,2", 3), ("8", 4), ("0", 1), ("many", 4), ("", 4)])
def test_no_more_threads_than_the_user_says(monkeypatch: pytest.MonkeyPatch, given: str, found: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert device.set_threads(Two(None, "h1"), reproducible=False) == found
