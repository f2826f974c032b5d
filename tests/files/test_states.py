"""States on a silo's own side, where silos are jobs of their own."""

import time

import pytest
from support.runs import put_back
from support.silojobs import IDS, Job, OneSilo, apart, served

from fedmpi.errors import ConfigError
from fedmpi.jobs.private import States
from fedmpi.local import LocalSilo

__all__ = ["put_back"]


class Late(OneSilo):
    """A silo's job whose updates arrive when the server has gone on."""

    most = 0  # states that were there at one time

    def _train_at_once(self, commit):
        send = self._post.send

        def sent(number, head, payload):
            type(self).most = max(self.most, len(self._states.stored()))
            until_s = time.monotonic() + 1
            while self._post.look()[0].version <= head["version"] and time.monotonic() < until_s:
                time.sleep(0.01)
            send(number, head, payload)

        self._post.send = sent
        try:
            super()._train_at_once(commit)
        finally:
            self._post.send = send


def test_the_states_of_dropped_updates_do_not_pile_up(tmp_path):
    how = apart(tmp_path, 16, engine={"name": "buffered", "size": 1, "max_staleness": 0})
    Late.most = 0
    jobs = [Job(how, silo, Late if silo == "s2" else OneSilo) for silo in IDS]
    records, _ = served(how)
    for job in jobs:
        job.ended()
    dropped = [one for record in records for one in record["arrivals"] if one["silo"] == "s2" and one.get("dropped")]
    assert len(dropped) >= 3
    assert 1 <= Late.most <= 2, Late.most


def test_states_that_a_commit_or_the_server_needs_are_kept(tmp_path):
    states, silo = States(tmp_path, 7), LocalSilo("s", None, 1.0)
    for base in ((1, 1), (2, 1), (2, 2), (3, 2), (5, 2)):
        states.write(base, silo, None)
    states.forget(3, {(2, 1), (-1, 0)})
    assert states.stored() == [(2, 1), (5, 2)]
    states.forget(-1, set())
    assert states.stored() == [(2, 1), (5, 2)]


def test_a_state_is_taken_up_with_the_same_data_only(tmp_path):
    states, silo = States(tmp_path, 7), LocalSilo("s", None, 1.0)
    states.write((1, 1), silo, None)
    states.read((1, 1), silo, None)
    with pytest.raises(ConfigError, match="silo 's': its data differ from those that it was trained on before"):
        States(tmp_path, 8).read((1, 1), silo, None)
