"""Compiled passes over vectors: torch's bits, whatever the length."""

import math

import numpy as np
import pytest
import torch

from fedmpi.kernels import vectors

LENGTHS = [1, 7, 33, 4095, 4097, 8192, 8192 + 5, 100_003]


def values(number, num, seed):
    """Numbers of many magnitudes, so that the order of operations shows."""
    draw = torch.Generator().manual_seed(1000 * seed + number)
    return torch.randn(num, generator=draw) * 10.0 ** torch.randint(-3, 4, (num,), generator=draw)


@pytest.mark.parametrize("num", LENGTHS)
def test_a_step_has_the_bits_of_torch_s_operations(num):
    for kinds in ([0], [1], [2], [1, 1], [2, 2], [2, 0, 1, 2, 0]):
        rows, params = [values(k, num, len(kinds)) for k in range(len(kinds))], values(9, num, len(kinds))
        deltas = [row - params if kind == 2 else row.clone() for row, kind in zip(rows, kinds, strict=True)]
        factors = np.random.default_rng(num).dirichlet(np.ones(len(kinds)))
        mean = torch.mul(deltas[0], float(factors[0]))
        for delta, factor in zip(deltas[1:], factors[1:], strict=True):
            mean.add_(delta, alpha=float(factor))
        expected = params + mean
        given = tuple(row.numpy() for row in rows)
        vectors.step(given, factors.astype(np.float32), np.array(kinds), params.numpy())
        assert torch.equal(params, expected)
        for row, delta, kind in zip(rows, deltas, kinds, strict=True):
            assert torch.equal(row, expected if kind else delta), "sums stay, silos' models take the new parameters"


@pytest.mark.parametrize("num", LENGTHS)
def test_a_difference_has_torch_s_bits_and_its_norm_is_that_of_double_precision(num):
    x, w = values(1, num, 0), values(2, num, 0)
    expected = x - w
    only_measured = vectors.distance(x.numpy(), w.numpy())
    squares = vectors.subtract(x.numpy(), w.numpy())
    assert torch.equal(x, expected) and squares == only_measured
    assert math.sqrt(squares) == pytest.approx(float(torch.linalg.vector_norm(expected.double())), rel=1e-6)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 8191, 8192, 10_000])
def test_what_is_not_finite_shows_in_the_norm(odd, at):
    x = torch.zeros(10_001)
    x[at] = odd
    assert not math.isfinite(vectors.distance(x.numpy(), torch.ones(10_001).numpy()))
    assert not math.isfinite(vectors.subtract(x.numpy(), torch.ones(10_001).numpy()))
