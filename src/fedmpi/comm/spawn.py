"""Fresh ranks in place of lost ones: MPI starts them, and they join once they have imported what they need.

    the other ranks                           a fresh rank (fedmpi/fresh.py)
    start: MPI starts it, HELLO arrives       initialises MPI, HELLO, imports, connects
    ready, after each round: READY is there   READY, and waits
    join: COME, HERE, merge                   COME, HERE, merge

MPI does not say that a fresh rank has died before it joins, and a call that waits for it would wait for ever. So no
call waits for it until it has said HERE.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedmpi import launcher
from fedmpi.comm.base import Comm
from fedmpi.comm.mpi import MpiComm
from fedmpi.comm.vigil import runs
from fedmpi.errors import ConfigError, RankLost, agreed
from fedmpi.fresh import HELLO, same_program

READY, COME, GO, HERE = 81, 82, 83, 84  # tags between rank 0 and the first fresh rank
ANSWER_S = 5.0  # for a fresh rank to answer
START_S = 300.0  # for it to become ready
POLL_S = 0.01


class Spawned:
    """Fresh ranks that have not joined yet. All methods but `drop` are collective over the ranks that started them."""

    def __init__(self, comm: Comm, hosts: Sequence[str]) -> None:
        """Start a fresh rank on each of the hosts. Raises ConfigError on every rank if MPI cannot."""
        if not isinstance(comm, MpiComm):
            raise agreed(ConfigError("only MPI starts ranks"))
        self.comm, self._mpi = comm, comm.mpi
        self._processes: list[tuple[str, int, int]] = []  # of the fresh ranks: see `_is_there`
        self._sent: list[Any] = []
        self._until_s = time.monotonic() + START_S
        command = comm.collectively(_command)
        info = self._mpi.Info.Create()
        info["wdir"] = os.getcwd()
        if len({*comm.hosts, *hosts}) > 1:
            info["host"] = ",".join(hosts)
        why = ""
        self._inter: Any = None
        try:
            self._inter = comm.start(command, len(hosts), info)
        except (self._mpi.Exception, RankLost) as error:
            why = str(error)
        failed = comm.gather_number(self._inter is None)
        if failed.any():
            raise agreed(ConfigError(comm.broadcast_text(why, int(failed.argmax()))))
        self._inter.Set_errhandler(self._mpi.ERRORS_RETURN)
        comm.is_extended = True
        buffer = bytearray(b"[]".ljust(1 << 16, b"\0"))
        if comm.rank == 0:
            self._takes(HELLO, ANSWER_S, buffer)
        told = buffer.rstrip(b"\0").decode()
        self._processes = [(space, pid, born) for space, pid, born in json.loads(comm.broadcast_text(told, 0))]

    def ready(self) -> bool | None:
        """Whether all of them wait to join; None if one has died, or takes too long."""
        found = 0.0
        if self.comm.rank == 0:
            found = float(self._arrives(READY, 0.0))
            if not found and time.monotonic() > self._until_s:  # not if it waits by now: rounds may be long
                found = -1.0
        if not self._processes or any(_is_there(*process) is False for process in self._processes):
            found = -1.0
        some = self.comm.gather_number(found)
        return None if some.min() < 0 else bool(some[0])

    def join(self) -> MpiComm | None:
        """All ranks, the fresh ones last; None if that failed, and then `comm` is as it was."""
        there = self.comm.rank != 0
        if not there and self._takes(READY, 0.0):
            self._send(COME)
            there = self._takes(HERE, ANSWER_S)
        if self.comm.gather_number(not there).any():
            return None
        joined: MpiComm | None = None
        with contextlib.suppress(self._mpi.Exception, RankLost):
            joined = self.comm.inside(lambda: merged(self._mpi, self._inter, fresh=False))
        if self.comm.gather_number(joined is None).any():
            if joined is not None:
                joined.revoke()
                joined.retire()
            return None
        return joined

    def drop(self) -> None:
        """Let them end. It is not collective: each rank ends those on its host."""
        if self.comm.rank == 0 and self._processes:
            self._send(GO)
        for space, pid, born in self._processes:
            if _is_there(space, pid, born):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        self._processes = []

    def _send(self, tag: int) -> None:
        nothing = np.zeros(1)
        with contextlib.suppress(self._mpi.Exception):  # a dead one does not answer
            self._sent.append((self._inter.Isend(nothing, dest=0, tag=tag), nothing))  # nobody waits for it

    def _arrives(self, tag: int, seconds: float) -> bool:
        """Whether a message of the first fresh rank arrives within so many seconds. It raises nothing, because only
        rank 0 asks."""
        with contextlib.suppress(self._mpi.Exception):
            return _arrives(self._inter, [tag], seconds) == tag
        return False

    def _takes(self, tag: int, seconds: float, buffer: Any = None) -> bool:
        """Receive such a message; False if none arrives."""
        if not self._arrives(tag, seconds):
            return False
        with contextlib.suppress(self._mpi.Exception):
            self._inter.Recv(np.zeros(1) if buffer is None else buffer, source=0, tag=tag)
            return True
        return False


def _is_there(space: str, pid: int, born: int) -> bool | None:
    """Whether the process born at this time runs; None if it cannot be seen from here."""
    if not space or space != launcher.pid_space():
        return None
    return runs(pid) and launcher.born(pid) == born


def connected(mpi: Any) -> MpiComm:
    """On a fresh rank: wait until the other ranks let it join. It ends if they do not."""
    parent, own, nothing = mpi.Comm.Get_parent(), mpi.COMM_WORLD, np.zeros(1)
    parent.Set_errhandler(mpi.ERRORS_RETURN)
    try:
        own.Barrier()
        tag = COME
        if own.rank == 0:
            parent.Send(nothing, dest=0, tag=READY)
            tag = _arrives(parent, [COME, GO], float("inf"), launcher.ranks_of_others())
        if own.bcast(tag) == COME:
            own.Barrier()  # all are alive, so that the merge below does not wait for a dead one
            if own.rank == 0:
                parent.Recv(nothing, source=0, tag=COME)
                parent.Send(nothing, dest=0, tag=HERE)
            return merged(mpi, parent, fresh=True)
    except (mpi.Exception, RankLost):
        pass
    os._exit(0)


def _arrives(inter: Any, tags: Sequence[int], seconds: float, others: Sequence[int] = ()) -> int:
    """The first of these tags with a message from the other side's rank 0; 0 if none comes in time. `others`: processes
    that wait on the other side; once all have ended nothing comes."""
    until_s, look_s = time.monotonic() + seconds, time.monotonic() + ANSWER_S
    while True:
        for tag in tags:
            if inter.Iprobe(source=0, tag=tag):
                return tag
        if (now_s := time.monotonic()) >= until_s:
            return 0
        if now_s > look_s:
            look_s = now_s + ANSWER_S
            if others and not any(map(runs, others)):
                return 0
        time.sleep(POLL_S)


def merged(mpi: Any, inter: Any, fresh: bool) -> MpiComm:
    """The communicator of both sides, the fresh ranks last. Collective over both."""
    world = inter.Merge(high=fresh)
    world.Set_errhandler(mpi.ERRORS_RETURN)
    joined = MpiComm(mpi, world)
    joined.is_extended = True
    joined.keep_vigil()
    return joined


def _command() -> list[str]:
    command = same_program()
    if command is None:
        raise ConfigError("the program is not a file or module, so no fresh rank can run it")
    return command
