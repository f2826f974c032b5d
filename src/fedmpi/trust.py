"""Limits the code that a run directory may import.

Its config.yaml may come from anybody, and reading a run directory must not run code that it names. Inside `confined`,
names outside fedmpi are imported only from files below the current folder (but not from the run directory or from
installed packages there), or from modules that the user allows. A model's factory is called only if it is known to
return a torch module.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import sys
import sysconfig
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmpi.errors import ConfigError

_DEPTH = 8  # nested calls of factories that are followed


@dataclass(frozen=True)
class _Limits:
    root: Path  # the run directory
    allowed: tuple[str, ...]  # modules that the user names

    def names(self, module: str) -> bool:
        return any(module == name or module.startswith(f"{name}.") for name in self.allowed)

    def trusts(self, file: str | None) -> bool:
        """Whether the file is fedmpi's, or below the current folder, not in the run directory and not installed."""
        if file is None:
            return False
        path, here = Path(file).resolve(), Path.cwd().resolve()
        if path.is_relative_to(Path(__file__).resolve().parent):
            return True
        installed = [Path(folder).resolve() for folder in sysconfig.get_paths().values()]
        installed = [folder for folder in installed if folder != here and not here.is_relative_to(folder)]
        return (
            path.is_relative_to(here)
            and not path.is_relative_to(self.root)
            and not {"site-packages", "dist-packages"}.intersection(path.parts)
            and not any(path.is_relative_to(folder) for folder in installed)
        )


_limits: ContextVar[_Limits | None] = ContextVar("limits", default=None)


@contextlib.contextmanager
def confined(root: Path | None, allowed: Sequence[str] = ()) -> Iterator[None]:
    """Apply the limits while names come from the run directory `root`. None: names come from the user's own
    configuration and are not limited. `allowed` are modules that the user allows."""
    token = _limits.set(None if root is None else _Limits(root.resolve(), tuple(allowed)))
    try:
        yield
    finally:
        _limits.reset(token)


def check_module(name: str, path: str) -> None:
    """Raise ConfigError unless the module of `package.module:attribute` may be imported. Imports nothing."""
    limits, module = _limits.get(), name.partition(":")[0]
    if limits is None or limits.names(module):
        return
    parts = module.split(".")
    for number in range(1, len(parts) + 1):
        part = ".".join(parts[:number])
        if limits.names(part):
            continue
        files = _files_of(part)
        if files is not None and not (files and all(limits.trusts(file) for file in files)):
            raise ConfigError(
                f"{path}: the run directory names '{name}', which is not below the current folder; if you trust it, "
                f"add --allow {parts[0]}"
            )


def check_object(found: Any, name: str, path: str) -> None:
    """Raise ConfigError unless the object found under a name is defined in a module that may be imported."""
    limits = _limits.get()
    if limits is None:
        return
    if inspect.isroutine(found) or isinstance(found, type):
        module = found.__module__ or ""
        file = getattr(getattr(found, "__code__", None), "co_filename", None) or _file_of(module)
        fine = limits.names(module) or limits.trusts(file)
    else:  # a value defined in the module
        fine = ":" in name and "." not in name.partition(":")[2] and not isinstance(found, types.ModuleType)
    if not fine:
        raise ConfigError(
            f"{path}: the run directory names '{name}', which another module defines; if you trust it, --allow that one"
        )


def check_factory(found: Any, name: str, path: str, what: str = "model") -> None:
    """Raise ConfigError unless the object is known to return a torch module when called. Factories of anything but a
    model need `allowed`."""
    limits = _limits.get()
    if limits is None or limits.names(name.partition(":")[0]) or (what == "model" and _returns_module(found, _DEPTH)):
        return
    if what != "model":
        module = name.partition(":")[0]
        raise ConfigError(f"{path}: the run directory names the {what} '{name}'; if you trust it, add --allow {module}")
    raise ConfigError(
        f"{path}: the run directory names '{name}', which is neither a torch module class nor a function annotated "
        f"`-> torch.nn.Module`; if you trust it, add --allow {name.partition(':')[0]}"
    )


def _files_of(module: str) -> Sequence[str | None] | None:
    """The files or folders of a module, without importing it; None if it does not exist."""
    if (loaded := sys.modules.get(module)) is not None:
        file = getattr(loaded, "__file__", None)
        return [file] if file is not None or not hasattr(loaded, "__path__") else list(loaded.__path__)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None:
        return None
    if spec.has_location:
        return [spec.origin]
    return list(spec.submodule_search_locations) if spec.submodule_search_locations else [None]


def _file_of(module: str) -> str | None:
    return getattr(sys.modules.get(module), "__file__", None)


def _returns_module(found: Any, depth: int) -> bool:
    """Whether it is a torch module class, or a function that returns a module by annotation or in every `return`."""
    from torch.nn import Module

    if isinstance(found, type):
        return issubclass(found, Module)
    if not isinstance(found, types.FunctionType) or not depth:
        return False
    with contextlib.suppress(Exception):  # an annotation may name anything
        said = typing.get_type_hints(found).get("return")
        if isinstance(said, type) and issubclass(said, Module):
            return True
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(found))).body[0]
    except (OSError, TypeError, SyntaxError):
        return False
    if not isinstance(tree, ast.FunctionDef):
        return False
    known = inspect.getclosurevars(found)
    names = {**known.globals, **known.nonlocals}
    given = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    returns = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    return bool(returns) and all(_is_module(value, names, given, depth) for value in returns)


def _is_module(value: ast.expr | None, names: dict[str, Any], given: dict[str, ast.expr], depth: int) -> bool:
    """Whether an expression evaluates to a torch module."""
    if not depth:
        return False
    if isinstance(value, ast.IfExp):
        return all(_is_module(part, names, given, depth - 1) for part in (value.body, value.orelse))
    if isinstance(value, ast.Name):
        return _is_module(given.get(value.id), names, given, depth - 1)
    if not isinstance(value, ast.Call):
        return False
    target: Any = value.func
    chain: list[str] = []
    while isinstance(target, ast.Attribute):
        chain.append(target.attr)
        target = target.value
    if not isinstance(target, ast.Name) or target.id in given or target.id not in names:
        return False
    made = names[target.id]
    for attribute in reversed(chain):
        made = getattr(made, attribute, None)
    return _returns_module(made, depth - 1)
