"""A server and a silo in one folder on a real disk."""

import contextlib
import itertools
import os
import re

import pytest

from fedmpi.errors import ConfigError, Superseded
from fedmpi.files import names, reading
from fedmpi.files.claims import Claim
from fedmpi.files.folder import Disk
from fedmpi.files.server import Server
from fedmpi.files.silo import Silo

RUN = {"seed": 1}


@pytest.fixture
def server(tmp_path):
    return Server.start(Disk(tmp_path), RUN, {"host": "n1", "job": ""}, lease_s=0.2)


def a_silo(path, name="St. Mary/3"):
    return Silo.start(Disk(path), RUN, name, {"num_train": 5}, lease_s=0.2)


def rounds(server, silo, number):
    """Commit the first version if there is none, and then so many with an update each."""
    if server.head is None:
        server.commit([], [server.put("model", 0, {}, [b"0"])], {})
    for _ in range(number):
        update = server.head.version
        silo.publish(names.STATE, update, {})
        silo.publish(names.UPDATE, update, {"weight": 5}, [b"de", b"lta"])
        (arrived,) = server.poll()
        assert server.poll() == [] and bytes(arrived.content.payload) == b"delta"
        server.commit([arrived.entry()], [server.put("model", update + 1, {}, [b"%d" % (update + 1)])], {})
        assert silo.answer(update) == arrived.entry()
        silo.tidy()


def test_rounds_of_one_silo(tmp_path, server):
    silo = a_silo(tmp_path)
    assert server.registrations() == {"St. Mary/3": (1, {"num_train": 5})} and silo.look() is None
    rounds(server, silo, 5)
    assert silo.look() == server.head and silo.look().version == 5
    assert bytes(silo.fetch(silo.look().files["model"]).payload) == b"5"
    assert silo.position() == ((4, 1, 4, 1), [])


def test_folders_stay_small(tmp_path, server):
    rounds(server, a_silo(tmp_path), 68)
    files = sorted(path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file())
    assert {folder: files.count(folder) for folder in files} == {
        **{"epochs": 1, "line": 64, "notes": 3, "run": 1, "silos": 1, "states": 1}
    }


def test_two_servers_cannot_both_commit(tmp_path, server):
    rounds(server, a_silo(tmp_path), 1)
    newer = Server.start(Disk(tmp_path), RUN, {}, lease_s=0.2)
    with pytest.raises(Superseded, match=re.escape("this start (1) of the server is superseded by a newer one (2)")):
        server.commit([], [], {})
    assert newer.commit([], [], {}).version == 2


@pytest.mark.parametrize("sweeps", [True, False])
def test_a_commit_on_its_way_is_removed_by_a_new_server(tmp_path, monkeypatch, sweeps):
    """The old server looks for a newer one, finds none, and is suspended before its link."""
    if not sweeps:
        monkeypatch.setattr(Claim, "sweep", lambda self: None)
    old = Server.start(Disk(tmp_path), RUN, {}, lease_s=0.1)
    rounds(old, a_silo(tmp_path), 1)
    real, newer = old.folder.link, []

    def link(source, name):
        if not newer:
            newer.append(Server.start(Disk(tmp_path), RUN, {}, lease_s=0.1))
        real(source, name)

    old.folder.link = link
    if sweeps:
        with pytest.raises(Superseded):
            old.commit([], [], {})
    else:
        old.commit([], [], {})
    assert newer[0].head.version == 1
    assert (tmp_path / names.path(names.LINE, "", 2)).exists() != sweeps


OPERATIONS = ("listing", "create", "rename", "link", "unlink", "sync", "read")


class Paused(Disk):
    """A folder whose process is suspended before its operation number `left`, while `meanwhile` runs."""

    left, meanwhile = 0, staticmethod(lambda: None)

    def _before(self):
        self.left -= 1
        if self.left == 0:
            self.meanwhile()


for name in OPERATIONS:

    def operation(self, *arguments, name=name):
        self._before()
        return getattr(Disk, name)(self, *arguments)

    setattr(Paused, name, operation)


def words(path):
    """All that servers have said, by name."""
    files = [*path.glob("line/*"), *path.glob("notes/call.*"), *path.glob("beats/@*")]
    return {file.name: file.read_bytes() for file in files if names.PART not in file.name}


@pytest.mark.parametrize(
    "rule",
    ["all", pytest.param("sweep", marks=pytest.mark.slow), pytest.param("require_newest", marks=pytest.mark.slow)],
)
def test_a_server_that_was_suspended_anywhere_says_nothing_after_a_newer_one_has_started(tmp_path, monkeypatch, rule):
    """One case for each operation of a call, a promise and a commit. Without one of the two rules some cases fail."""
    late, said = [], []
    monkeypatch.setattr(os, "fsync", lambda file: None)
    for at in itertools.count(1):
        root = tmp_path / str(at)
        root.mkdir()
        a_silo(root, "a").publish(names.UPDATE, 0, {}, [b"delta"])
        old = Server.start(folder := Paused(root), RUN, {}, lease_s=0.05)
        said.clear()

        def takes_over(root=root):
            Server.start(Disk(root), RUN, {}, lease_s=0.05)
            said.append(words(root))

        folder.left, folder.meanwhile = at, takes_over
        with monkeypatch.context() as patch, contextlib.suppress(Superseded):
            if rule != "all":
                patch.setattr(Claim, rule, lambda self: None)
            old.put(names.CALL, 1, {"round": 1})
            (update,) = old.poll()
            old.beat({"decided": {"a": [0, 0, 1]}})
            old.commit([update.entry()], [old.put("model", 0, {}, [b"0"])], {})
            old.beat({}, ended=True)
        if not said:
            break
        late += [at] if words(root) != said[0] else []
    assert at > 20 and bool(late) == (rule != "all"), late


def test_a_server_that_was_suspended_removes_no_update_that_was_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "DAMAGED_S", -1.0)
    old, silo = Server.start(folder := Paused(tmp_path), RUN, {}, lease_s=0.05), a_silo(tmp_path, "a")
    silo.publish(names.UPDATE, 0, {}, [b"delta"])
    (path := tmp_path / names.path("updates", "a", 0, 1)).write_bytes(b"damaged")
    later = []

    def meanwhile():
        newer = Server.start(Disk(tmp_path), RUN, {}, lease_s=0.05)
        assert newer.poll() == [] and silo.lost(0)
        silo.publish(names.UPDATE, 0, {}, [b"delta"])
        later.extend(newer.poll())

    folder.left, folder.meanwhile = 4, meanwhile  # after a listing, a read and the look for a newer server
    assert old.poll() == [] and len(later) == 1
    assert path.exists() and [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_server_that_is_alive_is_not_superseded(tmp_path, server):
    other = Disk(tmp_path)
    other.wait = lambda seconds: server.beat({})
    with pytest.raises(ConfigError, match=r"another server \(host n1\) of the run in .* is alive"):
        Server.start(other, RUN, {}, lease_s=0.2)


def test_a_silo_goes_on_where_its_last_job_ended(tmp_path, server):
    old = a_silo(tmp_path)
    rounds(server, old, 2)
    old.publish(names.STATE, 2, {})
    old.publish(names.UPDATE, 2, {})
    old.publish(names.STATE, 3, {})  # it ends before its update 3
    new = a_silo(tmp_path)
    assert new.position() == ((1, 1, 1, 1), [(2, 1)]) and new.position().upcoming == 3
    with pytest.raises(Superseded, match=re.escape("of the silo 'St. Mary/3'")):
        old.publish(names.UPDATE, 3, {})


def test_the_folder_of_another_run_is_refused(tmp_path, server):
    with pytest.raises(ConfigError, match="belongs to another run: its seed is 1, here it is 2; take another folder"):
        Silo.start(Disk(tmp_path), {"seed": 2}, "a", {})
