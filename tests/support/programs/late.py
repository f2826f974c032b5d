"""What `engine.policy: deadline` promises on several ranks: see cases.py. Argument: FOLDER."""

import os
import subprocess
import sys

from support.programs.cases import require_equal, run
from support.runs import OWN, paced

import fedmpi
from fedmpi import comm as ranks
from fedmpi.components import build, component
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.flat import sha256
from fedmpi.local import Sgd

HERE = "support.programs.late:"
STEP_S, STEPS = 0.02, 25  # half a second a silo and round
CASES = {}


def case(work):
    CASES[work.__name__] = work
    return work


@component
class Paced(Sgd):
    """Every step takes as long, but for one silo in one round; a silo may stop its process for a while."""

    slow: str = ""
    slower: float = 10.0
    stops: str = ""
    in_round: int = 2

    def train(self, silo, model, params_P, round):
        now = round.number == self.in_round
        if now and silo.id == self.stops:
            stop = f"sleep 0.4; kill -STOP {os.getpid()}; sleep 1.7; kill -CONT {os.getpid()}"
            subprocess.Popen(["/bin/sh", "-c", stop], start_new_session=True)
        step_s = STEP_S * (self.slower if now and silo.id == self.slow else 1)
        return super().train(silo, model, params_P, paced(round, step_s))


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


@case
def a_second_open_run_is_refused(comm, folder):
    values = {"data": {"name": OWN + "Blobs"}, "model": "logistic", "device": {"name": "cpu"}, "rounds": 1}
    values["local"] = {"name": "sgd", "lr": 0.1, "steps": 2}
    late = values | {"engine": {"name": "synchronous", "policy": "deadline"}, "out": f"{folder}/second-{comm.size}"}
    with fedmpi.Run(build(Config, values | {"out": f"{folder}/opened-{comm.size}"}), comm=comm) as opened:
        try:
            fedmpi.Run(build(Config, late), comm=comm)
        except ConfigError as error:
            told = str(error)
        assert len(list(opened)) == 1, "the first run goes on"
    with fedmpi.Run(build(Config, late), comm=comm) as alone:
        assert len(list(alone)) == 1
    require_equal("the refusal", told, "engine.policy: a deadline needs the ranks to itself; close the open run first")


def where(records, rank):
    """A silo that the rank hosts."""
    return next(silo for silo, row in records[0]["silos"].items() if row["rank"] == rank)


@case
def a_slow_silo_does_not_make_the_others_wait(comm, folder):
    records, _ = trained(comm, folder, "even", {}, "all", rounds=2)
    even_s = records[-1]["seconds"]["round"]
    slow = {"slow": where(records, comm.size - 1)}
    waits, _ = trained(comm, folder, "waits", slow, "all", rounds=2)
    told = {"all": waits[1]["seconds"]["round"]}
    for late, what in (("partial", "partial"), ("drop", "dropped"), ("buffer", "buffered")):
        policy = {"name": "deadline", "deadline_s": even_s, "min_silos": comm.size - 1, "late": late}
        records, _ = trained(comm, folder, late, slow, policy)
        require_equal("late", records[1]["late"], {slow["slow"]: what})
        require_equal("stale", records[2].get("stale"), {slow["slow"]: 1} if late == "buffer" else None)
        told[late] = records[1]["seconds"]["round"]
    assert told["all"] > 4.5, told
    assert max(told["partial"], told["drop"], told["buffer"]) < told["all"] / 2, (even_s, told)
    return told


@case
def a_stopped_rank_is_late_and_comes_back(comm, folder):
    records, _ = trained(comm, folder, "first", {}, "all", rounds=1)
    for rank in (0, comm.size - 1):
        silo = where(records, rank)
        policy = {"name": "deadline", "deadline_s": 0.5, "min_silos": comm.size - 1}
        found, _ = trained(comm, folder, f"stopped-{rank}", {"stops": silo, "slow": silo}, policy)
        require_equal("late", list(found[1]["late"]), [silo])
        assert 1.5 < found[1]["seconds"]["round"] < 4.9, found[1]["seconds"]  # 1.7 of them stopped; else 5
        require_equal("all come", [len(r["silos"]) for r in found], [comm.size] * 3)


@case
def silos_that_have_not_begun_contribute_nothing(comm, folder):
    """Two silos to a rank, the first one of the last rank is slow."""
    records, _ = trained(comm, folder, "two", {}, "all", 2 * comm.size, rounds=1)
    theirs = [silo for silo, row in records[0]["silos"].items() if row["rank"] == comm.size - 1]
    policy = {"name": "deadline", "deadline_s": 1.0, "min_silos": 2 * comm.size - 2}
    found, _ = trained(comm, folder, "behind", {"slow": theirs[0]}, policy, 2 * comm.size)
    require_equal("late", found[1]["late"], {theirs[0]: "partial", theirs[1]: "dropped"})
    require_equal("steps", [found[1]["silos"][silo].get("num_steps", 0) > 0 for silo in theirs], [True, False])


@case
def a_round_of_too_few_is_repeated_with_twice_the_time(comm, folder):
    records, _ = trained(comm, folder, "few", {}, "all", rounds=1)
    slow = {"slow": where(records, comm.size - 1), "slower": 4.0}
    policy = {"name": "deadline", "deadline_s": 1.2, "min_silos": comm.size, "too_few": "repeat"}
    found, bits = trained(comm, folder, "repeated", slow, policy)
    assert found[1]["repeats"] >= 1 and not any(r["late"] for r in found), found[1]
    _, whole = trained(comm, folder, "whole", {}, "all")
    require_equal("bits", bits, whole)


if __name__ == "__main__":
    run(CASES, ranks.connect(), *sys.argv[1:])
