"""What a process sees of its host. Nothing here communicates."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedmpi.binding import my_cores, numa
from fedmpi.comm.machine import shared_memory, tight
from fedmpi.parts import versions

NETWORK_FILES = ("nfs", "lustre", "gpfs", "beegfs", "cifs", "smb", "ceph", "fuse.glusterfs", "panfs", "wekafs", "9p")
OF_LAUNCHER = tuple(
    f"OMPI_MCA_{name}" for name in ("PREFIXES", "cpu_type", "initial_wdir", "num_procs", "num_restarts")
)
SETTINGS = ("OMPI_MCA_", "UCX_", "MPIR_CVAR_", "FI_", "I_MPI_", "PSM", "OMP_", "FEDMPI_", "CUDA_VISIBLE")


def look(out: Path) -> dict[str, Any]:
    """Facts about this process and its host, as plain values."""
    free_shm, _ = shared_memory()
    return {
        "host": socket.gethostname(),
        "cores": my_cores(),
        "cores_of_host": os.cpu_count() or 1,
        "numa": numa(),
        "limits": {
            "open_files": _limit(resource.RLIMIT_NOFILE),
            "memlock_bytes": _limit(resource.RLIMIT_MEMLOCK),
            "processes": _limit(resource.RLIMIT_NPROC),
        },
        "address_space": tight(),
        "shm_bytes": free_shm if free_shm < 1 << 60 else None,
        "gpus": [torch.cuda.get_device_properties(i).name for i in range(torch.cuda.device_count())],
        "fabrics": _names("/sys/class/infiniband"),
        "interfaces": interfaces(),
        "settings": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(SETTINGS) and name not in OF_LAUNCHER
        },
        "out": {"path": str(out), "file_system": file_system(out)},
        "versions": versions(),
    }


def gpus_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Names of the GPUs that the ranks of a host see, all or each its own, by their identity."""
    return {key: name for row in rows for key, name in zip(row["gpu_ids"], row["gpus"], strict=True)}


def _limit(what: int) -> int | None:
    """The soft limit; None for none."""
    soft, _ = resource.getrlimit(what)
    return None if soft == resource.RLIM_INFINITY else soft


def _names(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return sorted(os.listdir(folder))
    return []


def interfaces() -> list[dict[str, Any]]:
    """Network interfaces that are up, without the loopback, with their rate in Mbit/s if the system says."""
    found = []
    for name in _names("/sys/class/net"):
        folder = Path("/sys/class/net") / name
        rate = None
        with contextlib.suppress(OSError, ValueError):
            if name == "lo" or (folder / "operstate").read_text().strip() == "down":
                continue
        with contextlib.suppress(OSError, ValueError):
            rate = int((folder / "speed").read_text())
        found.append({"name": name, "mbit": rate if rate and rate > 0 else None})
    return found


def file_system(path: Path) -> str:
    """The kind of file system that holds `path`, or would; empty if the system does not say."""
    whole = path.absolute()
    there = next(part for part in (whole, *whole.parents) if part.exists()).resolve()
    best, kind = "", ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            point, name = (part.replace("\\040", " ") for part in line.split()[1:3])
            if there.is_relative_to(point) and len(point) >= len(best):
                best, kind = point, name
    return kind
