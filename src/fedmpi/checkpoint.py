"""Checkpoints: everything the next round depends on, whole or not at all.

    checkpoints/round-000040/
      server.h5        all tensors that are of no silo, whole          by rank 0
      rank-0003.h5     tensors of silos, a row for each silo           by every rank that hosts silos
      manifest.json    every file with its SHA-256, and its own, last  by rank 0, and once per host without its disk
    checkpoints/best-000037/
      the same files   what is evaluated of the best round, where no checkpoint was due: to look at, not to resume from

A file is written beside its final name, flushed, and renamed; the manifest follows when every rank's file is safe.
So a folder without a manifest is an unfinished checkpoint, and what disagrees with its checksum a torn one. Whatever
is wrong with a checkpoint, it is a CheckpointError, and the one before is taken.
Files are written by a thread, from copies; the thread never calls MPI.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch

from fedmpi import disk, tensorfile
from fedmpi.errors import CheckpointError
from fedmpi.membership import Membership
from fedmpi.state import Key, StateTensor
from fedmpi.tensorfile import Table
from fedmpi.worker import Worker

log = logging.getLogger("fedmpi")

FORMAT = 3  # of checkpoints and of what a run says about itself; another is not read
MANIFEST = "manifest.json"
SERVER = "server.h5"
PARAMS: Key = ("exchange", "params")  # in server.h5
KEPT: Key = ("silos", "kept")  # and the name that its rule gives it: what a silo keeps, in its rank's file
AVERAGE: Key = ("average", "params")  # of the parameters over rounds, in server.h5
DIGEST_BYTES = 32 + 8  # SHA-256 and the file's size
_NONE = bytes(DIGEST_BYTES)


def rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.h5"


def folder_of(root: Path, round: int, best: bool = False) -> Path:
    """Where round's checkpoint lies under the run directory `root`; with `best` what is kept of it to be evaluated."""
    return root / "checkpoints" / f"{'best' if best else 'round'}-{round:06d}"


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Best:
    """This rank's part of what is kept of a round to be evaluated."""

    round: int
    record: Mapping[str, Any]
    score: float  # higher is better
    tensors: Sequence[StateTensor]
    members: Membership  # of the round


class Writer:
    """One rank's writer and its thread. `start` copies and returns; `written` says which round's file is safe.
    `allowed` is called before a write and raises where there must be none."""

    def __init__(self, root: Path, rank: int, allowed: Callable[[], None] = lambda: None) -> None:
        self.root = root
        self.rank = rank
        self._allowed = allowed
        self._copies: dict[Key, torch.Tensor] = {}
        self._worker = Worker("checkpoint")
        self._written = -1
        self._digests: tuple[bytes, ...] = (_NONE,) * 4

    def start(self, round: int, tensors: Sequence[StateTensor], best: Best | None = None) -> None:
        """Copy this rank's part of the state (state.gathered) and begin to write it, and what is kept of the best round
        before, which stays as it is meanwhile. Waits for the write before, if it still runs."""
        self.join()
        jobs = [(folder_of(self.root, round), self._tables(tensors, copied=True))]
        if best is not None:
            jobs.append((folder_of(self.root, best.round, best=True), self._tables(best.tensors, copied=False)))
        self._worker.start(lambda: self._write(round, jobs))

    def _tables(self, tensors: Sequence[StateTensor], copied: bool) -> dict[str, list[Table]]:
        """What each file holds; of silos always a copy."""
        files: dict[str, list[Table]] = {}
        if rows := _rows([one for one in tensors if one.placement == "per_silo"]):
            files[rank_file(self.rank)] = rows
        if whole := [one for one in tensors if one.placement != "per_silo"]:
            files[SERVER] = [
                Table(one.key, self._copy(*one[:2]) if copied else one.tensor, None, one.placement, one.grows)
                for one in whole
            ]
        return files

    def _copy(self, key: Key, tensor: torch.Tensor) -> torch.Tensor:
        kept = self._copies.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return kept.copy_(tensor.detach())

    def _write(self, round: int, jobs: Iterable[tuple[Path, Mapping[str, list[Table]]]]) -> None:
        found: list[bytes] = []
        self._allowed()
        for folder, files in jobs:
            if folder.is_symlink():  # what it stands for is not ours
                folder.unlink()
            digests = {name: write_file(folder / name, tables) for name, tables in files.items()}
            found += [digests.get(rank_file(self.rank), _NONE), digests.get(SERVER, _NONE)]
        self._digests = (*found, *(_NONE,) * 4)[:4]
        self._written = round

    @property
    def written(self) -> int:
        """The newest round whose file of this rank is safe; -1 for none. Raises CheckpointError if writing failed."""
        if (error := self._worker.error) is not None:
            what = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(f"cannot write a checkpoint into {self.root}: {what}") from error
        return self._written

    def wait(self, limit_s: float) -> bool:
        """Is what was started on disk, by now or within `limit_s`?"""
        return self._worker.wait(limit_s)

    def join(self) -> None:
        """Wait until what was started is on disk. Raises CheckpointError if writing failed."""
        self._worker.wait()
        _ = self.written

    def forget_failure(self) -> None:
        """The write that failed is over, and the next one may begin."""
        self._worker.error = None

    def close(self, limit_s: float) -> None:
        """Let the thread end, once what was started is on disk or after `limit_s`."""
        self._worker.close(limit_s)

    @property
    def digests(self) -> bytes:
        """This rank's row for the manifests: its rank file's digest, then the server file's; zeros for none; then the
        same of what was written of the best round."""
        return b"".join(self._digests)


def _rows(tensors: Iterable[StateTensor]) -> list[Table]:
    """What silos keep, those of one shape under one key together."""
    alike: dict[tuple[Key, Any, Any], list[StateTensor]] = {}
    for one in tensors:
        alike.setdefault((one.key, one.tensor.shape, one.tensor.dtype), []).append(one)
    return [
        Table(key, torch.stack([one.tensor.detach().cpu() for one in rows]), [one.silo for one in rows])
        for (key, *_), rows in alike.items()
    ]


def write_file(path: Path, tables: Sequence[Table]) -> bytes:
    """Write one file so that it is there whole or not at all; its SHA-256 and size come back."""
    digest, size = tensorfile.write(path, tables)
    disk.sync(path.parent.parent)  # the round's folder may be new too
    return digest + size.to_bytes(8, "little")


def seal(
    root: Path,
    round: int,
    rows: Sequence[bytes],
    silos: Sequence[Sequence[str]],
    about: Mapping[str, Any],
    best: bool = False,
) -> None:
    """Write the manifest of a round whose files are all safe. `rows` are the ranks' `digests`, `silos` their silos."""
    rows = [row[2 * DIGEST_BYTES :] if best else row for row in rows]
    files: dict[str, Any] = {SERVER: _entry(rows[0][DIGEST_BYTES:])}
    for rank, (row, some) in enumerate(zip(rows, silos, strict=True)):
        if some:
            files[rank_file(rank)] = _entry(row[:DIGEST_BYTES]) | {"silos": list(some)}
    text = json.dumps({"format": FORMAT, "round": round, **about, "files": files}, indent=1)
    body = text.removesuffix(_END)
    disk.replace_text(folder_of(root, round, best) / MANIFEST, f"{body}{_OWN_SHA}{_sha256(body)}{_OWN_END}")


_END, _OWN_SHA, _OWN_END = "\n}", ',\n "sha256": "', '"\n}'


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _entry(row: bytes) -> dict[str, Any]:
    return {"sha256": row[:32].hex(), "bytes": int.from_bytes(row[32:40], "little")}


def prune(root: Path, keep: int, scores: Mapping[int, float | None]) -> None:
    """Delete all sealed checkpoints but the newest `keep` and the best (highest score), and what was kept of rounds
    that are the best no longer."""
    sealed, bests = sealed_rounds(root), sealed_rounds(root, best=True)
    # Of equals the first.
    scored = [(score, -r) for r in {*sealed, *bests} if (score := scores.get(r)) is not None]
    top = -max(scored)[1] if scored else None
    for round in sealed:
        if round not in (*sealed[-keep:], top):
            remove(root, round)
    for round in bests:
        if round != top or round in sealed:
            remove(root, round, best=True)


def remove(root: Path, round: int, best: bool = False) -> None:
    """Delete a checkpoint; its manifest goes first, so that a crash leaves an unfinished one, not a torn one."""
    folder = folder_of(root, round, best)
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink(missing_ok=True)
        return
    with contextlib.suppress(IsADirectoryError, PermissionError):  # whatever lies in its place goes with the rest
        (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_after(root: Path, round: int) -> None:
    """Delete what lies beyond the round that a run resumes from, and what was never finished."""
    for folder in sorted((root / "checkpoints").glob("*-*")):
        number = _number(folder)
        if number is not None and (number > round or not (folder / MANIFEST).exists()):
            remove(root, number, folder.name.startswith("best"))


# ---------------------------------------------------------------- reading


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class File:
    """What a manifest says of a file."""

    sha256: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, pydantic.Field(ge=0, strict=True)]
    silos: list[str] = pydantic.Field(default_factory=list)  # whose rows it has


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Manifest:
    """What a manifest says of a round."""

    format: Literal[3]
    round: pydantic.StrictInt
    files: dict[Annotated[str, pydantic.Field(pattern=r"^(server|rank-\d{4,})\.h5$")], File]
    record: dict[str, Any] | None = None  # of the round; selectors go by it
    score: pydantic.StrictFloat | None = None  # how good the round is, higher is better; None: it was not evaluated
    ranks: pydantic.StrictInt = 1
    epoch: pydantic.StrictInt = 0  # of the round's membership

    @property
    def hosted(self) -> list[list[str]]:
        """The silos of each rank that the run had."""
        return [self.files[name].silos if (name := rank_file(r)) in self.files else [] for r in range(self.ranks)]


_MANIFEST = pydantic.TypeAdapter(Manifest)


def _number(folder: Path) -> int | None:
    match = re.fullmatch("(?:round|best)-([0-9]{6,})", folder.name)
    return int(match[1]) if match else None


def sealed_rounds(root: Path, best: bool = False) -> list[int]:
    """The rounds that have a manifest, oldest first; with `best` those of which that is kept which is evaluated."""
    folders = (path.parent for path in (root / "checkpoints").glob(f"{'best' if best else 'round'}-*/{MANIFEST}"))
    found = (_number(folder) for folder in folders if not folder.is_symlink())
    return sorted(number for number in found if number is not None)


def manifest(root: Path, round: int, best: bool = False) -> Manifest:
    """The manifest of a round. Raises CheckpointError for whatever is wrong with it."""
    path = folder_of(root, round, best) / MANIFEST
    try:
        body, sha, digest = disk.read_bytes(path).decode().rpartition(_OWN_SHA)
        if not sha or digest != f"{_sha256(body)}{_OWN_END}":
            raise ValueError("it is damaged: its checksum is not its own")
        found = _MANIFEST.validate_python(json.loads(body + _END))
        silos = [silo for file in found.files.values() for silo in file.silos]
        if found.round != round or (found.record or {"round": round}).get("round") != round:
            raise ValueError("it speaks of another round")
        if SERVER not in found.files or len(set(silos)) != len(silos):
            raise ValueError(f"it has no {SERVER}, or a silo twice")
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{path}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    return found


def scores(root: Path) -> dict[int, float | None]:
    """How good each round is that is on disk, higher is better; None where it was not evaluated. Those whose manifest
    is unreadable are left out with a warning."""
    found: dict[int, float | None] = {}
    for best in (True, False):
        for round in sealed_rounds(root, best):
            try:
                found[round] = manifest(root, round, best).score
            except CheckpointError as error:
                log.warning("skipped checkpoint of round %d: %s", round, error)
    return dict(sorted(found.items()))


def kept_as_best(root: Path, round: int) -> bool:
    """Is of this round only that on disk which is evaluated?"""
    return round not in sealed_rounds(root) and round in sealed_rounds(root, best=True)


def check(
    root: Path,
    round: int,
    server: bool = True,
    silos: Collection[str] | None = None,
    best: bool = False,
    others: bool = False,
) -> Manifest:
    """The manifest, once the files that will be read are found to be whole: that of the server, and those that hold
    these silos (None: all files); with `others` there may be silos of which it has none. Raises CheckpointError."""
    found, folder = manifest(root, round, best), folder_of(root, round, best)
    wanted = None if silos is None else set(silos)
    there = {silo for file in found.files.values() for silo in file.silos}
    if wanted and not others and (missing := sorted(wanted - there)):
        raise CheckpointError(f"{folder}: no state of silo {', '.join(missing[:4])}")
    for name, file in found.files.items():
        if server if name == SERVER else wanted is None or not wanted.isdisjoint(file.silos):
            _check_file(folder / name, file)
    return found


def _check_file(path: Path, file: File) -> None:
    try:
        with open(disk.open_regular(path), "rb") as raw:
            if (size := raw.seek(0, 2)) != file.bytes:
                raise CheckpointError(f"{path} is torn: {size} bytes instead of {file.bytes}")
            raw.seek(0)
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(str(error)) from None
    if digest != file.sha256:
        raise CheckpointError(f"{path} is corrupt: its checksum is not the manifest's")
    rows = {silo for entry in tensorfile.contents(path) for silo in entry.silos or ()}
    if rows != set(file.silos):
        raise CheckpointError(f"{path} has other silos than its manifest says")


def newest(
    root: Path,
    server: bool = True,
    silos: Collection[str] | None = None,
    below: int | None = None,
    others: bool = False,
) -> int:
    """The newest round, below `below`, that is whole as far as this rank is concerned (`check`); -1 for none. What is
    not is skipped with a warning."""
    for round in reversed(sealed_rounds(root)):
        if below is not None and round >= below:
            continue
        try:
            check(root, round, server, silos, others=others)
        except CheckpointError as error:
            log.warning("skipped checkpoint of round %d: %s", round, error)
            continue
        return round
    return -1


def read_server(root: Path, round: int, best: bool = False) -> dict[Key, torch.Tensor]:
    """All tensors of server.h5, by key. Raises CheckpointError."""
    return {one.key: one.tensor for one in read_state(root, round, best)}


def read_state(root: Path, round: int, best: bool = False) -> list[StateTensor]:
    """All tensors of server.h5. Raises CheckpointError."""
    return tensorfile.read(folder_of(root, round, best) / SERVER)


def read_silos(root: Path, round: int, ids: Iterable[str], best: bool = False) -> dict[str, dict[Key, torch.Tensor]]:
    """What each of these silos kept, from whichever rank files hold it. Raises CheckpointError if one is not there."""
    wanted, folder = set(ids), folder_of(root, round, best)
    kept: dict[str, dict[Key, torch.Tensor]] = {}
    for name, file in manifest(root, round, best).files.items() if wanted else ():
        if here := wanted.intersection(file.silos):
            kept |= tensorfile.read_rows(folder / name, here)
    if missing := sorted(wanted - set(kept)):
        raise CheckpointError(f"{folder}: no state of silo {', '.join(missing[:4])}")
    return kept
