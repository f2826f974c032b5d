"""What differs between two configurations of a run, and what may."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedmpi.components import build, to_dict, written
from fedmpi.config import Config, flatten
from fedmpi.exchange.plans import FORMERLY
from fedmpi.objectives import Objective
from fedmpi.yamlfile import ABOUT

# Keys that a resumed run may change: length, output, and machine.
MAY_CHANGE = (
    *("rounds", "checkpoint", "resume", "device", "comm", "out", "records", "stop", "data.root", "data.stream", "init"),
    *("callbacks", "admit", "on_failure", "transport.root", "transport.lease_s", "transport.poll_s"),
    *("transport.keep", "transport.min_silos"),
)

PLAN = "exchange.plan"

LOSS = "objective.loss"

HORIZON = ".schedule.rounds"  # suffix of keys that set a schedule's length; null: the run's rounds

# Keys that may differ between the ranks of one run: where a site keeps its files. For `init` and data, contents count.
OF_A_SITE = (
    *("out", "data.root", "data.stream", "device", "records.trace", "records.tensorboard", "records.sinks", "init"),
    *("transport.root", "transport.poll_s"),
)


def _without(keys: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in flatten(values).items() if not any(k == m or k.startswith(f"{m}.") for m in keys)}


def common(config: Config) -> dict[str, Any]:
    """What must be equal on all ranks of a run, by dotted keys."""
    return _without(OF_A_SITE, to_dict(config))


def digest(config: Config) -> bytes:
    """SHA-256 of what must be equal on all ranks of a run."""
    return hashlib.sha256(json.dumps(common(config), sort_keys=True).encode()).digest()


def differences(stored: Mapping[str, Any], config: Config, plan: str = "") -> list[str]:
    """Single values in which the stored configuration of a run differs from this one, as text, apart from `MAY_CHANGE`.

    `plan` is the plan that the run used; it is kept unless this configuration names another."""
    old = _without(MAY_CHANGE, {k: v for k, v in stored.items() if k != ABOUT})
    new = _without(MAY_CHANGE, to_dict(config))
    if (begun_with := plan or old.get(PLAN)) is not None:
        old[PLAN] = new[PLAN] if config.exchange.chosen else FORMERLY.get(begun_with, begun_with)
    if isinstance(named := old.get(LOSS), str):  # as earlier versions stored it
        del old[LOSS]
        stored_loss = {"objective": to_dict(build(Objective, {"loss": named}))}
        old |= {key: value for key, value in flatten(stored_loss).items() if key.startswith(f"{LOSS}.")}
    if old.get("disclose") == "silo" and config.disclose is None:  # as earlier versions stored it
        old["disclose"] = None
    for key in [k for k in new if k.endswith(HORIZON)]:
        if old.get(key) is None and new[key] in (None, stored.get("rounds")):  # unset, or set to the old end
            old.pop(key, None)
            del new[key]
    # Keys that an earlier version did not store had their defaults.
    defaults = flatten(to_dict(Config())) | dict(_defaults(config, to_dict(config), stored))
    old = {key: value for key, value in defaults.items() if key in new} | old
    keys = sorted(old.keys() | new.keys())
    return [text for key in keys for text in _leaves(key, old.get(key, _UNSET), new.get(key, _UNSET))]


def _defaults(part: Any, here: Any, stored: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The defaults of keys that the stored configuration lacks, in components that both have."""
    if not isinstance(here, Mapping) or not isinstance(stored, Mapping) or here.get("name") != stored.get("name"):
        return
    for field in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
        if field.name in stored:
            below = (getattr(part, field.name), here.get(field.name), stored[field.name])
            yield from _defaults(*below, f"{prefix}{field.name}.")
        elif field.default is None or isinstance(field.default, (bool, int, float, str, tuple)):
            yield f"{prefix}{field.name}", to_dict(field.default)


_UNSET = "not set"


def _leaves(key: str, there: Any, here: Any) -> Iterator[str]:
    """Text for each single value at or below a key that differs."""
    old, new = _parts(there), _parts(here)
    if (old or new) and (type(there) is type(here) or _UNSET in (there, here)):
        for part in old | new:
            yield from _leaves(key + part, old.get(part, _UNSET), new.get(part, _UNSET))
    elif there != here:
        yield f"{key} is {written(there)} there and {written(here)} here"


def _parts(value: Any) -> dict[str, Any]:
    """The values in a list or a mapping, by what their keys end in; none for anything else."""
    if isinstance(value, Mapping):
        return {f".{name}": part for name, part in value.items()}
    return {f"[{i}]": part for i, part in enumerate(value)} if isinstance(value, list) else {}


def moved_schedules(stored: Mapping[str, Any], config: Config) -> list[str]:
    """Schedules that end in another round than in the run directory, because `rounds` differs."""
    if stored.get("rounds") in (None, config.rounds):
        return []
    new = flatten(to_dict(config))
    return [key.removesuffix(".rounds") for key, rounds in new.items() if key.endswith(HORIZON) and rounds is None]
