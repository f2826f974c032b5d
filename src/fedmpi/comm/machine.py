"""Cores and shared memory of this machine, as far as ranks on it share them."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
from pathlib import Path

from fedmpi.comm.base import Control

_SHM = Path("/dev/shm")  # where MPI libraries make what ranks share
_SPARE_BYTES = 1 << 20  # of shared memory, for what MPI libraries put around it
_MPI_BYTES = 320 << 20  # of address space, for MPI on a few ranks and what is imported beside it


def cores() -> tuple[bytes, int]:
    """What ranks on the same cores have in common, and how many cores these are."""
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
    return hashlib.sha256(f"{machine_name()} {mine}".encode()).digest(), len(mine)


def shared_memory() -> tuple[int, bytes]:
    """Free bytes of the memory that ranks may share, and which memory that is: containers have their own, or not."""
    try:
        there, found = os.statvfs(_SHM), os.stat(_SHM).st_dev
    except OSError:  # not on this system: MPI knows another way
        there, found = None, 0
    free = there.f_bavail * there.f_frsize if there is not None and there.f_blocks else 1 << 62  # no blocks: no limit
    return free, hashlib.sha256(f"{machine_name()} {found}".encode()).digest()


def room(control: Control, num_bytes: int) -> str:
    """Why this rank cannot have `num_bytes` of shared memory, and the others what they ask for; empty if all can.

    One rank that finds none would leave the others waiting for it in the allocation; and where the allocation goes well
    all the same, a page that is not there kills whoever touches it.
    """
    free, place = shared_memory()
    rows = control.gather(num_bytes.to_bytes(8, "little") + free.to_bytes(8, "little") + place)
    needed: dict[bytes, int] = {}
    for row in rows:
        needed[row[16:]] = needed.get(row[16:], 0) + int.from_bytes(row[:8], "little")
    for host, row in zip(control.hosts, rows, strict=True):
        need, free = needed[row[16:]], int.from_bytes(row[8:16], "little")
        if need and need + _SPARE_BYTES > free:
            return (
                f"{_SHM} on {host} has {free / 2**20:.0f} MiB free and its ranks need {need / 2**20:.0f} MiB "
                "(in a container: --shm-size)"
            )
    return ""


def tight() -> str:
    """Why MPI should not be started in this process: a limit of its address space (ulimit -v) leaves too little. Empty
    where there is room.

    Open MPI whose shared memory cannot be mapped says so and goes on, and the first message never comes.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return ""
    if limit == resource.RLIM_INFINITY or limit - used >= _MPI_BYTES:
        return ""
    left, needed = max(0, limit - used) / 2**20, _MPI_BYTES / 2**20
    return f"ulimit -v leaves {left:.0f} MiB of address space, and MPI takes up to {needed:.0f} MiB; raise it"


def machine_name() -> str:
    """The machine's name for this boot: containers with names of their own run on one machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return socket.gethostname()
