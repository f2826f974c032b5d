"""Components: an algorithm is a frozen dataclass; its fields are hyper-parameters, validated on construction.

A `Family` maps the names of its members to their classes. It stands at the bottom of the family's file:

    SELECTORS = Family("selector", {"all": All, "uniform": Uniform})

A field that takes a member of a family is annotated `Annotated[Selector, SELECTORS]`. In YAML it is a mapping with a
`name` (or just the name): `select: {name: uniform, fraction: 0.5}`. Users name their own classes as
`name: "package.module:Class"`. `build` turns such mappings into components, and suggests the nearest key for an unknown
one.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
from pydantic_core import core_schema

from fedmpi.errors import ConfigError, in_one_line
from fedmpi.trust import check_factory, check_module, check_object

T = TypeVar("T")

# Types of fields.
PositiveFloat = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]
PositiveFraction = Annotated[float, pydantic.Field(gt=0, le=1)]
Decay = Annotated[float, pydantic.Field(ge=0, lt=1)]
PositiveInt = Annotated[int, pydantic.Field(gt=0)]
NonNegativeInt = Annotated[int, pydantic.Field(ge=0)]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def component(cls: type[T]) -> type[T]:
    """Makes the class a frozen pydantic dataclass: fields are validated, keyword-only, and unknown ones are refused.

    The docstring below a field is its description, which `fedmpi list` shows (catalogue.descriptions).
    """
    config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True, coerce_numbers_to_str=True)
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)
    return typing.cast(type[T], made)


_FAMILIES: list[Family] = []


class Family:
    """The members of one kind of component, by name."""

    written = "{name: ...}"  # how a configuration names a member

    def __init__(
        self,
        what: str,
        members: Mapping[str, type],
        protocol: type | None = None,
        outside: bool = True,
        deferred: bool = False,
        defaults: bool = False,
        implied: str | None = None,
    ) -> None:
        self.what = what
        self.members = dict(members)
        self.protocol = protocol  # every member must have its methods
        self.outside = outside  # whether users may bring their own as "package.module:Class"
        self.deferred = deferred  # whether a member may be any callable, called when it is needed
        self.defaults = defaults  # whether missing methods, except abstract ones, are taken from the protocol
        self.implied = implied  # the member that keys without a name belong to, if it has them all
        _FAMILIES.append(self)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._instance)

    def _instance(self, value: Any) -> Any:
        if isinstance(value, (str, Mapping)):
            return self.build(value, self.what)
        self._complete(type(value))
        return value

    def _complete(self, cls: type) -> None:
        """Adds the family's default methods to a user's class, which need not inherit from the base class."""
        for base in (self.protocol or object).__mro__[:-1] if self.defaults else ():
            for name, default in vars(base).items():
                if not (name.startswith("_") or hasattr(cls, name) or name in self._methods()):
                    setattr(cls, name, default)

    def find(self, name: str, path: str) -> type:
        """The class called `name`. Raises ConfigError that suggests the nearest name."""
        if name in self.members:
            return self.members[name]
        if self.outside and ":" in name:
            found: type = import_object(name, path)
            return found
        close = did_you_mean(name, self.members)
        if self.outside and "." in name and "did you mean" not in close:
            module, _, attribute = name.rpartition(".")
            close = f"; write your own as '{module}:{attribute}'"
        raise ConfigError(f"{path}: no {self.what} '{name}'{close}")

    def build(self, value: Any, path: str) -> Any:
        """The member for a name, or for a mapping with a `name`. Raises ConfigError."""
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping):
            return value if not isinstance(value, (int, float, list, type(None))) else self._no(value, path)
        rest = dict(value)
        name = rest.pop("name", None)
        if name is None and self.implied is not None and rest and self._has(self.members[self.implied], rest):
            name = self.implied
        if not isinstance(name, str):
            beside = f" beside {', '.join(map(str, rest))}" if rest else ""
            fitting = [one for one, cls in self.members.items() if self._has(cls, rest)] or self.members
            raise ConfigError(f"{path}: needs a 'name'{beside}, one of: {', '.join(fitting)}")
        found = self.find(name, path)
        made = dataclasses.is_dataclass(found)
        if made:
            self._complete(found)
        if made or (self.deferred and isinstance(found, type)):
            missing = [m for m in self._methods() if not hasattr(found, m)]
        else:
            missing = []
        if missing:
            raise ConfigError(f"{path}: '{name}' has no {', '.join(missing)}, so it cannot be a {self.what}")
        if made:
            return build(found, rest, path, f"{self.what} '{name}'")
        if self.deferred and callable(found):
            if name not in self.members:
                check_factory(found, name, path, self.what)
            return Deferred(name, found, _fitting(found, rest, path))
        raise ConfigError(f"{path}: '{name}' is not a dataclass, so it cannot be a {self.what}")

    @staticmethod
    def _has(cls: Any, keys: Mapping[str, Any]) -> bool:
        """Whether these are fields of a component."""
        return isinstance(cls, type) and dataclasses.is_dataclass(cls) and set(keys) <= set(hints(cls))

    def _methods(self) -> list[str]:
        """Names of the methods that a member must have."""
        if self.defaults:
            return [n for n, m in vars(self.protocol).items() if getattr(m, "__isabstractmethod__", False)]
        kinds = (types.FunctionType, property)
        return [n for n, m in vars(self.protocol or object).items() if isinstance(m, kinds) and not n.startswith("_")]

    def _no(self, value: Any, path: str) -> Any:
        raise ConfigError(f"{path}: {value!r} is not a valid {self.what}; one of: {', '.join(self.members)}")

    def name_of(self, member: Any) -> str:
        """The `name` that a configuration uses for this member."""
        if isinstance(member, Deferred):
            return member.name
        own = f"{type(member).__module__}:{type(member).__qualname__}"
        return next((name for name, cls in self.members.items() if type(member) is cls), own)


def called(member: Any) -> str:
    """The name that a configuration uses for this component, whatever its family."""
    home = next((family for family in _FAMILIES if type(member) in family.members.values()), _FAMILIES[0])
    return home.name_of(member)


def family_of(annotation: Any) -> Family | None:
    """The family named in `Annotated[..., FAMILY]`, if any."""
    for extra in getattr(annotation, "__metadata__", ()):
        if isinstance(extra, Family):
            return extra
    for part in typing.get_args(annotation):
        if (found := family_of(part)) is not None:
            return found
    return None


def section_of(annotation: Any) -> type | None:
    """The component class in an annotation: alone, optional, or as the element of a list; None if there is none."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    for part in typing.get_args(annotation):
        if (found := section_of(part)) is not None:
            return found
    return None


def hints(cls: type) -> dict[str, Any]:
    """A component's fields and annotations, in order of definition."""
    return dict(_hints(cls))


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    known = typing.get_type_hints(cls, include_extras=True)
    return {f.name: known[f.name] for f in dataclasses.fields(cls) if f.init}


def build(cls: type[T], values: Mapping[str, Any], path: str = "", what: str = "configuration") -> T:
    """Builds a component from a mapping. Raises a one-line ConfigError that names the key.

    For an unknown key it suggests the nearest one, or gives the class's note from `MOVED` if the key was moved."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or what}: expected keys and values, got {values!r}")
    where = f"{path}: " if path else ""
    known = hints(cls)
    for name in values:
        if name not in known:
            moved = getattr(cls, "MOVED", {}).get(name)  # getattr: components have no common base class
            hint = f"; {moved}" if moved else _nearest_key(str(name), known, values[name])
            raise ConfigError(f"{where}{what} has no '{name}'{hint}")
    ready: dict[str, Any] = {}
    for name, value in values.items():
        here = f"{path}.{name}" if path else str(name)
        family, section = family_of(known[name]), section_of(known[name])
        if family is not None and not (value is None and type(None) in typing.get_args(known[name])):
            if _is_list(known[name]):
                many = value if isinstance(value, (list, tuple)) else [value]
                value = [family.build(one, f"{here}.{i}") for i, one in enumerate(many)]
            else:
                value = family.build(value, here)
        elif section is not None and not (isinstance(value, str) and str in typing.get_args(known[name])):
            value = _in_section(section, _is_list(known[name]), value, here, name)
        ready[name] = value
    try:
        return pydantic.TypeAdapter(cls).validate_python(ready)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in ([path] if path else []) + list(first["loc"]))
        if first["type"] in ("missing", "missing_keyword_only_argument", "missing_argument"):
            raise ConfigError(f"{at}: {what} needs it") from None
        message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        message = _EXPECTED.get(first["type"], message)
        got = "" if first["type"] in ("value_error", "assertion_error") else f", got {first['input']!r}"
        where = f"{at}: " if at else ""
        raise ConfigError(f"{where}{message[:1].lower()}{message[1:]}{got}") from None


# What pydantic's types of errors mean to a user; its own text stands for the others.
_EXPECTED = dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "a whole number is needed")
_EXPECTED |= dict.fromkeys(("float_type", "float_parsing"), "a number is needed")
_EXPECTED |= dict.fromkeys(("bool_type", "bool_parsing"), "true or false is needed")
_EXPECTED |= dict.fromkeys(("tuple_type", "list_type"), "expected a list, such as [2, 3]")

_OF_TORCH = ("momentum", "weight_decay", "nesterov", "betas", "dampening")  # arguments in torch.optim
# names in other frameworks
_ELSEWHERE = {"learning_rate": "lr", "batch": "batch_size", "clients": "silos", "drop_last": "last_batch"}
_ELSEWHERE |= {"max_grad_norm": "clip", "accumulate": "micro_batch", "autocast": "precision"}


def _nearest_key(name: str, known: Mapping[str, Any], value: Any) -> str:
    """A hint for an unknown key: the nearest key, or the same name one level deeper."""
    if name.isdigit() and value is None:  # {lr: 0,05}
        return "; numbers have a decimal point, such as 0.05"
    if name in _OF_TORCH and "optimizer" in known:
        return f"; it is an argument of the optimizer: optimizer: {{name: SGD, {name}: {value}}}"
    name = _ELSEWHERE.get(name, name)
    close = did_you_mean(name, known)
    if "did you mean" in close:
        return close
    for key, annotation in known.items():
        family = family_of(annotation)
        inner = list(family.members.values()) if family is not None else [section_of(annotation)]
        if any(dataclasses.is_dataclass(cls) and name in hints(cls) for cls in inner if isinstance(cls, type)):
            return f"; did you mean '{key}.{name}'?"
    return close


def _in_section(section: type, many: bool, value: Any, path: str, name: str) -> Any:
    """The value with mappings turned into components. Raises ConfigError that lists the section's keys."""
    if many and isinstance(value, (list, tuple)):
        return [_in_section(section, False, one, f"{path}.{i}", name) for i, one in enumerate(value)]
    if not many and isinstance(value, Mapping):
        return build(section, value, path, f"'{name}'")
    if value is None or dataclasses.is_dataclass(value):
        return value
    what = "a list of " if many else ""
    raise ConfigError(f"{path}: expected {what}keys and values, got {value!r}; available: {', '.join(hints(section))}")


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (list, tuple) or any(map(_is_list, typing.get_args(annotation)))


@dataclasses.dataclass(frozen=True)
class Deferred:
    """A user's factory, with the arguments it will be called with."""

    name: str
    target: Callable[..., Any]
    arguments: Mapping[str, Any]

    def build(self, source: Any) -> Any:
        """Calls the factory."""
        return self.target(**self.arguments)


def _fitting(target: Callable[..., Any], values: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The values, if they match the target's signature. Raises ConfigError otherwise."""
    takes = inspect.signature(target)
    if not any(p.kind is p.VAR_KEYWORD for p in takes.parameters.values()):
        for name in values:
            if name not in takes.parameters:
                raise ConfigError(f"{path}: '{target.__name__}' has no '{name}'{did_you_mean(name, takes.parameters)}")
    try:
        takes.bind(**values)
    except TypeError as error:
        raise ConfigError(f"{path}: '{target.__name__}': {error}") from None
    return dict(values)


def written(value: Any) -> str:
    """A plain value as a configuration file has it.

    >>> written("digits"), written(None), written([1, "a"]), written(True)
    ('digits', 'null', '[1, "a"]', 'true')
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the list of known names if none is similar.

    >>> did_you_mean("datasets", ["data", "updates"])  # both are as similar, and it begins with the first
    "; did you mean 'data'?"
    """
    names = [str(n) for n in known]
    close = [n for n in names if n.lower() == name.lower()] or difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    close = close or sorted((n for n in names if len(n) > 2 and name.startswith(n)), key=len)[-1:]
    close = close or difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; available: {', '.join(names) or 'nothing'}"


def import_object(name: str, path: str = "") -> Any:
    """The object that `package.module:attribute` names; searches the current folder after installed packages.

    Raises ConfigError if it cannot be imported, or if a run directory may not name it (trust.py)."""
    where = f"{path}: " if path else ""
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path and "." not in sys.path:
        sys.path.append(".")
    check_module(name, path)
    found: Any = None
    try:
        found = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        file = module_name.removesuffix(".py").replace("/", ".")
        if isinstance(error, ModuleNotFoundError) and module_name.endswith(".py"):
            raise ConfigError(f"{where}cannot import '{name}': leave out .py: '{file}:{attribute}'") from None
        missing = isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]
        hint = "; modules are looked for in the current folder and on PYTHONPATH" if missing else ""
        if isinstance(error, AttributeError) and isinstance(found, types.ModuleType):
            close = did_you_mean(part, [n for n in vars(found) if not n.startswith("_")])
            hint = close if "did you mean" in close else ""
        raise ConfigError(f"{where}cannot import '{name}': {error}{hint}") from None
    except SyntaxError as error:
        raise ConfigError(f"{where}cannot import '{name}': {error}") from None
    except Exception as error:
        # An exception from the module's own code: the last line of the traceback is enough.
        raise ConfigError(f"{where}cannot import '{name}': {in_one_line(error)}") from None
    check_object(found, name, path)
    return found


def to_dict(value: Any, annotation: Any = None) -> Any:
    """A component as plain YAML values; `build` of the result returns the component."""
    if isinstance(value, Deferred):
        return {"name": value.name} | {k: to_dict(v) for k, v in value.arguments.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        family = family_of(annotation)
        known = hints(type(value))
        head = {"name": family.name_of(value)} if family is not None and "name" not in known else {}
        return head | {name: to_dict(getattr(value, name), known[name]) for name in known}
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(v, annotation) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
