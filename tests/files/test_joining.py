"""Silos in jobs of their own that register while the run trains, against a run in one process whose members grow."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from support.runs import OWN, put_back, run
from support.silojobs import IDS, Job, OneSilo, alone, apart, in_one_process, served
from support.slurm import until

import fedmpi
from fedmpi import assembly, roster
from fedmpi.comm import SoloComm
from fedmpi.errors import ConfigError, ServerEnded, Superseded
from fedmpi.files.server import Server
from fedmpi.flat import sha256
from fedmpi.jobs import serve
from fedmpi.jobs import silo as silo_module
from fedmpi.jobs.joining import Joining, Members
from fedmpi.jobs.messages import NO_CALL, shown
from fedmpi.jobs.serve import Serving
from fedmpi.keeper import Keeper
from fedmpi.membership import Membership
from fedmpi.opening import open_silos
from fedmpi.rounds.clocks import Replay
from fedmpi.stopping import READY

__all__ = ["put_back"]

SHARDED = {"plan": "sharded", "scope": "silo"}
CASES = {
    "plain": {},
    "scaffold": {"local": {"name": "scaffold"}, "server": {"optimizer": "fedadam"}},
    "topk": {"exchange": SHARDED | {"up": {"codec": {"name": "topk", "ratio": 0.3}, "feedback": True}}},
    "clip": {"updates": [{"name": "clip", "norm": 0.1, "quantile": 0.5}], "select": {"name": "uniform", "count": 2}},
    "kept": {"model": {"name": OWN + "Normed", "dropout": 0.0}, "exchange": {"parameters": ["base.*", "norm.*"]}},
}
BUFFERED = {
    "fedasync": {"engine": {"name": "buffered", "size": 1}},
    "codec": {
        "engine": {"name": "buffered", "size": 2, "max_staleness": 3},
        "exchange": {"up": {"codec": "int8", "feedback": True}},
    },
}


def registered(how, silo):
    """Wait until the silo's job has registered."""
    until(lambda: [*(Path(how.transport.root) / "silos").glob(f"{silo}.????????")], 60)


def grown(how, joins, rounds=None, jobs=None):
    """The records of a server to whose silos further ones come: `joins` has the round after which each registers."""
    jobs = [Job(how, silo) for silo in IDS if silo not in joins] if jobs is None else jobs
    records = []
    with mock.patch.object(serve, "specify", alone(assembly.specify)), Serving(how) as there:
        for record in there:
            records.append(record)
            for silo, number in joins.items():
                if number == record["round"]:
                    jobs.append(Job(how, silo))
                    registered(how, silo)
            if len(records) == rounds:
                break
    return records, there, jobs


def grown_in_one_process(how, tmp_path, rows):
    """The parameters and records of a run whose members grow after the same rounds."""
    plain, members = in_one_process(how, tmp_path), {row["round"]: [*row["silos"]] for row in rows}
    with fedmpi.Run(plain, comm=SoloComm(), membership=Membership(0, {silo: (0,) for silo in members[1]})) as here:
        records = []
        for record in here:
            records.append(record)
            for silo in members.get(record["round"] + 1, ()):
                if silo not in here.membership.teams:
                    here.rebuild(here.membership.with_silo(silo, 0))
    return here.parameters, records


def rows_of(how):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(how.out) / "metrics.jsonl").read_text().splitlines()]


def without_times(record):
    silos = {silo: {k: v for k, v in row.items() if k != "rank"} for silo, row in record["silos"].items()}
    left_out = ("crc32", "time", "seconds", "peak_rss_bytes", "bytes_up", "bytes_down", "bytes_control", "silos")
    return {k: v for k, v in record.items() if k not in left_out} | {"silos": silos}


@pytest.mark.parametrize("case", CASES)
def test_a_silo_that_registers_later_joins_at_the_next_round(tmp_path, case):
    how = apart(tmp_path, 6, transport={"min_silos": 1}, **CASES[case])
    ids = ["s1"] if "select" not in CASES[case] else ["s0", "s1"]
    records, there, jobs = grown(how, {silo: 2 for silo in IDS if silo not in ids})
    for job in jobs:
        job.ended()
    assert [*records[0]["silos"]] == ids and [*records[-1]["silos"]] == [*IDS]
    params_P, plain = grown_in_one_process(how, tmp_path, records)
    assert sha256(there.parameters) == sha256(params_P)
    assert [without_times(record) for record in records] == [without_times(record) for record in plain]
    rows = {row["id"]: row for row in roster.read(there.out)["silos"]}
    assert rows["s2"]["state"] == "active" and rows["s2"]["since"] == 4 and rows["s1"]["since"] == 1


@pytest.mark.parametrize("case", BUFFERED)
def test_a_replay_of_a_run_that_silos_have_joined_has_its_bits(tmp_path, case):
    how = apart(tmp_path, 14, transport={"min_silos": 2}, **BUFFERED[case])
    records, there, jobs = grown(how, {"s0": 4})
    for job in jobs:
        job.ended()
    assert any(one["silo"] == "s0" for record in records for one in record["arrivals"])
    assert [*records[0]["silos"]] == ["s1", "s2"] and [*records[-1]["silos"]] == [*IDS]
    replay = replace(how.engine, clock=Replay(run=how.out))
    _, here = run(replace(in_one_process(how, tmp_path), engine=replay))
    assert sha256(there.parameters) == sha256(here.parameters)


@pytest.mark.parametrize("case", ["scaffold", "fedasync"])
@pytest.mark.parametrize("every", [1, 50])
def test_a_server_that_dies_takes_the_members_of_its_commits(tmp_path, monkeypatch, case, every):
    more = (CASES | BUFFERED)[case] | {"checkpoint": {"every": every}}
    how = apart(tmp_path, 9, transport={"min_silos": 1}, **more)
    _, _, jobs = grown(how, {"s1": 2, "s2": 2}, rounds=2)
    monkeypatch.setattr(Keeper, "finish", lambda self, state: None)
    for place, number in (("commit", 2), ("put", 2), ("poll", 3), ("commit", 1)):
        with monkeypatch.context() as patch:
            calls, original = [0], getattr(Server, place)

            def dies(self, *arguments, calls=calls, number=number, original=original, **more):
                calls[0] += 1
                if calls[0] == number:
                    raise KeyboardInterrupt
                return original(self, *arguments, **more)

            patch.setattr(Server, place, dies)
            with pytest.raises(KeyboardInterrupt):
                served(how)
    monkeypatch.undo()
    _, there = served(how)
    for job in jobs:
        job.ended()
    rows = rows_of(how)
    assert [row["round"] for row in rows] == [*range(1, 10)] and len(rows[0]["silos"]) == 1
    assert [*rows[-1]["silos"]] == [*IDS]
    if case == "fedasync":
        replay = replace(how.engine, clock=Replay(run=how.out))
        params_P = run(replace(in_one_process(how, tmp_path), engine=replay))[1].parameters
    else:
        params_P, _ = grown_in_one_process(how, tmp_path, rows)
    assert sha256(there.parameters) == sha256(params_P)


def test_a_round_that_was_called_keeps_its_members_whoever_registers_meanwhile(tmp_path, monkeypatch):
    how = apart(tmp_path, 7, transport={"min_silos": 1}, checkpoint={"every": 50}, **CASES["scaffold"])
    jobs, original = [Job(how, "s0")], Server.commit

    def dies(self, entries, files, about, ended=False):
        if about["ids"] == ["s0", "s1"]:  # their updates are there
            raise KeyboardInterrupt
        return original(self, entries, files, about, ended)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Server, "commit", dies)
        patch.setattr(Keeper, "finish", lambda self, state: None)
        grown(how, {"s1": 2}, jobs=jobs)
    jobs.append(Job(how, "s2"))
    registered(how, "s2")
    _, there = served(how)
    for job in jobs:
        job.ended()
    rows = rows_of(how)
    assert [len(row["silos"]) for row in rows] == [1, 1, 1, 2, 3, 3, 3]
    params_P, _ = grown_in_one_process(how, tmp_path, rows)
    assert sha256(there.parameters) == sha256(params_P)


def test_a_silo_that_joined_keeps_its_facts_although_the_server_starts_again(tmp_path):
    how, old, new = (
        apart(tmp_path, 6, transport={"min_silos": 1}),
        [30.0, 5.0, 1.0, 1.0, 0.0],
        [31.0, 5.0, 2.0, 1.0, 0.0],
    )
    common = {"known": [*IDS], "task": "classification", "shape": [4], "num_classes": 2, "config": shown(how)}
    told = {silo: (1, {**common, "facts": new, "begins": "", "host": ""}) for silo in IDS}
    post = SimpleNamespace(files=SimpleNamespace(registrations=lambda: told))
    joining = Joining(how, post, SimpleNamespace(look=lambda: READY))
    joining.first(Members(0, ["s0"]), replace(NO_CALL, ids=["s0", "s1"], facts=[old, old]))
    about = SimpleNamespace(entries=lambda *ids: [], aggregate=how.aggregate)
    joining._spec = SimpleNamespace(config=about, module=None, known=[*IDS])
    opened = joining.opened(Membership(1, dict.fromkeys(IDS, (0,))))
    assert opened.facts_KF.tolist() == [old, old, new]


class Odd(OneSilo):
    """A silo's job that tells another task."""

    def _registration(self):
        return replace(super()._registration(), task="regression")


@pytest.mark.parametrize("what", ["task", "rounds", "weight"])
def test_a_late_silo_that_does_not_fit_is_refused_and_the_others_go_on(tmp_path, monkeypatch, what):
    how = apart(tmp_path, 4, transport={"min_silos": 2})
    odd, why = how, "its data have another task than the federation: regression, not classification"
    if what == "rounds":
        odd, why = replace(how, rounds=9), "its configuration is not the server's: rounds is 9 there and 4 here"
    if what == "weight":
        base, why = type(how.aggregate).base, "aggregate: silo 's2' weighs 0"
        monkeypatch.setattr(type(how.aggregate), "base", lambda self, silo, n: (silo != "s2") * base(self, silo, n))
        monkeypatch.setattr(silo_module, "open_alone", lambda spec, silo, comms: open_silos_of(spec, silo))
    jobs, records = [Job(how, silo) for silo in IDS[:2]], []
    with mock.patch.object(serve, "specify", alone(assembly.specify)), Serving(how) as there:
        for record in there:
            records.append(record)
            if record["round"] == 1:
                bad = Job(odd, "s2", Odd if what == "task" else OneSilo)
                registered(how, "s2")
            if record["round"] == 2:
                with pytest.raises(ConfigError, match=f"the server refuses silo 's2': {why}") as caught:
                    bad.ended(20)
                assert "\n" not in str(caught.value)
    for job in jobs:
        job.ended()
    assert [[*record["silos"]] for record in records] == [["s0", "s1"]] * 4


def open_silos_of(spec, silo):
    """The silo's data, whatever it weighs."""
    members = Membership(0, {silo: (0,)})
    return open_silos(spec.source, members, SoloComm())


def test_silos_that_most_others_do_not_fit_are_refused_before_the_first_round(tmp_path):
    how = apart(tmp_path, 2, transport={"min_silos": 2})
    bad = Job(how, "s0", Odd)
    registered(how, "s0")
    jobs = [Job(how, silo) for silo in IDS[1:]]
    for silo in IDS[1:]:
        registered(how, silo)
    records, _ = served(how)
    with pytest.raises(ConfigError, match="the server refuses silo 's0': its data have another task"):
        bad.ended()
    for job in jobs:
        job.ended()
    assert [*records[0]["silos"]] == ["s1", "s2"]


def test_a_job_that_starts_anew_is_judged_by_what_it_registers(tmp_path):
    how = apart(tmp_path, 2, transport={"min_silos": 2})
    common = {"known": [*IDS], "task": "classification", "shape": [4], "num_classes": 2, "begins": "", "host": ""}
    fits, odd = (
        {**common, "facts": [30.0, 5.0, 1.0, 1.0, 0.0], "config": shown(it)} for it in (how, replace(how, rounds=9))
    )
    looks = [{"s0": (1, fits), "s1": (1, fits), "s2": (1, odd)}, {"s0": (1, fits), "s1": (1, fits), "s2": (2, fits)}]
    told = []
    files = SimpleNamespace(registrations=lambda: looks.pop(0) if len(looks) > 1 else looks[0])  # s2 starts again
    post = SimpleNamespace(files=files, refuse=told.append)
    joining = Joining(how, post, SimpleNamespace(look=lambda: READY))
    assert [*joining.first(None, NO_CALL)] == ["s0", "s1"]
    ((number, why),) = told.pop().values()
    assert number == 1 and "rounds is 9 there and 2 here" in why
    joining._spec = SimpleNamespace(known=[*IDS])
    assert joining.new(["s0", "s1"]) == ["s2"] and told == [{}]


def test_of_two_silos_that_differ_none_is_refused_until_a_third_one_comes(tmp_path):
    how = apart(tmp_path, 2, transport={"min_silos": 2})
    jobs = [Job(how, "s0", Odd), Job(how, "s1")]
    for silo in IDS[:2]:
        registered(how, silo)
    last = threading.Timer(1.5, lambda: jobs.append(Job(how, "s2")))
    last.start()
    records, _ = served(how)
    assert [*records[0]["silos"]] == ["s1", "s2"]
    with pytest.raises(ConfigError, match="the server refuses silo 's0'"):
        jobs[0].ended()
    for job in jobs[1:]:
        job.ended()


def test_the_server_says_why_silos_that_have_registered_do_not_count(tmp_path, capsys):
    how = apart(tmp_path, 2)
    bad = [Job(replace(how, rounds=9), silo) for silo in IDS]
    for silo in IDS:
        registered(how, silo)
    jobs, second = [], threading.Timer(1.5, lambda: jobs.extend(Job(how, silo) for silo in IDS))
    second.start()
    served(how)
    for job in bad:
        with pytest.raises((Superseded, ConfigError)):
            job.ended()
    for job in jobs:
        job.ended()
    why = "missing: s0, s1, s2; silo 's0': its configuration is not the server's: rounds is 9 there and 2 here"
    assert why in capsys.readouterr().out


def test_a_member_does_not_leave(tmp_path):
    how = apart(tmp_path, 2)
    jobs = [Job(how, silo) for silo in IDS]
    with Serving(how) as there:
        for record in there:
            if record["round"] == 1:
                with pytest.raises(ConfigError, match="silo 's1' stays a member; a new run has others"):
                    there.rebuild(there.membership.without("s1"))
    for job in jobs:
        job.ended()


@pytest.mark.parametrize(
    "more, why",
    [
        (
            {"engine": {"name": "buffered", "size": 1}, "local": {"name": "scaffold"}},
            "transport.min_silos does not go with engine: buffered and local: scaffold: an update that is under way",
        ),
        ({"transport": {"min_silos": 0}}, "transport.*min_silos"),
    ],
)
def test_what_does_not_go_with_silos_that_join_is_refused(tmp_path, more, why):
    with pytest.raises(ConfigError, match=why) as caught:
        apart(tmp_path, **{"transport": {"min_silos": 1}} | more)
    assert "\n" not in str(caught.value)


def test_more_silos_than_there_are_cannot_be_waited_for(tmp_path):
    how = apart(tmp_path, 2, transport={"min_silos": 4})
    job = Job(how, "s0")
    registered(how, "s0")
    with pytest.raises(ConfigError, match=r"transport\.min_silos: 4, and there are 3 silos"):
        served(how)
    with pytest.raises(ServerEnded, match=r"the server's job has ended: transport\.min_silos: 4"):
        job.ended()
