"""`fedmpi check`: it finds every planted mistake in one run, all of several at once, and leaves nothing behind."""

import json
import math
import random

import numpy as np
import pytest
import torch
import yaml
from support.mpi import FEDMPI, mpirun
from support.programs.place import own_lines
from support.runs import put_back
from support.study import SILOS, no_gpu, samples, study
from torch import nn

import fedmpi
from fedmpi import disk
from fedmpi.check import check, folder, lines
from fedmpi.comm import SoloComm
from fedmpi.components import component
from fedmpi.types import Silo, SiloData, Source

__all__ = ["no_gpu", "put_back", "study"]

OWN = f"{__name__}:"


# ---------------------------------------------------------------- code of a user, with mistakes


class Raises(nn.Linear):
    def __init__(self):
        super().__init__(7, 3)


class Outputs(nn.Linear):
    def __init__(self, number=2):
        super().__init__(4, number)


class Pair(Outputs):
    def forward(self, x):
        return super().forward(x), x


class Detached(Outputs):
    def __init__(self):
        super().__init__(3)

    def forward(self, x):
        return super().forward(x).detach()


class Idle(Outputs):
    """A model with a layer that its forward pass does not use."""

    def __init__(self):
        super().__init__(3)
        self.idle = nn.Linear(2, 2)


class Frozen(Outputs):
    def __init__(self):
        super().__init__(3)
        self.requires_grad_(False)


class Unsound(Outputs):
    """A model whose first parameters are not numbers."""

    def __init__(self):
        super().__init__(3)
        nn.init.constant_(self.weight, math.nan)


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def many_numbers(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def logarithm(outputs, targets):
    return outputs.sum().mul(0).log()


def raises(outputs, targets):
    raise KeyError("no such column")


@component
class InCode:
    """A dataset in code, with mistakes on request."""

    wrong: str = ""

    def source(self, seed):
        def opened(silo):
            x, y = map(torch.from_numpy, samples(SILOS.index(silo)))
            if self.wrong == "labels of another type":
                y = y.float()
            if self.wrong == "samples of another type":
                x = x.double()
            if self.wrong == "raises":
                raise FileNotFoundError("database is gone")
            if self.wrong == "nan":
                x[3, 2] = math.nan
            if self.wrong == "label":
                y[5] = 7
            if self.wrong == "fewer targets":
                y = y[:50]
            return SiloData(x[:40], y[:40], x[40:], y[40:])

        return Source("classification", (4,), 3, tuple(Silo(silo) for silo in SILOS), opened)


# ---------------------------------------------------------------- the mistakes, one each

FAULT, WARNING, UNSEEN, ADVICE = "faults", "warnings", "unseen", "advice"
MISTAKES = {}


def mistake(level, *says):
    """Plants one mistake into a study; a line of this level must contain all of `says`."""

    def register(plant):
        MISTAKES[plant.__name__] = (plant, level, says)
        return plant

    return register


def own_data(wrong):
    return {"data": {"name": OWN + "InCode", "wrong": wrong}}


def sets(level, says, name, **values):
    """A mistake in the configuration alone: dotted keys, with __ for dots."""

    def plant(study):
        for key, value in values.items():
            *parents, last = key.split("__")
            section = study.config
            for part in parents:
                section = section.setdefault(part, {})
            section[last] = value

    MISTAKES[name] = (plant, level, says if isinstance(says, tuple) else (says,))


@mistake(FAULT, "silo 'b': no file")
def a_file_is_missing(study):
    del study.arrays["b"]


@mistake(FAULT, "silo 'b'", "is a folder")
def a_path_is_a_folder(study):
    study.config["data"]["silos"][1]["path"] = "b.npz"
    del study.arrays["b"]
    (study.root / "data/b.npz").mkdir(parents=True)


@mistake(FAULT, "silo 'c'", "cannot be read as .npz")
def a_file_is_damaged(study):
    del study.arrays["c"]
    study.bytes["c.npz"] = b"PK\x03\x04 cut off"


@mistake(FAULT, "silo 'b'", "have shape [3]", "data.shape is [4]")
def one_silo_has_another_shape(study):
    study.arrays["b"]["x"] = study.arrays["b"]["x"][:, :3]


@mistake(FAULT, "silo 'c'", "label 7 is not a whole number from 0 to 2")
def a_label_is_outside_the_classes(study):
    study.arrays["c"]["y"][4] = 7


@mistake(FAULT, "labels counted from 1 need data.classes: [1, 2, 3]")
def labels_are_counted_from_one(study):
    for arrays in study.arrays.values():
        arrays["y"] = arrays["y"] + 1


@mistake(FAULT, "silo 'd'", "NaN or infinite values in 2 of 60 samples")
def features_are_nan(study):
    study.arrays["d"]["x"][[3, 9], 1] = np.nan


@mistake(FAULT, "every training label of all silos is 1", "check data.target")
def labels_are_constant(study):
    for arrays in study.arrays.values():
        arrays["y"] = np.ones(60, int)


@mistake(WARNING, "silo 'b': all 48 training labels are 2")
def labels_of_one_silo_are_constant(study):
    study.arrays["b"]["y"] = np.full(60, 2)


@mistake(FAULT, "silo 'a' has no samples for training")
def a_silo_is_empty(study):
    study.arrays["a"] = {"x": np.zeros((0, 4), np.float32), "y": np.zeros(0, int)}


@mistake(FAULT, "silo 'a'", "is 'high', which is not a number")
def features_are_text(study):
    study.arrays["a"]["x"] = np.full((60, 4), "high")


@mistake(FAULT, "silo 'b'", "x has 60 samples, but y has shape [50]")
def there_are_fewer_targets_than_samples(study):
    study.arrays["b"]["y"] = study.arrays["b"]["y"][:50]


@mistake(FAULT, "two silos are called 'a'")
def an_id_is_there_twice(study):
    study.config["data"]["silos"][1]["id"] = "a"


@mistake(FAULT, "silo 'c' declares 99 training samples")
def a_declared_number_is_wrong(study):
    study.config["data"]["silos"][2]["num_samples"] = 99


@mistake(WARNING, "silo 'd' has the samples of silo 'c'")
def a_file_is_a_copy(study):
    study.arrays["d"] = study.arrays["c"]
    x, y = samples(2)
    for silo in "cd":  # with a test part, which is otherwise drawn by the silo's id
        study.arrays[silo] = {"x_train": x[:40], "y_train": y[:40], "x_test": x[40:], "y_test": y[40:]}


@mistake(WARNING, "silo 'a': 20 of its 20 test samples are training samples too")
def test_samples_are_training_samples(study):
    x, y = samples(0)
    study.arrays["a"] = {"x_train": x, "y_train": y, "x_test": x[:20], "y_test": y[:20]}


@mistake(ADVICE, "scale the columns", "x[2]")
def a_feature_is_not_scaled(study):
    for arrays in study.arrays.values():
        arrays["x"] = arrays["x"] * [1, 1, 5000, 1]


@mistake(ADVICE, "1 feature is constant in all silos", "x[0]")
def a_feature_is_constant(study):
    for arrays in study.arrays.values():
        arrays["x"] = arrays["x"] * [0, 1, 1, 1]


@mistake(ADVICE, "features differ between silos", "check units")
def one_silo_has_another_unit(study):
    study.arrays["b"]["x"][:, 3] += 40


@mistake(ADVICE, "no silo has training labels of class 3")
def a_class_is_never_there(study):
    study.config["data"]["num_classes"] = 4


@mistake(FAULT, "silo 'b' has 'w' where silo 'a' has 'v'", "rename them")
def columns_of_one_silo_have_other_names(study):
    study.csv(b="u,w,target\nROWS")


@mistake(FAULT, "column 'v': line 2 is empty", "missing values are not filled in")
def a_cell_is_empty(study):
    study.csv(c="u,v,target\n1,,2\nROWS")


@mistake(FAULT, "a column of text goes into data.levels")
def a_column_is_text(study):
    study.csv(a="u,v,target\n" + "".join(f"{i},{'fm'[i % 2]},{i % 3}\n" for i in range(30)))


@mistake(FAULT, "has no column 'target' (data.target)")
def the_target_column_is_missing(study):
    study.csv(d="u,v,died\nROWS")


@mistake(FAULT, "set data.separator")
def columns_have_another_separator(study):
    study.csv(d="u;v;target\n1;2;0\n2;3;1\n")


@mistake(FAULT, "appears twice, first in line")
def a_key_is_there_twice(study):
    study.text = yaml.safe_dump(study.config) + "rounds: 3\n"


@mistake(FAULT, "not YAML")
def the_file_is_not_yaml(study):
    study.text = "rounds: [1\nout: x"


@mistake(FAULT, "'local.lr' is not an override; write key=value")
def an_override_has_no_value(study):
    study.overrides = ["local.lr"]


@mistake(FAULT, "out: cannot write into", "is a file", "choose another out=")
def out_is_a_file(study):
    (study.root / "out").write_text("")


@mistake(FAULT, "holds checkpoints of another run", "local.lr is 0.1 there and 0.2 here")
def out_holds_another_run(study):
    with fedmpi.Run(str(study.write()), comm=SoloComm()) as run:
        list(run)
    study.config["local"]["lr"] = 0.2


@mistake(WARNING, "nothing to do: 2 rounds are done")
def all_rounds_are_done(study):
    with fedmpi.Run(str(study.write()), comm=SoloComm()) as run:
        list(run)


@mistake(WARNING, "9 ranks for 4 silos: 5 would host none; start 4 ranks")
def there_are_more_ranks_than_silos(study):
    study.ranks = 9


@mistake(UNSEEN, "silo 'c': only host 'far' may open it")
def a_silo_is_pinned_to_another_host(study):
    study.config["data"]["silos"][2]["host"] = "far"


@mistake(WARNING, "the loss of silo 'a' is", "lower local.lr")
def the_learning_rate_is_much_too_high(study):
    study.timing = True
    study.config["local"] |= {"lr": 1e30, "epochs": 3}
    study.config["model"] = {"name": "mlp", "hidden": [8]}


sets(WARNING, "no silo has test samples", "no_test_part", data__test_fraction=0.0)
sets(FAULT, "its training targets are float32, and task classification takes int64", "targets_of_another_type",
     **own_data("labels of another type"))  # fmt: skip
sets(WARNING, "its training samples are float64", "samples_of_another_type", **own_data("samples of another type"))
sets(
    FAULT,
    ("silo 'a': FileNotFoundError: database is gone", "test_check.py, line"),
    "a_dataset_raises",
    **own_data("raises"),
)
sets(FAULT, "silo 'a': 1 of 160 values of its training samples are NaN", "a_dataset_gives_nan", **own_data("nan"))
sets(
    FAULT, "1 of its 40 training labels are not from 0 to 2 (such as 7)", "a_dataset_gives_a_label", **own_data("label")
)
sets(FAULT, "20 test samples, but 10 targets", "a_dataset_gives_fewer_targets", **own_data("fewer targets"))
sets(FAULT, ("it returns 2 numbers per target", "3 classes"), "too_few_outputs", model={"name": OWN + "Outputs"})
sets(WARNING, ("it returns 5 numbers per target", "give its last layer 3"), "too_many_outputs",
     model={"name": OWN + "Outputs", "number": 5})  # fmt: skip
sets(
    FAULT,
    ("model and data disagree", "must take samples of [4]"),
    "a_model_of_another_size",
    model={"name": OWN + "Raises"},
)
sets(FAULT, "model: it returns a tuple of 2", "a_model_returns_more", model={"name": OWN + "Pair"})
sets(FAULT, "does not depend on the model's parameters", "a_model_that_detaches", model={"name": OWN + "Detached"})
sets(WARNING, ("'idle.weight', 'idle.bias'", "got no gradient"), "an_unused_layer", model={"name": OWN + "Idle"})
sets(FAULT, "no parameter of it requires a gradient", "a_frozen_model", model={"name": OWN + "Frozen"})
sets(FAULT, "'weight' starts with values that are not finite", "a_model_of_nan", model={"name": OWN + "Unsound"})
sets(
    FAULT,
    "cannot import 'nowhere:Net': No module named 'nowhere'",
    "code_that_is_not_there",
    model={"name": "nowhere:Net"},
)
sets(FAULT, "has no attribute 'Outputz'; did you mean 'Outputs'?", "a_misspelt_class", model={"name": OWN + "Outputz"})
sets(FAULT, "No module named 'no_hook'", "a_hook_that_is_not_there", records={"sinks": ["no_hook:Sink"]})
sets(FAULT, "'mse' is for regression", "a_loss_for_another_task", objective__loss="mse")
sets(FAULT, "does not return one number", "a_loss_of_many_numbers", objective__loss=OWN + "many_numbers")
sets(
    FAULT,
    ("the loss before training is -inf", "logarithm"),
    "a_loss_that_is_not_finite",
    objective__loss=OWN + "logarithm",
)
sets(FAULT, "objective.metrics.0", "a_metric_for_another_task", objective__metrics=["mae"])
sets(FAULT, "no metric 'acuracy'; did you mean 'accuracy'?", "a_misspelt_metric", objective__metrics=["acuracy"])
sets(FAULT, ("'raises' raised on every silo's samples", "no such column"), "a_metric_that_raises",
     objective__metrics=[{"name": OWN + "raises", "maximize": True}, "accuracy"])  # fmt: skip
sets(FAULT, "local.lr: input should be greater than 0", "a_learning_rate_of_zero", local__lr=0)
sets(FAULT, "has no 'learning_rate'; did you mean 'lr'?", "a_misspelt_key", local__learning_rate=0.1)
sets(FAULT, "rounds: input should be greater than 0", "no_rounds", rounds=0)
sets(FAULT, "give either 'epochs' or 'steps'", "epochs_and_steps", local__steps=3)
sets(
    WARNING,
    ("local.batch_size is 500", "silo 'a' has 48", "and 3 more"),
    "a_batch_over_the_silo",
    local__batch_size=500,
)
sets(FAULT, "leave one of a single sample", "a_batch_of_one", model={"name": OWN + "Normed"}, local__batch_size=47)
sets(FAULT, "init:", "a_file_of_parameters_is_missing", init="gone.pt")
sets(FAULT, "this host shows no GPU", "no_gpu", device__name="cuda")
sets(FAULT, "krum", "too_few_silos_for_a_robust_rule", aggregate={"name": "krum", "byzantine": 3},
     exchange={"plan": "sharded", "scope": "silo"})  # fmt: skip


def told(result, level):
    return result["skew"]["advice"] if level == ADVICE else result[level]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(study, name):
    plant, level, says = MISTAKES[name]
    plant(study)
    result = study.check()
    lines_of_level = told(result, level)
    assert any(all(text in line for text in says) for line in lines_of_level), lines(result)
    assert all("\n" not in line for line in lines(result))


def test_half_an_epoch_is_one_fault_not_two(study):
    study.config["local"]["epochs"] = 1.5
    assert study.check()["faults"] == ["local.epochs: a whole number is needed, got 1.5"]


def test_a_misspelt_section_of_data_is_not_covered_by_the_default(study):
    study.config["datasets"] = study.config.pop("data")
    result = study.check()
    assert "configuration has no 'datasets'; did you mean 'data'?" in result["faults"]
    assert "data: not in the configuration, so training takes the default, digits" in result["warnings"]


def test_there_are_enough_mistakes_and_none_in_the_place_itself(study):
    assert len(MISTAKES) >= 30
    result = study.check()
    assert (result["faults"], result["warnings"], result["unseen"]) == ([], [], ["speed: --no-timing"]), lines(result)
    assert not (study.root / "out").exists()


def test_a_disk_that_is_nearly_full(study, monkeypatch):
    monkeypatch.setattr(folder, "free_bytes", lambda root: 1000)
    [fault] = study.check()["faults"]
    assert "has 1000 B free, and its checkpoints need" in fault and "lower checkpoint.keep" in fault
    need = check(study.root / "config.yaml", [], SoloComm(), 1, False)["out"]["checkpoint_bytes"]
    monkeypatch.setattr(folder, "free_bytes", lambda root: need + 1)
    result = study.check()
    assert not result["faults"] and "hardly more than" in result["warnings"][0]


def test_a_folder_that_may_not_be_written(study, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk, "open_new", refuse)  # tests may run as root, who may write everywhere
    [fault] = study.check()["faults"]
    assert "Permission denied" in fault and not (study.root / "out").exists()


# Mistakes that do not hide each other: at most one in the model, one in the loss, and one in each silo.
TOGETHER = (
    *("a_file_is_missing", "a_label_is_outside_the_classes", "features_are_nan", "a_silo_is_empty"),
    *("out_is_a_file", "a_hook_that_is_not_there", "a_misspelt_metric", "a_learning_rate_of_zero", "no_rounds"),
    *("too_few_outputs", "a_misspelt_key", "no_gpu", "there_are_more_ranks_than_silos"),
)


@pytest.mark.parametrize("seed", range(6))
def test_five_mistakes_are_named_together(study, seed):
    names = random.Random(seed).sample(TOGETHER, 5)
    for name in names:
        MISTAKES[name][0](study)
    result = study.check()
    for name in names:
        _, level, says = MISTAKES[name]
        assert any(all(text in line for text in says) for line in told(result, level)), (name, lines(result))


@pytest.mark.mpi
def test_four_ranks_with_a_folder_each_name_all_mistakes(study):
    """Each rank sees only its own silo's file; five mistakes on four ranks."""
    for name in ("one_silo_has_another_shape", "a_label_is_outside_the_classes", "features_are_nan", "a_silo_is_empty"):
        MISTAKES[name][0](study)
    study.config["objective"]["metrics"] = ["acuracy"]
    del study.config["data"]["root"]
    study.write()
    for rank, silo in enumerate(SILOS):
        (study.root / f"site{rank}").mkdir()
        (study.root / "data" / f"{silo}.npz").rename(study.root / f"site{rank}" / f"{silo}.npz")
    script = 'exec "$0" check config.yaml data.root=site${OMPI_COMM_WORLD_RANK:-$PMI_RANK} --json'
    done = mpirun(4, "sh", "-c", script, FEDMPI, cwd=study.root, timeout_s=100)
    assert done.rc == 2, done.tails
    result = json.loads(done.out)
    for silo, text in {"a": "no samples", "b": "shape [3]", "c": "label 7", "d": "2 of 60 samples"}.items():
        [fault] = [fault for fault in result["faults"] if f"silo '{silo}'" in fault]
        assert text in fault
    assert len(result["faults"]) == 5 and any("acuracy" in fault for fault in result["faults"]), result["faults"]
    [line] = own_lines(done)
    assert "the check found faults" in line
    assert not (study.root / "out").exists()
