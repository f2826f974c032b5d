"""The ranks of an MPI job; only this module and fresh.py import mpi4py, and this one only when `library` is called.

world    vectors (mpi_transport.py)
control  control traffic (mpi_control.py)
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import math
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fedmpi import launcher
from fedmpi.comm.base import LOST, Comm, T
from fedmpi.comm.machine import cores, host_identity
from fedmpi.comm.mpi_control import bounded, revoked_on_loss, tolerant
from fedmpi.comm.mpi_transport import MpiTransport
from fedmpi.comm.staging import Staging
from fedmpi.comm.vigil import Vigil
from fedmpi.errors import ConfigError, FedmpiError, RankLost, agreed
from fedmpi.output import flush, say


def library() -> Any:
    """mpi4py.MPI; initialises MPI at the first call. Raises ImportError or RuntimeError if there is none."""
    import mpi4py

    if tolerant():
        mpi4py.rc.finalize = False  # Finalize may wait for a lost rank (process.py)
    from mpi4py import MPI

    return MPI


class MpiComm(MpiTransport):
    """All ranks of an MPI job, or a group of them.

    `is_extended`: fresh ranks have joined (spawn.py).
    """

    is_extended = False

    def __init__(self, mpi: Any, world: Any = None) -> None:
        world = mpi.COMM_WORLD.Dup() if world is None else world
        with revoked_on_loss(mpi, world):
            control = world.Dup()
            world.Barrier()  # now every rank has it and can revoke it
        with revoked_on_loss(mpi, control, world):
            super().__init__(mpi, world, control)
            self._groups: list[MpiComm] = []  # made by `split`
            self._twins: list[MpiComm] = []
            self._first = self._world  # the communicator before any rank was lost
            name = socket.gethostname().encode()[:256]
            rows = self.gather(name.ljust(256, b"\0") + host_identity() + (mine := cores())[0])
        self.hosts = tuple(row[:256].rstrip(b"\0").decode() for row in rows)
        self.machines = tuple(row[256:288] for row in rows)
        self.oversubscribed = sum(row[288:] == mine[0] for row in rows) > mine[1]
        peers = [r for r, machine in enumerate(self.machines) if machine == self.machines[self.rank]]
        self.local_rank, self.local_size = peers.index(self.rank), len(peers)
        self.fatal = (*LOST, mpi.Exception) if self.size > 1 else ()
        self.outlives_ranks = self.size > 1 and hasattr(mpi.Comm, "Shrink") and tolerant()

    @bounded
    def split(self, color: int, last: bool = False) -> Comm | None:
        world = self._world.Split(color if color >= 0 else self._mpi.UNDEFINED, self.rank + self.size * last)
        if color < 0:
            return None
        group = MpiComm(self._mpi, world)
        group.oversubscribed = group.oversubscribed or self.oversubscribed
        group._above = self
        if (vigil := self._watching) is not None:
            vigil.lanes.append(group)
        self._groups.append(group)
        return group

    @bounded
    def dup(self) -> MpiComm:
        self.collectively(self._check_threads)
        twin = copy.copy(self)
        twin._world, twin._control = self._world.Dup(), self._control.Dup()
        twin._first = twin._world
        twin._node, twin._windows, twin._sent, twin._groups, twin._twins = None, [], [], [], []
        twin.bytes_up = twin.bytes_down = twin.bytes_control = twin._worst = twin._passed_on = 0
        twin.transfer_s = 0.0
        twin.staging, twin.sleeps_while_waiting = Staging(), True
        twin._forget_vectors()
        twin.depth, twin._beat_s, twin._above = 0, math.inf, None  # the other thread sends the heartbeats
        if self._vigil is not None:
            self._vigil.lanes.append(twin)
        self._twins.append(twin)
        return twin

    def _check_threads(self) -> None:
        if self._mpi.Query_thread() < self._mpi.THREAD_MULTIPLE:
            raise ConfigError("exchange.overlap: needs an MPI that threads may call at once (MPI_THREAD_MULTIPLE)")

    def shrink(self) -> Comm:
        left: MpiComm | None = None
        self.depth += 1  # Shrink waits for all ranks that are left
        try:
            while True:
                try:
                    if not self.outlives_ranks:  # no rank can be lost, so nothing needs revoking
                        left = MpiComm(self._mpi, self._world.Shrink())
                        break
                    for comm in (self, *([left] if left is not None else [])):
                        comm.revoke()
                    # Always shrink the first communicator: if another rank dies now, ranks that have finished and ranks
                    # that have not would shrink two different ones, and wait for each other.
                    left = None
                    left = MpiComm(self._mpi, self._first.Shrink())
                    left._first = self._first
                    left.share(np.zeros(1))
                    if self._vigil is not None:
                        left.keep_vigil()
                    break
                except (self._mpi.Exception, RankLost):
                    continue  # another rank died meanwhile
        except (NotImplementedError, AttributeError):
            raise agreed(
                ConfigError(
                    "this MPI cannot go on without a lost rank (MPI_Comm_shrink is missing): take Open MPI 5 with "
                    "mpirun --with-ft ulfm, or start again from the checkpoint"
                )
            ) from None
        finally:
            self.depth -= 1
            self.calls += 1
        left.oversubscribed = left.oversubscribed or self.oversubscribed
        left.is_extended = self.is_extended
        if self._vigil is not None:
            self._vigil.end()
        return left

    def revoke(self) -> None:
        """Makes pending and future calls on this communicator and its parts fail on every rank."""
        for part in (*self._twins, *self._groups):
            part.revoke()
        for communicator in (self._node, self._control, self._world):
            if communicator is not None:
                communicator.Revoke()

    @bounded
    def start(self, command: list[str], num_ranks: int, info: Any) -> Any:
        """Starts processes; the intercommunicator with them once they have initialised MPI. Collective. If one dies
        before that on a host with other ranks, the job ends."""
        with launcher.watched(spawns=True) if self.local_rank == 0 else contextlib.nullcontext():
            return self._world.Spawn(  # type: ignore[attr-defined]
                command[0], command[1:], num_ranks, info, root=0
            )

    @bounded
    def inside(self, call: Callable[[], T]) -> T:
        """Runs a call that waits for other processes under the timeouts."""
        return call()

    @property
    def mpi(self) -> Any:
        """mpi4py's module MPI."""
        return self._mpi

    def retire(self) -> None:
        """Stops the timeouts: from now on another communicator is used."""
        if self._vigil is not None:
            self._vigil.end()

    def counted(self) -> tuple[int, int, int]:
        own = (self.bytes_up, self.bytes_down, self.bytes_control)
        up, down, control = (sum(some) for some in zip(own, *(group.counted() for group in self._groups), strict=True))
        return up, down, control

    def free_parts(self) -> None:
        for part in (*self._twins, *self._groups):
            part._free()
            if (vigil := self._watching) is not None:
                vigil.lanes.remove(part)
        self._twins.clear()
        self._groups.clear()
        self.free_shared()

    def discard_shared(self) -> None:
        for part in (*self._twins, *self._groups):
            part.discard_shared()
        super().discard_shared()

    def _free(self) -> None:
        self.free_parts()
        for communicator in (self._node, self._control, self._world):
            if communicator is not None:
                communicator.Free()

    def keep_vigil(self) -> None:
        """Starts the timeouts: from now on no call on this communicator or its parts waits for ever. Collective."""
        if self.size > 1:
            pids = [int.from_bytes(row, "little") for row in self.gather(os.getpid().to_bytes(8, "little"))]
            try:
                self._vigil = Vigil(self.rank, self.hosts, pids, self._give_up, self.machines)
            except (RuntimeError, MemoryError) as error:  # the other ranks continue, and would wait for this one
                why = f"rank {self.rank} cannot start a thread: {error}; raise ulimit -v or -u"
                self._give_up(FedmpiError(why))
                return
            self._vigil.lanes.append(self)
            self._beat_s = 0.0

    def _give_up(self, error: FedmpiError) -> None:
        """Aborts the job where no caller could catch the error: the rank is inside MPI, or others wait for it."""
        say(f"fedmpi: {error}", error=True)
        launcher.end_later()
        self.abort(error.exit_code)

    @bounded
    def finish(self) -> None:
        try:
            self._drain_all()  # so that no message is left at Finalize
            self._drop_vectors()
            if not self.open_runs:
                self.free_parts()
            self._world.Barrier()
        except (self._mpi.Exception, RankLost):
            if self.outlives_ranks:
                self.revoke()  # others may wait for this rank, which leaves
            raise

    def abort(self, code: int) -> None:
        flush()
        # In case Abort does not return: this timer runs even if a call holds the interpreter. It needs memory and a
        # thread, which may be unavailable.
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback_later(10, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
        time.sleep(0.1)  # the launcher receives output and aborts on separate channels; let it print the output first
        if self.is_extended:  # Abort ends the ranks that were started together, and not the others
            launcher.end_now()
        self._mpi.COMM_WORLD.Abort(code)
