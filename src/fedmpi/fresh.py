"""Runs a program from its start on a fresh rank, which takes the place of a lost one.

    python -m fedmpi.fresh module NAME [ARGS...]        as python -m NAME ARGS
    python -m fedmpi.fresh script FILE [ARGS...]        as python FILE ARGS

The other ranks wait until this process has initialised MPI, so it does that first, and tells them where it runs. All
that takes long is imported before it asks them to let it join (comm/spawn.py).
"""

from __future__ import annotations

import json
import os
import runpy
import sys

VARIABLE = "FEDMPI_FRESH"  # in the environment of a fresh rank
HELLO = 80  # tag of the message that identifies the process of every fresh rank


def is_fresh() -> bool:
    """Whether this process was started by the other ranks, and not by the launcher."""
    return VARIABLE in os.environ


def joins_no_more() -> None:
    """From now on this process is a rank like the others."""
    os.environ.pop(VARIABLE, None)


def same_program() -> list[str] | None:
    """The command that runs this process's program on a fresh rank; None for code from -c or a terminal."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    file = getattr(sys.modules["__main__"], "__file__", None)
    if spec is not None:
        what = ["module", spec.name.removesuffix(".__main__")]
    elif file is not None:
        what = ["script", os.path.abspath(file)]
    else:
        return None
    return [sys.executable, "-m", "fedmpi.fresh", *what, *sys.argv[1:]]


def main() -> None:
    """Run the program named by the arguments."""
    from fedmpi import launcher

    os.environ[VARIABLE] = "1"
    launcher.follow()
    import mpi4py

    mpi4py.rc.finalize = False
    from mpi4py import MPI  # the other ranks wait for this

    pid = os.getpid()
    rows = MPI.COMM_WORLD.gather([launcher.pid_space(), pid, launcher.born(pid)])
    if rows is not None:
        MPI.Comm.Get_parent().Send(json.dumps(rows).encode(), dest=0, tag=HELLO)

    import fedmpi

    _ = fedmpi.Run  # imports what training needs
    kind, name, *arguments = sys.argv[1:]
    sys.argv = [name, *arguments]
    if kind == "module":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(name)
        runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    main()
