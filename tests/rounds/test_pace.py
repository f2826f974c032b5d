"""What `fedmpi plan` says of engines: against closed forms where all times are constant, and against runs."""

import json
from typing import Any

import numpy as np
import pytest
from support.runs import OWN, config, put_back, run
from typer.testing import CliRunner

from fedmpi.cli import app
from fedmpi.errors import ConfigError
from fedmpi.plan import plan

__all__ = ["put_back"]

SECONDS = {"s0": 1.0, "s1": 2.0, "s2": 3.0, "s3": 10.0}
DATA = {"name": OWN + "Blobs", "sizes": (20, 20, 20, 20), "declared": 20}


def told(out: Any, engine: Any, speeds: Any = None, **more: Any) -> list[dict[str, Any]]:
    found = plan(config(out, 9, DATA, engine=engine, **more), {}, 1, speeds)["engines"]
    assert found is not None
    return found


def virtual(**clock: Any) -> dict[str, Any]:
    return {"name": "virtual", "slower": SECONDS} | clock


def test_constant_times_give_the_closed_forms(tmp_path):
    by_name = {row["engine"]: row for row in told(tmp_path, {"name": "synchronous", "clock": virtual()})}
    same, late, one, two = by_name.values()
    assert [*by_name] == ["synchronous", "deadline 2 x median, partial", "buffered, size 1", "buffered, size 2"]
    assert same["rounds_per_hour"] == pytest.approx(360) and same["updates_per_hour"] == pytest.approx(4 * 360)
    assert same["waiting"] == pytest.approx(1 - 16 / 40) and same["dropped"] == same["max_staleness"] == 0
    # Median 2.5 s: the deadline is 5 s, from the second round on.
    assert late["rounds_per_hour"] == pytest.approx(720, rel=0.05)
    assert late["waiting"] == pytest.approx(1 - (1 + 2 + 3 + 5) / 20, abs=0.02)
    rate = sum(1 / seconds for seconds in SECONDS.values())
    for row, size in ((one, 1), (two, 2)):
        assert row["updates_per_hour"] == pytest.approx(3600 * rate, rel=0.03)
        assert row["rounds_per_hour"] == pytest.approx(3600 * rate / size, rel=0.03)
        assert row["waiting"] == pytest.approx(0, abs=0.01) and row["dropped"] == 0
    # With size 1, updates of the others arrive between two of a silo: per update the mean over silos, weighted by rate.
    stale = sum((seconds * rate - 1) / seconds for seconds in SECONDS.values()) / rate
    assert one["mean_staleness"] == pytest.approx(stale, rel=0.03) and one["max_staleness"] >= 10 * (rate - 0.1) - 1


def test_a_deadline_drops_or_keeps_late_work(tmp_path):
    for late, updates, dropped, stale in (("drop", 2, 2 * 2.5 / 10, 0), ("partial", 4, 0, 0), ("buffer", 4, 0, 0.5)):
        policy = {"name": "deadline", "deadline_s": 2.5, "late": late}
        row = told(tmp_path, {"name": "synchronous", "policy": policy, "clock": virtual()})[1]
        assert row["engine"] == f"deadline 2.5 s, {late}" and row["rounds_per_hour"] == pytest.approx(3600 / 2.5)
        assert row["updates_per_hour"] == pytest.approx(updates * 3600 / 2.5)
        assert row["dropped"] == pytest.approx(dropped) and row["mean_staleness"] == stale
        assert row["waiting"] == pytest.approx((1.5 + 0.5) / 10)
    policy |= {"min_silos": 3, "too_few": "repeat", "late": "drop"}
    row = told(tmp_path, {"name": "synchronous", "policy": policy, "clock": virtual()})[1]
    assert row["rounds_per_hour"] == pytest.approx(3600 / 7.5)  # 2.5 s in vain, then 5 s
    row = told(tmp_path, {"name": "synchronous", "policy": policy | {"too_few": "wait"}, "clock": virtual()})[1]
    assert row["rounds_per_hour"] == pytest.approx(3600 / 3)


def test_it_is_the_pace_of_a_run(tmp_path):
    clock = virtual(compute={"name": "lognormal", "sigma": 0.5}, delay={"name": "constant", "value": 0.2})
    engine = {"name": "buffered", "size": 2, "max_staleness": 4, "clock": clock}
    row = told(tmp_path / "a", engine)[-1]
    records, _ = run(config(tmp_path / "b", 100, DATA, engine=engine))
    arrivals = [one for record in records for one in record["arrivals"]]
    stale = [one["staleness"] for one in arrivals if not one.get("dropped")]
    assert row["rounds_per_hour"] == pytest.approx(3600 * 100 / records[-1]["virtual_s"], rel=0.1)
    assert row["mean_staleness"] == pytest.approx(np.mean(stale), rel=0.15) and row["max_staleness"] == 4
    assert row["dropped"] > 0.1  # the slow silo


def test_speeds_are_measured_ones(tmp_path):
    (file := tmp_path / "speeds.csv").write_text("".join(f"{silo},{s}\n" for silo, s in SECONDS.items()))
    given = told(tmp_path / "a", "synchronous", file)
    assert given == told(tmp_path / "a", {"name": "synchronous", "clock": virtual()})
    run(config(tmp_path / "run", 60, DATA, engine={"name": "buffered", "clock": virtual()}))
    assert told(tmp_path / "a", "synchronous", tmp_path / "run")[0]["rounds_per_hour"] == pytest.approx(360)
    file.write_text("s0,1\n")
    with pytest.raises(ConfigError, match=r"--speeds: .* has no value for silo 's1'"):
        told(tmp_path / "a", "synchronous", file)
    with pytest.raises(ConfigError, match="have no arrival of silo 's0'"):
        told(tmp_path / "a", "synchronous", tmp_path)
    assert plan(config(tmp_path / "a", 9, DATA), {}, 1)["engines"] is None


def test_it_tells_how_much_silos_do_that_follow_their_delays(tmp_path):
    """A training of 10 steps takes 1, 2, 3 and 10 seconds, and transfers a second: with 4 seconds there are 3 left."""
    amount = {"name": "by_delay", "budget_s": 4.0}
    local = {"epochs": None, "steps": 10, "amount": amount}
    clock = virtual(delay={"name": "constant", "value": 1.0})
    how = config(tmp_path / "a", 40, DATA, engine={"name": "buffered", "clock": clock}, local=local)
    found = plan(how, {}, 1)
    assert {silo: one["amount"] for silo, one in found["amounts"].items()} == {"s0": 10, "s1": 10, "s2": 10, "s3": 3}
    assert [one["scale"] for one in found["amounts"].values()] == pytest.approx([0.3, 0.3, 0.3, 1.0])
    one = found["engines"][-1]
    assert one["updates_per_hour"] == pytest.approx(3600 * (1 / 2 + 1 / 3 + 1 / 4 + 1 / 4), rel=0.03)
    records, _ = run(how)
    told = {row["silo"]: row["amount"] for record in records for row in record["arrivals"]}
    assert told == {silo: one["amount"] for silo, one in found["amounts"].items()}
    again = plan(how, {}, 1, tmp_path / "a")["amounts"]  # measured in that run, with other amounts at first
    assert {silo: one["amount"] for silo, one in again.items()} == told
    assert plan(config(tmp_path / "b", 9, DATA, engine={"name": "buffered", "clock": clock}), {}, 1)["amounts"] is None


def test_the_command_prints_a_table(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "rounds: 2\nmodel: logistic\nlocal: {name: sgd, lr: 0.1, steps: 1}\n"
        f"data: {json.dumps({'name': 'digits', 'silos': 4})}\n"
    )
    speeds = tmp_path / "speeds.csv"
    speeds.write_text("".join(f"silo-{k},{k + 1}\n" for k in range(4)))
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / "a.yaml"), "--speeds", str(speeds)])
    assert shown.exit_code == 0, shown.output
    line = next(line for line in shown.output.splitlines() if "synchronous" in line and "engine" not in line)
    assert "900" in line and "3600" in line and "38%" in line
    asked = ["plan", str(tmp_path / "a.yaml"), "--speeds", str(speeds), "local.amount={name: by_delay, budget_s: 2}"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0 and "by_delay, once delays are known: silo-0 1 (lr x 1)" in shown.output, shown.output
