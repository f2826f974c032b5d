"""Gaussian noise from a secret key, and noise that is correlated between rounds.

Blocks have their own generators (Philox with a 128-bit key, BLAKE2b of secret, step and block), so any slice of a
vector gets the same bits on every rank. Philox is no cryptographic generator, and floating-point numbers leak more than
real ones do (Mironov 2012): the guarantee is that of the mechanism with real numbers.

S elements of a slice, B of a block.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch

from fedmpi.layout import Layout, joined, within

BLOCK = 1 << 16


def secret_generator(secret: str, purpose: str, step: int = 0, block: int = 0) -> np.random.Generator:
    """A generator that only who knows the secret can repeat."""
    text = repr((secret, purpose, step, block)).encode()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.blake2b(text, digest_size=16).digest())))


@functools.cache
def coefficients(bands: int) -> np.ndarray:
    """c_0 .. c_(bands-1): the first column of the banded square root of the matrix of prefix sums (Kalinin & Lampert
    2024, Banded Square Root Matrix Factorization, BSR): c_0 = 1, c_k = c_(k-1) (2k-1) / (2k).

    >>> coefficients(3)
    array([1.   , 0.5  , 0.375])
    """
    k = np.arange(1, bands)
    return np.cumprod(np.concatenate([[1.0], (2 * k - 1) / (2 * k)]))


@functools.cache
def inverse(bands: int, steps: int) -> np.ndarray:
    """d_0 .. d_(steps-1): the first column of the inverse of the lower triangular Toeplitz matrix of `coefficients`.

    >>> inverse(2, 3), inverse(1, 3)
    (array([ 1.  , -0.5 ,  0.25]), array([1., 0., 0.]))
    """
    c, d = coefficients(bands), np.zeros(steps)
    d[0] = 1.0
    for k in range(1, steps):
        past = d[max(0, k - bands + 1) : k][::-1]
        d[k] = 0.0 - float(c[1 : 1 + len(past)] @ past)  # 0 - 0 has no sign
    return d


def add_noise(
    vector_S: torch.Tensor, start: int, scale: float, secret: str, layout: Layout, bands: int = 1, step: int = 0
) -> None:
    """Add noise of standard deviation `scale` to the elements from `start` on, except frozen ones, which
    a silo's update may not hold.

    With `bands` above 1 step t adds scale |c| y_t with C y = z, z independent normal and C of `coefficients`: a unit
    that takes part once in `bands` rounds or less often is protected as by independent noise of this `scale`
    (Choquette-Choo et al. 2023, (Amplified) Banded Matrix Factorization: no two of its columns of C overlap)."""
    scale *= float(np.linalg.norm(coefficients(bands)))
    weights = inverse(bands, step + 1) if bands > 1 else np.ones(1)
    stop = start + len(vector_S)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        low, high = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        noise_B = np.zeros(high - block * BLOCK)
        for age, weight in enumerate(weights):
            if weight:
                draw = secret_generator(secret, "noise", step - age, block)
                noise_B += weight * draw.standard_normal(high - block * BLOCK)
        added_B = torch.from_numpy(noise_B[low - block * BLOCK :] * scale)
        for there in within(joined((*layout.still, *layout.averaged)), low, high - low):
            added_B[there] = 0.0
        vector_S[low - start : high - start].add_(added_B.to(vector_S))
