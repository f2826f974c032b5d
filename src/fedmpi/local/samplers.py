"""Samplers: the order in which a silo visits its samples. Orders are keyed by (seed, silo, epoch), so a silo sees the
same order on any rank and after a restart."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from fedmpi import rng
from fedmpi.components import Family, component
from fedmpi.errors import ConfigError


class Sampler:
    """The order in which a silo visits its samples."""

    @property
    def repeats(self) -> bool:
        """Whether a sample may come more than once per epoch."""
        return False

    @abstractmethod
    def order(self, seed: int, silo: str, epoch: int, num_samples: int) -> np.ndarray:
        """Sample indices of one epoch, integers [num_samples]; depends on the arguments only."""


@component
class Shuffle(Sampler):
    """A new permutation every epoch."""

    def order(self, seed: int, silo: str, epoch: int, num_samples: int) -> np.ndarray:
        return rng.generator(seed, purpose="order", silo=silo, epoch=epoch).permutation(num_samples)


@component
class InOrder(Sampler):
    """The order of the file, every epoch."""

    def order(self, seed: int, silo: str, epoch: int, num_samples: int) -> np.ndarray:
        return np.arange(num_samples)


SAMPLERS = Family("sampler", {"shuffle": Shuffle, "in_order": InOrder}, Sampler, defaults=True)


def order_of(sampler: Sampler, seed: int, silo: str, epoch: int, num_samples: int) -> np.ndarray:
    """The sampler's order of an epoch, integers [num_samples] or fewer. Raises ConfigError if a user's sampler returns
    something else."""
    given = np.asarray(sampler.order(seed, silo, epoch, num_samples))
    if type(sampler) in SAMPLERS.members.values():
        return given
    wrong, hint = "", ""
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
        wrong = f"{given.dtype} of {list(given.shape)}"
    elif len(given) > num_samples:
        wrong = f"{len(given)} indices"
    elif len(outside := given[(given < 0) | (given >= num_samples)]):
        wrong = f"the index {outside[0]}"
    elif not sampler.repeats and (twice := np.bincount(given, minlength=num_samples)).max() > 1:
        wrong = f"the index {twice.argmax()} {twice.max()} times"
        hint = " (repeats = True on the sampler allows that)"
    if wrong:
        raise no_order(sampler, silo, epoch, wrong, num_samples, hint)
    return given


def no_order(sampler: Sampler, silo: str, epoch: int, wrong: str, num_samples: int, hint: str = "") -> ConfigError:
    """The ConfigError for a sampler that returned something else than an order."""
    return ConfigError(
        f"sampler '{SAMPLERS.name_of(sampler)}': silo '{silo}', epoch {epoch}: returned {wrong}; expected the "
        f"{num_samples} integers from 0 to {num_samples - 1}{hint}"
    )
