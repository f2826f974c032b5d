"""Source files of user code, which a configuration names as `package.module:name`: their contents and changes.

The files are the module's own and those that it imports, anywhere in the file, from the same folder or package. Of an
installed package only the module's file counts. Dynamic imports (importlib, exec) are not seen.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_NAME = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")
_INSTALLED = {"site-packages", "dist-packages"}


def deciding(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's plain values without what only gets records: a change of its code changes no figure."""
    records = {key: value for key, value in (values.get("records") or {}).items() if key != "sinks"}
    return {**values, "records": records, "callbacks": []}


def own_code(values: Any, *modules: str) -> dict[str, bytes]:
    """The contents of the files, by path relative to the folder of the module or package. Covers the names in a
    configuration's plain values, already imported, and the given `modules`."""
    named = {*modules, *(text.partition(":")[0] for text in _texts(values) if _NAME.fullmatch(text))}
    found: dict[str, Path] = {}
    for name in sorted(named):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is None or name.partition(".")[0] == "fedmpi":
            continue
        path = Path(file).resolve()
        root = path.parents[name.count(".") + (path.stem == "__init__")]
        for one in _reached(path, root):
            key = one.relative_to(root).as_posix()
            found[key if found.get(key, one) == one else f"{root.name}/{key}"] = one
    return {key: path.read_bytes() for key, path in sorted(found.items())}


def digests(code: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 hex digests by file."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in code.items()}


def changes(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """The files that differ, with "(new)" or "(gone)" if they are on one side only."""
    return [
        name if name in there and name in here else f"{name} (new)" if name in here else f"{name} (gone)"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


def changed(there: Mapping[str, str], values: Mapping[str, Any]) -> list[str]:
    """The files of a configuration's code that differ from the digests `there` and that may change figures."""
    here = digests(own_code(deciding(values)))
    only_outputs = own_code(values).keys() - here.keys()
    return changes({name: digest for name, digest in there.items() if name not in only_outputs}, here)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _texts(part)


def _reached(path: Path, root: Path) -> set[Path]:
    """The file and all files below `root` that it imports, directly or not."""
    if _INSTALLED.intersection(path.parts) or path.is_relative_to(Path(ast.__file__).resolve().parent):
        return {path}
    found, rest = {path}, [path]
    while rest:
        one = rest.pop()
        for other in _imports(one, root):
            if other not in found:
                found.add(other)
                rest.append(other)
    return found


def _imports(path: Path, root: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a binary module
        return
    folder = path.parent
    while folder != root and folder.is_relative_to(root):  # importing it runs its packages too
        yield from _module(folder)
        folder = folder.parent
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(root, alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1] if node.level else root
            before = node.module.split(".") if node.module else []
            names = [(base, [*before, alias.name]) for alias in node.names]
        else:
            continue
        for base, parts in names:
            for number in range(1, len(parts) + 1):
                yield from _module(base.joinpath(*parts[:number]))


def _module(place: Path) -> Iterator[Path]:
    """The file of a module or package, if it is there."""
    for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
        if file.is_file():
            yield file.resolve()
