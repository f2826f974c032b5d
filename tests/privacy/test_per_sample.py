"""Sums of clipped gradients of single samples, against one sample after the other."""

import pytest
import torch
from torch import nn

from fedmpi import models
from fedmpi.privacy.per_sample import clipped_sum, fast, is_fast
from fedmpi.types import SiloData, Source

IMAGES = Source("classification", (1, 16, 16), 3, (), lambda silo: SiloData(*[torch.empty(0)] * 4))
WORDS = Source("next_token", (5,), 7, (), lambda silo: SiloData(*[torch.empty(0)] * 4))
SMALL = Source("binary", (6,), 1, (), lambda silo: SiloData(*[torch.empty(0)] * 4))


class Twice(nn.Module):
    """Uses a layer twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(self.layer(x).tanh()).sum(-1)


class Mixes(nn.Sequential):
    """A sequence whose forward is its own."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


def cross_entropy(outputs, y):
    return nn.functional.cross_entropy(outputs.flatten(0, -2) if outputs.ndim > 2 else outputs, y.flatten())


def binary(outputs, y):
    return nn.functional.binary_cross_entropy_with_logits(outputs, y)


CASES = {
    "logistic": (models.Logistic(), SMALL, binary, True),
    "mlp": (models.MLP(hidden=(8, 5)), IMAGES, cross_entropy, True),
    "cnn": (models.CNN(padding=1), IMAGES, cross_entropy, True),
    "rows": (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 7)), WORDS, cross_entropy, True),
    "group norm": (models.ResNet18(width=4), IMAGES, cross_entropy, False),
    "transformer": (models.Transformer(layers=1, heads=2, width=8), WORDS, cross_entropy, False),
    "twice": (Twice(), SMALL, binary, False),
}


def case(name, num=9):
    model, source, loss, quick = CASES[name]
    torch.manual_seed(4)
    module = models.make(model, source)
    x = torch.randn(num, *source.shape)
    y = torch.randint(3, (num,)) if source is IMAGES else (torch.rand(num) > 0.5).float()
    if source is WORDS:
        x, y = (
            (torch.randint(7, (num, 5)) if name == "transformer" else torch.randn(num, 5, 6)),
            torch.randint(7, (num, 5)),
        )
    return module, [p for p in module.parameters() if p.requires_grad], loss, x, y, quick


def one_by_one(module, trained, loss, x, y, clip):
    """The oracle."""
    total = [torch.zeros_like(p, dtype=torch.float64) for p in trained]
    norms = []
    for x_1, y_1 in zip(x, y, strict=True):
        found = torch.autograd.grad(loss(module(x_1[None]), y_1[None]), trained)
        norm = torch.stack([g.double().square().sum() for g in found]).sum().sqrt()
        norms.append(float(norm))
        for one, g in zip(total, found, strict=True):
            one += g.double() * min(1.0, clip / float(norm))
    return total, norms


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_sum_is_that_of_single_samples(name, share):
    module, trained, loss, x, y, quick = case(name)
    _, norms = one_by_one(module, trained, loss, x, y, 1.0)
    clip = {0.0: 0.5 * min(norms), 0.5: sorted(norms)[4], 1.0: 2 * max(norms)}[share]
    expected, _ = one_by_one(module, trained, loss, x, y, clip)
    assert is_fast(module, trained) is quick
    for way in (clipped_sum, *([fast] if quick else [])):
        for one, other in zip(way(module, trained, loss, x, y, clip), expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-6)
    assert all(param.requires_grad and param.grad is None for param in trained)


@pytest.mark.parametrize("name", ["mlp", "cnn", "rows", "group norm"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_one_sample_moves_the_sum_by_the_clip_at_most_whatever_it_is(name, bad):
    module, trained, loss, x, y, quick = case(name)
    for way in (clipped_sum, *([fast] if quick else [])):
        without = way(module, trained, loss, x[1:], y[1:], 0.3)
        for factor in (1.0, 1e4, bad):
            moved = way(module, trained, loss, torch.cat([factor * x[:1], x[1:]]), y, 0.3)
            squares = [float((a - b).double().square().sum()) for a, b in zip(moved, without, strict=True)]
            assert sum(squares) ** 0.5 <= 0.3 + 1e-5


def test_chunks_of_a_convolution_change_no_bit(monkeypatch):
    module, trained, loss, x, y, _ = case("cnn")
    whole = fast(module, trained, loss, x, y, 0.3)
    for size in (1, 50_000):
        monkeypatch.setattr("fedmpi.privacy.per_sample.UNFOLDED_BYTES", size)
        parts = fast(module, trained, loss, x, y, 0.3)
        assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_frozen_layers_have_no_part_in_norms():
    module, _, loss, x, y, _ = case("mlp")
    module.linear.weight.requires_grad_(False)
    trained = [p for p in module.parameters() if p.requires_grad]
    expected, _ = one_by_one(module, trained, loss, x, y, 0.3)
    for way in (clipped_sum, fast):
        for one, other in zip(way(module, trained, loss, x, y, 0.3), expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-6)
    assert not module.linear.weight.requires_grad


def test_what_may_mix_samples_is_not_fast():
    layer = nn.Linear(6, 6)
    for module in (
        Mixes(nn.Linear(6, 2)),
        nn.Sequential(layer, nn.ReLU(), layer),
        nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2)),
        nn.Sequential(nn.Linear(6, 2), nn.Softmax(0)),
        nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)),
        nn.Linear(6, 2),
    ):
        assert not is_fast(module, list(module.parameters()))
