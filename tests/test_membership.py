"""Members that change between two rounds: same bits as a run that is resumed with them."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import config, everything, figures, refused

import fedmpi
from fedmpi import results
from fedmpi.comm import SoloComm
from fedmpi.errors import ConfigError
from fedmpi.flat import sha256
from fedmpi.membership import Membership
from fedmpi.moving import heirs
from fedmpi.placement import adopted
from fedmpi.selection import SELECTORS, carried
from fedmpi.types import Silo

AT, ROUNDS = 3, 6
SIZES = {"sizes": (20, 30, 50, 24, 36)}
MOMENTUM = {"name": "sgd", "lr": 0.05, "epochs": 1, "optimizer": {"name": "SGD", "momentum": 0.9}}
UP = {"codec": {"name": "topk", "ratio": 0.2}, "feedback": True}
DOWN = {"codec": "int8", "feedback": True}
RUNS: dict[str, dict[str, Any]] = {
    "momentum that silos keep": {"local": {**MOMENTUM, "keep_optimizer": True}, "select": {"name": "ucb", "count": 2}},
    "scaffold": {"local": {"name": "scaffold"}, "select": {"name": "uniform", "count": 2}},
    "a residual of the rank": {
        "exchange": {"plan": "sharded", "up": UP, "down": DOWN},
        "server": {"optimizer": "fedadam"},
    },
    "residuals of silos": {"exchange": {"plan": "sharded", "scope": "silo", "up": UP}, "select": {"name": "norm"}},
    "overlap": {"exchange": {"plan": "replicated", "overlap": True}, "server": {"optimizer": "fedavgm"}},
    "fragments": {
        "exchange": {"plan": "sharded", "scope": "silo", "fragments": 4, "up": UP, "down": DOWN},
        "server": {"optimizer": "fedavgm"},
        "select": {"name": "uniform", "count": 2},
    },
    "fragments late": {"exchange": {"fragments": 3, "overlap": True}, "server": {"optimizer": "fedavgm"}},
    "shared memory": {"exchange": {"plan": "window"}, "local": {"name": "feddyn"}, "server": {"optimizer": "feddyn"}},
    "models of their own": {"local": {"name": "ditto"}, "server": {"average": {"decay": 0.5}}},
    "last losses": {"select": {"name": "power_of_choice", "count": 2, "losses": "last"}, "aggregate": "fednova"},
    "turns": {"select": {"name": "available", "traces": {"s1": [[1, 3], [5, 9]]}, "inner": "round_robin"}},
}
CHANGES = {
    "one leaves": lambda now: now.without("s0"),
    "one joins": lambda now: now.with_silo("s4", 0),
    "one for another": lambda now: now.without("s2").with_silo("s4", 0),
}
# Runs with one change each, and one with all.
CASES = [*zip(RUNS, itertools.cycle(CHANGES)), ("scaffold", "one leaves"), ("scaffold", "one for another")]


def first(*silos):
    return Membership(0, {silo: (0,) for silo in silos})


def how(out, name):
    values = RUNS[name]
    local = {"lr": 0.05, "epochs": 1, "batch_size": 8, **values.get("local", {})}
    return config(out, ROUNDS, data=SIZES, **{**values, "local": local})


def trained(out, name, members=None, until=ROUNDS, change=None):
    """The records of a run, the SHA-256 of its parameters, and its membership."""
    records = []
    with fedmpi.Run(how(out, name), comm=SoloComm(), membership=members) as run:
        for record in run:
            records.append(figures(record))
            if record["round"] == AT and change is not None:
                run.rebuild(change(run.membership))
            if record["round"] == until:
                break
    return records, sha256(run.averaged_parameters), run.membership


@pytest.mark.parametrize(("name", "change"), CASES)
def test_members_that_change_between_rounds_end_as_a_restart_with_them_does(tmp_path, name, change):
    members = first("s0", "s1", "s2", "s3")
    records, sha, after = trained(tmp_path / "rebuilt", name, members, change=CHANGES[change])
    trained(tmp_path / "left", name, members, until=AT)
    again, sha_again, _ = trained(tmp_path / "left", name, after)
    assert records[AT:] == again
    assert sha == sha_again
    assert everything(tmp_path / "rebuilt", after.ids) == everything(tmp_path / "left", after.ids)
    assert {tuple(record["silos"]) for record in again} == {tuple(after.ids)} != {tuple(records[0]["silos"])}


def test_a_run_that_is_left_goes_on_with_the_members_that_it_had(tmp_path):
    """Of a command without a membership, whose data have more silos."""
    members = first("s0", "s1", "s2", "s3")
    records, sha, after = trained(tmp_path / "whole", "turns", members, change=CHANGES["one for another"])
    trained(tmp_path / "left", "turns", members, until=AT + 1, change=CHANGES["one for another"])
    again, sha_again, members_again = trained(tmp_path / "left", "turns")
    assert (again, sha_again, members_again) == (records[AT + 1 :], sha, after)


def test_a_silo_that_has_left_may_be_named_and_one_that_never_was_may_not(tmp_path):
    named = {
        "select": {"name": "available", "traces": {"s0": [[1, 9]]}},
        "local": {"name": "sgd", "amount": {"name": "by_silo", "silos": {"s0": 2}}},
    }
    with fedmpi.Run(config(tmp_path / "left", 4, data=SIZES, **named), comm=SoloComm()) as run:
        rounds = iter(run)
        assert "s0" in next(rounds)["cohort"]
        run.rebuild(run.membership.without("s0"))
        assert next(rounds)["cohort"] == ["s1", "s2", "s3", "s4"]
    for part in ("select", "local"):
        wrong = json.loads(json.dumps(named[part]).replace("s0", "s9"))
        assert "no silo 's9'" in refused(config(tmp_path / part, 4, data=SIZES, **{**named, part: wrong}))


def test_a_checkpoint_is_evaluated_on_the_members_of_its_round(tmp_path):
    members = first("s0", "s1", "s2", "s3")
    records, *_ = trained(tmp_path, "models of their own", members, change=CHANGES["one for another"])
    for record in (records[-1], records[1]):
        found = results.evaluate(tmp_path, record["round"], allow=["support"])
        assert list(found["silos"]) == list(record["silos"])
        assert (found["loss"], found["personal_loss"]) == (record["loss"], record["personal_loss"])


def test_a_silo_that_comes_back_begins_as_one_that_is_new(tmp_path):
    with fedmpi.Run(how(tmp_path, "scaffold"), comm=SoloComm()) as run:
        rounds = iter(run)
        next(rounds)
        kept = {silo.id: (silo.cursor, silo.kept) for silo in run.federation.silos.values() if silo.cursor}
        gone = next(iter(kept))
        run.rebuild(run.membership.without(gone))
        run.rebuild(run.membership.with_silo(gone, 0))
        back = run.federation.silos
        assert (back[gone].cursor, back[gone].kept) == (0, {})
        assert list(back) == ["s0", "s1", "s2", "s3", "s4"] and run.membership.epoch == 2
        assert all((back[silo].cursor, back[silo].kept) == kept[silo] for silo in kept if silo != gone)


@pytest.mark.parametrize("scope", ["rank", "silo"])
def test_the_residual_of_a_rank_stays_and_that_of_a_silo_leaves_with_it(tmp_path, scope):
    """A rank's residual is in units of the weight of all silos, which changes."""
    exchange = {"plan": "sharded", "scope": scope, "up": UP}
    with fedmpi.Run(config(tmp_path, ROUNDS, exchange=exchange), comm=SoloComm()) as run:  # 20, 30 and 50 samples
        next(iter(run))
        before = residuals(run)
        run.rebuild(run.membership.without("s0"))
        after = residuals(run)
    if scope == "silo":
        assert before.keys() - after.keys() == {"s0"} and all(torch.equal(after[silo], before[silo]) for silo in after)
    else:
        assert list(before) == ["s0"] and list(after) == ["s1"]
        assert torch.equal(after["s1"], before["s0"] * (100 / 80)) and before["s0"].any()


def residuals(run):
    fed = run.federation
    kept = fed.exchange.state(run.state.params_Q)
    return {one.silo: one.tensor.clone() for one in kept if one.key[-1] == "feedback"}


def test_what_a_selector_knows_of_silos_goes_by_their_names():
    selector = SELECTORS.build({"name": "ucb", "count": 2}, "")
    state = selector.init([5, 5, 5]) | {"plays": np.array([4.0, 2.0, 1.0]), "loss": np.array([0.5, np.nan, 2.0])}
    found = carried(selector, state, ["a", "b", "c"], ["a", "c", "d"], [5, 5, 5])
    assert found["plays"].tolist() == [4.0, 1.0, 0.0]
    assert np.array_equal(found["loss"], [0.5, 2.0, np.nan], equal_nan=True)
    assert found.keys() == state.keys()


def test_whoever_stays_inherits_what_a_rank_keeps():
    before = Membership(0, {"a": (0,), "b": (1,), "c": (1,), "d": (2,)})
    assert heirs(before, before.without("a", "b").moved("c", 0)) == {"a": "c", "b": "c"}
    assert heirs(before, before.moved("a", 2)) == {}


SILOS = (Silo("a", host="site.org"), Silo("b", host="site.org"), Silo("c"))
HOSTS = ("site.org", "other.org", "other.org")


@pytest.mark.parametrize(
    ("teams", "dedicated", "says"),
    [
        ({}, False, "no silo takes part"),
        ({"a": (0,), "x": (1,)}, False, "the data have no silo 'x'"),
        ({"a": (0, 1)}, False, "silo 'a' has 2 ranks; give every silo one"),
        ({"c": (3,)}, False, "silo 'c' is on rank 3, and there are 3 ranks"),
        ({"c": (-1,)}, False, "silo 'c' is on rank -1, and there are 3 ranks"),
        ({"a": (1,)}, False, "silo 'a' is pinned to host 'site.org', and rank 1 is on 'other.org'"),
        ({"a": (0,), "c": (0,)}, False, "rank 0 opens silos that are pinned to it alone, and not 'c'"),
        ({"a": (0,)}, True, "silo 'a' is on rank 0, which server.dedicated keeps free of silos"),
    ],
)
def test_a_membership_that_cannot_be_is_one_line_that_names_the_silo(teams, dedicated, says):
    with pytest.raises(ConfigError, match=rf"^membership: {says}"):
        Membership(0, teams).checked(SILOS, HOSTS, dedicated)


def test_the_last_rank_that_is_left_hosts_silos_though_it_serves():
    for hosts in (["n"], ["n", "n"]):
        taken = adopted({}, [Silo("c")], [Silo("c")], {"c": 5}, hosts, dedicated=True)
        assert Membership(1, taken).checked([Silo("c")], hosts, dedicated=True).rank("c") == len(hosts) - 1


def test_members_have_the_order_of_the_data_whoever_came_first():
    members = Membership(3, {"c": (1,), "a": (0,)}).checked(SILOS, HOSTS)
    assert (members.ids, members.ranks, members.epoch) == (["a", "c"], [0, 1], 3)
    with pytest.raises(ConfigError, match="no member 'b'"):
        members.moved("b", 0)
    with pytest.raises(ConfigError, match="silo 'a' is a member already, on rank 0"):
        members.with_silo("a", 1)


ALL_THREE = {"name": "synchronous", "policy": {"name": "deadline", "deadline_s": 3600.0, "min_silos": 3}}


def test_a_joining_silo_that_no_component_can_do_with_is_refused_and_the_run_goes_on(tmp_path):
    alone = config(tmp_path / "a", 2, engine=ALL_THREE)
    with fedmpi.Run(alone, comm=SoloComm()) as run:
        rounds = iter(run)
        next(rounds)
        before = run.federation
        with pytest.raises(ConfigError, match="min_silos is 3, but a cohort may have only 2 silos"):
            run.rebuild(run.membership.without("s0"))
        assert run.federation is before
        next(rounds)
    with pytest.raises(ConfigError, match="the run is closed"):
        run.rebuild(run.membership)
    records, undisturbed = trained_alone(tmp_path / "b")
    assert sha256(run.parameters) == undisturbed and figures(run.record) == figures(records[-1])


def trained_alone(out):
    with fedmpi.Run(config(out, 2, engine=ALL_THREE), comm=SoloComm()) as run:
        return list(run), sha256(run.parameters)


COUNTS = {name: {"count": 3} for name in SELECTORS.members if name not in ("all", "available", "poisson")}
COUNTS["power_of_choice"] |= {"num_candidates": 3}
COUNTS["available"] = {"traces": {"s1": [[1, 9]]}, "inner": {"name": "uniform", "count": 3, "weights": "inverse"}}


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_is_capped_at_the_silos_that_are_left(tmp_path, caplog, name):
    how = config(tmp_path, 4, select={"name": name, **COUNTS[name]})
    more = " and num_candidates is 3" if name == "power_of_choice" else ""
    with fedmpi.Run(how, comm=SoloComm()) as run:
        rounds = iter(run)
        next(rounds)
        assert not caplog.records
        run.rebuild(run.membership.without("s0"))
        says = f"select: count is 3{more}, capped at the 2 silos that take part"
        assert [one.getMessage() for one in caplog.records] == [says]
        for record in (next(rounds), next(rounds)):
            assert set(record["cohort"]) <= {"s1", "s2"}
            # With replacement, and one by one, a silo may be left to chance.
            assert len(record["cohort"]) == 2 or name in ("proportional", "norm")
    with fedmpi.Run(how, comm=SoloComm()) as run:  # on resume it is told again
        assert [one.getMessage() for one in caplog.records] == [says] * 2 and run.resumed == 3


def test_a_restart_says_which_silo_has_other_data(tmp_path, monkeypatch):
    trained(tmp_path, "turns", first("s0", "s1"), until=AT)
    monkeypatch.setenv("BLOBS", "1")
    said = refused(how(tmp_path, "turns"))
    assert said.endswith(": the data of silo 's0' (and 1 more) are not the same; choose another out=")
