"""What the server's job and the silos' jobs tell each other, as JSON values.

a silo registers    Registration: facts of its data, its view of the federation
notes/call          Call: the members, the round that the server collects, silos that it refuses, its end
the server's beat   under `engine: buffered`: which updates are decided, and the buffer
an update           the silo's row of the round's table, and its vector as payload
scores/             a silo's scores of a version
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedmpi.components import to_dict
from fedmpi.config import Config, flatten
from fedmpi.differences import OF_A_SITE, differences
from fedmpi.errors import ConfigError
from fedmpi.local import Order
from fedmpi.types import Task

Row = dict[str, float]


def told_row(row: Mapping[str, float]) -> dict[str, str]:
    """Numbers as text, since JSON knows no infinity.

    >>> read_row(told_row({"loss": float("inf"), "steps": 3.0}))
    {'loss': inf, 'steps': 3.0}
    """
    return {name: repr(float(value)) for name, value in row.items() if value}


def read_row(told: Mapping[str, str]) -> Row:
    """The numbers that `told_row` has told."""
    return {name: float(value) for name, value in told.items()}


def shown(config: Config) -> dict[str, Any]:
    """The configuration that all jobs share, as values by key, without what each site chooses for itself."""
    values = flatten(json.loads(json.dumps(to_dict(config))))
    apart = tuple(f"{key}." for key in OF_A_SITE)
    return {key: value for key, value in values.items() if not f"{key}.".startswith(apart)}


def unlike(theirs: Mapping[str, Any], config: Config) -> list[str]:
    """Values in which another job's configuration differs from this one's, as text."""
    changed, ours = differences(theirs, config), shown(config)
    for key in ("rounds", "transport.lease_s"):  # a run may change them, but for all of its jobs
        if theirs.get(key) != ours[key]:
            changed.append(f"{key} is {theirs.get(key)} there and {ours[key]} here")
    return [text for text in changed if not text.startswith(tuple(key + end for key in OF_A_SITE for end in " .["))]


def ends_alike(theirs: Mapping[str, Any], config: Config) -> bool:
    """Whether another job's configuration ends a run by the same metric as this one's."""

    def early(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key.startswith("stop.early")}

    return early(theirs) == early(shown(config))


def require_same(theirs: Mapping[str, Any], config: Config) -> None:
    """Raise ConfigError unless this job has the configuration of the server."""
    if changed := unlike(theirs, config):
        raise ConfigError(f"the server's job has another configuration: {'; '.join(changed[:3])}")


@dataclass(frozen=True)
class Registration:
    """What a silo's job says when it starts."""

    facts: list[float]  # numbers and checksums that identify its data (opening.py)
    known: list[str]  # ids of all silos, in the federation's order
    task: Task
    shape: list[int]
    num_classes: int
    config: dict[str, Any]
    begins: str  # SHA-256 of the model's first tensors
    host: str

    @property
    def same(self) -> str:
        """What all silos of a federation agree on, as text."""
        return repr((self.known, self.task, self.shape, self.num_classes))


@dataclass(frozen=True)
class Call:
    """The server's word to all silos."""

    config: dict[str, Any]
    begins: str
    epoch: int  # of the membership
    ids: list[str]  # the members
    facts: list[list[float]]
    round: int  # that it collects; 0: none
    cohort: list[str] = field(default_factory=list)
    factors: list[float] | None = None
    near: float = 1.0
    stands_for: float = 1.0
    updates: dict[str, Any] = field(default_factory=dict)  # the transforms' state, as `told_arrays`
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)  # by silo: incarnation of its job, and why
    over: str = ""  # why the server's job has ended with an error; empty: it has not
    orders: dict[str, list[Any]] = field(default_factory=dict)  # by silo: how much it does, as `told_order`
    final: int = -1  # version with which a metric has ended the run (stop.early); -1: it has not

    @classmethod
    def read(cls, head: Mapping[str, Any]) -> Call:
        """The call in a file's head; an earlier version has written fewer fields."""
        return cls(**{name: head[name] for name in cls.__dataclass_fields__ if name in head})


NO_CALL = Call({}, "", -1, [], [], 0)  # before the first one


def told_order(order: Order) -> list[Any]:
    """What a silo is told of how much to do.

    >>> read_order(told_order(Order(3, 0.5))), read_order(None)
    (Order(amount=3, scale=0.5, share=1.0, latest_s=inf), None)
    """
    return [*order[:-1], None if math.isinf(order.latest_s) else order.latest_s]


def read_order(told: Sequence[Any] | None) -> Order | None:
    """What `told_order` has told; None if nothing was."""
    if told is None:
        return None
    amount, scale, share, latest_s = told
    return Order(amount, scale, share, math.inf if latest_s is None else latest_s)


def told_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays of numbers as text, with their dtype."""
    return {
        name: {
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "values": [repr(v) for v in array.ravel().tolist()],
        }
        for name, array in arrays.items()
    }


def read_arrays(told: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays that `told_arrays` has told.

    >>> read_arrays(told_arrays({"norm": np.array([0.1, np.inf])}))
    {'norm': array([0.1, inf])}
    """
    return {
        name: np.array([_number(v) for v in one["values"]], dtype=one["dtype"]).reshape(one["shape"])
        for name, one in told.items()
    }


def _number(text: str) -> float | int:
    try:
        return int(text)
    except ValueError:
        return float(text)
