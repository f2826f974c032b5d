"""Keyed random numbers: every draw is a function of what it is for, never of who drew before.

A run, a round, a silo and a purpose make a key; the key makes a generator. So a silo draws the same numbers on
whichever rank it lives, and a resumed run needs no generator state.

>>> int(generator(0, silo="a", purpose="order").integers(1000))
374
>>> generator(0, round=3, purpose="select").random() == generator(0, round=3, purpose="select").random()
True
"""

from __future__ import annotations

import hashlib

import numpy as np


def key(seed: int, *, purpose: str, round: int = 0, silo: str = "", epoch: int = 0) -> int:
    """A 64-bit integer that depends on every argument (BLAKE2b of their text)."""
    text = repr((int(seed), purpose, int(round), str(silo), int(epoch)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(seed: int, *, purpose: str, round: int = 0, silo: str = "", epoch: int = 0) -> np.random.Generator:
    """A fresh numpy generator (Philox, counter based) for exactly this purpose."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose=purpose, round=round, silo=silo, epoch=epoch)))
