"""The plans, by name, in the order in which `plan: auto` tries them.

Your own plan is a subclass of Exchange: `plan: "package.module:Class"`.
"""

from __future__ import annotations

from typing import Any

from fedmpi.components import Family, did_you_mean
from fedmpi.errors import ConfigError
from fedmpi.exchange.base import Exchange
from fedmpi.exchange.dense import Replicated, Root
from fedmpi.exchange.sharded import Sharded
from fedmpi.exchange.shared_memory import SharedMemory

AUTO, MEASURE = "auto", "measure"  # the run's start decides which plan
FORMERLY = {"window": "shared_memory"}  # old names in configurations


class Plans(Family):
    """The family of plans. Plans take no options: a configuration gives only a name."""

    members: dict[str, type[Exchange]]
    written = "..."

    def build(self, value: Any, path: str) -> Any:
        """The plan's current name. Raises ConfigError if there is no such plan."""
        if not isinstance(value, str):
            raise ConfigError(f"{path}: {value!r} is no plan; one of: {', '.join((AUTO, MEASURE, *self.members))}")
        if value not in (AUTO, MEASURE):
            value = FORMERLY.get(value, value)
            self.find(value, path)
        return value

    def find(self, name: str, path: str = "exchange.plan") -> type[Exchange]:
        if name not in self.members and ":" not in name:
            known = (AUTO, MEASURE, *self.members)
            raise ConfigError(f"{path}: no plan '{name}'{did_you_mean(name, known)}")
        found = super().find(name, path)
        if not (isinstance(found, type) and issubclass(found, Exchange)):
            raise ConfigError(
                f"{path}: '{name}' is no subclass of fedmpi.exchange.base.Exchange, so it cannot be a plan"
            )
        return found


PLANS = Plans(
    "plan", {"replicated": Replicated, "shared_memory": SharedMemory, "sharded": Sharded, "root": Root}, Exchange
)
