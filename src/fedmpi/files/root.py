"""The folder of a run: opened, compared with this run, and probed."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Mapping
from typing import Any

from fedmpi.errors import ConfigError
from fedmpi.files.envelope import Torn, packed, unpacked
from fedmpi.files.folder import FINAL, Folder, Pace
from fedmpi.files.names import EPOCHS, FOLDERS, LINE, PART, RUN

REMEDY = "use a file system with hard links and atomic renames (NFS, Lustre, GPFS, BeeGFS, a local disk)"
NO_LINKS = {
    errno.EPERM,
    errno.EACCES,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EMLINK,
    errno.EXDEV,
    errno.EINVAL,
}
TRIES = 3  # of what does not work without an error


def open_run(folder: Folder, about: Mapping[str, Any]) -> str:
    """The run's name, of random letters. The first caller, server or silo, says what the run is (`about`, JSON); all
    later ones must say the same. Creates what is missing in the root and probes the file system.

    Raises ConfigError if the root does not exist, belongs to another run or to something else, or cannot be used.
    """
    there = _own(folder)
    for name in FOLDERS:
        if name not in there:
            folder.tried(f"make {name}", lambda name=name: folder.make(name))  # type: ignore[misc]
    probe(folder)
    if RUN not in there:
        parts, _ = packed({"kind": "run", "run": folder.token(), "about": about})
        folder.publish_first(RUN, parts)
    return _same_run(folder, about)


def compare(folder: Folder, about: Mapping[str, Any]) -> None:
    """Raises ConfigError if the root does not exist, or belongs to another run or to something else. Writes nothing."""
    if RUN in _own(folder):
        _same_run(folder, about)


def _own(folder: Folder) -> list[str]:
    """The names in the root. Raises ConfigError if there is none, or if it belongs to something else."""
    there = _listed(folder)
    foreign = [name for name in there if name not in FOLDERS and not name.startswith(RUN)]
    if foreign and RUN not in there:
        raise ConfigError(f"transport.root: {folder.root} is not empty and holds no run ('{foreign[0]}')")
    return there


def _same_run(folder: Folder, about: Mapping[str, Any]) -> str:
    """The run's name. Raises ConfigError if it is another run."""
    about = json.loads(json.dumps(about))  # as it is read back
    stored = _read_run(folder)
    differs = [key for key in (*about, *stored["about"]) if about.get(key) != stored["about"].get(key)]
    if differs:
        raise ConfigError(
            f"transport.root: {folder.root} belongs to another run: its {differs[0]} is "
            f"{stored['about'].get(differs[0])!r}, here it is {about.get(differs[0])!r}; take another folder"
        )
    return str(stored["run"])


def _read_run(folder: Folder) -> dict[str, Any]:
    pace = Pace.of_errors(folder)
    while True:
        try:
            return unpacked(folder.read(RUN), kind="run").head
        except (OSError, Torn) as error:
            if pace.over():
                raise ConfigError(f"transport.root: cannot read {folder.root}/{RUN}: {error}") from None
        pace.wait()


def _listed(folder: Folder) -> list[str]:
    pace = Pace.of_errors(folder)
    while True:
        try:
            return folder.listing("")
        except FileNotFoundError:
            raise ConfigError(
                f"transport.root: {folder.root} does not exist; create it on a file system that all jobs share"
            ) from None
        except OSError as error:
            if error.errno in FINAL or pace.over():
                folder.refuse("list", error)
        pace.wait()


def probe(folder: Folder) -> None:
    """Try what the transport relies on: links between folders, renames, listings. Raises ConfigError with the remedy if
    the file system does not have it. Operations: about twelve."""
    pace = Pace.of_errors(folder)
    problems = 0
    while True:
        token = folder.token()
        paths = [f"{EPOCHS}/probe{PART}{token}1", f"{EPOCHS}/probe{PART}{token}2", f"{LINE}/probe{PART}{token}"]
        try:
            if not (problem := _probe(folder, *paths)):
                return
            problems += 1
            if problems == TRIES:
                raise ConfigError(f"transport.root: {problem} in {folder.root}: {REMEDY}")
        except OSError as error:
            if error.errno in FINAL or pace.over():
                folder.refuse("write", error)
        finally:
            for path in paths:
                folder.remove(path)
        pace.wait()


def _probe(folder: Folder, one: str, two: str, linked: str) -> str:
    """What does not work; empty if all does. Raises OSError for what may pass."""
    folder.create(one, [b"one"])
    folder.create(two, [b"two"])
    try:
        with contextlib.suppress(FileExistsError):  # a repeated request that was done the first time
            folder.link(one, linked)
    except OSError as error:
        if error.errno in NO_LINKS:
            return f"hard links fail ({error.strerror})"
        raise
    try:
        folder.link(two, linked)
        return "a hard link replaces a file"
    except FileExistsError:
        pass
    with contextlib.suppress(FileNotFoundError):  # as above
        folder.rename(one, two)
    folder.sync(EPOCHS)
    listed = [f"{where}/{name}" for where in (EPOCHS, LINE) for name in folder.listing(where)]
    if two not in listed or linked not in listed:
        return "a listing lacks new files"
    if one in listed or bytes(folder.read(two)) != b"one":
        return "a rename does not replace a file"
    return "" if bytes(folder.read(linked)) == b"one" else "a hard link is another file"
