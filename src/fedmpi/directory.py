"""A run directory: locking while a job trains in it, and which ranks see the same directory as rank 0."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

import fedmpi
from fedmpi import checkpoint, disk, fencing, fork, stopping
from fedmpi.comm import Comm
from fedmpi.config import CONFIG_FILE
from fedmpi.errors import CheckpointError, ConfigError
from fedmpi.flat import FlatModel
from fedmpi.yamlfile import ABOUT

log = logging.getLogger("fedmpi")

UNSHARED_FILE = "unshared.safetensors"
CODE = "code"  # folder of the user's code


@dataclass(frozen=True)
class Begun:
    """What a run directory was started with: the configuration as plain values, and the run's description."""

    config: dict[str, Any]
    about: dict[str, Any]


def write_config(root: Path, config: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Writes config.yaml; its last line is a checksum of the rest."""
    values = {**config, ABOUT: {"format": checkpoint.FORMAT, **about}}
    text = yaml.dump(values, Dumper=_DUMPER, sort_keys=False, default_flow_style=None)
    disk.replace_text(root / CONFIG_FILE, f"{text}{_SEAL}{_sha256(text)}\n")


_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's takes a tenth of the time
STATISTICS = "statistics"  # key of the description of a run
_SEAL = "# sha256 of what stands above: "
_TOLD = {"params": int, "metric": str, "maximize": bool, "versions": dict, "model": dict, "plan": str, "unshared": str}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_config(root: Path) -> Begun:
    """Reads config.yaml. Raises a one-line ConfigError if it is missing, damaged, or of another format."""
    path = root / CONFIG_FILE
    try:
        whole = disk.read_bytes(path, 1 << 26).decode()
        text, seal, checksum = whole.rpartition(_SEAL)
        values = yaml.safe_load(text if seal else whole)
        about = values[ABOUT]
        format = about.get("format", 1)
        if format != checkpoint.FORMAT and (not seal or checksum == f"{_sha256(text)}\n"):
            version = about["versions"]["fedmpi"]
            raise ConfigError(
                f"{root} is of format {format}, written by fedmpi {version}; this fedmpi {fedmpi.__version__} reads "
                f"and writes format {checkpoint.FORMAT}: finish the run with that version, or choose another out="
            )
        if checksum != f"{_sha256(text)}\n" or not all(isinstance(about[n], kind) for n, kind in _TOLD.items()):
            raise ValueError
    except OSError as error:
        raise ConfigError(f"{root} is not a run directory: {CONFIG_FILE}: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError):
        raise ConfigError(f"{path} is damaged; put it back, or choose another out=") from None
    return Begun({name: value for name, value in values.items() if name != ABOUT}, about)


class Stored(NamedTuple):
    """The members of a checkpoint, as its manifest tells."""

    round: int
    epoch: int
    hosted: list[list[str]]  # silo ids of each rank
    admitted: list[list[str]]  # id and path of each silo that the configuration does not name

    @property
    def silos(self) -> set[str]:
        """All members."""
        return {silo for some in self.hosted for silo in some}


class RunDirectory:
    """The run directory of a job, created and locked until `release`. Construction is collective.

    Raises ConfigError on every rank if another job has it, or if a rank that must write cannot.

    Attributes: path; epoch (of this start, see fencing.py); leads (whether this rank writes manifests: rank 0, or the
    first rank of a host that does not see rank 0's directory but has its own).
    """

    def __init__(self, path: Path, comm: Comm) -> None:
        self.path = path
        self._ticket = comm.broadcast_text(uuid.uuid4().hex, 0)
        self._descriptor = comm.collectively(lambda: self._lock() if comm.rank == 0 else None)
        try:
            self._look(comm)
        except Exception:
            self.release()
            raise

    def hand_over(self, comm: Comm) -> None:
        """Passes the directory on to other ranks; rank 0 may be another one. Collective over these, and the same
        calls as the construction on a fresh rank."""
        self._ticket = comm.broadcast_text(uuid.uuid4().hex, 0)

        def take() -> None:
            if comm.rank == 0 and self._descriptor is None:
                self._descriptor = self._lock(asked=True)
            elif self._descriptor is not None:
                self._sign(self._descriptor)

        comm.collectively(take)
        self._look(comm, self.epoch)

    def _look(self, comm: Comm, own: int | None = None) -> None:
        """Finds out which ranks see the directory, and checks that it is writable. `own`: epoch of an earlier start."""
        epoch = comm.collectively(lambda: fencing.joined(self.path, own) if comm.rank == 0 else 0)
        self.epoch = int(comm.broadcast_text(str(epoch), 0))
        sees = comm.collectively(lambda: comm.rank == 0 or self.is_ours())
        blind = np.flatnonzero(comm.gather_number(not sees))
        first_blind = [r for r in blind if comm.machines[r] == comm.machines[comm.rank]][:1]
        self.leads = comm.rank == 0 or comm.rank in first_blind
        comm.collectively(lambda: self._writable() if self.leads else None)

    def _lock(self, asked: bool = False) -> int:
        """Locks the directory until the process ends. `asked`: keep a pending stop request."""
        with contextlib.ExitStack() as opened:
            try:
                disk.make_folder(self.path)
                lock = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = os.open(self.path / stopping.LOCK_FILE, lock, disk.FILE_MODE)
                opened.callback(os.close, descriptor)
                self._take(descriptor)
                if not asked:
                    (self.path / stopping.STOP_FILE).unlink(missing_ok=True)  # meant for a job that has ended
                disk.remove_parts(self.path)
                self._sign(descriptor)
            except OSError as error:
                file = next((path for path in (self.path, *self.path.parents) if path.is_file()), None)
                why = error.strerror if file is None else f"{file} is a file"
                raise ConfigError(f"out: cannot write into {self.path}: {why}") from None
            opened.pop_all()
        return descriptor

    def _sign(self, descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, self._ticket.encode(), 0)
        os.fsync(descriptor)

    def _take(self, descriptor: int) -> None:
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # `fedmpi stop` may be testing the lock, or a dying job may hold it
                time.sleep(0.1)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if os.environ.get(fencing.VARIABLE, ""):  # the supervisor has checked for other jobs
                log.warning("%s is still locked by an earlier start, which can write no more", self.path)
                return
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
        """Whether this rank sees rank 0's last ticket. Without file locks, another job may have replaced it."""
        try:
            return (self.path / stopping.LOCK_FILE).read_text() == self._ticket
        except OSError:
            return False

    def require_newest(self) -> None:
        """Raises CheckpointError on a rank that sees a newer start of the run."""
        fencing.require_newest(self.path, self.epoch)

    def plan_before(self) -> str:
        """The plan that the run in this directory was started with; empty if there is none."""
        try:
            return str(read_config(self.path).about["plan"]) if checkpoint.sealed_rounds(self.path) else ""
        except ConfigError:  # reported later
            return ""

    def statistics_before(self) -> dict[str, Any]:
        """The statistics behind the inputs of the run in this directory, or of the run that it is forked from; empty if
        there are none."""
        try:
            root = fork.origin(self.path) if fork.begins(self.path) else self.path
            return dict(read_config(root).about.get(STATISTICS, {})) if checkpoint.sealed_rounds(self.path) else {}
        except ConfigError:  # reported later
            return {}

    def stored(self) -> list[Stored]:
        """See `stored_members`."""
        return stored_members(self.path)

    def oldest_epoch(self) -> int:
        """The lowest epoch of a stored membership; -1 for none."""
        return min((one.epoch for one in self.stored()), default=-1)

    def release(self) -> None:
        """Unlocks the directory."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def keep_code(root: Path, code: Mapping[str, bytes], round: int) -> None:
    """Saves the user's code that the configuration names. If it differs from the saved code, the old version is kept
    beside it."""
    folder = root / CODE
    there = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if there and there != code:
        before = root / f"{CODE}-to-round-{round:06d}"
        folder.rename(before if not before.exists() else root / f"{before.name}-{uuid.uuid4().hex[:8]}")
    if there != code:
        for name, content in code.items():
            disk.replace_bytes(folder / name, content)


def stored_members(root: Path) -> list[Stored]:
    """The members of every checkpoint with a readable manifest, the newest first."""
    found = []
    for round in reversed(checkpoint.sealed_rounds(root)):
        with contextlib.suppress(CheckpointError):  # reported when it is read
            about = checkpoint.manifest(root, round)
            found.append(Stored(round, about.epoch, about.hosted, about.admitted))
    return found


def left_later(one: Stored, ids: Sequence[str], newest: Collection[str]) -> list[str]:
    """Those of a checkpoint's members `ids` that are not among the `newest` members. Raises ConfigError if all."""
    left = [silo for silo in ids if silo not in newest]
    if len(left) == len(ids):
        raise ConfigError(
            f"all members of round {one.round} left later ({', '.join(left[:4])}), and the newer checkpoints are "
            "damaged; repair those, or choose another out="
        )
    return left


def newest_usable(root: Path, comm: Comm, stored: Sequence[Stored], mine: Callable[[Stored], Collection[str]]) -> int:
    """The index of the newest checkpoint in `stored` that is whole on every rank with its own members; 0 if there is
    none. `mine`: this rank's silos with these members. Reads no file if all have the same members. Collective."""
    if all(one.silos == stored[0].silos for one in stored):
        return 0

    def whole(one: Stored) -> bool:
        silos = mine(one)
        idle = comm.rank != 0 and not silos  # reads nothing
        return idle or checkpoint.newest(root, comm.rank == 0, silos, one.round + 1, least=one.round) == one.round

    for index, one in enumerate(stored):
        if comm.gather_number(comm.collectively(functools.partial(whole, one))).all():
            if index and comm.rank == 0:
                unread = {*checkpoint.sealed_rounds(root)} - {other.round for other in stored}
                for round in sorted(round for round in unread if round > one.round):
                    log.warning("skipped checkpoint of round %d: its manifest cannot be read", round)
            return index
    return 0


def newest_whole(
    root: Path, comm: Comm, mine: Collection[str], others: bool = False, below: int | None = None
) -> tuple[int, list[int]]:
    """The newest round, below `below`, whose checkpoint is whole on every rank, or -1 and the ranks that see none.
    Collective.

    Each rank checks the files that it will read: the server's on rank 0, and those of its silos `mine`. With `others`,
    some of these silos may have no stored state."""
    idle = comm.rank != 0 and not mine  # reads nothing, so every round is whole for it
    while True:
        newest = comm.collectively(
            lambda: np.inf if idle else checkpoint.newest(root, comm.rank == 0, mine, below, others)  # noqa: B023
        )
        found = comm.gather_number(newest)
        least = found.min()
        if least < 0:
            return -1, np.flatnonzero(found < 0).tolist()
        if (found[np.isfinite(found)] == least).all():
            return int(least), []
        below = int(least) + 1


def save_model(model: FlatModel, path: Path, shared_only: bool, about: Mapping[str, str] | None = None) -> None:
    """Writes the model as .safetensors or .pt. Raises OSError if it cannot be written.

    With `shared_only`, tensors that belong to single silos are left out, and the metadata say so."""
    state: dict[str, Any] = model.module.state_dict()
    if path.suffix != ".pt":  # safetensors cannot hold what `get_extra_state` returns
        state = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    metadata = dict(about or {})
    if shared_only:
        shared = {e.name for e in model.entries if e.kind == "shared"}
        shared |= {name for name, tie in model.tied.items() if tie.owner in shared}
        left_out = [name for name in state if name not in shared]
        state = {name: tensor for name, tensor in state.items() if name in shared}
        metadata |= {"holds": "shared tensors only", "left_out": ", ".join(left_out)}
    if path.suffix != ".pt":
        save_tensors(state, path, metadata)
        return
    own = {name: value.cpu().clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    whole = OrderedDict(state | own)
    whole._metadata = {"fedmpi": metadata}  # type: ignore[attr-defined]  # torch's own place for metadata
    with disk.replacing(path) as part:
        try:
            torch.save(whole, part)
        except RuntimeError as error:  # torch does not raise OSError
            raise OSError(errno.EIO, str(error)) from None


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as safetensors, atomically; tied ones are written once per name. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with disk.replacing(path) as part:
        contiguous = torch.contiguous_format
        try:
            copies = {name: t.detach().cpu().clone(memory_format=contiguous) for name, t in tensors.items()}
            save_file(copies, part, {"format": "pt", **metadata} if metadata else None)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from None
