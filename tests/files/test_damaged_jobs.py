"""Files that are damaged on disk: jobs say so and go on, or end with a remedy; none waits for ever."""

import pytest
from support.runs import put_back, run
from support.silojobs import IDS, Job, apart, in_one_process, served, trained_apart
from support.slurm import until

from fedmpi.errors import CheckpointError, ServerEnded
from fedmpi.files import names, reading
from fedmpi.files.server import Server
from fedmpi.files.silo import Silo
from fedmpi.flat import sha256
from fedmpi.jobs import post
from fedmpi.jobs.remote import FilesRemote
from fedmpi.keeper import Keeper

__all__ = ["put_back"]


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Jobs give up soon."""
    monkeypatch.setattr(reading, "DAMAGED_S", 0.3)
    for kind in (Server, Silo):
        start = kind.start

        def started(folder, *arguments, start=start, **more):
            folder.patience_s = 0.5
            return start(folder, *arguments, **more)

        monkeypatch.setattr(kind, "start", started)


def test_a_server_that_starts_again_writes_damaged_parameters_anew(tmp_path, capsys):
    how = apart(tmp_path, 5)
    jobs = [Job(how, silo) for silo in IDS]
    served(how, rounds=2)
    for path in (tmp_path / "run-share" / "notes").glob("params.00000002.*"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    jobs[2] = Job(how, "s2")  # has to read them
    until(lambda: "waits for version 2: notes/params.00000002.00000001 in " in capsys.readouterr().out, 20)
    _, there = served(how)
    for job in jobs:
        job.ended()
    _, here = run(in_one_process(how, tmp_path))
    assert sha256(there.parameters) == sha256(here.parameters)


def test_a_call_that_is_damaged_is_written_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(post, "LOST_S", 0.2)
    how = apart(tmp_path, 4)
    write, done = post.ServerPost._write_call, []

    def damaged(self):
        folder = self.files.folder
        publish = folder.publish

        def half(path, parts, *more):
            if path.startswith(f"{names.NOTES}/{names.CALL}."):
                parts = [parts[0], b"".join(parts[1:])[:-1]]
                done.append(path)
            return publish(path, parts, *more)

        if self.last.round == 3 and not done:
            folder.publish = half
        write(self)
        folder.publish = publish

    monkeypatch.setattr(post.ServerPost, "_write_call", damaged)
    _, there, _ = trained_apart(how)
    assert f"fedmpi: {done[0]} in {tmp_path / 'run-share'} was damaged: it is written again" in (
        capsys.readouterr().err
    )
    _, here = run(in_one_process(how, tmp_path))
    assert sha256(there.parameters) == sha256(here.parameters)


def test_a_round_goes_on_without_scores_that_are_damaged(tmp_path, monkeypatch, capsys):
    read = Server.read_silo

    def damaged(self, kind, silo, number, by):
        return None if (kind, silo, number) == ("score", "s1", 2) else read(self, kind, silo, number, by)

    monkeypatch.setattr(Server, "read_silo", damaged)
    records, _, _ = trained_apart(apart(tmp_path, 3))
    assert ["num_test" in record["silos"]["s1"] for record in records] == [True, False, True]
    assert "round 2 goes on without the scores of silo 's1', which are damaged in" in capsys.readouterr().err


def test_a_committed_update_that_is_damaged_ends_the_server_with_a_remedy(tmp_path, monkeypatch):
    how = apart(tmp_path, 4, checkpoint={"every": 10})
    jobs = [Job(how, silo) for silo in IDS]
    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "finish", lambda self, state: None)  # as after a kill
        patch.setattr(FilesRemote, "release_all", lambda self, written: None)
        served(how, rounds=2)
    (tmp_path / "run-share" / "kept" / "s1.00000000.00000001").write_bytes(b"damaged")
    with pytest.raises(
        CheckpointError, match=r"update 0 of silo 's1', which is gone or damaged in .*: put it back, or"
    ):
        served(how)
    for job in jobs:
        with pytest.raises(ServerEnded, match="which is gone or damaged"):
            job.ended()
