"""The ranks and what they say to each other.

base       what every communicator offers, and what follows from it; one rank by itself
mpi        the ranks of an MPI job; the only module that imports mpi4py, and only when it is called
process    a process among those of its job: `connect`, and how it ends without leaving the others in a collective
vigil      how long a rank waits for the others
machine    cores and shared memory of this machine
"""

from fedmpi.comm.base import BLOCK_BYTES, Comm, Control, CountsDispls, Pending, Transport, blocks
from fedmpi.comm.mpi import MpiComm
from fedmpi.comm.process import connect, go_on_with, is_first, launched, leave, told
from fedmpi.comm.solo import SoloComm
from fedmpi.errors import ranks_text

__all__ = [
    "BLOCK_BYTES",
    "Comm",
    "Control",
    "CountsDispls",
    "MpiComm",
    "Pending",
    "SoloComm",
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
