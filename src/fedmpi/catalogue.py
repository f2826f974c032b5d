"""The text of `fedmpi list`: every family, its members, their fields with defaults and descriptions; and sections."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import typing
from collections.abc import Iterator
from typing import Any, Literal

import pydantic

from fedmpi.aggregate import AGGREGATORS
from fedmpi.attacks import ATTACKS
from fedmpi.codecs import CODECS
from fedmpi.components import Family, did_you_mean, family_of, hints, section_of, to_dict
from fedmpi.config import Config
from fedmpi.data import DATASETS, PARTITIONS
from fedmpi.errors import ConfigError
from fedmpi.exchange.plans import PLANS
from fedmpi.local import RULES, RUNNERS
from fedmpi.local.optimizers import TORCH_OPTIMIZERS
from fedmpi.local.samplers import SAMPLERS
from fedmpi.local.workload import WORKLOADS
from fedmpi.losses import LOSSES
from fedmpi.metrics import METRICS
from fedmpi.models import MODELS
from fedmpi.objectives import DEFAULTS, Objective
from fedmpi.privacy import PRIVACIES
from fedmpi.records import MEASUREMENTS, SINKS
from fedmpi.rounds import CLOCKS, ENGINES, POLICIES, STALENESS, TIMES
from fedmpi.schedules import SCHEDULES
from fedmpi.secure.secagg import SECURE
from fedmpi.selection import SELECTORS
from fedmpi.server import OPTIMIZERS
from fedmpi.transforms import TRANSFORMS

# family -> where its members go in a configuration
FAMILIES: dict[str, tuple[Family, str]] = {
    "datasets": (DATASETS, "data"),
    "partitions": (PARTITIONS, "data.partition"),
    "models": (MODELS, "model"),
    "rules": (RULES, "local"),
    "optimizers": (TORCH_OPTIMIZERS, "local.optimizer"),
    "schedules": (SCHEDULES, "local.schedule"),
    "samplers": (SAMPLERS, "local.sampler"),
    "amounts": (WORKLOADS, "local.amount"),
    "runners": (RUNNERS, "runner"),
    "selectors": (SELECTORS, "select"),
    "transforms": (TRANSFORMS, "updates"),
    "secure": (SECURE, "secure"),
    "aggregators": (AGGREGATORS, "aggregate"),
    "privacy": (PRIVACIES, "privacy"),
    "attacks": (ATTACKS, "attack"),
    "losses": (LOSSES, "objective.loss"),
    "metrics": (METRICS, "objective.metrics"),
    "servers": (OPTIMIZERS, "server.optimizer"),
    "engines": (ENGINES, "engine"),
    "policies": (POLICIES, "engine.policy"),
    "staleness": (STALENESS, "engine.staleness"),
    "clocks": (CLOCKS, "engine.clock"),
    "times": (TIMES, "engine.clock.compute"),
    "measurements": (MEASUREMENTS, "records.measure"),
    "sinks": (SINKS, "records.sinks"),
    "codecs": (CODECS, "exchange.up.codec"),
    "plans": (PLANS, "exchange.plan"),
}


def lines(what: str | None = None) -> list[str]:
    """The text for all families, or for one family, one member, or a configuration key such as `exchange` or
    `local.optimizer`. Raises ConfigError for any other name."""
    if what is None:
        text = ["configuration", *_fields(Config), ""]
        for name in FAMILIES:
            text += [*_family(name, False), ""]
        return [
            *text,
            "`fedmpi list KEY` shows what stands there, with its fields: `fedmpi list local`, `fedmpi list exchange`.",
        ]
    if what in FAMILIES:
        return [*_family(what, True), ""]
    if found := _at(what):
        return [*found, ""]
    homes = [name for name, (family, _) in FAMILIES.items() if what in family.members]
    if not homes:
        members = [member for family, _ in FAMILIES.values() for member in family.members]
        keys = [*FAMILIES, *hints(Config)]
        close = did_you_mean(what, [*keys, *members])
        raise ConfigError(f"nothing is called '{what}'{close if 'did you mean' in close else did_you_mean(what, keys)}")
    return [line for name in homes for line in [*_family(name, True, what), ""]]


def _at(key: str) -> list[str]:
    """Text for a dotted configuration key; empty if there is no such key."""
    section: type = Config
    parts = key.split(".")
    for n, part in enumerate(parts):
        annotation = hints(section).get(part)
        if (family := family_of(annotation)) is not None:
            homes = [
                name
                for name, (known, home) in FAMILIES.items()
                if home == key or (known is family and not parts[n + 1 :])
            ]
            if homes or parts[n + 1 :]:
                return _family(homes[0], True) if homes else _in_members(family, ".".join(parts[n + 1 :]))
            return _field(section, part)
        if (inner := section_of(annotation)) is None:
            return _field(section, part) if annotation is not None and not parts[n + 1 :] else []
        section = inner
    return [key, *_nested(section), *(_objectives() if section is Objective else [])]


def _in_members(family: Family, name: str) -> list[str]:
    """A field, as each member that has it defines it."""
    having = {
        member: cls for member, cls in family.members.items() if dataclasses.is_dataclass(cls) and name in hints(cls)
    }
    for cls in having.values():
        if (inner := family_of(hints(cls)[name])) is not None:
            return next((_family(home, True) for home, (known, _) in FAMILIES.items() if known is inner), [])
    return [line for member, cls in having.items() for line in [f"{member}:", *_field(cls, name)]]


def _field(cls: type, name: str) -> list[str]:
    """One field, and its subfields if it is a section."""
    lines, names = _fields(cls), list(hints(cls))
    known = hints(cls)[name]
    inner = section_of(known) if family_of(known) is None else None
    return [lines[names.index(name)], *(f"  {line}" for line in (_nested(inner) if inner is not None else []))]


def _family(name: str, whole: bool, only: str | None = None) -> list[str]:
    """A family's members with one sentence each; with `whole`, also their fields."""
    family, key = FAMILIES[name]
    text = [f"{name} ({key}: {family.written})"]
    for member, cls in family.members.items():
        if only in (None, member):
            known = dataclasses.is_dataclass(cls)
            ours = known or not cls.__module__.startswith("torch.")
            text.append(f"  {member}: {_doc(cls) if ours else f'torch.optim.{cls.__name__}'}")
            text += [f"  {line}" for line in (_nested(cls) if known and whole else [])]
    return text


def _objectives() -> list[str]:
    """Losses and metrics of each task, the default first."""
    text = []
    for task, (loss, metric) in DEFAULTS.items():
        losses = [name for name, cls in LOSSES.members.items() if task in cls.tasks]  # type: ignore[attr-defined]
        metrics = [name for name, cls in METRICS.members.items() if task in cls.tasks]  # type: ignore[attr-defined]
        text += ["", f"  task {task}"]
        for what, first, names in (
            ("loss", LOSSES.name_of(loss), losses),
            ("metrics", METRICS.name_of(metric), metrics),
        ):
            text.append(f"    {what}: {', '.join(sorted(names, key=lambda name: name != first))}")
    return text


def _nested(cls: type) -> list[str]:
    """The fields of a section, with nested sections below."""
    return [line for name in hints(cls) for line in _field(cls, name)]


@functools.cache
def _fields(cls: type) -> list[str]:
    text = []
    described = descriptions(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        known = hints(cls)[field.name]
        factory = getattr(field.default, "default_factory", None) or field.default_factory  # pydantic's or its own
        if factory is not dataclasses.MISSING:
            default = f" = {_short(to_dict(factory(), known))}"
        elif field.default is not dataclasses.MISSING:
            default = f" = {_short(to_dict(field.default, known), section_of(known) is not None)}"
        else:
            default = " (required)"
        comment = described.get(field.name) or (_doc(known) if dataclasses.is_dataclass(known) else "")
        comment = " ".join(filter(None, (comment, _allowed(known, f"{default} {comment}"))))
        text.append(f"  {field.name}{default}" + (f"  # {comment}" if comment else ""))
    return text


def _allowed(annotation: Any, told: str) -> str:
    """The values that a field accepts, if they are few and `told` does not name them all."""
    if (family := family_of(annotation)) is not None:
        return next((f"(see: fedmpi list {name})" for name, (known, _) in FAMILIES.items() if known is family), "")
    values = [
        value for part in _parts(annotation) if typing.get_origin(part) is Literal for value in typing.get_args(part)
    ]
    if values:
        missing = [value for value in map(_short, values) if not re.search(rf"\b{re.escape(value)}\b", told)]
        return f"(one of: {', '.join(map(_short, values))})" if missing else ""
    bounds: dict[str, float] = {}
    for part in _parts(annotation):
        for extra in getattr(part, "__metadata__", ()):
            for bound in getattr(extra, "metadata", ()):
                bounds |= {name: getattr(bound, name) for name in ("gt", "ge", "lt", "le") if hasattr(bound, name)}
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    span = f"{low} to {high}"
    return f"({span})" if None not in (low, high) and span not in told else ""


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and all its parts, recursively."""
    yield annotation
    for part in typing.get_args(annotation):
        yield from _parts(part)


def _short(value: object, whole: bool = False) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    if isinstance(value, dict):
        if "name" in value and not (whole and len(value) > 1):
            return str(value["name"])
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    text = "null" if value is None else str(value)
    return text if re.fullmatch(r"[\w.:/*+-]+", text) else json.dumps(text)


def _doc(annotation: object) -> str:
    """The first sentence of a class's docstring, which cites the paper."""
    if not inspect.isclass(annotation):
        return ""
    paragraph = (inspect.getdoc(annotation) or "").partition("\n\n")[0]
    return re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(paragraph.split()))[0]


def descriptions(cls: type) -> dict[str, str]:
    """The docstrings below each field, of the class and its bases.

    pydantic reads them (`use_attribute_docstrings`) from a dataclass of the same name and module. `component` does not
    enable that: parsing the source of all members would add over 200 ms to every start. Empty without source.
    """
    config = pydantic.ConfigDict(use_attribute_docstrings=True)
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        names = vars(part).get("__dataclass_fields__", {}).keys() & vars(part).get("__annotations__", {}).keys()
        place = {"__module__": part.__module__, "__qualname__": part.__qualname__, "__pydantic_config__": config}
        twin = dataclasses.make_dataclass(part.__name__, [(name, Any) for name in names], namespace=place)
        fields = pydantic.TypeAdapter(twin).json_schema().get("properties", {})
        found |= {name: " ".join(said["description"].split()) for name, said in fields.items() if "description" in said}
    return found
