"""The option `secure` of a configuration, and what it does not go with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic

from fedmpi.components import Family, PositiveFloat, called, component
from fedmpi.errors import ConfigError
from fedmpi.layout import DELTA
from fedmpi.secure.graph import degree
from fedmpi.secure.ring import Ring
from fedmpi.transforms import Clip

if TYPE_CHECKING:
    from fedmpi.config import Config

UNCLIPPED = 2.0**18  # norm beyond which updates are rejected anyway


@component
class SecAgg:
    """Secure aggregation: silos' updates, weights and figures are summed under masks, and only sums are ever seen
    (Bonawitz et al. 2017, Practical Secure Aggregation for Privacy-Preserving Machine Learning; Bell et al. 2020).

    Updates become integers modulo 2^16, 2^32 or 2^64; masks between silos cancel inside the exchange's collective, or
    with transport: files are taken off the sum of the silos that stay, by messages (secure-files.md). Silos and server
    are trusted to follow the protocol, and see nothing of a single silo if they do. See privacy.md for what that
    covers. `disclose: pooled` is implied.
    """

    threshold: Annotated[int, pydantic.Field(ge=2)] | None = None
    """fewest silos in a sum; with fewer usable updates the round is given up; null: 2/3 of the smallest cohort,
    but at least 3 if it has so many"""
    bits: Literal[16, 32, 64] | None = None
    """of the integers; 32 needs `updates: clip` with a fixed norm; null: 32 with such a clip, else 64. 16 needs such a
    clip too, halves bytes and masks, and rounds coarsely: see `largest`"""
    largest: PositiveFloat | None = None
    """with bits: 16: coordinates of an update are cut to this magnitude, then rounded at random to multiples of at
    most largest / 4092; null: the clip's norm, which is too coarse for all but small models"""
    neighbours: Annotated[int, pydantic.Field(ge=2, multiple_of=2)] | None = None
    """silos with which each silo shares masks, an even number; null: all, or from about 60 silos on as many as keep
    honest silos connected with probability 1 - 2^-40 if a third is lost or corrupt"""

    def ring(self, config: Config, num_silos: int) -> Ring:
        """The ring for a federation. Raises ConfigError if bits are too few."""
        bound = clipped(config)
        bits = self.bits or (32 if bound < math.inf else 64)
        noise = None if config.privacy is None else config.privacy.spread(config, num_silos)
        span = self.largest or math.inf
        return Ring.of(bits, min(bound, UNCLIPPED), num_silos, config.exchange.fragments, noise, span)

    def fewest(self, config: Config, ids: Sequence[str]) -> int:
        """The threshold for a federation. Raises ConfigError if a cohort may be smaller."""
        least = config.select.least(ids, config.rounds)
        if self.threshold is not None and self.threshold > least:
            raise ConfigError(f"secure.threshold: {self.threshold}, and a cohort may be {least}")
        return self.threshold or max(2, min(3, least), math.ceil(2 * least / 3))

    def sparse(self, num_silos: int) -> str:
        """A warning if the chosen `neighbours` are fewer than null would give; else empty."""
        enough = degree(num_silos)
        if self.neighbours is None or self.neighbours >= enough:
            return ""
        return f"neighbours: {self.neighbours} are fewer than {enough}, with which honest silos stay connected (null)"

    def conflicts(self, config: Config) -> str | None:
        """Refuses what reads single updates, and what would reveal sums that differ by one silo."""
        section, who = config.exchange, "secure"
        if config.disclose not in (None, "pooled"):
            return f"{who}: only sums are told, and disclose: {config.disclose} asks for more; leave disclose out"
        if section.scope == "silo":
            return f"{who}: exchange.scope: silo sends each silo's update by itself; take rank"
        if config.aggregate.needs != "sum":
            name = called(config.aggregate)
            return f"{who}: aggregate {name} reads single updates, and only their sum is seen; take mean"
        if config.records.needs:
            return f"{who}: records.gram needs single updates, and only their sum is seen; leave it out"
        if config.privacy is not None and (why := config.privacy.under_masks(config)):
            return f"{who}: {why}"
        if config.attack is not None:
            return f"{who}: attack edits single updates, and only their sum is seen; leave it out"
        if section.lossy:
            return f"{who}: a codec's payloads do not add up under masks; take exchange.up and down without codecs"
        if section.regions is not None:
            return f"{who}: exchange.regions unmasks each region's mean for the rank that leads it; leave it out"
        if section.plan == "measure":
            return f"{who}: exchange.plan: measure times plans without masks; name a plan, or take auto"
        if not section.chosen and not section.member.masks_itself():
            return f"{who}: exchange.plan: {section.plan} does not sum under masks; take replicated, sharded or root"
        if config.engine.arrivals:
            return f"{who}: engine: buffered brings updates to rank 0 one by one; take engine: synchronous"
        if config.policy.posts and not config.transport.apart:
            return (
                f"{who}: a round repeated after engine.policy: deadline may close with other silos, and two sums that "
                "differ by one silo show its update; take policy: all"
            )
        if config.on_failure == "continue":
            return (
                f"{who}: on_failure: continue repeats a round without the lost silos, and two sums that differ by one "
                "silo show its update; take adopt or stop"
            )
        if config.adopts and (config.local.kept_vectors or section.fragments > 1):
            return f"{who}: on_failure: {config.on_failure} copies vectors that silos keep to other ranks; take stop"
        if config.admit == "any":
            return (
                f"{who}: admit: any changes the members, and two sums that differ by one silo show its update; take "
                "configured"
            )
        if config.device.name == "cuda":
            return f"{who}: masks are made in host memory; take device.name: cpu"
        bound = clipped(config)
        if self.largest is not None and self.bits != 16:
            return f"{who}.largest: goes with bits: 16; updates: clip bounds what other bits hold"
        if self.bits == 16 and config.privacy is not None:
            return f"{who}.bits: 16 rounds at random, and privacy accounts for rounding to the nearest; take bits: 64"
        if self.bits == 16 and section.fragments > 1:
            return f"{who}.bits: 16 cuts the progress of one round; take exchange.fragments: 1, or bits: 32"
        if self.bits == 16 and config.local.auxiliaries:
            return f"{who}.bits: 16 would cut {', '.join(_vectors(config)[1:])} like updates; take bits: 32"
        if self.bits in (16, 32) and bound == math.inf:
            names = ", ".join(_vectors(config))
            needs = f"`updates: clip` with a fixed norm for {names}, after all noise"
            return f"{who}.bits: {self.bits} needs {needs}; or take 64"
        return None


def clipped(config: Config) -> float:
    """Upper bound of the norms of all vectors that a silo sends, from fixed clips; infinite if one has none."""
    bounds = dict.fromkeys(_vectors(config), math.inf)
    if config.privacy is not None:
        bounds[DELTA] = config.privacy.bound
    for transform in config.updates:
        bounds[DELTA] = transform.bound(transform.init(), bounds[DELTA])
        if isinstance(transform, Clip) and transform.quantile is None:
            bounds |= {name: min(bounds[name], transform.norm) for name in transform.vectors if name in bounds}
    return max(bounds.values())


def _vectors(config: Config) -> list[str]:
    return [DELTA, *(auxiliary.name for auxiliary in config.local.auxiliaries)]


SECURE = Family("secure aggregation", {"secagg": SecAgg}, outside=False)
