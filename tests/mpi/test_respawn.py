"""Fresh ranks in place of lost ones: they join between two rounds, and the bits are those of an undisturbed run."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from support.mpi import ENVIRONMENT, FEDMPI, PROGRAMS, PYTHON, Done, launcher, mpirun, until
from support.runs import run

from fedmpi.config import load
from fedmpi.flat import sha256
from fedmpi.records import read_metrics
from fedmpi.results import inspect

ROOT = Path(__file__).parents[2]
PROGRAM = str(PROGRAMS / "respawn.py")
SETTINGS = ("rounds=24", "exchange.reduction=reproducible", "local.epochs=1", "device.name=cpu")


def launch(n: int, out: Path, deaths: str, what: str, *overrides: str) -> tuple[Done, list[dict], list[dict]]:
    if "--oversubscribe" not in launcher():
        pytest.skip("asks Open MPI's mpirun for --with-ft ulfm")
    words = (PYTHON, PROGRAM, str(out), deaths, what, *SETTINGS, *overrides)
    done = mpirun(n, "--with-ft", "ulfm", *words, cwd=ROOT, timeout_s=150)
    rows = [json.loads(line) for line in done.out.splitlines() if line[:1] == "{"]
    return done, rows, events(out)


def events(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def undisturbed(out: Path, *overrides: str) -> str:
    config = load(str(ROOT / "configs" / "digits.yaml"), [f"out={out}", *SETTINGS, *overrides])[0]
    return sha256(run(config)[1].parameters)


BUFFERED = "engine={name: buffered, size: 3, clock: {name: virtual}}"
CASES = {  # ranks, deaths, what else, options, ranks at the end
    "one": (3, "1:2", "nothing", ["server.optimizer=fedadam", "engine={name: synchronous, clock: {name: virtual}}"], 3),
    "server": (3, "0:2,2:14", "nothing", ["exchange.plan=sharded", "server.optimizer=fedadam"], 3),
    "two": (4, "1:2,2:2", "nothing", ["local={name: scaffold, lr: 0.05, epochs: 1}"], 4),
    "last": (2, "0:2", "nothing", ["exchange.scope=silo", "exchange.up={codec: int8, feedback: true}"], 2),
    "meanwhile": (4, "1:2,0:3", "nothing", [BUFFERED, "exchange.reduction=fast"], 4),
    "dies": (3, "1:2", "dies", [], 3),
    "joins": (3, "2:2", "joins", [], 3),
    "first": (3, "1:2", "first", ["comm={grace_s: 100}"], 3),
    "differs": (2, "1:2", "differs", ["comm={grace_s: 100}"], 1),
}


@pytest.mark.parametrize("case", CASES)
def test_fresh_ranks_take_the_place_of_lost_ones(case, tmp_path):
    n, deaths, what, overrides, left = CASES[case]
    done, rows, told = launch(n, tmp_path / "died", deaths, what, *overrides)
    assert len(rows) == 1 and rows[0]["size"] == left, done.tails
    assert rows[0]["sha256"] == undisturbed(tmp_path / "whole", *overrides), done.tails
    assert [record["round"] for record in read_metrics(tmp_path / "died")] == list(range(1, 25))
    joined = [event for event in told if event["event"] == "joined"]
    assert [event["num_ranks"] for event in joined][-1:] == ([left] if what != "differs" else []), done.tails
    assert sum(len(event["ranks"]) for event in told if event["event"] == "lost") >= deaths.count(":")
    if what == "dies":
        assert "a fresh rank has died; another is started" in done.err, done.tails
    if what == "first":
        assert "a fresh rank has died before its first round" in done.err, done.tails
    if what == "differs":
        assert "the configuration differs" in done.err, done.tails


def test_an_error_of_a_fresh_rank_ends_all(tmp_path):
    done, rows, _ = launch(3, tmp_path / "out", "1:2", "raises")
    assert rows == [] and "LookupError: odd" in done.err and done.rc and done.seconds < 60, done.tails


def test_the_command_runs_again_on_the_fresh_rank_and_its_supervisor_says_how_it_ended(tmp_path):
    out = tmp_path / "out"
    long = ("rounds=14", "local.epochs=60")  # a fresh rank takes seconds to start
    settings = (*SETTINGS, *long, f"out={out}", "on_failure=respawn")
    words = [FEDMPI, "run", str(ROOT / "configs" / "digits.yaml"), *settings, "--", *launcher(), "--with-ft", "ulfm"]
    with subprocess.Popen([*words, "-n", "3"], env={**os.environ, **ENVIRONMENT}, cwd=tmp_path) as supervisor:
        try:
            until(lambda: len(read_metrics(out)) > 1 if (out / "metrics.jsonl").exists() else False, 60)
            os.kill(json.loads((out / "ranks.json").read_text())[1]["pid"], signal.SIGKILL)
            assert supervisor.wait(150) == 0
        finally:
            supervisor.terminate()
    assert [event["event"] for event in events(out)] == ["lost", "joined"]
    assert not (out / "supervisor.jsonl").exists() or "restarted" not in (out / "supervisor.jsonl").read_text()
    assert inspect(out)["params_sha256"] == undisturbed(tmp_path / "whole", *long)
