"""A rank does not outlive its launcher: should that be killed, the kernel ends the rank, whatever it is in. Nor does a
launcher outlive for long a job that a rank has given up.

Nothing heavy is imported: a launcher may be killed while its ranks are still importing, or inside MPI_Init, where no
thread of Python would run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from pathlib import Path

WAITS_S = 10.0  # for a launcher to end a job that one of its ranks has aborted
STARTERS = ("mpirun", "mpiexec", "prterun")  # what a user or a script waits for; the others serve on their hosts
LAUNCHERS = (*STARTERS, "prted", "orted", "hydra_pmi_proxy", "slurmstepd")
PR_SET_PDEATHSIG = 1


def follow() -> bool:
    """Let the kernel end this process with the launcher that is its parent. Is there one?

    The kernel's signal comes when the THREAD ends that has started this process. A launcher may start ranks in threads
    that end soon; so nothing is asked for unless it was the main thread, which ends with the process.
    """
    parent = os.getppid()
    try:
        name = Path(f"/proc/{parent}/comm").read_text().strip()
        started = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return False  # not Linux, or a kernel that does not tell
    if not name.startswith(LAUNCHERS) or str(os.getpid()) not in started:
        return False
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        return False
    if os.getppid() != parent:  # it was gone before the kernel was told
        os._exit(1)
    return True


def born(pid: int) -> int:
    """When the process began, in clock ticks since the host's boot: with `pid` it names one process, ever. 0 where that
    is unknown or the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return 0


def end_later(seconds: float = WAITS_S) -> None:
    """Kill the launcher that this process descends from, should it still be there after so many seconds: where a host
    is lost, Open MPI's waits for it for ever, though all ranks have ended."""
    try:
        pid, name = os.getppid(), ""
        while pid > 1 and not (name := Path(f"/proc/{pid}/comm").read_text().strip()).startswith(STARTERS):
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])  # a script is in between
        if pid > 1:
            # A process of its own: the launcher ends its ranks first.
            line = f'sleep {seconds}; [ "$(cat /proc/{pid}/comm)" = "{name}" ] && kill -KILL {pid}'
            nothing = subprocess.DEVNULL
            shell = ["/bin/sh", "-c", line]
            subprocess.Popen(shell, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
    except OSError:
        pass  # not Linux, or no process can be started
