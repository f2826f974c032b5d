"""Which device a rank trains on, and how many threads it may use."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import torch

from fedmpi.comm import Comm
from fedmpi.errors import ConfigError, agreed

_ID_BYTES = 64


def choose(name: str, share: bool, comm: Comm) -> torch.device:
    """This rank's device: a GPU of its own by local rank, or the CPU. A call of all ranks.

    Raises ConfigError on every rank when GPUs are asked for that are not there, or when ranks would share one and
    `share` does not say that they may.
    """
    device = comm.collectively(lambda: _mine(name, comm.local_rank, comm.local_size))
    identity = b""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Launchers may show every rank only its own GPU, as number 0: the number says nothing, the UUID does.
        identity = f"{torch.cuda.get_device_properties(device).uuid}".encode()
    owners: dict[tuple[str, bytes], int] = {}
    for rank, row in enumerate(comm.gather(identity.ljust(_ID_BYTES, b"\0")[:_ID_BYTES])):
        key = (comm.hosts[rank], row)
        if row.strip(b"\0") and key in owners and not share:
            raise agreed(
                ConfigError(
                    f"device: ranks {owners[key]} and {rank} would share one GPU of {comm.hosts[rank]}; start fewer "
                    "ranks per node, or set device.share=true"
                )
            )
        owners.setdefault(key, rank)
    return device


def _mine(name: str, local_rank: int, local_size: int) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device.name: '{name}' is not auto, cpu or cuda")
    num_gpus = torch.cuda.device_count() if name != "cpu" else 0
    if name == "cuda" and num_gpus == 0:
        raise ConfigError(f"device.name is cuda, but this host shows no GPU to its {local_size} ranks")
    return torch.device("cuda", local_rank % num_gpus) if num_gpus else torch.device("cpu")


def set_threads(comm: Comm, reproducible: bool) -> int:
    """Threads for this rank: the cores it may run on, shared with the ranks that may run on the same ones, and no more
    than OMP_NUM_THREADS, where that is set: it is 1 that is fastest for a tiny model on a machine that is busy, where
    threads wait for each other in every step.

    One thread and deterministic kernels when sums must not depend on how ranks are placed. A call of all ranks.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [os.cpu_count() or 1]
    rows = comm.gather(hashlib.sha256(f"{_machine(comm)} {cores}".encode()).digest())
    most = re.match(r"\s*(\d+)", os.environ.get("OMP_NUM_THREADS", ""))  # a list has one number for each level
    allowed = [len(cores) // rows.count(rows[comm.rank]), *([int(most[1])] if most else [])]
    threads = 1 if reproducible else max(1, min(allowed))
    torch.set_num_threads(threads)
    if reproducible:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    # What use_deterministic_algorithms sets, without importing torch's compiler on every rank.
    torch.set_deterministic_debug_mode("error" if reproducible else "default")
    return threads


def _machine(comm: Comm) -> str:
    """What the hosts on one machine have in common: containers with names of their own run on the same cores."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return comm.hosts[comm.rank]


def capabilities(device: torch.device) -> dict[str, str | int | None]:
    """What a rank trains on: the device, the GPU's name, and the bytes of memory that the GPU has, or the host."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return {"device": str(device), "gpu": gpu.name[:64], "memory_bytes": gpu.total_memory}
    try:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # not on this system
        memory_bytes = 0
    return {"device": str(device), "gpu": None, "memory_bytes": memory_bytes or None}


def keep_on(device: torch.device, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """A silo's samples on the device, when they take at most half of what is free there; else in page-locked memory."""
    if device.type != "cuda":
        return tensors
    free_bytes, _ = torch.cuda.mem_get_info(device)
    if 2 * sum(t.nbytes for t in tensors) <= free_bytes:
        return [t.to(device) for t in tensors]
    return [t.pin_memory() for t in tensors]
