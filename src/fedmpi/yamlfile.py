"""Reads the YAML of configurations: plain values, the line of each key, and environment variables in values.

    out: ${SCRATCH}/runs/heart          # text
    seed: ${SLURM_ARRAY_TASK_ID}        # a number, as if the file had it
    local: {name: sgd, lr: ${LR}}       # also inside braces
    note: $${not a variable}            # the text ${not a variable}

A variable stands for one value or a part of it, never for keys, lists or several values. A variable that is not set, or
is empty, is an error. The config.yaml of a run directory holds values, so nothing is expanded in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fedmpi.errors import ConfigError

ABOUT = "about"  # key of a run's own config.yaml that describes the run; ignored when the file is read as configuration

_VARIABLE = re.compile(r"(?<!\$)\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
# While YAML is parsed, one private character stands for each bracket, because YAML gives braces a meaning of its own.
_OPEN, _CLOSE, _LITERAL = "\ue0f0", "\ue0f1", "\ue0f2"
_MARKED = re.compile(f"{_OPEN}([A-Za-z0-9_]*){_CLOSE}|{_LITERAL}")
_DECIMAL = re.compile(r"[-+]?(0|[1-9]\d*|(\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+)")


class _Loader(yaml.SafeLoader):
    """YAML as users write it: 1e-3 is a number (YAML 1.1 requires 1.0e-3), 2026-01-02 is text and not a date, and `no`
    is text and not a boolean."""


_OTHERWISE = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:bool")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_TEXT = "tag:yaml.org,2002:str"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in some if tag not in _OTHERWISE]
    for first, some in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^([Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The values in a YAML file, and the origin of each dotted key: "FILE:LINE", and the variables in it. Raises a
    one-line ConfigError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        node = yaml.compose(_mark(text), Loader=_Loader)
        if isinstance(node, yaml.MappingNode) and any(key.value == ABOUT for key, _ in node.value):
            node, variables = yaml.compose(text, Loader=_Loader), {}
        else:
            variables = _expand(node, str(path), lines=True)
        values = _construct(node)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{at}: not YAML: {_unmark(str(getattr(error, 'problem', error)))}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, such as `rounds: 20`")
    for key, first, second in _twice(node):
        raise ConfigError(f"{path}:{second}: '{key}' appears twice, first in line {first}")
    origins = {key: f"{path}:{line}{_told(variables, value)}" for key, line, value in _lines(node)}
    return values, origins


def parse(key: str, text: str) -> tuple[Any, str]:
    """The value of an override, and its origin. Raises a one-line ConfigError."""
    try:
        node = yaml.compose(_mark(text), Loader=_Loader)
        variables = _expand(node, key, lines=False)
        return _construct(node), f"command line{_told(variables, node)}"
    except yaml.YAMLError:
        raise ConfigError(f"{key}: cannot read {text!r} as a value") from None


def variables_in(origin: str) -> list[str]:
    """The variables that an origin names.

    >>> variables_in("a.yaml:3 (${SCRATCH}, ${USER})")
    ['SCRATCH', 'USER']
    """
    return _VARIABLE.findall(origin)


def _mark(text: str) -> str:
    return _VARIABLE.sub(rf"{_OPEN}\1{_CLOSE}", text).replace("$${", _LITERAL)


def _unmark(text: str) -> str:
    return text.replace(_OPEN, "${").replace(_CLOSE, "}").replace(_LITERAL, "$${")


def _construct(node: Any) -> Any:
    loader = _Loader("")
    try:
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _expand(root: Any, where: str, lines: bool) -> dict[int, list[str]]:
    """Expand the variables of all values, in place. Returns the names in each scalar, by the node's id."""
    used: dict[int, list[str]] = {}
    unset: list[str] = []
    known: set[int] = set()

    def at(node: yaml.Node) -> str:
        return f"{where}:{node.start_mark.line + 1}" if lines else where

    def scalar(node: yaml.ScalarNode) -> None:
        if "${" in node.value:
            wrong = node.value[node.value.index("${") :].partition("}")
            raise ConfigError(
                f"{at(node)}: '{wrong[0]}{wrong[1]}' names no variable: write ${{NAME}}, or $${{ for the text ${{"
            )
        names = [name for name in _names(node.value) if name]
        unset.extend(f"{name} ({at(node)})" for name in names if not os.environ.get(name))
        used[id(node)] = names
        node.value = _MARKED.sub(lambda m: os.environ.get(m[1], "") if m[1] else "${", node.value)
        if names and node.style is None:  # a plain scalar: its kind is that of the expanded text
            resolve: Any = _Loader("").resolve
            tag = resolve(yaml.ScalarNode, node.value, (True, False))
            # Text with leading zeros, as in 0012, is no octal number, and 1:30 no number of seconds.
            node.tag = _TEXT if tag in _NUMBERS and not _DECIMAL.fullmatch(node.value) else tag

    def walk(node: Any) -> None:
        if id(node) in known:
            return  # an alias
        known.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            scalar(node)
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and _MARKED.search(key.value):
                    raise ConfigError(f"{at(key)}: '{_unmark(key.value)}' is a key; variables are expanded in values")
                walk(value)
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                walk(value)

    walk(root)
    if unset:
        kinds = "is" if len(unset) == 1 else "are"
        raise ConfigError(
            f"environment variable{'s' if len(unset) > 1 else ''} {', '.join(dict.fromkeys(unset))} {kinds} not set "
            "or empty; under mpirun export them to all hosts (Open MPI: -x NAME)"
        )
    return used


def _names(text: str) -> list[str]:
    return [match[1] or "" for match in _MARKED.finditer(text)]


def _told(variables: dict[int, list[str]], node: Any) -> str:
    """The variables in a value, for its origin."""
    names = dict.fromkeys(name for scalar in _scalars(node) for name in variables.get(id(scalar), ()))
    return f" ({', '.join(f'${{{name}}}' for name in names)})" if names else ""


def _scalars(node: Any) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _scalars(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _scalars(value)


def _twice(node: Any) -> Iterator[tuple[str, int, int]]:
    """Duplicate keys of a mapping with their two lines; YAML itself would silently use the last."""
    known: dict[str, int] = {}
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        if isinstance(node, yaml.MappingNode):
            key, part = part
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in known:
                yield key.value, known[key.value], line
            known[str(key.value)] = line
        yield from _twice(part)


def _lines(node: Any, prefix: str = "") -> Iterator[tuple[str, int, Any]]:
    """Each dotted key with its line and its value's node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1, value
            yield from _lines(value, f"{name}.")
