"""What the server's job of silos in separate jobs refuses, survives and cleans up."""

import errno
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.runs import put_back, run
from support.silojobs import ALONE, IDS, Job, OneSilo, apart, in_one_process, served, trained_apart
from support.slurm import until

from fedmpi import disk, requests, roster
from fedmpi.errors import CheckpointError, ServerEnded, Superseded
from fedmpi.files import names, tidy
from fedmpi.files.claims import Claim
from fedmpi.files.envelope import packed
from fedmpi.files.folder import Disk
from fedmpi.files.server import Server
from fedmpi.files.silo import Silo
from fedmpi.flat import sha256
from fedmpi.jobs.post import ServerPost, Told
from fedmpi.jobs.scores import Scores
from fedmpi.jobs.serve import Serving
from fedmpi.jobs.silo import SiloJob
from fedmpi.keeper import Keeper

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
    (kept := tmp_path / "run-share" / "kept" / "@.00000001").rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match="the shared folder holds version 4, but version 1 is gone"):
        served(how)
    for job in jobs:
        with pytest.raises(ServerEnded, match="the shared folder holds version 4, but version 1 is gone"):
            job.ended()
    (tmp_path / "away").rename(kept)
    jobs = [Job(how, silo) for silo in IDS]
    served(how)
    for job in jobs:
        job.ended()


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


def test_a_server_that_another_one_has_replaced_writes_no_record(tmp_path, monkeypatch):
    """It is suspended after its commit, until the newer one has started."""
    how = apart(tmp_path, 3, transport={"lease_s": 1})
    jobs, newer = [Job(how, silo) for silo in IDS], []

    def suspended(self, record):
        if record["round"] == 2:
            files = self._post.files
            newer.append(Claim.take(files.folder, files.run, names.EPOCHS, "", {}))

    monkeypatch.setattr(Serving, "_hear", suspended)
    with pytest.raises(Superseded, match=r"this start \(1\) of the server is superseded"):
        served(how)
    monkeypatch.undo()
    assert newer and len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    records, _ = served(how)
    assert len(records) == 3
    for job in jobs:
        job.ended()


def test_scores_that_cannot_be_written_name_their_file_and_what_to_do(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "replace_text", full)
    with pytest.raises(CheckpointError, match=r"scores/3\.json: No space left on device; make room and start all jobs"):
        Scores(tmp_path / "scores").write(3, {})


def posts(tmp_path, told):
    """Makes ServerPosts of one run; `told` collects what their beats report."""
    engine = {"name": "buffered", "size": 2}
    how = apart(tmp_path, 3, transport={"lease_s": 1}, engine=engine)
    return lambda: ServerPost(how, {}, SimpleNamespace(tell=lambda *what: told.append(what)))


def test_servers_that_die_stand_by_what_the_first_one_told(tmp_path, monkeypatch):
    new = posts(tmp_path, [])
    first = new()
    first.beat()
    first.open(5)
    first.decide(Told("s1", 3, 1, True), (3, 1))
    second = new()
    second.beat()  # dies before it opens the round
    third, read, start = new(), Disk.read, Server.start
    assert third.open(5) == [("s1", 3, 1, True)]
    third.beat()  # dies before it takes the update again
    torn = []

    def started(*arguments, **more):
        server = start(*arguments, **more)
        torn.append(True)  # from now on
        return server

    def once(self, path):
        if path.startswith("beats/@") and torn:
            torn.pop()
            raise OSError(errno.EIO, "Input/output error")
        return read(self, path)

    monkeypatch.setattr(Server, "start", started)
    monkeypatch.setattr(Disk, "read", once)
    fourth = new()
    assert not torn
    assert fourth.open(5) == [("s1", 3, 1, True)]
    fourth.decide(Told("s1", 3, 1, False), (2, 1))  # it was lost
    assert fourth.open(5) == [("s1", 3, 1, False)] and fourth.open(6) == []


def test_of_two_files_of_an_update_the_promised_one_is_taken(tmp_path):
    server = Server.start(Disk(tmp_path), {}, {}, lease_s=1, keep_updates=True)
    for _ in range(2):
        silo = Silo.start(Disk(tmp_path), {}, "s0", {}, lease_s=1)
        silo.folder.publish(f"updates/s0.00000000.0000000{silo.by}", update(silo))
    (one,) = server.poll([("s0", 0, 2), ("s1", 0, 7)])
    assert one.by == 2


def update(silo):
    head = {"kind": "update", "run": silo.run, "who": "s0", "number": 0, "by": silo.by}
    return packed(head, [b"u"])[0]


def test_a_slow_heart_beat_ends_no_job(tmp_path, monkeypatch, capsys):
    told = []
    post = posts(tmp_path, told)()
    beat, slow = post.beat, threading.Event()

    def late(ended=False):
        if not slow.is_set():
            time.sleep(0.6)
            slow.set()
        beat(ended)

    post.beat()
    post.beat = late
    post._thread.start()
    assert slow.wait(10)
    until(lambda: "a heart beat took" in capsys.readouterr().err, 10)
    post.end()
    assert not told and post.error is None


def test_the_commit_answers_the_update_that_closes_a_round(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(ServerPost, "decide", lambda self, *row: told.append(row))
    records, _, _ = trained_apart(apart(tmp_path, 4, engine={"name": "buffered", "size": 1}))
    assert len(records) == 4 and not told


@pytest.mark.parametrize("engine", ["synchronous", {"name": "buffered", "size": 2}])
def test_a_run_that_has_ended_goes_on_with_more_rounds(tmp_path, engine):
    how = apart(tmp_path, 2, engine=engine)
    trained_apart(how)
    how = replace(how, rounds=4)
    early = Job(how, "s0")  # before the server
    early.join(1.5)  # it waits
    jobs = [early, *(Job(how, silo) for silo in IDS[1:])]
    records, there = served(how)
    for job in jobs:
        job.ended()
    assert [record["round"] for record in records] == [3, 4]
    if engine == "synchronous":
        _, here = run(in_one_process(how, tmp_path))
        assert sha256(there.parameters) == sha256(here.parameters)
