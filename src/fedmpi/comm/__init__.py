"""Communication between the ranks of a run.

base       the interfaces Control, Transport and Comm, and functions that all implementations share
solo       one rank without MPI
threads    ranks as threads of one process, for tests
mpi        the ranks of an MPI job; imports mpi4py when it is called
spawn      fresh ranks in place of lost ones
started    what the launcher's variables say
process    joins the launched ranks (`connect`), and ends a rank without leaving the others in a collective
vigil      timeouts: how long a rank waits for the others
machine    cores and shared memory of this machine
"""

from fedmpi.comm.base import BLOCK_BYTES, Comm, Control, CountsDispls, Pending, Transport, blocks
from fedmpi.comm.mpi import MpiComm
from fedmpi.comm.process import connect, go_on_with, leave, told
from fedmpi.comm.solo import SoloComm
from fedmpi.comm.spawn import Spawned
from fedmpi.comm.started import is_first, launched
from fedmpi.errors import ranks_text

__all__ = [
    "BLOCK_BYTES",
    "Comm",
    "Control",
    "CountsDispls",
    "MpiComm",
    "Pending",
    "SoloComm",
    "Spawned",
    "Transport",
    "blocks",
    "connect",
    "go_on_with",
    "is_first",
    "launched",
    "leave",
    "ranks_text",
    "told",
]
