"""A rank does not outlive what has launched it: should that be killed, the kernel ends the rank, whatever it is in.

Nothing heavy is imported: a launcher may be killed while its ranks are still importing, or inside MPI_Init, where no
thread of Python would run.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

LAUNCHERS = ("mpirun", "mpiexec", "prterun", "prted", "orted", "hydra_pmi_proxy", "slurmstepd")
_PR_SET_PDEATHSIG = 1


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
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        return False
    if os.getppid() != parent:  # it was gone before the kernel was told
        os._exit(1)
    return True
