"""The MPI library, as far as it tells about itself."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from fedmpi.comm import Comm, MpiComm
from fedmpi.comm.mpi_control import tolerant

_ASK = """
import json, mpi4py
mpi4py.rc.initialize = mpi4py.rc.finalize = False
from mpi4py import MPI
print(json.dumps([MPI.Get_library_version(), ".".join(map(str, MPI.Get_version())), hasattr(MPI.Comm, "Shrink")]))
"""
ASK_S = 60.0  # limit of the question


def look(comm: Comm) -> dict[str, Any]:
    """Facts about the MPI of this process: name, standard, thread level, ULFM, GPU awareness. Values that are not known
    are None. Without a launcher MPI is not initialised: another process loads the library and asks it."""
    if not isinstance(comm, MpiComm):
        return {"initialised": False, **_asked(), "launcher": _launcher()}
    mpi = comm.mpi
    levels = {
        mpi.THREAD_SINGLE: "single",
        mpi.THREAD_FUNNELED: "funneled",
        mpi.THREAD_SERIALIZED: "serialized",
        mpi.THREAD_MULTIPLE: "multiple",
    }
    return {
        "initialised": True,
        "library": _line(mpi.Get_library_version()),
        "standard": ".".join(map(str, mpi.Get_version())),
        "error": None,
        "threads": levels[mpi.Query_thread()],
        "has_shrink": hasattr(mpi.Comm, "Shrink"),
        "tolerant": tolerant(),
        "takes_gpu": _takes_gpu(),
        "launcher": _launcher(),
    }


def _asked() -> dict[str, Any]:
    unknown = {"threads": None, "tolerant": None, "takes_gpu": None}
    try:
        done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=ASK_S)
        name, standard, shrink = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        last = done.stderr.strip().splitlines()[-1:] if isinstance(error, ValueError) else [str(error)]
        return {"library": None, "standard": None, "error": " ".join(last), "has_shrink": None, **unknown}
    return {"library": _line(name), "standard": standard, "error": None, "has_shrink": shrink, **unknown}


def _line(text: str) -> str:
    """The library's own name: the first line, or the first two fields of it.

    >>> _line("Open MPI v5.0.11, package: Open MPI root@x, ident: 5.0.11"), _line("MPICH Version: 4.3.2\\nDate: ...")
    ('Open MPI v5.0.11', 'MPICH Version: 4.3.2')
    """
    return " ".join(text.splitlines()[0].partition(",")[0].replace("\0", "").split())


def _takes_gpu() -> bool | None:
    """Whether Open MPI says that it takes GPU memory; None for other libraries."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        loaded = next(line.split()[-1] for line in lines if "/libmpi.so" in line)
        return bool(ctypes.CDLL(loaded).MPIX_Query_cuda_support())
    except (OSError, StopIteration, AttributeError):
        return None


def _launcher() -> str | None:
    """The first line of `mpirun --version`; None if there is no mpirun on PATH."""
    found = shutil.which("mpirun")
    if found is None:
        return None
    try:
        done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=ASK_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((line.strip() for line in done.stdout.splitlines() if line.strip()), None)
