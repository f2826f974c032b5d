"""Looks at this machine, or at all ranks of a job. Every rank executes the same lines."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from fedmpi import device
from fedmpi.check import folder
from fedmpi.check.findings import Findings, merged
from fedmpi.comm import Comm
from fedmpi.comm.started import local_rank
from fedmpi.doctor import advice, host, library, network


def examine(comm: Comm, out: Path, with_network: bool = True) -> dict[str, Any]:
    """Facts of all ranks and the problems, as plain values. `out` is where runs will write. Collective.

    Without a launcher nothing is known about thread level, binding, clocks and links: `unseen` says so."""
    found, own = Findings(), Findings()
    mine = host.look(out)
    first = comm.machines.index(comm.machines[comm.rank]) == comm.rank
    wrote = folder.probe(out, own) if first else True
    found.faults += own.faults
    mine |= {"rank": comm.rank, "machine": hashlib.sha256(comm.machines[comm.rank]).hexdigest()[:12]}
    mine |= {"locked": not own.warnings, "wrote": wrote}
    gpus = comm.collectively(lambda: device.visible("auto", comm.local_size))
    seats = device.seats_of(comm, gpus)
    mine |= {"local_rank": local_rank(), "gpu": device.assign(seats)[comm.rank], "gpu_ids": list(gpus)}
    result: dict[str, Any] = {"ranks": comm.gather_values(mine), "library": comm.gather_values(library.look(comm))[0]}
    result["local_ranks"] = device.disagreement(seats)
    if comm.size > 1:
        result["clocks"] = network.clocks(comm)
        result["network"] = network.table(comm) if with_network else []
    else:
        found.skip(
            "thread level, binding, GPU awareness, clocks and links: MPI is not initialised without a launcher; start "
            "it as `mpirun -n 2 fedmpi doctor`, or with srun"
        )
    told = merged(comm, found)
    advice.judge(result, told)
    return {**result, "faults": told.faults, "warnings": told.warnings, "unseen": told.unseen}
