"""fork: a new run goes on from another run's checkpoint, with what fits, and leaves the other run alone."""

import hashlib
import json

import pytest
import torch
from support.mpi import PYTHON, mpirun
from support.runs import config, everything, figures, refused, run

from fedmpi import checkpoint
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.records import read_metrics

MOMENTUM = {"optimizer": {"name": "fedavgm", "lr": 0.5}}
KEEPS = {"keep_optimizer": True, "optimizer": {"name": "SGD", "momentum": 0.9}}


def contents(root):
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def unlocked(found):
    return {name: digest for name, digest in found.items() if name != ".lock"}


@pytest.fixture
def base(tmp_path):
    run(config(tmp_path / "base", 4, server=MOMENTUM, local=KEEPS, select={"name": "round_robin", "count": 2}))
    return tmp_path / "base"


def forked(base, name, rounds=6, at=2, reset=None, **other):
    there = f"{base}@{at}" if reset is None else {"run": str(base), "round": at, "reset": reset}
    how = {"server": MOMENTUM, "select": {"name": "round_robin", "count": 2}, **other, "fork": there}
    return config(base.parent / name, rounds, **{**how, "local": {**KEEPS, **other.get("local", {})}})


def test_a_fork_without_changes_trains_what_the_other_run_trains_and_leaves_it_alone(base):
    before = contents(base)
    records, done = run(forked(base, "new", rounds=4))
    assert [r["round"] for r in records] == [3, 4] and done.resumed == 2
    assert contents(base) == before
    assert everything(base.parent / "new") == everything(base)
    assert [figures(r) for r in read_metrics(base.parent / "new")] == [figures(r) for r in read_metrics(base)]
    told = json.loads((base.parent / "new/events.jsonl").read_text().splitlines()[0])
    assert (told["event"], told["run"], told["round"]) == ("forked", str(base), 2)
    assert f"{base}@2" in (base.parent / "new/config.yaml").read_text()


def test_a_changed_rate_keeps_all_state_and_a_restart_of_the_fork_resumes_it(base):
    """The plain run: the same as one that had the other rate from round 3 on."""
    slow = forked(base, "slow", local={"lr": 0.01})
    run(slow, rounds=1)
    records, done = run(slow)
    assert done.resumed == 3 and records[-1]["round"] == 6
    whole, _ = run(forked(base, "whole", local={"lr": 0.01}))
    assert everything(base.parent / "slow") == everything(base.parent / "whole")
    same, _ = run(forked(base, "same"))
    assert figures(whole[0]) != figures(same[0]) and whole[0]["cohort"] == same[0]["cohort"]
    kept = checkpoint.read_server(base, 2)
    name = next(key for key in kept if key[0] == "optimizer")
    assert kept[name].abs().max() > 0 and checkpoint.sealed_rounds(base.parent / "slow")[-1] == 6


def test_a_state_that_the_checkpoint_lacks_needs_the_word_too(tmp_path, capsys):
    run(config(tmp_path / "plain", 2))
    adam = {"server": {"optimizer": {"name": "fedadam", "lr": 0.01}}, "fork": f"{tmp_path / 'plain'}@2"}
    said = refused(config(tmp_path / "adam", 3, **adam))
    assert (
        "server.optimizer.name is fedavg there and fedadam here, and round 2 has no state of it; begin it anew" in said
    )
    adam["fork"] = {"run": str(tmp_path / "plain"), "round": 2, "reset": ["server"]}
    assert run(config(tmp_path / "adam", 3, **adam))[1].resumed == 2
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("fedmpi: goes on from"))
    assert told.endswith("; states that begin anew: 'server' (reset)")


def test_another_server_optimizer_needs_the_word_and_then_begins_anew(base):
    fedadam = {"server": {"optimizer": {"name": "fedadam", "lr": 0.01}}}
    said = refused(forked(base, "adam", **fedadam))
    assert "server.optimizer.name is fedavgm there and fedadam here, so the state 'server' of round 2 (" in said
    assert "reset: [server]" in said
    records, done = run(forked(base, "adam", reset=["server"], **fedadam))
    assert [r["round"] for r in records] == [3, 4, 5, 6]
    start = checkpoint.read_server(base, 2)[checkpoint.PARAMS]
    assert torch.isfinite(done.parameters).all() and not torch.equal(done.parameters, start[: len(done.parameters)])


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"local": {"name": "fedprox"}}, "silos"),
        ({"local": {"optimizer": {"name": "Adam"}}}, "silos"),
        ({"objective": {"loss": {"name": "cross_entropy", "label_smoothing": 0.1}}}, "stop"),
    ],
    ids=str,
)
def test_other_states_need_the_word_too(base, changes, part):
    assert f"the state '{part}' of round 2" in refused(forked(base, "a", **changes))
    assert [r["round"] for r in run(forked(base, "a", reset=[part], **changes))[0]] == [3, 4, 5, 6]


def test_reset_silos_begin_with_new_optimizers_where_they_were_in_their_data(base):
    """Momentum is gone: round 3 of the fork is that of silos that kept none, from the same parameters and cursors."""
    (anew, *_), _ = run(forked(base, "anew", rounds=3, reset=["silos"]))
    (kept, *_), _ = run(forked(base, "kept", rounds=3))
    plain = {**KEEPS, "keep_optimizer": False}
    (without, *_), _ = run(forked(base, "without", rounds=3, reset=["silos"], local=plain))
    assert anew["silos"] != kept["silos"]
    assert {s: row["delta_norm"] for s, row in anew["silos"].items() if "delta_norm" in row} == {
        s: row["delta_norm"] for s, row in without["silos"].items() if "delta_norm" in row
    }


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"model": "mlp"}, "model.name is logistic there and mlp here"),
        ({"data": {"sizes": [20, 30, 51]}}, "data.sizes"),
        (
            {"engine": {"name": "buffered", "size": 2, "clock": "virtual"}, "select": "all"},
            "engine.name is synchronous there and buffered here",
        ),
        ({"exchange": {"parameters": "trainable"}}, "exchange.parameters"),
        ({"server": {**MOMENTUM, "average": {"decay": 0.5}}}, "server.average"),
        ({"at": 3}, "has no checkpoint of round 3; it has those of 2, 4"),
        ({"name": "base"}, "is the run's own directory; choose another out="),
    ],
    ids=str,
)
def test_what_a_fork_cannot_change_is_refused_and_leaves_nothing_in_the_way(base, how, message):
    before = contents(base)
    how = dict(how)
    name, at = how.pop("name", "bad"), how.pop("at", 2)
    assert message in refused(forked(base, name, at=at, **how))
    if name == "bad":
        assert unlocked(contents(base)) == unlocked(before)
        assert run(forked(base, "bad", rounds=5, at=4))[1].resumed == 4  # another round, in the same directory
        refused(forked(base, "bad-too", at=at, **how))
        assert [r["round"] for r in run(config(base.parent / "bad-too", 1))[0]] == [1]  # without `fork`, from the start


def test_a_fork_of_a_run_that_has_ended_here_says_how_it_goes_on(tmp_path):
    early = {"stop": {"early": {"metric": "loss", "target": 9.0}}}
    assert [r["round"] for r in run(config(tmp_path / "base", 9, **early))[0]] == [1]
    how = {"fork": f"{tmp_path / 'base'}@1"}
    said = refused(config(tmp_path / "a", 3, **early, **how))
    assert said.startswith("fork: the other run has ended here: loss is") and "fork.reset: [stop]" in said
    assert [r["round"] for r in run(config(tmp_path / "a", 3, **how))[0]] == [2, 3]
    again = {"fork": {"run": str(tmp_path / "base"), "round": 1, "reset": ["stop"]}}
    assert [r["round"] for r in run(config(tmp_path / "b", 3, **early, **again))[0]] == [2]


POISSON = {"select": {"name": "poisson", "rate": 1}}
PRIVATE = {"privacy": {"name": "silo", "clip": 1.0, "sigma": 1.0, "delta": 1e-5}, **POISSON}


@pytest.mark.parametrize(
    ("fork", "values", "message"),
    [
        ("runs/base", {}, "'runs/base' names no checkpoint; write RUN@ROUND"),
        ("runs/base@0", {}, "names no checkpoint"),
        ({"run": "a", "round": 1, "reset": ["model"]}, {}, "fork.reset.0"),
        ("a@20", {}, "rounds is 20, and the fork begins after round 20"),
        ("a@1", {"transport": {"name": "files", "root": "x"}}, "transport: files"),
        ("a@1", PRIVATE, "fork: privacy"),
        (
            {"run": "a", "round": 1, "reset": ["silos"]},
            {"engine": {"name": "buffered", "size": 2}},
            "fork.reset: silos",
        ),
        ("a@1", {"secure": {"name": "secagg", "threshold": 3}}, "fork: secure"),
    ],
)
def test_configurations_that_cannot_begin_as_a_fork(fork, values, message):
    with pytest.raises(ConfigError) as caught:
        build(Config, {"fork": fork, **values})
    assert message in str(caught.value) and "\n" not in str(caught.value)


PROGRAM = """
import sys
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.flat import sha256
from fedmpi.train import Run
values = {"rounds": int(sys.argv[2]), "out": sys.argv[1], "data": {"name": "digits", "silos": 4}, "model": "logistic",
          "local": {"name": "sgd", "lr": float(sys.argv[4]), "epochs": 1}, "exchange": {"reduction": "reproducible"},
          "checkpoint": {"every": 1}, "fork": sys.argv[3] or None}
with Run(build(Config, values)) as run:
    records = list(run)
if run.comm.rank == 0:
    print("bits", len(records), sha256(run.parameters))
"""


@pytest.mark.mpi
def test_a_fork_may_have_other_ranks(tmp_path):
    def bits(n, *arguments):
        done = mpirun(n, PYTHON, "-c", PROGRAM, *arguments, timeout_s=120)
        assert done.rc == 0, done.tails
        return next(line for line in done.out.splitlines() if line.startswith("bits"))

    bits(2, str(tmp_path / "base"), "2", "", "0.1")
    found = {bits(n, str(tmp_path / f"fork-{n}"), "3", f"{tmp_path}/base@1", "0.02") for n in (1, 2)}
    assert len(found) == 1 and found.pop().startswith("bits 2 ")
