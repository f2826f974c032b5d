"""`init`: foreign files, loaded where they fit, and summed up in one line where they do not."""

import argparse

import pytest
import torch
from safetensors.torch import save_file
from support.runs import config
from torch import nn

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.components import build, to_dict
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.plan import plan
from fedmpi.pretrained import InitSection, fitting, start


class Body(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))


class WithHead(nn.Module):
    def __init__(self, outputs=2):
        super().__init__()
        self.body, self.head = Body(), nn.Linear(3, outputs)


class Tied(nn.Module):
    """Tied as in Hugging Face language models: one tensor under two names."""

    def __init__(self):
        super().__init__()
        self.embed, self.block, self.lm_head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        self.lm_head.weight = self.embed.weight


def filled(module, value=0.5):
    """A state_dict filled with this value."""
    return {name: torch.full_like(tensor, value) for name, tensor in module.state_dict().items()}


def values(module):
    return {float(v) for tensor in module.state_dict().values() for v in tensor.flatten()}


def refusal(module, init):
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        start(module, init)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.pth", "a.bin", "pytorch_model"])
@pytest.mark.parametrize("wrap", [lambda tensors: tensors, lambda tensors: {"epoch": 3, "state_dict": tensors}])
def test_a_file_of_either_kind_is_taken_whatever_its_name(tmp_path, name, wrap):
    module = WithHead()
    if name.endswith("safetensors"):
        save_file(filled(module), tmp_path / name)
    else:
        torch.save(wrap(filled(module)), tmp_path / name)
    assert start(module, str(tmp_path / name)) == ""
    assert values(module) == {0.5, 0.0}  # the number of batches that a normalization has seen is an integer


def test_a_file_that_runs_code_is_refused(tmp_path):
    torch.save(WithHead(), tmp_path / "whole.pt")
    assert "holds more than tensors (a whole module?); save model.state_dict()" in refusal(
        WithHead(), str(tmp_path / "whole.pt")
    )
    torch.save({"state": argparse.Namespace(a=1)}, tmp_path / "code.pt")
    assert "holds more than tensors" in refusal(WithHead(), str(tmp_path / "code.pt"))


def test_files_that_cannot_be_read_say_why(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    assert "holds no state_dict" in refusal(WithHead(), str(tmp_path / "empty.pt"))
    assert "No such file or directory" in refusal(WithHead(), str(tmp_path / "none.pt"))
    assert "Is a directory" in refusal(WithHead(), str(tmp_path))
    torch.save(filled(WithHead()), tmp_path / "whole.pt")
    save_file(filled(WithHead()), tmp_path / "whole.safetensors")
    for name in ("whole.pt", "whole.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for content in (b"", b"hello", whole[:100], whole[:-300]):
            (tmp_path / name).write_bytes(content)
            assert refusal(WithHead(), str(tmp_path / name)).startswith(f"init: {tmp_path / name} ")


def test_names_that_differ_are_summed_up_with_what_helps(tmp_path):
    path = str(tmp_path / "a.pt")
    torch.save(filled(WithHead(7)), path)
    said = refusal(WithHead(), path)
    assert "fits 7 of the model's 11 tensors" in said or "fits 9 of the model's 11 tensors" in said
    assert "differs: 2 (head.weight (there float32[7, 3], in the model float32[2, 3])" in said
    assert said.endswith("strict: false} takes those that fit")
    torch.save(filled(nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)))), path)
    said = refusal(WithHead(), path)
    assert "the model lacks 100 (0.weight, 0.bias, 1.weight and 97 more)" in said and "fits 0 of" in said


@pytest.mark.parametrize("prefix", ["module", "module.", "model.inner."])
def test_a_prefix_that_would_help_is_named_and_helps(tmp_path, prefix):
    path, dotted = str(tmp_path / "a.pt"), prefix.removesuffix(".") + "."
    torch.save({dotted + name: tensor for name, tensor in filled(WithHead()).items()}, path)
    said = refusal(WithHead(), path)
    assert said.endswith(f"; with init: {{path: {path}, prefix: {dotted}}} 11 fit")
    module = WithHead()
    assert start(module, InitSection(path=path, prefix=prefix)) == ""
    assert values(module) == {0.5, 0.0}


def test_a_pretrained_body_gets_a_new_head(tmp_path):
    path = str(tmp_path / "a.pt")
    torch.save(filled(Body()), path)
    assert f"with init: {{path: {path}, prefix: body., strict: false}} 9 fit" in refusal(WithHead(), path)
    module = WithHead()
    head = module.head.weight.detach().clone()
    said = start(module, InitSection(path=path, strict=False, prefix="body."))
    assert said == f"init: {path}: 9 of the model's 11 tensors are loaded; the file lacks 2 (head.weight, head.bias)"
    assert values(module.body) == {0.5, 0.0} and torch.equal(head, module.head.weight)
    assert "file lacks 2" in refusal(WithHead(), InitSection(path=path, prefix="body."))  # still strict


def test_another_head_in_the_file_is_left_there(tmp_path):
    path = str(tmp_path / "a.pt")
    torch.save(filled(WithHead(7)) | {"extra.weight": torch.ones(2)}, path)
    module = WithHead()
    said = start(module, InitSection(path=path, strict=False))
    assert "differs: 2 (head.weight" in said and "the model lacks 1 (extra.weight)" in said
    assert values(module.body) == {0.5, 0.0} and 0.5 not in values(module.head)


def test_a_file_of_which_nothing_fits_is_never_taken(tmp_path):
    path = str(tmp_path / "a.pt")
    torch.save({"other": torch.ones(2)}, path)
    for init in (InitSection(path=path, strict=False), InitSection(path=path, strict=False, prefix="body.")):
        assert "fits 0 of the model's 11 tensors" in refusal(WithHead(), init)


@pytest.mark.parametrize("there", ["embed.weight", "lm_head.weight"])
def test_tied_weights_need_one_of_their_names(tmp_path, there):
    tensors = filled(Tied())
    held = {name: t for name, t in tensors.items() if name == there or name.startswith("block")}
    save_file(held, tmp_path / "a.safetensors")
    module = Tied()
    assert start(module, str(tmp_path / "a.safetensors")) == ""
    assert values(module) == {0.5} and module.lm_head.weight is module.embed.weight


def test_tied_weights_that_differ_in_the_file_are_refused(tmp_path):
    path = str(tmp_path / "a.pt")
    torch.save(filled(Tied()), path)
    assert start(Tied(), path) == ""
    torch.save(filled(Tied()) | {"lm_head.weight": torch.ones(5, 3)}, path)
    said = refusal(Tied(), InitSection(path=path, strict=False))
    assert "'embed.weight' and 'lm_head.weight' are one tensor in the model and differ there" in said


def test_quantized_weights_are_not_taken_for_numbers(tmp_path):
    path = str(tmp_path / "a.pt")
    torch.save(filled(WithHead()) | {"head.weight": torch.ones(2, 3, dtype=torch.int8)}, path)
    assert "differs: 1 (head.weight (there int8[2, 3], in the model float32[2, 3]))" in refusal(WithHead(), path)
    torch.save({name: t.bfloat16() if t.is_floating_point() else t for name, t in filled(WithHead()).items()}, path)
    assert start(WithHead(), path) == ""


def test_plan_looks_at_the_file_without_memory_for_the_model(tmp_path):
    path = str(tmp_path / "a.pt")
    torch.save({"linear.weight": torch.ones(10, 64)}, path)
    with pytest.raises(ConfigError, match=r"the file lacks 1 \(linear\.bias\)"):
        plan(build(Config, {"init": path}), {}, 1)
    assert plan(build(Config, {"init": {"path": path, "strict": False}}), {}, 1)["parameters"] == 650
    with torch.device("meta"):
        module = Tied()
    torch.save({name: t for name, t in filled(Tied()).items() if name != "lm_head.weight"}, path)
    assert fitting(module, path)[1] == ""


def test_the_mapping_goes_through_a_configuration_and_a_wrong_key_is_named():
    made = build(Config, {"init": {"path": "a.pt", "strict": False}})
    assert build(Config, to_dict(made)) == made and made.init == InitSection(path="a.pt", strict=False)
    assert build(Config, to_dict(build(Config, {"init": "a.pt"}))).init == "a.pt"
    for init, says in (
        ({"path": "a", "strikt": 1}, "did you mean 'strict'"),
        ({"strict": True}, "init.path: 'init' needs"),
    ):
        with pytest.raises(ConfigError, match=says):
            build(Config, {"init": init})


def test_a_run_starts_from_what_fits_and_says_so_once(tmp_path, caplog):
    torch.save({"linear.weight": torch.full((2, 4), 0.5)}, tmp_path / "a.pt")
    init = {"path": str(tmp_path / "a.pt"), "strict": False}
    with fedmpi.Run(config(tmp_path / "a", 2, init=init), comm=SoloComm()) as begun:
        assert bool((begun.model.linear.weight == 0.5).all())
    assert [r.getMessage().partition(": ")[0] for r in caplog.records] == ["init"]
    assert "1 of the model's 2 tensors are loaded; the file lacks 1 (linear.bias)" in caplog.text
