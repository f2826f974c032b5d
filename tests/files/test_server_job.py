"""What the server's job of silos in separate jobs refuses, survives and cleans up."""

import threading

import pytest
from support.runs import put_back, run
from support.silojobs import ALONE, IDS, Job, OneSilo, apart, in_one_process, served

from fedmpi import requests, roster
from fedmpi.errors import CheckpointError
from fedmpi.files import tidy
from fedmpi.flat import sha256
from fedmpi.jobs.serve import Serving
from fedmpi.jobs.silo import SiloJob
from fedmpi.keeper import Keeper
from fedmpi.stopping import STOP

__all__ = ["put_back"]


def test_silos_neither_leave_nor_join_by_request(tmp_path):
    how = apart(tmp_path, 3)
    jobs = [Job(how, silo) for silo in IDS]
    with Serving(how) as there:
        for record in there:
            if record["round"] == 1:
                requests.put(there.out, "retire", "s2")
                requests.put(there.out, "admit", "s9")
    for job in jobs:
        job.ended()
    whys = [one["refused"] for one in roster.read(there.out)["answers"]]
    assert len(whys) == 2 and all("transport: files: silos neither join nor leave" in why for why in whys)
    _, here = run(in_one_process(how, tmp_path))
    assert sha256(there.parameters) == sha256(here.parameters)


def test_a_resume_reads_commits_that_have_left_the_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tidy, "KEPT_COMMITS", 2)
    how = apart(tmp_path, 7, checkpoint={"every": 10})
    jobs, kept = [Job(how, silo) for silo in IDS], tmp_path / "run-share" / "kept"
    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "finish", lambda self, state: None)  # as after a kill
        served(how, rounds=6)
    assert (kept / "@.00000003").exists() and len([*kept.glob("s?.*")]) == 18
    records, there = served(how)
    assert len(records) == 7
    for job in jobs:
        job.ended()
    assert not [*kept.iterdir()]  # the last checkpoint holds all
    _, here = run(in_one_process(how, tmp_path))
    assert sha256(there.parameters) == sha256(here.parameters)


def test_a_version_that_is_gone_ends_the_server_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tidy, "KEPT_COMMITS", 2)
    monkeypatch.setattr(Keeper, "finish", lambda self, state: None)
    how = apart(tmp_path, 7, checkpoint={"every": 10})
    jobs = [Job(how, silo) for silo in IDS]
    served(how, rounds=4)
    (tmp_path / "run-share" / "kept" / "@.00000001").unlink()
    with pytest.raises(CheckpointError, match="the shared folder holds version 4, but version 1 is gone"):
        served(how)
    for job in jobs:
        job.job._spec.watch.tell(STOP, "the test is over")
        job.join(20)


class Hangs(OneSilo):
    """A silo's job that stays in its training of round 2 until the server has ended."""

    over, freed = threading.Event(), False

    def _train(self, commit, call):
        if call.round == 2:
            type(self).freed = self.over.wait(20)
        with ALONE:
            SiloJob._train(self, commit, call)


def test_no_round_waits_for_the_scores_of_a_silo_that_was_dropped(tmp_path):
    policy = {"name": "deadline", "deadline_s": 1.0, "late": "drop", "min_silos": 2}
    how = apart(tmp_path, 3, engine={"name": "synchronous", "policy": policy})
    jobs = [Job(how, silo, Hangs if silo == "s1" else OneSilo) for silo in IDS]
    records, _ = served(how)
    Hangs.over.set()
    for job in jobs:
        job.ended()
    assert Hangs.freed and all("s1" in record["late"] for record in records[1:])
