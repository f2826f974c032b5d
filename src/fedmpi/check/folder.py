"""The run directory before a run: whether it can be written, its free space, and what it holds already."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from fedmpi import checkpoint, disk, fork, sources, stopping
from fedmpi.check.findings import Findings
from fedmpi.components import to_dict
from fedmpi.config import Config, differences
from fedmpi.directory import read_config
from fedmpi.flat import Entry
from fedmpi.output import size
from fedmpi.parts import changed_in_fork, other_model

PROBE = ".check"


def probe(root: Path, found: Findings) -> bool:
    """Writes a file in `root`, locks it and removes it, and the folders that were made for it. Faults are noted.
    Returns whether it worked."""
    made: list[Path] = []
    try:
        for folder in reversed((root, *root.parents)):
            if not folder.exists():
                folder.mkdir(mode=disk.FOLDER_MODE)
                made.append(folder)
        path = root / f"{PROBE}-{os.getpid()}"
        with open(disk.open_new(path), "wb") as file:
            try:
                file.write(b"written by fedmpi check\n")
                file.flush()
                os.fsync(file.fileno())
                _locked(file.fileno(), root, found)
            finally:
                path.unlink()
    except OSError as error:
        blocked = next((str(path) for path in (root, *root.parents) if path.is_file()), None)
        why = f"{blocked} is a file" if blocked else error.strerror or str(error)
        found.fault(f"out: cannot write into {root}: {why}; choose another out=, or make room or rights there")
        return False
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
    return True


def _locked(descriptor: int, root: Path, found: Findings) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        found.warn(f"out: {root} has no file locks ({error.strerror}): make sure that no two jobs train in it")


def free_bytes(root: Path) -> int:
    """Free space for this user where `root` is or would be."""
    return shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free


def room(root: Path, needed_bytes: int, found: Findings) -> int:
    """The free bytes at `root`. Notes it if checkpoints do not fit, or hardly."""
    free = free_bytes(root)
    if free < needed_bytes:
        found.fault(
            f"out: {root} has {size(free)} free, and its checkpoints need {size(needed_bytes)}; free some, choose "
            "another out=, or lower checkpoint.keep"
        )
    elif free < 2 * needed_bytes:
        found.warn(f"out: {root} has {size(free)} free, hardly more than the {size(needed_bytes)} of its checkpoints")
    return free


def stored(root: Path, config: Config, model: Sequence[Entry], unshared: str, found: Findings) -> int:
    """The newest round on disk, 0 if there is none. Notes it if the run there is another one, or still trains, and what
    a fork cannot go on from. `model`: tensors of the model, none if it is not known; `unshared`: see `Trial`."""
    if stopping.is_training(root):
        found.fault(f"out: another job is training in {root}; choose another out=, or `fedmpi stop {root}`")
    rounds = [] if fork.begins(root) else checkpoint.sealed_rounds(root)
    if not rounds:
        if (section := fork.section_of(config.fork)) is not None:
            found.attempt(lambda: _fork(section, root, config, model, unshared), "fork")
        return 0
    begun = found.attempt(lambda: read_config(root), "out")
    if begun is None:
        return rounds[-1]
    changed = differences(begun.config, config, begun.about["plan"])
    if changed := changed + (other_model(begun.about, model, unshared) if model else []):
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        found.fault(f"{root} holds checkpoints of another run: {'; '.join(changed[:3])}{more}; choose another out=")
    else:
        if others := sources.changed(begun.about.get("code", {}), to_dict(config)):
            note = found.fault if config.resume.code == "refuse" else found.warn
            note(f"code has changed since {root} was trained with it: {', '.join(others)}; restore it, or another out=")
        if rounds[-1] >= config.rounds:
            found.warn(f"nothing to do: {rounds[-1]} rounds are done in {root}; set rounds=N to train more")
        elif (ended := stopping.ended(root))[0] > 0:
            found.warn(f"{root} has ended after round {ended[0]}: {ended[1]}; another stop.early lets it go on")
    return rounds[-1]


def _fork(section: fork.ForkSection, root: Path, config: Config, model: Sequence[Entry], unshared: str) -> None:
    """Raises ConfigError if the run cannot begin as this fork."""
    fork.look(section, root)
    if model:
        changed_in_fork(config, section, model, unshared, Path(section.run))
