"""Virtual time: synchronous rounds under a clock, distributions of times, traces and replays."""

import math
from dataclasses import replace

import numpy as np
import pytest
from support.runs import config, everything, put_back, run

from fedmpi.components import build
from fedmpi.errors import ConfigError, NoCohort
from fedmpi.records.metrics import read_metrics
from fedmpi.rounds import CLOCKS, TIMES
from fedmpi.rounds.clocks import Replay, Virtual
from fedmpi.rounds.queue import Queue, Replayed, after_trainings, trainings

__all__ = ["put_back"]

NOISY = {"name": "virtual", "compute": {"name": "lognormal", "sigma": 0.8}, "slower": {"s2": 4.0}}


def buffered(size=2, **fields):
    return {"name": "buffered", "size": size, "clock": NOISY} | fields


def test_a_synchronous_round_takes_as_long_as_its_slowest_silo(tmp_path):
    clock = {"name": "virtual", "slower": {"s1": 2.0, "s2": 5.0}}
    how = config(
        tmp_path / "a", 4, engine={"name": "synchronous", "clock": clock}, select={"name": "round_robin", "count": 2}
    )
    records, _ = run(how)
    slower, now = {"s0": 1.0, "s1": 2.0, "s2": 5.0}, 0.0
    for record in records:
        now += max(slower[silo] for silo in record["cohort"])
        assert record["virtual_s"] == now
    run(replace(how, out=str(tmp_path / "cut"), rounds=2))
    again, _ = run(replace(how, out=str(tmp_path / "cut")))
    assert [record["virtual_s"] for record in again] == [record["virtual_s"] for record in records[2:]]
    plain, _ = run(config(tmp_path / "b", 4, select={"name": "round_robin", "count": 2}))
    assert [record["train_loss"] for record in plain] == [record["train_loss"] for record in records]


@pytest.mark.parametrize("too_few", ["wait", "repeat", "stop"])
def test_a_round_in_virtual_time_closes_at_its_deadline(tmp_path, too_few):
    policy = {"name": "deadline", "deadline_s": 1.5, "min_silos": 2, "late": "drop", "too_few": too_few}
    clock = {"name": "virtual", "slower": {"s1": 2.5, "s2": 5.0}}
    how = config(tmp_path, 3, engine={"name": "synchronous", "policy": policy, "clock": clock})
    if too_few == "stop":
        with pytest.raises(NoCohort, match=r"1 of 3 silos were through at the deadline of 1\.5 s"):
            run(how)
        return
    records, done = run(how)
    lasts = {"wait": 2.5, "repeat": 1.5 + 3.0}[too_few]  # until the second silo is through; a void round, and twice it
    assert [record["virtual_s"] for record in records] == [lasts, 2 * lasts, 3 * lasts]
    assert all(record["late"] == {"s2": "dropped"} for record in records)
    assert done.federation.silos["s2"].cursor == 0 < done.federation.silos["s1"].cursor


def test_a_deadline_in_virtual_time_follows_the_median_and_survives_a_resume(tmp_path):
    engine = {"name": "synchronous", "policy": {"name": "deadline", "factor": 1.5, "late": "buffer"}, "clock": NOISY}
    how = config(tmp_path / "whole", 6, engine=engine)
    records, _ = run(how)
    run(replace(how, out=str(tmp_path / "cut"), rounds=3))
    run(replace(how, out=str(tmp_path / "cut")))
    assert everything(tmp_path / "whole") == everything(tmp_path / "cut")
    times = {silo: [clock_of(NOISY).seconds(0, silo, i, 0) for i in range(6)] for silo in ("s0", "s1", "s2")}
    medians, now = [], 0.0
    for i, record in enumerate(records):
        limit = 1.5 * float(np.median(medians[-5:])) if medians else math.inf
        assert record["deadline_s"] == (pytest.approx(limit) if medians else None)
        ends = [times[silo][i] for silo in times]
        medians.append(float(np.median([end if end <= limit else 2 * limit for end in ends])))
        now += min(limit, max(ends))
        assert record["virtual_s"] == pytest.approx(now)
    assert any(record["late"] for record in records) and any("stale" in record for record in records)


def clock_of(values):
    return CLOCKS.build(values, "engine.clock")


def test_a_silo_that_comes_back_goes_on_with_its_numbers():
    kept = after_trainings(1.0, {"a": 4, "b": 7})
    kept = after_trainings(2.0, trainings(kept, ["a"]) | {"a": 5})
    assert trainings(kept, ["a", "b", "c"]) == {"a": 5, "b": 7, "c": -1}


def test_silos_that_arrive_together_come_in_the_federations_order():
    queue = Queue.of({}, 0, Virtual(), 0, ["b", "a", "c"], [1, 1, 1])
    assert [one.silo for one in queue.take(3, 0.0, 0, None)] == ["b", "a", "c"]
    queue.step(1)
    assert [(one.silo, one.version) for one in queue.take(3, 0.0, 1, None)] == [("b", 0), ("a", 0), ("c", 1)]


def test_times_follow_their_distributions_and_depend_on_the_silo_alone():
    clock = build(
        Virtual,
        {
            "compute": {"name": "lognormal", "median": 3.0, "sigma": 0.4},
            "speed": {"name": "uniform", "low": 1.0, "high": 2.0},
        },
    )
    drawn = np.array([[clock.seconds(7, f"s{k}", i, 10) for i in range(200)] for k in range(20)])
    factors = np.exp(np.log(drawn).mean(axis=1)) / 3.0
    assert 0.9 < factors.min() < 1.4 and 1.6 < factors.max() < 2.1
    assert np.log(drawn).std(axis=1) == pytest.approx(0.4, rel=0.2)
    assert clock.seconds(7, "s3", 5, 99) == drawn[3, 5] and clock.seconds(8, "s3", 5, 99) != drawn[3, 5]
    per_sample = replace(clock, per="sample", delay=TIMES.build({"name": "constant", "value": 0.5}, ""))
    assert per_sample.seconds(7, "s3", 5, 10) == pytest.approx(10 * drawn[3, 5] + 0.5, rel=1e-11)


def test_a_replay_finds_the_version_of_each_silos_next_update(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    rows = {
        number: [
            {
                "silo": f"s{draw.integers(4)}",
                "version": int(draw.integers(number)),
                "at_s": float(number),
                "staleness": 0,
                "training": 0,
            }
            for _ in range(draw.integers(1, 4))
        ]
        for number in range(1, 31)
    }
    records = {number: {"arrivals": of_round} for number, of_round in rows.items()}
    monkeypatch.setattr("fedmpi.rounds.clocks._records", lambda run: records)
    clock = Replay(run="an earlier run")
    for before in range(30):
        queue = Replayed(clock, before, ["s0", "s1", "s2", "s3", "s4"])
        queue.take(2, 0.0, before, None)
        later = [row for number in range(before + 2, 31) for row in rows[number] if row["version"] <= before + 1]
        wanted = {silo: {row["version"] for row in later if row["silo"] == silo} for silo in queue.ids}
        assert queue.versions == wanted


@pytest.mark.parametrize("what", ["trace", "replay"])
def test_a_file_that_changed_between_two_runs_is_read_again(tmp_path, what):
    ids = ("s0", "s1", "s2")
    if what == "trace":
        (file := tmp_path / "trace.csv").write_text("".join(f"{silo},1\n" for silo in ids))
        clock = {"name": "virtual", "compute": {"name": "trace", "file": str(file)}}
    else:
        run(config(tmp_path / "first", 2, engine=buffered(3)))
        file, clock = tmp_path / "first" / "metrics.jsonl", {"name": "replay", "run": str(tmp_path / "first")}
    how = config(tmp_path / "a", 2, engine=buffered(3, clock=clock))
    before, _ = run(how)
    if what == "trace":
        file.write_text("".join(f"{silo},7\n" for silo in ids))
    else:
        run(config(tmp_path / "other", 2, engine=buffered(3), seed=5))
        file.write_text((tmp_path / "other" / "metrics.jsonl").read_text())
    after, _ = run(replace(how, out=str(tmp_path / "b")))
    if what == "trace":
        assert [one["virtual_s"] for one in (*before, *after)] == [1.0, 2.0, 7.0, 14.0]
    else:
        wanted = [one["virtual_s"] for one in read_metrics(tmp_path / "other")]
        assert [one["virtual_s"] for one in after] == wanted != [one["virtual_s"] for one in before]


def test_a_trace_gives_each_silo_its_values_in_turn(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("silo,value\na,1.5\nb,2\na,0.5\n\n")
    clock = CLOCKS.build({"name": "virtual", "compute": {"name": "trace", "file": str(file)}}, "engine.clock")
    assert [clock.seconds(0, "a", i, 1) for i in range(3)] == [1.5, 0.5, 1.5]
    with pytest.raises(ConfigError, match=r"engine\.clock\.compute: .* has no value for silo 'c'"):
        clock.suits(["a", "b", "c"])
    for number, line in enumerate(("a,x", "a,-1", "a", "a,inf")):
        (bad := tmp_path / f"{number}.csv").write_text(f"b,1\n{line}\n")
        with pytest.raises(ConfigError, match=rf"{number}\.csv:2: not a line SILO,VALUE"):
            TIMES.build({"name": "trace", "file": str(bad)}, "").knows(["b"], "here")
    with pytest.raises(ConfigError, match=r"engine\.clock\.slower: no silo 'bb'; did you mean 'b'"):
        build(Virtual, {"slower": {"bb": 2.0}}).suits(["a", "b"])
    with pytest.raises(ConfigError, match="cannot read"):
        TIMES.build({"name": "trace", "file": str(tmp_path / "none")}, "").knows([], "")
