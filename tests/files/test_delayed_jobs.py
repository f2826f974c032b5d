"""The amount of work by measured delays, where silos are jobs of their own."""

import json
import time

import pytest
from files.test_buffered_jobs import dies_at, replayed
from files.test_joining import grown
from support.runs import put_back
from support.silojobs import IDS, Job, OneSilo, apart, served

from fedmpi.flat import sha256
from fedmpi.keeper import Keeper
from fedmpi.rounds.delays import Delays

__all__ = ["put_back"]


class Queued(OneSilo):
    """A silo's job; that of s2 waits before each training, as in a queue."""

    def _train(self, commit, call):
        time.sleep(0.15 if self.silo == "s2" else 0.0)
        super()._train(commit, call)

    def _train_at_once(self, commit):
        if not self._sent and self.silo == "s2":
            time.sleep(0.15)
        super()._train_at_once(commit)


def by_delay(tmp_path, rounds, **more):
    amount = {"name": "by_delay", "budget_s": 0.1, **more.pop("amount", {})}
    return apart(tmp_path, rounds, local={"epochs": None, "steps": 40, "amount": amount}, **more)


def test_the_first_training_of_a_silo_that_joins_has_the_rate_of_its_share(tmp_path):
    """Rate times steps is the same for all silos."""
    how = by_delay(tmp_path, 7, engine={"name": "buffered", "size": 1}, transport={"min_silos": 1})
    records, _, jobs = grown(how, {"s0": 2}, jobs=[Job(how, "s2", Queued)])
    for job in jobs:
        job.ended()
    arrivals = [one for record in records for one in record["arrivals"]]
    told = [[(one["amount"], one["scale"]) for one in arrivals if one["silo"] == silo] for silo in ("s0", "s2")]
    assert told[0][0] == (40, 0.1) and told[1][:2] == [(40, 1.0), (1, 1.0)]


@pytest.mark.parametrize("dies", [False, True])
def test_the_wait_in_a_queue_is_part_of_the_delay(tmp_path, monkeypatch, dies):
    """And a replay has the bits, also if the server died; it stands by what it told silos of late updates."""
    engine = {"name": "buffered", "size": 2}
    how = by_delay(tmp_path, 12, engine=engine, amount={"cutoff": 1.0}, checkpoint={"every": 4})
    jobs = [Job(how, silo, Queued) for silo in IDS]
    if dies:
        monkeypatch.setattr(Keeper, "finish", lambda self, state: None)
        for place, number in (("commit", 4), ("poll", 9)):
            with monkeypatch.context() as patch:
                dies_at(patch, place, number)
                with pytest.raises(KeyboardInterrupt):
                    served(how)
        monkeypatch.undo()
    _, there = served(how)
    for job in jobs:
        job.ended()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(1, 13))
    arrivals = [one for row in rows for one in row["arrivals"]]
    known = [one for one in arrivals if one["handed_s"] is not None]
    assert known and (dies or len(known) == len(arrivals))
    waits = {
        silo: [one["at_s"] - one["handed_s"] - one["work_s"] for one in known if one["silo"] == silo] for silo in IDS
    }
    if not dies:
        assert min(waits["s2"][1:], default=1.0) > 0.1
        later = [one["amount"] for one in arrivals if one["silo"] == "s2"][2:]
        assert not later or max(later) == 1  # the wait leaves no time of the budget
    assert sha256(replayed(how, tmp_path)) == sha256(there.parameters)
    for silo in IDS:  # no update counts twice
        numbers = [one["training"] for one in arrivals if one["silo"] == silo]
        assert numbers == list(range(len(numbers)))
    assert there.state.policy["delay_means"].shape[1] == 2


def test_synchronous_rounds_tell_silos_how_much_to_do(tmp_path):
    how = by_delay(tmp_path, 4)
    jobs = [Job(how, silo, Queued) for silo in IDS]
    records, there = served(how)
    for job in jobs:
        job.ended()
    for record in records:
        for silo, one in record["amounts"].items():
            assert record["silos"][silo]["num_steps"] == one["amount"]
            assert one["work_s"] > 0 and (one["wait_s"] > 0.1 or silo != "s2")
    assert {one["amount"] for one in records[0]["amounts"].values()} == {40}
    assert records[-1]["amounts"]["s2"]["amount"] == 1
    means = Delays.of(there.state.policy, there.federation.rule, IDS).means
    assert means["s2"].wait_s > 0.1
