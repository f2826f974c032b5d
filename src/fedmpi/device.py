"""The device a rank trains on, and its number of threads."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch

from fedmpi.comm import Comm
from fedmpi.comm.machine import cores, machine_name
from fedmpi.comm.started import launched, launched_rank, local_rank
from fedmpi.errors import ConfigError, agreed, ranks_text

log = logging.getLogger("fedmpi")

T = TypeVar("T")


@dataclass(frozen=True)
class Seat:
    """Where a rank sits. `gpus` are identities of the GPUs that it sees, in its own order; equal on all ranks of a
    machine, and no two GPUs have the same."""

    host: str
    machine: str  # equal for ranks on one host
    node: int  # lowest rank that shares memory with this one, by MPI_Comm_split_type
    variable: str = ""  # the launcher's, with this rank's number among those of its node; empty without one
    said: int = -1
    is_launched: bool = True  # whether this is the rank that the launcher gave it: no rank was lost, joined or left out
    gpus: tuple[str, ...] = ()


def choose(name: str, share: bool, comm: Comm) -> torch.device:
    """This rank's device: its own GPU, by local rank, or the CPU. Collective.

    Raises ConfigError on every rank if GPUs are requested but missing, or if ranks would share one without `share`.
    """
    gpus = comm.collectively(lambda: visible(name, comm.local_size))
    seats = seats_of(comm, gpus)
    if comm.rank == 0 and any(seat.gpus for seat in seats) and (told := disagreement(seats)):
        log.warning(told)
    chosen = assign(seats)
    if (two := sharing(seats, chosen)) and not share:
        raise agreed(
            ConfigError(
                f"device: ranks {two[0]} and {two[1]} would share one GPU of {seats[two[1]].host}; start fewer ranks "
                "per node, or set device.share=true"
            )
        )
    if not gpus:
        return torch.device("cpu")
    device = torch.device("cuda", chosen[comm.rank])
    torch.cuda.set_device(device)
    return device


def visible(name: str, local_size: int) -> tuple[str, ...]:
    """Identities of the GPUs that this rank sees, in its own order. Raises ConfigError."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device.name: '{name}' is not auto, cpu or cuda")
    num_gpus = torch.cuda.device_count() if name != "cpu" else 0
    if name == "cuda" and num_gpus == 0:
        raise ConfigError(f"device.name is cuda, but this host shows no GPU to its {local_size} ranks")
    # A launcher may show each rank only its own GPU, as number 0; the UUID identifies it.
    found = [f"{machine_name()} {torch.cuda.get_device_properties(number).uuid}" for number in range(num_gpus)]
    return tuple(hashlib.sha256(text.encode()).hexdigest()[:16] for text in found)


def seats_of(comm: Comm, gpus: Sequence[str] = ()) -> list[Seat]:
    """Where all ranks sit; `gpus` are those of this one. Collective."""
    variable, said = local_rank() or ("", -1)
    machine = comm.machines[comm.rank].hex()
    as_launched = launched() == comm.size and launched_rank() == comm.rank
    node = comm.node() if comm.size > 1 else 0
    mine = Seat(comm.hosts[comm.rank], machine, node, variable, said, as_launched, tuple(gpus))
    return [Seat(**{**row, "gpus": tuple(row["gpus"])}) for row in comm.gather_values(asdict(mine))]


def _at(places: Iterable[T]) -> dict[T, list[int]]:
    """The ranks at each place.

    >>> _at(["a", "b", "a"])
    {'a': [0, 2], 'b': [1]}
    """
    found: dict[T, list[int]] = {}
    for rank, place in enumerate(places):
        found.setdefault(place, []).append(rank)
    return found


def _says(seats: Sequence[Seat], ranks: Sequence[int]) -> bool:
    """Whether the launcher gives each of these ranks of a host another number."""
    said = {seats[rank].said for rank in ranks}
    return min(said) >= 0 and len(said) == len(ranks)


def local_ranks(seats: Sequence[Seat]) -> list[int]:
    """Each rank's number among those of its node: what the launcher says, or counted on hosts where it gives none, or
    the same one twice, as the variables of an outer launcher do."""
    numbers = [seat.said for seat in seats]
    for ranks in _at(seat.machine for seat in seats).values():
        if not _says(seats, ranks):
            for number, rank in enumerate(ranks):
                numbers[rank] = number
    return numbers


def disagreement(seats: Sequence[Seat]) -> str:
    """Where ranks that share memory by MPI_Comm_split_type are not numbers 0, 1, ... of one node by the launcher; empty
    if they are, or if it gives no numbers."""
    if not all(seat.is_launched and seat.variable for seat in seats):
        return ""
    hosts = _at(seat.machine for seat in seats)
    for node, ranks in _at(seat.node for seat in seats).items():
        said = [seats[rank].said for rank in ranks]
        if sorted(said) != [*range(len(said))]:
            seat = seats[node]
            says = _says(seats, hosts[seat.machine])
            takes = "the launcher's numbers" if says else "numbers counted on each host"
            return (
                f"{seat.host}: MPI_Comm_split_type finds {ranks_text(ranks)} on one node, and {seat.variable} numbers "
                f"them {', '.join(map(str, said[:8]))}{', ...' if said[8:] else ''} there, not from 0; GPUs are chosen "
                f"by {takes}. Containers without common memory, or variables of an outer launcher, do this"
            )
    return ""


def assign(seats: Sequence[Seat]) -> list[int]:
    """The GPU of each rank, as its own number for it; -1 without one. In the order of their local ranks each takes the
    first that fewest have taken, whether ranks see all GPUs of their host, some, or their own alone."""
    chosen, taken = [-1] * len(seats), Counter[str]()
    for _, rank in sorted((number, rank) for rank, number in enumerate(local_ranks(seats))):
        if gpus := seats[rank].gpus:
            chosen[rank] = min(range(len(gpus)), key=lambda number: (taken[gpus[number]], number))
            taken[gpus[chosen[rank]]] += 1
    return chosen


def sharing(seats: Sequence[Seat], chosen: Sequence[int]) -> tuple[int, int] | None:
    """Two ranks that have the same GPU; None if each has its own."""
    owners: dict[str, int] = {}
    for rank, (seat, number) in enumerate(zip(seats, chosen, strict=True)):
        if seat.gpus and (first := owners.setdefault(seat.gpus[number], rank)) != rank:
            return first, rank
    return None


def set_threads(comm: Comm, reproducible: bool) -> int:
    """Sets and returns this rank's number of threads. Collective.

    It is the number of cores the rank may run on, divided among the ranks on the same cores, and at most
    OMP_NUM_THREADS. (For a tiny model on a busy machine 1 is fastest, because threads wait for each other in every
    step.) If `reproducible`, one thread and deterministic kernels, so that sums do not depend on placement.
    """
    digest, num_cores = cores()
    rows = comm.gather(digest)
    most = re.match(r"\s*(\d+)", os.environ.get("OMP_NUM_THREADS", ""))  # a list has one number per nesting level
    allowed = [num_cores // rows.count(digest), *([int(most[1])] if most else [])]
    threads = 1 if reproducible else max(1, min(allowed))
    torch.set_num_threads(threads)
    if reproducible:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    # The same as use_deterministic_algorithms, without importing torch's compiler on every rank.
    torch.set_deterministic_debug_mode("error" if reproducible else "default")
    return threads


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
