"""Checkpoints: everything the next round depends on, whole or not at all.

    checkpoints/round-000040/
      server.h5        params[P], optimizer/..., selector/...       by rank 0
      rank-0003.h5     per kept name: ids[M], rows[M, ...]          by every rank that hosts silos
      manifest.json    every file with its SHA-256, last            by rank 0, and once per host without its disk

A file is written beside its final name, flushed, and renamed; the manifest follows when every rank's file is safe.
So a folder without a manifest is an unfinished checkpoint, and a file that disagrees with the manifest a torn one.
Files are written by a thread, from copies; the thread never calls MPI.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from fedmpi.errors import CheckpointError
from fedmpi.worker import Worker

log = logging.getLogger("fedmpi")

MANIFEST = "manifest.json"
SERVER = "server.h5"
AVERAGE = "average"  # of the parameters over rounds, in server.h5
DIGEST_BYTES = 32 + 8  # SHA-256 and the file's size
_OTHER = "#"  # what follows it numbers the groups of one name; the first has none
_SLICE = 1 << 20  # elements written at a time: the interpreter is free in between


def rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.h5"


def folder_of(root: Path, round: int) -> Path:
    """Where round's checkpoint lies under the run directory `root`."""
    return root / "checkpoints" / f"round-{round:06d}"


# ---------------------------------------------------------------- writing


Tensors = Mapping[str, torch.Tensor]


class Writer:
    """One rank's writer and its thread. `start` copies and returns; `written` says which round's file is safe."""

    def __init__(self, root: Path, rank: int) -> None:
        self.root = root
        self.rank = rank
        self._copies: dict[str, torch.Tensor] = {}
        self._worker = Worker("checkpoint")
        self._written = -1
        self._digest = bytes(DIGEST_BYTES)

    def start(self, round: int, server: Tensors | None, silos: Mapping[str, Tensors]) -> None:
        """Copy this rank's part of the state and begin to write it. Waits for the write before, if it still runs."""
        self.join()
        jobs: list[tuple[Path, dict[str, torch.Tensor], dict[str, list[str]]]] = []
        folder = folder_of(self.root, round)
        if server is not None:
            jobs.append((folder / SERVER, {name: self._copy(f"server/{name}", t) for name, t in server.items()}, {}))
        if silos:
            rows: dict[str, torch.Tensor] = {}
            ids: dict[str, list[str]] = {}
            for name in sorted({name for kept in silos.values() for name in kept}):
                alike: dict[Any, list[str]] = {}  # silos may keep tensors of different shapes under one name
                for silo, kept in silos.items():
                    if name in kept:
                        alike.setdefault((kept[name].shape, kept[name].dtype), []).append(silo)
                for number, some in enumerate(alike.values()):
                    group = f"{name}{_OTHER}{number}" if number else name
                    ids[group] = some
                    rows[f"{group}/rows"] = torch.stack([silos[silo][name].detach().cpu() for silo in some])
            jobs.append((folder / rank_file(self.rank), rows, ids))
        self._worker.start(lambda: self._write(round, jobs))

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        kept = self._copies.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return kept.copy_(tensor.detach())

    def _write(self, round: int, jobs: Iterable[tuple[Path, Tensors, Mapping[str, list[str]]]]) -> None:
        digests = [write_file(path, tensors, ids) for path, tensors, ids in jobs]
        # Rank 0 has two files; its row in the gather is the rank file's, the server's it knows by itself.
        self._digest = digests[-1] if digests else bytes(DIGEST_BYTES)
        self._server_digest = digests[0] if digests else bytes(DIGEST_BYTES)
        self._written = round

    @property
    def written(self) -> int:
        """The newest round whose file of this rank is safe; -1 for none. Raises CheckpointError if writing failed."""
        if (error := self._worker.error) is not None:
            what = str(error) or type(error).__name__
            raise CheckpointError(f"cannot write a checkpoint into {self.root}: {what}") from error
        return self._written

    def wait(self, limit_s: float) -> bool:
        """Is what was started on disk, by now or within `limit_s`?"""
        return self._worker.wait(limit_s)

    def join(self) -> None:
        """Wait until what was started is on disk. Raises CheckpointError if writing failed."""
        self._worker.wait()
        _ = self.written

    def close(self, limit_s: float) -> None:
        """Let the thread end, once what was started is on disk or after `limit_s`."""
        self._worker.close(limit_s)

    def digests(self, own_silos: bool) -> bytes:
        """This rank's row for the manifest: its rank file's digest (zeros without silos), then the server file's."""
        empty = bytes(DIGEST_BYTES)
        mine = self._digest if own_silos else empty
        return mine + (self._server_digest if self.rank == 0 else empty)


def write_file(path: Path, tensors: Tensors, ids: Mapping[str, Sequence[str]]) -> bytes:
    """Write one HDF5 file so that it is there whole or not at all; its SHA-256 and size come back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    with h5py.File(part, "w") as file:
        for name, tensor in tensors.items():
            array = tensor.numpy()
            dataset = file.create_dataset(name, shape=array.shape, dtype=array.dtype)
            if array.ndim == 1:
                for start in range(0, len(array), _SLICE):
                    dataset[start : start + _SLICE] = array[start : start + _SLICE]
            elif array.size:
                dataset[...] = array
        for name, some in ids.items():
            file.create_dataset(f"{name}/ids", data=list(some), dtype=h5py.string_dtype())
    with open(part, "rb") as raw:
        os.fsync(raw.fileno())
        digest = hashlib.file_digest(raw, "sha256").digest()
        size = raw.tell()
    os.replace(part, path)
    _sync_folder(path.parent)
    _sync_folder(path.parent.parent)  # the round's folder may be new too
    return digest + size.to_bytes(8, "little")


def seal(
    root: Path, round: int, rows: Sequence[bytes], silos: Sequence[Sequence[str]], about: Mapping[str, Any]
) -> None:
    """Write the manifest of a round whose files are all safe. `rows` are the ranks' `digests`, `silos` their silos."""
    files: dict[str, Any] = {SERVER: _entry(rows[0][DIGEST_BYTES:])}
    for rank, (row, some) in enumerate(zip(rows, silos, strict=True)):
        if some:
            files[rank_file(rank)] = _entry(row[:DIGEST_BYTES]) | {"silos": list(some)}
    replace_text(folder_of(root, round) / MANIFEST, json.dumps({"round": round, **about, "files": files}, indent=1))


def _entry(row: bytes) -> dict[str, Any]:
    return {"sha256": row[:32].hex(), "bytes": int.from_bytes(row[32:40], "little")}


def replace_text(path: Path, text: str) -> None:
    """The file holds `text`, whole, or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    with open(part, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(root: Path, keep: int, scores: Mapping[int, float | None]) -> None:
    """Delete all sealed checkpoints but the newest `keep` and the best (highest score)."""
    sealed = sealed_rounds(root)
    scored = [(score, -r) for r in sealed if (score := scores.get(r)) is not None]  # of equals the first
    spared = set(sealed[-keep:]) | ({-max(scored)[1]} if scored else set())
    for round in sealed:
        if round not in spared:
            remove(root, round)


def remove(root: Path, round: int) -> None:
    """Delete a checkpoint; its manifest goes first, so that a crash leaves an unfinished one, not a torn one."""
    folder = folder_of(root, round)
    if not folder.is_dir():
        folder.unlink(missing_ok=True)
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_after(root: Path, round: int) -> None:
    """Delete what lies beyond the round that a run resumes from, and what was never finished."""
    for folder in sorted((root / "checkpoints").glob("round-*")):
        number = _number(folder)
        if number is not None and (number > round or not (folder / MANIFEST).exists()):
            remove(root, number)


# ---------------------------------------------------------------- reading


def _number(folder: Path) -> int | None:
    digits = folder.name.removeprefix("round-")
    return int(digits) if digits.isdigit() else None


def sealed_rounds(root: Path) -> list[int]:
    """The rounds that have a manifest, oldest first."""
    found = (_number(path.parent) for path in (root / "checkpoints").glob(f"round-*/{MANIFEST}"))
    return sorted(number for number in found if number is not None)


def manifest(root: Path, round: int) -> dict[str, Any]:
    """The manifest of a round. Raises CheckpointError when it is unreadable."""
    path = folder_of(root, round) / MANIFEST
    try:
        found = json.loads(path.read_text())
        if found["round"] != round or SERVER not in found["files"]:
            raise ValueError("it speaks of another round")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    return dict(found)


def score(root: Path, round: int) -> float | None:
    """How good a sealed round is, higher is better; None when it was not evaluated or its manifest is unreadable."""
    try:
        found = manifest(root, round).get("score")
    except CheckpointError as error:
        log.warning("skipped checkpoint of round %d: %s", round, error)
        return None
    return None if found is None else float(found)


def check(root: Path, round: int, wanted: Callable[[str, Mapping[str, Any]], bool]) -> dict[str, Any]:
    """The manifest, once those of its files that are `wanted` are found to be whole. Raises CheckpointError."""
    found = manifest(root, round)
    for name, entry in found["files"].items():
        if not wanted(name, entry):
            continue
        path = folder_of(root, round) / name
        try:
            if path.stat().st_size != entry["bytes"]:
                raise CheckpointError(f"{path} is torn: {path.stat().st_size} bytes instead of {entry['bytes']}")
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(str(error)) from None
        if digest != entry["sha256"]:
            raise CheckpointError(f"{path} is corrupt: its checksum is not the manifest's")
    return found


def newest(root: Path, wanted: Callable[[str, Mapping[str, Any]], bool], below: int | None = None) -> int:
    """The newest round, below `below`, that is whole as far as this rank is concerned; -1 for none. Others are
    skipped with a warning."""
    for round in reversed(sealed_rounds(root)):
        if below is not None and round >= below:
            continue
        try:
            check(root, round, wanted)
        except CheckpointError as error:
            log.warning("skipped checkpoint of round %d: %s", round, error)
            continue
        return round
    return -1


def read_server(root: Path, round: int) -> dict[str, torch.Tensor]:
    """All tensors of server.h5, by name."""
    return _read(folder_of(root, round) / SERVER)


def read_silos(root: Path, round: int, ids: Iterable[str]) -> dict[str, dict[str, torch.Tensor]]:
    """What each of these silos kept, from whichever rank files hold it. Raises CheckpointError if one is not there."""
    wanted = set(ids)
    if not wanted:
        return {}
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for file_name, entry in manifest(root, round)["files"].items():
        here = wanted.intersection(entry.get("silos", ()))
        if not here:
            continue
        with h5py.File(folder_of(root, round) / file_name, "r") as file:
            for what, group in file.items():
                name = what.partition(_OTHER)[0]
                for row, silo in enumerate(group["ids"].asstr()[...]):
                    if silo in here:
                        kept.setdefault(silo, {})[name] = torch.from_numpy(np.asarray(group["rows"][row]).copy())
    missing = sorted(wanted - set(kept))
    if missing:
        raise CheckpointError(f"{folder_of(root, round)}: no state of silo {', '.join(missing[:4])}")
    return kept


def _read(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = torch.from_numpy(np.asarray(item[()]).reshape(item.shape).copy())

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found
