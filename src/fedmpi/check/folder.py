"""The run directory before a run: whether it can be written, its free space, and what it holds already."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from fedmpi import checkpoint, disk, fork, sources, stopping
from fedmpi.check.findings import Findings
from fedmpi.comm import Comm, ranks_text
from fedmpi.components import to_dict
from fedmpi.config import Config
from fedmpi.differences import differences
from fedmpi.directory import left_later, newest_whole, read_config, stored_members
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


def goes_on_after(root: Path, comm: Comm, mine: Collection[str], found: Findings) -> int:
    """The newest round whose checkpoint is whole on every rank, 0 if there is none. Notes newer ones that are damaged,
    and members that have all left since. `mine`: silos that this rank hosts. Collective."""
    sealed = [] if fork.begins(root) else checkpoint.sealed_rounds(root)
    last = int(comm.gather_number(max(sealed, default=0)).max())
    if not last:
        return 0
    whole, lost = newest_whole(root, comm, mine, others=True)
    if comm.rank:
        return max(0, whole)
    if whole < 0:
        why = f"none is whole on {ranks_text(lost)}; repair it, or choose another out="
        found.fault(f"{root} holds checkpoints up to round {last}, but {why}")
    elif whole < last:
        found.warn(f"{root}: the checkpoint of round {last} is damaged; the run goes on after round {whole}")
        members = stored_members(root)
        one = next(one for one in members if one.round == whole)
        found.attempt(lambda: left_later(one, sorted(one.silos), members[0].silos), "out")
    return max(0, whole)


def stored(root: Path, config: Config, newest: int, model: Sequence[Entry], unshared: str, found: Findings) -> None:
    """Notes it if the run there is another one, or still trains, and what a fork cannot go on from. `newest`: the round
    that it goes on after; `model`: tensors of the model, none if it is not known; `unshared`: see `Trial`."""
    if stopping.is_training(root):
        found.fault(f"out: another job is training in {root}; choose another out=, or `fedmpi stop {root}`")
    if fork.begins(root) or not checkpoint.sealed_rounds(root):
        if (section := fork.section_of(config.fork)) is not None:
            found.attempt(lambda: _fork(section, root, config, model, unshared), "fork")
        return
    begun = found.attempt(lambda: read_config(root), "out")
    if begun is None:
        return
    changed = differences(begun.config, config, begun.about["plan"])
    if changed := changed + (other_model(begun.about, model, unshared) if model else []):
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        found.fault(f"{root} holds checkpoints of another run: {'; '.join(changed[:3])}{more}; choose another out=")
    else:
        if others := sources.changed(begun.about.get("code", {}), to_dict(config)):
            note = found.fault if config.resume.code == "refuse" else found.warn
            note(f"code has changed since {root} was trained with it: {', '.join(others)}; restore it, or another out=")
        if newest >= config.rounds:
            found.warn(f"nothing to do: {newest} rounds are done in {root}; set rounds=N to train more")
        elif (ended := stopping.ended(root))[0] > 0:
            found.warn(f"{root} has ended after round {ended[0]}: {ended[1]}; another stop.early lets it go on")


def _fork(section: fork.ForkSection, root: Path, config: Config, model: Sequence[Entry], unshared: str) -> None:
    """Raises ConfigError if the run cannot begin as this fork."""
    fork.look(section, root)
    if model:
        changed_in_fork(config, section, model, unshared, Path(section.run))
