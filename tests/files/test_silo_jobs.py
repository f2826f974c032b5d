"""Silos in jobs of their own, against the same run in one process."""

import errno
import json
import threading
import time
from dataclasses import replace

import pytest
import torch
from support.runs import OWN, put_back, run
from support.silojobs import IDS, Job, OneSilo, apart, in_one_process, served, trained_apart, with_a_second_job
from support.slurm import until

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.errors import ConfigError, Stopped, Superseded
from fedmpi.files import reading
from fedmpi.files.server import Server
from fedmpi.flat import sha256
from fedmpi.jobs import post
from fedmpi.jobs.post import SiloPost
from fedmpi.jobs.serve import Serving
from fedmpi.jobs.silo import SiloJob
from fedmpi.keeper import Keeper
from fedmpi.stopping import STOP

__all__ = ["put_back"]

SHARDED = {"plan": "sharded", "scope": "silo"}
CASES = {
    "plain": {},
    "adam": {"server": {"optimizer": "fedadam", "average": {}}, "evaluate": {"every": 2}},
    "clip": {"updates": [{"name": "clip", "norm": 0.1, "quantile": 0.5}, {"name": "noise", "sigma": 0.1}]},
    "drawn": {"select": {"name": "uniform", "count": 2}},
    "unbiased": {"select": {"name": "uniform", "count": 2, "weights": "inverse"}},
    "scaffold": {"local": {"name": "scaffold"}},
    "nova": {"aggregate": "fednova", "local": {"amount": "drawn", "epochs": 3}},
    "median": {"aggregate": "median", "exchange": SHARDED},
    "ring": {"exchange": {"reduction": "reproducible"}},
    "kept": {
        "model": {"name": OWN + "Normed", "dropout": 0.0},
        "local": {"name": OWN + "Keeper"},
        "exchange": {"parameters": ["base.*", "norm.*"]},
    },
    "tuned": {"evaluate": {"finetune": {"name": "sgd", "lr": 0.1, "epochs": 1}}},
    "int8": {"exchange": SHARDED | {"up": {"codec": "int8", "feedback": True}}},
    "topk": {"exchange": SHARDED | {"up": {"codec": {"name": "topk", "ratio": 0.3}, "feedback": True}}},
}


def without_times(record):
    silos = {silo: {k: v for k, v in row.items() if k != "rank"} for silo, row in record["silos"].items()}
    left_out = ("crc32", "time", "seconds", "peak_rss_bytes", "bytes_up", "bytes_down", "bytes_control", "silos")
    return {k: v for k, v in record.items() if k not in left_out} | {"silos": silos}


@pytest.mark.parametrize("case", CASES)
def test_jobs_train_to_the_bits_of_one_process(tmp_path, case):
    how = apart(tmp_path, 4, **CASES[case])
    records, there, _ = trained_apart(how)
    plain, here = run(in_one_process(how, tmp_path))
    assert sha256(there.parameters) == sha256(here.parameters)
    assert [without_times(record) for record in records] == [without_times(record) for record in plain]


def test_a_codec_with_exact_values_reaches_the_accuracy_of_one_process(tmp_path):
    more = {"model": {"name": OWN + "Normed", "dropout": 0.0}, "exchange": SHARDED | {"up": {"codec": "int8"}}}
    _, there, _ = trained_apart(apart(tmp_path, 3, **more))
    _, here = run(in_one_process(apart(tmp_path, 3, **more), tmp_path))
    torch.testing.assert_close(there.parameters, here.parameters, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- ends and starts


def killed_at(monkeypatch, place, times=1):
    """The server's job dies when it calls `place` of its folder for the first time."""
    left = [times]
    original = getattr(Server, place)

    def dies(self, *arguments, **more):
        if left[0]:
            left[0] -= 1
            raise KeyboardInterrupt(place)
        return original(self, *arguments, **more)

    monkeypatch.setattr(Server, place, dies)


@pytest.mark.parametrize("case", ["scaffold", "int8", "clip"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_server_that_dies_anywhere_goes_on_with_the_same_bits(tmp_path, monkeypatch, case, every):
    more = CASES[case] | {"checkpoint": {"every": every}}
    how = apart(tmp_path, 5, **more)
    jobs = [Job(how, silo) for silo in IDS]
    served(how, rounds=2)  # leaves as after a stop
    died = 0
    monkeypatch.setattr(Keeper, "finish", lambda self, state: None)  # nothing is saved at the end of a start
    for place in ("put", "commit", "poll", "silo_files"):
        with monkeypatch.context() as patch:
            killed_at(patch, place)
            try:
                served(how)
            except KeyboardInterrupt:
                died += 1
    assert died == 4
    monkeypatch.undo()
    _, there = served(how)
    for job in jobs:
        job.ended()
    _, here = run(in_one_process(how, tmp_path))
    assert sha256(there.parameters) == sha256(here.parameters)
    plain = [json.loads(line) for line in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [without_times(row) for row in rows] == [without_times(record) for record in plain]


class Dying(OneSilo):
    """A silo's job that dies in its second round at some point."""

    at = ""

    def _train(self, commit, call):
        if call.round != 2:
            return super()._train(commit, call)
        if self.at == "before":
            raise KeyboardInterrupt
        if self.at == "between":
            self._post.send = self._dies
        super()._train(commit, call)
        raise KeyboardInterrupt

    def _dies(self, *_):
        raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["before", "between", "after"])
@pytest.mark.parametrize("case", ["scaffold", "int8"])
def test_a_silo_that_dies_anywhere_goes_on_with_the_same_bits(tmp_path, monkeypatch, case, at):
    how = apart(tmp_path, 4, **CASES[case])
    monkeypatch.setattr(Dying, "at", at)
    there = with_a_second_job(how, Dying)
    _, here = run(in_one_process(how, tmp_path))
    assert sha256(there.parameters) == sha256(here.parameters)


def test_an_update_that_cannot_be_read_at_a_restart_still_counts(tmp_path, monkeypatch):
    how = apart(tmp_path, 3, **CASES["scaffold"])
    monkeypatch.setattr(Dying, "at", "after")
    Waiting.until.clear()
    first, jobs = Job(how, "s1", Dying), [Job(how, "s0", Waiting), Job(how, "s2")]
    original, failed = SiloPost.sent, list[str]()

    def sent(post):
        def fails_once(path):
            if path.startswith("updates") and not failed:
                failed.append(path)
                raise OSError(errno.EIO, "once")
            return read(path)

        folder, read = post._files.folder, post._files.folder.read
        folder.read = fails_once
        return original(post)

    def again():
        first.join(60)
        monkeypatch.setattr(SiloPost, "sent", sent)
        jobs.append(Job(how, "s1", Opening))

    starter = threading.Thread(target=again)
    starter.start()
    _, there = served(how)
    starter.join()
    for job in jobs:
        job.ended()
    assert failed
    _, here = run(in_one_process(how, tmp_path))
    assert sha256(there.parameters) == sha256(here.parameters)


class Waiting(OneSilo):
    """A silo's job that waits in round 2 until another job has looked for its updates."""

    until = threading.Event()

    def _train(self, commit, call):
        if call.round == 2:
            assert self.until.wait(60)
        super()._train(commit, call)


class Opening(OneSilo):
    """The job that `Waiting` waits for."""

    def _turn(self):
        Waiting.until.set()
        return super()._turn()


def test_a_damaged_update_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "DAMAGED_S", 0.3)
    monkeypatch.setattr(post, "LOST_S", 0.1)
    how = apart(tmp_path, 3, **CASES["int8"])
    jobs = [Job(how, silo, Damaging if silo == "s1" else OneSilo) for silo in IDS]
    _, there = served(how)
    for job in jobs:
        job.ended()
    assert jobs[1].job.damaged == 1
    _, here = run(in_one_process(how, tmp_path))
    assert sha256(there.parameters) == sha256(here.parameters)


class Damaging(OneSilo):
    """A silo's job whose first update in round 2 loses its last bytes."""

    damaged = 0

    def _train(self, commit, call):
        folder, original = self._post._files.folder, self._post._files.folder.create

        def create(path, parts):
            if path.startswith("updates") and call.round == 2 and not self.damaged:
                self.damaged += 1
                parts = [*parts[:-1], parts[-1][:-5]]
            original(path, parts)

        folder.create = create
        super()._train(commit, call)


def test_a_second_job_of_a_silo_ends_the_first(tmp_path):
    how = apart(tmp_path, 3, transport={"lease_s": 2})
    first, jobs = Job(how, "s1"), [Job(how, "s0")]
    time.sleep(1)
    jobs.append(Job(how, "s1"))
    first.join(30)
    assert isinstance(first.error, Superseded)
    jobs.append(Job(how, "s2"))
    served(how)
    for job in jobs:
        job.ended()


def test_a_silo_without_its_state_is_refused(tmp_path):
    how = apart(tmp_path, 4, **CASES["scaffold"])
    jobs = [Job(how, silo) for silo in IDS]
    served(how, rounds=2)
    with pytest.raises(ConfigError, match=r"silo 's1' has trained 1 times, .* start it with the out= that it had"):
        SiloJob(replace(how, out=str(tmp_path / "elsewhere")), "s1").run()
    jobs[1].join(30)
    jobs[1] = Job(how, "s1")
    served(how)
    for job in (jobs[0], *jobs[1:]):
        job.ended()


def test_a_second_server_is_refused(tmp_path):
    how = apart(tmp_path, 3, transport={"lease_s": 2})
    jobs = [Job(how, silo) for silo in IDS]
    with Serving(how) as run:
        records = iter(run)
        next(records)
        with pytest.raises(ConfigError, match="another server"):
            Serving(replace(how, out=str(tmp_path / "second")))
        assert len([*records]) == 2
    for job in jobs:
        job.ended()


def test_a_late_silo_is_dropped_and_goes_on(tmp_path):
    policy = {"name": "deadline", "deadline_s": 1.0, "late": "drop", "min_silos": 2}
    how = apart(tmp_path, 6, engine={"name": "synchronous", "policy": policy}, **CASES["scaffold"])
    jobs = [Job(how, silo, Slow if silo == "s1" else OneSilo) for silo in IDS]
    records, _ = served(how)
    for job in jobs:
        job.ended()
    late = [record["late"] for record in records]
    assert late[0] == {} and {"s1": "dropped"} in late[1:] and late[-1] == {}


class Slow(OneSilo):
    """A silo's job that takes long in round 2."""

    def _train(self, commit, call):
        if call.round == 2:
            time.sleep(2.5)
        super()._train(commit, call)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "more, why",
    [
        ({"disclose": "pooled"}, "transport: files sends each silo's update by itself"),
        ({"exchange": {"overlap": True}}, "transport: files does not go with exchange.overlap"),
        ({"exchange": {"fragments": 2}}, "transport: files does not go with exchange.fragments"),
        ({"exchange": SHARDED | {"down": {"codec": "int8"}}}, "transport: files does not go with exchange.down.codec"),
        ({"engine": {"name": "synchronous", "policy": "deadline"}}, "take late: drop"),
        ({"engine": {"name": "synchronous", "clock": "virtual"}}, "transport: files runs in real time"),
        ({"select": {"name": "power_of_choice", "count": 1, "num_candidates": 2}}, "asks silos for losses"),
        ({"on_failure": "adopt"}, "transport: files has no ranks to lose"),
    ],
)
def test_what_does_not_go_with_files_is_refused_in_one_line(tmp_path, more, why):
    with pytest.raises(ConfigError, match=why) as caught:
        apart(tmp_path, **more)
    assert "\n" not in str(caught.value)


def test_jobs_of_another_configuration_are_refused(tmp_path, capsys):
    how = apart(tmp_path, 2)
    jobs = [Job(how, silo) for silo in IDS]
    until(lambda: (tmp_path / "run-share" / "run").exists(), 60)
    with pytest.raises(ConfigError, match=r"belongs to another run: its local.lr is 0.1, here it is 0.2"):
        SiloJob(replace(how, local=replace(how.local, lr=0.2)), "s0").run()
    with pytest.raises(ConfigError, match=r"no silo 's9'; available: s0"):
        SiloJob(how, "s9").run()
    assert not (tmp_path / "run" / "silos" / "s9").exists()
    with pytest.raises(ConfigError, match=r"takes `fedmpi serve CONFIG` and `fedmpi silo CONFIG --id ID`"):
        fedmpi.Run(how, comm=SoloComm())
    with pytest.raises(ConfigError, match=r"needs transport: {name: files"):
        SiloJob(in_one_process(how, tmp_path), "s0")
    served(how)
    for job in jobs:
        job.ended()
    said = ""

    def waits():
        nonlocal said
        said += capsys.readouterr().out
        return "waits for the server to start again; the last one had rounds is 2 there and 1 here" in said

    late = Job(replace(how, rounds=1), "s0")  # a server with one round may still come
    until(waits, 60)
    late.job._spec.watch.tell(STOP, "end")
    with pytest.raises(Stopped):
        late.ended()
