"""Users' functions that are called with every record.

    callbacks: ["mine:tell", {name: "mine:tell", limit: 0.5}]     tell(record, run, limit=0.5)

Rank 0 calls them one after the other, once a round is committed and its line is in metrics.jsonl, before the round's
checkpoint. The other ranks go on, and wait for rank 0 in their next collective.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fedmpi.components import Deferred, Family, did_you_mean, import_object
from fedmpi.errors import ConfigError
from fedmpi.records.record import Record
from fedmpi.records.sink import RunInfo, Sink
from fedmpi.trust import check_factory


class Callback(Sink):
    """Calls `function(record, run, **options)` with a copy of every record, and what a sink may know of its run."""

    def __init__(self, function: Callable[..., Any], name: str = "", options: Mapping[str, Any] = {}) -> None:
        self.function, self.options = function, dict(options)
        own = getattr(function, "__qualname__", type(function).__name__)
        self.name = name or f"{getattr(function, '__module__', '?')}:{own}"

    def open(self, run: RunInfo) -> None:
        self._run = run

    def write(self, record: Record) -> None:
        self.function(copy.deepcopy(record), self._run, **self.options)


class Called(Deferred):
    """A callback as a configuration names it."""

    def build(self, source: Any) -> Callback:
        """A sink that calls the function."""
        return Callback(self.target, self.name, self.arguments)


class _Callbacks(Family):
    """Functions of users: it has no other members."""

    def build(self, value: Any, path: str) -> Any:
        fields = dict(value) if isinstance(value, Mapping) else {"name": value}
        name = fields.pop("name", None)
        if callable(name) and not isinstance(value, Mapping):
            raise ConfigError(f"{path}: a configuration names functions; give this one to Run.add_callback")
        if not isinstance(name, str) or ":" not in name:
            raise ConfigError(f"{path}: {name!r} names no function; write it as 'module:function'")
        function = import_object(name, path)
        if isinstance(function, type) or not callable(function):
            raise ConfigError(f"{path}: '{name}' is no function; classes are for records.sinks")
        check_factory(function, name, path, self.what)
        return Called(name, function, fitting(function, fields, path, name))

    def _instance(self, value: Any) -> Any:
        return value if isinstance(value, Called) else self.build(value, "callbacks")


def fitting(function: Callable[..., Any], options: Mapping[str, Any], path: str, name: str) -> dict[str, Any]:
    """The options. Raises ConfigError if `function(record, run, **options)` does not fit its signature."""
    try:
        takes = inspect.signature(function)
    except (TypeError, ValueError):  # not known, as of some built-in functions
        return dict(options)
    if not any(one.kind is one.VAR_KEYWORD for one in takes.parameters.values()):
        for option in options:
            if option not in takes.parameters:
                known = [*takes.parameters][2:]
                raise ConfigError(f"{path}: '{name}' has no '{option}'{did_you_mean(option, known)}")
    try:
        takes.bind({}, None, **options)
    except TypeError as error:
        raise ConfigError(f"{path}: '{name}' is called with (record, run) and its options: {error}") from None
    return dict(options)


CALLBACKS = _Callbacks("callback", {})
