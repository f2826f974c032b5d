"""Whole runs in this process, on one rank: against the plain reference, interrupted, resumed, refused, reported."""

import errno
import os
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import reference
from support.runs import OWN, Normed, config, everything, figures, put_back, rank_distance, refused, run  # noqa: F401
from torch import nn

import fedmpi
from fedmpi import checkpoint, parts, results, sealed
from fedmpi.comm import SoloComm
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.errors import ConfigError, FedmpiError
from fedmpi.flat import FlatModel, sha256
from fedmpi.keeper import Keeper
from fedmpi.records import read_metrics

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
    with fedmpi.Run(how, comm=SoloComm()) as run:
        w_P = run.parameters.double().numpy()
        assert len(list(run)) == 3
    expected_P = expected(how, w_P)
    assert np.abs(run.parameters.numpy() - expected_P).max() < 1e-5 < np.abs(expected_P - w_P).max()


def test_a_silo_whose_update_is_not_finite_is_rejected_by_name_and_the_others_go_on(tmp_path):
    how = config(tmp_path, 2, {"infinite": "s1"}, local={"sampler": "in_order"})
    with fedmpi.Run(how, comm=SoloComm()) as run:
        w_P = run.parameters.double().numpy()
        records = list(run)
    assert [r["rejected"] for r in records] == [["s1"], ["s1"]] and records[0]["cohort"] == ["s0", "s1", "s2"]
    assert "train_loss" not in records[1]["silos"]["s1"] and "accuracy" in records[1]["silos"]["s1"]
    assert np.abs(run.parameters.numpy() - expected(how, w_P, ["s1"])).max() < 1e-5


def test_one_whole_batch_a_silo_is_one_gradient_step_on_the_pooled_data(tmp_path):
    how = config(tmp_path, 1, {"name": "digits", "silos": 5, "partition": "quantity"}, local={"batch_size": None})
    with fedmpi.Run(how, comm=SoloComm()) as run:
        w_P = run.parameters.double().numpy()
        list(run)
    source = how.data.source(how.seed)
    data = [source.open(silo.id) for silo in source.silos]
    x, y = (
        torch.cat([d.x_train for d in data]).flatten(1).double().numpy(),
        torch.cat([d.y_train for d in data]).numpy(),
    )
    expected_P = w_P - 0.1 * reference.softmax_gradient(w_P, x, y)
    assert np.abs(run.parameters.numpy() - expected_P).max() < 5e-6


def test_the_same_seed_gives_the_same_bits_and_another_one_others(tmp_path):
    part = {"data": {"sizes": [9] * 6}, "select": {"name": "uniform", "fraction": 0.5}}
    done = [run(config(tmp_path / str(i), 3, seed=seed, **part)) for i, seed in enumerate((0, 0, 1))]
    ends = [sha256(last.parameters) for _, last in done]
    assert ends[0] == ends[1] != ends[2]
    cohorts = [[tuple(record["cohort"]) for record in records] for records, _ in done]
    assert cohorts[0] == cohorts[1] != cohorts[2] and len(set(cohorts[0])) > 1


def test_an_average_over_rounds_is_evaluated_and_saved_and_training_goes_on_from_the_parameters(tmp_path):
    plain, raw = run(config(tmp_path / "a"))
    points_P, average_P = [], None
    with fedmpi.Run(config(tmp_path / "b", server={"average": {"decay": 0.5}}), comm=SoloComm()) as averaged:
        records = []
        for record in averaged:
            records.append(record)
            points_P.append(averaged.parameters.clone())
            average_P = averaged.averaged_parameters.clone()
    assert (
        sha256(averaged.parameters) == sha256(raw.parameters)
        and raw.averaged_parameters is not averaged.averaged_parameters
    )
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
        "select": {"name": "available", "traces": {"s1": [[1, 2], [4, 9]]}, "inner": {"name": "optimal"}},
        "local": {"epochs": None, "steps": 5},
    },
    "names, types of all kinds": {"local": {"name": OWN + "Keeper"}, "select": {"name": "uniform", "fraction": 0.7}},
    "fresh losses": {**NORMED, "select": {"name": "power_of_choice", "fraction": 0.34, "samples": 7}},
    "bandit": {"select": {"name": "ucb", "fraction": 0.34}, "aggregate": {"name": "qffl", "lr": 0.1}},
    "turns, gram": {
        "select": {"name": "round_robin", "count": 2}, "records": {"gram": "matrix"},
        "exchange": {"plan": "sharded", "scope": "silo"},
    },
}  # fmt: skip


def copied(out, copy):
    """Copy the directory of a run that is writing; restart if a file gets its final name before it was copied."""
    for last in (False,) * 20 + (True,):
        try:
            return shutil.copytree(out, copy)
        except shutil.Error as error:
            if last or any("No such file" not in why for _, _, why in error.args[0]):
                raise
            shutil.rmtree(copy)


@pytest.mark.parametrize("kind", RESUMED)
def test_resuming_gives_the_bits_of_never_having_stopped(tmp_path, kind):
    records, undisturbed = run(config(tmp_path / "a", **RESUMED[kind]))
    first, _ = run(config(tmp_path / "b", **RESUMED[kind]), 2)
    # A kill: the directory in the middle of the run, with whatever is written by then.
    with fedmpi.Run(config(tmp_path / "c", **RESUMED[kind]), comm=SoloComm()) as killed:
        for record in killed:
            if record["round"] == 3:
                copied(tmp_path / "c", tmp_path / "d")
    for out, before in (("b", first), ("d", None)):
        rest, resumed = run(config(tmp_path / out, **RESUMED[kind]))
        if before is not None:
            assert resumed.resumed == 2 and len(rest) == 2
            assert [figures(r) for r in before + rest] == [figures(r) for r in records]
        assert sha256(resumed.parameters) == sha256(undisturbed.parameters)
        assert everything(tmp_path / out) == everything(tmp_path / "a")
        assert [figures(r) for r in read_metrics(tmp_path / out)] == [figures(r) for r in records]


@pytest.mark.slow
def test_resuming_gives_the_same_bits_on_several_threads_too(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    wide = {"model": {"name": "mlp", "hidden": [400, 400]}, "local": {"batch_size": 200}, "data": {"sizes": (400, 600)}}
    run(config(tmp_path / "a", 4, **wide))
    run(config(tmp_path / "b", 4, **wide), 2)
    assert run(config(tmp_path / "b", 4, **wide))[1].threads == torch.get_num_threads() == 2
    shas = {results.inspect(tmp_path / name)["params_sha256"] for name in "ab"}
    assert len(shas) == 1


def test_a_run_that_is_done_can_be_given_more_rounds(tmp_path):
    run(config(tmp_path / "a", 4))
    assert run(config(tmp_path / "b", 2))[0] and run(config(tmp_path / "b", 2))[0] == []
    run(config(tmp_path / "b", 4))
    assert everything(tmp_path / "b") == everything(tmp_path / "a")


@pytest.mark.parametrize("name", ["server.h5", "rank-0000.h5", "manifest.json"])
@pytest.mark.parametrize("harmed", [2, 4])
def test_one_harmed_checkpoint_does_not_stand_in_the_way(tmp_path, harmed, name, caplog):
    run(config(tmp_path / "a", 4))
    path = sealed.folder_of(tmp_path / "a", harmed) / name
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
        ({"data": {"sizes": [20, 10, 50]}}, ": data.sizes[1] is 30 there and 10 here; choose another out="),
        (
            {"data": {"sizes": [11, 12, 13, 14]}},
            ": data.sizes[0] is 20 there and 11 here; data.sizes[1] is 30 there and 12 here; data.sizes[2] is 50 there "
            "and 13 here (and 1 more); choose another out=",
        ),
        (
            {"WIDTH": "7"},
            "the model's base.bias is ['float32', [6], 'shared'] there and ['float32', [7], 'shared'] here",
        ),
        ({"BLOBS": "9"}, "the data of silo 's0' (and 2 more) are not the same"),
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
    assert run(config(tmp_path, 2, **NORMED))[1].resumed == 1  # the refused run left no lock


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": {"sizes": [5, 0]}}, "silo 's1' has no training samples"),
        ({"data": {"declared": 21}}, "silo 's0' declares 21 training samples but has 20"),
        ({"data": {"shape": [5]}}, "silo 's0': training samples have shape (4,), the dataset's is (5,)"),
        ({"model": {"name": "logistic", "inputs": 3}}, "3"),
        ({"model": {"name": OWN + "Normed", "inputs": 5}}, "model and data disagree: mat1 and mat2 shapes cannot be"),
        ({"model": {"name": "collections:Counter"}}, "model: Counter is no torch module"),
        ({"objective": {"loss": "mse"}}, "objective.loss: 'mse' is for regression, the data's task is classification"),
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
    for out in (tmp_path / "file" / "run", tmp_path / "file"):
        assert refused(config(out)) == f"out: cannot write into {out}: {tmp_path}/file is a file"
    with fedmpi.Run(config(tmp_path / "run", 1), comm=SoloComm()) as run:
        assert refused(config(tmp_path / "run", 1)) == f"out: another job is training in {tmp_path}/run"
        assert len(list(run)) == 1


def test_a_full_disk_is_refused_and_leaves_the_directory_free(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert refused(config(tmp_path, 1)) == f"out: cannot write into {tmp_path}: No space left on device"
    assert len(run(config(tmp_path, 1))[0]) == 1


@pytest.mark.parametrize("text", ["a: [b", "", "\xff"])
def test_a_damaged_configuration_file_is_named_and_leaves_the_checkpoints(tmp_path, text):
    auto = {"exchange": {"plan": "auto"}}
    run(config(tmp_path, 1, **auto))
    (tmp_path / "config.yaml").write_bytes(text.encode("latin-1"))
    assert refused(config(tmp_path, 2, **auto)).startswith(f"{tmp_path}/config.yaml is damaged; put it back")
    assert results.newest(tmp_path) == 1


def test_a_run_with_rounds_and_no_checkpoint_refers_to_watch(tmp_path):
    run(config(tmp_path, 1))
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match=f"no whole checkpoint yet; fedmpi watch {tmp_path} shows its rounds"):
        results.inspect(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"holds no whole checkpoint$"):
        results.inspect(tmp_path)


def test_a_flipped_bit_of_the_configuration_file_is_noticed_by_all_that_read_it(tmp_path):
    run(config(tmp_path, 1))
    path = tmp_path / "config.yaml"
    whole = path.read_bytes()
    for at in range(0, len(whole), len(whole) // 23):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        for look in (results.inspect, results.evaluate, lambda root: results.export(root, tmp_path / "m.pt")):
            with pytest.raises(ConfigError, match=r"config\.yaml is damaged; put it back"):
                look(tmp_path)
        assert refused(config(tmp_path, 2)).startswith(f"{path} is damaged; put it back")
    path.unlink()
    assert refused(config(tmp_path, 2)) == f"{tmp_path} is not a run directory: config.yaml: No such file or directory"
    path.write_bytes(whole)
    assert run(config(tmp_path, 2))[1].resumed == 1


@pytest.mark.parametrize("format", [1, 2, 4])
def test_a_directory_of_another_format_is_refused_by_both_versions_and_left_as_it_is(tmp_path, monkeypatch, format):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", format)
        patch.setattr(fedmpi, "__version__", "0.1.0")
        patch.setattr(parts, "versions", parts.versions.__wrapped__)  # they are looked up once
        run(config(tmp_path, 1))
    path = tmp_path / "config.yaml"
    if format == 1:  # it did not say so
        text, _, _ = path.read_text().rpartition("# sha256")
        path.write_text(text.replace("  format: 1\n", ""))
    files = [path, *(found for found in tmp_path.glob("checkpoints/*/*"))]
    before = [found.read_bytes() for found in files]
    says = f"{tmp_path} is of format {format}, written by fedmpi 0.1.0; this fedmpi {fedmpi.__version__}"
    says += " reads and writes format 3: finish the run with that version, or choose another out="
    for look in (results.inspect, results.evaluate, lambda root: results.export(root, tmp_path / "m.pt")):
        with pytest.raises(ConfigError) as caught:
            look(tmp_path)
        assert str(caught.value) == says
    assert refused(config(tmp_path, 2)) == says
    assert len(files) == 4 and [found.read_bytes() for found in files] == before


def test_what_is_not_shared_is_checked_before_it_is_used_and_mended_by_resuming(tmp_path, start):
    how = {"init": start, "exchange": {"parameters": "trainable"}, **NORMED}
    run(config(tmp_path / "a", 1, **how))
    path = tmp_path / "a" / "unshared.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(ConfigError, match=r"unshared\.safetensors is damaged"):
        results.evaluate(tmp_path / "a")
    run(config(tmp_path / "a", 2, **how))
    assert path.read_bytes() == whole


def test_a_refusal_leaves_the_directory_free(tmp_path):
    refused(config(tmp_path, 1, model={"name": OWN + "Normed", "inputs": 5}))
    assert len(run(config(tmp_path, 1))[0]) == 1


# ---------------------------------------------------------------- what a run reports and leaves


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


def test_a_users_own_loss_is_trained_and_own_metric_is_of_a_silos_whole_test_set(tmp_path):
    objective = {"loss": OWN + "squared_loss", "metrics": [{"name": OWN + "rank_distance", "maximize": True}]}
    plain = run(config(tmp_path / "b", 2))[1]
    (_, record), own = run(config(tmp_path / "a", 2, objective=objective, evaluate={"batch_size": 3}))
    assert sha256(own.parameters) != sha256(plain.parameters)
    data = own.config.data.source(0)
    with torch.no_grad():
        by_hand = {s: float(rank_distance(own.model(data.open(s).x_test), None)) for s in ("s0", "s1", "s2")}
    assert {s: record["silos"][s]["rank_distance"] for s in by_hand} == pytest.approx(by_hand, rel=1e-6)
    assert record["silo_mean_rank_distance"] == pytest.approx(np.mean(list(by_hand.values())))
    assert "rank_distance" not in record
    assert results.inspect(tmp_path / "a")["best"].keys() == {"round", "loss", "silo_mean_rank_distance"}


def test_a_round_that_is_checkpointed_is_not_copied_as_the_best_besides(tmp_path, monkeypatch):
    made, best = [], checkpoint.Best

    def counted(round, *rest):
        made.append(round)
        return best(round, *rest)

    monkeypatch.setattr(checkpoint, "Best", counted)
    objective = {"metrics": [{"name": OWN + "up_and_down", "maximize": True}]}
    records, _ = run(config(tmp_path, 8, checkpoint={"every": 2}, objective=objective))
    values = [record["silo_mean_up_and_down"] for record in records]
    assert made == [r for r in range(1, 9, 2) if values[r - 1] > max(values[: r - 1], default=-1.0)] != []
    assert results.choose(tmp_path, "best") == 1 + values.index(max(values))


class Listening(SoloComm):
    """Records what would be said to other ranks."""

    def __init__(self):
        super().__init__()
        self.beats, self.timeouts = [], []

    def beat(self, trains=False):
        self.beats.append(trains)

    def set_up(self, timeout_s):
        self.timeouts.append(timeout_s)


def test_ranks_that_write_a_checkpoint_say_that_they_are_there():
    for limit_s, answers in ((float("inf"), [False, False, True]), (0.0, [False])):
        left = list(answers)
        writer = SimpleNamespace(wait=lambda s, left=left: left.pop(0))
        stub = SimpleNamespace(writer=writer, comm=(heard := Listening()))
        assert Keeper._wait(stub, limit_s) == answers[-1] and left == []
        assert heard.beats == [True] * answers.count(False)


def test_ranks_that_evaluate_a_checkpoint_say_that_they_are_there(tmp_path):
    run(config(tmp_path, 1, comm={"timeout_s": 77.0}))
    results.evaluate(tmp_path, comm=(heard := Listening()))
    assert heard.timeouts == [77.0] and len(heard.beats) >= 3 and all(heard.beats)


def test_what_a_killed_process_left_half_written_goes_with_the_next_start(tmp_path):
    with subprocess.Popen(["true"]) as gone:
        pass
    names = [f"model.safetensors.part-{pid}-0a1b2c3d" for pid in (gone.pid, os.getppid())]
    for name in (*names, "mine.part-1"):
        (tmp_path / name).write_text("half")
    run(config(tmp_path, 1))
    left = {path.name for path in tmp_path.glob("*.part-*")}
    assert left == {names[1], "mine.part-1"}  # one of a running process, and one that is not ours


BEST = {"plain": {}, "personal": {**NORMED, **PERSONAL}, "average": {"server": {"average": {"decay": 0.5}}}}


@pytest.mark.parametrize("kind", BEST)
def test_the_best_round_is_on_disk_and_the_same_to_all_that_ask(tmp_path, kind):
    """The best round is off the grid of checkpoints, and was not yet written when the run was killed."""
    objective = {"metrics": [{"name": OWN + "up_and_down", "maximize": True}]}
    how = {"checkpoint": {"every": 4, "keep": 1}, "objective": objective, **BEST[kind]}
    records, _ = run(config(tmp_path / "a", 12, **how), 11)
    key = "silo_mean_up_and_down"
    values = [record[key] for record in records]
    best = 1 + values.index(max(values))
    assert best % 4 and best != 11
    with fedmpi.Run(config(tmp_path / "b", 12, **how), comm=SoloComm()) as killed:
        for record in killed:
            if record["round"] == best:
                copied(tmp_path / "b", tmp_path / "c")
    done = max(checkpoint.sealed_rounds(tmp_path / "c"), default=0)
    assert done < best
    run(config(tmp_path / "c", 12, **how), 11 - done)
    for out in (tmp_path / "a", tmp_path / "c"):
        told = results.inspect(out)
        assert told["best"] == {k: records[best - 1][k] for k in ("round", "loss", key)}
        assert told["on_disk"] == [{"round": best, "resumable": False}, {"round": 11, "resumable": True}]
        assert results.choose(out, "best") == results.export(out, out / "m.pt", "best", silo="s0") == best
        for which in ("best", best):
            again = results.evaluate(out, which)
            assert (again["round"], again["loss"], again[key]) == (best, records[best - 1]["loss"], max(values))
            told_then = records[best - 1]["silos"]
            assert all(row.items() <= told_then[silo].items() for silo, row in again["silos"].items())
    assert len(run(config(tmp_path / "a", 12, **how))[0]) == 1


@pytest.mark.parametrize("fields", [{}, {**NORMED, **PERSONAL}], ids=["shared", "personal"])
def test_what_a_directory_says_is_what_the_run_said(tmp_path, fields):
    records, done = run(config(tmp_path, 5, checkpoint={"every": 1, "keep": 2}, **fields))
    found = results.inspect(tmp_path)
    assert (found["rounds"], found["params_sha256"]) == (5, sha256(done.parameters))
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
    with pytest.raises(ConfigError, match="no checkpoint of round 99; available: "):
        results.choose(tmp_path, 99)


def outcome(call, *args):
    """The result, or that it was refused."""
    try:
        return call(*args)
    except FedmpiError:
        return "refused"


@pytest.mark.parametrize("name", ["server.h5", "manifest.json"])
def test_a_harmed_checkpoint_is_never_the_best(tmp_path, name):
    run(config(tmp_path, 4, checkpoint={"every": 1, "keep": 9}))
    best = results.choose(tmp_path, "best")
    path = sealed.folder_of(tmp_path, best) / name
    path.write_bytes(path.read_bytes()[:-9])
    other = outcome(results.choose, tmp_path, "best")
    assert other != best and outcome(results.choose, tmp_path, best) == "refused"
    if name == "manifest.json":
        assert other in range(5)  # the others are whole


def test_a_silos_own_layers_are_looked_at_before_they_are_evaluated_or_exported(tmp_path, caplog):
    run(config(tmp_path, 4, **NORMED, **PERSONAL))
    before = results.evaluate(tmp_path, 2)
    results.export(tmp_path, tmp_path / "before.safetensors", 2, silo="s1")
    path = sealed.folder_of(tmp_path, 4) / "rank-0000.h5"
    whole, kept = path.read_bytes(), checkpoint.read_silos(tmp_path, 4, ["s1"])["s1"]
    row = kept[*checkpoint.KEPT, "fedmpi/personal_0"]
    at = whole.index(row.numpy().tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
    assert results.evaluate(tmp_path) == before
    assert results.export(tmp_path, tmp_path / "after.safetensors", silo="s1") == 2
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert caplog.text.count("skipped checkpoint of round 4") == 2
    with pytest.raises(ConfigError, match="is corrupt"):
        results.export(tmp_path, tmp_path / "after.safetensors", 4, silo="s1")
    with pytest.raises(ConfigError, match="--silo: no silo 's9'"):
        results.export(tmp_path, tmp_path / "after.safetensors", silo="s9")


@pytest.mark.parametrize("name", ["model.pt", "sub/model.safetensors"])
def test_an_exported_model_is_a_state_dict_and_a_start_for_another_run(tmp_path, name):
    _, done = run(config(tmp_path / "a", 2, **NORMED))
    assert results.export(tmp_path / "a", tmp_path / name) == 2
    state = load_file(tmp_path / name) if name.endswith("tensors") else torch.load(tmp_path / name)
    module = Normed()
    module.load_state_dict(state)
    shared_P = FlatModel(module).params()
    assert torch.equal(shared_P, done.parameters)
    with fedmpi.Run(
        config(tmp_path / "b", 1, init=str(tmp_path / "a" / "model.safetensors"), **NORMED), comm=SoloComm()
    ) as b:
        assert torch.equal(b.parameters, done.parameters)
    with pytest.raises(ConfigError, match=r"end the name with \.safetensors, \.pt, "):
        results.export(tmp_path / "a", tmp_path / "model.h5")


@pytest.fixture
def start(tmp_path):
    """A file with another frozen layer than the seed's."""
    module = Normed()
    nn.init.constant_(module.base.weight, 0.25)
    save_file(module.state_dict(), tmp_path / "start.safetensors")
    return str(tmp_path / "start.safetensors")


def test_an_exported_model_has_the_frozen_part_that_it_was_trained_with(tmp_path, start):
    records, _ = run(config(tmp_path / "a", 1, init=start, exchange={"parameters": "trainable"}, **NORMED))
    results.export(tmp_path / "a", tmp_path / "m.pt", silo="s0")
    assert bool((torch.load(tmp_path / "m.pt")["base.weight"] == 0.25).all())
    assert results.evaluate(tmp_path / "a")["loss"] == records[-1]["loss"]


def test_a_resumed_run_never_goes_on_with_another_frozen_part(tmp_path, start):
    shared = {"exchange": {"parameters": "trainable"}, **NORMED}
    end = sha256(run(config(tmp_path / "a", 4, init=start, **shared))[1].parameters)
    run(config(tmp_path / "b", 4, init=start, **shared), 2)
    assert outcome(lambda: sha256(run(config(tmp_path / "b", 4, **shared))[1].parameters)) in (end, "refused")


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
    with pytest.raises(
        ConfigError, match="silo 'south' has 'tchol' where silo 'north' has 'chol'; rename them, or name"
    ):
        fedmpi.Run(build(Config, values), comm=SoloComm())
