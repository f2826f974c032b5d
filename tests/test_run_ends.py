"""What whole runs survive: divergence, stops, failures, results of users' components, extreme weights."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import OWN, config, everything, put_back, run  # noqa: F401

import fedmpi
from fedmpi import checkpoint, fencing, results, stopping
from fedmpi.comm import SoloComm
from fedmpi.components import component
from fedmpi.errors import ConfigError, Diverged, FedmpiError, NoCohort, SiloError, Stopped
from fedmpi.local import Sgd
from fedmpi.types import Silo, SiloData, Source

HERE = "test_run_ends:"  # how configurations name this module's components


def test_a_run_that_cannot_outlive_ranks_says_so_if_it_was_asked_to(tmp_path, capsys):
    for wanted, told in (("respawn", True), ("stop", False), (None, False)):
        run(config(tmp_path / str(wanted), 1, on_failure=wanted))
        said = "fedmpi: on_failure: respawn has no effect: this job ends with the first rank that dies"
        assert (said in capsys.readouterr().err) == told


def test_a_run_may_go_on_with_another_on_failure(tmp_path):
    run(config(tmp_path, 1))
    run(config(tmp_path, 2, on_failure="continue"))
    run(config(tmp_path / "b", 2))
    assert results.inspect(tmp_path)["params_sha256"] == results.inspect(tmp_path / "b")["params_sha256"]


def test_a_supervisor_without_dashes_before_its_launcher_says_where_they_go():
    words = [sys.executable, "-m", "fedmpi", "run", "mine.yaml", "rounds=3", "mpirun", "-n", "3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "fedmpi: put -- before the launcher: fedmpi run CONFIG -- mpirun -n 4\n"


def test_a_run_that_diverges_says_so_and_leaves_its_last_whole_round(tmp_path):
    with pytest.raises(Diverged, match=r"^round 3: every update was rejected \(s0, s1, s2\)"):
        list(last := fedmpi.Run(config(tmp_path / "a", local={"schedule": OWN + "Cliff"}), comm=SoloComm()))
    run(config(tmp_path / "b", 2))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    last.close()
    assert Diverged.exit_code == 1 and not (tmp_path / "a" / "model.safetensors").exists()
    event = json.loads((tmp_path / "a" / "events.jsonl").read_text())
    assert (event["event"], event["round"]) == ("ended", 2) and event["why"].startswith("round 3: every update was")


def test_a_round_without_anybody_leaves_the_rounds_before_it_on_disk(tmp_path):
    nobody = {"name": "available", "traces": {f"s{i}": [[1, 3]] for i in range(3)}}
    with pytest.raises(NoCohort, match=r"^round 3: no silo is there \(select.traces\)$"):
        run(config(tmp_path / "a", select=nobody))
    run(config(tmp_path / "b", 2))
    shas = [results.inspect(tmp_path / name)["params_sha256"] for name in "ab"]
    assert shas[0] == shas[1] and NoCohort.exit_code == 1


@component
class Counting:
    """State of every kind: created late, with several dimensions, with none."""

    def init(self, num_train):
        return {"seen": np.zeros((len(num_train), 2)), "none": np.zeros(())}

    def select(self, ids, state, outcome, rng):
        late = state.get("late", np.zeros(3, dtype=np.int32)) + 1
        size = 1 + int(late[0] + state["none"] + state["seen"][1, 1]) % len(ids)
        return ids[:size], {"seen": state["seen"] + 1, "none": state["none"] + 1, "late": late}


@component
class PerSample:
    """A rule that keeps a number per sample, so that tensors have another length for every silo."""

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
    """Returns what the test sets."""

    gives: Any = None

    def init(self, num_train):
        return {}

    def select(self, ids, state, outcome, rng):
        return list(ids) if self.gives == "no state" else (self.gives, state)


@pytest.mark.parametrize(
    ("gives", "why"),
    [
        ("no state", r"must return a cohort and its new state \(a dict of arrays\), and returned \['s0', 's1', 's2'\]"),
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
    """A rule with invalid work."""

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
            if record["round"] == 5:  # the second bad round
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
    monkeypatch.setenv("SLURM_JOB_END_TIME", f"{time.time() + 500:.0f}")
    with pytest.raises(Stopped) as caught:
        run(config(tmp_path / "a", **EVENTFUL))
    why = r"SIGUSR1, (4\d\d|500) s before the job's time limit" if event == "signal" else "fedmpi stop"
    on_disk = f"round {epoch} is on disk; the same command resumes"
    assert re.fullmatch(rf"stopped in round {epoch + 1}: {why} \(rank 0\); {on_disk}", str(caught.value))
    assert everything(tmp_path / "a")[0] == epoch and not (tmp_path / "a" / "stop").exists()
    monkeypatch.delenv("EPOCH")
    (tmp_path / "a" / "stop").touch()  # as if it was requested twice: the second request was meant for that job too
    assert run(config(tmp_path / "a", **EVENTFUL))[1].resumed == epoch
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_a_silo_that_raises_is_named_with_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("EPOCH", "2")
    monkeypatch.setenv("EVENT", "raise")
    with pytest.raises(SiloError, match=r"^rank 0, silo 's1', round 3:\nTraceback .*\n(.*\n)*OSError: the disk of s1"):
        run(config(tmp_path, checkpoint={"every": 1}, **EVENTFUL))
    assert everything(tmp_path)[0] >= 1


def failing(monkeypatch, rounds, error):
    """Writing a checkpoint of one of these rounds raises `error`."""
    write_file = checkpoint.write_file

    def write(path, tables):
        if int(path.parent.name[-6:]) in rounds:
            raise error
        return write_file(path, tables)

    monkeypatch.setattr(checkpoint, "write_file", write)


FULL = OSError(errno.ENOSPC, "No space left on device")
READ_ONLY = OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("error", [FULL, READ_ONLY])
def test_training_ends_after_so_many_failed_checkpoints_in_a_row(tmp_path, monkeypatch, caplog, error):
    how = config(tmp_path / "a", 8, checkpoint={"every": 1, "max_failures": 2})
    failing(monkeypatch, {2, 4, 5, 6, 7, 8}, error)
    with pytest.raises(FedmpiError) as ended:
        run(how)
    assert ended.value.exit_code == 1
    assert str(ended.value) == (
        f"2 checkpoints in a row failed, round 5: cannot write a checkpoint into {tmp_path / 'a'}: {error}; "
        "round 3 is on disk; the same command resumes"
    )
    assert not getattr(ended.value, "__notes__", [])  # one line
    told = [record.getMessage() for record in caplog.records if "max_failures" in record.getMessage()]
    assert [line.partition(":")[0] for line in told] == ["round 2", "round 4"]
    assert "failure 1 of 2 in a row (checkpoint.max_failures); training goes on; round 3 is on disk" in told[1]
    assert results.newest(tmp_path / "a") == 3
    assert not (tmp_path / "a" / "checkpoints" / "round-000005").exists()  # its room is given back
    monkeypatch.undo()
    run(how)
    run(config(tmp_path / "b", 8, checkpoint={"every": 1}))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_the_last_checkpoint_of_a_run_may_not_fail(tmp_path, monkeypatch):
    failing(monkeypatch, {5}, FULL)
    with pytest.raises(FedmpiError, match=r"No space left on device; round 4 is on disk; the same command resumes$"):
        run(config(tmp_path, 5, checkpoint={"every": 2, "max_failures": 9}))
    assert not (tmp_path / "model.safetensors").exists()


def test_the_best_round_is_not_lost_with_the_checkpoint_that_had_it(tmp_path, monkeypatch):
    """Held until any checkpoint is written."""
    folders, write_file = [], checkpoint.write_file

    def write(path, tables):
        folders.append(path.parent.name)
        if folders.count("best-000001") and path.parent.name == "best-000001" and "round-000004" not in folders:
            raise FULL
        return write_file(path, tables)

    monkeypatch.setattr(checkpoint, "write_file", write)
    scores = iter([5.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(fedmpi.Run, "_score", lambda self, record: next(scores) if record["round"] else None)
    monkeypatch.setattr(checkpoint, "prune", lambda *args: None)
    scores = iter([5.0, *[1.0] * 20])
    run(config(tmp_path, 4, checkpoint={"every": 2}))
    assert checkpoint.sealed_rounds(tmp_path, best=True) == [1] and checkpoint.sealed_rounds(tmp_path) == [4]


BREAKS = {
    # SIGKILL when the server's file of round 4, or the manifest, is written but not yet renamed.
    "server.h5": """
def replace(source, target, replaced=os.replace):
    if target.name == "server.h5" and target.parent.name == "round-000004":
        os.kill(os.getpid(), signal.SIGKILL)
    replaced(source, target)
os.replace = replace
""",
    "manifest.json": """
def replace(source, target, replaced=os.replace):
    if target.name == "manifest.json" and target.parent.name == "round-000004":
        os.kill(os.getpid(), signal.SIGKILL)
    replaced(source, target)
os.replace = replace
""",
    # No file may grow: simulates a full disk, also inside the library that writes.
    "full": """
import resource
def write(path, tables, written=checkpoint.write_file):
    if path.parent.name == "round-000003":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    return written(path, tables)
checkpoint.write_file = write
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", BREAKS)
def test_a_run_that_breaks_inside_the_write_goes_on_from_the_checkpoint_before(tmp_path, how):
    overrides = ["rounds=8", "out=a", "checkpoint.every=1", "checkpoint.max_failures=2", "device.name=cpu"]
    (tmp_path / "c.yaml").write_text("data: {name: digits, silos: 2}\nlocal: {name: sgd, lr: 0.1, steps: 1}\n")
    program = "import os, signal, sys\nfrom fedmpi import checkpoint, cli\n" + BREAKS[how] + "cli.app()"
    command = [sys.executable, "-c", program, "train", "c.yaml", *overrides]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    if how == "full":
        assert done.returncode == 1, done.stderr
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("fedmpi: "))
        assert line.startswith("fedmpi: 2 checkpoints in a row failed, round 4: cannot write a checkpoint into a: ")
        assert line.endswith("round 2 is on disk; the same command resumes")
    else:
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert [path.name.partition(".part")[0] for path in (tmp_path / "a").rglob("*.part-*")] == [how]
    assert results.newest(tmp_path / "a") == (2 if how == "full" else 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for out in ("a", "b"):
            with fedmpi.Run("c.yaml", *overrides, f"out={out}", comm=SoloComm()) as run_:
                list(run_)
    ids = ("silo-0", "silo-1")
    assert everything(tmp_path / "a", ids) == everything(tmp_path / "b", ids)
    assert not list((tmp_path / "a").rglob("*.part-*"))


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_the_one_before_is_whole(tmp_path):
    once = {"every": 1, "max_failures": 1}
    how, obstacle = config(tmp_path / "a", checkpoint=once), tmp_path / "a" / "checkpoints" / "round-000002"
    with pytest.raises(FedmpiError, match="cannot write a checkpoint into"), fedmpi.Run(how, comm=SoloComm()) as run_:
        for record in run_:
            if record["round"] == 1:
                obstacle.touch()
    assert results.newest(tmp_path / "a") == 1
    obstacle.unlink()
    run(how)
    run(config(tmp_path / "b"))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_an_old_start_writes_nothing_once_a_newer_one_has_begun(tmp_path, monkeypatch):
    how = config(tmp_path, 6, checkpoint={"every": 1})
    with pytest.raises(FedmpiError) as ended, fedmpi.Run(how, comm=SoloComm()) as run_:
        for record in run_:
            if record["round"] == 3:
                kept = results.newest(tmp_path)
                assert fencing.raise_epoch(tmp_path, {}) == 1
    assert ended.value.exit_code == 1 and str(ended.value) == (
        f"this start (epoch 0) of {tmp_path} is superseded by a newer one (epoch 1); it writes nothing more"
    )
    assert results.newest(tmp_path) == kept
    monkeypatch.setenv(fencing.VARIABLE, "0")
    with pytest.raises(ConfigError, match=r"this start \(epoch 0\) .* is superseded"):
        run(how)
    monkeypatch.setenv(fencing.VARIABLE, "1")
    run(how)
    assert results.newest(tmp_path) == 6


@component
class Unequal:
    """Three silos of sixty thousand samples and one of one sample, whose optimum is far away."""

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
    """Weights from a thousand steps: sums are right, or the update is rejected by name; they never wrap around."""
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
