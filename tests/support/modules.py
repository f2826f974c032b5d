"""Modules that treat tensors and random numbers in ways that a flat vector and a seeded run must handle."""

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmpi.components import component
from fedmpi.flat import FlatModel, entries, layout_of
from fedmpi.types import Silo, SiloData, Source


def with_vectors(module, shared, auxiliaries):
    """The module as a flat vector with room for the auxiliary vectors that are sent with its delta."""
    return FlatModel(module, shared, layout=layout_of(entries(module, shared), auxiliaries))


@component
class Drifts:
    """A regression with heterogeneous silos: the inputs of silo k have mean k + 1."""

    silos: int = 4
    tests: int = 8

    def source(self, seed):
        def opened(name):
            generator = torch.Generator().manual_seed(int(name[1:]))
            x = torch.randn(32 + self.tests, 3, generator=generator) + int(name[1:]) + 1
            y = x.sum(1)
            return SiloData(x[:32], y[:32], x[32:], y[32:])

        return Source("regression", (3,), 1, tuple(Silo(f"s{k}") for k in range(self.silos)), opened)


@component
class Drawn:
    """Samples drawn from unseeded generators."""

    def source(self, seed):
        shift = random.random()

        def opened(name):
            x = torch.from_numpy(np.random.randn(24, 3)).float() + torch.rand(1) + shift
            return SiloData(x[:16], x[:16].sum(1), x[16:], x[16:].sum(1))

        return Source("regression", (3,), 1, tuple(Silo(f"s{k}") for k in range(2)), opened)


class Jitter(nn.Module):
    """Noise from numpy's, Python's and torch's generators, in training or always; initial weights from numpy's."""

    def __init__(self, always=False):
        super().__init__()
        self.always, self.linear = always, nn.Linear(3, 1)
        self.linear.weight.data = torch.from_numpy(np.random.randn(1, 3)).float() * random.random()

    def forward(self, x):
        if self.training or self.always:
            x = x + 0.1 * torch.from_numpy(np.random.randn(*x.shape)).float() + random.gauss(0, 0.1)
            x = x * torch.rand(x.shape[0], 1)
        return self.linear(x).squeeze(-1)


class Cast(nn.Module):
    """Logistic regression in another dtype."""

    def __init__(self, dtype, inputs=64, classes=10):
        super().__init__()
        self.linear = nn.Linear(inputs, classes).to(getattr(torch, dtype))

    def forward(self, x):
        return self.linear(x.flatten(1).to(self.linear.weight.dtype)).float()


class Statistic(nn.Module):
    """A running mean of the inputs, reassigned or written in place, and a counter."""

    mean: torch.Tensor
    calls: torch.Tensor

    def __init__(self, how):
        super().__init__()
        self.how, self.linear = how, nn.Linear(3, 1)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("calls", torch.tensor([0], dtype=torch.int16))

    def forward(self, x):
        if self.training or self.how.startswith("always"):
            new = 0.5 * self.mean + 0.5 * x.detach().mean(0)
            if self.how.endswith("in place"):
                self.mean.copy_(new)
                self.calls += 1
            elif self.how == "data":
                self.mean.data, self.calls.data = new, self.calls + 1
            elif self.how == "gone":
                del self.mean
                return self.linear(x - new).squeeze(-1)
            else:
                self.mean = {"shape": new[None], "dtype": new.double()}.get(self.how, new)
                self.calls = self.calls + 1
        return self.linear(x - self.mean.float()).squeeze(-1)


class Weights(nn.Module):
    """Weights that move: `.data` reassigned, flattened like an RNN's on a GPU, or replaced."""

    def __init__(self, how):
        super().__init__()
        self.how, self.one, self.two = how, nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x):
        if self.how == "data":
            self.one.weight.data = self.one.weight.data.clone()
        if self.how == "flatten":
            params = list(self.parameters())
            flat = torch.cat([p.detach().reshape(-1) for p in params])
            for param, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
                param.data = part.view_as(param)
        if self.how == "replaced":
            self.one.weight = nn.Parameter(self.one.weight.detach().clone())
        if self.how == "late" and not hasattr(self, "three"):
            self.three = nn.Linear(1, 1)
        if self.how == "late in training" and self.training:
            self.two.register_parameter("scale", nn.Parameter(torch.ones(1)))
        if self.how == "made anew":
            self.two = nn.Linear(4, 1)
        return self.two(self.one(x).tanh()).squeeze(-1)


class Tied(nn.Module):
    """y = W W x, with weights tied by object or by memory."""

    def __init__(self, how):
        super().__init__()
        self.enc, self.dec = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        if how == "object":
            self.dec.weight = self.enc.weight
        elif how == "data":
            self.dec.weight.data = self.enc.weight.data
        elif how == "parameter":
            self.dec.weight = nn.Parameter(self.enc.weight)
        elif how == "numpy":
            memory = self.enc.weight.detach().clone().numpy()
            self.enc.weight.data, self.dec.weight.data = torch.from_numpy(memory), torch.from_numpy(memory)
        elif how == "transposed":
            self.dec.weight.data = self.enc.weight.data.t()
        elif how == "partly":
            flat = torch.randn(12)
            self.enc.weight.data, self.dec.weight.data = flat[:9].view(3, 3), flat[3:].view(3, 3)
        elif how == "side by side":
            flat = torch.cat([self.enc.weight.detach().reshape(-1), self.dec.weight.detach().reshape(-1)])
            self.enc.weight.data, self.dec.weight.data = flat[:9].view(3, 3), flat[9:].view(3, 3)
        elif how == "expanded":
            self.dec.weight.data = torch.ones(1, 1).expand(3, 3)

    def forward(self, x):
        return self.dec(self.enc(x)).sum(1)


class Views(nn.Module):
    """Buffers that are views of another buffer or of a weight, and an attribute that is one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("table", torch.zeros(4, 3))
        self.register_buffer("last", self.table[3])
        self.register_buffer("column", self.table[:, 1])
        self.register_buffer("weight_t", self.linear.weight.data.t())
        self.register_buffer("row", self.linear.weight.data[0], persistent=False)

    def forward(self, x):
        if self.training:
            self.last.mul_(0.5).add_(0.5 * x.detach().mean(0))
        return (self.linear(x - self.table[3]) @ self.weight_t + self.row).sum(1) + self.column.sum()


class Unsaved(nn.Module):
    """A statistic outside the state_dict: a non-persistent buffer, or a plain attribute."""

    mean: torch.Tensor

    def __init__(self, how):
        super().__init__()
        self.how, self.linear = how, nn.Linear(3, 1)
        if how == "buffer":
            self.register_buffer("mean", torch.zeros(3), persistent=False)
        else:
            self.mean = torch.zeros(3)

    def forward(self, x):
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return self.linear(x - self.mean).squeeze(-1)


class Cache(nn.Module):
    """A table that grows on demand, and one that is created on demand; neither affects results."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("ones", torch.ones(1), persistent=False)

    def forward(self, x):
        if len(self.ones) < len(x):
            self.register_buffer("ones", torch.ones(len(x)), persistent=False)
        if not hasattr(self, "zeros"):
            self.register_buffer("zeros", torch.zeros(1), persistent=False)
        return self.linear(x).squeeze(-1) * self.ones[: len(x)] + self.zeros


class Remembers(nn.Module):
    """Counts and averages in plain attributes, or in a buffer created on demand; draws from its own generator."""

    mean: Any

    def __init__(self, how):
        super().__init__()
        self.how, self.linear = how, nn.Linear(3, 1)
        first = {"number": 0.0, "none": None, "list": [], "dict": {"mean": 0.0}, "array": np.zeros(3, np.float32)}
        if how == "empty buffer":
            self.register_buffer("mean", None, persistent=False)
        elif how == "generator":
            self.mean = np.random.default_rng(0)
        elif how == "torch generator":
            self.mean = torch.Generator().manual_seed(0)
        elif how in first:
            self.mean = first[how]

    def forward(self, x):
        return self.linear(x - self.known(x.detach().mean(0))).squeeze(-1)

    def known(self, new):
        if self.how == "generator":
            return torch.from_numpy(self.mean.standard_normal(3)).float()
        if self.how == "torch generator":
            return torch.randn(3, generator=self.mean)
        if self.how == "list":
            self.mean.append(new)
            return sum(self.mean)
        if self.how == "dict":
            self.mean["mean"] = 0.5 * self.mean["mean"] + 0.5 * new
            return self.mean["mean"]
        if self.how == "array":
            self.mean += new.numpy()
            return torch.from_numpy(self.mean.copy())
        before = getattr(self, "mean", None)
        if before is None and self.how == "late buffer":
            self.register_buffer("mean", new, persistent=False)
        else:
            self.mean = new if before is None else 0.5 * before + 0.5 * new
        return self.mean


class Freezes(nn.Module):
    """Freezes its first layer after its second forward pass in training."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.passes = nn.Linear(3, 3), nn.Linear(3, 1), 0
        for number, param in enumerate(self.parameters()):
            nn.init.constant_(param, 0.1 * (1 + number))

    def forward(self, x):
        if self.training:
            self.passes += 1
            self.first.requires_grad_(self.passes < 2)
        return self.last(self.first(x)).squeeze(-1)


class Follower(nn.Module):
    """A frozen layer that follows a trained one."""

    def __init__(self, how):
        super().__init__()
        self.how, self.linear, self.slow = how, nn.Linear(3, 1), nn.Linear(3, 1).requires_grad_(False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                for slow, param in zip(self.slow.parameters(), self.linear.parameters(), strict=True):
                    if self.how == "data":
                        slow.data = 0.5 * slow.data + 0.5 * param.data
                    elif self.how == "in place":
                        slow.mul_(0.5).add_(param, alpha=0.5)
                    else:
                        slow.data = slow.data.clone()
        return (self.linear(x) + self.slow(x)).squeeze(-1)


class Extra(nn.Linear):
    """A layer with a non-tensor in its state_dict."""

    def __init__(self, inputs, outputs, counts=False):
        super().__init__(inputs, outputs)
        self.counts, self.version = counts, 3

    def forward(self, x):
        self.version += self.counts
        return super().forward(x).squeeze(-1)

    def get_extra_state(self):
        return {"version": self.version, "table": torch.ones(2)}

    def set_extra_state(self, state):
        self.version = state["version"]


class Starts(nn.Module):
    """A model that is invalid from the start."""

    def __init__(self, how):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        if how == "meta":
            self.linear = nn.Linear(3, 1, device="meta")
        if how == "nan":
            self.linear.weight.data[0, 1] = torch.nan
        if how == "mask":
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        if how == "frozen":
            self.requires_grad_(False)
        if how == "unused":
            self.never = nn.LazyLinear(2)

    def forward(self, x):
        return self.linear(x).squeeze(-1)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(1)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu()).squeeze(-1)


class Normed(nn.Module):
    """Batch normalization, or a custom one that returns nan for a single sample."""

    def __init__(self, own=False):
        super().__init__()
        self.own, self.first, self.norm, self.last = own, nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x):
        x = self.first(x)
        if not self.own:
            return self.last(self.norm(x))
        if self.training:
            self.norm.running_var.lerp_((x - x.mean(0)).square().sum(0).detach() / (len(x) - 1), 0.1)
        return self.last(x / (self.norm.running_var + 1e-3).sqrt())


class PlainNorm(nn.Module):
    """Batch normalization of images: one image has enough pixels."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(1), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.norm(x[:, None]).flatten(1))


class Fixed(torch.nn.Module):
    """Returns its input; a frozen part keeps its own mode."""

    def __init__(self):
        super().__init__()
        self.frozen = torch.nn.Dropout(0.5).eval()
        self.noise = torch.nn.Dropout(0.5)
        self.batches = []

    def forward(self, x):
        assert not torch.is_grad_enabled() and not self.training and not self.noise.training
        self.batches.append(len(x))
        return self.noise(self.frozen(x))
