"""What the two kinds of jobs do with the shared folder: its costs, what they say, what they tell each other."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.faulty_folder import NONE, World
from support.silojobs import IDS, apart

from fedmpi.comm import SoloComm
from fedmpi.errors import ConfigError
from fedmpi.files import names
from fedmpi.files.reading import notes
from fedmpi.jobs import post
from fedmpi.jobs.messages import Call, Registration, require_same, shown
from fedmpi.jobs.post import ServerPost, SiloPost, Told, paced
from fedmpi.jobs.silo import SiloJob
from fedmpi.stopping import Watch

CALL = Call(config={}, begins="", epoch=0, ids=[*IDS], facts=[], round=1, cohort=[*IDS])


@pytest.fixture
def posts(tmp_path):
    """The posts of a server and of silo s1, which do not beat by themselves."""
    how, watch = apart(tmp_path), Watch(SoloComm(), tmp_path)
    server = ServerPost(how, {}, watch)
    about = Registration([], [*IDS], "classification", [1], 2, {}, "", "here")
    yield server, SiloPost(how, "s1", about, watch)


def spent(files, action):
    """The file operations of an action."""
    before = files.folder.counts.copy()
    action()
    return dict(files.folder.counts - before)


def test_a_look_in_vain_reads_nothing(posts):
    server, silo = posts
    server.call(CALL)
    server.files.commit([], [server.files.put("params", 0, {})], {})
    assert silo.look()[1] == CALL
    assert spent(silo._files, silo.look) == {"list": 2}
    assert spent(server.files, server.files.poll) == {"list": 1}
    server.call(changed := Call(**vars(CALL) | {"cohort": ["s0"]}))  # of the same round
    assert spent(silo._files, silo.look) == {"list": 2, "read": 1} and silo.look()[1] == changed
    assert len(notes(server.files.folder, "call")) == 2


def test_pauses_are_a_tenth_of_the_wait():
    """An hour's wait: 391 looks. News is seen at most a tenth of the wait, or 10 s, and a first pause late."""
    world, looks = World(0, NONE), [0.0]

    def main(folder):
        pace = paced(folder, 0.2)
        while world.now_s < 3600:
            pace.wait_while(lambda: True, 1e9)
            looks.append(world.now_s)
        pace.reset()
        pace.wait_while(lambda: True, 0.05)
        looks.append(world.now_s)
        pace.wait_while(lambda: False, 1e9)
        looks.append(world.now_s)

    world.spawn("waits", main)
    world.run()
    *looks, last, stopped = looks
    assert 380 < len(looks) < 400
    for before, after in itertools.pairwise(looks):
        assert after - before <= min(0.1 * before, 10.0) + 0.2 + 1e-6
    assert last - looks[-1] == pytest.approx(0.05) and stopped == last


def test_a_silo_says_that_the_server_is_gone(posts, monkeypatch, capsys):
    server, silo = posts
    monkeypatch.setattr(post, "SAYS_S", 0.0)
    server.beat()
    silo.idle()
    assert capsys.readouterr().out == ""
    server.beat(ended=True)
    silo.idle()
    assert capsys.readouterr().out == "waits for the server, whose job is not there\n"


def test_short_waits_in_a_run_are_not_told(posts, monkeypatch, capsys):
    server, _ = posts
    now_s = [0.0]
    monkeypatch.setattr("fedmpi.jobs.post.time.monotonic", lambda: now_s[0])
    server.waits("for silos")
    server.goes_on()
    for now_s[0] in (1.0, 2.9, 3.1, 20.0, 33.0, 33.2):
        server.waits(f"at {now_s[0]:g}")
    assert capsys.readouterr().out == "waits for silos\nwaits at 3.1\nwaits at 33.2\n"


def test_a_suspended_job_is_told_from_a_slow_folder(monkeypatch, capsys):
    now_s, waits, takes = [0.0], iter([20.0, 1.0, 1.0]), iter([0.0, 9.0, 0.0])
    monkeypatch.setattr("fedmpi.jobs.post.time.monotonic", lambda: now_s[0])

    def passes(seconds):
        now_s[0] += seconds or 0.0
        return seconds is None

    beats = post.Beats(6.0, None, None)
    beats._over, beats.beat = SimpleNamespace(wait=lambda _: passes(next(waits, None))), lambda: passes(next(takes))
    beats._run()
    assert capsys.readouterr().err == (
        "fedmpi: no heart beat for 20 s: this job was suspended, or its host is overloaded\n"
        "fedmpi: a heart beat took 9 s: is the shared folder slow?\n"
    )


def test_damaged_parameters_are_named(posts, capsys, monkeypatch):
    server, silo = posts
    silo._files.folder.patience_s = 0.01
    commit = server.files.commit([], [file := server.files.put("params", 0, {})], {})
    path = server.files.folder.path / names.path(names.NOTES, *file[:3])
    path.write_bytes(path.read_bytes()[:-1])
    assert silo.fetch(commit, "params") is None
    assert f"waits for version 0: notes/{path.name} in " in capsys.readouterr().out
    path.unlink()  # a newer version has replaced it
    assert silo.fetch(commit, "params") is None and capsys.readouterr().out == ""


def test_a_silo_goes_on_from_an_update_in_the_buffer_though_a_later_one_is_dropped(posts, tmp_path, monkeypatch):
    server, silo = posts
    server.decide(Told("s1", 4, 1, True), (4, 1))
    assert silo.decided() == (4, (4, 1))
    server.decide(Told("s0", 7, 1, False), (-1, 0))
    server.decide(Told("s1", 5, 1, False), (4, 1))
    assert silo.decided() == (5, (4, 1))
    job = SiloJob(apart(tmp_path), "s1")
    job._post, job._sent, went_on = silo, {4: 0, 5: 0}, []
    forgot = []
    job._states = SimpleNamespace(drop=forgot.append)
    monkeypatch.setattr(job, "_go_on", went_on.append)
    job._hear()
    assert went_on == [(4, 1)] and not job._sent and job._answered == 5
    assert forgot == [(5, 1)]


def test_what_a_site_chooses_stays_there(tmp_path):
    how = apart(tmp_path, records={"trace": True})
    told = shown(how)
    assert str(tmp_path) not in json.dumps(told) and not {"out", "device.name", "init", "records.trace"} & told.keys()
    require_same(told, replace(how, out="/elsewhere", init="/elsewhere"))
    with pytest.raises(ConfigError, match=r"rounds is 3 there and 4 here"):
        require_same(told, replace(how, rounds=4))
    with pytest.raises(ConfigError, match=r"transport\.lease_s is 20\.0 there and 9\.0 here"):
        require_same(told, replace(how, transport=replace(how.transport, lease_s=9.0)))


def test_federation_refuses_ids_that_name_no_job(tmp_path):
    (tmp_path / "study.yaml").write_text("rounds: 1\ntransport: {name: files, root: shared}\nout: run\n")
    script = Path(__file__).parents[2] / "slurm/federation.sh"
    env = {**os.environ, "FEDMPI_VENV": sys.prefix, "FEDMPI_SILOS": "silo-0 ward/3"}
    done = subprocess.run([script, "study.yaml"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "silo 'ward/3': an id with '/'" in done.stderr
