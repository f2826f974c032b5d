"""Asynchronous rounds of silos in jobs of their own, against a replay of their arrivals in one process."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.runs import put_back, run
from support.silojobs import IDS, Job, OneSilo, apart, in_one_process, served, trained_apart, with_a_second_job
from support.slurm import until

from fedmpi.errors import ConfigError
from fedmpi.files import names, reading
from fedmpi.files.envelope import unpacked
from fedmpi.files.server import Server
from fedmpi.flat import sha256
from fedmpi.keeper import Keeper
from fedmpi.rounds.clocks import Replay

__all__ = ["put_back"]

CASES = {
    "fedasync": {"engine": {"name": "buffered", "size": 1}},
    "fedbuff": {"engine": {"name": "buffered", "size": 2, "max_staleness": 1}, "server": {"optimizer": "fedadam"}},
    "codec": {
        "engine": {"name": "buffered", "size": 2},
        "exchange": {"up": {"codec": "int8", "feedback": True}},
        "local": {"name": "scaffold"},
    },
    "median": {"engine": {"name": "buffered", "size": 3}, "aggregate": "median"},
    "trimmed": {
        "engine": {"name": "buffered", "size": 4, "max_staleness": 6},
        "aggregate": {"name": "trimmed_mean", "fraction": 0.25},
        "exchange": {"up": {"codec": {"name": "topk", "ratio": 0.3}, "feedback": True}},
    },
    "krum": {
        "engine": {"name": "buffered", "size": 5},
        "aggregate": {"name": "krum", "hostile": 1},
        "exchange": {"up": {"codec": "sign", "feedback": True}},
    },
    "centre": {
        "engine": {"name": "buffered", "size": 2},
        "aggregate": {"name": "centered_clipping", "tau": 0.5},
        "exchange": {"up": {"codec": "int8", "feedback": True}},
    },
}


def replayed(how, tmp_path):
    """The parameters of the run's arrivals in one process."""
    engine = replace(how.engine, clock=Replay(run=how.out))
    return run(replace(in_one_process(how, tmp_path), engine=engine))[1].parameters


@pytest.mark.parametrize("case", CASES)
def test_a_replay_in_one_process_has_the_bits_of_the_jobs(tmp_path, case):
    how = apart(tmp_path, 8, **CASES[case])
    records, there, _ = trained_apart(how)
    assert sum(not one.get("dropped") for record in records for one in record["arrivals"]) >= 8
    assert "accuracy" in records[-1] and set(records[-1]["silos"]) == set(IDS)
    assert set(records[-1]["scored"]["versions"]) == set(IDS) and 0 <= records[-1]["scored"]["accuracy"] <= 1
    assert sha256(replayed(how, tmp_path)) == sha256(there.parameters)


@pytest.mark.parametrize("case", ["fedbuff", "codec", "centre"])
def test_a_server_that_dies_takes_the_same_arrivals_again(tmp_path, monkeypatch, case):
    how = apart(tmp_path, 9, checkpoint={"every": 4}, **CASES[case])
    jobs = [Job(how, silo) for silo in IDS]
    monkeypatch.setattr(Keeper, "finish", lambda self, state: None)
    died = 0
    for place, number in (("commit", 3), ("put", 2), ("poll", 4), ("commit", 2)):
        with monkeypatch.context() as patch:
            dies_at(patch, place, number)
            try:
                served(how)
            except KeyboardInterrupt:
                died += 1
    assert died == 4
    monkeypatch.undo()
    _, there = served(how)
    for job in jobs:
        job.ended()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(1, 10))
    trainings = [(one["silo"], one["training"]) for row in rows for one in row["arrivals"]]
    assert len(set(trainings)) == len(trainings)
    for silo in IDS:  # none is lost, none counts twice
        numbers = [number for name, number in trainings if name == silo]
        assert numbers == list(range(len(numbers)))
    assert sha256(replayed(how, tmp_path)) == sha256(there.parameters)


@pytest.mark.parametrize("gone", ["damaged", "removed"])
def test_an_update_that_is_damaged_in_the_buffer_is_dropped_with_all_that_was_made_from_it(
    tmp_path, monkeypatch, capsys, gone
):
    """The server dies before its third commit. An update that its silo believes to be in the buffer is lost meanwhile,
    so the silo has to go back to its control variate and its codec's residual before it."""
    monkeypatch.setattr(reading, "DAMAGED_S", 0.5)
    how = apart(tmp_path, 9, **CASES["codec"] | {"engine": {"name": "buffered", "size": 4}})
    jobs = [Job(how, silo) for silo in IDS]
    monkeypatch.setattr(Keeper, "finish", lambda self, state: None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies_at(patch, "commit", 4)
        served(how)
    root = tmp_path / "run-share"
    beat = max(root.glob("beats/@.*"))
    silo, number, by, counts = unpacked(beat.read_bytes()).head["about"]["buffer"][0]
    assert counts
    until(lambda: len([*root.glob(f"updates/{silo}.*")]) > 1, 20)  # the silo has gone on from it
    (path := root / names.path("updates", silo, number, by)).unlink()
    if gone == "damaged":
        path.write_bytes(b"damaged")
    monkeypatch.undo()
    monkeypatch.setattr(reading, "DAMAGED_S", 0.5)
    records, there = served(how)
    for job in jobs:
        job.ended()
    told = capsys.readouterr()
    assert f"fedmpi: update {number} of silo '{silo}' was damaged before its commit: it is dropped" in told.err
    assert f"update {number} does not count after all" in told.out or "does not count after all" in told.out
    dropped = [one for record in records for one in record["arrivals"] if one.get("dropped")]
    assert [one["training"] for one in dropped if one["silo"] == silo][:2] == [number, number + 1]
    assert sha256(replayed(how, tmp_path)) == sha256(there.parameters)


def dies_at(monkeypatch, place, number):
    """The server's job dies at this call of `place`."""
    calls, original = [0], getattr(Server, place)

    def dies(self, *arguments, **more):
        calls[0] += 1
        if calls[0] == number:
            raise KeyboardInterrupt(place)
        return original(self, *arguments, **more)

    monkeypatch.setattr(Server, place, dies)


class Dying(OneSilo):
    """A silo's job that dies in its third training, after it has written its state."""

    def _train_at_once(self, commit):
        if self._answered >= 1 or self._post.last().number >= 1:
            self._post.send = self._dies
        super()._train_at_once(commit)

    def _dies(self, *_):
        raise KeyboardInterrupt


def test_a_silo_that_dies_goes_on_from_what_counts(tmp_path):
    how = apart(tmp_path, 12, **CASES["codec"])
    there = with_a_second_job(how, Dying)
    assert sha256(replayed(how, tmp_path)) == sha256(there.parameters)


def test_what_follows_earlier_rounds_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="in real time takes no updates"):
        apart(tmp_path, updates=[{"name": "clip", "norm": 1.0, "quantile": 0.5}], **CASES["fedasync"])


def experiment(name):
    """A module of jobs/experiments."""
    path = Path(__file__).parents[2] / f"jobs/experiments/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for its dataclasses and annotations
    spec.loader.exec_module(module)
    return module


def test_queue_delays_compares_the_engines(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["queue_delays.py", "--quick"])
    experiment("queue_delays").main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["sigma"] == 0.4 and told["reached"] >= told["accuracy"] and told["rounds"] == 3


def test_a_killed_server_is_started_again(tmp_path):
    told = experiment("kill_serve").experiment(tmp_path, 1, 10, "buffered")
    assert told["kills"] == 1 and told["exit_codes"] == [0, 0, 0, 0] and told["rounds"] == 10
    assert told["same_bits"] and not told["counted_twice"]
