"""Leases: who is alive is what their reader has seen, on its own clock."""

import pytest

from fedmpi.files import names
from fedmpi.files.beats import Heart, Leases
from fedmpi.files.folder import Disk


class Clocked(Disk):
    """A folder whose clock the test sets."""

    seconds = 1e6

    def now(self):
        return self.seconds


@pytest.fixture
def folder(tmp_path):
    (tmp_path / names.BEATS).mkdir()
    return Clocked(tmp_path)


def test_a_lease_ends_when_the_beat_has_not_changed(folder):
    heart, leases = Heart(folder, "r", "a", 1), Leases(folder, 60.0)
    assert leases.present == set()
    heart.beat({"x": 1})
    leases.look()
    assert leases.present == {"a"} and leases.pulses["a"].about == {"x": 1}
    folder.seconds += 59
    leases.look()
    assert leases.alive("a")
    folder.seconds += 2
    leases.look()
    assert not leases.alive("a") and leases.pulses["a"].about == {"x": 1}
    heart.beat({})
    leases.look()
    assert leases.alive("a")


def test_the_last_beat_ends_it(folder):
    heart, leases = Heart(folder, "r", "a", 1), Leases(folder, 60.0)
    heart.beat({}, ended=True)
    leases.look()
    assert not leases.alive("a")


def test_an_old_job_that_beats_again_is_not_heard(folder):
    old, new, leases = Heart(folder, "r", "a", 1), Heart(folder, "r", "a", 2), Leases(folder, 60.0)
    old.beat({"job": "old"})
    new.beat({"job": "new"})
    leases.look()
    for _ in range(3):
        old.beat({"job": "old"})
        leases.look()
    assert leases.pulses["a"].about == {"job": "new"}


def test_a_look_at_some_reads_no_others(folder):
    for who in ("a", "b", names.SERVER):
        Heart(folder, "r", who, 1).beat({})
    folder.counts.clear()
    leases = Leases(folder, 60.0)
    leases.look(names.SERVER)
    assert set(leases.pulses) == {names.SERVER} and leases.present == set()
    assert folder.counts == {"list": 1, "read": 1}
