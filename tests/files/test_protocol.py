"""The protocol under faults, in virtual time; and that each of its rules is needed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.faulty_folder import HARSH, NONE, Faults, SharedFolder, World, without
from support.simulated_jobs import Broken, survive

from fedmpi.errors import Superseded
from fedmpi.files import beats, claims, envelope, folder, names, server

NUM = 15_000  # operations
WORST = replace(HARSH, skew_s=1e5, damaged=0.01, suspend_link=0.3, suspend_s=400.0)


@pytest.mark.parametrize(
    "faults", [Faults(), HARSH, WORST, Faults(stale_listing_s=30.0)], ids=["usual", "harsh", "worst", "stale listings"]
)
def test_no_update_is_lost_or_counted_twice(faults):
    world = World(1, faults, most_operations=NUM)
    truth = survive(world)
    assert len(truth.line) > 20 and truth.readers > 500
    assert world.counts["killed"] > 5 and world.counts["suspended"] > 2


def test_updates_are_kept_for_a_replay():
    def prepare(jobs):
        jobs.keep_updates = True

    survive(World(2, HARSH, most_operations=2 * NUM), prepare=prepare)


def test_without_faults_all_goes_on():
    truth = survive(World(1, NONE, most_operations=NUM))
    assert len(truth.line) > 100 and truth.most_files < 64 + 200


def no_fsync(monkeypatch):
    monkeypatch.setattr(SharedFolder, "flush", lambda self, inode: None)


def no_look_at_epochs(monkeypatch):
    monkeypatch.setattr(claims.Claim, "require_newest", lambda self: None)


def commits_by_rename(monkeypatch):
    def publish_first(self, path, parts, beside="", fence=lambda: None):
        fence()
        self.publish(path, parts)
        return True

    monkeypatch.setattr(folder.Folder, "publish_first", publish_first)


def any_parent(monkeypatch):
    """A server whose commit is not the first of its version commits it as the next one."""
    no_look_at_epochs(monkeypatch)
    real = server.Server.commit

    def commit(self, *rest):
        while True:
            try:
                return real(self, *rest)
            except Superseded:
                self._line.look()

    monkeypatch.setattr(server.Server, "commit", commit)
    monkeypatch.setattr(server, "answered", lambda last, entries: last)


def no_digest(monkeypatch):
    def unpacked(content, **expected):
        try:
            end = 52 + int.from_bytes(content[8:12], "little")
            parts, _ = envelope.packed(json.loads(bytes(content[52:end])), [content[end:]])
        except ValueError:
            raise envelope.Torn from None
        return envelope.unpacked(b"".join(parts), **expected)

    monkeypatch.setattr("fedmpi.files.reading.unpacked", unpacked)


def an_existing_link_is_lost(monkeypatch):
    real = SharedFolder.link

    def link(self, old, new):
        try:
            real(self, old, new)
        except FileExistsError:
            raise Superseded(new) from None

    monkeypatch.setattr(SharedFolder, "link", link)


def forgets_the_line(monkeypatch):
    """A server that goes by the updates it has read itself, and not by those that the line has answered."""
    monkeypatch.setattr(server.Server, "_expected", lambda self, silo: self._taken.get(silo, (-1, 0))[0] + 1)
    monkeypatch.setattr(server, "answered", lambda last, entries: last)


def leases_by_file_times(monkeypatch):
    """Someone is alive if its beat is young by the clocks of two hosts."""

    def alive(self, who):
        pulse = self.pulses.get(who)
        path = names.path(names.BEATS, who, pulse.by)
        return self._folder.wall() - self._folder.world.find(path).stamp < self.lease_s

    def wait(shared, lease_s):
        leases = beats.Leases(shared, lease_s)
        while True:
            leases.look(names.SERVER)
            if names.SERVER not in leases.pulses or not alive(leases, names.SERVER):
                return
            shared.wait(lease_s / 16)

    monkeypatch.setattr(server, "_wait_for_lease", wait)


# With the seed that shows it soonest; others follow.
RULES = {
    no_fsync: 6,
    no_look_at_epochs: 13,
    commits_by_rename: 2,
    any_parent: 13,
    no_digest: 7,
    an_existing_link_is_lost: 0,
    forgets_the_line: 0,
    leases_by_file_times: 0,
}


def breaks(faults, first, prepare=lambda jobs: None):
    with pytest.raises(Broken) as broken:
        for seed in range(first, first + 20):
            survive(World(seed, faults, most_operations=NUM), prepare=prepare)
    return str(broken.value)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_is_needed(rule, monkeypatch):
    rule(monkeypatch)
    breaks(WORST, RULES[rule])


def test_files_that_are_written_in_place_are_read_in_part(monkeypatch):
    """Rename and digest: each holds up what the other lets through."""
    no_digest(monkeypatch)
    faults = without(WORST, "torn", "damaged")
    survive(World(0, faults, most_operations=NUM))

    def publish(self, path, parts, beside="", fence=None):
        self.tried(path, lambda: (self.remove(path), self.create(path, parts)))

    monkeypatch.setattr(folder.Folder, "publish", publish)
    breaks(faults, 0)


def test_a_state_is_written_before_its_update():
    def prepare(jobs):
        jobs.state_first = False

    assert "the state of states/" in breaks(without(HARSH, "damaged"), 0, prepare)


@pytest.mark.slow
def test_the_experiment(tmp_path):
    script, picture = Path(__file__).parents[2] / "jobs/experiments/files_faults.py", tmp_path / "picture.svg"
    done = subprocess.run(
        [sys.executable, script, "--quick", "--to", picture], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["operations"] >= 40_000 and figures["commits"] > 100 and figures["most_files"] < 400
    assert "server job, by epoch" in picture.read_text()
