"""What both kinds of differential privacy have in common: noise or a budget, and where the noise comes from."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import pydantic
import torch

from fedmpi.components import PositiveFloat, component
from fedmpi.flat import Entry
from fedmpi.privacy.account import Use, sigma_for
from fedmpi.privacy.per_sample import Loss
from fedmpi.secure.ring import Spread
from fedmpi.types import Source

if TYPE_CHECKING:
    from fedmpi.config import Config


REPEATS = "who knows the seed can remove the noise"  # what `reproducible` means


@component
class Privacy:
    """Base class: fields and what a run asks."""

    sigma: PositiveFloat | None = None
    """noise multiplier: standard deviation / clip; null: the least with which all rounds spend `epsilon`"""
    epsilon: PositiveFloat | None = None
    """budget: the run ends before it is exceeded; null: none"""
    delta: Annotated[float, pydantic.Field(ge=1e-10, lt=1)]
    """delta of the guarantee; much smaller than 1 / number of protected units"""
    reproducible: bool = False
    """draw noise and samples from the run's seed instead of a secret: for experiments, not private"""

    @pydantic.model_validator(mode="after")
    def _some_noise(self) -> Privacy:
        if self.sigma is None and self.epsilon is None:
            raise ValueError("give 'sigma', 'epsilon' or both")
        return self

    @property
    @abstractmethod
    def of_records(self) -> bool:
        """Whether single records of each silo are protected, not whole silos."""

    @property
    @abstractmethod
    def reads(self) -> frozenset[str]:
        """Figures of single silos that it reads."""

    @abstractmethod
    def conflicts(self, config: Config) -> str | None:
        """Why nothing sound can be said together with the rest of the configuration, in one line; None if it can."""

    @abstractmethod
    def suits(self, module: torch.nn.Module, found: Sequence[Entry], ids: Sequence[str], config: Config) -> None:
        """Raise ConfigError if the model or the members do not fit."""

    def tries(self, module: torch.nn.Module, loss: Loss, x: torch.Tensor, y: torch.Tensor) -> None:
        """Raise ConfigError if the model cannot be trained with it. `x`, `y`: a few samples; the module may change."""

    @property
    def bound(self) -> float:
        """Fixed upper bound of the norm of an update; infinite if there is none."""
        return math.inf

    @abstractmethod
    def under_masks(self, config: Config) -> str | None:
        """Why it does not go with `secure`, in one line; None if it does."""

    def spread(self, config: Config, num_silos: int) -> Spread | None:
        """The noise that silos add under masks; None: none."""
        return None

    def takes(self, source: Source) -> None:
        """Raise ConfigError if the account does not hold for such data."""

    @abstractmethod
    def uses(self, config: Config, num_train: Mapping[str, int]) -> dict[Use, int]:
        """The uses of a whole run, with sigma 1, given each silo's number of training samples."""

    @abstractmethod
    def sentence(self, config: Config) -> str:
        """Neighbouring relation, sampling, and who is trusted."""

    def loose(self, num_train: Mapping[str, int]) -> str | None:
        """Why `delta` promises little, given each silo's number of training samples, in one line; None if it does."""
        num, units = len(num_train), "silos"
        if self.of_records:
            num, units = max(num_train.values(), default=0), "records of a silo"
        if self.delta * num < 1:
            return None
        return (
            f"privacy.delta: {self.delta:g} is not below 1 / {num}, the number of {units}: to publish one of them at "
            "random would keep it; take much less"
        )

    def sigmas(self, config: Config, num_train: Mapping[str, int]) -> dict[str, float]:
        """The noise multiplier by silo whose records are protected; by '' where silos are."""
        planned = self.uses(config, num_train)
        if self.sigma is not None:
            return {use.silo: self.sigma for use in planned}
        assert self.epsilon is not None
        alike: dict[tuple[Use, int], float] = {}  # silos of the same size need the same noise
        found: dict[str, float] = {}
        for use, count in planned.items():
            key = use._replace(silo=""), count
            if key not in alike:
                alike[key] = sigma_for(self.epsilon, self.delta, [key])
            found[use.silo] = alike[key]
        return found
