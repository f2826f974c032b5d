"""Rounds that close before all silos are through: what late silos contribute, and what records say of them."""

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import OWN, config, everything, figures, put_back, run
from torch import nn

import fedmpi
from fedmpi import stopping
from fedmpi.comm import SoloComm
from fedmpi.components import build, component
from fedmpi.config import Config
from fedmpi.errors import ConfigError, Diverged, NoCohort, Stopped
from fedmpi.local import Sgd
from fedmpi.rounds import closing, training
from fedmpi.rounds.policies import Deadline
from fedmpi.types import Silo, SiloData, Source

__all__ = ["put_back"]

HERE = "rounds.test_late:"


@component
class Points:
    """Silo k has the loss (w - c_k)^2, whatever the batch."""

    centres: tuple[float, ...] = (0.0, 0.0, 3.0)
    sizes: tuple[int, ...] = (40, 40, 40)

    def source(self, seed):
        ids = [f"s{i}" for i in range(len(self.centres))]

        def opened(name):
            x = torch.ones(self.sizes[ids.index(name)], 1)
            y = x * self.centres[ids.index(name)]
            return SiloData(x, y, x[:1], y[:1])

        return Source("regression", (1,), 1, tuple(map(Silo, ids)), opened)


class Line(nn.Linear):
    def __init__(self):
        super().__init__(1, 1, bias=False)


class Script(closing.Closing):
    """Closes the round for a silo after a number of steps, by position of the silo on its rank."""

    script = ()

    def begin(self, silo):
        self.number = getattr(self, "number", -1) + 1
        self.steps = 0
        if self.number < len(self.script) and self.script[self.number] == 0:
            self._verdict = closing.CLOSED
        super().begin(silo)

    def over(self):
        self.steps += 1
        if self.number < len(self.script) and self.steps == self.script[self.number]:
            self._verdict = closing.CLOSED
        return super().over()


@component
class Scripted(Deadline):
    """A deadline that comes after so many steps of each silo, in place of seconds."""

    steps: tuple[int, ...] = (100, 100, 2)
    in_rounds: tuple[int, ...] = ()
    """empty: all"""

    def closing(self, fed, state, key, cohort):
        made = super().closing(fed, state, key, cohort)
        made.__class__ = Script
        vars(made)["script"] = self.steps if key[0] in (self.in_rounds or key) else ()
        return made


def scripted(**fields):
    return {"name": "synchronous", "policy": {"name": HERE + "Scripted", "deadline_s": 3600.0} | fields}


def points(out, rounds=60, local=None, data=None, **other):
    local = {"name": "sgd", "lr": 0.005, "epochs": None, "steps": 10, "batch_size": 4} | (local or {})
    return config(out, rounds, {"name": HERE + "Points"} | (data or {}), HERE + "Line", local, **other)


def found(how):
    records, done = run(how)
    return float(done.parameters), records


@pytest.mark.parametrize("aggregate", ["mean", "fednova"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_late_silo_does_not_pull_the_optimum(tmp_path, aggregate, momentum, monkeypatch):
    local = {"lr": 0.005 * (1 - momentum), "optimizer": {"name": "SGD", "momentum": momentum}}
    how = points(tmp_path / "late", 120, local, aggregate=aggregate, engine=scripted())
    reached, records = found(how)
    assert abs(reached - 1.0) < 0.04
    assert all(record["late"] == {"s2": "partial"} for record in records)
    assert [row["num_steps"] for row in records[-1]["silos"].values()] == [10, 10, 2]
    if aggregate == "mean":  # as it is without normalisation
        monkeypatch.setattr(training, "_normalise", lambda contribution, fed, *rest: _plain(contribution, fed))
        naive, _ = found(replace(how, out=str(tmp_path / "naive")))
        assert naive < 0.5


def _plain(contribution, fed):
    fed.ready.set_silo(fed.index[contribution.silo], done=contribution.weight, plain=contribution.weight)


@pytest.mark.parametrize("aggregate", ["mean", "fednova"])
def test_normalised_parts_are_fednovas_numbers(tmp_path, aggregate):
    """w + tau_eff sum_k p_k delta_k / tau_k, tau_eff = sum_k p_k tau_k."""
    _, before = run(points(tmp_path / "before", 1, {"lr": 1e-30}))
    w = float(before.parameters)
    data = {"sizes": (40, 40, 80), "centres": (1.0, 6.0, 3.0)}
    reached, _ = found(points(tmp_path / "after", 1, {"lr": 0.05}, data, aggregate=aggregate, engine=scripted()))
    tau, p, c = np.array([10, 10, 2]), np.array([0.25, 0.25, 0.5]), np.array(data["centres"])
    delta = (1 - (1 - 2 * 0.05) ** tau) * (c - w)
    assert reached == pytest.approx(w + (p @ tau) * (p @ (delta / tau)), rel=1e-6)


def test_where_nobody_is_late_no_bit_changes(tmp_path):
    plain, _ = run(config(tmp_path / "plain", 3, server={"optimizer": {"name": "fedadam"}}))
    policy = {"name": "deadline", "deadline_s": 3600.0, "min_silos": 3}
    engine = {"name": "synchronous", "policy": policy}
    under, _ = run(config(tmp_path / "under", 3, server={"optimizer": {"name": "fedadam"}}, engine=engine))
    assert everything(tmp_path / "plain") == everything(tmp_path / "under")
    for one, two in zip(plain, under, strict=True):
        told = figures(two)
        assert told.pop("late") == {} and told.pop("deadline_s") == 3600.0 and "late" not in one
        assert told == figures(one)


@pytest.mark.parametrize("aggregate", ["mean", "fednova"])
@pytest.mark.parametrize("again", [True, False])
def test_a_buffered_update_enters_the_next_round_by_its_staleness(tmp_path, aggregate, again):
    """FedBuff's weight 2^-1/2; with a fresh update of the silo beside it, or without."""
    _, before = run(points(tmp_path / "before", 1, {"lr": 1e-30}))
    w0, a = float(before.parameters), 2**-0.5
    data = {"sizes": (40, 40, 80), "centres": (1.0, 6.0, 3.0)}
    engine = scripted(late="buffer", in_rounds=(1, 2) if again else (1,))
    how = points(tmp_path / "after", 3, {"lr": 0.05}, data, aggregate=aggregate, engine=engine)
    run(how, 1)  # the update that waits is in the checkpoint
    reached, records = found(replace(how, rounds=2))

    def delta(w, tau, centre):
        return (1 - (1 - 2 * 0.05) ** tau) * (centre - w)

    w1 = w0 + (delta(w0, 10, 1.0) + delta(w0, 10, 6.0)) / 2
    # weights, steps and deltas that come in
    rows = [(40, 10, delta(w1, 10, 1.0)), (40, 10, delta(w1, 10, 6.0)), (80 * a, 2, delta(w0, 2, 3.0))]
    rows += [] if again else [(80, 10, delta(w1, 10, 3.0))]
    p, tau, deltas = (np.array(column) for column in zip(*rows, strict=True))
    p /= p.sum()
    assert reached == pytest.approx(w1 + (p @ tau) * (p @ (deltas / tau)), rel=1e-6)
    assert records[-1]["stale"] == {"s2": 1} and records[-1]["late"] == ({"s2": "buffered"} if again else {})


def test_a_buffered_update_enters_where_its_silo_is_not_drawn_and_is_rejected_by_name(tmp_path):
    engine = scripted(late="buffer", steps=(100, 2), in_rounds=(1,))
    how = points(tmp_path / "drawn", 3, select={"name": "round_robin", "count": 2}, engine=engine)
    records, done = run(how)
    (late,) = records[0]["late"]
    assert records[1]["stale"] == {late: 1} and "stale" not in records[2]
    assert not any(name.startswith("fedmpi/late") for silo in done.federation.silos.values() for name in silo.kept)
    far = points(tmp_path / "far", 2, updates=[{"name": "max_norm", "norm": 1e-9}], engine=scripted(late="buffer"))
    with pytest.raises(Diverged, match="no update was usable"):
        run(far)


@pytest.mark.parametrize("late", ["partial", "drop", "buffer"])
def test_a_run_with_late_silos_resumes_with_its_bits(tmp_path, late):
    engine = scripted(late=late, steps=(100, 3, 100))
    rule = "sgd" if late == "buffer" else "scaffold"
    how = config(tmp_path / "whole", 4, local={"name": rule, "lr": 0.05}, engine=engine)
    records, _ = run(how)
    run(replace(how, out=str(tmp_path / "cut"), rounds=2))
    again, _ = run(replace(how, out=str(tmp_path / "cut")))
    assert everything(tmp_path / "whole") == everything(tmp_path / "cut")
    assert [figures(r) for r in again] == [figures(r) for r in records[2:]]
    assert records[0]["late"] == {"s1": {"drop": "dropped", "buffer": "buffered"}.get(late, late), "s2": "dropped"}


def test_a_stale_update_has_no_norm_of_its_own(tmp_path):
    late = scripted(late="buffer", steps=(100, 5), in_rounds=(1, 2))
    others = {"select": {"name": "round_robin", "count": 2}, "updates": [{"name": "max_norm", "times": 1.5}]}
    how = points(tmp_path, 4, {"lr": 0.005}, {"centres": (3.0, 3.0, 3.0)}, engine=late, **others)
    records, _ = run(how)
    assert len(records) == 4 and [record["rejected"] for record in records] == [[]] * 4


def test_a_buffered_update_outlives_a_round_that_is_broken_off(tmp_path, monkeypatch):
    def how(out):
        engine = scripted(late="buffer", steps=(100, 3, 100), in_rounds=(1,))
        exchange = {"plan": "sharded", "up": {"codec": "int8"}}
        return config(out, 3, None, OWN + "Normed", {"batch_size": 4}, exchange=exchange, engine=engine)

    run(how(tmp_path / "whole"))
    begin = training._begin
    with fedmpi.Run(how(tmp_path / "cut"), comm=SoloComm()) as cut:
        rounds = iter(cut)
        next(rounds)

        def stops(*given):
            cut.federation.watch.tell(stopping.STOP, "a test")
            return begin(*given)

        monkeypatch.setattr(training, "_begin", stops)
        with pytest.raises(Stopped):
            next(rounds)
    monkeypatch.setattr(training, "_begin", begin)
    run(how(tmp_path / "cut"))
    assert everything(tmp_path / "cut") == everything(tmp_path / "whole")


def test_a_dropped_silo_stays_as_it_was(tmp_path):
    how = points(tmp_path, 4, engine=scripted(late="drop", steps=(100, 100, 0), in_rounds=(3, 4)))
    _, done = run(how)
    silos = done.federation.silos
    assert [silos[name].cursor for name in ("s0", "s1", "s2")] == [160, 160, 80]
    outcome = done.state.outcome
    assert outcome.taken_K.tolist() == [True, True, False] and math.isnan(outcome.norm_K[2]) and outcome.num_taken == 2


@component
class Slow(Sgd):
    """Takes a while for each step of silo s2 in some rounds."""

    seconds: float = 0.05
    slowed: tuple[int, ...] = (1,)

    def train(self, silo, model, params_P, round):
        def check(before=round.check):
            if silo.id == "s2" and round.number in self.slowed:
                time.sleep(self.seconds)
            before()

        return super().train(silo, model, params_P, replace(round, check=check))


def slow(out, rounds, policy, **fields):
    local = {"name": HERE + "Slow", "batch_size": 2} | fields
    return config(out, rounds, local=local, engine={"name": "synchronous", "policy": {"name": "deadline"} | policy})


def test_a_round_ends_at_its_deadline_once_enough_silos_are_through(tmp_path):
    records, _ = run(slow(tmp_path / "a", 2, {"deadline_s": 2.0, "min_silos": 2}, seconds=0.4))
    assert 1.9 < records[0]["seconds"]["train"] < 9.0, "its 25 steps take 10 s"
    assert [record["late"] for record in records] == [{"s2": "partial"}, {}]
    assert 0 < records[0]["silos"]["s2"]["num_steps"] < 25 == records[1]["silos"]["s2"]["num_steps"]


def test_too_few_silos_are_waited_for_repeated_or_end_the_run(tmp_path):
    few = {"deadline_s": 1.0, "min_silos": 3}
    waited, _ = run(slow(tmp_path / "wait", 1, few, seconds=0.1))
    assert waited[0]["late"] == {} and waited[0]["seconds"]["train"] > 2.5
    repeated, done = run(slow(tmp_path / "repeat", 2, few | {"too_few": "repeat"}, seconds=0.1))
    assert [record.get("repeats", 0) for record in repeated] == [2, 0] and repeated[0]["deadline_s"] == 4.0
    assert [silo.cursor for silo in done.federation.silos.values()] == [40, 60, 100]
    run(slow(tmp_path / "alike", 2, {"deadline_s": 60.0, "min_silos": 3}, slowed=()))
    assert everything(tmp_path / "repeat") == everything(tmp_path / "alike")
    with pytest.raises(NoCohort, match=r"round 2: 2 of 3 silos were through at the deadline of 1 s, and .* is 3"):
        run(slow(tmp_path / "stop", 3, few | {"too_few": "stop"}, seconds=0.1, slowed=(2,)))
    assert everything(tmp_path / "stop")[0] == 1  # with a checkpoint


def test_an_automatic_deadline_follows_the_median_silo(tmp_path):
    policy = {"min_silos": 2, "factor": 2.0}
    records, done = run(slow(tmp_path, 4, policy, seconds=0.3, slowed=(3, 4)))
    assert records[0]["deadline_s"] is None and records[0]["late"] == {}
    assert [sorted(record["late"]) for record in records[1:]] == [[], ["s2"], ["s2"]]
    assert records[3]["seconds"]["train"] < 1.0
    medians = done.state.policy["medians"]
    assert len(medians) == 4 and records[3]["deadline_s"] == pytest.approx(2 * np.median(medians[:3]))


REFUSED: dict[str, dict[str, Any]] = {
    "exchange.overlap": {"exchange": {"overlap": True}},
    "exchange.regions": {"exchange": {"regions": {"levels": [{"by": "node"}]}}},
    "no two runs have the same late silos": {"exchange": {"reduction": "reproducible"}},
    "its one step takes the gradient of all samples": {"local": {"name": "fedsgd", "lr": 0.1}, "field": "lr"},
    "its h_k takes what": {"local": {"name": "feddyn"}, "server": {"optimizer": "feddyn"}},
    "needs silos that take equal steps": {"local": {"name": "scaffold", "variant": "benchmark"}},
    "it does not say that it asks": {"local": {"name": HERE + "Own"}},
    "keep_optimizer": {"local": {"keep_optimizer": True, "optimizer": {"name": "SGD", "momentum": 0.9}}},
    "weights: steps counts": {"aggregate": {"name": "mean", "weights": "steps"}},
    "aggregate qffl": {"aggregate": {"name": "qffl", "lr": 0.1}},
    "aggregate median": {"aggregate": "median", "exchange": {"plan": "sharded", "scope": "silo"}},
    "1/probability": {"select": {"name": "optimal", "fraction": 0.5}},
    "exchange.scope: silo": {"policy": {"late": "buffer"}, "exchange": {"plan": "sharded", "scope": "silo"}},
    "its control must not arrive": {"policy": {"late": "buffer"}, "local": {"name": "scaffold"}},
    "norms of whole rounds": {"server": {"optimizer": "fedexp"}},
    "exchange.fragments": {"exchange": {"fragments": 2}},
    "reads the lateness of each silo": {"disclose": "pooled"},
    "min_silos is 4, but a cohort may have only 3 silos": {"policy": {"min_silos": 4}},
}


@component
class Own:
    def train(self, silo, model, params_P, round):
        raise NotImplementedError


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_go_together_is_refused_in_one_line(tmp_path, why):
    policy = {"name": "deadline"} | REFUSED[why].get("policy", {})
    local = {"name": "sgd", "lr": 0.1, "epochs": 1} | REFUSED[why].get("local", {})
    if local["name"] in ("fedsgd", HERE + "Own"):
        local = {key: value for key, value in local.items() if key in ("name", REFUSED[why].get("field"))}
    parts = {key: value for key, value in REFUSED[why].items() if key not in ("policy", "local", "field")}
    engine = {"name": "synchronous", "policy": policy}
    values = {"out": str(tmp_path), "data": OWN + "Blobs", "device": {"name": "cpu"}, "engine": engine} | parts
    with pytest.raises(ConfigError, match=why) as caught:
        fedmpi.Run(build(Config, values | {"local": local}), comm=SoloComm())
    assert "\n" not in str(caught.value)
