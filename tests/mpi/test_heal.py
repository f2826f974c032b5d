"""Ranks that die at any point of a run, and the continued run: no batch is lost, and all bits are the same."""

import json
import re
from pathlib import Path

import pytest
from support import traces
from support.mpi import PROGRAMS, PYTHON, Done, launcher, mpirun
from support.runs import run

from fedmpi import requests, results, roster
from fedmpi.checkpoint import sealed_rounds
from fedmpi.config import load
from fedmpi.errors import ConfigError
from fedmpi.flat import sha256
from fedmpi.privacy import Use, epsilon
from fedmpi.records import read_metrics

ROOT = Path(__file__).parents[2]
PROGRAM = str(PROGRAMS / "heal.py")
ROUNDS = ("rounds=10", "exchange.reduction=reproducible", "local.epochs=1", "checkpoint.every=2", "device.name=cpu")


def launch(n: int, out: Path, deaths: str, *overrides: str) -> tuple[Done, list[dict]]:
    if "--oversubscribe" not in launcher():
        pytest.skip("asks Open MPI's mpirun for --with-ft ulfm")
    done = mpirun(
        n, "--with-ft", "ulfm", PYTHON, PROGRAM, str(out), deaths, *ROUNDS, *overrides, cwd=ROOT, timeout_s=150
    )
    return done, [json.loads(line) for line in done.out.splitlines() if line[:1] == "{"]


ADAM = ["server.optimizer=fedadam"]
CASES = {
    # deaths in different phases, also of rank 0, two at once, and one during recovery from another
    "sharded": (5, "2:2:train,0:5:exchange,3:7:evaluate", ["exchange.plan=sharded", *ADAM, "checkpoint.every=5"]),
    "shared": (
        5,
        "4:2:ready,1:4:step,2:11:away",
        ["exchange.plan=shared_memory", "server.optimizer=fedadam"],
    ),
    "feedback": (
        5,
        "1:3:mirror,4:4:stop,3:6:tell,0:11:end",
        ["exchange.scope=silo", "exchange.up={codec: int8, feedback: true}", "exchange.plan=sharded"],
    ),
    "kept": (
        4,
        "0:3:tell,2:6:write",
        ["local={name: scaffold, lr: 0.05, epochs: 1}", "engine={name: synchronous, clock: {name: virtual}}"],
    ),
    "buffered": (
        3,
        "1:3:mirror,0:6:tell",
        ["engine={name: buffered, size: 3, clock: {name: virtual}}", "exchange.reduction=fast"],
    ),
    "alone": (2, "1:3:train", []),
    "again": (5, "1:3:train,2:3:shrink,3:3:late,0:3:apart,4:3:take", ["exchange.plan=sharded", *ADAM]),
    # one is left, without the state of a silo: back to the newest checkpoint
    "at_once": (5, "0:4:train,1:4:train,2:4:train,3:4:heal", ["exchange.plan=root"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_whose_ranks_die_ends_with_the_bits_of_one_whose_ranks_do_not(case, tmp_path):
    n, deaths, overrides = CASES[case]
    done, rows = launch(n, tmp_path / "died", deaths, *overrides)
    assert len(rows) == 1, done.tails
    (row,) = rows
    config = load(str(ROOT / "configs" / "digits.yaml"), [f"out={tmp_path / 'whole'}", *ROUNDS, *overrides])[0]
    records, whole = run(config)
    dead = {
        int(death.partition(":")[0]) for death in deaths.split(",") if not death.endswith(("late", "apart", "stop"))
    }
    left = [rank for rank in range(n) if rank not in dead or f"{rank}:11:away" in deaths]
    assert row["ranks"] == len(left), done.tails
    assert row["seen"] == list(range(1, 11))
    assert row["sha256"] == sha256(whole.parameters), done.tails
    told = read_metrics(tmp_path / "died")
    assert [record["round"] for record in told] == row["seen"]
    samples = [
        [sum(s.get("num_samples", 0) for s in record["silos"].values()) for record in some] for some in (told, records)
    ]
    assert samples[0] == samples[1]  # no batch is lost
    assert sealed_rounds(tmp_path / "died")[-1] == 10
    assert sealed_rounds(tmp_path / "died", best=True) == [3]
    assert results.evaluate(tmp_path / "died", 3)["loss"] == pytest.approx(records[2]["loss"])
    traced = traces.events(tmp_path / "died" / "trace.json")
    traces.sound(traced)
    assert {event["args"]["round"] for event in traces.slices(traced)} == set(range(1, 11))
    events = [json.loads(line) for line in (tmp_path / "died" / "events.jsonl").read_text().splitlines()]
    assert sum(len(event["ranks"]) for event in events) == len(dead)
    assert case != "at_once" or [event["round"] < 3 for event in events] == [True], events


def test_the_account_of_privacy_is_never_less_after_lost_ranks(tmp_path):
    section = "privacy={name: silo, clip: 0.5, sigma: 2, delta: 1e-3}"
    deaths = "0:3:step,2:5:tell"  # rank 0, which writes the account, dies once round 3 is counted
    done, rows = launch(
        4,
        tmp_path / "out",
        deaths,
        "rounds=6",
        "aggregate={name: mean, weights: uniform}",
        section,
        "exchange.plan=root",
    )
    assert len(rows) == 1, done.tails
    (use,) = json.loads((tmp_path / "out" / "privacy.json").read_text())["uses"]
    assert use["count"] >= 7  # round 3 was trained twice
    for record in read_metrics(tmp_path / "out"):
        happened = record["round"] + (record["round"] >= 3)
        assert record["epsilon"] >= epsilon({Use(2.0): happened}, 1e-3) * (1 - 1e-9)


def test_silos_of_a_lost_rank_leave_where_they_are_not_to_be_taken_over(tmp_path):
    select = "select={name: uniform, count: 4}"  # of 4 silos, and then of 3
    done, rows = launch(3, tmp_path / "out", "1:3:train", "on_failure=continue", select)
    assert len(rows) == 1, done.tails
    (event,) = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    (gone,) = event["silos"]
    assert event["silos"] == {gone: None} and event["ranks"] == [1] and event["round"] == 2
    records = read_metrics(tmp_path / "out")
    assert [gone in record["silos"] for record in records] == [True] * 2 + [False] * 8
    told = {row["id"]: row for row in roster.read(tmp_path / "out")["silos"]}[gone]
    assert (told["state"], told["why"], told["until"]) == ("lost", "rank 1 was lost", 2)
    assert {len(record["cohort"]) for record in records} == {4, 3}
    assert "select: count is 4, capped at the 3 silos that take part" in str(done.tails)
    assert gone not in rows[0]["silos"] and rows[0]["seen"] == list(range(1, 11))


def test_a_request_is_answered_once_if_rank_0_dies_before_it_is_marked(tmp_path):
    out = tmp_path / "out"
    (out / requests.FOLDER).mkdir(parents=True)
    for silo in ("silo-3", "silo-2"):  # the second change is under way when rank 0 dies
        requests.put(out, "retire", silo)
    done, rows = launch(3, out, "0:1:mark", "rounds=2")
    assert len(rows) == 1 and rows[0]["ranks"] == 2 and rows[0]["silos"] == ["silo-0", "silo-1"], done.tails
    assert [(one["round"], one["refused"]) for one in roster.read(out)["answers"]] == [(0, None)] * 2, done.tails
    assert not list(requests.read(out)) and len(read_metrics(out)) == 2


def test_a_lost_rank_ends_a_run_that_is_to_stop(tmp_path):
    done, rows = launch(3, tmp_path / "out", "1:4:train", "on_failure=stop", "checkpoint.every=1")
    assert rows == [] and "lost rank 1" in done.err, done.tails
    assert sealed_rounds(tmp_path / "out")[0] == 1


@pytest.mark.parametrize("part", ["exchange.overlap=true", "exchange.regions={levels: [{by: node}]}"])
def test_what_cannot_go_on_without_a_rank_says_so(part):
    with pytest.raises(ConfigError, match="on_failure: adopt cannot be combined with exchange"):
        load(str(ROOT / "configs" / "digits.yaml"), [part, "on_failure=adopt"])
    assert load(str(ROOT / "configs" / "digits.yaml"), [part])[0].heals == "stop"


HANGS = ("comm.grace_s=4", "checkpoint.every=1")


def test_a_silo_that_hangs_costs_its_rank_and_the_run_goes_on(tmp_path):
    done, rows = launch(3, tmp_path / "out", "1:3:hang", *HANGS)
    assert len(rows) == 1 and rows[0]["ranks"] == 2 and rows[0]["seen"] == list(range(1, 11)), done.tails
    assert re.search(r"rank 1 on .*: silo '.*', round 3: no batch for 4 s \(comm\.grace_s\)", done.err), done.tails
    assert "most recent call first" in done.err and "heal.py" in done.err, done.tails


def test_a_silo_that_hangs_ends_a_job_that_cannot_go_on(tmp_path):
    done = mpirun(2, PYTHON, PROGRAM, str(tmp_path / "out"), "1:3:hang", *ROUNDS, *HANGS, cwd=ROOT, timeout_s=60)
    assert done.rc == 1 and done.seconds < 45 and "no batch for 4 s" in done.err, done.tails
    assert sealed_rounds(tmp_path / "out")[-1] in (1, 2)
