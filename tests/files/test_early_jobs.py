"""stop.early in jobs: the server decides, and all jobs end alike."""

from dataclasses import replace

import pytest
from support.runs import put_back, run
from support.silojobs import IDS, Job, apart, in_one_process, served, trained_apart

from fedmpi.errors import ConfigError
from fedmpi.flat import sha256
from fedmpi.health import EarlySection
from fedmpi.jobs.remote import FilesRemote
from fedmpi.keeper import Keeper

__all__ = ["put_back"]

STALLS = {"local": {"lr": 1e-9}}  # so no metric moves


def early(patience=2, **more):
    return {"stop": {"early": {"metric": "accuracy", "patience": patience, **more}}}


def test_all_jobs_end_as_one_process_does_and_go_on_with_another_limit(tmp_path, monkeypatch):
    how = apart(tmp_path, 9, **STALLS, **early())
    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "finish", lambda self, state: None)  # the server is killed before its last checkpoint
        records, there, _ = trained_apart(how)
    _, here = run(in_one_process(how, tmp_path))
    assert [record["round"] for record in records] == [1, 2, 3] and there.ended == here.ended != ""
    assert sha256(there.parameters) == sha256(here.parameters)
    assert all((there.out / "silos" / silo / "model.safetensors").exists() for silo in IDS)
    records, there = served(how)  # no silo's job is there
    assert records[-1]["round"] == 3 and there.ended
    for silo in IDS:  # nor is the server
        Job(how, silo).ended()
    more = replace(how, stop=replace(how.stop, early=EarlySection(metric="accuracy", patience=4)))
    first = Job(more, "s0")
    first.join(1.5)  # it waits for the server
    assert first.is_alive()
    jobs = [first, *(Job(more, silo) for silo in IDS[1:])]
    records, there = served(more)
    for job in jobs:
        job.ended()
    assert [record["round"] for record in records] == [4, 5] and there.ended


def test_a_round_that_not_all_silos_have_scored_does_not_count(tmp_path, monkeypatch):
    wait = FilesRemote._wait_for_scores

    def without_one(self, fed, number):
        return {silo: told for silo, told in wait(self, fed, number).items() if number != 2 or silo != "s1"}

    monkeypatch.setattr(FilesRemote, "_wait_for_scores", without_one)
    records, there, _ = trained_apart(apart(tmp_path, 9, **STALLS, **early()))
    assert [record["round"] for record in records] == [1, 2, 3, 4] and there.ended


def test_silos_that_do_not_wait_end_by_the_training_loss(tmp_path):
    engine = {"engine": {"name": "buffered", "size": 2}}
    with pytest.raises(ConfigError, match="silos score different versions; take metric: train_loss"):
        apart(tmp_path, 9, **engine, **early())
    records, there, _ = trained_apart(apart(tmp_path, 9, **engine, **early(None, metric="train_loss", target=100.0)))
    assert len(records) == 1 and there.ended.startswith("train_loss is")
