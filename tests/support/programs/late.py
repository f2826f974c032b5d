"""What `engine.policy: deadline` promises on several ranks: see cases.py. Argument: FOLDER."""

import os
import subprocess
import sys
import time
from dataclasses import replace

from support.programs.cases import require_equal, run
from support.runs import OWN

import fedmpi
from fedmpi import comm as ranks
from fedmpi.components import build, component
from fedmpi.config import Config
from fedmpi.flat import sha256
from fedmpi.local import Sgd

HERE = "support.programs.late:"
STEP_S, STEPS = 0.005, 80
CASES = {}


def case(work):
    CASES[work.__name__] = work
    return work


@component
class Paced(Sgd):
    """Every step takes as long; of a silo that is slow ten times that. A silo may stop its process for a while."""

    slow: str = ""
    stops: str = ""
    in_round: int = 2

    def train(self, silo, model, params_P, round):
        now = round.number == self.in_round

        def check(before=round.check):
            time.sleep(STEP_S * (10 if now and silo.id == self.slow else 1))
            before()

        if now and silo.id == self.stops:
            stop = f"sleep 0.05; kill -STOP {os.getpid()}; sleep 1.7; kill -CONT {os.getpid()}"
            subprocess.Popen(["/bin/sh", "-c", stop], start_new_session=True)
        return super().train(silo, model, params_P, replace(round, check=check))


def trained(comm, folder, name, local, policy, num_silos=0, rounds=3):
    """The records, and the bits of the parameters."""
    sizes = [40] * (num_silos or comm.size)
    local = {"name": HERE + "Paced", "lr": 0.1, "steps": STEPS, "batch_size": 4} | local
    engine = {"name": "synchronous", "policy": policy}
    values = {"data": {"name": OWN + "Blobs", "sizes": sizes}, "local": local, "engine": engine, "rounds": rounds}
    out = f"{folder}/{name}-{comm.size}"
    config = build(Config, values | {"model": "logistic", "out": out, "device": {"name": "cpu"}})
    with fedmpi.Run(config, comm=comm) as run:
        records = list(run)
        return records, sha256(run.parameters)


def where(records, rank):
    """A silo that the rank hosts."""
    return next(silo for silo, row in records[0]["silos"].items() if row["rank"] == rank)


@case
def a_slow_silo_does_not_make_the_others_wait(comm, folder):
    limit = {"name": "deadline", "min_silos": comm.size - 1}
    records, _ = trained(comm, folder, "even", {}, "all", rounds=2)
    even_s = records[-1]["seconds"]["round"]
    slow = {"slow": where(records, comm.size - 1)}
    waits, _ = trained(comm, folder, "waits", slow, "all", rounds=2)
    told = {}
    for late in ("partial", "drop"):
        policy = limit | {"deadline_s": even_s, "late": late}
        records, _ = trained(comm, folder, late, slow, policy)
        wanted = {slow["slow"]: "dropped" if late == "drop" else late}
        require_equal("late", [r["late"] for r in records], [{}, wanted, {}])
        told[late] = records[1]["seconds"]["round"] / even_s
    told["all"] = waits[1]["seconds"]["round"] / even_s
    assert told["all"] > 4, told
    assert max(told["partial"], told["drop"]) < 1.6, told  # 1.2 where nobody else computes
    return told


@case
def a_stopped_rank_is_late_and_comes_back(comm, folder):
    records, _ = trained(comm, folder, "first", {}, "all", rounds=1)
    for rank in (0, comm.size - 1):
        stops = where(records, rank)
        policy = {"name": "deadline", "deadline_s": 0.5, "min_silos": comm.size - 1}
        found, _ = trained(comm, folder, f"stopped-{rank}", {"stops": stops}, policy)
        # Rank 0 decides, and is itself the one that was stopped: then nobody is told before it is through.
        late = {stops: "partial"} if found[1]["late"] else {}
        require_equal("late", [r["late"] for r in found], [{}, late, {}])
        assert 1.2 < found[1]["seconds"]["round"] < 4.0 > found[2]["seconds"]["round"], found[1]["seconds"]
        assert late or rank == 0


@case
def silos_that_have_not_begun_contribute_nothing(comm, folder):
    """Two silos to a rank, the first one of the last rank is slow."""
    records, _ = trained(comm, folder, "two", {}, "all", 2 * comm.size, rounds=1)
    theirs = [silo for silo, row in records[0]["silos"].items() if row["rank"] == comm.size - 1]
    policy = {"name": "deadline", "deadline_s": 0.7, "min_silos": comm.size}
    found, _ = trained(comm, folder, "behind", {"slow": theirs[0]}, policy, 2 * comm.size)
    require_equal("late", found[1]["late"], {theirs[0]: "partial", theirs[1]: "dropped"})
    require_equal("silos", len(found[1]["silos"]), 2 * comm.size)
    require_equal("again", found[2]["late"], {})


@case
def a_round_of_too_few_is_repeated_with_twice_the_time(comm, folder):
    records, _ = trained(comm, folder, "few", {}, "all", rounds=1)
    slow = {"slow": where(records, comm.size - 1)}
    policy = {"name": "deadline", "deadline_s": 0.6, "min_silos": comm.size, "too_few": "repeat"}
    found, bits = trained(comm, folder, "repeated", slow, policy)
    require_equal("repeats", [r.get("repeats", 0) for r in found], [0, 2, 0])
    _, whole = trained(comm, folder, "whole", {}, "all")
    require_equal("bits", bits, whole)


if __name__ == "__main__":
    run(CASES, ranks.connect(), *sys.argv[1:])
