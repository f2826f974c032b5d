"""The plans, by name, in the order in which `plan: auto` asks whether one suits. One of your own is a subclass of
Exchange, `plan: "package.module:Class"`."""

from __future__ import annotations

from typing import Any

from fedmpi.components import Family, did_you_mean
from fedmpi.errors import ConfigError
from fedmpi.exchange.base import Exchange
from fedmpi.exchange.dense import Replicated, Root
from fedmpi.exchange.sharded import Sharded
from fedmpi.exchange.shared_memory import SharedMemory

AUTO, MEASURE = "auto", "measure"  # which plan it is turns out when the run starts
FORMERLY = {"window": "shared_memory"}  # names that configurations may still have


class Plans(Family):
    """Plans take no options: what a configuration says of them is their name."""

    members: dict[str, type[Exchange]]
    written = "..."

    def build(self, value: Any, path: str) -> Any:
        """The name as it is today, once it is one."""
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
