"""Keyed random numbers: a draw depends on its purpose only, not on earlier draws.

Seed, round, silo and purpose make a key; the key makes a generator. A silo draws the same numbers on any rank, and a
resumed run needs no generator state. The global generators of torch, numpy and Python, which models and losses use, are
seeded with such keys, and restored afterwards.

>>> int(generator(0, silo="a", purpose="order").integers(1000))
374
>>> generator(0, round=3, purpose="select").random() == generator(0, round=3, purpose="select").random()
True
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch

_NUMPYS = np.random.MT19937(0)  # numpy's global bit generator inside `borrowed`


def key(seed: int, *, purpose: str, round: int = 0, silo: str = "", epoch: int = 0) -> int:
    """A 64-bit integer key from all arguments (BLAKE2b of their text)."""
    text = repr((int(seed), purpose, int(round), str(silo), int(epoch)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(seed: int, *, purpose: str, round: int = 0, silo: str = "", epoch: int = 0) -> np.random.Generator:
    """A new numpy generator (Philox, counter based) for these arguments."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose=purpose, round=round, silo=silo, epoch=epoch)))


def set_all(key: int) -> None:
    """Seed the global generators of torch (CPU and CUDA), numpy and Python with this key."""
    torch.default_generator.manual_seed(key >> 1)  # torch.manual_seed takes milliseconds without a GPU
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(key >> 1)
    np.random.seed(key & 0xFFFFFFFF)
    random.seed(key)


def kept() -> Callable[[], None]:
    """A function that restores the global generators to their present state."""
    of_torch, of_numpy, of_python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    def restore() -> None:
        torch.set_rng_state(of_torch)
        np.random.set_state(of_numpy)
        random.setstate(of_python)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)

    return restore


@contextlib.contextmanager
def borrowed() -> Iterator[None]:
    """Save the global generators of torch, numpy and Python; restore them on exit."""
    own, of_numpy = np.random.get_bit_generator(), np.random.get_state(legacy=False)  # type: ignore[attr-defined]
    of_torch, of_python = torch.get_rng_state(), random.getstate()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    # Swapping numpy's bit generator takes half the time of restoring its state.
    np.random.set_bit_generator(_NUMPYS)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        np.random.set_bit_generator(own)  # type: ignore[attr-defined]
        if of_numpy["has_gauss"]:  # a cached normal number
            np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
