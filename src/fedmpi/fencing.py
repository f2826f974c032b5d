"""The epoch of a run directory: a number that only grows, so that an old start that is still alive cannot commit.

`fedmpi run` raises the epoch before every start and passes it to the ranks in FEDMPI_EPOCH. A rank writes a checkpoint,
and rank 0 a manifest, only while `OUT/epochs` holds no higher epoch. A run without a supervisor takes the highest epoch
that exists.

Names are looked up by listing their folder, because NFS clients cache for half a minute that a name did not exist.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmpi import disk
from fedmpi.errors import CheckpointError, ConfigError

FOLDER = "epochs"  # in the run directory
VARIABLE = "FEDMPI_EPOCH"  # passes the epoch to the ranks of a supervised start
VISIBLE_S = 90.0  # how long a new epoch may take to appear on another host: acdirmax of nfs(5), and a margin


def highest(root: Path) -> int:
    """The highest epoch of the run directory; 0 if there is none."""
    with contextlib.suppress(OSError):
        return max((int(name) for name in os.listdir(root / FOLDER) if name.isdigit()), default=0)
    return 0


def raise_epoch(root: Path, about: Mapping[str, Any]) -> int:
    """Create the next epoch, whose file holds `about`, and return it. Each number goes to one caller only. Raises
    OSError."""
    folder = root / FOLDER
    disk.make_folder(folder)
    part = folder / f"epoch.part-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        os.close(disk.open_new(part))
        part.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), **about}))
        disk.sync(part)
        while True:
            epoch = highest(root) + 1
            try:
                os.link(part, folder / f"{epoch:06d}")
            except OSError:
                # NFS may report an error although it made the link: the file's link count decides.
                if part.stat().st_nlink != 2:
                    if highest(root) < epoch:  # no other caller was faster
                        raise
                    continue
            disk.sync(folder)
            return epoch
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def joined(root: Path, own: int | None = None, wait_s: float = VISIBLE_S) -> int:
    """The epoch of this start: `own`, or FEDMPI_EPOCH, or else the highest one. For rank 0.

    Waits up to `wait_s` seconds until this host sees the epoch. Raises ConfigError if a newer start exists, or if this
    host does not see the supervisor's run directory.
    """
    text = os.environ.get(VARIABLE, "")
    if own is None and not text.isdigit():
        return highest(root)
    epoch, until_s = int(text) if own is None else own, time.monotonic() + wait_s
    while _current(root) < epoch and time.monotonic() < until_s:
        time.sleep(0.5)
    if (now := _current(root)) < epoch:
        raise ConfigError(
            f"out: rank 0 does not see epoch {epoch} in {root}: its host and the supervisor's share no disk"
        )
    if now > epoch:
        raise ConfigError(f"{_superseded(root, epoch, now)}")
    return epoch


def require_newest(root: Path, epoch: int) -> None:
    """Raise CheckpointError if a newer start than `epoch` has begun."""
    if (now := _current(root)) > epoch:
        raise CheckpointError(_superseded(root, epoch, now))


def _superseded(root: Path, epoch: int, now: int) -> str:
    return f"this start (epoch {epoch}) of {root} is superseded by a newer one (epoch {now}); it writes nothing more"


def _current(root: Path) -> int:
    """The highest epoch. Changes the folder first, so that an NFS client drops its cached listing."""
    if highest(root):
        part = root / FOLDER / f"look.part-{os.getpid()}-{secrets.token_hex(4)}"
        with contextlib.suppress(OSError):  # on a full or read-only disk the cached listing must do
            os.close(disk.open_new(part))
            part.unlink()
    return highest(root)
