"""Rounds that have a checkpoint, by the names in a run directory alone: imports nothing heavy, and opens no file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "manifest.json"  # written last: a folder that has it is complete


def folder_of(root: Path, round: int, best: bool = False) -> Path:
    """The round's checkpoint folder under the run directory `root`; with `best`, the folder kept for evaluation."""
    return root / "checkpoints" / f"{'best' if best else 'round'}-{round:06d}"


def number_of(folder: str, best: bool = False) -> int | None:
    """The round of a checkpoint folder with this name; None if it is no such name."""
    match = re.fullmatch(f"{'best' if best else 'round'}-([0-9]{{6,}})", folder)
    return int(match[1]) if match else None


def newest_first(root: Path, best: bool = False) -> Iterator[int]:
    """Rounds that have a manifest; with `best`, those kept for evaluation. Names are found by listing folders, because
    an NFS client caches for half a minute that a name does not exist."""
    names = _listed(root / "checkpoints")
    for round in sorted((n for name in names if (n := number_of(name, best)) is not None), reverse=True):
        folder = folder_of(root, round, best)
        if not folder.is_symlink() and MANIFEST in _listed(folder):
            yield round


def _listed(folder: Path) -> list[str]:
    """The names in a folder; none if it cannot be listed."""
    try:
        return os.listdir(folder)
    except OSError:
        return []
