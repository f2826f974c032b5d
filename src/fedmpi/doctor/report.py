"""The result of an examination as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmpi.binding import nodes_of, spans
from fedmpi.comm import ranks_text
from fedmpi.doctor.host import gpus_of
from fedmpi.output import size

_MOST = 30  # pairs shown


def lines(result: Mapping[str, Any]) -> list[str]:
    """The report, problems last."""
    text = [*_library(result["library"])]
    hosts: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["ranks"]:
        hosts.setdefault(row["machine"], []).append(row)
    for rows in hosts.values():
        text += _host(rows)
    text += _network(result)
    text.append("versions: " + ", ".join(f"{name} {value}" for name, value in result["ranks"][0]["versions"].items()))
    for name, what in (("unseen", "not looked at"), ("warnings", "problem"), ("faults", "fault")):
        text += [f"{what}: {line}" for line in result[name]]
    num = len(result["faults"]) + len(result["warnings"])
    return [*text, f"{num} problem{'s' if num != 1 else ''}" if num else "no problem found"]


def _library(library: Mapping[str, Any]) -> list[str]:
    if library["library"] is None:
        return ["mpi: none"]
    text = f"mpi: {library['library']}, standard {library['standard']}"
    if library["initialised"]:
        gpu = {True: "takes GPU memory", False: "takes no GPU memory", None: "does not say whether it takes GPU memory"}
        text += f", threads {library['threads']}, {gpu[library['takes_gpu']]}"
        ft = "on" if library["tolerant"] else "off (mpirun --with-ft ulfm)" if library["has_shrink"] else "not there"
        text += f"; fault tolerance {ft}"
    return [text, f"mpirun: {library['launcher'] or 'none on PATH'}"]


def _host(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    row, limits = rows[0], rows[0]["limits"]
    cores = sorted({core for one in rows for core in one["cores"]})
    ranks = ranks_text([one["rank"] for one in rows])
    names = gpus_of(rows).values()
    gpus = f", GPUs {', '.join(names)}" if names else ", no GPU"
    text = [f"host {row['host']}: {ranks} on {len(cores)} of {row['cores_of_host']} cores{gpus}"]
    if len(rows) > 1:
        bound = [f"{one['rank']}: {spans(one['cores'])}" for one in rows]
        text.append(f"  cores     {'; '.join(bound[:_MOST])}")
    if len(nodes := row["numa"]) > 1:
        on = [f"{one['rank']}: {', '.join(nodes_of(one['cores'], nodes))}" for one in rows]
        text.append(f"  NUMA      {len(nodes)} nodes; ranks on {'; '.join(on[:_MOST])}")
    if said := [one for one in rows if one["local_rank"]]:
        numbers = "; ".join(f"{one['rank']}: {one['local_rank'][1]}" for one in said[:_MOST])
        text.append(f"  launcher  numbers ranks of the node, {said[0]['local_rank'][0]}: {numbers}")
    if names:
        taken = "; ".join(f"{one['rank']}: {one['gpu']}" for one in rows[:_MOST])
        text.append(f"  GPUs      ranks take {taken}, of those that each sees")
    shm = "no limit" if row["shm_bytes"] is None else size(row["shm_bytes"])
    files, locked = limits["open_files"] or "no limit", limits["memlock_bytes"]
    locked = "no limit" if locked is None else size(locked)
    text.append(f"  limits    open files {files}, /dev/shm {shm} free, locked memory {locked}")
    rates = [f" ({one['mbit']} Mbit/s)" if one["mbit"] else "" for one in row["interfaces"]]
    links = [one["name"] + rate for one, rate in zip(row["interfaces"], rates, strict=True)]
    text.append(f"  network   {', '.join([*links, *row['fabrics']]) or 'only the loopback'}")
    chosen = [f"{name}={value}" for name, value in row["settings"].items()]
    text += [f"  settings  {' '.join(chosen)}"] if chosen else []
    locks = "with locks" if row["locked"] else "without locks"
    text.append(f"  out       {row['out']['path']}: {row['out']['file_system'] or 'unknown file system'}, {locks}")
    return text


def _network(result: Mapping[str, Any]) -> list[str]:
    text = []
    if (clocks := result.get("clocks")) is not None:
        far = max(map(abs, clocks["ahead_s"]))
        text.append(f"clocks: at most {far * 1e3:.3g} ms from rank 0's, known to {clocks['exact_s'] * 1e3:.2g} ms")
    rows = result.get("network") or []
    if rows:
        text.append("links between ranks, one way: latency of 8 bytes, rate of 1 MiB messages")
    for row in rows[:_MOST]:
        a, b = (f"{rank} ({host})" for rank, host in zip(row["ranks"], row["hosts"], strict=True))
        text.append(f"  {a} - {b}: {row['latency_us']:.1f} us, {row['mb_per_s']:.0f} MB/s")
    return text
