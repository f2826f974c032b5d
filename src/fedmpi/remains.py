"""Ends the processes that a start left behind: the launcher's here, and the ranks in ranks.json on every host.

A process is identified by host, pid and start time (launcher.born), so that a new process with the same pid is left
alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmpi import disk, launcher
from fedmpi.comm.vigil import answers

TERM_S = 2.0  # from SIGTERM to SIGKILL
KILL_S = 10.0  # wait after SIGKILL; a process blocked on a dead disk may never go
REMOTE_S = 10.0  # wait for another host
PROBE_NODE_S = 30.0  # for a node of a SLURM job to answer
SHELLS = re.compile(r"(ba|da|k|z|c|tc)?sh[-.\d]*|busybox|timeout")  # they die of SIGUSR1
PORTS = (22, 9)  # a live host accepts or refuses a connection to one of these
# `rows` are PID:BORN. Field 22 of stat is the 20th after the name, which may contain blanks and brackets.
REMOTE = (
    'for p in {rows}; do s=$(sed "s/.*) //" /proc/${{p%:*}}/stat 2>/dev/null | cut -d" " -f20); '
    '[ "$s" = "${{p#*:}}" ] && kill -KILL ${{p%:*}}; done; true'
)


@dataclass(frozen=True)
class Rank:
    """A row of ranks.json."""

    rank: int
    host: str
    pid: int
    born: int


def ranks_of(root: Path) -> list[Rank]:
    """The ranks in ranks.json, which the newest start wrote; empty if the file is absent or has no start times."""
    rows: list[Any] = []
    with contextlib.suppress(OSError, ValueError):
        if "ranks.json" in os.listdir(root):
            rows = json.loads(disk.read_bytes(root / "ranks.json"))
    with contextlib.suppress(LookupError, TypeError):
        return [Rank(row["rank"], row["host"], row["pid"], row["born"]) for row in rows if row["born"]]
    return []


def alive(rank: Rank) -> bool:
    """Whether the rank's process runs on this host."""
    return launcher.born(rank.pid) == rank.born and _state(rank.pid)[0] not in "ZX"


def reachable(hosts: Iterable[str]) -> set[str]:
    """The hosts that answer; all are asked at once, within PROBE_S (vigil.py)."""
    asked = [(host, port) for host in dict.fromkeys(hosts) for port in PORTS]
    if not asked:
        return set()
    with ThreadPoolExecutor(min(64, len(asked))) as pool:
        there = pool.map(lambda one: answers(*one), asked)
        return {host for (host, _), answered in zip(asked, there, strict=True) if answered}


def answering(nodes: Iterable[str]) -> set[str]:
    """The nodes of this SLURM job that run a command: FEDMPI_PROBE, a shell line, or nothing. All, if none does: then
    srun itself is at fault."""
    words = os.environ.get("FEDMPI_PROBE") or "true"
    names = list(dict.fromkeys(nodes))

    def answers_(node: str) -> bool:
        nothing = subprocess.DEVNULL
        try:
            line = _by_srun(node, words)
            done = subprocess.run(line, stdin=nothing, stdout=nothing, stderr=nothing, timeout=PROBE_NODE_S)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0

    with ThreadPoolExecutor(min(64, len(names))) as pool:
        found = {name for name, there in zip(names, pool.map(answers_, names), strict=True) if there}
    return found or set(names)


def takers(pid: int) -> list[int]:
    """The processes that take a signal for the launcher `pid`: itself; or, if it is a script of a shell, which would
    die of it and leave ranks behind, the launchers that it runs, or all that it runs if none has a known name."""
    if SHELLS.fullmatch(_read(f"/proc/{pid}/exe")):
        found = [taker for child in launcher.children(pid) for taker in takers(int(child))]
        named = [one for one in found if _read(f"/proc/{one}/exe").startswith((*launcher.STARTERS, "srun"))]
        return named or found
    return [pid]


def _read(link: str) -> str:
    """The name of the file that a link leads to; empty if it cannot be read."""
    try:
        return os.path.basename(os.readlink(link))
    except OSError:
        return ""


def end(child: subprocess.Popen[bytes], ranks: Sequence[Rank]) -> list[Rank]:
    """End the launcher's session and the ranks: SIGTERM to the launcher, which can reach its other hosts; after 2 s
    SIGKILL to the rest. Returns the ranks on hosts that could not be reached. No ssh to a host that does not answer."""
    here = socket.gethostname()
    mine, others = ([rank for rank in ranks if (rank.host == here) is there] for there in (True, False))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(reachable, [] if _under_slurm() else [rank.host for rank in others])
        _end_here(child, mine)
        there = asked.result()
    silent = [rank for rank in others if not (_under_slurm() or rank.host in there)]
    return silent + _end_elsewhere([rank for rank in others if rank not in silent])


def _end_here(child: subprocess.Popen[bytes], mine: Sequence[Rank]) -> None:
    """End the launcher's session and the ranks of this host."""
    if child.poll() is None:
        _signal(child.pid, signal.SIGTERM)
        _until_gone(child, [], TERM_S)
    until_s = time.monotonic() + KILL_S
    while time.monotonic() < until_s:
        left = [*_session(child), *(rank.pid for rank in mine if alive(rank))]
        if not left and child.poll() is not None:
            break
        for pid in left:
            _signal(pid, signal.SIGKILL)
        if not left:  # no /proc: kill the process group instead
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
        _until_gone(child, mine, 0.2)


def left_here(child: subprocess.Popen[bytes], ranks: Sequence[Rank]) -> int:
    """Number of the start's processes that run on this host."""
    here = socket.gethostname()
    return len({*_session(child), *(rank.pid for rank in ranks if rank.host == here and alive(rank))})


def _until_gone(child: subprocess.Popen[bytes], ranks: Sequence[Rank], limit_s: float) -> None:
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s and (child.poll() is None or left_here(child, ranks)):
        time.sleep(0.02)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _session(child: subprocess.Popen[bytes]) -> list[int]:
    """Pids of the launcher's session. Open MPI gives each rank its own process group, but not its own session."""
    session = str(child.pid)
    with contextlib.suppress(OSError):
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in pids if (stat := _state(pid))[3:4] == [session] and stat[0] not in "ZX"]
    return []


def _state(pid: int) -> list[str]:
    """State, parent, group, session, ... of a process; ["X"] if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X"]


def _end_elsewhere(ranks: Sequence[Rank]) -> list[Rank]:
    """Send SIGKILL to ranks on other hosts, all hosts at once: by srun inside a SLURM job, else by ssh. Returns the
    ranks on hosts that could not be reached."""
    jobs = []
    missed: list[Rank] = []
    for host in dict.fromkeys(rank.host for rank in ranks):
        some = [rank for rank in ranks if rank.host == host]
        line = REMOTE.format(rows=" ".join(f"{rank.pid}:{rank.born}" for rank in some))
        words = _reach(host, line)
        nothing = subprocess.DEVNULL
        try:
            process = subprocess.Popen(words, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
        except OSError:
            missed += some
        else:
            jobs.append((process, some))
    until_s = time.monotonic() + REMOTE_S
    for process, some in jobs:
        try:
            done = process.wait(max(0.0, until_s - time.monotonic())) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done = False
        missed += [] if done else some
    return missed


def _reach(host: str, line: str) -> list[str]:
    """The command that runs a shell line on a host: by FEDMPI_SSH, where jobs/multihost.sh was given one."""
    if _under_slurm():
        return _by_srun(host, line)
    ssh = os.environ.get("FEDMPI_SSH", "").split() or ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5"]
    return [*ssh, host, line]


def _by_srun(node: str, line: str) -> list[str]:
    return ["srun", "--overlap", "--mpi=none", "-N1", "-n1", f"--nodelist={node}", "sh", "-c", line]


def _under_slurm() -> bool:
    return bool(os.environ.get("SLURM_JOB_ID")) and shutil.which("srun") is not None
