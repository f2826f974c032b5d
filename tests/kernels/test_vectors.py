"""Compiled passes over vectors: torch's bits, whatever the length."""

import math

import numba
import numpy as np
import pytest
import torch

from fedmpi.kernels import vectors
from fedmpi.kernels.jit import jit_with

LENGTHS = [1, 7, 33, 4095, 4097, 16384, 16384 + 5, 100_003]


def values(number, num, seed):
    """Numbers of many magnitudes, so that the order of operations shows."""
    draw = torch.Generator().manual_seed(1000 * seed + number)
    return torch.randn(num, generator=draw) * 10.0 ** torch.randint(-3, 4, (num,), generator=draw)


@pytest.mark.parametrize("num", [0, 1, 15, 16, 33, 4097])
def test_squares_of_rows_are_sums_in_float64(num):
    rows = torch.stack([values(i, num, 5) for i in range(3)])
    found = np.full(3, np.nan)
    vectors.squares(rows.numpy(), found)
    np.testing.assert_allclose(found, rows.double().square().sum(1).numpy(), rtol=1e-14)
    rows[1] = torch.inf
    vectors.squares(rows.numpy(), found)
    assert found[1] == (math.inf if num else 0) and np.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("num", LENGTHS)
def test_a_step_has_the_bits_of_torch_s_operations(num):
    for kinds in ([0], [1], [2], [-1, 1], [1, 1], [2, 2], [-1, 2, 0, 1, -1, 2, 0]):
        rows, params = [values(k, num, len(kinds)) for k in range(len(kinds))], values(9, num, len(kinds))
        deltas = [row - params if kind == 2 else row.clone() for row, kind in zip(rows, kinds, strict=True)]
        factors = np.random.default_rng(num).dirichlet(np.ones(len(kinds)))
        counted = [(d, float(f)) for d, f, kind in zip(deltas, factors, kinds, strict=True) if kind >= 0]
        mean = torch.mul(*counted[0])
        for delta, factor in counted[1:]:
            mean.add_(delta, alpha=factor)
        expected = params + mean
        given = tuple(row.numpy() for row in rows)
        vectors.step(given, factors.astype(np.float32), np.array(kinds), params.numpy())
        assert torch.equal(params, expected)
        for row, delta, kind in zip(rows, deltas, kinds, strict=True):
            assert torch.equal(row, expected if kind > 0 else delta), "sums stay, silos' models take the new parameters"


@pytest.mark.parametrize("num", LENGTHS)
def test_a_distance_is_that_of_double_precision(num):
    x, w = values(1, num, 0), values(2, num, 0)
    expected = float(torch.linalg.vector_norm((x - w).double()))
    assert math.sqrt(vectors.distance(x.numpy(), w.numpy())) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 5000, 16_383, 20_000])
def test_what_is_not_finite_shows_in_the_norm(odd, at):
    x = torch.zeros(20_001)
    x[at] = odd
    assert not math.isfinite(vectors.distance(x.numpy(), torch.ones(20_001).numpy()))


def test_without_a_place_for_numba_s_cache_kernels_are_compiled_all_the_same(monkeypatch):
    def njit(**options):
        def refuse(function):
            if options.get("cache"):
                raise RuntimeError("cannot cache function: no locator available")
            return function

        return refuse

    monkeypatch.setattr(numba, "njit", njit)
    assert jit_with(fastmath={"contract"})(len) is len


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num", LENGTHS)
def test_integers_of_the_ring_have_the_bits_of_torch_s_operations(num, dtype):
    x, factor = values(1, num, 5) % 100, 12345.6789
    x[:1] = 2.5 / factor  # near half an integer
    out = torch.zeros(num, dtype=dtype)
    vectors.quantised(x.numpy(), factor, out.numpy())
    assert torch.equal(out, x.double().mul(factor).round().to(dtype))
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    vectors.quantised(halves.numpy(), 1.0, out.numpy()[: min(num, 5)])
    assert out[:5].tolist() == [0, 2, 2, 0, -2][: min(num, 5)]
    back = torch.zeros(num)
    vectors.mean_of((out.numpy(),), 7.3e-8, back.numpy(), False)
    assert torch.equal(back, out.double().mul(7.3e-8).float())
    rows = [torch.randint(-(2**31), 2**31, (num,)).to(dtype) << (32 * (dtype == torch.int64)) for _ in range(3)]
    mean = (rows[0] + rows[1] + rows[2]).double().mul(7.3e-8).float()
    vectors.mean_of(tuple(row.numpy() for row in rows), 7.3e-8, back.numpy(), False)
    assert torch.equal(back, mean)
    vectors.mean_of(tuple(row.numpy() for row in rows), 7.3e-8, back.numpy(), True)
    assert torch.equal(back, mean + mean)
    streams, signs = torch.stack(rows), np.array([1, -1, 1])
    vectors.masked(x.numpy(), factor, streams.numpy(), signs, out.numpy())
    integers = x.double().mul(factor).round().to(dtype)
    assert torch.equal(out, integers + rows[0] - rows[1] + rows[2])
    vectors.add_signed(streams.numpy(), -signs, out.numpy())
    assert torch.equal(out, integers)
