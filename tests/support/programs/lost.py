"""Rank 1 is killed under an MPI that survives it; each other rank prints the error that it gets, and who is left."""

import json
import os
import signal
import time

import numpy as np
import torch

from fedmpi.comm import connect
from fedmpi.errors import RankLost

comm = connect()
comm.share(np.zeros(1))
if comm.rank == 1:
    time.sleep(0.3)  # the others are inside a collective, or between two
    os.kill(os.getpid(), signal.SIGKILL)
try:
    while True:
        comm.allreduce(torch.zeros(3), torch.zeros(3))
        comm.share(np.zeros(1))
except RankLost as lost:
    left = comm.shrink()
    row = {
        "rank": comm.rank,
        "lost": lost.ranks,
        "left": [left.rank, left.size],
        "sum": left.share(np.ones(1)).tolist(),
    }
    print(json.dumps(row), flush=True)
os._exit(0)  # MPI_Finalize may wait for the dead rank
