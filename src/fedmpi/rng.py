"""Keyed random numbers: every draw is a function of what it is for, never of who drew before.

A run, a round, a silo and a purpose make a key; the key makes a generator. So a silo draws the same numbers on
whichever rank it lives, and a resumed run needs no generator state. What models and losses draw from torch's, numpy's
and Python's own generators is keyed by the same, and these are put back afterwards.

>>> int(generator(0, silo="a", purpose="order").integers(1000))
374
>>> generator(0, round=3, purpose="select").random() == generator(0, round=3, purpose="select").random()
True
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch

_NUMPYS = np.random.MT19937(0)  # what numpy's own functions draw from while they are borrowed


def key(seed: int, *, purpose: str, round: int = 0, silo: str = "", epoch: int = 0) -> int:
    """A 64-bit integer that depends on every argument (BLAKE2b of their text)."""
    text = repr((int(seed), purpose, int(round), str(silo), int(epoch)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(seed: int, *, purpose: str, round: int = 0, silo: str = "", epoch: int = 0) -> np.random.Generator:
    """A fresh numpy generator (Philox, counter based) for exactly this purpose."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose=purpose, round=round, silo=silo, epoch=epoch)))


def set_all(key: int) -> None:
    """The generators that code draws from without naming one (torch's, numpy's and Python's) begin with this key."""
    torch.default_generator.manual_seed(key >> 1)  # torch.manual_seed takes milliseconds where there is no GPU
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(key >> 1)
    np.random.seed(key & 0xFFFFFFFF)
    random.seed(key)


@contextlib.contextmanager
def borrowed() -> Iterator[None]:
    """Whatever is drawn or set in between, torch's, numpy's and Python's generators go on from where they are now."""
    own, of_numpy = np.random.get_bit_generator(), np.random.get_state(legacy=False)  # type: ignore[attr-defined]
    of_torch, of_python = torch.get_rng_state(), random.getstate()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    # To change places takes half the time of setting a state back.
    np.random.set_bit_generator(_NUMPYS)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        np.random.set_bit_generator(own)  # type: ignore[attr-defined]
        if of_numpy["has_gauss"]:  # a number that it had still to give
            np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
