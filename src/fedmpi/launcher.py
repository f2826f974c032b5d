"""Ends a rank when its launcher dies, in whatever state the rank is; and ends a launcher whose job a rank gave up.

Imports nothing heavy, because a launcher may be killed while its ranks still import modules or are in MPI_Init, where
no Python thread would run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from pathlib import Path

WAITS_S = 10.0  # seconds for a launcher to end a job that a rank has aborted
STARTERS = ("mpirun", "mpiexec", "prterun")  # started by a user or script; the others serve on their hosts
LAUNCHERS = (*STARTERS, "prted", "orted", "hydra_pmi_proxy", "slurmstepd")
PR_SET_PDEATHSIG = 1


def follow() -> bool:
    """Ask the kernel to kill this process when its parent, the launcher, dies. Returns False if there is no launcher.

    The kernel sends the signal when the THREAD that started this process ends. A launcher may start ranks from
    short-lived threads, so this asks only if the launcher's main thread started us, which ends with its process.
    """
    parent = os.getppid()
    try:
        name = Path(f"/proc/{parent}/comm").read_text().strip()
        started = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return False  # not Linux, or no access to /proc
    if not name.startswith(LAUNCHERS) or str(os.getpid()) not in started:
        return False
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        return False
    if os.getppid() != parent:  # it died before the request
        os._exit(1)
    return True


def born(pid: int) -> int:
    """When the process started, in clock ticks since boot; with `pid` it identifies one process for all time. 0 if
    unknown."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return 0


def end_later(seconds: float = WAITS_S) -> None:
    """Kill the launcher above this process if it still runs in `seconds`. Open MPI's waits for a lost host for ever."""
    try:
        pid, name = os.getppid(), ""
        while pid > 1 and not (name := Path(f"/proc/{pid}/comm").read_text().strip()).startswith(STARTERS):
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])  # a script may be in between
        if pid > 1:
            # In its own process, because the launcher ends its ranks first.
            line = f'sleep {seconds}; [ "$(cat /proc/{pid}/comm)" = "{name}" ] && kill -KILL {pid}'
            nothing = subprocess.DEVNULL
            shell = ["/bin/sh", "-c", line]
            subprocess.Popen(shell, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
    except OSError:
        pass  # not Linux, or no process can be started
