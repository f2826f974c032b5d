"""Whole runs in this process on one rank: their data, models and rules, and helpers to inspect them."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedmpi
from fedmpi import checkpoint, results
from fedmpi.comm import SoloComm
from fedmpi.components import build, component
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.local import Sgd
from fedmpi.state import StateTensor
from fedmpi.types import Silo, SiloData, Source

OWN = "support.runs:"  # how configurations name this module's components


def paced(round, step_s):
    """The round of a silo that sleeps so many seconds before each step."""

    def check():
        time.sleep(step_s)
        round.check()

    return replace(round, check=check)


@component
class Blobs:
    """Two point clouds per silo, with faults in the data on request."""

    sizes: tuple[int, ...] = (20, 30, 50)
    infinite: str = ""
    """silo with a non-finite sample"""
    shape: tuple[int, ...] = (4,)
    """the sample shape that the dataset declares"""
    declared: int | None = None
    """the size that it declares for each silo"""
    task: Any = "classification"

    def source(self, seed):
        ids = [f"s{i}" for i in range(len(self.sizes))]
        silos = tuple(Silo(name, self.declared) for name in ids)
        return Source(self.task, self.shape, 2, silos, lambda name: self.opened(ids.index(name), name))

    def opened(self, index, name):
        rng = torch.Generator().manual_seed(index + int(os.environ.get("BLOBS", "0")))
        x, y = torch.randn(self.sizes[index], 4, generator=rng), torch.arange(self.sizes[index]) % 2
        x += y[:, None]
        if name == self.infinite:
            x[-1, 0] = torch.inf
        return SiloData(x, y, x[: 4 + index].nan_to_num(0, 0, 0), y[: 4 + index])


class Normed(nn.Module):
    """All kinds of state that a silo may keep: a personal head, running statistics, an integer, a frozen layer."""

    def __init__(self, inputs=4, dropout=0.2):
        super().__init__()
        self.base = nn.Linear(inputs, int(os.environ.get("WIDTH", "6")))
        self.norm, self.drop = nn.BatchNorm1d(self.base.out_features), nn.Dropout(dropout)
        self.head = nn.Linear(self.base.out_features, 2)
        self.base.weight.requires_grad_(False)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.base(x))).relu())


@component
class Keeper(Sgd):
    """Counts a silo's rounds in kept tensors of many names and dtypes; the silo's weight follows the count."""

    def train(self, silo, model, params_P, round):
        before = silo.kept
        contribution = super().train(silo, model, params_P, round)
        count = before.get("head/weight", torch.zeros((), dtype=torch.bfloat16)) + 1
        for name in ("a#b", "exchange_rate", "cursor", "params", "rows", "a/ids"):
            assert before.get(name, count - 1).real == count - 1
            silo.kept[name] = count.to(torch.complex64 if name == "cursor" else torch.float16)
        silo.kept |= {"head/weight": count, "odd": count % 2 == 1}
        contribution.vector_Q *= 1 / count.float()
        return contribution


@component
class Cliff:
    """A learning rate that explodes in round `at`."""

    at: int = 3

    def lr(self, eta0, round, rounds):
        return 1e30 if round == self.at else eta0


@component
class Slope:
    """A learning rate that is much too large from round `at` on."""

    at: int = 4

    def lr(self, eta0, round, rounds):
        return 1e4 * eta0 if round >= self.at else eta0


@component
class Eventful:
    """Keeps the order; in one epoch of silo s1 an event happens, if the environment names one."""

    def order(self, seed, silo, epoch, num_samples):
        if (silo, str(epoch)) == ("s1", os.environ.get("EPOCH")):
            what = os.environ["EVENT"]
            if what == "raise":
                raise OSError("the disk of s1 is gone")
            if what == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
            else:
                Path(what).touch()
            time.sleep(0.06)  # polling interval of the file
        return np.arange(num_samples)


def squared_loss(outputs, targets):
    return (outputs.softmax(-1)[:, 1] - targets).square().mean()


def endless(outputs, targets):
    """A loss that is not finite, with a finite gradient."""
    return squared_loss(outputs, targets) + torch.inf


def refuses_to_look(outputs, targets):
    """A loss that cannot be evaluated: an error before training."""
    if not torch.is_grad_enabled() and len(outputs) == 30:
        raise OSError("no look at s1")
    return squared_loss(outputs, targets)


def steep(outputs, targets):
    """A loss whose gradient moves the outputs' mean by about 1 per step at lr 1."""
    return -outputs.mean()


def rank_distance(outputs, targets):
    """A metric that is no mean over batches: how far the mean of the best half lies above the rest."""
    best = outputs[:, 1].sort().values
    return best[len(best) // 2 :].mean() - best[: len(best) // 2].mean()


def needs_five(outputs, targets):
    """A metric that raises if there are too few samples."""
    if len(outputs) < 5:
        raise ValueError("five at least")
    return len(outputs)


def nowhere(outputs, targets):
    """A metric that is undefined."""
    return torch.nan


@component
class Ignoring:
    """Three classes with ignored targets: 5 of 12 count in s0 and none in its second batch of two; all in s1; none in
    s2."""

    silos: tuple[str, ...] = ("s0", "s1", "s2")

    def source(self, seed):
        def opened(name):
            rng = torch.Generator().manual_seed(int(name[1:]))
            x, y = torch.randn(12, 4, generator=rng), torch.randint(3, (12,), generator=rng)
            if name == "s0":
                y[[2, 3, 5, 6, 7, 9, 10]] = -100
            return SiloData(x, y if name != "s2" else torch.full_like(y, -100), x[:0], y[:0])

        return Source("classification", (4,), 3, tuple(Silo(name) for name in self.silos), opened)


@component
class Pixels:
    """Three classes for every pixel of a square."""

    side: int = 5

    def source(self, seed):
        def opened(name):
            rng = torch.Generator().manual_seed(int(name[1:]))
            x = torch.randn(24, 1, self.side, self.side, generator=rng)
            y = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
            return SiloData(x[:16], y[:16], x[16:], y[16:])

        return Source("classification", (1, self.side, self.side), 3, (Silo("s0"), Silo("s1")), opened)


class ClassesLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


def pixel_net(last):
    """Logits with the classes in dimension 1, or in the last."""
    layers = [nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1)]
    return nn.Sequential(*layers, *([ClassesLast()] if last else []))


def up_and_down(outputs, targets):
    """A metric without a trend."""
    return (300 * outputs.double().mean()).sin()


@pytest.fixture(autouse=True)
def put_back():
    """Restore what a run changes in this process."""
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exact)


def config(out, rounds=4, data=None, model="logistic", local=None, **other):
    local = {"name": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 8} | (local or {})
    data = {"name": OWN + "Blobs"} | (data or {})
    other = {"checkpoint": {"every": 2}, "device": {"name": "cpu"}} | other
    return build(Config, {"out": str(out), "rounds": rounds, "data": data, "model": model, "local": local, **other})


def run(how, rounds=None):
    """The records of a run that is left, as with break, after `rounds` more rounds; and the run."""
    with fedmpi.Run(how, comm=SoloComm()) as run:
        records = []
        for record in run:
            records.append(record)
            if len(records) == rounds:
                break
    return records, run


def refused(how):
    with pytest.raises(ConfigError) as caught:
        fedmpi.Run(how, comm=SoloComm())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def everything(out, ids=("s0", "s1", "s2")):
    """All state that the next round depends on, and the round."""
    round = results.newest(out)
    server = checkpoint.read_server(out, round)
    silos = checkpoint.read_silos(out, round, ids)
    found = server | {f"{silo}/{name}": t for silo, kept in silos.items() for name, t in kept.items()}
    return round, {n: (tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in found.items()}


def figures(record):
    return {k: v for k, v in record.items() if k not in ("seconds", "peak_rss_bytes", "time")}


def tensors_of(server, silos):
    """What a rank writes: the server's tensors, and a row for each silo."""
    rows = [StateTensor(key, tensor, "per_silo", silo) for silo, kept in silos.items() for key, tensor in kept.items()]
    return [StateTensor(key, tensor) for key, tensor in server.items()] + rows
