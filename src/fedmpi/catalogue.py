"""What `fedmpi list` prints: every family, its members, their fields with defaults and one line each; and sections."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap

from fedmpi.aggregate import AGGREGATORS
from fedmpi.codecs import CODECS
from fedmpi.components import Family, hints, nearest, section_of, to_dict
from fedmpi.config import Config
from fedmpi.data import DATASETS, PARTITIONS
from fedmpi.errors import ConfigError
from fedmpi.local import RULES
from fedmpi.local.amounts import AMOUNTS
from fedmpi.local.base import SAMPLERS, TORCH_OPTIMIZERS
from fedmpi.metrics import METRICS
from fedmpi.models import MODELS
from fedmpi.objectives import DEFAULTS, LOSSES, Objective
from fedmpi.schedules import SCHEDULES
from fedmpi.selection import SELECTORS
from fedmpi.server import OPTIMIZERS

# family -> where its members go in a configuration
FAMILIES: dict[str, tuple[Family, str]] = {
    "datasets": (DATASETS, "data"),
    "partitions": (PARTITIONS, "data.partition"),
    "models": (MODELS, "model"),
    "rules": (RULES, "local"),
    "optimizers": (TORCH_OPTIMIZERS, "local.optimizer"),
    "schedules": (SCHEDULES, "local.schedule"),
    "samplers": (SAMPLERS, "local.sampler"),
    "amounts": (AMOUNTS, "local.amount"),
    "selectors": (SELECTORS, "select"),
    "aggregators": (AGGREGATORS, "aggregate"),
    "metrics": (METRICS, "objective.metrics"),
    "servers": (OPTIMIZERS, "server.optimizer"),
    "codecs": (CODECS, "exchange.up.codec"),
}

# what has no name to choose by, only fields
SECTIONS: dict[str, type] = {key: cls for key, hint in hints(Config).items() if (cls := section_of(hint)) is not None}


def lines(family: str | None = None) -> list[str]:
    """The text, for all families, or for one family or section. Raises ConfigError for what is neither."""
    if family in SECTIONS:
        more = _objectives() if SECTIONS[family] is Objective else []
        return [family, *_nested(SECTIONS[family]), *more, ""]
    if family is not None and family not in FAMILIES:
        raise ConfigError(f"no family '{family}'{nearest(family, [*FAMILIES, *SECTIONS])}")
    text: list[str] = []
    if family is None:
        text += ["configuration", *_fields(Config), ""]
    for name, (members, key) in FAMILIES.items():
        if family not in (None, name):
            continue
        text.append(f"{name} ({key}: {{name: ...}})")
        for member, cls in members.members.items():
            known = dataclasses.is_dataclass(cls)
            ours = known or not cls.__module__.startswith("torch.")
            first = _doc(cls) if ours else f"torch.optim.{cls.__name__}"
            text.append(f"  {member}: {first}")
            text += [f"  {line}" for line in (_fields(cls) if known and family is not None else [])]
        text.append("")
    if family is None:
        text.append("`fedmpi list FAMILY` shows the fields of its members, `fedmpi list exchange` those of a section.")
    return text


def _objectives() -> list[str]:
    """The losses and metrics of each task, its own first."""
    text = []
    for task, (loss, metric) in DEFAULTS.items():
        losses = [name for name, tasks in LOSSES.items() if task in tasks]
        metrics = [name for name, cls in METRICS.members.items() if task in cls.tasks]  # type: ignore[attr-defined]
        text += ["", f"  task {task}"]
        for what, first, names in (("loss", loss, losses), ("metrics", METRICS.name_of(metric), metrics)):
            text.append(f"    {what}: {', '.join(sorted(names, key=lambda name: name != first))}")
    return text


def _nested(cls: type) -> list[str]:
    """The fields of a section, those of sections in it below them."""
    text = []
    for line, hint in zip(_fields(cls), hints(cls).values(), strict=True):
        text.append(line)
        if (inner := section_of(hint)) is not None:
            text += [f"  {one}" for one in _nested(inner)]
    return text


def _fields(cls: type) -> list[str]:
    text = []
    comments = _comments(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        known = hints(cls)[field.name]
        factory = getattr(field.default, "default_factory", None) or field.default_factory  # pydantic's or its own
        if factory is not dataclasses.MISSING:
            default = f" = {_short(to_dict(factory(), known))}"
        elif field.default is not dataclasses.MISSING:
            default = f" = {_short(to_dict(field.default, known), section_of(known) is not None)}"
        else:
            default = " (required)"
        comment = comments.get(field.name) or _doc(known)
        text.append(f"  {field.name}{default}" + (f"  # {comment}" if comment else ""))
    return text


def _short(value: object, whole: bool = False) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    if isinstance(value, dict):
        if "name" in value and not (whole and len(value) > 1):
            return str(value["name"])
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _doc(annotation: object) -> str:
    """The first sentence of a class's docstring, which has the paper."""
    if not inspect.isclass(annotation):
        return ""
    paragraph = (inspect.getdoc(annotation) or "").partition("\n\n")[0]
    return re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(paragraph.split()))[0]


def _comments(cls: type) -> dict[str, str]:
    """The comment behind each field, or right above it, in the class or those it is made from."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(part))
        except (OSError, TypeError):
            continue
        lines = source.splitlines()
        for statement in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                first, last = statement.lineno - 1, statement.end_lineno or statement.lineno
                above = first
                while lines[above - 1].strip().startswith("# "):
                    above -= 1
                behind = [line.partition("  # ")[2] for line in lines[first:last] if "  # " in line]
                said = behind or [line.strip().removeprefix("# ") for line in lines[above:first]]
                if said:
                    found[statement.target.id] = " ".join(said)
    return found
