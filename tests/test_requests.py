"""`fedmpi retire` and `fedmpi admit`: members that change because somebody asks, and requests that come to nothing."""

import json
import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from support.runs import config, figures
from test_roster import told
from typer.testing import CliRunner

import fedmpi
from fedmpi import asking, checkpoint, requests, results, roster, sealed, stopping
from fedmpi.cli import app
from fedmpi.comm import SoloComm
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.errors import ConfigError, FedmpiError
from fedmpi.flat import sha256
from fedmpi.membership import Membership

ROUNDS = 6
SCAFFOLD = {"local": {"name": "scaffold", "lr": 0.05, "epochs": 1, "batch_size": 8}, "checkpoint": {"every": 10}}


def ask(out, *words):
    """Exit code and output of a command that does not wait."""
    done = CliRunner().invoke(app, [words[0], str(out), *words[1:]])
    return done.exit_code, done.output


def trained(how, *, when=(), until=ROUNDS):
    """The records of a run in which, during round r, the requests of `when` are put, and its parameters' SHA-256."""
    records = []
    with fedmpi.Run(how, comm=SoloComm()) as run:
        asked = dict(when)
        for request in asked.pop(run.state.round + 1, ()):  # before the first round
            requests.put(run.out, *request)
        for record in run:
            records.append(figures(record))
            for request in asked.pop(record["round"] + 1, ()):
                requests.put(run.out, *request)
            if record["round"] == until:
                break
    return records, sha256(run.parameters), run.membership


def answers(out):
    return [(one["round"], one["refused"]) for one in roster.read(out)["answers"]]


def waiting(out):
    return [one for _, one in requests.read(out)]


def test_a_silo_that_is_retired_leaves_after_the_round_and_a_resume_keeps_it_out(tmp_path):
    """Asked for during round 3. The bits are those of a run that is not left, and of one that changes by itself."""
    how = {name: config(tmp_path / name, ROUNDS, **SCAFFOLD) for name in ("whole", "left", "rebuilt")}
    asked = [(3, [("retire", "s1")])]
    records, sha, members = trained(how["whole"], when=asked)
    assert [("s1" in record["silos"]) for record in records] == [True] * 3 + [False] * 3
    assert members.ids == ["s0", "s2"] and answers(tmp_path / "whole") == [(3, None)]
    assert checkpoint.manifest(tmp_path / "whole", 3).epoch == 1  # written for it
    assert not waiting(tmp_path / "whole")
    first, *_ = trained(how["left"], when=asked, until=4)
    again, sha_again, members_again = trained(how["left"])
    assert (first + again, sha_again, members_again.ids) == (records, sha, members.ids)
    with fedmpi.Run(how["rebuilt"], comm=SoloComm()) as run:
        for record in run:
            if record["round"] == 3:
                run.rebuild(run.membership.without("s1"))
    assert sha256(run.parameters) == sha
    row = told(tmp_path / "left")[1]["s1"]
    assert (row["state"], row["since"], row["until"]) == ("retired", 1, 3)
    events = [json.loads(line) for line in (tmp_path / "whole" / "events.jsonl").read_text().splitlines()]
    assert events == [{"event": "retire", "round": 3, "silo": "s1", "epoch": 1}]


def test_one_that_comes_back_takes_part_again_and_two_requests_are_two_changes(tmp_path):
    asked = [(2, [("retire", "s1"), ("retire", "s0")]), (4, [("admit", "s0"), ("admit", "s1"), ("retire", "s1")])]
    records, sha, members = trained(config(tmp_path / "whole", ROUNDS, **SCAFFOLD), when=asked)
    assert [list(record["silos"]) for record in records] == [["s0", "s1", "s2"]] * 2 + [["s2"]] * 2 + [["s0", "s2"]] * 2
    assert members.epoch == 5 and answers(tmp_path / "whole") == [(2, None)] * 2 + [(4, None)] * 3
    trained(config(tmp_path / "left", ROUNDS, **SCAFFOLD), when=asked, until=4)
    assert trained(config(tmp_path / "left", ROUNDS, **SCAFFOLD))[:2] == (records[4:], sha)


REFUSED: dict[str, tuple[list[tuple[str, ...]], str]] = {
    "unknown": ([("retire", "s9")], "the run has no silo 's9'; available: s0, s1, s2"),
    "unknown to admit": (
        [("admit", "s9")],
        "the configuration names no silo 's9' and does not say admit: any; available: s0, s1, s2",
    ),
    "there already": ([("admit", "s1")], "silo 's1' takes part already"),
    "gone already": ([("retire", "s1"), ("retire", "s1")], "silo 's1' takes no part"),
    "last": ([("retire", s) for s in ("s0", "s1", "s2")], "silo 's2' is the last one that takes part; `fedmpi stop`"),
    "a file too many": ([("retire", "s1"), ("admit", "s1", "/x.npz")], "silo 's1' has its data already; leave"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_the_run_goes_on(tmp_path, case):
    asks, says = REFUSED[case]
    asks = [(what, silo, *map(Path, path)) for what, silo, *path in asks]
    records, sha, members = trained(config(tmp_path / "a", 3), when=[(2, asks)], until=3)
    *_, (done, why) = answers(tmp_path / "a")
    assert done == 2 and why.startswith(says)
    assert [refused for _, refused in answers(tmp_path / "a")[:-1]] == [None] * (len(asks) - 1)
    undisturbed = trained(config(tmp_path / "b", 3), when=[(2, asks[:-1])], until=3)
    assert (records, sha, members) == undisturbed and not waiting(tmp_path / "a")


def test_what_a_component_cannot_do_with_is_refused(tmp_path):
    policy = {"name": "deadline", "deadline_s": 3600.0, "min_silos": 3}
    how = config(tmp_path, 3, engine={"name": "synchronous", "policy": policy})
    _, _, members = trained(how, when=[(2, [("retire", "s1")])], until=3)
    ((_, why),) = answers(tmp_path)
    assert "engine.policy.min_silos is 3, but a cohort may have only 2 silos" in why and members.epoch == 0


TORN = {"empty": "", "torn": '{"what": "retire", "si', "list": "[]", "odd": '{"what": "fire", "silo": "s1"}'}


@pytest.mark.parametrize("case", [*TORN, "extra", "link", "folder"])
def test_a_damaged_request_is_answered_once_and_changes_nothing(tmp_path, case, capfd):
    with fedmpi.Run(config(tmp_path, 3), comm=SoloComm()) as run:
        for record in run:
            if record["round"] == 1:
                (tmp_path / "requests").mkdir()
                place = tmp_path / "requests" / "mine.json"
                if case == "link":
                    place.symlink_to(tmp_path / "config.yaml")
                elif case == "folder":
                    place.mkdir()
                else:
                    place.write_text(TORN.get(case, '{"what": "retire", "silo": "s1", "token": "x", "more": 1}'))
    (answer,) = roster.read(tmp_path)["answers"]
    assert answer["token"] == "mine" and answer["round"] == 2 and "requests/mine.json" in answer["refused"]
    assert run.membership.epoch == 0 and run.state.round == 3
    assert place.exists() == (case == "folder") and (tmp_path / "config.yaml").exists()
    assert capfd.readouterr().err.count("fedmpi: after round") == 1


def test_a_job_that_is_killed_before_its_checkpoint_does_the_same_again(tmp_path, monkeypatch):
    """Carried out after round 3, and no checkpoint of it came to be: the next start begins at round 0, and the silo
    leaves after round 3 again."""
    records, sha, _ = trained(config(tmp_path / "whole", ROUNDS, **SCAFFOLD), when=[(3, [("retire", "s1")])])
    how = config(tmp_path / "killed", ROUNDS, **SCAFFOLD)
    run = fedmpi.Run(how, comm=SoloComm())
    rounds = iter(run)
    next(rounds), next(rounds)
    requests.put(run.out, "retire", "s1")
    monkeypatch.setattr(type(run._keeper), "keep", lambda *_, **__: None)
    next(rounds), next(rounds)
    assert run.membership.ids == ["s0", "s2"]
    run._release(RuntimeError())
    monkeypatch.undo()
    ((request),) = waiting(tmp_path / "killed")
    assert (request.after, request.epoch) == (3, 1) and checkpoint.sealed_rounds(tmp_path / "killed") == []
    assert trained(how)[:2] == (records, sha)
    assert not waiting(tmp_path / "killed")


def test_a_silo_stays_out_though_the_checkpoint_that_says_so_is_damaged(tmp_path, caplog):
    """It left after round 2, and the checkpoint of round 1 is gone on from, twice."""
    how = config(tmp_path, ROUNDS, checkpoint={"every": 1, "keep": 9})
    trained(how, when=[(2, [("retire", "s1")])], until=2)
    (sealed.folder_of(tmp_path, 2) / checkpoint.SERVER).write_bytes(b"torn")
    run = fedmpi.Run(how, comm=SoloComm())
    assert (run.state.round, run.membership.ids) == (1, ["s0", "s2"])
    assert "round 1 has members that left later (s1): the run goes on without them" in caplog.text
    run._release(RuntimeError())  # it is killed before its next checkpoint
    records, *_ = trained(how)
    assert [list(record["silos"]) for record in records] == [["s0", "s2"]] * 5 and not waiting(tmp_path)


def test_of_two_changes_behind_a_damaged_checkpoint_one_stays_and_the_other_is_done_again(tmp_path):
    """s2 comes back and s1 leaves after round 2, and round 1, with s1 alone or without s2, is gone on from."""
    how = config(tmp_path, ROUNDS, checkpoint={"every": 1, "keep": 9})
    trained(how, when=[(1, [("retire", "s2")]), (2, [("admit", "s2"), ("retire", "s1")])], until=2)
    (sealed.folder_of(tmp_path, 2) / checkpoint.SERVER).write_bytes(b"torn")
    records, *_ = trained(how)
    assert [list(record["silos"]) for record in records] == [["s0"]] + [["s0", "s2"]] * 4
    assert all(why is None for _, why in answers(tmp_path)) and not waiting(tmp_path)
    assert checkpoint.manifest(tmp_path, ROUNDS).epoch > checkpoint.manifest(tmp_path, 1).epoch


def test_members_that_all_left_cannot_go_on(tmp_path):
    how = config(tmp_path, ROUNDS, checkpoint={"every": 1, "keep": 9})
    asked = [(1, [("retire", "s2"), ("retire", "s1")]), (2, [("admit", "s1"), ("retire", "s0")])]
    trained(how, when=asked, until=2)
    (sealed.folder_of(tmp_path, 2) / checkpoint.SERVER).write_bytes(b"torn")
    says = r"all members of round 1 left later \(s0\), and the newer checkpoints are damaged; repair those, or"
    with pytest.raises(ConfigError, match=says):
        fedmpi.Run(how, comm=SoloComm())
    assert checkpoint.sealed_rounds(tmp_path) == [0, 1, 2]


def test_a_request_is_kept_until_every_checkpoint_has_it(tmp_path):
    how = config(tmp_path, ROUNDS, checkpoint={"every": 1, "keep": 2})
    trained(how, when=[(2, [("retire", "s1")])], until=2)
    kept = tmp_path / "requests" / "done"
    assert len(list(kept.iterdir())) == 1 and not waiting(tmp_path)
    trained(how)
    assert checkpoint.sealed_rounds(tmp_path)[-2:] == [5, 6]
    assert len(list(kept.iterdir())) == (checkpoint.sealed_rounds(tmp_path)[0] < 2)


@pytest.mark.parametrize("given", [{"s0": (0,), "s1": (0,), "s2": (0,)}, {"s0": (0,), "s2": (0,)}])
def test_a_start_with_given_members_does_not_lose_a_request(tmp_path, monkeypatch, given):
    """s1 came back after round 2, then the members are given, and the job is killed after a change that no checkpoint
    has: the next start makes it again, or refuses it with an answer."""
    how = config(tmp_path, 8, checkpoint={"every": 2, "keep": 9})
    trained(how, when=[(2, [("retire", "s1"), ("admit", "s1")])], until=2)
    assert checkpoint.manifest(tmp_path, 2).epoch == 2
    run = fedmpi.Run(how, comm=SoloComm(), membership=Membership(0, given))
    assert run.membership.epoch == (2 if "s1" in given else 3)
    requests.put(tmp_path, "retire", "s0")
    monkeypatch.setattr(type(run._keeper), "keep", lambda *_, **__: None)
    next(iter(run))
    assert "s0" not in run.membership.teams
    run._release(RuntimeError())
    monkeypatch.undo()
    with fedmpi.Run(how, comm=SoloComm(), membership=Membership(9, given)) as run:
        assert "s0" in run.membership.teams
        assert next(iter(run))["silos"].keys() == given.keys() - {"s0"}
    assert answers(tmp_path)[-2:] == [(2, None)] * 2 and not waiting(tmp_path)


def test_a_change_is_counted_though_the_members_given_for_it_say_otherwise(tmp_path):
    with fedmpi.Run(config(tmp_path, 3), comm=SoloComm()) as run:
        next(iter(run))
        for silo in ("s0", "s1"):
            run.rebuild(Membership(0, {silo: (0,)}))
        assert run.membership.epoch == 2


def test_what_a_checkpoint_has_is_not_done_again(tmp_path):
    """The job was killed after the seal, and before the request was removed."""
    how = config(tmp_path, ROUNDS, **SCAFFOLD)
    trained(how, when=[(2, [("retire", "s1")]), (3, [("admit", "s1")])], until=4)
    done = requests.Request("0-old", "retire", "s1", after=2, epoch=1)
    requests._write(tmp_path, done)
    trained(how)
    assert answers(tmp_path) == [(2, None), (3, None)] and not waiting(tmp_path)
    assert told(tmp_path)[1]["s1"]["state"] == "active"


def test_what_waits_when_a_job_ends_is_taken_up_by_the_next_or_refused(tmp_path):
    how = config(tmp_path, ROUNDS, **SCAFFOLD)
    with fedmpi.Run(how, comm=SoloComm()) as run:
        next(iter(run))
        requests.put(tmp_path, "retire", "s2")  # and the run is left
    (request,) = waiting(tmp_path)
    assert request.silo == "s2" and told(tmp_path)[1]["s2"]["why"] == "asked to leave"
    records, *_ = trained(how)
    assert all("s2" not in record["silos"] for record in records) and answers(tmp_path) == [(1, None)]
    with fedmpi.Run(config(tmp_path, 8, **SCAFFOLD), comm=SoloComm()) as run:
        for record in run:
            if record["round"] == 8:
                requests.put(tmp_path, "admit", "s2")
                assert told(tmp_path)[1]["s2"]["state"] == "pending"
    assert answers(tmp_path)[-1] == (8, "the run has ended: all 8 rounds are done") and not waiting(tmp_path)


# ---------------------------------------------------------------- the command


def test_the_command_waits_for_what_becomes_of_it(tmp_path):
    found = {}
    with fedmpi.Run(config(tmp_path, 30), comm=SoloComm()) as run:
        rounds = iter(run)
        next(rounds)
        asks = ["retire s1", "retire s9", "admit s0", "admit s1", "retire s0 --no-wait"]
        for words in asks:
            asker = threading.Thread(target=lambda w=words: found.update({w: ask(tmp_path, *w.split())}))
            asker.start()
            while asker.is_alive() and run.state.round < 29:
                next(rounds) if waiting(tmp_path) else asker.join(0.02)
            asker.join()
        code, said = ask(tmp_path, "admit", "s1", "--wait", "0.1")
        assert code == 1 and "has not taken up the request within 0.1 s: it does at the end of its round" in said
    done = {words: output for words, (_, output) in found.items()}
    assert {words: code for words, (code, _) in found.items()} == {
        "retire s1": 0, "retire s9": 2, "admit s0": 2, "admit s1": 0, "retire s0 --no-wait": 0,
    }  # fmt: skip
    assert "silo 's1' has left after round 2\n" in done["retire s1"]
    assert done["retire s9"] == f"fedmpi: the configuration of {tmp_path} names no silo 's9'; available: s0, s1, s2\n"
    assert "fedmpi: refused after round 3: silo 's0' takes part already\n" in done["admit s0"]
    assert "takes part from round" in done["admit s1"] and "30 training samples" in done["admit s1"]
    code, said = ask(tmp_path, "retire", "s0")
    assert (code, said) == (2, f"fedmpi: no job is training in {tmp_path}\n")


def test_asking_where_nobody_can_be_asked_is_one_line(tmp_path, monkeypatch):
    assert ask(tmp_path, "retire", "a") == (2, f"fedmpi: {tmp_path} is not a run directory\n")
    with fedmpi.Run(config(tmp_path, 2), comm=SoloComm()) as run:
        next(iter(run))
        (tmp_path / "requests").write_text("")  # no folder can be made there, also by root
        assert ask(tmp_path, "retire", "s1") == (2, f"fedmpi: {tmp_path}: cannot ask there: File exists\n")
        (tmp_path / "requests").unlink()
        assert ask(tmp_path, "admit", "s1", "--path", "folder")[1].startswith("fedmpi: --path folder: give the silo's")
        answered = iter([True, False])
        monkeypatch.setattr(stopping, "is_training", lambda root: next(answered, False))
        with pytest.raises(FedmpiError, match="has ended before it took up the request; the request stays"):
            asking.ask(tmp_path, "retire", "s1", None, 5.0)
        assert len(waiting(tmp_path)) == 1


# ---------------------------------------------------------------- silos with files


def files(folder, out, names="ab", admit="any", **other):
    for number, silo in enumerate("abcd"):
        rng = np.random.default_rng(number)
        x = rng.standard_normal((40, 4 if silo != "d" else 5)).astype(np.float32)
        np.savez(folder / f"{silo}.npz", x=x, y=rng.integers(0, 2, 40))
    silos = [{"id": silo, "path": f"{silo}.npz"} for silo in names]
    data = {"name": "files", "task": "classification", "shape": [4], "num_classes": 2, "silos": silos}
    return build(
        Config,
        {
            "rounds": ROUNDS,
            "out": str(folder / out),
            "data": {**data, "root": str(folder)},
            "model": "logistic",
            "local": {"name": "ditto", "lr": 0.05, "epochs": 1, "batch_size": 8},
            "checkpoint": {"every": 10},
            "device": {"name": "cpu"},
            "admit": admit,
            **other,
        },
    )


def test_a_new_silo_with_its_file_takes_part_and_stays(tmp_path):
    asked = [(3, [("admit", "c", tmp_path / "c.npz")])]
    records, sha, _ = trained(files(tmp_path, "whole"), when=asked)
    assert [list(record["silos"]) for record in records] == [["a", "b"]] * 3 + [["a", "b", "c"]] * 3
    out = tmp_path / "whole"
    assert answers(out) == [(3, None)]
    row = told(out)[1]["c"]
    assert (row["num_train"], row["since"], row["state"], len(row["data"])) == (32, 4, "active", 8)
    trained(files(tmp_path, "left"), when=asked, until=4)
    again, sha_again, _ = trained(files(tmp_path, "left", admit="configured"))
    assert (again, sha_again) == (records[4:], sha)
    found = results.evaluate(out)
    assert (found["loss"], found["personal_loss"]) == (records[-1]["loss"], records[-1]["personal_loss"])
    assert list(found["silos"]) == ["a", "b", "c"]
    assert results.export(out, tmp_path / "c.safetensors", silo="c") == ROUNDS
    # One whose configuration names it from the start, and that joins then, has the same bits.
    with fedmpi.Run(files(tmp_path, "named", "abc"), comm=SoloComm(), membership=fedmpi_members("a", "b")) as run:
        for record in run:
            if record["round"] == 3:
                run.rebuild(run.membership.with_silo("c", 0))
    assert sha256(run.parameters) == sha


TORN_BEHIND = {
    "damaged": lambda folder, out: (sealed.folder_of(out, 3) / checkpoint.SERVER).write_bytes(b"torn"),
    "manifest": lambda folder, out: (sealed.folder_of(out, 3) / sealed.MANIFEST).write_text("{}"),
    "file gone": lambda folder, out: (folder / "c.npz").rename(folder / "c.moved"),
    "request gone": lambda folder, out: shutil.rmtree(out / "requests"),
}


@pytest.mark.parametrize("case", TORN_BEHIND)
def test_a_run_goes_on_from_before_an_admission_and_makes_it_again(tmp_path, caplog, case):
    """Admitted after round 2. The checkpoints of rounds 2 and 3, which have the new silo, are damaged."""
    many = {"checkpoint": {"every": 1, "keep": 9}}
    asked = [(2, [("admit", "c", tmp_path / "c.npz")])]
    records, sha, _ = trained(files(tmp_path, "whole", **many), when=asked)
    out = tmp_path / "left"
    trained(files(tmp_path, "left", **many), when=asked, until=3)
    for round in (2, 3):
        (sealed.folder_of(out, round) / checkpoint.SERVER).write_bytes(b"torn")
    how = files(tmp_path, "left", **many)
    TORN_BEHIND[case](tmp_path, out)
    again, sha_again, members = trained(how)
    assert again[0] == records[1] and len(again) == ROUNDS - 1 and not waiting(out)
    assert {"round 2: ", "round 3: "} <= {one.getMessage()[22:31] for one in caplog.records}
    assert ("silo 'c' joined after round 1, which the run resumes from: the request" in caplog.text) == (
        case != "request gone"
    )
    if case in ("file gone", "request gone"):
        assert members.ids == ["a", "b"]
        why = answers(out)[-1][1] if case == "file gone" else caplog.text
        assert ("silo 'c': no file" if case == "file gone" else "it takes no part; admit it again") in why
    else:
        assert (again, sha_again) == (records[1:], sha) and answers(out) == [(2, None)] * 2


def fedmpi_members(*silos):
    return Membership(0, {silo: (0,) for silo in silos})


NO_FILE = {
    "wrong shape": (
        ("admit", "d", "d.npz"),
        r"silo 'd': .*d\.npz: samples of x have shape \[5\], data\.shape is \[4\]",
    ),
    "not there": (("admit", "c", "gone.npz"), "silo 'c': no file .*gone.npz"),
    "no file": (("admit", "c"), "the configuration names no silo 'c': give its file, --path FILE"),
    "ending": (("admit", "c", "c.txt"), "silo 'c': .*c.txt ends in none of"),
    "blank": (("admit", " ", "c.npz"), "files: the silo of .*c.npz has an empty id"),
}


@pytest.mark.parametrize("case", NO_FILE)
def test_a_new_silo_that_does_not_fit_is_refused_and_no_trace_is_left(tmp_path, case):
    (what, silo, *path), says = NO_FILE[case]
    then = ("retire", "b")
    asked = [(2, [(what, silo, *(tmp_path / one for one in path)), then])]
    records, sha, members = trained(files(tmp_path, "a"), when=asked, until=3)
    (done, why), retired = answers(tmp_path / "a")
    assert done == 2 and retired == (2, None)
    assert re.match(says, why)
    assert (records, sha, members) == trained(files(tmp_path, "b"), when=[(2, [then])], until=3)
    assert checkpoint.manifest(tmp_path / "a", 3).admitted == [] and list(told(tmp_path / "a")[1]) == ["a", "b"]


def test_only_files_bring_new_silos(tmp_path):
    with pytest.raises(ConfigError, match="admit: any needs data: files"):
        config(tmp_path, admit="any")
    with pytest.raises(ConfigError, match="admit: any does not go with attack"):
        files(tmp_path, "a", attack={"name": "sign_flip", "silos": ["a"]}, experimental=True)


def test_a_silo_that_nobody_can_read_names_its_file(tmp_path):
    """Of one that the configuration names."""
    how = files(tmp_path, "a", "abc")
    with fedmpi.Run(how, comm=SoloComm()) as run:
        for record in run:
            if record["round"] == 1:
                requests.put(run.out, "retire", "c")
            if record["round"] == 2:
                os.rename(tmp_path / "c.npz", tmp_path / "c.moved")
                requests.put(run.out, "admit", "c")
    (_, retired), (_, why) = answers(run.out)
    assert retired is None and f"silo 'c': no file {tmp_path / 'c.npz'}" in why
