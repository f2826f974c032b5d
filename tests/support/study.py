"""A study of four silos' files, for checks."""

import threading

import numpy as np
import pytest
import torch
import yaml

from fedmpi import assembly
from fedmpi.check import check, trying
from fedmpi.comm import SoloComm
from fedmpi.comm.threads import on_ranks

SILOS = "abcd"


def samples(number, num=60, classes=3):
    """x [N, 4] and labels that depend on it."""
    rng = np.random.default_rng(number)
    y = np.arange(num) % classes
    return rng.standard_normal((num, 4)).astype(np.float32) + y[:, None], y


class Study:
    """A configuration, four files of a silo each, and what a test changes of them before they are written."""

    def __init__(self, root):
        self.root, self.text, self.ranks, self.timing, self.overrides = root, None, 1, False, []
        self.arrays = {silo: dict(zip("xy", samples(number), strict=True)) for number, silo in enumerate(SILOS)}
        self.bytes = {}  # by path: instead of arrays
        self.config = {
            "rounds": 2,
            "out": str(root / "out"),
            "data": {
                "name": "files",
                "root": str(root / "data"),
                "task": "classification",
                "shape": [4],
                "num_classes": 3,
                "silos": [{"id": silo, "path": f"{silo}.npz"} for silo in SILOS],
            },
            "model": {"name": "logistic"},
            "local": {"name": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 8},
            "objective": {},
            "device": {"name": "cpu"},
        }

    def write(self):
        data = self.root / "data"
        data.mkdir(exist_ok=True)
        for silo, arrays in self.arrays.items():
            np.savez(data / f"{silo}.npz", **arrays)
        for name, content in self.bytes.items():
            (data / name).write_bytes(content)
        path = self.root / "config.yaml"
        path.write_text(yaml.safe_dump(self.config) if self.text is None else self.text)
        return path

    def check(self):
        return check(self.write(), self.overrides, SoloComm(), self.ranks, self.timing)

    def check_on(self, num_ranks, monkeypatch):
        """The result on every rank. The ranks are threads, which have one random state: models are built one by one."""
        path, lock, build = self.write(), threading.Lock(), assembly.build_module

        def one_by_one(*arguments):
            with lock:
                return build(*arguments)

        monkeypatch.setattr(trying, "build_module", one_by_one)
        return on_ranks(num_ranks, lambda comm: check(path, self.overrides, comm, timing=self.timing))

    def csv(self, **texts):
        """CSV files in place of the arrays, by silo."""
        self.arrays.clear()
        rows = "".join(f"{i % 7},{i % 5},{i % 3}\n" for i in range(30))
        for silo in SILOS:
            self.bytes[f"{silo}.csv"] = texts.get(silo, f"u,v,target\n{rows}").replace("ROWS", rows).encode()
        silos = [{"id": silo, "path": f"{silo}.csv"} for silo in SILOS]
        self.config["data"] |= {"shape": [2], "silos": silos}


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
