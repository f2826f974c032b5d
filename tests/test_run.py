"""Whole runs in this process, on one rank: against the plain reference, broken off, resumed, refused, diverged."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fedmpi
from fedmpi import checkpoint, results, stopping
from fedmpi.comm import Solo
from fedmpi.components import build, component
from fedmpi.config import Config
from fedmpi.errors import ConfigError, Diverged, FedmpiError, NoCohort, SiloError, Stopped
from fedmpi.flat import FlatModel, sha256
from fedmpi.local import Sgd
from fedmpi.types import Silo, SiloData, Source

OWN = "test_run:"  # what configurations call this module's own components


@component
class Blobs:
    """Two clouds of points a silo; what may be wrong with data can be asked for."""

    sizes: tuple[int, ...] = (20, 30, 50)
    infinite: str = ""  # a silo one of whose samples is not finite
    shape: tuple[int, ...] = (4,)  # what the dataset says
    declared: int | None = None  # what it says of the sizes
    task: Any = "classification"

    def source(self, seed):
        ids = [f"s{i}" for i in range(len(self.sizes))]
        silos = tuple(Silo(name, self.declared) for name in ids)
        return Source(self.task, self.shape, 2, silos, lambda name: self.opened(ids.index(name), name))

    def opened(self, index, name):
        rng = torch.Generator().manual_seed(index + int(os.environ.get("BLOBS", "0")))
        x, y = torch.randn(self.sizes[index], 4, generator=rng), torch.arange(self.sizes[index]) % 2
        x += y[:, None]
        if name == self.infinite:
            x[-1, 0] = torch.inf
        return SiloData(x, y, x[: 4 + index].nan_to_num(0, 0, 0), y[: 4 + index])


class Normed(nn.Module):
    """Everything that a silo may have to keep: a personal head, running statistics, an integer, a frozen layer."""

    def __init__(self, inputs=4, dropout=0.2):
        super().__init__()
        self.base = nn.Linear(inputs, int(os.environ.get("WIDTH", "6")))
        self.norm, self.drop = nn.BatchNorm1d(self.base.out_features), nn.Dropout(dropout)
        self.head = nn.Linear(self.base.out_features, 2)
        self.base.weight.requires_grad_(False)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.base(x))).relu())


@component
class Cliff:
    """A learning rate that goes through the roof in round `at`."""

    at: int = 3

    def lr(self, eta0, round, rounds):
        return 1e30 if round == self.at else eta0


@component
class Slope:
    """A learning rate that is much too large from round `at` on."""

    at: int = 4

    def lr(self, eta0, round, rounds):
        return 1e4 * eta0 if round >= self.at else eta0


@component
class Eventful:
    """In order; in one epoch of silo s1 (none if it is not in the environment) something happens."""

    def order(self, seed, silo, epoch, num_samples):
        if (silo, str(epoch)) == ("s1", os.environ.get("EPOCH")):
            what = os.environ["EVENT"]
            if what == "raise":
                raise OSError("the disk of s1 is gone")
            if what == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
            else:
                Path(what).touch()
            time.sleep(0.06)  # the file is looked for so often
        return np.arange(num_samples)


def squared_loss(outputs, targets):
    return (outputs.softmax(-1)[:, 1] - targets).square().mean()


def endless(outputs, targets):
    """Its gradient is finite, it is not."""
    return squared_loss(outputs, targets) + torch.inf


def refuses_to_look(outputs, targets):
    """A loss that cannot be evaluated: an error before training."""
    if not torch.is_grad_enabled() and len(outputs) == 30:
        raise OSError("no look at s1")
    return squared_loss(outputs, targets)


def steep(outputs, targets):
    """Its gradient moves the outputs' mean by about one a step of lr 1."""
    return -outputs.mean()


def rank_distance(outputs, targets):
    """No mean of batches: how far the mean of the best half lies above the rest."""
    best = outputs[:, 1].sort().values
    return best[len(best) // 2 :].mean() - best[: len(best) // 2].mean()


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    """What a run changes in its process is put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(stopping, "_received", [])
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exact)


def config(out, rounds=4, data=None, model="logistic", local=None, **other):
    local = {"name": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 8} | (local or {})
    data = {"name": OWN + "Blobs"} | (data or {})
    other = {"checkpoint": {"every": 2}, "device": {"name": "cpu"}} | other
    return build(Config, {"out": str(out), "rounds": rounds, "data": data, "model": model, "local": local, **other})


def run(how, rounds=None):
    """The records of a run that is left, as with break, after `rounds` more; and the run."""
    with fedmpi.Run(how, comm_=Solo()) as run:
        records = []
        for record in run:
            records.append(record)
            if len(records) == rounds:
                break
    return records, run


def refused(how):
    with pytest.raises(ConfigError) as caught:
        fedmpi.Run(how, comm_=Solo())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def everything(out):
    """All that the next round would depend on, and the round."""
    round = results.newest(out)
    server = checkpoint.read_server(out, round)
    silos = checkpoint.read_silos(out, round, ["s0", "s1", "s2"])
    found = server | {f"{silo}/{name}": t for silo, kept in silos.items() for name, t in kept.items()}
    return round, {name: (tuple(t.shape), t.numpy().tobytes()) for name, t in found.items()}


def figures(record):
    return {k: v for k, v in record.items() if k not in ("seconds", "peak_rss_bytes")}


# ---------------------------------------------------------------- against the reference


def expected(how, w_P, skipped=()):
    """The reference's parameters, batches in order."""
    source, size, silos = how.data.source(how.seed), how.local.batch_size, []
    for silo in source.silos:
        if silo.id not in skipped:
            x, y, *_ = (t.numpy().reshape(len(t), -1).squeeze() for t in source.open(silo.id))
            parts = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
            silos.append((len(x), lambda _, parts=parts: parts))
    return reference.train(w_P, silos, how.rounds, how.local.lr, reference.softmax_gradient)[-1]


@pytest.mark.parametrize("exchange", [{}, {"plan": "root"}, {"reduction": "reproducible"}])
def test_a_run_is_the_reference(tmp_path, exchange):
    digits = {"name": "digits", "silos": 4, "partition": "dirichlet"}
    local = {"lr": 0.3, "batch_size": 32, "sampler": "in_order"}
    how = config(tmp_path, 3, digits, local=local, exchange={**exchange, "verify": True})
    with fedmpi.Run(how, comm_=Solo()) as run:
        w_P = run.params_P.double().numpy()
        assert len(list(run)) == 3
    expected_P = expected(how, w_P)
    assert np.abs(run.params_P.numpy() - expected_P).max() < 1e-5 < np.abs(expected_P - w_P).max()


def test_a_silo_whose_update_is_not_finite_is_rejected_by_name_and_the_others_go_on(tmp_path):
    how = config(tmp_path, 2, {"infinite": "s1"}, local={"sampler": "in_order"})
    with fedmpi.Run(how, comm_=Solo()) as run:
        w_P = run.params_P.double().numpy()
        records = list(run)
    assert [r["rejected"] for r in records] == [["s1"], ["s1"]] and records[0]["cohort"] == ["s0", "s1", "s2"]
    assert "train_loss" not in records[1]["silos"]["s1"] and "accuracy" in records[1]["silos"]["s1"]
    assert np.abs(run.params_P.numpy() - expected(how, w_P, ["s1"])).max() < 1e-5


def test_one_whole_batch_a_silo_is_one_gradient_step_on_the_pooled_data(tmp_path):
    how = config(tmp_path, 1, {"name": "digits", "silos": 5, "partition": "quantity"}, local={"batch_size": None})
    with fedmpi.Run(how, comm_=Solo()) as run:
        w_P = run.params_P.double().numpy()
        list(run)
    source = how.data.source(how.seed)
    data = [source.open(silo.id) for silo in source.silos]
    x, y = (
        torch.cat([d.x_train for d in data]).flatten(1).double().numpy(),
        torch.cat([d.y_train for d in data]).numpy(),
    )
    expected_P = w_P - 0.1 * reference.softmax_gradient(w_P, x, y)
    assert np.abs(run.params_P.numpy() - expected_P).max() < 5e-6


def test_the_same_seed_gives_the_same_bits_and_another_one_others(tmp_path):
    part = {"data": {"sizes": [9] * 6}, "select": {"name": "uniform", "fraction": 0.5}}
    done = [run(config(tmp_path / str(i), 3, seed=seed, **part)) for i, seed in enumerate((0, 0, 1))]
    ends = [sha256(last.params_P) for _, last in done]
    assert ends[0] == ends[1] != ends[2]
    cohorts = [[tuple(record["cohort"]) for record in records] for records, _ in done]
    assert cohorts[0] == cohorts[1] != cohorts[2] and len(set(cohorts[0])) > 1


def test_an_average_over_rounds_is_evaluated_and_saved_and_training_goes_on_from_the_parameters(tmp_path):
    plain, raw = run(config(tmp_path / "a"))
    points_P, average_P = [], None
    with fedmpi.Run(config(tmp_path / "b", server={"average": {"decay": 0.5}}), comm_=Solo()) as averaged:
        records = []
        for record in averaged:
            records.append(record)
            points_P.append(averaged.params_P.clone())
            average_P = averaged.served_P.clone()
    assert sha256(averaged.params_P) == sha256(raw.params_P) and raw.served_P is not averaged.served_P
    weights = torch.tensor([1.0, 2, 4, 8]) / 15
    torch.testing.assert_close(average_P, weights @ torch.stack(points_P))
    assert records[0]["loss"] == plain[0]["loss"] and records[3]["loss"] != plain[3]["loss"]
    assert results.evaluate(tmp_path / "b")["loss"] == pytest.approx(records[3]["loss"], rel=1e-6)
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert torch.equal(torch.cat([saved["linear.weight"].flatten(), saved["linear.bias"]]), average_P)
    results.export(tmp_path / "b", tmp_path / "b.safetensors")
    assert all(torch.equal(t, saved[n]) for n, t in load_file(tmp_path / "b.safetensors").items())
    assert results.inspect(tmp_path / "b")["params_sha256"] == results.inspect(tmp_path / "a")["params_sha256"]


# ---------------------------------------------------------------- resuming

NORMED = {"model": {"name": OWN + "Normed"}}
PERSONAL = {"exchange": {"parameters": ["*", "!head.*", "!norm.running*"]}}
RESUMED = {
    "momentum, a part of the silos, steps": {
        "server": {"optimizer": "fedavgm"},
        "select": {"name": "uniform", "fraction": 0.5},
        "local": {"epochs": None, "steps": 5},
    },
    "batch norm and dropout, all shared": NORMED,
    "personal parameters, a part of the silos": {
        **NORMED, **PERSONAL, "select": {"name": "uniform", "fraction": 0.4}, "server": {"optimizer": "fedyogi"},
        "local": {"optimizer": {"name": "SGD", "momentum": 0.9}, "schedule": "cosine"},
    },
    "trainable only, reproducible": {
        **NORMED, "exchange": {"parameters": "trainable", "reduction": "reproducible"},
        "server": {"optimizer": "fedadam"}, "data": {"sizes": [8, 31, 20]},
    },
    "an average over rounds, a falling rate of the server": {
        **NORMED, **PERSONAL, "select": {"name": "uniform", "fraction": 0.5},
        "server": {
            "optimizer": {"name": "fedavgm", "nesterov": True, "schedule": "cosine"}, "average": {"decay": 0.7},
        },
    },
    "by norms of who is there, 1/probability": {
        "select": {"name": "available", "traces": {"s1": [[1, 3], [4, 9]]}, "inner": {"name": "optimal"}},
        "local": {"epochs": None, "steps": 5},
    },
    "fresh losses": {**NORMED, "select": {"name": "power_of_choice", "fraction": 0.34, "samples": 7}},
    "bandit": {"select": {"name": "ucb", "fraction": 0.34}, "aggregate": {"name": "qffl", "lr": 0.1}},
    "turns, gram": {
        "select": {"name": "round_robin", "count": 2}, "records": {"gram": "matrix"},
        "exchange": {"plan": "sharded", "scope": "silo"},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", RESUMED)
def test_resuming_gives_the_bits_of_never_having_stopped(tmp_path, kind):
    records, undisturbed = run(config(tmp_path / "a", **RESUMED[kind]))
    first, _ = run(config(tmp_path / "b", **RESUMED[kind]), 2)
    # A kill: the directory as it is in the middle of the run, with whatever is written by then.
    with fedmpi.Run(config(tmp_path / "c", **RESUMED[kind]), comm_=Solo()) as killed:
        for record in killed:
            if record["round"] == 3:
                shutil.copytree(tmp_path / "c", tmp_path / "d")
    for out, before in (("b", first), ("d", None)):
        rest, resumed = run(config(tmp_path / out, **RESUMED[kind]))
        if before is not None:
            assert resumed.resumed == 2 and len(rest) == 2
            assert [figures(r) for r in before + rest] == [figures(r) for r in records]
        assert sha256(resumed.params_P) == sha256(undisturbed.params_P)
        assert everything(tmp_path / out) == everything(tmp_path / "a")
        assert [figures(r) for r in results.read_metrics(tmp_path / out)] == [figures(r) for r in records]


def test_a_run_that_is_done_can_be_given_more_rounds(tmp_path):
    run(config(tmp_path / "a", 4))
    assert run(config(tmp_path / "b", 2))[0] and run(config(tmp_path / "b", 2))[0] == []
    run(config(tmp_path / "b", 4))
    assert everything(tmp_path / "b") == everything(tmp_path / "a")


@pytest.mark.parametrize("name", ["server.h5", "rank-0000.h5", "manifest.json"])
@pytest.mark.parametrize("harmed", [2, 4])
def test_one_harmed_checkpoint_does_not_stand_in_the_way(tmp_path, harmed, name, caplog):
    run(config(tmp_path / "a", 4))
    path = checkpoint.folder_of(tmp_path / "a", harmed) / name
    path.write_bytes(path.read_bytes()[:-9])
    again, resumed = run(config(tmp_path / "a", 5))
    assert resumed.resumed == {2: 4, 4: 2}[harmed] and len(again) == 5 - resumed.resumed
    skipped = {r.getMessage().partition(":")[0] for r in caplog.records}
    assert skipped == ({f"skipped checkpoint of round {harmed}"} if harmed == 4 or name == "manifest.json" else set())
    run(config(tmp_path / "b", 5))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"local": {"lr": 0.2}}, "local.lr is 0.1 there and 0.2 here"),
        ({"data": {"sizes": [9, 9, 9]}}, "data.sizes is [20, 30, 50] there and [9, 9, 9] here"),
        (
            {"WIDTH": "7"},
            "the model's base.bias is ['float32', [6], 'shared'] there and ['float32', [7], 'shared'] here",
        ),
        ({"BLOBS": "9"}, "the silos' data are not the same"),
    ],
)
def test_the_directory_of_another_run_is_refused_with_what_differs(tmp_path, monkeypatch, change, says):
    run(config(tmp_path, 1, **NORMED))
    before = everything(tmp_path)
    with monkeypatch.context() as patch:
        for name in change.keys() & {"WIDTH", "BLOBS"}:
            patch.setenv(name, change[name])
        fields = {k: v for k, v in change.items() if k.islower()}
        said = refused(config(tmp_path, 1, **NORMED, **fields))
        assert said.startswith(f"{tmp_path} holds checkpoints of another run: ") and says in said
    assert everything(tmp_path) == before
    assert run(config(tmp_path, 2, **NORMED))[1].resumed == 1  # the refusal has left nothing locked


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": {"sizes": [5, 0]}}, "silo 's1' has no training samples"),
        ({"data": {"declared": 21}}, "silo 's0' declares 21 training samples but has 20"),
        ({"data": {"shape": [5]}}, "silo 's0': training samples have shape (4,), the dataset's is (5,)"),
        ({"model": {"name": "logistic", "inputs": 3}}, "3"),
        ({"model": {"name": OWN + "Normed", "inputs": 5}}, "model and data disagree: mat1 and mat2 shapes cannot be"),
        ({"model": {"name": "collections:Counter"}}, "model: Counter is no torch module"),
        ({"objective": {"loss": OWN + "rank_distance", "metric": OWN + "nothing"}}, "objective.metric: cannot import"),
        ({"objective": {"loss": "mse"}}, "objective.loss: 'mse' is for regression, the data's task is classification"),
        ({"local": {"precision": "bf16"}}, "local.precision: bf16 needs a GPU"),
        ({"device": {"name": "tpu"}}, "device.name: 'tpu' is not auto, cpu or cuda"),
        ({"init": "nowhere.safetensors"}, "init: nowhere.safetensors"),
        ({"server": {"dedicated": True}}, "server.dedicated: needs at least 2 ranks"),
        ({"exchange": {"parameters": ["wieght"]}}, "exchange.parameters: 'wieght' matches no parameter"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(tmp_path, change, says):
    assert says in refused(config(tmp_path, **change))
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_directory_that_cannot_be_written_or_is_in_use_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert refused(config(tmp_path / "file" / "run")).startswith(f"out: cannot write into {tmp_path}/file/run: ")
    assert refused(config(tmp_path / "file")).startswith(f"out: cannot write into {tmp_path}/file: ")
    with fedmpi.Run(config(tmp_path / "run", 1), comm_=Solo()) as run:
        assert refused(config(tmp_path / "run", 1)) == f"out: another job is training in {tmp_path}/run"
        assert len(list(run)) == 1


def test_a_refusal_leaves_the_directory_free(tmp_path):
    refused(config(tmp_path, 1, model={"name": OWN + "Normed", "inputs": 5}))
    assert len(run(config(tmp_path, 1))[0]) == 1


# ---------------------------------------------------------------- how a run may end


def test_a_run_that_diverges_says_so_and_leaves_its_last_whole_round(tmp_path):
    with pytest.raises(Diverged, match=r"^round 3: every update was rejected \(s0, s1, s2\)"):
        list(last := fedmpi.Run(config(tmp_path / "a", local={"schedule": OWN + "Cliff"}), comm_=Solo()))
    run(config(tmp_path / "b", 2))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    last.close()
    assert Diverged.exit_code == 1 and not (tmp_path / "a" / "model.safetensors").exists()


def test_a_round_without_anybody_leaves_the_rounds_before_it_on_disk(tmp_path):
    nobody = {"name": "available", "traces": {f"s{i}": [[1, 3]] for i in range(3)}}
    with pytest.raises(NoCohort, match=r"^round 3: no silo is there \(select.traces\)$"):
        run(config(tmp_path / "a", select=nobody))
    run(config(tmp_path / "b", 2))
    shas = [results.inspect(tmp_path / name)["params_sha256"] for name in "ab"]
    assert shas[0] == shas[1] and NoCohort.exit_code == 1


@component
class Counting:
    """State of every kind: what there is only later, in more dimensions than one, in none."""

    def init(self, num_train):
        return {"seen": np.zeros((len(num_train), 2)), "none": np.zeros(())}

    def select(self, ids, state, record, rng):
        late = state.get("late", np.zeros(3, dtype=np.int32)) + 1
        size = 1 + int(late[0] + state["none"] + state["seen"][1, 1]) % len(ids)
        return ids[:size], {"seen": state["seen"] + 1, "none": state["none"] + 1, "late": late}


@component
class PerSample:
    """A rule that keeps a number for every sample, so tensors of another length for every silo."""

    lr: float = 0.1
    epochs: int = 1
    batch_size: int = 8

    def train(self, silo, model, params_P, round):
        seen = silo.kept.get("seen", torch.zeros(len(silo.data.x_train)))
        rule = Sgd(lr=self.lr * (1 + float(seen.mean())), epochs=self.epochs, batch_size=self.batch_size)
        done = rule.train(silo, model, params_P, round)
        silo.kept["seen"] = seen + 1
        return done


@pytest.mark.parametrize("other", [{"select": OWN + "Counting"}, {"local": {"name": OWN + "PerSample"}}])
def test_state_of_ones_own_comes_back_whatever_its_shape(tmp_path, other):
    run(config(tmp_path / "whole", 4, **other))
    run(config(tmp_path / "a", 4, **other), rounds=2)
    run(config(tmp_path / "a", 4, **other))
    assert everything(tmp_path / "a") == everything(tmp_path / "whole")


@component
class Choosing:
    """Gives what it is told to."""

    gives: Any = None

    def init(self, num_train):
        return {}

    def select(self, ids, state, record, rng):
        return list(ids) if self.gives == "no state" else (self.gives, state)


@pytest.mark.parametrize(
    ("gives", "why"),
    [
        ("no state", r"is to return a cohort and its new state \(a dict of arrays\), and gave \['s0', 's1', 's2'\]"),
        (["s0", "nobody"], r"chose \['s0', 'nobody'\]: 'nobody' is no silo"),
        (["s0", "s0"], r"chose \['s0', 's0'\]: a silo twice"),
        (["s1", "s0"], r"chose \['s1', 's0'\]: a silo twice, or not in the federation's order"),
    ],
)
def test_what_a_selector_gives_is_looked_at(tmp_path, gives, why):
    with pytest.raises(NoCohort, match=f"^round 1: the selector Choosing {why}"):
        run(config(tmp_path, select={"name": OWN + "Choosing", "gives": gives}))


@component
class Sloppy:
    """A rule whose work is not what it should be."""

    what: str
    lr: float = 0.1
    epochs: int = 1
    batch_size: int = 8

    def train(self, silo, model, params_P, round):
        done = Sgd(lr=0.1, epochs=1).train(silo, model, params_P, round)
        if self.what == "short":
            done.delta_P = done.delta_P[:-1]
        if self.what == "double":
            done.delta_P = done.delta_P.double()
        if self.what == "number":
            silo.kept["number"] = 3.0
        return None if self.what == "nothing" else done


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("short", r"gave a delta that is torch.float32 of \[9\] in place of torch.float32 of \[10\]"),
        ("double", r"gave a delta that is torch.float64 of \[10\] in place of"),
        ("nothing", "returned NoneType in place of a Contribution"),
        ("number", "keeps 'number' as float; silos keep tensors"),
    ],
)
def test_what_a_rule_gives_is_looked_at(tmp_path, what, why):
    with pytest.raises(SiloError, match=f"^rank 0, silo 's0', round 1:\n(.*\n)*TypeError: the rule Sloppy {why}"):
        run(config(tmp_path, local={"name": OWN + "Sloppy", "what": what}))


def test_rounds_in_doubt_are_no_checkpoint_when_a_run_is_stopped(tmp_path):
    how = config(tmp_path / "a", stop={"patience": 3}, checkpoint={"every": 1, "keep": 1}, **SLOPE)
    with pytest.raises(SystemExit), fedmpi.Run(how, comm_=Solo()) as halted:
        for record in halted:
            if record["round"] == 5:  # the second that is doubted
                os.kill(os.getpid(), signal.SIGUSR1)
    assert results.newest(tmp_path / "a") == 3
    stopping._received.clear()
    with pytest.raises(Diverged, match=r"^round 6: the run has diverged"):
        run(how)
    assert results.newest(tmp_path / "a") == 3


SLOPE = {"local": {"schedule": OWN + "Slope"}, "rounds": 8}


@pytest.mark.parametrize("patience", [1, 3])
def test_a_run_whose_norms_explode_is_given_up_with_its_last_good_round_on_disk(tmp_path, patience):
    how = config(tmp_path / "a", stop={"patience": patience}, **SLOPE)
    with pytest.raises(Diverged, match=rf"^round {3 + patience}: the run has diverged: .*the mean norm of its deltas"):
        run(how)
    run(config(tmp_path / "b", 3, local=SLOPE["local"]))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    assert len(run(config(tmp_path / "a", stop={"norm_factor": None, "loss_factor": None}, **SLOPE))[0]) == 5


def test_a_run_that_was_left_in_doubt_is_taken_up_where_it_was_good_and_ends_the_same(tmp_path):
    def told(how):
        with pytest.raises(Diverged) as caught:
            run(how)
        return str(caught.value)

    undisturbed = told(config(tmp_path / "a", **SLOPE))
    run(config(tmp_path / "b", **SLOPE), 5)
    assert results.newest(tmp_path / "b") == 3 and told(config(tmp_path / "b", **SLOPE)) == undisturbed


def test_a_training_loss_that_is_not_finite_ends_the_run(tmp_path):
    objective = {"loss": OWN + "endless"}
    with pytest.raises(Diverged, match=r"^round 1: the run has diverged: its training loss is not finite"):
        run(config(tmp_path / "a", 2, objective=objective))
    assert everything(tmp_path / "a")[0] == 0
    records, _ = run(config(tmp_path / "a", 2, objective=objective, stop={"not_finite": False}))
    assert [r["train_loss"] for r in records] == [None, None]


def test_a_silo_that_fails_while_losses_are_looked_up_is_named(tmp_path):
    how = config(tmp_path, objective={"loss": OWN + "refuses_to_look"}, select="power_of_choice")
    with pytest.raises(SiloError, match=r"^rank 0, silo 's1', before round 1:\nTraceback .*\n(.*\n)*OSError: no look"):
        run(how)


def test_a_stop_while_losses_are_looked_up_leaves_the_round_before(tmp_path):
    how = config(tmp_path, select="power_of_choice", checkpoint={"every": 9})
    with fedmpi.Run(how, comm_=Solo()) as started:
        next(rounds := iter(started))
        started._federation.watch.tell(stopping.STOP, "somebody")
        with pytest.raises(Stopped, match=r"^stopped in round 2: somebody \(rank 0\)$"):
            next(rounds)
    assert results.newest(tmp_path) == 1


def test_records_tell_norms_spread_and_likeness(tmp_path):
    silo = {"plan": "sharded", "scope": "silo"}
    (record, *_), _ = run(config(tmp_path / "a", 1, exchange=silo, records={"gram": True}))
    (plain, *_), _ = run(config(tmp_path / "b", 1, exchange=silo))
    norms = [row["delta_norm"] for row in record["silos"].values()]
    assert record["delta_norm"] == pytest.approx(np.mean(norms)) and "cosines" not in record
    assert record["diversity"] >= 1 / 3 and -1 <= record["cosine"]["min"] <= record["cosine"]["mean"] <= 1
    assert record["spread"]["std"] == pytest.approx(np.std([row["accuracy"] for row in record["silos"].values()]))
    told = {k: v for k, v in figures(record).items() if k not in ("diversity", "cosine")}
    assert told == figures(plain)


EVENTFUL = {"local": {"sampler": OWN + "Eventful"}}


@pytest.mark.parametrize("event", ["file", "signal"])
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_stop_ends_the_round_between_batches_with_the_last_whole_one_on_disk(tmp_path, monkeypatch, capsys, event,
                                                                              epoch):  # fmt: skip
    run(config(tmp_path / "b", **EVENTFUL))
    monkeypatch.setenv("EPOCH", str(epoch))
    monkeypatch.setenv("EVENT", "signal" if event == "signal" else str(tmp_path / "a" / "stop"))
    with pytest.raises(SystemExit) as caught:
        run(config(tmp_path / "a", **EVENTFUL))
    assert caught.value.code == Stopped.exit_code == 3
    why = "SIGUSR1" if event == "signal" else "fedmpi stop"
    assert (
        capsys.readouterr().err == f"fedmpi: stopped in round {epoch + 1}: {why} (rank 0); round {epoch} is on disk\n"
    )
    assert everything(tmp_path / "a")[0] == epoch and not (tmp_path / "a" / "stop").exists()
    monkeypatch.delenv("EPOCH")
    (tmp_path / "a" / "stop").touch()  # as if it was asked twice: the second one was meant for that job too
    monkeypatch.setattr(stopping, "_received", [])
    assert run(config(tmp_path / "a", **EVENTFUL))[1].resumed == epoch
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_a_silo_that_raises_is_named_with_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("EPOCH", "2")
    monkeypatch.setenv("EVENT", "raise")
    with pytest.raises(SiloError, match=r"^rank 0, silo 's1', round 3:\nTraceback .*\n(.*\n)*OSError: the disk of s1"):
        run(config(tmp_path, checkpoint={"every": 1}, **EVENTFUL))
    assert everything(tmp_path)[0] >= 1


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_the_one_before_is_whole(tmp_path):
    how, obstacle = config(tmp_path / "a", checkpoint={"every": 1}), tmp_path / "a" / "checkpoints" / "round-000002"
    with pytest.raises(FedmpiError, match="cannot write a checkpoint into"), fedmpi.Run(how, comm_=Solo()) as run_:
        for record in run_:
            if record["round"] == 1:
                obstacle.touch()
    assert results.newest(tmp_path / "a") == 1
    obstacle.unlink()
    run(how)
    run(config(tmp_path / "b"))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


# ---------------------------------------------------------------- what a run leaves


def test_a_users_own_loss_is_trained_and_own_metric_is_of_a_silos_whole_test_set(tmp_path):
    objective = {"loss": OWN + "squared_loss", "metric": OWN + "rank_distance"}
    plain = run(config(tmp_path / "b", 2))[1]
    (_, record), own = run(config(tmp_path / "a", 2, objective=objective, evaluate={"batch_size": 3}))
    assert sha256(own.params_P) != sha256(plain.params_P)
    data = own.config.data.source(0)
    with torch.no_grad():
        by_hand = {s: float(rank_distance(own.model(data.open(s).x_test), None)) for s in ("s0", "s1", "s2")}
    assert {s: record["silos"][s]["rank_distance"] for s in by_hand} == pytest.approx(by_hand, rel=1e-6)
    assert record["rank_distance"] == pytest.approx(np.average(list(by_hand.values()), weights=[4, 5, 6]))
    assert results.inspect(tmp_path / "a")["best"].keys() == {"round", "loss", "rank_distance"}


@pytest.mark.parametrize("fields", [{}, {**NORMED, **PERSONAL}], ids=["shared", "personal"])
def test_what_a_directory_says_is_what_the_run_said(tmp_path, fields):
    records, done = run(config(tmp_path, 5, checkpoint={"every": 1, "keep": 2}, **fields))
    found = results.inspect(tmp_path)
    assert (found["rounds"], found["params_sha256"]) == (5, sha256(done.params_P))
    assert found["metrics"] == records[-1] == done.record and found["config"]["rounds"] == 5
    best = max(r["accuracy"] for r in records)
    assert found["best"]["accuracy"] == best and records[results.choose(tmp_path, "best") - 1]["accuracy"] == best
    assert {4, 5} <= set(checkpoint.sealed_rounds(tmp_path)) and results.choose(tmp_path, 4) == 4
    for which in (4, "newest", "best"):
        again = results.evaluate(tmp_path, which)
        told = records[again["round"] - 1]
        assert again["worst"] == told["worst"] and (again["loss"], again["accuracy"]) == (
            told["loss"],
            told["accuracy"],
        )
        assert all(row.items() <= told["silos"][silo].items() for silo, row in again["silos"].items())
    with pytest.raises(ConfigError, match="no checkpoint of round 99; there is: "):
        results.choose(tmp_path, 99)


def outcome(call, *args):
    """What comes back, or that it was refused."""
    try:
        return call(*args)
    except FedmpiError:
        return "refused"


@pytest.mark.parametrize("name", ["server.h5", "manifest.json"])
def test_a_harmed_checkpoint_is_never_the_best(tmp_path, name):
    run(config(tmp_path, 4, checkpoint={"every": 1, "keep": 9}))
    best = results.choose(tmp_path, "best")
    path = checkpoint.folder_of(tmp_path, best) / name
    path.write_bytes(path.read_bytes()[:-9])
    other = outcome(results.choose, tmp_path, "best")
    assert other != best and outcome(results.choose, tmp_path, best) == "refused"
    if name == "manifest.json":
        assert other in range(5)  # the others are whole


@pytest.mark.parametrize("name", ["model.pt", "sub/model.safetensors"])
def test_an_exported_model_is_a_state_dict_and_a_start_for_another_run(tmp_path, name):
    _, done = run(config(tmp_path / "a", 2, **NORMED))
    assert results.export(tmp_path / "a", tmp_path / name) == 2
    state = load_file(tmp_path / name) if name.endswith("tensors") else torch.load(tmp_path / name)
    module = Normed()
    module.load_state_dict(state)
    shared_P = FlatModel(module).params()
    assert torch.equal(shared_P, done.params_P)
    with fedmpi.Run(
        config(tmp_path / "b", 1, init=str(tmp_path / "a" / "model.safetensors"), **NORMED), comm_=Solo()
    ) as b:
        assert torch.equal(b.params_P, done.params_P)
    with pytest.raises(ConfigError, match=r"end the name with \.safetensors or \.pt"):
        results.export(tmp_path / "a", tmp_path / "model.onnx")


@pytest.fixture
def start(tmp_path):
    """A file with another frozen layer than the seed's."""
    module = Normed()
    nn.init.constant_(module.base.weight, 0.25)
    save_file(module.state_dict(), tmp_path / "start.safetensors")
    return str(tmp_path / "start.safetensors")


def test_an_exported_model_has_the_frozen_part_that_it_was_trained_with(tmp_path, start):
    records, _ = run(config(tmp_path / "a", 1, init=start, exchange={"parameters": "trainable"}, **NORMED))
    results.export(tmp_path / "a", tmp_path / "m.pt")
    assert bool((torch.load(tmp_path / "m.pt")["base.weight"] == 0.25).all())
    assert results.evaluate(tmp_path / "a")["loss"] == records[-1]["loss"]


def test_a_resumed_run_never_goes_on_with_another_frozen_part(tmp_path, start):
    shared = {"exchange": {"parameters": "trainable"}, **NORMED}
    end = sha256(run(config(tmp_path / "a", 4, init=start, **shared))[1].params_P)
    run(config(tmp_path / "b", 4, init=start, **shared), 2)
    assert outcome(lambda: sha256(run(config(tmp_path / "b", 4, **shared))[1].params_P)) in (end, "refused")


def test_tensorboard_has_the_figures_of_every_round(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records, _ = run(config(tmp_path, 3, records={"tensorboard": True}))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("accuracy")] == [
        (r["round"], pytest.approx(r["accuracy"])) for r in records
    ]


def test_silos_with_other_columns_are_refused(tmp_path):
    """As many columns, one under another name: their mean would look like a model."""
    for silo, second in (("north", "chol"), ("south", "tchol")):
        lines = [f"age,{second},target", *(f"{i},{i % 7},{i % 2}" for i in range(20))]
        (tmp_path / f"{silo}.csv").write_text("\n".join(lines) + "\n")
    silos = [{"id": silo, "path": f"{silo}.csv"} for silo in ("north", "south")]
    data = {"name": "files", "root": str(tmp_path), "task": "binary", "shape": [2], "silos": silos}
    values = {"rounds": 1, "out": str(tmp_path / "run"), "data": data}
    with pytest.raises(ConfigError, match="silos 'north' and 'south' have other columns"):
        fedmpi.Run(build(Config, values), comm_=Solo())


@component
class Unequal:
    """Three silos of sixty thousand samples and one of one, whose optimum lies far away."""

    def source(self, seed):
        ids = {"s0": 60_000, "s1": 60_000, "s2": 60_000, "s3": 1}
        return Source("regression", (2,), 1, tuple(Silo(name, n) for name, n in ids.items()), self.opened)

    def opened(self, name):
        n = 1 if name == "s3" else 60_000
        rng = np.random.default_rng(int(name[1]))
        x = torch.from_numpy(rng.normal(size=(n, 2)).astype(np.float32))
        y = x.sum(1) + (30.0 if n == 1 else 0.0)
        return SiloData(x, y, x, y)


def test_the_control_of_a_tiny_silo_is_weighed_up_and_not_taken_for_one_that_explodes(tmp_path):
    local = {"name": "scaffold", "lr": 0.1, "steps": 2, "batch_size": 64, "epochs": None}
    how = config(tmp_path, 2, {"name": OWN + "Unequal"}, local=local)
    with fedmpi.Run(how, comm_=Solo()) as run:
        assert [record["rejected"] for record in run] == [[], []]


def test_weights_that_are_counts_of_steps_do_not_run_over_the_ring(tmp_path):
    """Shares of a thousand steps: sums are right, or the update is rejected by name; never wrapped round."""
    how = {"local": {"steps": 1000, "epochs": None, "lr": 1e-5}, "aggregate": {"name": "mean", "weights": "steps"}}
    ends = []
    for reduction in ("fast", "reproducible"):
        chosen = config(tmp_path / reduction, 1, {"sizes": (8, 16)}, exchange={"reduction": reduction}, **how)
        with fedmpi.Run(chosen, comm_=Solo()) as run:
            assert [record["rejected"] for record in run] == [[]]
            ends.append(run.params_P.clone())
    assert (ends[0] - ends[1]).abs().max() < 1e-5
    far = {"local": {**how["local"], "lr": 1.0}, "objective": {"loss": OWN + "steep"}}
    chosen = config(tmp_path / "far", 1, {"sizes": (8, 16)}, exchange={"reduction": "reproducible"}, **(how | far))
    with pytest.raises(Diverged, match=r"^round 1: every update was rejected"), fedmpi.Run(chosen, comm_=Solo()) as run:
        list(run)
