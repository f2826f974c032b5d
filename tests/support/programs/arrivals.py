"""Asynchronous rounds in real time on several ranks: see cases.py. Arguments: FOLDER, names of cases (default: all)."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from support.programs.cases import require_equal, run
from support.runs import OWN, paced
from support.traces import agrees_with_records, events, sound

import fedmpi
from fedmpi.comm import SoloComm, connect
from fedmpi.components import build, component
from fedmpi.config import Config
from fedmpi.errors import ConfigError, SiloError, Stopped
from fedmpi.flat import sha256
from fedmpi.local import Sgd

HERE = "support.programs.arrivals:"
STEP_S = 0.002
CASES = {}


def case(work):
    CASES[work.__name__] = work
    return work


@component
class Paced(Sgd):
    """Sleeps before each step; a silo may raise."""

    slow: str = ""
    slower: float = 10.0
    fails: str = ""
    in_training: int = 2

    def train(self, silo, model, params_P, round):
        if silo.id == self.fails and silo.cursor >= self.in_training * 40:
            raise OSError("its disk is gone")
        step_s = STEP_S * (self.slower if silo.id == self.slow else 1)
        return super().train(silo, model, params_P, paced(round, step_s))


def config(folder, out, num_silos, rounds=8, local=None, **more):
    values = {
        "data": {"name": OWN + "Blobs", "sizes": [40] * num_silos},
        "local": {"name": HERE + "Paced", "lr": 0.1, "steps": 10, "batch_size": 4} | (local or {}),
        "model": OWN + "Normed",
        "engine": {"name": "buffered", "size": 2},
        "rounds": rounds,
        "out": f"{folder}/{out}",
        "device": {"name": "cpu"},
        "aggregate": {"name": "mean", "weights": "uniform"},
    }
    return build(Config, values | more)


def trained(config, comm):
    """The records, and the bits of the parameters."""
    with fedmpi.Run(config, comm=comm) as done:
        return list(done), sha256(done.parameters)


def replayed(folder, real, out, comm, num_silos, rounds=8, **more):
    engine = {"name": "buffered", "size": 2, "clock": {"name": "replay", "run": f"{folder}/{real}"}}
    return trained(config(folder, out, num_silos, rounds, **more, engine=engine), comm)


@case
def a_slow_silo_does_not_make_the_others_wait(comm, folder):
    out = f"slow-{comm.size}"
    records, _ = trained(config(folder, out, comm.size, 12, {"slow": "s1"}), comm)
    came = Counter(one["silo"] for record in records for one in record["arrivals"])
    assert came["s1"] < max(came.values()), came
    stale = [one["staleness"] for record in records for one in record["arrivals"] if one["silo"] == "s1"]
    assert not stale or max(stale) >= 2, stale  # its training went on through other rounds
    for record in records:
        assert sum(not one.get("dropped") for one in record["arrivals"]) == 2
    return dict(came)


def same_again(comm, folder, name, num_silos, amount="whole", **more):
    """Assert that replays of a run, on as many ranks and on one, have its bits."""
    out = f"{name}-{comm.size}"
    how = config(folder, out, num_silos, local={"slow": "s1", "slower": 4.0, "amount": amount}, **more)
    if name == "resumed":
        trained(replace(how, rounds=4), comm)
    records, bits = trained(how, comm)
    require_equal("rounds", records[-1]["round"], 8)
    rest = {key: value for key, value in more.items() if key not in ("engine", "server")}
    local = {"slower": 1.0, "amount": amount}
    _, again = replayed(folder, out, f"{out}-again", comm, num_silos, local=local, **rest)
    require_equal("bits on as many ranks", again, bits)
    if comm.rank == 0:
        _, alone = replayed(folder, out, f"{out}-alone", SoloComm(), num_silos, local=local, **rest)
        require_equal("bits on one rank", alone, bits)
    comm.barrier()
    return records


@case
def a_replay_gives_the_same_bits_on_any_number_of_ranks(comm, folder):
    same_again(comm, folder, "even", comm.size)


@case
def so_it_does_with_dropped_updates_noise_and_a_dedicated_server(comm, folder):
    more = {"updates": [{"name": "noise", "sigma": 0.01}], "server": {"dedicated": True}}
    same_again(comm, folder, "dropped", comm.size, engine={"name": "buffered", "size": 2, "max_staleness": 1}, **more)


@case
def so_it_does_with_a_window_and_several_silos_to_a_rank(comm, folder):
    engine = {"name": "buffered", "size": 1, "window_s": 0.02}
    same_again(comm, folder, "window", 2 * comm.size + 1, engine=engine)


@case
def so_it_does_with_codecs(comm, folder):
    topk = {"name": "topk", "ratio": 0.3, "values": "int8"}
    ways = {way: {"codec": codec, "feedback": True} for way, codec in (("up", topk), ("down", "int8"))}
    same_again(comm, folder, "codecs", comm.size, exchange=ways)


@case
def so_it_does_after_a_resume(comm, folder):
    same_again(comm, folder, "resumed", comm.size, checkpoint={"every": 2})


@case
def so_it_does_with_work_by_measured_delays(comm, folder):
    amount = {"name": "by_delay", "budget_s": 0.03, "cutoff": 4.0}
    records = same_again(comm, folder, "by_delay", comm.size + 1, amount=amount)
    rows = [one for record in records for one in record["arrivals"]]
    assert {one["amount"] for one in rows} != {10} and all(one["work_s"] > 0 for one in rows), rows
    for one in rows:
        assert one["handed_s"] + one["work_s"] <= one["at_s"] + 1e-3, one


@case
def a_silo_that_raises_ends_all_ranks_with_its_name(comm, folder):
    try:
        trained(config(folder, f"raises-{comm.size}", comm.size, 50, {"fails": f"s{comm.size - 1}"}), comm)
    except SiloError as error:
        assert "its disk is gone" in str(error) and f"silo 's{comm.size - 1}'" in str(error), error
    else:
        raise AssertionError("nothing was raised")


@case
def a_stop_is_noticed_in_the_middle_of_training(comm, folder):
    how = config(folder, f"stop-{comm.size}", comm.size, 500, {"slow": "s0", "slower": 50.0})
    records = []
    try:
        with fedmpi.Run(how, comm=comm) as done:
            for record in done:
                records.append(record)
                if record["round"] == 3 and comm.rank == 0:
                    (Path(done.out) / "stop").touch()
    except Stopped:
        pass
    else:
        raise AssertionError("it did not stop")
    again, _ = trained(replace(how, rounds=len(records) + 2), comm)
    require_equal("resumed after", again[0]["round"], len(records) + 1)
    for one in again[0]["arrivals"]:
        require_equal("silos start anew", one["version"] == len(records), True)


@case
def members_change_while_updates_are_under_way(comm, folder):
    with fedmpi.Run(config(folder, f"members-{comm.size}", comm.size + 1, 9, {"slow": "s0"}), comm=comm) as done:
        for record in done:
            if record["round"] == 3:
                done.rebuild(done.membership.without("s1"))
            if record["round"] == 6:
                done.rebuild(done.membership.with_silo("s1", comm.size - 1))
            if 3 < record["round"] <= 6:
                assert "s1" not in [one["silo"] for one in record["arrivals"]], record["arrivals"]


@case
def the_next_run_gets_nothing_of_one_that_its_caller_left(comm, folder):
    """Updates are under way when the caller leaves it; the next run's model is larger."""
    try:
        with fedmpi.Run(config(folder, f"left-{comm.size}", comm.size, 9), comm=comm) as done:
            for record in done:
                if record["round"] == 2:
                    raise KeyError("of the caller")
    except KeyError:
        pass
    how = config(folder, f"after-{comm.size}", comm.size, 6, model="logistic")
    records, bits = trained(how, comm)
    for record in records:
        came = [(one["silo"], one["training"]) for one in record["arrivals"]]
        assert len(set(came)) == len(came) == 2, came
    _, again = replayed(folder, f"after-{comm.size}", f"after-{comm.size}-again", comm, comm.size, 6, model="logistic")
    require_equal("bits", again, bits)


@case
def a_second_open_run_is_refused(comm, folder):
    plain = config(folder, f"first-{comm.size}", comm.size, 1, engine="synchronous")
    with fedmpi.Run(plain, comm=comm) as opened:
        try:
            fedmpi.Run(config(folder, f"second-{comm.size}", comm.size, 1), comm=comm)
        except ConfigError as error:
            told = str(error)
        list(opened)
    if comm.size > 1:
        wanted = "engine: buffered in real time needs the ranks to itself; close the open run first"
        require_equal("the refusal", told, wanted)


@case
def the_order_of_arrivals_is_on_disk(comm, folder):
    lines = Path(f"{folder}/even-{comm.size}/metrics.jsonl").read_text().splitlines()
    ends = [one["at_s"] for line in lines for one in json.loads(line)["arrivals"]]
    assert len(ends) == 16 and ends == sorted(ends), ends
    traced = events(Path(f"{folder}/even-{comm.size}/trace.json"))
    sound(traced)
    agrees_with_records(traced, map(json.loads, lines))
    assert {event["pid"] for event in traced} == set(range(comm.size))


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    run({name: CASES[name] for name in names or CASES}, connect(), folder)
