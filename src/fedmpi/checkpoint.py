"""Checkpoints: everything the next round depends on, written atomically.

    checkpoints/round-000040/
      server.h5        all tensors that belong to no silo               by rank 0
      rank-0003.h5     tensors of silos, one row per silo               by every rank that hosts silos
      manifest.json    SHA-256 of every file and of itself, last        by rank 0, and once per host with its own disk
    checkpoints/best-000037/
      the same files   what evaluation needs of the best round, if it has no checkpoint; a run cannot resume from it

A file is written beside its final name, flushed, and renamed. The manifest follows when the files of all ranks are
safe. So a folder without a manifest is an unfinished checkpoint, and a file that disagrees with its checksum is torn.
Any problem with a checkpoint raises CheckpointError, and the one before is used.
A thread writes the files, from copies; it never calls MPI.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
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
from fedmpi.sealed import MANIFEST, folder_of, newest_first, number_of
from fedmpi.state import Key, StateTensor
from fedmpi.tensorfile import Table
from fedmpi.worker import Worker

log = logging.getLogger("fedmpi")

FORMAT = 3  # of checkpoints and of a run's description; other versions are refused
SERVER = "server.h5"
PARAMS: Key = ("exchange", "params")  # in server.h5
KEPT: Key = ("silos", "kept")  # prefix of a silo's state, followed by the rule's name for it; in the rank's file
CHECKSUM: Key = ("data", "checksum")  # of the data that a silo trained on; in the rank's file
AVERAGE: Key = ("average", "params")  # mean of the parameters over rounds, in server.h5
DIGEST_BYTES = 32 + 8  # SHA-256 and the file's size
_NONE = bytes(DIGEST_BYTES)


def rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.h5"


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Best:
    """This rank's part of a round that is kept for evaluation."""

    round: int
    record: Mapping[str, Any]
    score: float  # higher is better
    tensors: Sequence[StateTensor]
    members: Membership  # of the round


class Writer:
    """One rank's checkpoint writer, with its thread. `start` copies and returns; `written` is the newest safe round.

    `allowed` is called before each write and raises if writing is not allowed."""

    def __init__(self, root: Path, rank: int, allowed: Callable[[], None] = lambda: None) -> None:
        self.root = root
        self.rank = rank
        self._allowed = allowed
        self._copies: dict[Key, torch.Tensor] = {}
        self._worker = Worker("checkpoint")
        self._written = -1
        self._digests: tuple[bytes, ...] = (_NONE,) * 4

    def start(self, round: int, tensors: Sequence[StateTensor], best: Best | None = None) -> None:
        """Copies this rank's part of the state (state.gathered) and starts to write it.

        Also writes `best`, whose tensors must not change meanwhile. Waits for the previous write, if it still runs."""
        self.join()
        jobs = [(folder_of(self.root, round), self._tables(tensors, copied=True))]
        if best is not None:
            jobs.append((folder_of(self.root, best.round, best=True), self._tables(best.tensors, copied=False)))
        self._worker.start(lambda: self._write(round, jobs))

    def _tables(self, tensors: Sequence[StateTensor], copied: bool) -> dict[str, list[Table]]:
        """The content of each file; silos' tensors are always copied."""
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
            if folder.is_symlink():  # do not write into the link's target
                folder.unlink()
            digests = {name: write_file(folder / name, tables) for name, tables in files.items()}
            found += [digests.get(rank_file(self.rank), _NONE), digests.get(SERVER, _NONE)]
        self._digests = (*found, *(_NONE,) * 4)[:4]
        self._written = round

    @property
    def written(self) -> int:
        """The newest round whose file of this rank is safe; -1 for none. Raises CheckpointError if a write failed."""
        if (error := self._worker.error) is not None:
            what = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(f"cannot write a checkpoint into {self.root}: {what}") from error
        return self._written

    def wait(self, limit_s: float) -> bool:
        """Waits up to `limit_s` seconds; True if the started write is on disk."""
        return self._worker.wait(limit_s)

    def join(self) -> None:
        """Waits until the started write is on disk. Raises CheckpointError if it failed."""
        self._worker.wait()
        _ = self.written

    def forget_failure(self) -> None:
        """Clears a failed write, so that the next one may start."""
        self._worker.error = None

    def close(self, limit_s: float) -> None:
        """Ends the thread once the started write is on disk, or after `limit_s` seconds."""
        self._worker.close(limit_s)

    @property
    def digests(self) -> bytes:
        """This rank's row for the manifests: digest of its rank file, then of the server file, zeros for no file; then
        the same two for the best round."""
        return b"".join(self._digests)


def _rows(tensors: Iterable[StateTensor]) -> list[Table]:
    """Silos' tensors as tables: tensors with equal key, shape and dtype become rows of one."""
    alike: dict[tuple[Key, Any, Any], list[StateTensor]] = {}
    for one in tensors:
        alike.setdefault((one.key, one.tensor.shape, one.tensor.dtype), []).append(one)
    return [
        Table(key, torch.stack([one.tensor.detach().cpu() for one in rows]), [one.silo for one in rows])
        for (key, *_), rows in alike.items()
    ]


def write_file(path: Path, tables: Sequence[Table]) -> bytes:
    """Writes one file atomically; returns its SHA-256 and size."""
    digest, size = tensorfile.write(path, tables)
    disk.sync(path.parent.parent)  # the round's folder may be new as well
    return digest + size.to_bytes(8, "little")


def seal(
    root: Path,
    round: int,
    rows: Sequence[bytes],
    silos: Sequence[Sequence[str]],
    about: Mapping[str, Any],
    best: bool = False,
) -> None:
    """Writes the manifest of a round whose files are all safe. `rows`: the ranks' `digests`; `silos`: ids by rank."""
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
    """Deletes all sealed checkpoints except the newest `keep` and the best (highest score), and evaluation copies of
    rounds that are no longer the best."""
    sealed, bests = sealed_rounds(root), sealed_rounds(root, best=True)
    # On a tie, the first.
    scored = [(score, -r) for r in {*sealed, *bests} if (score := scores.get(r)) is not None]
    top = -max(scored)[1] if scored else None
    for round in sealed:
        if round not in (*sealed[-keep:], top):
            remove(root, round)
    for round in bests:
        if round != top or round in sealed:
            remove(root, round, best=True)


def remove(root: Path, round: int, best: bool = False) -> None:
    """Deletes a checkpoint. Its manifest goes first, so that a crash leaves an unfinished one, not a torn one."""
    folder = folder_of(root, round, best)
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink(missing_ok=True)
        return
    with contextlib.suppress(IsADirectoryError, PermissionError):  # rmtree removes whatever lies there
        (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_after(root: Path, round: int) -> None:
    """Deletes checkpoints of later rounds than the one a run resumes from, and unfinished ones."""
    for folder in sorted((root / "checkpoints").glob("*-*")):
        best = folder.name.startswith("best")
        number = number_of(folder.name, best)
        if number is not None and (number > round or not (folder / MANIFEST).exists()):
            remove(root, number, best)


# ---------------------------------------------------------------- reading


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class File:
    """A file's entry in a manifest."""

    sha256: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, pydantic.Field(ge=0, strict=True)]
    silos: list[str] = pydantic.Field(default_factory=list)  # ids of its rows


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Manifest:
    """A round's manifest."""

    format: Literal[3]
    round: pydantic.StrictInt
    files: dict[Annotated[str, pydantic.Field(pattern=r"^(server|rank-\d{4,})\.h5$")], File]
    record: dict[str, Any] | None = None  # of the round; selectors read it on resume
    score: pydantic.StrictFloat | None = None  # higher is better; None: not evaluated
    ranks: pydantic.StrictInt = 1
    epoch: pydantic.StrictInt = 0  # of the round's membership
    # Id and path of each silo that was admitted and that the configuration does not name.
    admitted: list[Annotated[list[str], pydantic.Field(min_length=2, max_length=2)]] = pydantic.Field(
        default_factory=list
    )

    @property
    def hosted(self) -> list[list[str]]:
        """The silo ids of each rank of the run."""
        return [self.files[name].silos if (name := rank_file(r)) in self.files else [] for r in range(self.ranks)]


_MANIFEST = pydantic.TypeAdapter(Manifest)


def sealed_rounds(root: Path, best: bool = False) -> list[int]:
    """Rounds that have a manifest, oldest first; with `best`, those kept for evaluation."""
    return sorted(newest_first(root, best))


def manifest(root: Path, round: int, best: bool = False) -> Manifest:
    """The manifest of a round. Raises CheckpointError if it is unreadable, damaged or inconsistent."""
    path = folder_of(root, round, best) / MANIFEST
    try:
        body, sha, digest = disk.read_bytes(path).decode().rpartition(_OWN_SHA)
        if not sha or digest != f"{_sha256(body)}{_OWN_END}":
            raise ValueError("it is damaged: its checksum does not match")
        found = _MANIFEST.validate_python(json.loads(body + _END))
        silos = [silo for file in found.files.values() for silo in file.silos]
        if found.round != round or (found.record or {"round": round}).get("round") != round:
            raise ValueError("it is of another round")
        if SERVER not in found.files or len(set(silos)) != len(silos):
            raise ValueError(f"it has no {SERVER}, or a silo twice")
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{path}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    return found


def scores(root: Path) -> dict[int, float | None]:
    """Score of each round on disk, higher is better; None if not evaluated. Rounds with an unreadable manifest are left
    out with a warning."""
    found: dict[int, float | None] = {}
    for best in (True, False):
        for round in sealed_rounds(root, best):
            try:
                found[round] = manifest(root, round, best).score
            except CheckpointError as error:
                log.warning("skipped checkpoint of round %d: %s", round, error)
    return dict(sorted(found.items()))


def kept_as_best(root: Path, round: int) -> bool:
    """True if only the round's evaluation copy is on disk, not its checkpoint."""
    return round not in sealed_rounds(root) and round in sealed_rounds(root, best=True)


def check(
    root: Path,
    round: int,
    server: bool = True,
    silos: Collection[str] | None = None,
    best: bool = False,
    others: bool = False,
) -> Manifest:
    """Checks the files that will be read and returns the manifest. Raises CheckpointError.

    Checks the server's file if `server`, and the files that hold `silos` (None: all files). A silo without stored state
    is an error unless `others`."""
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
        raise CheckpointError(f"{path} holds other silos than its manifest lists")


def newest(
    root: Path,
    server: bool = True,
    silos: Collection[str] | None = None,
    below: int | None = None,
    others: bool = False,
    least: int = 0,
) -> int:
    """The newest round, below `below` and from `least` on, that is whole for this rank (see `check`); -1 for none.
    Others are skipped with a warning."""
    for round in reversed(sealed_rounds(root)):
        if round < least or (below is not None and round >= below):
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
    """All tensors of server.h5, with their placement. Raises CheckpointError."""
    return tensorfile.read(folder_of(root, round, best) / SERVER)


def read_silos(root: Path, round: int, ids: Iterable[str], best: bool = False) -> dict[str, dict[Key, torch.Tensor]]:
    """Stored tensors of these silos, by id, from whichever rank files hold them. Raises CheckpointError if missing."""
    wanted, folder = set(ids), folder_of(root, round, best)
    kept: dict[str, dict[Key, torch.Tensor]] = {}
    for name, file in manifest(root, round, best).files.items() if wanted else ():
        if here := wanted.intersection(file.silos):
            kept |= tensorfile.read_rows(folder / name, here)
    if missing := sorted(wanted - set(kept)):
        raise CheckpointError(f"{folder}: no state of silo {', '.join(missing[:4])}")
    return kept
