"""A run whose ranks die at given points, under an MPI that outlives them; the final rank 0 prints the result.

python heal.py OUT RANK:ROUND:POINT[,...] [KEY=VALUE ...]    ranks are those that the launcher started

Points: train (a silo has trained), ready (before the ranks agree), exchange (before it), step (during it), evaluate,
mirror (while the commit is stored), tell (once it is stored), write (when a checkpoint is due), end (after the last
round), away (once all is on disk), mark (once members have changed as asked); and during recovery: shrink (once the
remaining ranks have met), heal, take (once they have the state). At `late` and `apart` a rank does not die, but acts as
if the remaining ranks had not met: after they did, and while the others wait for it in a call. At `hang` its silo does
not end, at `stop` its process stops for 3 s.

Noise under masks: each share that a silo adds to its words is a line of OUT.shares: round, silo, digest of its key.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import fedmpi
from fedmpi import heal, mirror, train
from fedmpi.comm import connect
from fedmpi.comm.mpi import MpiComm
from fedmpi.errors import RankLost
from fedmpi.flat import sha256
from fedmpi.keeper import Keeper
from fedmpi.requests import Desk
from fedmpi.rounds import synchronous, training
from fedmpi.secure.noise import NoiseShares
from fedmpi.server import Server

out, deaths, *overrides = sys.argv[1:]
first = connect()
rank = first.rank
mine = [(int(round), point) for r, round, point in (d.split(":") for d in deaths.split(",") if d) if int(r) == rank]
rounds: list[int] = []  # finished rounds


def dies_at(owner, name, point):
    """The call dies when it is this rank's turn."""
    call = getattr(owner, name)

    def dying(*arguments, **named):
        now = len(rounds) + 1
        while (now, "hang") in mine and point == "train":
            time.sleep(0.1)
        if (now, "stop") in mine and point == "train":
            mine.remove((now, "stop"))
            subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        if (now, point) in mine:
            time.sleep(0.05 * (rank % 2))  # so that the others are in different calls
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)

    setattr(owner, name, dying)


dies_at(training, "check_contribution", "train")
dies_at(synchronous, "agree_ready", "ready")
dies_at(synchronous.SynchronousRound, "commit", "exchange")
dies_at(Server, "step", "step")
dies_at(synchronous, "evaluate", "evaluate")
dies_at(mirror, "exchanged", "mirror")
dies_at(train.Run, "_tell", "tell")
dies_at(Keeper, "write", "write")
dies_at(train.Run, "_conclude", "end")
dies_at(train.Run, "_part", "away")
dies_at(MpiComm, "keep_vigil", "shrink")
dies_at(heal, "_handed_on", "heal")
dies_at(Keeper, "take_over", "take")
dies_at(Desk, "carried_out", "mark")


def late(comm, *arguments, share=MpiComm.share):
    total = share(comm, *arguments)
    if (len(rounds) + 1, "late") in mine and sys._getframe(1).f_code.co_name == "shrink":
        mine.clear()
        raise RankLost([])
    return total


def apart(comm, row, gather=MpiComm.gather):
    if (len(rounds) + 1, "apart") in mine and sys._getframe(1).f_code.co_name == "__init__":
        mine.remove((len(rounds) + 1, "apart"))
        raise RankLost([])
    return gather(comm, row)


def noted(shares, there, hosted, number, factor, streams=NoiseShares.streams):
    found = streams(shares, there, hosted, number, factor)
    silos = [silo for silo in hosted if silo in there]
    with open(f"{out}.shares", "a") as lines:
        for silo, share in zip(silos, found, strict=True):
            lines.write(f"{number} {silo} {hashlib.sha256(share._key).hexdigest()}\n")
    return found


NoiseShares.streams = noted
MpiComm.share = late
MpiComm.gather = apart
train.Run._score = lambda self, record: float(record["round"] == 3)  # the best round lies between two checkpoints

with fedmpi.Run("configs/digits.yaml", f"out={out}", *overrides) as run:
    for record in run:
        rounds.append(record["round"])
if run.comm.rank == 0:
    row = {"seen": rounds, "sha256": sha256(run.parameters), "ranks": run.comm.size, "silos": run.membership.ids}
    print(json.dumps(row), flush=True)
