"""Sums of clipped gradients of single samples, beside plain SGD's backward pass and Opacus, interleaved in one run.

    python jobs/bench/per_sample.py [--batch 64] [--repeats 25] [--quick]

The model is `cnn` on 28x28 images. `fast` is one backward pass, `torch.func` the way for any model; Opacus is timed if
it can be imported (pip install --no-deps opacus opt_einsum). Times are CPU seconds of one thread, medians; `x_sgd` is
the time / that of plain SGD's forward and backward pass.
"""

import argparse
import importlib
import importlib.util
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedmpi import models
from fedmpi.privacy.per_sample import clipped_sum, fast
from fedmpi.types import SiloData, Source

IMAGES = Source("classification", (1, 28, 28), 10, (), lambda silo: SiloData(*[torch.empty(0)] * 4))
CLIP = 1.0


def ways(x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The candidates, each of which takes one step's gradient."""
    module, loss = models.make(models.CNN(), IMAGES), nn.functional.cross_entropy
    trained = list(module.parameters())

    def sgd() -> None:
        for param in trained:
            param.grad = None
        loss(module(x), y).backward()  # type: ignore[no-untyped-call]

    found: dict[str, Callable[[], object]] = {
        "sgd": sgd,
        "fast": lambda: fast(module, trained, loss, x, y, CLIP),
        "torch.func": lambda: clipped_sum(module, trained, loss, x, y, CLIP),
    }
    if importlib.util.find_spec("opacus") is not None:
        found["opacus"] = _opacus(x, y)
    return found


def _opacus(x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    made: Any = importlib.import_module("opacus").GradSampleModule
    layers = [part for part in models.make(models.CNN(), IMAGES).children() if not type(part).__name__.startswith("_")]
    module: Any = made(nn.Sequential(*layers))

    def step() -> list[torch.Tensor]:
        for param in module.parameters():
            param.grad = param.grad_sample = None
        nn.functional.cross_entropy(module(x), y).backward()  # type: ignore[no-untyped-call]
        parts = [param.grad_sample for param in module.parameters()]
        norms_N = torch.stack([part.flatten(1).norm(dim=1) for part in parts]).norm(dim=0)
        factors_N = (CLIP / (norms_N + 1e-6)).clamp(max=1.0)
        return [torch.einsum("n,n...->...", factors_N, part) for part in parts]

    return step


def main() -> None:
    """Prints one JSON line per candidate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    num = 4 if given.quick else given.batch
    candidates = ways(torch.randn(num, 1, 28, 28), torch.randint(10, (num,)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(3 if given.quick else given.repeats + 3):
        for name, step in candidates.items():
            began_s = time.process_time()
            step()
            times[name].append(time.process_time() - began_s)
    medians = {name: statistics.median(one[2:]) for name, one in times.items()}
    for name, seconds in medians.items():
        print(json.dumps({"way": name, "batch": num, "seconds": seconds, "x_sgd": seconds / medians["sgd"]}))


if __name__ == "__main__":
    main()
