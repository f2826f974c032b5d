"""The folder of a run: opened, compared with this run, and probed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmpi.errors import ConfigError
from fedmpi.files.envelope import Torn, packed, unpacked
from fedmpi.files.folder import Folder, Pace
from fedmpi.files.names import FOLDERS, PART, RUN

REMEDY = "use a file system with hard links and atomic renames (NFS, Lustre, GPFS, BeeGFS, a local disk)"


def open_run(folder: Folder, about: Mapping[str, Any]) -> str:
    """The run's name, of random letters. The first caller, server or silo, says what the run is (`about`, JSON); all
    later ones must say the same. Creates what is missing in the root and probes the file system.

    Raises ConfigError if the root does not exist, belongs to another run or to something else, or cannot be used.
    """
    try:
        names = folder.listing("")
    except FileNotFoundError:
        raise ConfigError(
            f"transport.root: {folder.root} does not exist; create it on a file system that all jobs share"
        ) from None
    except OSError as error:
        folder.refuse("list", error)
    foreign = [name for name in names if name not in FOLDERS and not name.startswith(RUN)]
    if foreign and RUN not in names:
        raise ConfigError(f"transport.root: {folder.root} is not empty and holds no run ('{foreign[0]}')")
    probe(folder)
    if RUN not in names:
        parts, _ = packed({"kind": "run", "run": folder.token(), "about": dict(about)})
        folder.publish_first(RUN, parts)
    stored = _read_run(folder)
    differs = [key for key in (*about, *stored["about"]) if about.get(key) != stored["about"].get(key)]
    if differs:
        raise ConfigError(
            f"transport.root: {folder.root} belongs to another run: its {differs[0]} is "
            f"{stored['about'].get(differs[0])!r}, here it is {about.get(differs[0])!r}; take another folder"
        )
    for name in FOLDERS:
        if name not in names:
            folder.make(name)
    return str(stored["run"])


def _read_run(folder: Folder) -> dict[str, Any]:
    pace, until_s = Pace(folder, 0.1, 5.0), folder.now() + folder.patience_s
    while True:
        try:
            return unpacked(folder.read(RUN), kind="run").head
        except (OSError, Torn) as error:
            if folder.now() >= until_s:
                raise ConfigError(f"transport.root: cannot read {folder.root}/{RUN}: {error}") from None
        pace.wait()


def probe(folder: Folder) -> None:
    """Try what the transport relies on. Raises ConfigError with the remedy if the file system does not have it."""
    token = folder.token()
    one, two, three = (f"{RUN}{PART}{token}{letter}" for letter in "abc")
    content = token.encode()
    try:
        try:
            folder.create(one, [content])
            folder.create(two, [b"other"])
        except OSError as error:
            folder.refuse("write", error)
        try:
            folder.link(one, three)
        except OSError as error:
            raise ConfigError(
                f"transport.root: hard links fail in {folder.root} ({error.strerror}): {REMEDY}"
            ) from None
        try:
            folder.link(two, three)
            raise ConfigError(f"transport.root: a hard link replaces a file in {folder.root}: {REMEDY}")
        except FileExistsError:
            pass
        try:
            folder.rename(one, two)
            folder.sync("")
        except OSError as error:
            raise ConfigError(f"transport.root: renames fail in {folder.root} ({error.strerror}): {REMEDY}") from None
        listed = {name for name in folder.listing("") if token in name}
        if listed not in ({name for name in (two, three)}, {name for name in (one, two, three)}):
            raise ConfigError(f"transport.root: a listing of {folder.root} lacks new files: {REMEDY}")
        if bytes(folder.read(two)) != content and len(listed) == 2:
            raise ConfigError(f"transport.root: a rename does not replace a file in {folder.root}: {REMEDY}")
    finally:
        for path in (one, two, three):
            folder.remove(path)
