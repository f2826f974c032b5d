"""Privacy of whole silos: clipped updates, and noise on their mean (DP-FedAvg, McMahan et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import pydantic
import torch

from fedmpi.aggregate import Mean
from fedmpi.components import PositiveFloat, PositiveInt, called, component
from fedmpi.errors import ConfigError
from fedmpi.flat import Entry
from fedmpi.layout import DELTA
from fedmpi.privacy import masked
from fedmpi.privacy.account import Use
from fedmpi.privacy.base import Privacy
from fedmpi.privacy.noise import add_noise, secret_generator
from fedmpi.privacy.spending import Spending
from fedmpi.secure.ring import Spread
from fedmpi.selection import All
from fedmpi.selection.draws import Poisson, RoundRobin
from fedmpi.server import FedDyn, ReadsNorms
from fedmpi.transforms import About, State, Transform
from fedmpi.types import Contribution

if TYPE_CHECKING:
    from fedmpi.config import Config

SHAVED = 1 - 1e-6  # of the clip, so that rounding cannot lift a norm above it


@component
class SiloPrivacy(Privacy):
    """Silo-level differential privacy: each update is clipped to norm C, and the sum of the weighted updates gets
    Gaussian noise of standard deviation sigma C w before it is divided by a fixed number, the expected weight of a
    cohort (McMahan et al. 2018, Learning Differentially Private Recurrent Language Models, Algorithm 1, estimator f_f);
    w is the largest weight of a silo.

    With `select: poisson` sampling amplifies privacy; with `select: all` or `round_robin` it does not count on chance.
    With `bands` noise is correlated between rounds, so that a part of it cancels in the parameters (DP-FTRL, Kairouz et
    al. 2021; here the banded square root of Kalinin & Lampert 2024).

    With `secure` every silo adds a share of the noise before its masks, a discrete Gaussian in the integers of the sum
    (Kairouz, Liu & Steinke 2021), so nobody sees a sum with less noise (secure/noise.py).
    """

    clip: PositiveFloat
    """C; with a quantile, C of the first round"""
    quantile: Annotated[float, pydantic.Field(gt=0, lt=1)] | None = None
    """quantile of the updates' norms that C follows (Andrew et al. 2021, Algorithm 1), learned with noise"""
    clip_lr: PositiveFloat = 0.2
    """step size of log C, with a quantile"""
    count_sigma: PositiveFloat | None = None
    """standard deviation of the noise on the count of norms up to C; null: max(expected cohort / 20, 2 sigma)"""
    bands: PositiveInt = 1
    """rounds over which noise is correlated; at most silos / count of `select: round_robin`; 1: independent noise"""
    colluding: Annotated[int, pydantic.Field(ge=0)] = 1
    """with secure: silos that may know each other's noise, so that theirs does not count; at least as many as a rank
    hosts"""

    def conflicts(self, config: Config) -> str | None:
        who, exchange, select = "privacy: silo", config.exchange, config.select
        aggregate = config.aggregate
        if config.updates:
            return f"{who} clips and adds noise itself; leave out updates"
        if config.attack is not None:
            return f"{who} cannot be combined with attack"
        if type(aggregate) is not Mean:
            return f"{who} needs aggregate: mean; a clip does not bound a silo's influence on {called(aggregate)}"
        if aggregate.weights == "steps":
            return f"{who}: aggregate.weights: steps has no bound; take uniform"
        if aggregate.weights == "samples" and aggregate.max_samples is None:
            return (
                f"{who}: with weights by samples a silo of any size has any influence; give aggregate.max_samples, or "
                "take aggregate.weights: uniform"
            )
        if type(select) not in (All, Poisson, RoundRobin):
            return f"{who} needs select: all, poisson or round_robin; the account of {called(select)} is not known"
        if called(config.engine) != "synchronous" or called(config.policy) != "all":
            return f"{who} needs engine: synchronous with policy: all, where a silo's update has a known weight"
        if isinstance(config.server.optimizer, (ReadsNorms, FedDyn)):
            return f"{who}: server.optimizer {called(config.server.optimizer)} reads what carries no noise"
        if config.local.auxiliaries:
            return f"{who}: local: {called(config.local)} sends more than the clipped delta"
        if config.local.is_personal and config.local.server_step is not None:
            return f"{who}: local: {called(config.local)} needs its own server"
        if not exchange.up.plain:
            return f"{who}: exchange.up.codec {called(exchange.up.codec)} changes updates after the clip; take identity"
        if exchange.overlap or exchange.fragments > 1 or exchange.regions is not None:
            return f"{who} needs exchange without overlap, fragments and regions"
        if self.bands > 1 and type(select) is not RoundRobin:
            return f"{who}: bands above 1 need select: round_robin, where a silo's turns are known"
        if self.bands > 1 and self.quantile is not None:
            return f"{who}: bands above 1 need a fixed clip"
        if self.quantile is not None and self.sigma is not None:
            try:
                self.split(self.sigma, 1.0)
            except ConfigError as error:
                return str(error)
        return None

    def under_masks(self, config: Config) -> str | None:
        return masked.conflict(self, config)

    def spread(self, config: Config, num_silos: int) -> Spread:
        return masked.spread(self, config, num_silos)

    @property
    def bound(self) -> float:
        return self.clip if self.quantile is None else math.inf

    @property
    def of_records(self) -> bool:
        """Whole silos are."""
        return False

    @property
    def reads(self) -> frozenset[str]:
        """Figures of single silos that it reads."""
        return frozenset() if self.quantile is None else frozenset({"norm"})

    def suits(self, module: torch.nn.Module, found: Sequence[Entry], ids: Sequence[str], config: Config) -> None:
        statistics = [entry.name for entry in found if entry.kind == "shared" and entry.buffer]
        if statistics:
            raise ConfigError(
                f"privacy: silo: '{statistics[0]}' is a statistic, averaged in no bounded way; take "
                "exchange.parameters: all_but_batch_norm or trainable"
            )
        if self.bands > (apart := self._every(config, len(ids))):
            raise ConfigError(
                f"privacy.bands: {self.bands}, but with {len(ids)} silos and select.count {self._count(config)} a silo "
                f"takes part every {apart} rounds"
            )

    def _count(self, config: Config) -> int:
        return config.select.count if isinstance(config.select, RoundRobin) else 1

    def _every(self, config: Config, num_silos: int) -> int:
        """Rounds from one participation of a silo to the next, at least."""
        return max(1, num_silos // self._count(config)) if isinstance(config.select, RoundRobin) else 1

    def use(self, config: Config, num_silos: int, sigma: float, segment: str = "") -> Use:
        """One round of a run with so many silos."""
        rate = config.select.rate if isinstance(config.select, Poisson) else 1.0
        every = self._every(config, num_silos)
        return Use(sigma, rate, every, segment if every > 1 else "", discrete=config.secure is not None)

    def uses(self, config: Config, num_train: Mapping[str, int]) -> dict[Use, int]:
        return {self.use(config, len(num_train), 1.0): config.rounds}

    def sentence(self, config: Config) -> str:
        if isinstance(config.select, Poisson):
            sampling = f"each silo takes part with probability {config.select.rate:g}, and the draws stay secret"
        else:
            sampling = "no amplification by sampling"
        if config.secure is not None:
            return masked.sentence(self, config, sampling)
        return (
            "silo level: neighbours differ in one silo, which is left out of every sum and count (divisors, the number "
            f"of silos and their sizes are fixed and public); {sampling}; trusted are all ranks, the network and who "
            "reads the run directory, protected against are those who get the parameters"
        )

    # ------------------------------------------------------------ the sums

    def largest_weight(self, aggregate: Mean) -> float:
        """Upper bound of a silo's weight."""
        if isinstance(aggregate.weights, dict):
            return max(aggregate.weights.values())
        return float(aggregate.max_samples or 0) if aggregate.weights == "samples" else 1.0

    def part(self, config: Config, num_silos: int) -> float:
        """Expected share of the silos in a cohort."""
        if isinstance(config.select, Poisson):
            return config.select.rate
        return min(self._count(config), num_silos) / num_silos if isinstance(config.select, RoundRobin) else 1.0

    def split(self, sigma: float, expected: float) -> tuple[float, float]:
        """The noise multiplier of the sum of updates, and the standard deviation of the noise on the count, that
        together are one Gaussian mechanism of multiplier sigma (Andrew et al. 2021, Theorem 1). A silo adds 1/2 or -1/2
        to the count, and nothing if it is left out."""
        if self.quantile is None:
            return sigma, 0.0
        of_count = max(expected / 20, 2 * sigma) if self.count_sigma is None else self.count_sigma
        if 2 * of_count <= sigma:
            raise ConfigError(
                f"privacy.count_sigma: {of_count:g} is too small for sigma {sigma:g}; give more than half"
            )
        return (sigma**-2 - (2 * of_count) ** -2) ** -0.5, of_count


class Bounded(Transform):
    """Clips updates and adds the noise of a SiloPrivacy, with the round's secret of `spending`."""

    changes: ClassVar[bool] = True

    def __init__(self, section: SiloPrivacy, spending: Spending, in_words: bool = False) -> None:
        """`in_words`: silos add the noise to their words under masks, and nothing is added to the mean."""
        self.section, self.spending, self.in_words = section, spending, in_words

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        """The norms, if the clip follows them."""
        return self.section.reads

    def init(self) -> State:
        return {} if self.section.quantile is None else {"norm": np.array([self.section.clip])}

    def _clip(self, state: State) -> float:
        return float(state["norm"][0]) if state else self.section.clip

    def bound(self, state: State, before: float) -> float:
        return min(before, self._clip(state))

    def on_silo(self, update: Contribution, state: State, about: About) -> bool:
        delta_P = update[DELTA]
        if self.spending.empty:  # nobody was drawn, and this silo only stands in: its update counts as zero
            delta_P.zero_()
        for part in (*about.layout.still, *about.layout.averaged):
            delta_P[part] = 0.0  # gets no noise, so whatever moved a frozen parameter must not leave
        norm, largest = float(torch.linalg.vector_norm(delta_P, dtype=torch.float64)), self._clip(state) * SHAVED
        if norm > largest:
            delta_P.mul_(largest / norm)
        return True

    def on_mean(self, mean_S: torch.Tensor, start: int, share: float, state: State, about: About) -> None:
        """`share` is the largest weight that a silo may have / the weight in the mean."""
        if self.in_words:
            return
        spending = self.spending
        sigma, _ = self.section.split(spending.sigmas[""], spending.expected)
        scale = sigma * self._clip(state) * share
        bands = self.section.bands
        secret, step = (spending.segment, spending.step) if bands > 1 else (spending.secret, 0)
        add_noise(mean_S, start, scale, secret, about.layout, bands, step)

    def follow(self, norms_N: np.ndarray, state: State) -> State:
        quantile, spending = self.section.quantile, self.spending
        if quantile is None:
            return state
        clip, expected = self._clip(state), spending.expected
        below_N = norms_N[:0] if spending.empty else norms_N <= clip  # nan is not
        _, sigma = self.section.split(spending.sigmas[""], expected)
        count = float((below_N - 0.5).sum()) + sigma * secret_generator(spending.secret, "count").standard_normal()
        share = 0.5 + count / expected
        return {"norm": np.array([clip * math.exp(-self.section.clip_lr * (share - quantile))])}
