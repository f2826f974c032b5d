"""What `train` refuses when a run is set up, `fedmpi check` finds with the same words; and it leaves nothing behind."""

import json
import sys

import numpy as np
import pytest
import yaml

import fedmpi
from fedmpi import checkpoint, sealed
from fedmpi.check import check, lines
from fedmpi.comm import SoloComm
from fedmpi.errors import ConfigError
from fedmpi.files.folder import Disk
from fedmpi.files.root import open_run
from fedmpi.jobs.post import about_run

NOISE = {
    "privacy": {"name": "silo", "clip": 1.0, "sigma": 1.0, "delta": 1e-5},
    "aggregate": {"name": "mean", "weights": "uniform"},
}
MASKED = {"secure": {"name": "secagg", "threshold": 3}, "updates": [{"name": "clip", "norm": 1.0}]}


class Place:
    """Four silos' files and a configuration."""

    def __init__(self, root):
        self.root = root
        for number, silo in enumerate("abcd"):
            draw = np.random.default_rng(number)
            y = np.arange(40) % 3
            x = draw.standard_normal((40, 4)).astype(np.float32) + y[:, None]
            np.savez(root / f"{silo}.npz", x_train=x[:32], y_train=y[:32], x_test=x[32:], y_test=y[32:])

    def config(self, out="out", host=None, **values):
        silos = [{"id": silo, "path": f"{silo}.npz", "host": host} for silo in "abcd"]
        data = {"name": "files", "root": str(self.root), "task": "classification", "shape": [4], "num_classes": 3}
        how = {
            "rounds": 2,
            "out": str(self.root / out),
            "data": {**data, "silos": silos, **values.pop("data", {})},
            "model": {"name": "mlp", "hidden": [5]},
            "local": {"name": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 8},
            **values,
        }
        path = self.root / f"{out}.yaml"
        path.write_text(yaml.safe_dump(how))
        return path

    def trained(self, **values):
        with fedmpi.Run(self.config(**values), comm=SoloComm()) as run:
            list(run)
            return run

    def check(self, **values):
        return check(self.config(**values), [], SoloComm(), timing=False)

    def refused_alike(self, **values):
        """The fault that `train` and the check name, in the same words."""
        result = self.check(**values)
        with pytest.raises(ConfigError) as caught:
            self.trained(**values)
        assert str(caught.value) in result["faults"], lines(result)
        return str(caught.value)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A place with a trained run: base."""
    place = Place(tmp_path_factory.mktemp("base"))
    place.trained(out="base")
    return place


def test_a_metric_that_ends_the_run(place):
    early = {"metric": "acuracy", "patience": 2}
    assert "did you mean 'accuracy'?" in place.refused_alike(stop={"early": early})
    without = {"silos": [{"id": "a", "path": "a.npz"}]}
    arrays = dict(np.load(place.root / "a.npz"))
    np.savez(place.root / "a.npz", **{**arrays, "x_test": arrays["x_test"][:0], "y_test": arrays["y_test"][:0]})
    told = place.refused_alike(stop={"early": {**early, "metric": "loss"}}, data=without)
    assert "no silo has test data, so there is no loss" in told
    early["metric"] = "personal_accuracy"
    assert "records have no 'personal_accuracy'" in place.refused_alike(stop={"early": early})
    ditto = {"name": "ditto", "lr": 0.1, "epochs": 1, "batch_size": 8}
    assert place.check(stop={"early": early}, local=ditto)["faults"] == []


def test_masks_over_few_test_figures(place):
    for silo in "bcd":
        arrays = dict(np.load(place.root / f"{silo}.npz"))
        np.savez(place.root / f"{silo}.npz", **{k: v if "train" in k else v[:0] for k, v in arrays.items()})
    assert "1 of the silos have test data, and secure.threshold is 3" in place.refused_alike(**MASKED)


def test_a_missing_package_of_a_sink(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert place.refused_alike(records={"sinks": ["wandb"]}).startswith("records.sinks: wandb needs the package wandb")


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"name": "mlp", "hidden": [6]}},
        {"exchange": {"parameters": ["*weight"]}},
        {"server": {"average": {"decay": 0.5}}},
        {"fork_round": 7},
    ],
    ids=str,
)
def test_a_fork_that_cannot_begin(base, values):
    values = dict(values)
    run = f"{base.root / 'base'}@{values.pop('fork_round', 2)}"
    told = base.refused_alike(out="fork", fork=run, rounds=4, **values)
    assert told.startswith("fork: ")
    result = base.check(out="fork", fork=f"{base.root / 'base'}@2", rounds=4)  # after a start that was refused
    assert result["faults"] == [], lines(result)


def test_a_fork_whose_server_state_does_not_fit(base):
    changed = {"server": {"optimizer": "fedadam"}, "fork": f"{base.root / 'momentum'}@2", "rounds": 4}
    base.trained(out="momentum", server={"optimizer": {"name": "fedavgm"}})
    assert "begin it anew with fork: {run: " in base.refused_alike(out="adam", **changed)


def test_checkpoints_of_another_model(base, monkeypatch):
    """Its configuration is the same; its code, which is no user's, is not."""
    from fedmpi.models import MLP

    build = MLP.build

    def wider(self, source):
        object.__setattr__(self, "hidden", (9,))
        return build(self, source)

    monkeypatch.setattr(MLP, "build", wider)
    monkeypatch.setattr("fedmpi.parts.differences", lambda *args: [])
    monkeypatch.setattr("fedmpi.check.folder.differences", lambda *args: [])
    assert "holds checkpoints of another run: the model's" in base.refused_alike(out="base")


EVERY = {"rounds": 3, "checkpoint": {"every": 1, "keep": 9}}


def damage(root, round):
    path = sealed.folder_of(root, round) / checkpoint.SERVER
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_damaged_checkpoints(place):
    place.trained(**EVERY)
    out = place.root / "out"
    assert place.check(**EVERY)["out"]["newest_round"] == 3
    damage(out, 3)
    result = place.check(**EVERY)
    assert result["faults"] == [] and result["out"]["newest_round"] == 2
    assert result["warnings"] == [f"{out}: the checkpoint of round 3 is damaged; the run goes on after round 2"]
    for round in checkpoint.sealed_rounds(out)[:-1]:
        damage(out, round)
    told = place.refused_alike(**EVERY)
    assert told.startswith(f"{out} holds checkpoints up to round 3, but none is whole on rank 0; repair it, or")


def test_members_that_have_all_left_since_the_last_whole_checkpoint(place):
    with fedmpi.Run(place.config(**EVERY), comm=SoloComm()) as run:
        run.rebuild(run.membership.without("b", "c", "d"))
        for record in run:
            if record["round"] == 2:
                break
            run.rebuild(run.membership.with_silo("d", 0).without("a"))
    assert place.check(**EVERY)["faults"] == []
    damage(place.root / "out", 2)
    assert place.refused_alike(**EVERY).startswith("all members of round 1 left later (a), and the newer checkpoints")


def test_the_account_of_privacy_is_told_and_must_be_whole(place):
    result = place.check(**NOISE)
    assert result["faults"] == [] and result["privacy"]["sigma"] == 1.0
    assert any(line.startswith("privacy: all rounds spend epsilon ") for line in lines(result))
    place.trained(**NOISE)
    file = place.root / "out" / "privacy.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps({**rows, "uses": []}))
    assert "counts 0 uses and the checkpoint 2" in place.refused_alike(**NOISE, rounds=4)
    file.write_text("{")
    assert "is damaged, so what the run has spent is not known" in place.refused_alike(**NOISE, rounds=4)


def test_the_account_of_records_needs_no_declared_sizes(place):
    records = {"name": "record", "clip": 1.0, "epsilon": 4.0, "delta": 1e-4}
    result = place.check(privacy=records)
    assert result["faults"] == [] and 3 < result["privacy"]["epsilon"] <= 4, lines(result)
    assert result["privacy"]["silos"].keys() == set("abcd")
    fitted = {"scale": "standard"}
    assert "preprocessing is fitted to training rows" in place.refused_alike(privacy=records, data=fitted)


def test_the_folder_of_silos_in_jobs(place):
    shared = place.root / "shared"
    files = {"name": "files", "root": str(shared)}
    assert f"{shared} does not exist; create it" in place.check(transport=files)["faults"][0]
    shared.mkdir()
    result = place.check(transport=files)
    assert result["faults"] == [] and [*shared.iterdir()] == [], lines(result)
    [told] = place.check(transport={**files, "min_silos": 5})["faults"]
    assert told == "transport.min_silos: 5, and there are 4 silos"
    silos = [{"id": "a" * 150, "path": "a.npz"}]
    assert "too long for file names" in place.check(transport=files, data={"silos": silos})["faults"][0]
    (shared / "notes.txt").touch()
    assert "is not empty and holds no run ('notes.txt')" in place.check(transport=files)["faults"][0]
    (shared / "notes.txt").unlink()
    config, _ = fedmpi.config.load(place.config(transport=files))
    open_run(Disk(shared), about_run(config))
    there = sorted(shared.rglob("*"))
    assert place.check(transport=files)["faults"] == [] and sorted(shared.rglob("*")) == there
    [told] = place.check(transport=files, seed=7)["faults"]
    assert "belongs to another run: its seed is 0, here it is 7" in told


def test_what_no_silo_could_show_is_not_called_sound(place):
    result = place.check(host="elsewhere")
    assert result["faults"] == [] and result["warnings"] == []
    told = next(line for line in result["unseen"] if line.startswith("samples, model and loss on them, speed"))
    assert "no silo can be opened from here" in told and "mpirun" in told
    assert lines(result)[-1] == "no fault found, 6 parts not looked at"
