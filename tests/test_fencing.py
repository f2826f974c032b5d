"""The epoch of a run directory: one winner per number, and only the highest epoch may commit."""

import errno
import json
import os
import threading

import pytest

from fedmpi import fencing
from fedmpi.checkpoint import Writer, sealed_rounds
from fedmpi.errors import CheckpointError, ConfigError


def test_every_epoch_has_one_owner(tmp_path):
    assert fencing.highest(tmp_path) == 0
    won: list[int] = []
    threads = [
        threading.Thread(target=lambda: won.extend(fencing.raise_epoch(tmp_path, {}) for _ in range(10)))
        for _ in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(1, 41)) and fencing.highest(tmp_path) == 40
    assert sorted(os.listdir(tmp_path / "epochs")) == [f"{epoch:06d}" for epoch in range(1, 41)]  # and no other files
    assert json.loads((tmp_path / "epochs" / "000007").read_text())["pid"] == os.getpid()


def test_a_link_that_is_made_although_the_reply_says_no_counts(tmp_path, monkeypatch):
    link = os.link

    def lossy(source, target):
        link(source, target)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", lossy)
    assert fencing.raise_epoch(tmp_path, {}) == 1 and fencing.raise_epoch(tmp_path, {}) == 2


def test_a_link_that_cannot_be_made_is_an_error(tmp_path, monkeypatch):
    def refused(source, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(PermissionError):
        fencing.raise_epoch(tmp_path, {})
    assert os.listdir(tmp_path / "epochs") == []


def test_a_rank_reads_its_epoch_at_the_start(tmp_path, monkeypatch):
    for _ in range(2):
        fencing.raise_epoch(tmp_path, {})
    assert fencing.joined(tmp_path) == 2
    monkeypatch.setenv(fencing.VARIABLE, "1")
    with pytest.raises(ConfigError, match=r"^this start \(epoch 1\) .* superseded by a newer one \(epoch 2\)"):
        fencing.joined(tmp_path)
    monkeypatch.setenv(fencing.VARIABLE, "3")
    with pytest.raises(ConfigError, match="rank 0 does not see epoch 3 in "):
        fencing.joined(tmp_path, wait_s=0.01)
    threading.Timer(0.2, lambda: fencing.raise_epoch(tmp_path, {})).start()  # appears late on this host
    assert fencing.joined(tmp_path, wait_s=20) == 3


def test_a_start_that_has_an_epoch_keeps_it_or_ends(tmp_path, monkeypatch):
    """As on ranks that continue after the loss of one."""
    monkeypatch.delenv(fencing.VARIABLE, raising=False)
    assert fencing.joined(tmp_path, 0) == 0
    fencing.raise_epoch(tmp_path, {})
    assert fencing.joined(tmp_path, 1) == 1
    with pytest.raises(ConfigError, match=r"^this start \(epoch 0\) .* superseded by a newer one \(epoch 1\)"):
        fencing.joined(tmp_path, 0)


def test_a_writer_that_may_not_write_writes_nothing(tmp_path):
    writer = Writer(tmp_path, 0, lambda: fencing.require_newest(tmp_path, 1))
    for _ in range(2):
        fencing.raise_epoch(tmp_path, {})
    writer.start(1, [])
    with pytest.raises(CheckpointError, match="superseded by a newer one"):
        writer.join()
    assert not (tmp_path / "checkpoints").exists() and sealed_rounds(tmp_path) == []
    writer.close(5)
