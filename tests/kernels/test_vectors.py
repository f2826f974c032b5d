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
    for num_rows in (1, 2, 5):
        rows, params = [values(k, num, num_rows) for k in range(num_rows)], values(9, num, num_rows)
        factors = np.random.default_rng(num).dirichlet(np.ones(num_rows))
        mean = torch.mul(rows[0], float(factors[0]))
        for row, factor in zip(rows[1:], factors[1:], strict=True):
            mean.add_(row, alpha=float(factor))
        expected = params + mean
        vectors.step(tuple(row.numpy() for row in rows), factors.astype(np.float32), params.numpy())
        assert torch.equal(params, expected) and all(torch.equal(row, expected) for row in rows)


@pytest.mark.parametrize("num", LENGTHS)
def test_a_difference_has_torch_s_bits_and_its_norm_is_that_of_double_precision(num):
    x, w = values(1, num, 0), values(2, num, 0)
    expected = x - w
    squares = vectors.subtract(x.numpy(), w.numpy())
    assert torch.equal(x, expected)
    assert math.sqrt(squares) == pytest.approx(float(torch.linalg.vector_norm(expected.double())), rel=1e-6)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 8191, 8192, 10_000])
def test_what_is_not_finite_shows_in_the_norm(odd, at):
    x = torch.zeros(10_001)
    x[at] = odd
    assert not math.isfinite(vectors.subtract(x.numpy(), torch.ones(10_001).numpy()))
