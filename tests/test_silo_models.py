"""The model that a silo would use for itself: scored beside the global one, evaluated again, exported, handed out."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.equations import IDS, samples
from support.personal import TUNE, Normed, config, done

import fedmpi
from fedmpi import results
from fedmpi.cli import app
from fedmpi.comm import SoloComm
from fedmpi.errors import ConfigError

NORMED = {"model": "support.personal:Normed"}
HEAD = {"exchange": {"parameters": ["*", "!head.*"]}, **NORMED}
SGD = {"name": "sgd", "epochs": 1}
# What every silo has for itself, and which layers stay with the silo.
KINDS = {
    "fedper": (SGD, HEAD),
    "fedrep": ({"name": "fedrep", "epochs": 1, "head_steps": 2}, HEAD),
    "fedbn": (SGD, {"exchange": {"parameters": "all_but_batch_norm"}, **NORMED}),
    "statistics": (SGD, {"exchange": {"parameters": "trainable"}, **NORMED}),
    "ditto": ({"name": "ditto", "epochs": 1}, NORMED),
    "apfl": ({"name": "apfl", "epochs": 1}, NORMED),
    "ditto with a head": ({"name": "ditto", "epochs": 1}, HEAD),
    "fine-tuned": (SGD, {"evaluate": {"finetune": TUNE}, **NORMED}),
    "fedper, fine-tuned": (SGD, {"evaluate": {"finetune": TUNE}, **HEAD}),
}
LAYERS = [kind for kind, (_, other) in KINDS.items() if "exchange" in other]


def trained(out, kind, **more):
    local, other = KINDS[kind]
    return done(config(out, local, rounds=2, **other, **more))


def mae(state, silo):
    """A model's figures on a silo's test set, by torch alone."""
    module, data = Normed().eval(), samples(silo)
    module.load_state_dict(state)
    with torch.no_grad():
        return float((module(data.x_test) - data.y_test).abs().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_of_a_silo_has_the_figure_that_the_run_told(tmp_path, kind):
    records, run = trained(tmp_path / "a", kind)
    for silo in IDS:
        results.export(tmp_path / "a", tmp_path / "m.safetensors", silo=silo)
        results.export(tmp_path / "a", tmp_path / "m.pt", silo=silo)
        exported, told = load_file(tmp_path / "m.safetensors"), records[-1]["silos"][silo]["personal_mae"]
        assert mae(exported, silo) == pytest.approx(told, rel=1e-12)
        handed = run.silo_model(silo).state_dict()
        for other in (torch.load(tmp_path / "m.pt"), handed):
            assert (
                all(torch.equal(exported[name], other[name]) for name in exported) and exported.keys() == other.keys()
            )
        with safe_open(tmp_path / "m.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt", "round": "2", "holds": f"the model of silo '{silo}'"}
    assert run.silo_model("a") is not run.silo_model("a")


@pytest.mark.parametrize("kind", KINDS)
def test_eval_has_the_runs_figures_of_the_silos_own_models(tmp_path, kind):
    last = trained(tmp_path, kind)[0][-1]
    again = results.evaluate(tmp_path)
    assert "personal_mae" in again
    for name in again:
        assert name == "silos" or again[name] == last[name], name
    for silo, row in again["silos"].items():
        assert row.items() <= last["silos"][silo].items()


@pytest.mark.parametrize("kind", LAYERS)
def test_where_layers_are_personal_the_plain_figures_are_the_personal_ones_too(tmp_path, kind):
    last = trained(tmp_path, kind)[0][0]
    if "ditto" not in kind:
        assert last["personal_mae"] == last["mae"] and last["personal_loss"] == last["loss"]
        assert all(row["personal_mae"] == row["mae"] for row in last["silos"].values())
        assert last["personal_worst"] == {"silo": last["worst"]["silo"], "personal_mae": last["worst"]["mae"]}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_no_file_of_all_silos_has_layers_that_nobody_trained(tmp_path, kind, suffix):
    _, run = trained(tmp_path / "a", kind)
    shared = {e.name for e in run.federation.model.entries if e.kind == "shared"}
    rest = sorted(run.model.state_dict().keys() - shared)
    with pytest.raises(ConfigError, match=r"^every silo has its own .*: give --silo ID .* or --shared"):
        results.export(tmp_path / "a", tmp_path / f"m{suffix}")
    assert not (tmp_path / f"m{suffix}").exists()
    results.export(tmp_path / "a", tmp_path / f"m{suffix}", shared=True)
    if suffix == ".pt":
        exported = torch.load(tmp_path / "m.pt")
        metadata = {"format": "pt", **exported._metadata["fedmpi"]}
    else:
        with safe_open(tmp_path / "m.safetensors", "pt") as file:
            exported, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    at_end = load_file(tmp_path / "a" / "model.safetensors")
    assert exported.keys() == shared == at_end.keys()
    assert all(torch.equal(exported[name], run.model.state_dict()[name]) for name in shared)
    assert all(torch.equal(exported[name], at_end[name]) for name in shared)
    left_out = sorted(metadata.pop("left_out").split(", "))
    assert left_out == rest and metadata == {"format": "pt", "round": "2", "holds": "shared tensors only"}
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert file.metadata()["holds"] == "shared tensors only"


def test_a_model_that_is_shared_wholly_is_exported_as_ever(tmp_path):
    _, run = trained(tmp_path / "a", "ditto")
    assert results.export(tmp_path / "a", tmp_path / "m.safetensors") == 2
    for path in (tmp_path / "m.safetensors", tmp_path / "a" / "model.safetensors"):
        assert all(torch.equal(t, run.model.state_dict()[name]) for name, t in load_file(path).items())
        with safe_open(path, "pt") as file:
            assert not file.metadata()


def test_a_silo_that_has_not_trained_has_no_layers_of_its_own(tmp_path):
    first = {"select": {"name": "available", "traces": {silo: [] for silo in IDS[1:]}}}
    last, run = trained(tmp_path / "a", "fedper", **first)
    rows = last[-1]["silos"]
    assert [silo for silo in IDS if "personal_mae" in rows[silo]] == [IDS[0]]
    for attempt in (
        lambda: results.export(tmp_path / "a", tmp_path / "m.pt", silo=IDS[1]),
        lambda: run.silo_model(IDS[1]),
    ):
        with pytest.raises(ConfigError, match=f"^silo '{IDS[1]}' has not trained yet"):
            attempt()


def test_a_silo_without_a_model_of_its_own_uses_the_global_one(tmp_path, caplog):
    _, run = done(config(tmp_path / "a", rounds=1))
    results.export(tmp_path / "a", tmp_path / "m.pt", silo="a")
    assert [r.getMessage() for r in caplog.records] == ["silo 'a' has no personal model: the global model is written"]
    for state in (torch.load(tmp_path / "m.pt"), run.silo_model("a").state_dict()):
        assert all(torch.equal(tensor, run.model.state_dict()[name]) for name, tensor in state.items())


@pytest.mark.parametrize("kind", ["fedper", "ditto", "fedbn"])
def test_looking_at_a_silos_model_between_rounds_changes_nothing(tmp_path, kind):
    local, other = KINDS[kind]
    with fedmpi.Run(config(tmp_path / "a", local, rounds=3, **other), comm=SoloComm()) as looked_at:
        for record in looked_at:
            models = [copy.deepcopy(looked_at.silo_model(silo).state_dict()) for silo in IDS]
            assert [mae(m, s) for m, s in zip(models, IDS, strict=True)] == pytest.approx(
                [record["silos"][silo]["personal_mae"] for silo in IDS]
            )
    _, plain = done(config(tmp_path / "b", local, rounds=3, **other))
    assert torch.equal(looked_at.parameters, plain.parameters)
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, looked_at.model.state_dict()[name])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--silo", "zz"], "--silo: no silo 'zz'; available: a, b"),
        (["--silo", "a", "--shared"], "give either --silo or --shared"),
        ([], "every silo has its own head.weight, head.bias: give --silo ID for that silo's model"),
    ],
)
def test_what_cannot_be_exported_is_one_line(tmp_path, capsys, options, said):
    trained(tmp_path / "a", "fedper")
    code = app(["export", str(tmp_path / "a"), "--to", str(tmp_path / "m.pt"), *options], standalone_mode=False)
    error = capsys.readouterr().err
    assert code == 2 and error.startswith(f"fedmpi: {said}") and error.count("\n") == 1
    assert not (tmp_path / "m.pt").exists()


def test_the_commands_say_what_they_did(tmp_path, capsys):
    trained(tmp_path / "a", "fedper")
    app(["export", str(tmp_path / "a"), "--to", str(tmp_path / "m.pt"), "--silo", "b"], standalone_mode=False)
    assert capsys.readouterr().out == f"round 2 of silo 'b' written to {tmp_path / 'm.pt'}\n"
    app(["eval", str(tmp_path / "a"), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["round"] == 2
