"""silos.json and `fedmpi silos`: who takes part in a run, and whether it is finished, running or dead."""

import json
import time

import pytest
from support.runs import config, refused, run
from typer.testing import CliRunner

import fedmpi
from fedmpi import disk, roster
from fedmpi.cli import app
from fedmpi.comm import SoloComm
from fedmpi.errors import ConfigError
from fedmpi.membership import Membership

COHORT = {"name": "round_robin", "count": 1}


def told(out):
    """`fedmpi silos OUT --json`, and its rows by silo."""
    done = CliRunner().invoke(app, ["silos", str(out), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    return found, {row["id"]: row for row in found["silos"]}


def test_a_running_and_a_finished_run_tell_of_their_silos(tmp_path):
    began_s = time.time()
    with fedmpi.Run(config(tmp_path, 4, select=COHORT), comm=SoloComm()) as started:
        rounds = iter(started)
        next(rounds)
        found, rows = told(tmp_path)
        assert (found["training"], found["round"], found["rounds"]) == (True, 1, 4)
        heard = [silo for silo, row in rows.items() if row["heard"] is not None]
        assert heard == started.record["cohort"] and len(heard) == 1
        list(rounds)
    found, rows = told(tmp_path)
    assert (found["training"], found["round"]) == (False, 4)
    assert [(row["state"], row["why"], row["since"], row["until"]) for row in rows.values()] == [
        ("active", None, 1, None)
    ] * 3
    assert {silo: row["num_train"] for silo, row in rows.items()} == {"s0": 20, "s1": 30, "s2": 50}
    assert sorted(row["heard"]["round"] for row in rows.values()) == [2, 3, 4]
    assert all(began_s - 1 <= row["heard"]["time"] <= time.time() + 1 for row in rows.values())
    assert {(row["rank"], row["device"], row["host"]) for row in rows.values()} == {(0, "cpu", started.comm.hosts[0])}
    assert all(row["memory_bytes"] > 1 << 20 and row["threads"] >= 1 and row["gpu"] is None for row in rows.values())
    assert len({row["data"] for row in rows.values()}) == 3 and len({row["code"] for row in rows.values()}) == 1
    text = CliRunner().invoke(app, ["silos", str(tmp_path)]).stdout
    assert "round 4 of 4; no job is training" in text and all(silo in text for silo in rows)


def test_what_single_silos_do_not_disclose_is_not_told(tmp_path):
    run(config(tmp_path, 1, disclose="cohort"))
    assert {row["data"] for row in told(tmp_path)[1].values()} == {None}


def test_members_that_change_are_told_of_across_restarts(tmp_path):
    """`left` after round 2, back after round 3, gone again after round 4; then a run that restarts from round 2."""
    how = config(tmp_path, 8)
    first = Membership(0, {"s0": (0,), "s1": (0,)})
    with fedmpi.Run(how, comm=SoloComm(), membership=first) as started:
        for record in started:
            if record["round"] == 2:
                started.rebuild(started.membership.without("s0"))
                row = told(tmp_path)[1]["s0"]
                assert (row["state"], row["since"], row["until"]) == ("retired", 1, 2)
                assert row["heard"]["round"] == 2
                assert told(tmp_path)[1]["s2"]["state"] == "absent"
            if record["round"] == 3:
                started.rebuild(started.membership.with_silo("s0", 0).with_silo("s2", 0))
                break
    rows = told(tmp_path)[1]
    assert {silo: (row["state"], row["since"], row["until"]) for silo, row in rows.items()} == {
        "s0": ("active", 4, None),
        "s1": ("active", 1, None),
        "s2": ("active", 4, None),
    }
    again = roster.Roster(tmp_path, 2, 8)  # resumes from the checkpoint before the changes
    again.register(Membership(1, {"s1": (0,)}), ["s0", "s1", "s2"], {"s1": facts()}, [{"rank": 0}], 2, {})
    rows = {row["id"]: row for row in roster.read(tmp_path)["silos"]}
    assert {silo: (row["state"], row["since"]) for silo, row in rows.items()} == {
        "s0": ("retired", None),  # it took part in round 2
        "s1": ("active", 1),
        "s2": ("absent", None),
    }
    assert rows["s1"]["heard"] is None  # in a round that is repeated


def facts():
    return {"num_train": 30, "data": "0", "code": "1"}


def test_a_lost_silo_says_why_and_a_later_start_repeats_it(tmp_path):
    silos = ["s0", "s1"]
    first = roster.Roster(tmp_path, 0, 9)
    both = Membership(0, {"s0": (0,), "s1": (1,)})
    about = dict.fromkeys(silos, facts())
    ranks = [{"rank": 0, "host": "a", "pid": 1}, {"rank": 1, "host": "b", "pid": 2}]
    first.register(both, silos, about, ranks, 0, {})
    first.heard(5, silos)
    first.register(both.without("s1"), silos, about, ranks, 5, {"s1": "rank 1 was lost"})
    second = roster.Roster(tmp_path, 5, 9)
    second.register(both.without("s1"), silos, about, ranks, 5, {})
    row = roster.read(tmp_path)["silos"][1]
    assert (row["state"], row["why"], row["until"], row["host"]) == ("lost", "rank 1 was lost", 5, "b")
    assert row["heard"]["round"] == 5 and "pid" not in row
    undone = roster.Roster(tmp_path, 4, 9)  # the round in which it was lost is done again, with it
    undone.register(both, silos, about, ranks, 4, {})
    row = roster.read(tmp_path)["silos"][1]
    assert (row["state"], row["why"], row["since"], row["until"], row["heard"]) == ("active", None, 1, None, None)
    second.save()
    shown = roster.table({**roster.read(tmp_path), "training": None})
    assert list(shown.columns[1].cells) == ["active", "lost: rank 1 was lost"]
    assert list(shown.columns[2].cells) == ["1-", "1-5"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "round": 1, "rounds": 1, "silos": [{"id": 3}]}']
)
def test_a_damaged_file_is_one_line_and_the_next_start_writes_it_anew(tmp_path, text):
    how = config(tmp_path, 2)
    run(how, rounds=1)
    (tmp_path / roster.FILE).write_text(text)
    done = CliRunner().invoke(app, ["silos", str(tmp_path)])
    assert done.exit_code == 2 and "silos.json is damaged" in done.output and done.output.count("\n") == 1
    run(how)
    assert told(tmp_path)[0]["round"] == 2


def test_a_folder_that_is_no_run_directory_is_one_line(tmp_path):
    done = CliRunner().invoke(app, ["silos", str(tmp_path)])
    assert (done.exit_code, done.output) == (2, f"fedmpi: {tmp_path} is not a run directory\n")
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"has no silos\.json"):
        roster.tell(tmp_path)


def test_a_directory_that_cannot_hold_it_is_refused_and_a_full_disk_is_not(tmp_path, monkeypatch, caplog):
    (tmp_path / "a" / roster.FILE).mkdir(parents=True)
    assert "cannot write into" in refused(config(tmp_path / "a", 1))

    with fedmpi.Run(config(tmp_path / "b", 3), comm=SoloComm()) as started:
        for _ in started:
            monkeypatch.setattr(disk, "replace_text", full)
            break
        for _ in range(2):
            started._roster.heard(3, ["s0"])
        monkeypatch.undo()
    assert caplog.text.count("silos.json cannot be written (No space left on device)") == 1


def full(path, text):
    raise OSError(28, "No space left on device", str(path))
