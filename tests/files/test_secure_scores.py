"""Under masks over files: who is in sums of scores, when they end a run, and files that are damaged on disk."""

from support.runs import Blobs, put_back
from support.silojobs import apart, trained_apart

from fedmpi.files import names, reading, server
from fedmpi.files.server import Server
from fedmpi.jobs.masked import MaskedRemote

__all__ = ["put_back"]

FOUR = ("s0", "s1", "s2", "s3")


def secured(tmp_path, rounds, threshold=2, **other):
    clip = {"updates": [{"name": "clip", "norm": 1.0}]}
    secure = {"name": "secagg", "threshold": threshold}
    return apart(tmp_path, rounds, secure=secure, data={"sizes": (20, 30, 50, 40)}, **clip, **other)


def test_a_metric_ends_the_run_and_counts_only_if_all_tested_silos_are_in_its_sum(tmp_path, monkeypatch):
    members = MaskedRemote._score_members

    def without_one(self, fed, number):
        return [one for one in members(self, fed, number) if number != 2 or one.silo != "s1"]

    monkeypatch.setattr(MaskedRemote, "_score_members", without_one)
    early = {"metric": "accuracy", "patience": 2}
    records, there, _ = trained_apart(secured(tmp_path, 9, local={"lr": 1e-9}, stop={"early": early}), FOUR)
    assert [len(record["scored_by"]) for record in records] == [4, 3, 4, 4] and there.ended


def test_sums_of_scores_are_of_as_many_silos_with_test_data_as_the_threshold_says(tmp_path, monkeypatch):
    opened, members = Blobs.opened, MaskedRemote._score_members

    def untested(self, index, name):
        data = opened(self, index, name)
        return data._replace(x_test=data.x_test[:0], y_test=data.y_test[:0]) if name == "s1" else data

    def without_one(self, fed, number):
        return [one for one in members(self, fed, number) if number != 2 or one.silo != "s3"]

    monkeypatch.setattr(Blobs, "opened", untested)
    monkeypatch.setattr(MaskedRemote, "_score_members", without_one)
    records, _, _ = trained_apart(secured(tmp_path, 3, threshold=3), FOUR)
    assert [record["scored_by"] for record in records] == [["s0", "s2", "s3"], [], ["s0", "s2", "s3"]]
    assert ["accuracy" in record for record in records] == [True, False, True]
    assert records[1]["scores_given_up"].startswith("2 silos have scored")
    assert all(record["summed"] == [*FOUR] for record in records)


def test_a_sum_goes_on_without_scores_that_are_damaged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "DAMAGED_S", 0.3)
    read = Server.read_silo

    def damaged(self, kind, silo, number, by):
        return None if (kind, silo, number) == (names.SCORE, "s1", 2) else read(self, kind, silo, number, by)

    monkeypatch.setattr(Server, "read_silo", damaged)
    records, _, _ = trained_apart(secured(tmp_path, 3), FOUR)
    assert [len(record["scored_by"]) for record in records] == [4, 3, 4]
    assert "round 2 goes on without the scores of silo 's1', which are damaged in" in capsys.readouterr().err


def test_a_member_whose_file_is_damaged_once_members_are_decided_stays_in_the_sum(tmp_path, monkeypatch):
    """A server that starts again has not read it, and cannot."""
    monkeypatch.setattr(reading, "DAMAGED_S", 0.3)
    read_all, read, damaged = MaskedRemote._read_all, reading.read_of_silo, []

    def starts_again(self, fed, number, members):
        if number == 2:
            del self._came["s1", 1]
            self.post.files._taken["s1"] = (0, 1)
            damaged.append((names.UPDATE, "s1", 1))
        read_all(self, fed, number, members)

    def torn(folder, run, kind, silo, number, by):
        return None if (kind, silo, number) in damaged else read(folder, run, kind, silo, number, by)

    monkeypatch.setattr(MaskedRemote, "_read_all", starts_again)
    monkeypatch.setattr(server, "read_of_silo", torn)
    records, _, _ = trained_apart(secured(tmp_path, 3), FOUR)
    assert damaged and all(record["summed"] == [*FOUR] for record in records)
