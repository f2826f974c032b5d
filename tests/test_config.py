"""Configuration: the messages for wrong ones, how overrides are read, and that it survives writing and reading."""

import dataclasses
import functools
import itertools
import operator
import textwrap

import pytest
import torch
import yaml

import fedmpi
from fedmpi.aggregate import AGGREGATORS, FedNova, Mean
from fedmpi.attacks import ATTACKS
from fedmpi.catalogue import FAMILIES, descriptions, lines
from fedmpi.components import Deferred, build, component, hints, to_dict
from fedmpi.config import Config, flatten, load, origin_of, run_directory
from fedmpi.differences import differences, digest
from fedmpi.errors import ConfigError
from fedmpi.exchange.plans import PLANS
from fedmpi.local import Sgd
from fedmpi.models import make
from fedmpi.plan import plan
from fedmpi.rounds import clocks
from fedmpi.rounds.policies import Deadline
from fedmpi.server import FedAdam
from fedmpi.types import SiloData, Source


@pytest.fixture
def file(tmp_path):
    """Write a configuration; returns its path."""

    def write(text, name="a.yaml"):
        (tmp_path / name).write_text(textwrap.dedent(text))
        return tmp_path / name

    return write


def refusal(call, *args):
    """The message of ConfigError, one line."""
    with pytest.raises(ConfigError) as caught:
        call(*args)
    assert str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


SGD = "local: {name: sgd, lr: 0.1, epochs: 1"
FEDDYN = "local: {name: feddyn, lr: 1, steps: 1, alpha: 0.1}"
REFUSED = [
    # unknown key
    ("ronds: 3", "configuration has no 'ronds'; did you mean 'rounds'?"),
    ("data: {name: digits, silo: 3}", "data: dataset 'digits' has no 'silo'; did you mean 'silos'?"),
    (SGD + ", bach_size: 3}", "local: local rule 'sgd' has no 'bach_size'; did you mean 'batch_size'?"),
    ("server: {optimiser: fedadam}", "server: 'server' has no 'optimiser'; did you mean 'optimizer'?"),
    ("server: {optimizer: {name: fedadam, bet1: 0}}", "server.optimizer: server optimizer 'fedadam' has no 'bet1'"),
    ("checkpoint: {zzz: 1}", "checkpoint: 'checkpoint' has no 'zzz'; available: every, keep"),
    ("1: 2", "configuration has no '1'"),
    ("server: {average: {dekay: 0.9}}", "server.average: 'average' has no 'dekay'; did you mean 'decay'?"),
    ("server: {average: {decay: 1.5}}", "server.average.decay: input should be less than or equal to 1, got 1.5"),
    (
        "{server: {average: {}}, exchange: {overlap: true}}",
        "server.average: with exchange.overlap the parameters of a round arrive a round late",
    ),
    (
        "{server: {average: {}}, exchange: {plan: sharded, regions: {every: 2}}}",
        "server.average: with exchange.regions.every the parameters of regions differ in between",
    ),
    # unknown component
    ("model: {name: reznet18}", "model: no model 'reznet18'; did you mean 'resnet18'?"),
    ("select: unifrom", "select: no selector 'unifrom'; did you mean 'uniform'?"),
    ("data: {name: digits, partition: dirichlt}", "data.partition: no partition 'dirichlt'; did you mean 'dirichlet'?"),
    (SGD + ", optimizer: {name: Adan}}", "local.optimizer: no optimizer 'Adan'; did you mean 'Adam'?"),
    (SGD + ", schedule: cosin}", "local.schedule: no schedule 'cosin'; did you mean 'cosine'?"),
    ("aggregate: qqq", "aggregate: no aggregator 'qqq'; available: mean"),
    ("aggregate: {hostile: 1}", "aggregate: needs a 'name' beside hostile, one of: sign_vote, krum, "),
    ("data: {silos: 3}", "data: needs a 'name' beside silos, one of: digits, "),
    ("select: {fraction: 0.5}", "select: needs a 'name' beside fraction, one of: uniform, proportional, "),
    (SGD + ", momentum: 0.9}", "local: local rule 'sgd' has no 'momentum'; it is an argument of the optimizer:"),
    ("engine: {size: 3}", "engine: needs a 'name' beside size, one of: buffered"),
    ("model: 3", "model: 3 is not a valid model; one of: logistic, "),
    ("select: [all]", "select: ['all'] is not a valid selector; one of: all, "),
    # wrong type
    ("rounds: many", "rounds: a whole number is needed, got 'many'"),
    ("rounds: 1.5", "rounds: a whole number is needed, got 1.5"),
    ("rounds:", "rounds: a whole number is needed, got None"),
    ("out: [a]", "out: input should be a valid string, got ['a']"),
    ("server: 3", "server: "),
    ("server: {dedicated: perhaps}", "server.dedicated: true or false is needed, got 'perhaps'"),
    ("local: {name: sgd, lr: fast, epochs: 1}", "local.lr: a number is needed, got 'fast'"),
    ("model: {name: mlp, hidden: [8, x]}", "model.hidden.1: a whole number is needed, got 'x'"),
    (
        "exchange: {plan: ring}",
        "exchange.plan: no plan 'ring'; available: auto, measure, replicated, shared_memory, sharded, root",
    ),
    # out of range
    ("rounds: 0", "rounds: input should be greater than 0, got 0"),
    ("seed: -1", "seed: input should be greater than or equal to 0, got -1"),
    ("select: {name: uniform, fraction: 1.5}", "select.fraction: input should be less than or equal to 1, got 1.5"),
    ("select: {name: uniform, fraction: .nan}", "select.fraction: input should be "),
    ("local: {name: sgd, lr: .inf, epochs: 1}", "local.lr: input should be a finite number, got inf"),
    ("local: {name: sgd, lr: -0.1, epochs: 1}", "local.lr: input should be greater than 0, got -0.1"),
    ("checkpoint: {keep: 0}", "checkpoint.keep: input should be greater than 0, got 0"),
    # options that exclude each other, and missing ones
    ("local: {name: sgd, epochs: 1}", "local.lr: local rule 'sgd' needs it"),
    ("local: {name: sgd, lr: 1}", "local: give either 'epochs' or 'steps'"),
    (SGD + ", steps: 3}", "local: give either 'epochs' or 'steps'"),
    (
        "{select: norm, aggregate: {name: mean, weights: steps}}",
        "select: norm counts silos by 1/probability, which makes no sense of aggregate mean: weights: steps divides by",
    ),
    (
        "{select: {name: uniform, weights: inverse}, aggregate: median, exchange: {plan: sharded, scope: silo}}",
        "select: uniform counts silos by 1/probability, which makes no sense of aggregate median: every silo has one",
    ),
    (
        "{select: {name: available, traces: {}, inner: optimal}, aggregate: fednova}",
        "select: available counts silos by 1/probability, which makes no sense of aggregate fednova: it multiplies",
    ),
    (
        "{select: proportional, rounds: 4, exchange: {regions: {every: 2}}}",
        "select: proportional counts silos by 1/probability of a round, and exchange.regions.every is 2 rounds",
    ),
    (
        "{aggregate: {name: qffl, lr: 0.1}, rounds: 4, exchange: {regions: {every: 2}}}",
        "aggregate: qffl looks at one round, exchange.regions.every is 2",
    ),
    ("records: {gram: true}", "records.gram: needs exchange.scope: silo and plan sharded, where deltas meet"),
    (
        "{records: {gram: true}, exchange: {plan: sharded, scope: silo, overlap: true}}",
        "records.gram: not available with exchange.overlap: deltas arrive after their round's record",
    ),
    ("stop: {loss_factor: 1}", "stop.loss_factor: input should be greater than 1, got 1"),
    ("select: {name: available, traces: {a: [[3, 3]]}}", "select.traces: silo 'a': [3, 3) is no interval of rounds"),
    ("select: {name: available, traces: none.csv}", "select.traces: cannot read none.csv: No such file"),
    ("select: {name: available, traces: {}, inner: available}", "select.inner: no selector 'available'"),
    ("exchange: {parameters: trainble}", "exchange: exchange.parameters is all, trainable, all_but_batch_norm or a"),
    # torch optimizers
    (SGD + ", optimizer: {name: SGD, momentm: 0.9}}", "'SGD' has no 'momentm'; did you mean 'momentum'?"),
    (SGD + ", optimizer: {name: SGD, lr: 0.9}}", "local.optimizer.lr: the learning rate is local.lr"),
    (SGD + ", optimizer: {name: SGD, momentum: -1}}", "local.optimizer: Invalid momentum value: -1"),
    (SGD + ", optimizer: {name: LBFGS}}", "local.optimizer: no optimizer 'LBFGS'"),
    (SGD + ", optimizer: {name: EmaSGD, beta: 1}}", "local.optimizer: beta must lie in [0, 1), got 1"),
    # rules and what they need
    ("local: {name: scaffold, lr: 1, steps: 1, optimizer: Adam}", "local: optimizer: this rule needs one"),
    ("local: {name: scaffold, lr: 1, steps: 1, keep_optimizer: true}", "local: keep_optimizer: this rule would"),
    ("local: {name: mime_lite, lr: 1, steps: 1, optimizer: {name: SGD, momentum: 0.9}}", "local: optimizer: mime_lite"),
    (FEDDYN, "server.optimizer: the rule feddyn needs server: {optimizer: {name: feddyn, alpha: 0.1}}"),
    (FEDDYN + "\nserver: {optimizer: {name: feddyn, alpha: 0.2}}", "server.optimizer: the rule feddyn"),
    (FEDDYN + "\nserver: {optimizer: {name: feddyn, alpha: 0.1}}\naggregate: fednova", "aggregate: feddyn needs mean"),
    ("server: {optimizer: {name: feddyn, alpha: 0.2}}", "local: the server's feddyn needs local: {name: feddyn"),
    ("local: {name: ditto, lr: 1, steps: 1}\nevaluate: {finetune: {name: sgd, lr: 1, steps: 1}}", "evaluate.finetune:"),
    ("local: 'no:Rule'", "local: cannot import 'no:Rule': No module named 'no'; modules are looked for in the current"),
    (
        FEDDYN + "\nserver: {optimizer: {name: feddyn, alpha: 0.1}}\nselect: {name: uniform, weights: inverse}",
        "select: uniform counts silos by 1/probability, and feddyn's server",
    ),
    (
        "local: {name: scaffold, variant: benchmark, lr: 1, steps: 1, server_lr: 0.5}",
        "server.optimizer: scaffold's variant benchmark needs fedavg with lr 0.5, its local.server_lr",
    ),
    (
        "local: {name: scaffold, lr: 1, steps: 1}\nexchange: {plan: sharded, down: {codec: topk}}",
        "exchange.down: topk would choose between the delta and the control of scaffold, whose units differ",
    ),
    (
        SGD + ", keep_optimizer: true, optimizer: {name: SGD, momentum: 0.9}}\naggregate: fednova",
        "aggregate: fednova divides by the gradients that a round's delta holds, and with local.keep_optimizer",
    ),
    # null where a value is required
    ("data: null", "data"), ("model: null", "model"), ("local: null", "local"), ("select: null", "select"),
    ("aggregate: null", "aggregate"), ("server: {optimizer: null}", "server.optimizer"),
    (SGD + ", schedule: null}", "local.schedule"), ("data: {name: digits, partition: null}", "data.partition"),
    # a user's own
    ("model: {name: 'nowhere_at_all:factory'}", "model: cannot import 'nowhere_at_all:factory': No module named"),
    ("model: {name: 'fedmpi.models:nothing'}", "model: cannot import 'fedmpi.models:nothing': module"),
    ("select: {name: 'collections:Counter'}", "select: 'collections:Counter' is not a dataclass, so it cannot be"),
    (
        "select: {name: 'fedmpi.local:Sgd', lr: 0.1, epochs: 1}",
        "select: 'fedmpi.local:Sgd' has no init, select, so it cannot be a selector",
    ),
    # nested sections
    ("device: cuda", "device: expected keys and values, got 'cuda'; available: name, share"),
    ("exchange: {up: int8}", "exchange.up: expected keys and values, got 'int8'; available: codec, feedback, decay"),
    ("exchange: {regions: {evry: 2}}", "exchange.regions: 'regions' has no 'evry'; did you mean 'every'?"),
    ("exchange: {regions: {levels: {by: node}}}", "exchange.regions.levels: expected a list of keys and values, got"),
    ("exchange: {regions: {levels: [node]}}", "exchange.regions.levels.0: expected keys and values, got 'node'; "),
    ("exchange: {regions: {levels: [{up: {codec: int9}}]}}", "exchange.regions.levels.0.up.codec: no codec 'int9'; "),
    ("exchange: {regions: {levels: [{by: rack}]}}", "exchange.regions.levels.0.by: takes node or regions such as"),
    ("exchange: {regions: {levels: [{by: {a: vm}}]}}", "exchange.regions.levels.0.by: takes node or regions such as"),
    # beginners' mistakes
    ("rounds: 3\nlocal: {name: sgd, lr: 1, epochs: 1}\nlocal: sgd", "a.yaml:3: 'local' appears twice, first"),
    ("data:\n  name: digits\n  silos: 3\n  silos: 4", "a.yaml:4: 'silos' appears twice, first in line 3"),
    ("exchange: {regions: {levels: [{by: node, by: node}]}}", "a.yaml:1: 'by' appears twice, first in line 1"),
    ("local: {name: sgd, lr: 0,05, epochs: 1}", "local: local rule 'sgd' has no '5'; numbers have a decimal point"),
    ("lr: 0.1", "configuration has no 'lr'; did you mean 'local.lr'?"),
    ("learning_rate: 0.1", "configuration has no 'learning_rate'; did you mean 'local.lr'?"),
    (SGD + ", learning_rate: 1}", "local: local rule 'sgd' has no 'learning_rate'; did you mean 'lr'?"),
    (SGD + ", drop_last: true}", "local: local rule 'sgd' has no 'drop_last'; did you mean 'last_batch'?"),
    (SGD + ", accumulate: 4}", "local: local rule 'sgd' has no 'accumulate'; did you mean 'micro_batch'?"),
    (SGD + ", batch: 8}", "local: local rule 'sgd' has no 'batch'; did you mean 'batch_size'?"),
    ("data: {name: digits, clients: 8}", "data: dataset 'digits' has no 'clients'; did you mean 'silos'?"),
    ("fraction: 0.1", "configuration has no 'fraction'; did you mean 'select.fraction'?"),
    ("plan: window", "configuration has no 'plan'; did you mean 'exchange.plan'?"),
    ("model: mine.Net", "model: no model 'mine.Net'; write your own as 'mine:Net'"),
    ("data: {name: files, task: binary, shape: 2, silos: [{id: a, path: a.csv}]}", "data.shape: expected a list, "),
    # not YAML
    ("rounds: 3\nseed: [1\nout: a", "a.yaml:3: not YAML: "),
    ("rounds: 3\n\tseed: 1", "a.yaml:2: not YAML: found character"),
    ("just words", "a.yaml: expected keys and values, such as `rounds: 20`"),
    ("- rounds: 3", "a.yaml: expected keys and values"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), REFUSED, ids=[text for text, _ in REFUSED])
def test_a_wrong_configuration_is_one_line_that_names_the_key(file, text, says):
    said = refusal(load, file(text))
    assert says in said and (said.startswith(says) or "local.optimizer" in said or "a.yaml" in said)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rounds", "'rounds' is not an override; write key=value, such as local.lr=0.1"),
        ("=3", "'=3' is not an override"),
        ("--rounds=3", "configuration has no '--rounds'; did you mean 'rounds'?"),
        ("local.lr=[1", "local.lr: cannot read '[1' as a value"),
        ("local.lr=", "local.lr: a number is needed, got None"),
        ("local.l=1", "local: local rule 'sgd' has no 'l'; "),
        ("local..lr=1", "local: local rule 'sgd' has no ''; "),
        ("rounds.x=1", "rounds: a whole number is needed, got {'x': 1}"),
        ("server.optimizer=fedadm", "server.optimizer: no server optimizer 'fedadm'; did you mean 'fedadam'?"),
        ("server.lr=0.1", "server: 'server' has no 'lr'; "),
    ],
)
def test_a_wrong_override_is_one_line(file, override, says):
    assert refusal(load, file("local: {name: sgd, lr: 0.1, epochs: 1}"), [override]).startswith(says)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("x = 1 +\n", "invalid syntax (own_broken.py, line 1)"),
        ("import math\n\nx = undefined\n", "NameError: name 'undefined' is not defined ("),
        ("raise RuntimeError('no\\nGPU')\n", "RuntimeError: no GPU ("),
        ("import math\n\nmath.sine\n", "module 'math' has no attribute 'sine'"),
    ],
)
def test_a_module_of_ones_own_that_cannot_be_loaded_is_one_line(file, tmp_path, monkeypatch, code, says):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_broken.py").write_text(code)
    assert f"model: cannot import 'own_broken:Net': {says}" in refusal(load, file("model: 'own_broken:Net'"))


def test_a_configuration_with_a_mark_of_its_encoding_is_read(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfrounds: 3\r\nout: caf\xc3\xa9\r\n")
    assert (load(tmp_path / "a.yaml")[0].rounds, load(tmp_path / "a.yaml")[0].out) == (3, "café")


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert refusal(load, tmp_path / "no.yaml") == f"cannot read {tmp_path}/no.yaml: No such file or directory"
    assert refusal(load, tmp_path) == f"cannot read {tmp_path}/config.yaml: No such file or directory"
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert refusal(load, tmp_path / "binary.yaml").startswith(f"cannot read {tmp_path}/binary.yaml: ")


def test_a_run_directory_is_named_by_its_folder_wherever_it_is(file, tmp_path):
    path = file("about: {versions: {}}\nrounds: 2\nout: moved/from_here", "config.yaml")
    config, origins = load(tmp_path)
    assert (config.rounds, config.out, origins["out"]) == (2, str(tmp_path), "command line")
    assert load(tmp_path, ["out=b"])[0].out == "b" and load(path)[0].out == "moved/from_here"
    assert run_directory(tmp_path) == run_directory(path) == tmp_path
    file("rounds: 2\nout: a", "config.yaml")  # a folder of the user's own
    assert load(tmp_path)[0].out == "a" and run_directory(tmp_path) is None


def test_a_pattern_that_matches_no_parameter_is_refused_by_plan(file):
    said = refusal(plan, load(file("exchange: {parameters: ['*', '!linear.wieght']}"))[0], {}, 2)
    assert said == "exchange.parameters: '!linear.wieght' matches no parameter; did you mean 'linear.weight'?"


def value(config, key):
    for part in key.split("."):
        config = config.arguments[part] if isinstance(config, Deferred) else getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["local.lr=1e-3"], {"local.lr": 1e-3}),
        (["local.lr=2"], {"local.lr": 2.0}),
        (["rounds=3", "rounds=4"], {"rounds": 4}),
        (["server.dedicated=true", "device.share=yes"], {"server.dedicated": True, "device.share": True}),
        (["local.batch_size=null"], {"local.batch_size": None}),
        (["local.steps=5", "local.epochs="], {"local.steps": 5, "local.epochs": None}),
        (["server.optimizer=fedadam"], {"server.optimizer": FedAdam()}),
        (["server.optimizer=fedadam", "server.optimizer.lr=1e-2"], {"server.optimizer": FedAdam(lr=0.01)}),
        (["server.optimizer={name: fedadam, tau: 1}"], {"server.optimizer": FedAdam(tau=1)}),
        (["model=mlp", "model.hidden=[8, 4]"], {"model.hidden": (8, 4)}),
        (["data.partition=dirichlet", "data.partition.alpha=1"], {"data.partition.alpha": 1.0, "data.silos": 7}),
        (["exchange.parameters=[a.*, '!b']"], {"exchange.parameters": ["a.*", "!b"]}),
        (["exchange.parameters=trainable"], {"exchange.parameters": "trainable"}),
        (["local.optimizer=Adam", "local.optimizer.betas=[0.5, 0.9]"], {"local.optimizer.betas": [0.5, 0.9]}),
        (["local.optimizer={name: SGD, weight_decay: 1e-4}"], {"local.optimizer.weight_decay": 1e-4}),
        (["local.optimizer=SGD", "local.optimizer.weight_decay=1e-4"], {"local.optimizer.weight_decay": 1e-4}),
        (["engine.policy=deadline", "engine.policy.deadline_s=3"], {"engine.policy": Deadline(deadline_s=3)}),
        (["aggregate.weights=uniform"], {"aggregate": Mean(weights="uniform")}),
        (["aggregate=fednova", "aggregate.weights=uniform"], {"aggregate": FedNova(weights="uniform")}),
        (["out=runs/a=b"], {"out": "runs/a=b"}),
        (["out=123"], {"out": "123"}),
        (["out=2026-01-02"], {"out": "2026-01-02"}),
        (["init=model.safetensors"], {"init": "model.safetensors"}),
    ],
    ids=" ".join,
)
def test_an_override_has_the_type_of_its_field(file, overrides, expected):
    config, _ = load(file("data: {name: digits, silos: 7}\nlocal: {name: sgd, lr: 0.1, epochs: 1}"), overrides)
    assert {key: value(config, key) for key in expected} == expected


def test_every_value_has_an_origin(file):
    path = file("rounds: 3\nserver:\n  optimizer: fedadam\nlocal: {name: sgd, lr: 1,\n        epochs: 2}\n")
    config, origins = load(path, ["server.optimizer.lr=0.5", "local=sgd", "local.lr=2", "local.steps=1"])
    of = {key: origin_of(key, origins) for key in flatten(to_dict(config))}
    assert of["rounds"] == f"{path}:1" and of["server.optimizer.name"] == f"{path}:3"
    assert of["server.optimizer.lr"] == of["local.name"] == of["local.lr"] == of["local.steps"] == "command line"
    assert of["local.epochs"] == of["local.schedule.name"] == of["seed"] == "default"


def test_out_is_called_after_the_file_and_about_is_not_read(file):
    assert load(file("about: {versions: {}}\nrounds: 2", "heart.yaml"))[0].out == "runs/heart"
    assert load(file("", "empty.yaml"))[0] == Config(out="runs/empty")


NEEDS = {"sgd": {"lr": 0.1, "steps": 3}, "files": {"silos": [{"id": "a", "path": "a.h5"}], "task": "binary"}}
NEEDS["files"]["shape"] = [3]
NEEDS["fedsgd"] = {"lr": 0.1}
FEDDYN_BOTH = {"local": {"name": "feddyn", "lr": 0.1, "steps": 3}, "server": {"optimizer": "feddyn"}}
NEEDS |= {name: {"hostile": 1} for name in ("krum", "multi_krum", "bulyan")}
NEEDS |= {"bucketing": {"inner": "median"}, "nearest_neighbour_mixing": {"hostile": 1, "inner": "median"}}
NEEDS |= {"available": {"traces": {"a": [[2, 9]]}}, "qffl": {"lr": 0.1}}
NEEDS |= {"fedrep": NEEDS["sgd"] | {"head_steps": 2}, "per_fedavg": NEEDS["sgd"] | {"inner_lr": 0.1}}
NEEDS |= {
    "by_silo": {"silos": {"a": 3}},
    "by_loss": {"target": 0.5},
    "seconds": {"seconds": 1.5},
    "by_delay": {"budget_s": 9.0},
}
NEEDS |= {name: {"count": 1} for name in ATTACKS.members} | {"noise": {"count": 1, "sigma": 0.1}}
NEEDS |= {"clip": {"norm": 1.0}, "max_norm": {"norm": 1.0}}
INSIDE = {"exchange": {"plan": "sharded"}, "local": {"name": "sgd", "lr": 0.1, "epochs": 2}, "data": {"name": "digits"}}
INSIDE["engine"] = {"name": "synchronous"}
INSIDE["clock"] = {"name": "virtual"}
NEEDS["replay"] = {"run": "runs/a"}
NEEDS["poisson"] = {"rate": 0.5}
NEEDS |= {name: {"clip": 1.0, "sigma": 1.0, "delta": 1e-5} for name in ("silo", "record")}
NEEDS["buffered"] = {"clock": INSIDE["clock"]}
TIMES_NEED = {"uniform": {"low": 1.0, "high": 2.0}, "trace": {"file": "trace.csv"}}
MEMBERS = [(key, name) for family, key in FAMILIES.values() if key and family is not PLANS for name in family.members]


@pytest.mark.parametrize(("key", "name"), MEMBERS, ids=[f"{key}={name}" for key, name in MEMBERS])
def test_every_member_comes_back_from_its_plain_values(key, name, monkeypatch):
    no_arrivals = {number: {"arrivals": [], "silos": {}} for number in range(1, 21)}
    monkeypatch.setattr(clocks, "_records", lambda run: no_arrivals)
    parents = key.split(".")
    needs = NEEDS | ({"noise": {"sigma": 0.1}} if key == "updates" else {})
    needs |= TIMES_NEED if key == "engine.clock.compute" else {}
    inside = INSIDE | (
        {"engine": {"name": "buffered", **NEEDS["buffered"]}} if key == "engine.staleness" or name == "replay" else {}
    )
    values = {"name": name, **needs.get(name, NEEDS["sgd"] if key == "local" else {})}
    for parent in reversed(parents):
        values = {parent: inside.get(parent, {}) | values if parent != parents[-1] else values}
    if key == "privacy":
        values["aggregate"] = {"name": "mean", "weights": "uniform"}
    if key == "records.measure":
        values["exchange"] = {"plan": "sharded", "scope": "silo"}
    if key == "aggregate" and AGGREGATORS.build(values[key], key).needs != "sum":
        with pytest.raises(ConfigError, match=r"^aggregate: \w+ reads each delta; it needs exchange.scope: silo"):
            build(Config, values)
        values["exchange"] = {"plan": "sharded", "scope": "silo"}
    if key == "attack":
        with pytest.raises(ConfigError, match=rf"^attack: {name} .* for experiments only; set experimental: true"):
            build(Config, values)
        values |= {"experimental": True, "exchange": {"plan": "sharded", "scope": "silo"}}
    config = build(Config, FEDDYN_BOTH | values if name == "feddyn" else values)
    plain = to_dict(config)
    member = functools.reduce(operator.getitem, parents, plain)
    assert (member[0] if isinstance(member, list) else member)["name"] == name
    assert build(Config, plain) == config
    again = build(Config, yaml.safe_load(yaml.safe_dump(plain)))
    assert again == config and digest(again) == digest(config) and differences(plain, again) == []


def test_rounds_end_where_regions_have_met():
    values = {"rounds": 5, "exchange": {"plan": "sharded", "regions": {"every": 2}}}
    with pytest.raises(ConfigError, match=r"rounds: after 5 the regions differ; take a multiple of .*every, 2"):
        build(Config, values)
    assert build(Config, values | {"rounds": 6}).exchange.regions.every == 2


def test_the_configuration_is_one_tree_in_code_and_in_yaml(file):
    text = "rounds: 3\nlocal: {name: sgd, lr: 0.1, epochs: 1}\nserver: {optimizer: {name: fedadam, lr: 1}}\nout: x"
    section = type(Config().server)
    assert load(file(text))[0] == Config(
        rounds=3, local=Sgd(lr=0.1, epochs=1), server=section(optimizer=FedAdam(lr=1.0)), out="x"
    )
    hints(Config).clear()  # a copy
    assert set(hints(Config)) == {field.name for field in dataclasses.fields(Config)}


OWN = """
import dataclasses
import torch
from fedmpi.components import component
from fedmpi.selection import All

@dataclasses.dataclass(frozen=True)
class First:
    count: int = 1
    def init(self, num_silos): return {}
    def select(self, ids, state, outcome, rng): return list(ids)[: self.count], state

@component
class Checked(All):
    count: int = 1

def factory(width, depth=1):
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(depth)))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_components.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_users_own_that_is_named_a_little_wrong_is_named_right(own, file):
    said = refusal(load, file("model: 'own_components.py:factory'"))
    assert said == "model: cannot import 'own_components.py:factory': leave out .py: 'own_components:factory'"
    assert refusal(load, file("model: 'a/b.py:Net'")).endswith("leave out .py: 'a.b:Net'")
    assert refusal(load, file("model: 'own_components:factry'")).endswith("; did you mean 'factory'?")
    assert refusal(load, file("model: 'own_components:xyz'")).endswith("has no attribute 'xyz'")


@pytest.mark.parametrize("name", ["First", "Checked"])
def test_a_users_own_component_is_a_component_like_any_other(own, file, name):
    text = f"select: {{name: 'own_components:{name}', count: 2}}"
    config, _ = load(file(text))
    assert config.select.select(list("abc"), {}, None, None)[0] == list("abc")[: 2 if name == "First" else 3]
    assert to_dict(config)["select"] == {"name": f"own_components:{name}", "count": 2}
    assert build(Config, to_dict(config)) == config
    said = refusal(load, file(text), ["select.coumt=3"])
    assert said == f"select: selector 'own_components:{name}' has no 'coumt'; did you mean 'count'?"
    assert refusal(load, file(text), ["select.count=x"]).startswith("select.count: a whole number is needed")


def test_a_users_own_model_factory_is_called_with_the_values_of_the_configuration(own, file):
    text = "model: {name: 'own_components:factory', width: 3}"
    config, _ = load(file(text), ["model.depth=2"])
    source = Source("regression", (3,), 3, silos=(), open=lambda silo: SiloData(*[torch.zeros(0)] * 4))
    assert [tuple(p.shape) for p in make(config.model, source).parameters()] == [(3, 3), (3,)] * 2
    assert build(Config, to_dict(config)) == config
    said = refusal(load, file(text), ["model.widht=2"])
    assert said == "model: 'factory' has no 'widht'; did you mean 'width'?"
    assert refusal(load, file("model: 'own_components:factory'")).startswith("model: 'factory': missing a required")


listed = functools.cache(lines)  # reads source files, so cache it
MADE = [(family, name, cls) for family, (members, _) in FAMILIES.items() for name, cls in members.members.items()]


@pytest.mark.parametrize(("family", "name", "cls"), MADE, ids=[f"{family}-{name}" for family, name, _ in MADE])
def test_the_list_says_a_sentence_of_every_member_and_explains_every_field(family, name, cls):
    text = listed(family)
    at = next(n for n, line in enumerate(text) if line.startswith(f"  {name}: "))
    assert text[at] in listed()
    if not dataclasses.is_dataclass(cls):
        return
    assert text[at].endswith(".") and text[at].count("(") == text[at].count(")")
    below = itertools.takewhile(lambda line: line.startswith("    "), text[at + 1 :])
    fields = [line for line in below if line[4] != " "]  # without nested fields
    described = descriptions(cls)
    assert [line.split()[0] for line in fields] == list(hints(cls)) and all("  # " in line for line in fields)
    assert all(f"  # {described[line.split()[0]]}" in line for line in fields)


@component
class Parent:
    """What another is made from."""

    kept: int = 1
    """said of the parent's
    in two lines"""
    said_again: int = 2
    """said of the parent's"""
    unsaid: int = 3  # a comment is for the code's readers


@component
class Child(Parent):
    """Made from another."""

    said_again: int = 4
    """said of the child's"""
    own: float = 0.5
    """its own"""


def test_the_list_says_what_stands_below_a_field_or_below_the_parents(monkeypatch):
    monkeypatch.setitem(FAMILIES["schedules"][0].members, "child", Child)
    assert lines("child")[1:-1] == [
        "  child: Made from another.",
        "    kept = 1  # said of the parent's in two lines",
        "    said_again = 4  # said of the child's",
        "    unsaid = 3",
        "    own = 0.5  # its own",
    ]


def test_a_component_without_source_is_listed_without_descriptions(monkeypatch):
    source = '@component\nclass Typed:\n    "Made in a session."\n    rate: float = 0.5\n    "of it"\n'
    session = {"component": component, "__name__": "session"}
    exec(source, session)
    monkeypatch.setitem(FAMILIES["schedules"][0].members, "typed", session["Typed"])
    assert lines("typed")[1:-1] == ["  typed: Made in a session.", "    rate = 0.5"]


def test_the_list_has_the_paper_and_what_stands_below_a_field():
    told = "\n".join(lines("aggregators") + lines("rules") + lines("servers"))
    for paper in (
        "Wang et al. 2020",
        "Karimireddy et al. 2020",
        "Li et al. 2020",
        "Sun et al. 2024",
        "Hsu et al. 2019",
    ):
        assert paper in told
    assert "weights = samples  # samples: n_k; " in told and "optimizer = SGD  # " in told


def test_list_shows_the_fields_of_sections():
    shown = lines("exchange")
    assert any(
        line.startswith("  plan = auto  # the collectives to use; auto: chosen by placement and sizes; ")
        for line in shown
    )
    assert any(line.startswith("    every = 1  # rounds between two exchanges") for line in shown)
    assert all("  # " in line for line in shown[1:-1])
    assert "  device = {name: auto, share: false}  # Where a rank trains." in lines()
    assert refusal(lines, "exchang").endswith("did you mean 'exchange'?")
    assert refusal(lines, "model.hiden").startswith("nothing is called 'model.hiden'")


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("local", "  fedprox: "),
        ("data", "  files: "),
        ("model", "  logistic: "),
        ("select", "    count = null  # "),
        ("aggregate", "  trimmed_mean: "),
        ("local.optimizer", "  SGD: torch.optim.SGD"),
        ("data.partition", "  dirichlet: "),
        ("server.optimizer", "  fedadam: "),
        ("server.optimizer.schedule", "  cosine: "),
        ("evaluate.finetune", "  sgd: "),
        ("exchange.up.codec", "  topk: "),
        ("exchange.up", "  feedback = false  # "),
        ("exchange.regions.levels", "  by = node  # "),
        ("init", "  strict = true  # "),
        ("objective", "    loss: cross_entropy"),
        ("rounds", "  rounds = 20  # total number of rounds"),
        ("data.silos", "    path (required)  # .h5, .npz, .csv or .parquet, or a folder"),
        ("model.hidden", "  hidden = [200, 200]  # "),
        ("topk", "    ratio = 0.01  # "),
        ("fedadam", "    tau = "),
    ],
)
def test_list_shows_what_stands_at_any_key_and_any_member(key, line):
    assert any(told.startswith(line) for told in lines(key))


def test_list_names_the_values_that_a_field_takes():
    shown = lines("exchange")
    assert any("  plan = " in line and line.endswith("(see: fedmpi list plans)") for line in shown)
    assert any("codec = " in line and line.endswith("(see: fedmpi list codecs)") for line in shown)
    assert any("fraction = " in line and line.endswith("(0 to 1)") for line in lines("uniform"))
    assert any("stem = cifar" in line and "imagenet" in line for line in lines("resnet18"))


def test_the_package_shows_its_names():
    assert dir(fedmpi) == sorted(fedmpi.__all__) and {"Run", "load", "ConfigError"} < set(dir(fedmpi))
