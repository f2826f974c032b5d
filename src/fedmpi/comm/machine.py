"""Cores and shared memory of this machine, as its ranks share them."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import resource
import socket
import sys
from pathlib import Path

from fedmpi.comm.base import Control

_SHM = Path("/dev/shm")  # where MPI libraries create shared memory
_SPARE_BYTES = 1 << 20  # of shared memory, for the MPI library's own data
_MPI_BYTES = 320 << 20  # of address space, for MPI on a few ranks and other imports


def cores() -> tuple[bytes, int]:
    """A digest that is equal for ranks on the same cores, and the number of these cores."""
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
    return hashlib.sha256(f"{machine_name()} {mine}".encode()).digest(), len(mine)


def shared_memory() -> tuple[int, bytes]:
    """Free bytes of shared memory, and a digest that identifies it: containers on one machine may have their own."""
    try:
        there, found = os.statvfs(_SHM), os.stat(_SHM).st_dev
    except OSError:  # no /dev/shm on this system: MPI uses another mechanism
        there, found = None, 0
    free = there.f_bavail * there.f_frsize if there is not None and there.f_blocks else 1 << 62  # no blocks: no limit
    return free, hashlib.sha256(f"{machine_name()} {found}".encode()).digest()


def discard(address: int, num_bytes: int) -> None:
    """Gives the pages inside this part of a mapped file back to the system; they read as zeros from then on. Where the
    system cannot do that, they stay."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_REMOVE)


def trim() -> None:
    """Gives free memory of the C library's heap back to the system, where it can (glibc)."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def room(control: Control, num_bytes: int) -> str:
    """Why some rank cannot get the shared memory it asks for; empty if all can. Collective; the same on every rank.

    Without this check, a rank whose allocation fails would leave the others waiting in theirs; and where allocation
    succeeds without enough memory, touching a missing page kills the process.
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
    """Why MPI should not be started in this process: the limit of address space (ulimit -v) is too low. Empty if not.

    If Open MPI cannot map its shared memory, it prints a warning and continues, and the first message never arrives.
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


def host_identity() -> bytes:
    """Identifies the host that this process runs on, 32 bytes: kernel and boot, host name, network.

    Equal for processes that cannot be cut off from each other by a broken network. Containers on one machine are hosts
    of their own, and so are machines and containers with the same host name.
    """
    about = [machine_name(), socket.gethostname()]
    for namespace in ("uts", "net"):
        with contextlib.suppress(OSError):  # not Linux
            about.append(os.readlink(f"/proc/self/ns/{namespace}"))
    return hashlib.sha256(repr(about).encode()).digest()


def machine_name() -> str:
    """A name of the machine and its boot; containers on one machine have the same, whatever their host names."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return socket.gethostname()
