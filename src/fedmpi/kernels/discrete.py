"""An exact sampler of the discrete Gaussian, from uniform words.

Canonne, Kamath & Steinke 2020, The Discrete Gaussian for Differential Privacy, Algorithms 1 to 3, in integers of 64
bits: no probability is ever a floating-point number. Deviations, for a whole scale s:

    t = s           for the discrete Laplace that is thinned, not s + 1; any t gives the same distribution
    TURNS           Laplace values of TURNS s or more are drawn anew. Each is kept with a probability below
                    exp(-(TURNS - 1)^2 / 2), so the distribution changes by less than exp(-1700)

Uniform numbers below n are remainders of words, which are drawn anew beyond the largest multiple of n. So the number of
words that a value takes varies; who calls gives more of the same stream if they do not suffice.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmpi.kernels.jit import jit

Array = Any

TURNS = 60
LARGEST = 1 << 25  # scale; (TURNS * LARGEST)^2 fits into 64 bits
WORDS = 18  # words per value that nearly always suffice for a few thousand values


@jit
def _below(n: int, words: Array, at: Array) -> Any:
    """A uniform number below n; `at[0]` is the next word."""
    bound = np.uint64(n)
    rest = (np.uint64(0) - bound) % bound  # 2^64 modulo n: so many words are too many
    while at[0] < words.size:
        word = words[at[0]]
        at[0] += 1
        if word >= rest:
            return np.int64(word % bound)
    return 0


@jit
def _exp_minus(p: int, q: int, words: Array, at: Array) -> bool:
    """True with probability exp(-p/q), 0 <= p <= q (Algorithm 1)."""
    k = 1
    while (k == 1 or _below(k, words, at) == 0) and _below(q, words, at) < p and at[0] < words.size:
        k += 1
    return k % 2 == 1


@jit
def discrete_gaussian(scale: int, words: Array, out: Array) -> bool:
    """Fill `out`, int64 [n], with independent values of probability proportional to exp(-x^2 / (2 scale^2)), scale from
    1 to LARGEST, from uint64 `words`. False if they did not suffice; `out` is then of no use."""
    at = np.zeros(1, np.int64)
    square = 2 * scale * scale
    i = 0
    while i < out.size:
        if at[0] >= words.size:
            return False
        low = _below(scale, words, at)
        if not _exp_minus(low, scale, words, at):
            continue
        turns = 0
        while turns < TURNS and _exp_minus(1, 1, words, at):
            turns += 1
        if turns >= TURNS:
            continue
        size = low + scale * turns
        negative = _below(2, words, at) == 1
        if negative and size == 0:
            continue
        far = (size - scale) * (size - scale)
        kept = _exp_minus(far % square, square, words, at)
        for _ in range(far // square):
            kept = kept and _exp_minus(1, 1, words, at)
        if kept:
            out[i] = -size if negative else size
            i += 1
    return bool(at[0] < words.size)


def ready() -> None:
    """Compile the sampler, or load it from the cache: that takes seconds, which a round should not."""
    discrete_gaussian(1, np.zeros(WORDS, np.uint64), np.zeros(1, np.int64))
