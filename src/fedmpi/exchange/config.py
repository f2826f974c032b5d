"""What a configuration says of the exchange, and what may not be said together."""

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
    """How vectors travel one way."""

    codec: Annotated[Codec, CODECS] = Identity()
    """how a vector becomes bytes"""
    feedback: bool = False
    """what the codec lost this round is added next round"""
    decay: PositiveFraction = 1.0
    """of what is kept for the next round"""

    @property
    def plain(self) -> bool:
        """Do the values themselves travel?"""
        return isinstance(self.codec, Identity)

    @pydantic.model_validator(mode="after")
    def _fed_back(self) -> Channel:
        if self.feedback and self.plain:
            raise ValueError("feedback needs a codec that loses something; identity loses nothing")
        if not self.feedback and self.decay != 1.0:
            raise ValueError("decay is that of feedback, which is off")
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
    """ranks that share memory, or region: [hosts or silos]"""
    up: Channel = Channel()
    """inside of a region"""
    down: Channel = Channel()
    """inside of a region"""

    @pydantic.field_validator("by", mode="before")
    @classmethod
    def _named(cls, by: Any) -> Any:
        if by != "node" and not (isinstance(by, Mapping) and all(isinstance(some, list) for some in by.values())):
            raise ValueError(f"node, or regions such as {{north: [host1, host2], south: [host3]}}, not {by!r}")
        return by

    @pydantic.model_validator(mode="after")
    def _once(self) -> Level:
        if isinstance(self.by, dict):
            members = [member for some in self.by.values() for member in some]
            if not members or len(set(members)) < len(members):
                raise ValueError("every host or silo belongs to one region of a level")
        if self.down.feedback:
            raise ValueError("down.feedback is for the exchange across regions, where the server's state is")
        return self


@component
class Regions:
    """Groups of ranks that aggregate inside first."""

    levels: Annotated[list[Level], pydantic.Field(min_length=1)] = pydantic.Field(default_factory=lambda: [Level()])
    """from the inside out"""
    every: PositiveInt = 1
    """rounds from one exchange across regions to the next"""


@component
class ExchangeSection:
    """How updates cross ranks."""

    plan: Annotated[str, PLANS] = AUTO
    """how ranks carry it out; auto: by placement and sizes; measure: the fastest"""
    reduction: Literal["fast", "reproducible"] = "fast"
    """reproducible: same bits for any number of ranks"""
    parameters: Annotated[str | list[str], pydantic.Field(union_mode="left_to_right")] = "all"
    """all, trainable, all_but_batch_norm or patterns"""
    scope: Literal["rank", "silo"] = "rank"
    """rank: a rank's silos are folded into one sum; silo: each by itself"""
    up: Channel = Channel()
    """deltas, to where they are added up"""
    down: Channel = Channel()
    """the server's step, back to all"""
    regions: Regions | None = None
    """groups that aggregate inside first; up, down and plan are then those across"""
    overlap: bool = False
    """the exchange runs behind the next round's training and arrives one round late"""
    fragments: PositiveInt = 1
    """parts of the shared parameters, of which one is exchanged each round, in turn"""
    exact: tuple[str, ...] = ()
    """patterns of what no codec touches, besides statistics, which none ever does"""
    verify: bool = False
    """compare the parameters' SHA-256 across ranks after every round"""

    @property
    def channels(self) -> list[Channel]:
        """Up and down, of all levels."""
        ways: list[Level | ExchangeSection] = [self, *(self.regions.levels if self.regions is not None else ())]
        return [channel for way in ways for channel in (way.up, way.down)]

    @property
    def lossy(self) -> bool:
        """Does a codec lose anything on any way?"""
        return not all(channel.plain for channel in self.channels)

    @property
    def largest(self) -> float:
        """Values have to be smaller for all codecs to hold them, and what feedback adds of a rounding."""
        return min(channel.codec.largest * (1 - 2**-10 * channel.feedback) for channel in self.channels)

    @property
    def goes_on(self) -> bool:
        """Do silos go on from parameters of their own, since the global ones arrive late or part by part?"""
        return self.overlap or self.fragments > 1

    def at_a_time(self, num_elements: int) -> int:
        """Elements that a round exchanges at most, of a vector of so many."""
        return -(-num_elements // self.fragments)

    @property
    def chosen(self) -> bool:
        """Does the plan turn out when the run starts?"""
        return self.plan in (AUTO, MEASURE)

    @property
    def member(self) -> type[Exchange]:
        """The plan that is named."""
        return PLANS.find(self.plan)

    @property
    def one_by_one(self) -> bool:
        """Do silos' vectors meet as they are, and not only their sum?"""
        return self.scope == "silo" and (self.chosen or self.member.one_by_one)

    @property
    def candidates(self) -> list[str]:
        """The plans that can carry out what else is said here, on ranks of one node."""
        return [name for name, plan in PLANS.members.items() if not plan.supports(self, Machine())]

    def conflicts(self, config: Config) -> str | None:
        """A run that would end between two exchanges across regions."""
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
            raise ValueError("overlap does not go with regions yet: what runs behind training is one exchange")
        if self.fragments > 1 and self.regions is not None:
            raise ValueError("fragments do not go with regions: a region's parameters are exchanged whole")
        if not self.chosen and (why := self.member.supports(self, Machine())):
            raise ValueError(f"plan {self.plan} {why}; take {' or '.join(self.candidates)}")
        if self.regions is not None and (self.scope == "silo" or self.reduction == "reproducible"):
            raise ValueError("regions fold what they hold: they go with scope: rank and reduction: fast")
        if self.reduction == "reproducible" and self.scope == "rank" and not (self.up.plain and self.down.plain):
            raise ValueError(
                "reduction: reproducible with a codec needs scope: silo, since what a rank's sum loses depends on ranks"
            )
        return self
