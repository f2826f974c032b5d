"""What whole runs stand up to: divergence, stops, failures, what components of one's own give, weights that go far."""

import os
import signal
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import OWN, config, everything, put_back, run  # noqa: F401

import fedmpi
from fedmpi import results, stopping
from fedmpi.comm import SoloComm
from fedmpi.components import component
from fedmpi.errors import Diverged, FedmpiError, NoCohort, SiloError, Stopped
from fedmpi.local import Sgd
from fedmpi.types import Silo, SiloData, Source

HERE = "test_run_ends:"  # what configurations call this module's own components


def test_a_run_that_diverges_says_so_and_leaves_its_last_whole_round(tmp_path):
    with pytest.raises(Diverged, match=r"^round 3: every update was rejected \(s0, s1, s2\)"):
        list(last := fedmpi.Run(config(tmp_path / "a", local={"schedule": OWN + "Cliff"}), comm=SoloComm()))
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

    def select(self, ids, state, outcome, rng):
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


@pytest.mark.parametrize("other", [{"select": HERE + "Counting"}, {"local": {"name": HERE + "PerSample"}}])
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

    def select(self, ids, state, outcome, rng):
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
        run(config(tmp_path, select={"name": HERE + "Choosing", "gives": gives}))


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
            done.vector_Q = done.vector_Q[:-1]
        if self.what == "double":
            done.vector_Q = done.vector_Q.double()
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
        run(config(tmp_path, local={"name": HERE + "Sloppy", "what": what}))


def test_rounds_in_doubt_are_no_checkpoint_when_a_run_is_stopped(tmp_path):
    how = config(tmp_path / "a", stop={"patience": 3}, checkpoint={"every": 1, "keep": 1}, **SLOPE)
    with pytest.raises(Stopped, match=r"; round 3 is on disk;"), fedmpi.Run(how, comm=SoloComm()) as halted:
        for record in halted:
            if record["round"] == 5:  # the second that is doubted
                os.kill(os.getpid(), signal.SIGUSR1)
    assert results.newest(tmp_path / "a") == 3
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
    with fedmpi.Run(how, comm=SoloComm()) as started:
        next(rounds := iter(started))
        started.federation.watch.tell(stopping.STOP, "somebody")
        with pytest.raises(Stopped, match=r"^stopped in round 2: somebody \(rank 0\)$"):
            next(rounds)
    assert results.newest(tmp_path) == 1


EVENTFUL = {"local": {"sampler": OWN + "Eventful"}}


@pytest.mark.parametrize("event", ["file", "signal"])
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_stop_ends_the_round_between_batches_with_the_last_whole_one_on_disk(tmp_path, monkeypatch, event, epoch):
    run(config(tmp_path / "b", **EVENTFUL))
    monkeypatch.setenv("EPOCH", str(epoch))
    monkeypatch.setenv("EVENT", "signal" if event == "signal" else str(tmp_path / "a" / "stop"))
    with pytest.raises(Stopped) as caught:
        run(config(tmp_path / "a", **EVENTFUL))
    why = "SIGUSR1" if event == "signal" else "fedmpi stop"
    on_disk = f"round {epoch} is on disk; the same command resumes"
    assert str(caught.value) == f"stopped in round {epoch + 1}: {why} (rank 0); {on_disk}"
    assert everything(tmp_path / "a")[0] == epoch and not (tmp_path / "a" / "stop").exists()
    monkeypatch.delenv("EPOCH")
    (tmp_path / "a" / "stop").touch()  # as if it was asked twice: the second one was meant for that job too
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
    with pytest.raises(FedmpiError, match="cannot write a checkpoint into"), fedmpi.Run(how, comm=SoloComm()) as run_:
        for record in run_:
            if record["round"] == 1:
                obstacle.touch()
    assert results.newest(tmp_path / "a") == 1
    obstacle.unlink()
    run(how)
    run(config(tmp_path / "b"))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


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
    how = config(tmp_path, 2, {"name": HERE + "Unequal"}, local=local)
    with fedmpi.Run(how, comm=SoloComm()) as run:
        assert [record["rejected"] for record in run] == [[], []]


@pytest.mark.slow
def test_weights_that_are_counts_of_steps_do_not_run_over_the_ring(tmp_path):
    """Shares of a thousand steps: sums are right, or the update is rejected by name; never wrapped round."""
    how = {"local": {"steps": 1000, "epochs": None, "lr": 1e-5}, "aggregate": {"name": "mean", "weights": "steps"}}
    ends = []
    for reduction in ("fast", "reproducible"):
        chosen = config(tmp_path / reduction, 1, {"sizes": (8, 16)}, exchange={"reduction": reduction}, **how)
        with fedmpi.Run(chosen, comm=SoloComm()) as run:
            assert [record["rejected"] for record in run] == [[]]
            ends.append(run.parameters.clone())
    assert (ends[0] - ends[1]).abs().max() < 1e-5
    far = {"local": {**how["local"], "lr": 1.0}, "objective": {"loss": OWN + "steep"}}
    chosen = config(tmp_path / "far", 1, {"sizes": (8, 16)}, exchange={"reduction": "reproducible"}, **(how | far))
    with (
        pytest.raises(Diverged, match=r"^round 1: every update was rejected"),
        fedmpi.Run(chosen, comm=SoloComm()) as run,
    ):
        list(run)
