"""`exchange.overlap`: invalid options, and that it converges when local training goes far."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import reference

import fedmpi
from fedmpi import checkpoint, results, sealed
from fedmpi.comm import SoloComm
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.flat import sha256
from fedmpi.plan import plan


def test_plan_shared_memory_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"^exchange: plan shared_memory takes no overlap, since it writes the param"):
        build(Config, {"exchange": {"plan": "shared_memory", "overlap": True}})


def test_shared_memory_is_never_measured(tmp_path):
    config = build(Config, {"out": str(tmp_path), "rounds": 1, "exchange": {"plan": "measure", "overlap": True}})
    with fedmpi.Run(config, comm=SoloComm()) as run:
        assert sorted(run.plan.seconds) == ["replicated", "root", "sharded"]
        assert len(list(run)) == 1


def test_a_checkpoint_is_of_the_parameters_that_its_record_speaks_of(tmp_path):
    """And its size is what plan says."""
    config = build(
        Config,
        {
            "rounds": 4, "out": str(tmp_path), "data": {"name": "digits", "silos": 3}, "device": {"name": "cpu"},
            "model": {"name": "mlp", "hidden": [512]},
            "exchange": {"overlap": True}, "server": {"optimizer": "fedavgm"}, "checkpoint": {"every": 1, "keep": 9},
        },
    )  # fmt: skip
    with fedmpi.Run(config, comm=SoloComm()) as run:
        records, shas = zip(*((record, sha256(run.parameters)) for record in run), strict=True)
    for record, sha in zip(records, shas, strict=True):
        found = results.evaluate(tmp_path, record["round"])
        assert (found["loss"], found["accuracy"]) == (record["loss"], record["accuracy"])
        assert sha256(checkpoint.read_server(tmp_path, record["round"])[checkpoint.PARAMS]) == sha
        on_disk = sum(f.stat().st_size for f in sealed.folder_of(tmp_path, record["round"]).glob("*.h5"))
        assert on_disk == pytest.approx(plan(config, {}, 1)["checkpoint_bytes"], rel=0.02)
    assert results.inspect(tmp_path)["params_sha256"] == shas[-1] == sha256(run.parameters)
    model = load_file(tmp_path / "model.safetensors")
    assert sha256(torch.cat([model[name].reshape(-1) for name in run.model.state_dict()])) == shas[-1]


# ---------------------------------------------------------------- convergence


@pytest.fixture
def undisturbed():
    """Restore what a reproducible run sets in its process."""
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exact)


LR, DECAY, EPOCHS, BATCH, ROUNDS = 1.0, 1e-3, 5, 32, 20


def accuracies(tmp_path, overlap):
    """Parameters by round, and the run's configuration and start."""
    config = build(
        Config,
        {
            "rounds": ROUNDS,
            "out": str(tmp_path / str(overlap)),
            "data": {"name": "digits", "silos": 4, "partition": {"name": "dirichlet", "alpha": 1.0}},
            "local": {
                "name": "sgd", "lr": LR, "epochs": EPOCHS, "batch_size": BATCH, "sampler": "in_order",
                "optimizer": {"name": "SGD", "weight_decay": DECAY},
            },
            "exchange": {"overlap": overlap, "reduction": "reproducible"},
            "checkpoint": {"every": 100},
            "device": {"name": "cpu"},
        },
    )  # fmt: skip
    with fedmpi.Run(config, comm=SoloComm()) as run:
        first_P = run.parameters.double().numpy()
        return [record["accuracy"] for record in run], config, first_P


def naive(config, w_P):
    """The naive version: training starts at the old parameters, and its mean is added to those that have arrived."""
    source = config.data.source(config.seed)
    data = [source.open(silo.id) for silo in source.silos]
    arrays = [[t.reshape(len(t), -1).squeeze().double().numpy() for t in some] for some in data]
    x, y = (np.concatenate([some[i] for some in arrays]) for i in (2, 3))
    old_P, found = w_P, []

    def gradient(w_P, x, y):
        return reference.softmax_gradient(w_P, x, y.astype(int)) + DECAY * w_P

    silos = [
        (len(a[0]), [(a[0][i : i + BATCH], a[1][i : i + BATCH]) for i in range(0, len(a[0]), BATCH)] * EPOCHS)
        for a in arrays
    ]
    for _ in range(ROUNDS):
        ends = [reference.local_sgd(old_P, batches, LR, gradient) for _, batches in silos]
        mean_P = reference.mean_delta(old_P, ends, [n for n, _ in silos])
        old_P, w_P = w_P, w_P + mean_P
        found.append(float(((x @ w_P[:640].reshape(10, 64).T + w_P[640:]).argmax(1) == y).mean()))
    return found


@pytest.mark.slow
def test_overlap_converges_where_local_training_goes_far_and_the_naive_way_does_not(tmp_path, undisturbed):
    """Five epochs at a large step, silos with different classes. Late means on old starts oscillate for ever."""
    without, config, first_P = accuracies(tmp_path, False)
    overlap, *_ = accuracies(tmp_path, True)
    swinging = naive(config, first_P)
    for name, found in (("without", without), ("overlap", overlap), ("naive", swinging)):
        print(f"{name:8}", *(f"{accuracy:.3f}" for accuracy in found))

    def largest_fall(found):
        return max(before - after for before, after in pairwise(found[ROUNDS // 2 :]))

    assert without[-1] > 0.95
    assert overlap[-1] > without[-1] - 0.012
    assert largest_fall(overlap) < 0.01 and largest_fall(without) < 0.01
    assert largest_fall(swinging) > 0.02
