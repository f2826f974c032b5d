"""The `exchange` section of a configuration, and which of its options exclude each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from fedmpi.codecs import CODECS, Codec, Identity
from fedmpi.components import PositiveFraction, PositiveInt, component
from fedmpi.errors import ConfigError
from fedmpi.exchange.base import Exchange, Machine
from fedmpi.exchange.plans import AUTO, MEASURE, PLANS

if TYPE_CHECKING:
    from fedmpi.config import Config


@component
class Channel:
    """How vectors are encoded in one direction."""

    codec: Annotated[Codec, CODECS] = Identity()
    """how a vector becomes bytes"""
    feedback: bool = False
    """error feedback: what the codec lost this round is added next round"""
    decay: PositiveFraction = 1.0
    """share of the residual that is kept for the next round"""

    @property
    def plain(self) -> bool:
        """Whether values are sent without a codec."""
        return isinstance(self.codec, Identity)

    @pydantic.model_validator(mode="after")
    def _fed_back(self) -> Channel:
        if self.feedback and self.plain:
            raise ValueError("feedback needs a codec that loses something; identity loses nothing")
        if not self.feedback and self.decay != 1.0:
            raise ValueError("decay needs feedback, which is off")
        if self.feedback:
            try:
                self.codec.damping(1 << 18)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self


@component
class Level:
    """One level of regions."""

    by: Literal["node"] | dict[str, list[str]] = "node"
    """node: ranks that share memory are one region; or a mapping, region: [hosts or silos]"""
    up: Channel = Channel()
    """up channel inside a region"""
    down: Channel = Channel()
    """down channel inside a region"""

    @pydantic.field_validator("by", mode="before")
    @classmethod
    def _named(cls, by: Any) -> Any:
        if by != "node" and not (isinstance(by, Mapping) and all(isinstance(some, list) for some in by.values())):
            raise ValueError(f"takes node or regions such as {{north: [host1, host2], south: [host3]}}, got {by!r}")
        return by

    @pydantic.model_validator(mode="after")
    def _once(self) -> Level:
        if isinstance(self.by, dict):
            members = [member for some in self.by.values() for member in some]
            if not members or len(set(members)) < len(members):
                raise ValueError("every host or silo belongs to one region of a level")
        if self.down.feedback:
            raise ValueError("down.feedback works only across regions, where the server's state is")
        return self


@component
class Regions:
    """Groups of ranks that aggregate inside first."""

    levels: Annotated[list[Level], pydantic.Field(min_length=1)] = pydantic.Field(default_factory=lambda: [Level()])
    """levels of regions, innermost first"""
    every: PositiveInt = 1
    """rounds between two exchanges across regions"""


@component
class ExchangeSection:
    """How updates cross ranks."""

    plan: Annotated[str, PLANS] = AUTO
    """the collectives to use; auto: chosen by placement and sizes; measure: the fastest in a test"""
    reduction: Literal["fast", "reproducible"] = "fast"
    """fast, or reproducible: the same bits for any number of ranks"""
    parameters: Annotated[str | list[str], pydantic.Field(union_mode="left_to_right")] = "all"
    """what is exchanged: all, trainable, all_but_batch_norm or patterns"""
    scope: Literal["rank", "silo"] = "rank"
    """rank: a rank's silos are folded into one sum; silo: each silo's delta is sent by itself"""
    up: Channel = Channel()
    """channel for the silos' deltas"""
    down: Channel = Channel()
    """channel for the server's step, sent back to all"""
    regions: Regions | None = None
    """groups that aggregate inside first; up, down and plan then apply across regions"""
    overlap: bool = False
    """overlap communication with the next round's training; updates arrive one round late"""
    fragments: PositiveInt = 1
    """parts of the shared parameters; each round exchanges one of them, in turn"""
    exact: tuple[str, ...] = ()
    """patterns of parameters that no codec touches; statistics are always exact"""
    verify: bool = False
    """compare the parameters' SHA-256 across ranks after every round"""

    @property
    def channels(self) -> list[Channel]:
        """The up and down channels of all levels."""
        ways: list[Level | ExchangeSection] = [self, *(self.regions.levels if self.regions is not None else ())]
        return [channel for way in ways for channel in (way.up, way.down)]

    @property
    def lossy(self) -> bool:
        """Whether any channel has a lossy codec."""
        return not all(channel.plain for channel in self.channels)

    @property
    def largest(self) -> float:
        """Bound on the magnitude of values that all codecs can encode, with room for the rounding of feedback."""
        return min(channel.codec.largest * (1 - 2**-10 * channel.feedback) for channel in self.channels)

    @property
    def goes_on(self) -> bool:
        """Whether silos continue from parameters of their own, because global ones arrive late or part by part."""
        return self.overlap or self.fragments > 1

    def at_a_time(self, num_elements: int) -> int:
        """The most elements that one round exchanges, for a vector of `num_elements`."""
        return -(-num_elements // self.fragments)

    @property
    def chosen(self) -> bool:
        """Whether the plan is chosen when the run starts."""
        return self.plan in (AUTO, MEASURE)

    @property
    def member(self) -> type[Exchange]:
        """The class of the named plan."""
        return PLANS.find(self.plan)

    @property
    def one_by_one(self) -> bool:
        """Whether an aggregator can see each silo's vector and not only their sum."""
        return self.scope == "silo" and (self.chosen or self.member.one_by_one)

    @property
    def candidates(self) -> list[str]:
        """Plans that support the rest of this section, on ranks of one node."""
        return [name for name, plan in PLANS.members.items() if not plan.supports(self, Machine())]

    def conflicts(self, config: Config) -> str | None:
        """The error if the run would end between two exchanges across regions; None if not."""
        if self.regions is not None and config.rounds % self.regions.every:
            return (
                f"rounds: after {config.rounds} the regions differ; take a multiple of exchange.regions.every, "
                f"{self.regions.every}"
            )
        return None

    @pydantic.model_validator(mode="after")
    def _fits(self) -> ExchangeSection:
        if isinstance(self.parameters, str) and self.parameters not in ("all", "trainable", "all_but_batch_norm"):
            words = "all, trainable, all_but_batch_norm or a list of patterns"
            raise ValueError(f"exchange.parameters is {words}, got '{self.parameters}'")
        if self.overlap and self.regions is not None:
            raise ValueError("overlap does not work with regions yet: only one exchange can run behind training")
        if self.fragments > 1 and self.regions is not None:
            raise ValueError("fragments do not work with regions: a region's parameters are exchanged whole")
        if not self.chosen and (why := self.member.supports(self, Machine())):
            raise ValueError(f"plan {self.plan} {why}; take {' or '.join(self.candidates)}")
        if self.regions is not None and (self.scope == "silo" or self.reduction == "reproducible"):
            raise ValueError("regions need scope: rank and reduction: fast, because each sums its silos' deltas")
        if self.reduction == "reproducible" and self.scope == "rank" and not (self.up.plain and self.down.plain):
            raise ValueError(
                "reduction: reproducible with a codec needs scope: silo, since what a rank's sum loses depends on ranks"
            )
        return self
