"""The amount of work by measured delays (local.amount: by_delay), in virtual and in real time. Its numbers are checked
against a plain version in equations/delays.py."""

import json
import math
from dataclasses import replace
from typing import ClassVar

import pytest
from support.runs import OWN, config, everything, figures, paced, put_back, run

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.components import build, component
from fedmpi.errors import ConfigError
from fedmpi.flat import sha256
from fedmpi.local import Delay, Sgd
from fedmpi.local.workload import ByDelay
from fedmpi.rounds.delays import Delays

__all__ = ["put_back"]

HERE = "rounds.test_delays:"
CLOCK = {
    "name": "virtual",
    "compute": {"name": "lognormal", "median": 2.0, "sigma": 0.4},
    "slower": {"s2": 5.0},
    "delay": {"name": "uniform", "low": 0.1, "high": 1.0},
}
BUDGET = {"name": "by_delay", "budget_s": 2.0, "rates": "mean"}


def by_delay(out, rounds=9, engine=None, amount=None, **more):
    local = {"epochs": None, "steps": 8, "amount": BUDGET | (amount or {})} | more.pop("local", {})
    engine = {"name": "buffered", "size": 2, "clock": CLOCK} | (engine or {})
    return config(out, rounds, engine=engine, local=local, **more)


def amounts(records):
    return [(one["silo"], one["amount"], one["scale"]) for record in records for one in record["arrivals"]]


# ---------------------------------------------------------------- the rule


def test_what_a_silo_is_told_follows_the_equation():
    amount = build(ByDelay, {"budget_s": 10.0, "margin_s": 1.0, "cutoff": 2.0, "first": 3})
    delays = {"a": Delay(2.0, 0.5), "b": Delay(0.0, 3.0), "c": Delay(20.0, 1.0), "d": None, "e": Delay(4.0, 0.0)}
    told = amount.orders(20, delays)
    assert {silo: one.amount for silo, one in told.items()} == {"a": 14, "b": 3, "c": 1, "d": 3, "e": 20}
    assert told["a"].scale == 0.1 and told["c"].scale == 1.0 and told["b"].scale == pytest.approx(1 / 3)
    assert [told[silo].latest_s for silo in "abcd"] == [22.0, 20.0, 40.0, math.inf]
    assert told["a"].share == 14 / 20
    slow = {"f": Delay(1.0, 30.0)}
    assert amount.orders(20, slow)["f"].latest_s == 61.0  # it is not dropped for being as slow as expected
    mean = build(ByDelay, {"budget_s": 10.0, "rates": "mean"}).orders(20, delays)
    assert {silo: one.amount for silo, one in mean.items()} == {"a": 16, "b": 3, "c": 1, "d": 20, "e": 20}
    assert mean["b"].scale == pytest.approx(4.0) and mean["c"].scale == 10.0
    assert amount.mean(Delay(2.0, 4.0), Delay(4.0, 1.0)) == (3.0, 2.5)
    assert amount.mean(None, Delay(4.0, 1.0)) == (4.0, 1.0)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"disclose": "cohort", "engine": {"name": "synchronous", "clock": "real"}}, "disclose: cohort hides"),
        ({"aggregate": "fednova", "engine": {"name": "synchronous"}}, "divides by their number"),
        ({"aggregate": {"name": "mean", "weights": "steps"}}, "weights: steps counts them in full"),
        ({"engine": {"name": "synchronous"}, "amount": {"cutoff": 1.5}}, "cutoff needs engine: buffered"),
        ({"amount": {"margin_s": 2.0}}, "leave nothing of budget_s"),
        (
            {"engine": {"name": "synchronous", "clock": "real"}, "exchange": {"reduction": "reproducible"}},
            "goes by the machine's clock",
        ),
        (
            {"engine": {"name": "synchronous"}, "local": {"name": "scaffold", "variant": "benchmark"}},
            "by_delay does not go with scaffold",
        ),
        (
            {"evaluate": {"finetune": {"name": "sgd", "lr": 0.1, "steps": 1, "amount": BUDGET}}},
            "evaluate.finetune.amount",
        ),
        ({"silos": {"s1": {"local.steps": 4}}}, "'s1' has epochs or steps of its own"),
        ({"silos": {"s1": {"local.epochs": 4}}}, "'s1' has epochs or steps of its own"),
    ],
)
def test_what_does_not_go_with_it_is_refused_in_one_line(tmp_path, values, why):
    values = dict(values)
    engine = values.pop("engine", {})
    engine = engine if engine.get("name") != "synchronous" else {"size": None, **engine}
    with pytest.raises(ConfigError) as caught:
        synchronous(tmp_path, engine, values) if "size" in engine else by_delay(tmp_path, engine=engine, **values)
    assert why in str(caught.value) and "\n" not in str(caught.value)


def synchronous(out, engine, values, rounds=6):
    engine = {"clock": CLOCK} | {name: value for name, value in engine.items() if name != "size"}
    values = dict(values)
    local = {"epochs": None, "steps": 8, "amount": BUDGET | values.pop("amount", {})} | values.pop("local", {})
    return config(out, rounds, engine={"name": "synchronous"} | engine, local=local, **values)


def test_fednova_goes_with_equal_rates(tmp_path):
    how = synchronous(tmp_path, {}, {"aggregate": "fednova", "amount": {"rates": "equal"}})
    records, _ = run(how)
    assert {one["scale"] for record in records for one in record["amounts"].values()} == {1.0}


# ---------------------------------------------------------------- virtual time

CASES = {
    "fedasync": ({"size": 1}, {}),
    "cutoff": ({"size": 2}, {"amount": {"cutoff": 1.0}}),
    "max_staleness": ({"size": 1, "max_staleness": 1}, {}),
    "window": ({"size": 1, "window_s": 0.5}, {"amount": {"rates": "equal"}}),
    "scaffold": ({"size": 2}, {"local": {"name": "scaffold"}}),
    "codec": ({"size": 2}, {"exchange": {"up": {"codec": "int8", "feedback": True}}}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_and_a_replay_have_the_bits_of_one_that_was_not_stopped(tmp_path, case):
    engine, more = CASES[case]
    how = by_delay(tmp_path / "whole", 12, engine=engine, **more)
    records, done = run(how)
    run(replace(how, out=str(tmp_path / "cut"), rounds=5))
    again, _ = run(replace(how, out=str(tmp_path / "cut")))
    assert everything(tmp_path / "whole") == everything(tmp_path / "cut")
    assert [figures(record) for record in again] == [figures(record) for record in records[5:]]
    assert len({amount for _, amount, _ in amounts(records)}) > 2
    dropped = [one for record in records for one in record["arrivals"] if one.get("dropped")]
    assert bool(dropped) == (case in ("cutoff", "max_staleness"))
    replay = engine | {"clock": {"name": "replay", "run": str(tmp_path / "whole")}}
    rows, redone = run(by_delay(tmp_path / "replayed", 12, engine=replay, **more))
    assert sha256(redone.parameters) == sha256(done.parameters) and amounts(rows) == amounts(records)
    states = [Delays.of(one.state.policy, one.federation.rule, one.federation.ids).means for one in (done, redone)]
    assert states[0] == states[1] and sum(one is not None for one in states[0].values()) > 1


@component
class Asking(Sgd):
    """Its steps and its rate are what it was told; it notes them."""

    noted: ClassVar[list[tuple[str, int, float]]] = []

    def train(self, silo, model, params_P, round):
        contribution = super().train(silo, model, params_P, round)
        self.noted.append((silo.id, contribution.num_steps, self.rate(round) / self.lr))
        return contribution


def test_silos_do_what_the_record_says(tmp_path):
    records, done = run(by_delay(tmp_path, engine={"size": 1}, local={"name": HERE + "Asking"}))
    assert [(silo, steps, pytest.approx(rate)) for silo, steps, rate in amounts(records)] == type(
        done.federation.rule
    ).noted
    clock = build(fedmpi.rounds.clocks.Virtual, {name: value for name, value in CLOCK.items() if name != "name"})
    for one in (one for record in records for one in record["arrivals"]):
        compute_s, delay_s = clock.parts(0, one["silo"], one["training"], 0)
        assert one["work_s"] == pytest.approx(compute_s * one["amount"] / 8)
        assert one["at_s"] - one["handed_s"] == pytest.approx(one["work_s"] + delay_s)


def test_silos_come_in_time_once_they_are_known(tmp_path):
    """The slow one, too, whose first training takes five budgets."""
    records, _ = run(
        by_delay(tmp_path, 60, engine={"size": 1, "clock": CLOCK | {"compute": {"value": 2.0, "name": "constant"}}})
    )
    rows = [one for record in records for one in record["arrivals"]]
    lasted = {silo: [one["at_s"] - one["handed_s"] for one in rows if one["silo"] == silo] for silo in ("s0", "s2")}
    assert lasted["s2"][0] > 10 and all(seconds < 2.6 for seconds in lasted["s2"][2:])
    told = {silo: [one["amount"] for one in rows if one["silo"] == silo][2:] for silo in ("s0", "s2")}
    assert max(told["s2"]) == 1 and 4 <= min(told["s0"]) <= max(told["s0"]) < 8


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"name": "deadline", "deadline_s": 2.5, "late": "partial"},
        {"name": "deadline", "deadline_s": 2.5, "late": "drop"},
        {"name": "deadline", "deadline_s": "auto", "late": "buffer"},
    ],
)
def test_synchronous_rounds_in_virtual_time_follow_it_and_survive_a_resume(tmp_path, policy):
    engine = {"policy": policy} if policy else {}
    how = synchronous(tmp_path / "whole", engine, {"select": {"name": "uniform", "count": 2}}, 10)
    records, _ = run(how)
    run(replace(how, out=str(tmp_path / "cut"), rounds=4))
    run(replace(how, out=str(tmp_path / "cut")))
    assert everything(tmp_path / "whole") == everything(tmp_path / "cut")
    told = [one for record in records for one in record["amounts"].values()]
    assert len({one["amount"] for one in told}) > 2 and all(
        set(record["amounts"]) == set(record["cohort"]) for record in records
    )
    for record in records:
        for silo, one in record["amounts"].items():
            if "late" not in record:
                assert record["silos"][silo]["num_steps"] == one["amount"]
                assert record["virtual_s"] > 0
    if policy.get("late") == "drop":  # it follows the slow one's seconds although its first update did not count
        slow = [record for record in records if "s2" in record["cohort"]]
        assert slow[0]["late"]["s2"] == "dropped" and slow[0]["amounts"]["s2"]["amount"] == 8
        assert slow[1]["amounts"]["s2"]["amount"] < 4


def test_silos_with_settings_of_their_own_do_what_they_are_told(tmp_path):
    engine = {"policy": {"name": "deadline", "deadline_s": 2.5, "late": "partial"}}
    records, _ = run(synchronous(tmp_path, engine, {"silos": {"s1": {"local.lr": 0.02}}}))
    in_time = [record for record in records if "s1" not in record.get("late", ())]
    told = [(record["silos"]["s1"]["num_steps"], record["amounts"]["s1"]["amount"]) for record in in_time]
    assert all(num == amount for num, amount in told) and len({amount for _, amount in told}) > 1


def test_a_silo_that_comes_back_is_measured_anew(tmp_path):
    with fedmpi.Run(by_delay(tmp_path, 12, {"size": 1}, {"first": 4}), comm=SoloComm()) as done:
        records = []
        for record in done:
            records.append(record)
            if record["round"] == 5:
                assert Delays.of(done.state.policy, done.federation.rule, ["s0"]).means["s0"] is not None
                done.rebuild(done.membership.without("s0"))
            if record["round"] == 6:
                means = Delays.of(done.state.policy, done.federation.rule, ["s0", "s1"]).means
                assert means["s0"] is None is not means["s1"]
                done.rebuild(done.membership.with_silo("s0", 0))
    back = [one for record in records[6:] for one in record["arrivals"] if one["silo"] == "s0"]
    assert back[0]["amount"] == 4 and records[0]["arrivals"][0]["training"] == 0 < back[0]["training"]


def test_a_replay_needs_the_amounts_of_its_run(tmp_path):
    run(by_delay(tmp_path / "with", 3))
    clock = {"clock": {"name": "replay", "run": str(tmp_path / "with")}}
    with pytest.raises(ConfigError, match=r"tell amounts of work; give the local\.amount of that run"):
        config(tmp_path / "a", 3, engine={"name": "buffered", "size": 2, **clock}, local={"epochs": None, "steps": 8})
    run(config(tmp_path / "without", 3, engine={"name": "buffered", "size": 2, "clock": CLOCK}))
    with pytest.raises(ConfigError, match="tell no amounts of work"):
        by_delay(tmp_path / "b", 3, {"clock": {"name": "replay", "run": str(tmp_path / "without")}})


# ---------------------------------------------------------------- real time


@component
class Paced(Sgd):
    """Sleeps before each step; s2 sleeps longer."""

    def train(self, silo, model, params_P, round):
        return super().train(silo, model, params_P, paced(round, 0.02 if silo.id == "s2" else 0.002))


@pytest.mark.parametrize("case", ["size", "cutoff", "scaffold"])
def test_a_run_in_real_time_is_replayed_with_its_bits(tmp_path, case):
    engine = {"name": "buffered", "size": 2, "clock": "real"}
    amount = {"budget_s": 0.06, "cutoff": 1.0 if case == "cutoff" else None}
    local = {"name": "scaffold"} if case == "scaffold" else {"name": HERE + "Paced"}
    more = {"model": OWN + "Normed", "checkpoint": {"every": 3}}
    how = by_delay(tmp_path / "real", 10, engine, amount, local=local, **more)
    run(replace(how, rounds=6))
    records, done = run(how)  # silos start anew after a resume, and their means go on
    everyone = [json.loads(line) for line in (tmp_path / "real" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 4 and len(everyone) == 10
    for one in (one for record in everyone for one in record["arrivals"]):
        assert one["work_s"] > 0 and one["handed_s"] + one["work_s"] <= one["at_s"] + 1e-3
    if case != "scaffold":  # where all steps are fast
        told = {silo: [amount for other, amount, _ in amounts(everyone) if other == silo] for silo in ("s0", "s2")}
        assert min(told["s2"]) < 8
    again = engine | {"clock": {"name": "replay", "run": str(tmp_path / "real")}}
    _, redone = run(by_delay(tmp_path / "again", 10, again, amount, local=local, **more))
    assert sha256(redone.parameters) == sha256(done.parameters)
    states = [Delays.of(one.state.policy, one.federation.rule, one.federation.ids).means for one in (done, redone)]
    assert states[0] == states[1]


def test_synchronous_rounds_in_real_time_measure_the_training(tmp_path):
    how = synchronous(tmp_path, {"clock": "real"}, {"amount": {"budget_s": 0.05}, "local": {"name": HERE + "Paced"}}, 5)
    records, _ = run(how)
    first, last = records[0]["amounts"], records[-1]["amounts"]
    assert {one["amount"] for one in first.values()} == {8} and first["s2"]["work_s"] > 8 * 0.02
    assert last["s2"]["amount"] <= 2 < last["s0"]["amount"]
    assert {one["wait_s"] for one in last.values()} == {0.0}


def test_a_silo_that_is_late_at_a_deadline_is_told_to_do_less(tmp_path):
    policy = {"name": "deadline", "deadline_s": 0.06, "late": "drop", "min_silos": 2}
    data = {"sizes": (20, 30, 50)}
    engine = {"clock": "real", "policy": policy}
    values = {"amount": {"budget_s": 0.05}, "local": {"name": HERE + "Paced"}, "data": data}
    records, _ = run(synchronous(tmp_path, engine, values, 6))
    assert records[0]["late"] == {"s2": "dropped"}
    assert records[0]["amounts"]["s2"]["work_s"] == pytest.approx(0.12)
    assert records[1]["amounts"]["s2"]["amount"] < 8
