"""The device a rank trains on, and its number of threads."""

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
    """This rank's device: its own GPU, by local rank, or the CPU. Collective.

    Raises ConfigError on every rank if GPUs are requested but missing, or if ranks would share one without `share`.
    """
    device = comm.collectively(lambda: _mine(name, comm.local_rank, comm.local_size))
    identity = b""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # A launcher may show each rank only its own GPU, as number 0; the UUID identifies it.
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
    """Sets and returns this rank's number of threads. Collective.

    It is the number of cores the rank may run on, divided among the ranks on the same cores, and at most
    OMP_NUM_THREADS. (For a tiny model on a busy machine 1 is fastest, because threads wait for each other in every
    step.) If `reproducible`, one thread and deterministic kernels, so that sums do not depend on placement.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [os.cpu_count() or 1]
    rows = comm.gather(hashlib.sha256(f"{_machine(comm)} {cores}".encode()).digest())
    most = re.match(r"\s*(\d+)", os.environ.get("OMP_NUM_THREADS", ""))  # a list has one number per nesting level
    allowed = [len(cores) // rows.count(rows[comm.rank]), *([int(most[1])] if most else [])]
    threads = 1 if reproducible else max(1, min(allowed))
    torch.set_num_threads(threads)
    if reproducible:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    # The same as use_deterministic_algorithms, without importing torch's compiler on every rank.
    torch.set_deterministic_debug_mode("error" if reproducible else "default")
    return threads


def _machine(comm: Comm) -> str:
    """A name of the machine, equal for its containers, which have host names of their own but share cores."""
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
    """The tensors on the device if they need at most half of its free memory; otherwise in page-locked host memory."""
    if device.type != "cuda":
        return tensors
    free_bytes, _ = torch.cuda.mem_get_info(device)
    if 2 * sum(t.nbytes for t in tensors) <= free_bytes:
        return [t.to(device) for t in tensors]
    return [t.pin_memory() for t in tensors]
