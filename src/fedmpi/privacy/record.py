"""Privacy of single records: each silo trains by DP-SGD on its own rank (Abadi et al. 2016)."""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedmpi import rng
from fedmpi.components import PositiveFloat, called, component
from fedmpi.errors import ConfigError
from fedmpi.flat import Entry
from fedmpi.local import Sgd
from fedmpi.local.base import LocalSilo
from fedmpi.local.base import Loss as LossOfBatch
from fedmpi.local.gradients import Batch
from fedmpi.local.workload import Whole
from fedmpi.losses import Loss
from fedmpi.privacy.account import Use
from fedmpi.privacy.base import Privacy
from fedmpi.privacy.noise import secret_generator
from fedmpi.privacy.per_sample import clipped_sum, fast, is_fast
from fedmpi.types import Source

if TYPE_CHECKING:
    from fedmpi.config import Config

SEEN = frozenset({"norm", "taken"})  # figures of single silos that follow from noised deltas alone


@component
class RecordPrivacy(Privacy):
    """Record-level differential privacy, per silo: local steps are DP-SGD (Abadi et al. 2016, Algorithm 1). Each step
    draws every sample with probability q = batch_size / n_k, clips each sample's gradient to norm C, adds Gaussian
    noise of standard deviation sigma C to the sum, and divides by batch_size.

    Deviations: `local.epochs` counts steps, ceil(n_k / batch_size) to an epoch. Without a batch_size every step takes
    all samples, and nothing is claimed for sampling. With `epsilon` alone each silo gets the least noise with which
    its own records stay within it.
    """

    clip: PositiveFloat
    """C, of the gradient of one sample"""

    @property
    def of_records(self) -> bool:
        """Records are."""
        return True

    @property
    def reads(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def conflicts(self, config: Config) -> str | None:
        who, local, select = "privacy: record", config.local, config.select
        if type(local) is not Sgd:
            return f"{who} needs local: sgd; {called(local)} reads samples in ways that are not counted"
        if type(local.amount) is not Whole:
            return f"{who} needs local.amount: whole; the steps of {called(local.amount)} are not known beforehand"
        if local.precision != "float32":
            return f"{who} needs local.precision: float32"
        if config.evaluate.finetune is not None:
            return f"{who}: evaluate.finetune trains without noise"
        loss = config.objective.loss
        if isinstance(loss, Loss) and loss.class_weights is not None:
            return f"{who}: class weights cancel in the loss of one sample; leave out objective.loss.weight"
        if config.attack is not None:
            return f"{who} cannot be combined with attack"
        if called(config.engine) != "synchronous" or called(config.policy) != "all":
            return f"{who} needs engine: synchronous with policy: all, where the steps of a round are known beforehand"
        if config.aggregate.start_loss:
            return f"{who}: aggregate: {called(config.aggregate)} sends the loss of the silo's samples"
        if select.reads is None or not select.reads <= SEEN:
            return f"{who}: select: {called(select)} reads losses, which carry no noise and are not told"
        return None

    def under_masks(self, config: Config) -> str | None:
        return "nobody has shown yet what it gives together with privacy of records; take one of the two"

    def suits(self, module: torch.nn.Module, found: Sequence[Entry], ids: Sequence[str], config: Config) -> None:
        for name, part in module.named_modules():
            if isinstance(part, torch.nn.modules.batchnorm._NormBase) and (
                part.track_running_stats or isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
            ):
                raise ConfigError(
                    f"privacy: record: '{name}' mixes samples or keeps their statistics; take group normalization"
                )

    def tries(self, module: torch.nn.Module, loss: LossOfBatch, x: torch.Tensor, y: torch.Tensor) -> None:
        """Refuses models of which gradients of single samples cannot be taken, such as those that write into their
        tensors: these would also hold samples without noise."""
        trained = [param for param in module.parameters() if param.requires_grad]
        module.train()
        if is_fast(module, trained):
            return
        buffers = dict(module.named_buffers())
        before = {name: buffer._version for name, buffer in buffers.items()}
        try:
            clipped_sum(module, trained, loss, x, y, self.clip)
        except Exception as error:
            with contextlib.suppress(Exception), torch.no_grad():
                module(x)
            why = " ".join(str(error).split())[:200]
            if names := [name for name, buffer in buffers.items() if buffer._version > before[name]]:
                why = f"its forward pass writes into '{names[0]}'; let it write into no tensor of the model"
            raise ConfigError(
                f"privacy: record takes gradients of single samples, and this model has none: {why}"
            ) from None

    def takes(self, source: Source) -> None:
        """Refuses preprocessing that is fitted to training rows: one record then changes the features of all."""
        if source.fitted:
            raise ConfigError(
                "privacy: record: the data's preprocessing is fitted to training rows, so one record changes all "
                "others and epsilon would not hold; fix it beforehand (heart_disease: normalise: fixed; files: "
                "no scale, no missing: mean)"
            )

    # ------------------------------------------------------------ steps

    def rate(self, config: Config, num_train: int) -> float:
        """Probability of a sample to be in a step."""
        size = self._rule(config).batch_size
        return 1.0 if size is None else min(1.0, size / num_train)

    def steps(self, config: Config, num_train: int) -> int:
        """Steps of a silo in a round."""
        rule = self._rule(config)
        if rule.steps is not None:
            return rule.steps
        return (rule.epochs or 1) * math.ceil(num_train / min(rule.batch_size or num_train, num_train))

    def _rule(self, config: Config) -> Sgd:
        assert isinstance(config.local, Sgd)
        return config.local

    def uses_of(
        self, config: Config, num_train: Mapping[str, int], sigmas: Mapping[str, float] | None = None
    ) -> dict[Use, int]:
        """What one round of these silos spends."""
        return {
            Use(1.0 if sigmas is None else sigmas[silo], self.rate(config, num), silo=silo): self.steps(config, num)
            for silo, num in num_train.items()
        }

    def uses(self, config: Config, num_train: Mapping[str, int]) -> dict[Use, int]:
        return {use: count * config.rounds for use, count in self.uses_of(config, num_train).items()}

    def sentence(self, config: Config) -> str:
        size = self._rule(config).batch_size
        sampling = "no amplification by sampling" if size is None else f"steps on Poisson samples of {size} on average"
        return (
            "record level, each silo by itself: neighbours differ in one training record of the silo, which is there "
            f"or counts as zero; {sampling}; trusted is the silo's own rank, protected against are all other ranks and "
            "those who get the parameters; not covered are the number of records of each silo, which ranks, files and "
            "weights tell, figures on test data, the checksum of a silo's data, and seconds"
        )


@dataclass(frozen=True)
class DpSgd:
    """The steps of one silo's round (local.base.Guard)."""

    clip: float
    sigma: float
    rate: float
    steps: int
    size: float  # divisor of the noised sum
    secret: str
    present_N: np.ndarray | None = None  # whether a row is there, for audits; None: all are

    @classmethod
    def of(cls, section: RecordPrivacy, config: Config, sigma: float, silo: str, num_train: int, number: int) -> DpSgd:
        """The steps of a silo in round `number`, with a new secret that stays on this rank."""
        secret = secrets.token_hex(16)
        if section.reproducible:
            secret = f"{rng.key(config.seed, purpose='privacy', round=number, silo=silo):016x}"
        rate = section.rate(config, num_train)
        return cls(section.clip, sigma, rate, section.steps(config, num_train), rate * num_train, secret)

    def batches(self, silo: LocalSilo) -> Iterator[Batch]:
        """The Poisson samples, which may be empty."""
        x, y = silo.data.x_train, silo.data.y_train
        for step in range(self.steps):
            draw = secret_generator(self.secret, "sample", step)
            taken_N = draw.random(len(x)) < self.rate
            if self.present_N is not None:
                taken_N &= self.present_N
            rows = torch.from_numpy(np.flatnonzero(taken_N)).to(x.device)
            yield x[rows], y[rows]

    def gradient(
        self, module: torch.nn.Module, trained: Sequence[torch.nn.Parameter], loss: LossOfBatch, batch: Batch, step: int
    ) -> None:
        """Set `.grad` of the trained parameters to the noised mean of clipped gradients."""
        x, y = batch
        sums = [torch.zeros_like(param) for param in trained]
        if len(x):
            way = fast if is_fast(module, trained) else clipped_sum
            sums = way(module, trained, loss, x, y, self.clip)
        draw = secret_generator(self.secret, "noise", step)
        for param, total in zip(trained, sums, strict=True):
            noise = torch.from_numpy(draw.standard_normal(total.numel(), dtype=np.float32)).to(total)
            param.grad = total.add_(noise.view_as(total), alpha=self.sigma * self.clip).div_(self.size)
