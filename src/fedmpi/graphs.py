"""A model as a graph that runs without its Python code: TorchScript or ONNX, checked before it is kept."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedmpi import disk, rng
from fedmpi.errors import ConfigError, in_one_line
from fedmpi.objectives import one_tensor
from fedmpi.types import Source

GRAPHS = (".torchscript", ".onnx")  # endings of files
SIZES = (2, 5)  # samples of the trace, and of the check


def write_graph(module: torch.nn.Module, source: Source, path: Path, about: Mapping[str, str]) -> None:
    """Writes the model by its path's ending, and `about` into its metadata. The input `x` is any number of samples,
    `outputs` what the module gives in evaluation mode. Raises ConfigError if the model has no graph, and OSError."""
    plain = _plain(module)
    one, other = (_samples(source, num) for num in SIZES)
    if path.suffix == ".onnx" and importlib.util.find_spec("onnx") is None:
        raise ConfigError(f"--to {path}: ONNX needs another package: pip install 'fedmpi[onnx]'")
    with torch.no_grad(), rng.borrowed(), warnings.catch_warnings():
        # torch warns that both ways are older than torch.export, and of branches that a trace fixes: see the check.
        warnings.simplefilter("ignore")
        expected = one_tensor(plain(other))
        try:
            traced: Any = torch.jit.trace(plain, one, check_trace=False)  # type: ignore[no-untyped-call]
            found = traced(other)
        except Exception as error:
            raise ConfigError(f"--to {path}: the model cannot be traced: {in_one_line(error)}") from None
        if found.shape != expected.shape or not torch.equal(found, expected):
            raise ConfigError(
                f"--to {path}: a trace of the model gives other outputs for other samples: its forward decides by "
                "their values or their number; export a state_dict (.safetensors, .pt)"
            )
        with disk.replacing(path) as part:
            if path.suffix == ".torchscript":
                traced.save(str(part), _extra_files=dict(about))
                return
            axes = {"x": {0: "samples"}, "outputs": {0: "samples"}}
            try:
                names: dict[str, Any] = {"input_names": ["x"], "output_names": ["outputs"], "dynamic_axes": axes}
                if "dynamo" in inspect.signature(torch.onnx.export).parameters:  # torch 2.4 has one way only
                    names["dynamo"] = False
                torch.onnx.export(plain, (one,), str(part), **names)
            except Exception as error:
                raise ConfigError(f"--to {path}: the model has no ONNX graph: {in_one_line(error)}") from None
            _tell(part, about)


def _tell(path: Path, about: Mapping[str, str]) -> None:
    """Puts `about` into the metadata of an ONNX file."""
    onnx: Any = importlib.import_module("onnx")
    graph = onnx.load(str(path), load_external_data=False)
    for key, value in about.items():
        graph.metadata_props.add(key=key, value=value)
    onnx.save(graph, str(path))


def _plain(module: torch.nn.Module) -> torch.nn.Module:
    """A copy in evaluation mode that owns its tensors: those of a run are views of one vector."""
    plain = copy.deepcopy(module).cpu().eval()
    with torch.no_grad():
        for tensor in plain.parameters():
            tensor.data = tensor.data.clone()
            tensor.requires_grad_(False)
    return plain


def _samples(source: Source, num: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(num)
    if source.task == "next_token":
        return torch.randint(0, source.num_classes, (num, *source.shape), generator=draw)
    return torch.randn(num, *source.shape, generator=draw)
