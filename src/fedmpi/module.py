"""Finds the tensors of a torch module, which of them share memory, and whether they still lie where they were put.

    slots(module)   every parameter and buffer, under each of its names
    ties(module)    the names of tensors that lie in another's memory, found by storage address
    Places          remembers where tensors lie; `settle` moves back what a forward pass has reassigned

A module may do `self.mean = ...` or `weight.data = ...`, create a layer in its first forward pass, or call
`flatten_parameters`. What is trained from then on is no longer the shared vector, and nothing reports it.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedmpi.errors import ConfigError

Tensor = torch.Tensor
_EXTRA = torch.nn.Module.get_extra_state
_OF_ALL = frozenset(vars(torch.nn.Module()))  # attributes that every module has
_SETTLED = ("torch.", "fedmpi.")  # modules of these packages keep no changing state in plain attributes
_VALUES = (bool, int, float, complex, str, bytes, list, tuple, deque, dict, set, np.ndarray, Tensor, type(None))
_DRAWS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)


@dataclass(frozen=True)
class Slot:
    """A place where a module holds a tensor."""

    name: str
    module: torch.nn.Module
    held: MutableMapping[str, Any]  # the module's own dict of parameters or of buffers
    key: str

    @property
    def tensor(self) -> Tensor:
        found: Tensor = self.held[self.key]
        return found


@dataclass(frozen=True)
class Tie:
    """A tensor that lies in the memory of another, its owner; strides and start count the owner's elements."""

    owner: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    same: bool  # covers the whole owner, in the owner's shape

    def of(self, owner: Tensor) -> Tensor:
        """The corresponding part of `owner`, or of a tensor like it."""
        if self.same:
            return owner
        owner = owner.contiguous()
        return owner.as_strided(self.shape, self.strides, owner.storage_offset() + self.start)


def slots(module: torch.nn.Module) -> list[Slot]:
    """Every parameter and buffer in the order of the state_dict; one with two names comes twice."""
    return [
        Slot(f"{prefix}.{key}" if prefix else key, part, held, key)
        for prefix, part in module.named_modules(remove_duplicate=False)
        for held in (part._parameters, part._buffers)
        for key in list(held)
        if held[key] is not None
    ]


def saved(module: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of the state_dict that the module holds itself, by name; without `get_extra_state`."""
    held = {id(slot.tensor) for slot in slots(module)}
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if id(tensor) in held}


def ties(module: torch.nn.Module) -> dict[str, Tie]:
    """Ties by name, for all tensors that lie in the memory of another.

    Raises ConfigError if tensors overlap in part, or if two views of the same memory are trained.
    """
    found: dict[str, Tie] = {}
    names = set(module.state_dict(keep_vars=True))
    first: dict[int, Slot] = {}
    twice: list[tuple[Slot, Slot]] = []
    spans: dict[tuple[Any, ...], list[tuple[int, int, Slot]]] = {}
    for slot in slots(module):
        tensor = slot.tensor
        if (before := first.setdefault(id(tensor), slot)) is not slot:
            twice.append((slot, before))
        elif tensor.layout is torch.strided and tensor.numel():
            if tensor.requires_grad and _repeats(tensor):
                raise ConfigError(f"model: '{slot.name}' repeats its memory (expand) and is trained; .clone() it")
            base = tensor.untyped_storage()._cdata if tensor.is_meta else 0
            start = int(tensor.storage_offset()) * tensor.itemsize if tensor.is_meta else tensor.data_ptr()
            spans.setdefault((tensor.device, base), []).append((start, start + _extent(tensor) * tensor.itemsize, slot))
    for some in spans.values():
        some.sort(key=lambda span: span[:2])
        group: list[tuple[int, Slot]] = []
        end = 0
        for start, stop, slot in some:
            if start >= end:
                _tie(group, names, found)
                group = []
            group.append((start, slot))
            end = max(end, stop)
        _tie(group, names, found)
    return found | {slot.name: found.get(before.name, _whole(before)) for slot, before in twice}


def _whole(owner: Slot) -> Tie:
    return Tie(owner.name, tuple(owner.tensor.shape), (), 0, same=True)


def _extent(tensor: Tensor) -> int:
    """Elements from the first in memory to the last, inclusive."""
    return 1 + sum((int(size) - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _repeats(tensor: Tensor) -> bool:
    return tensor.numel() > _extent(tensor)


def _tie(group: list[tuple[int, Slot]], names: set[str], found: dict[str, Tie]) -> None:
    """Add the ties of an overlapping group to `found`. The owner is the largest tensor; among equals a saved one, then
    a trained one, then the first.
    """

    def rank(entry: tuple[int, Slot]) -> tuple[bool, int, bool, bool]:
        name, tensor = entry[1].name, entry[1].tensor
        return _repeats(tensor), -tensor.numel(), name not in names, not tensor.requires_grad

    while len(group) > 1:
        group.sort(key=rank)
        (base, owner), *others = group
        where: Tensor | None = None
        group = []
        for start, slot in others:
            mine, its = slot.tensor, owner.tensor
            if start == base and (mine.shape, mine.stride(), mine.dtype) == (its.shape, its.stride(), its.dtype):
                found[slot.name] = _whole(owner)
                continue
            shares = f"model: '{owner.name}' and '{slot.name}' share some of their memory; give each its own (.clone())"
            if _repeats(its):
                raise ConfigError(shares)
            if where is None:  # index of the owner's element at each place in memory
                where = torch.full((_extent(its),), -1, dtype=torch.int64, device="cpu")
                where.as_strided(its.shape, its.stride()).copy_(torch.arange(its.numel(), device="cpu").view(its.shape))
            tie = _within(mine, start - base, owner, where)
            if tie is None:
                group.append((start, slot))
            elif tie.start < 0 or (slot.name in names and owner.name not in names):
                raise ConfigError(shares)
            elif mine.requires_grad:
                raise ConfigError(
                    f"model: '{slot.name}' is a view of '{owner.name}', and it is trained; keep one parameter and make "
                    "the view in forward"
                )
            else:
                found[slot.name] = tie


def _within(tensor: Tensor, num_bytes: int, owner: Slot, where: Tensor) -> Tie | None:
    """How a tensor lies in its owner. None: no common element; a tie with start below 0: only some common elements."""
    partly = Tie(owner.name, (), (), -1, same=False)
    if tensor.dtype != owner.tensor.dtype or num_bytes % tensor.itemsize:
        return partly
    start, extent = num_bytes // tensor.itemsize, _extent(tensor)
    low, high = min(0, start), max(len(where), start + extent)
    around = torch.full((high - low,), -1, dtype=torch.int64, device="cpu")
    around[-low : len(where) - low] = where
    index = around.as_strided(tensor.shape, tensor.stride(), start - low)
    if bool((index < 0).all()):
        return None
    first = int(index.reshape(-1)[0])
    strides = tuple(
        int(index.select(d, 1).reshape(-1)[0]) - first if size > 1 else 0 for d, size in enumerate(tensor.shape)
    )
    by_strides = torch.full_like(index.contiguous(), first)
    for d, (size, stride) in enumerate(zip(tensor.shape, strides, strict=True)):
        along = torch.arange(size, device="cpu") * stride
        by_strides += along.view([-1 if d == other else 1 for other in range(tensor.dim())])
    if min(first, *strides, 0) < 0 or not torch.equal(by_strides, index):
        return partly
    return Tie(owner.name, tuple(tensor.shape), strides, first, same=False)


def retie(module: torch.nn.Module, found: Mapping[str, Tie]) -> None:
    """Move tied tensors into their owners' current memory.

    Parameters that are trained as one become one object, so that torch adds up their gradients and steps once.
    """
    by_name = {slot.name: slot for slot in slots(module)}
    for name, tie in found.items():
        slot, owner = by_name[name], by_name[tie.owner].tensor
        if slot.tensor is owner:
            continue
        slot.tensor.data = tie.of(owner.detach())  # the old object too, for those who hold it
        if tie.same and slot.tensor.requires_grad == owner.requires_grad and type(slot.tensor) is type(owner):
            setattr(slot.module, slot.key, owner)


@dataclass(frozen=True)
class _Place:
    """Where a saved tensor belongs."""

    slot: Slot
    tensor: Tensor
    address: int
    home: Tensor  # the same memory, also after the tensor moved


@dataclass
class _Fleeting:
    """A tensor that is not saved: a non-persistent buffer, or a plain attribute."""

    name: str
    held: MutableMapping[str, Any]
    key: str
    tensor: Tensor
    version: int
    first: Tensor  # a copy


@dataclass
class _Plain:
    """A plain attribute of a user's module that is not a tensor: a value, or a random number generator."""

    name: str
    held: MutableMapping[str, Any]
    key: str
    value: Any
    first: Any  # its first content


class Places:
    """Where a module's tensors lie now; `settle` moves them back there.

    Non-persistent buffers and plain attributes (a tensor, a number, a list, a generator) belong to no silo and to no
    checkpoint: `reset` restores their first values.
    """

    def __init__(self, module: torch.nn.Module, tied: Mapping[str, Tie]) -> None:
        self.module = module
        self._tied = set(tied) | {tie.owner for tie in tied.values()}
        self._names = set(module.state_dict(keep_vars=True))
        self._places = [
            _Place(slot, slot.tensor, slot.tensor.data_ptr(), slot.tensor.detach())
            for slot in slots(module)
            if slot.name in self._names
        ]
        # The same as flat tuples, for speed: `settle` runs several times per silo and round.
        self._glance = self._at_a_glance()
        self._watched: list[tuple[str, Tensor, int]] = []
        self._look_around()
        named = list(module.named_modules())
        extra = [(name, part) for name, part in named if type(part).get_extra_state is not _EXTRA]
        self._extra = [(name, part, copy.deepcopy(part.get_extra_state())) for name, part in extra]
        here = {id(place.tensor) for place in self._places}
        self._fleeting = []
        for prefix, part in named:
            for held in (part._buffers, vars(part)):
                for key, value in list(held.items()):
                    computed = f"{key}_orig" in part._parameters  # computed by torch.nn.utils before every forward pass
                    if isinstance(value, Tensor) and id(value) not in here and not (value.requires_grad or computed):
                        name = f"{prefix}.{key}" if prefix else key
                        first = value.detach().clone()
                        self._fleeting.append(_Fleeting(name, held, key, value, value._version, first))
        own = [(prefix, part) for prefix, part in named if not type(part).__module__.startswith(_SETTLED)]
        self._plain = [
            _Plain(f"{prefix}.{key}" if prefix else key, vars(part), key, value, _content(value))
            for prefix, part in own
            for key, value in vars(part).items()
            if key not in _OF_ALL and isinstance(value, (*_VALUES, *_DRAWS)) and not isinstance(value, Tensor)
        ]
        self._keys = [(held, frozenset(held)) for _, part in own for held in (vars(part), part._buffers)]
        self._empty = [(part._buffers, key) for _, part in own for key, value in part._buffers.items() if value is None]

    def _at_a_glance(self) -> list[tuple[Any, str, Tensor, int, _Place]]:
        return [(p.slot.held, p.slot.key, p.tensor, p.address, p) for p in self._places]

    def move(self, old: Tensor, new: Tensor) -> None:
        """Record that the vector `old` has moved to the memory of `new`.

        Tensors that lay in `old` have their place in `new`, at the same offset, from now on.
        """
        memory = old.untyped_storage().data_ptr()
        for number, place in enumerate(self._places):
            if place.home.untyped_storage().data_ptr() == memory:
                offset = new.storage_offset() + place.home.storage_offset() - old.storage_offset()
                home = new.as_strided(place.home.shape, place.home.stride(), offset)
                self._places[number] = replace(place, address=home.data_ptr(), home=home)
        self._glance = self._at_a_glance()

    def watch(self, names: Collection[str]) -> None:
        """Forbid writing to these: frozen parameters that are not shared, which all silos of a rank have in common."""
        self._watched = [(p.slot.name, p.tensor, p.tensor._version) for p in self._places if p.slot.name in names]

    def _look_around(self) -> None:
        """Record the numbers of tensors and the children of every part, and which tensors are None."""
        parts = list(self.module.modules())
        self._parts = [(p, len(p._parameters), len(p._buffers), list(p._modules.values())) for p in parts]
        held_by = [held for part in parts for held in (part._parameters, part._buffers)]
        self._nothing = [(held, key) for held in held_by for key, value in held.items() if value is None]

    def settle(self) -> bool:
        """Move reassigned tensors back, with their new values; returns whether there were any.

        Raises ConfigError for what cannot be moved back: a tensor that was created or replaced, a new shape or dtype,
        shared memory, a written frozen parameter.
        """
        moved = False
        for held, key, tensor, address, place in self._glance:
            now = held[key] if key in held else None  # noqa: SIM401 (a scripted module's dict has no `get`)
            if now is not tensor or now.data_ptr() != address:
                self._bring_back(place, now)
                moved = True
        for name, tensor, version in self._watched:
            if tensor._version != version:
                raise ConfigError(
                    f"model: the frozen parameter '{name}' is written in a forward pass and is not shared, so it would "
                    "go from silo to silo; share it (exchange.parameters), or make it a buffer"
                )
        for part, num_params, num_buffers, parts in self._parts:
            if (
                len(part._parameters) != num_params
                or len(part._buffers) != num_buffers
                or list(part._modules.values()) != parts
            ):
                self._compare()
                break
        for held, key in self._nothing:
            if held[key] is not None:
                self._compare()
                break
        for name, part, before in self._extra:
            if not _alike(part.get_extra_state(), before):
                raise ConfigError(
                    f"model: the extra state of '{name or type(part).__name__}' changes, and is neither sent nor kept "
                    "with a silo; keep what changes in a buffer"
                )
        return moved

    def _bring_back(self, place: _Place, now: Any) -> None:
        name, tensor, home = place.slot.name, place.tensor, place.home
        if not isinstance(now, Tensor):
            raise ConfigError(f"model: '{name}' is gone after a forward pass")
        if now is not tensor and isinstance(tensor, torch.nn.Parameter):
            raise ConfigError(
                f"model: the parameter '{name}' is replaced by another in a forward pass; write into it in place "
                "(torch.no_grad, copy_)"
            )
        if (now.shape, now.dtype) != (home.shape, home.dtype):
            was, becomes = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (home, now))
            raise ConfigError(f"model: '{name}' was {was} and becomes {becomes} in a forward pass; keep it as it was")
        if name in self._tied:
            raise ConfigError(
                f"model: '{name}' shares its memory with another tensor and is assigned anew in a forward pass; write "
                "into it in place (copy_)"
            )
        with torch.no_grad():
            watched = any(tensor is still for _, still, _ in self._watched)
            if not (watched and now.device == home.device and torch.equal(home, now)):
                home.copy_(now.detach().clone())
            if tensor.data_ptr() != place.address:
                tensor.data = home
        if now is not tensor:
            place.slot.held[place.slot.key] = tensor

    def _compare(self) -> None:
        """Raise ConfigError if saved tensors or parts came or went; buffers that are not saved may."""
        names = set(self.module.state_dict(keep_vars=True))
        if new := sorted(names - self._names):
            more = f" (and {len(new) - 1} more)" if len(new) > 1 else ""
            raise ConfigError(
                f"model: '{new[0]}'{more} is made in a forward pass, after the shared parameters are fixed; make "
                "it in __init__, or let torch find its width (torch.nn.LazyLinear)"
            )
        if gone := sorted(self._names - names):
            raise ConfigError(f"model: '{gone[0]}' is gone after a forward pass")
        known = {id(place.tensor) for place in self._places}
        for slot in slots(self.module):
            if slot.name in names and id(slot.tensor) not in known:
                raise ConfigError(f"model: '{slot.name}' is made anew in a forward pass; make it in __init__")
        self._look_around()

    def reset(self) -> list[str]:
        """Restore the first values of what is not saved; returns the names of those that had changed."""
        changed = []
        for one in self._fleeting:
            now = _held(one.held, one.key)
            if now is one.tensor and now._version == one.version:
                continue
            grown = isinstance(now, Tensor) and now.shape != one.first.shape  # a table that grows when needed
            if not grown and not _alike(now, one.first):
                changed.append(one.name)
            if one.tensor._version != one.version:
                with torch.no_grad():
                    one.tensor.copy_(one.first)
                one.version = one.tensor._version
            one.held[one.key] = one.tensor
        for plain in self._plain:
            now, made = _held(plain.held, plain.key), plain.value is None  # created when needed
            if now is plain.value and (plain.first is None or _same(_content(now), plain.first)):
                continue
            if made and not isinstance(now, _VALUES):
                continue
            was, content = (plain.value, now) if plain.first is None else (plain.first, _content(now))
            if not made and not _same(content, was):
                changed.append(plain.name)
            plain.held[plain.key] = _as_it_was(plain)
        self._forget()
        return changed

    def _forget(self) -> None:
        """Remove what was not there at first: usually caches, which are made again."""
        late = [(held, key) for held, key in self._empty if held.get(key) is not None]
        for held, key in late:
            held[key] = None
        for held, keys in self._keys:
            if len(held) != len(keys):
                for key in [k for k, value in held.items() if k not in keys and isinstance(value, _VALUES)]:
                    del held[key]
                    late.append((held, key))
        if late:
            self._look_around()


def _content(value: Any) -> Any:
    """A copy of the mutable content of an attribute; None if it has none."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, deque):
        return list(value)
    return copy.copy(value) if isinstance(value, (list, dict, set, np.ndarray)) else None


def _same(now: Any, first: Any) -> bool:
    """Whether two values or contents are equal. Elements of lists and dicts may also be identical objects."""
    if isinstance(now, list) and isinstance(first, list):
        return len(now) == len(first) and all(a is b or _alike(a, b) for a, b in zip(now, first, strict=True))
    if isinstance(now, dict) and isinstance(first, dict):
        return now.keys() == first.keys() and all(now[key] is first[key] or _alike(now[key], first[key]) for key in now)
    return _alike(now, first)


def _as_it_was(plain: _Plain) -> Any:
    """The attribute's first object, with its first content."""
    value, first = plain.value, plain.first
    if isinstance(value, torch.Generator):
        value.set_state(first)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = first
    elif isinstance(value, np.random.RandomState):
        value.set_state(first)
    elif isinstance(value, random.Random):
        value.setstate(first)
    elif isinstance(value, (list, deque)):
        value.clear()
        value.extend(first)
    elif isinstance(value, np.ndarray):
        value[...] = first
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(first)
    return value


def _held(held: Mapping[str, Any], key: str) -> Any:
    """The value under the key, or None; a scripted module's dict has no `get`."""
    try:
        return held[key]
    except KeyError:
        return None


def _alike(a: Any, b: Any) -> bool:
    """Whether two values are equal, including tensors and arrays inside them."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    if type(a) is not type(b):
        return False
    try:
        return bool(a == b)
    except (ValueError, RuntimeError, TypeError):  # not comparable
        return repr(a) == repr(b)
