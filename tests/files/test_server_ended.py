"""The end of the server's job with an error reaches its silos; a server that is started again goes on."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.runs import put_back, run
from support.silojobs import IDS, Job, apart, in_one_process, served

from fedmpi.errors import Diverged, ServerEnded, Stopped, Superseded
from fedmpi.files.folder import Disk
from fedmpi.files.silo import Silo
from fedmpi.flat import sha256
from fedmpi.health import Health
from fedmpi.jobs import post
from fedmpi.jobs.messages import NO_CALL, Call
from fedmpi.jobs.post import ServerPost
from fedmpi.jobs.serve import Serving
from fedmpi.stopping import STOP

__all__ = ["put_back"]


@pytest.mark.parametrize("engine", ["synchronous", {"name": "buffered", "size": 2}])
@pytest.mark.parametrize("error", ["diverged", "other"])
def test_silos_end_with_the_reason_and_a_later_start_goes_on(tmp_path, monkeypatch, engine, error):
    how = apart(tmp_path, 5, engine=engine)
    jobs, why = [Job(how, silo) for silo in IDS], "the loss explodes"
    with monkeypatch.context() as patch, pytest.raises(Diverged if error == "diverged" else KeyError):
        if error == "diverged":
            patch.setattr(Health, "look", lambda self, number, loss, norm: why if number == 3 else "")
        with Serving(how) as there:
            for record in there:
                if record["round"] == 2 and error == "other":
                    raise KeyError("parameter")
    for job in jobs:
        job.join(20)
        why = "the loss explodes" if error == "diverged" else r"KeyError: 'parameter'"
        with pytest.raises(ServerEnded, match=f"the server's job has ended: {why}$"):
            job.ended(1)
    jobs = [Job(how, silo) for silo in IDS]  # before the server
    jobs[0].join(1)
    assert all(job.is_alive() for job in jobs)
    _, there = served(how)
    for job in jobs:
        job.ended()
    if engine == "synchronous":
        _, here = run(in_one_process(how, tmp_path))
        assert sha256(there.parameters) == sha256(here.parameters)


def test_a_silo_does_not_wait_for_ever_for_a_server_that_has_ended(tmp_path, monkeypatch):
    how = apart(tmp_path, 3)
    job = Job(how, "s0")
    with pytest.raises(KeyError):
        starting(how, KeyError("parameter"))
    with pytest.raises(ServerEnded):
        job.ended()
    monkeypatch.setattr(post, "OVER_S", 0.5)
    with pytest.raises(ServerEnded, match="the server's job has ended: KeyError: 'parameter'"):
        Job(how, "s1").ended(20)


def starting(how, error):
    """A server's job that fails with this error while it starts."""
    jobs = [Job(how, silo) for silo in IDS[1:]]
    with pytest.MonkeyPatch.context() as patch:

        def fails(self, others):
            raise error

        patch.setattr(Serving, "_resume", fails)
        try:
            Serving(how)
        finally:
            for job in jobs:
                job.join(20)


@pytest.mark.parametrize("error", [Stopped("time limit"), Superseded("a newer one"), KeyboardInterrupt()])
def test_a_job_that_the_same_command_goes_on_with_ends_no_silo(tmp_path, error):
    how = apart(tmp_path, 3)
    jobs = [Job(how, silo) for silo in IDS]
    with pytest.raises(type(error)), Serving(how) as there:
        for _ in there:
            raise error
    served(how)
    for job in jobs:
        job.ended()


@pytest.mark.parametrize("end", ["killed", "error"])
def test_silos_that_start_before_a_server_with_more_rounds_wait_for_it(tmp_path, monkeypatch, capsys, end):
    """All jobs end in a round; all start again with other `rounds` and `lease_s`, the silos first."""
    how = apart(tmp_path, 4, transport={"lease_s": 1})
    jobs = [Job(how, silo) for silo in IDS]
    hear = Serving._hear

    def heard(self, record):
        if record["round"] == 2:
            for job in jobs:
                job.job._spec.watch.tell(STOP, "end")
            if end == "killed":  # its last beat does not say that it has ended
                monkeypatch.setattr(ServerPost, "end", lambda self: self._over.set())
                monkeypatch.setattr(ServerPost, "over", lambda self, error: None)
            raise OSError("No space left on device")
        return hear(self, record)

    monkeypatch.setattr(Serving, "_hear", heard)
    with pytest.raises(OSError, match="No space left"):
        served(how)
    monkeypatch.undo()
    for job in jobs:
        with pytest.raises((Stopped, ServerEnded)):
            job.ended()
    how = apart(tmp_path, 5, transport={"lease_s": 2})
    jobs = [Job(how, silo) for silo in IDS]
    time.sleep(1.5)
    records, _ = served(how)
    assert [record["round"] for record in records][-1] == 5
    for job in jobs:
        job.ended()
    said = (
        "waits for the server to start again; the last one had rounds is 4 there and 5 here; transport.lease_s is 1.0"
    )
    assert end == "error" or said in capsys.readouterr().out


def test_an_old_server_neither_ends_the_silos_of_a_newer_one_nor_clears_its_end(tmp_path):
    how = apart(tmp_path, 3, transport={"lease_s": 1})
    watch = SimpleNamespace(tell=lambda *what: None)
    old = ServerPost(how, {}, watch)
    old.call(replace(NO_CALL, round=4, ids=["s0"]))
    new = ServerPost(how, {}, watch)
    assert (new.last.round, new.last.ids) == (4, ["s0"])
    new.call(new.last)
    silo = Silo.start(Disk(tmp_path / "run-share"), post.about_run(how), "s0", {})

    def told():
        return Call.read(silo.newest_note("call")[1].head).over

    with pytest.raises(Superseded):
        old.over(KeyError("old"))
    assert told() == ""
    new.over(KeyError("new"))
    assert told() == "KeyError: 'new'"
    with pytest.raises(Superseded):
        old.call(NO_CALL)
    assert told() == "KeyError: 'new'"
    third = ServerPost(how, {}, watch)
    assert told() == "" and third.last.round == 4
