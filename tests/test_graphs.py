"""Exported graphs: the outputs of the module, without fedmpi; one line where a model has no graph."""

import warnings

import numpy as np
import pytest
import torch
from support.runs import config
from torch import nn

import fedmpi
from fedmpi import results
from fedmpi.comm import SoloComm
from fedmpi.errors import ConfigError

OWN = "test_graphs:"


class Deciding(nn.Module):
    """Its forward depends on how many samples there are."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x) * (1 if len(x) < 3 else 2)


class Whole(nn.Module):
    """Convolution, batch normalization, dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(9, 2)

    def forward(self, x):
        return self.head(self.body(x[:, None]).flatten(1))


def trained(tmp_path, model, **values):
    how = config(tmp_path, 2, model={"name": f"{OWN}{model}"}, **values)
    with fedmpi.Run(how, comm=SoloComm()) as run:
        list(run)
        return run.out, run.federation.model.module


def loaded(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.load(str(path))


def inputs(num):
    return torch.from_numpy(np.random.default_rng(num).standard_normal((num, 4)).astype(np.float32))


def test_a_torchscript_file_gives_the_modules_outputs(tmp_path):
    out, module = trained(tmp_path, "Whole")
    assert results.export(out, tmp_path / "m.torchscript", allow=["test_graphs"]) == 2
    with torch.no_grad():
        graph = loaded(tmp_path / "m.torchscript")
        for num in (1, 7):
            assert torch.equal(graph(inputs(num)), module.eval()(inputs(num)))
    assert (tmp_path / "m.torchscript").stat().st_size < 60_000


def test_an_onnx_file_gives_the_modules_outputs(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    out, module = trained(tmp_path, "Whole")
    results.export(out, tmp_path / "m.onnx", allow=["test_graphs"])
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    graph = ReferenceEvaluator(str(tmp_path / "m.onnx"))
    for num in (1, 7):
        with torch.no_grad():
            expected = module.eval()(inputs(num)).numpy()
        np.testing.assert_allclose(graph.run(None, {"x": inputs(num).numpy()})[0], expected, rtol=1e-5, atol=1e-6)
        assert np.abs(expected).max() > 0.1


def test_the_graph_of_a_silo_is_its_own_model(tmp_path):
    out, _ = trained(tmp_path, "Whole", exchange={"parameters": ["*", "!head.*"]})
    graphs = []
    for silo in ("s0", "s1"):
        results.export(out, tmp_path / f"{silo}.torchscript", allow=["test_graphs"], silo=silo)
        graphs.append(loaded(tmp_path / f"{silo}.torchscript"))
    assert torch.equal(graphs[0].body(inputs(3)[:, None]), graphs[1].body(inputs(3)[:, None]))
    assert not torch.equal(graphs[0](inputs(3)), graphs[1](inputs(3)))


@pytest.mark.parametrize("ending", [".torchscript", ".onnx"])
def test_a_model_that_a_trace_does_not_hold_is_refused(tmp_path, ending, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: name)
    out, _ = trained(tmp_path, "Deciding")
    with pytest.raises(ConfigError, match="its forward decides by their values or their number; export a state_dict"):
        results.export(out, tmp_path / f"m{ending}", allow=["test_graphs"])
    assert not (tmp_path / f"m{ending}").exists()


def test_what_a_graph_cannot_be_is_refused(tmp_path, monkeypatch):
    out, _ = trained(tmp_path, "Whole")
    with pytest.raises(ConfigError, match="a graph is a whole model, and --shared is a part"):
        results.export(out, tmp_path / "m.onnx", allow=["test_graphs"], shared=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(ConfigError, match=r"ONNX needs another package: pip install 'fedmpi\[onnx\]'"):
        results.export(out, tmp_path / "m.onnx", allow=["test_graphs"])
