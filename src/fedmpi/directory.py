"""A run directory: whose it is while a job trains in it, and which ranks see rank 0's."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import yaml

from fedmpi import checkpoint, disk, stopping
from fedmpi.comm import Solo
from fedmpi.config import ABOUT
from fedmpi.errors import ConfigError

log = logging.getLogger("fedmpi")

CONFIG_FILE = "config.yaml"
UNSHARED_FILE = "unshared.safetensors"


class RunDirectory:
    """The run directory of a job, made and locked until `release`. A call of all ranks.

    Raises ConfigError, alike on every rank, where another job has it or a rank that writes cannot.

    Attributes: path; leads (does this rank write manifests: rank 0, or the first rank of a host that does not see rank
    0's directory but has one of its own).
    """

    def __init__(self, path: Path, comm: Solo) -> None:
        self.path = path
        self._ticket = comm.say(uuid.uuid4().hex, 0)
        self._descriptor = comm.together(lambda: self._lock() if comm.rank == 0 else None)
        try:
            sees = comm.together(lambda: comm.rank == 0 or self.is_ours())
            blind = np.zeros(comm.size)
            blind[comm.rank] = not sees
            blind = comm.share(blind)
            first_blind = [r for r in np.flatnonzero(blind) if comm.hosts[r] == comm.hosts[comm.rank]][:1]
            self.leads = comm.rank == 0 or comm.rank in first_blind
            comm.together(lambda: self._writable() if self.leads else None)
        except Exception:
            self.release()
            raise

    def _lock(self) -> int:
        """Make the directory ours; the lock goes with the process."""
        with contextlib.ExitStack() as opened:
            try:
                disk.make_folder(self.path)
                lock = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = os.open(self.path / ".lock", lock, disk.FILE_MODE)
                opened.callback(os.close, descriptor)
                self._take(descriptor)
                (self.path / stopping.STOP_FILE).unlink(missing_ok=True)  # it was meant for a job that has ended
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, self._ticket.encode(), 0)
                os.fsync(descriptor)
            except OSError as error:
                raise ConfigError(f"out: cannot write into {self.path}: {error.strerror}") from None
            opened.pop_all()
        return descriptor

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"out: another job is training in {self.path}") from None
        except OSError as error:
            why = error.strerror
            log.warning("%s cannot be locked (%s): make sure that no other job trains in it", self.path, why)

    def _writable(self) -> None:
        try:
            disk.make_folder(self.path / "checkpoints")
            disk.replace_text(self.path / ".writable", "")
            (self.path / ".writable").unlink()
        except OSError as error:
            raise ConfigError(f"out: cannot write into {self.path}: {error.strerror}") from None

    def is_ours(self) -> bool:
        """Does this rank see what rank 0 wrote last? On a file system without locks another job may have come."""
        try:
            return (self.path / ".lock").read_text() == self._ticket
        except OSError:
            return False

    def plan_before(self) -> str:
        """The plan that the run in this directory was begun with; empty if there is none."""
        try:
            about = yaml.safe_load((self.path / CONFIG_FILE).read_text())[ABOUT]
            return str(about["plan"]) if checkpoint.sealed_rounds(self.path) else ""
        except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):  # what is wrong there is said later
            return ""

    def release(self) -> None:
        """Let the next job have it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Tensors as safetensors, tied ones once more under each of their names; the file is there whole or not at all."""
    from safetensors.torch import save_file

    with disk.replacing(path) as part:
        save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, part)
