"""A torch model whose tensors are views of contiguous vectors, so that a payload needs no packing.

Each dtype has one vector of shared tensors and one of personal tensors. The federation's copy of the shared parameters,
`params_P`, is one float32 vector (float64 if any shared tensor is float64), because updates can be smaller than the
resolution of half precision.

    shared     sent, averaged, stepped by the server
    personal   parameters and floating-point buffers that are not shared: each silo trains or updates its own
    integers   integer buffers (BatchNorm's batch counter, ...): never sent, each silo keeps its own
    rest       frozen parameters that are not shared: stay where they are, as do buffers that are not saved
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import math
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import cast

import torch

from fedmpi.components import did_you_mean
from fedmpi.errors import ConfigError
from fedmpi.layout import DELTA, Layout, Segment
from fedmpi.module import Places, Tie, retie, slots, ties
from fedmpi.types import Auxiliary, Contribution, TrainedContribution

HALF = (torch.bfloat16, torch.float16)
RESERVED = "fedmpi/"  # prefix of keys in a silo's kept state that are fedmpi's own; a local rule uses any others
BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm  # base class of BatchNorm1d to 3d and SyncBatchNorm


@dataclass(frozen=True)
class Entry:
    """One parameter or buffer of the model."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    kind: str  # shared, personal, integers or rest
    buffer: bool = False  # whether it is a buffer (statistics, ...) and not a parameter

    @property
    def num_elements(self) -> int:
        return int(torch.Size(self.shape).numel())


def entries(
    module: torch.nn.Module, shared: str | Sequence[str] = "all", tied: Mapping[str, Tie] | None = None
) -> list[Entry]:
    """The model's saved parameters and buffers, with their kind; tied weights once, under their first name.

    `shared` is "all" (parameters and floating-point buffers), "trainable" (parameters that require a gradient),
    "all_but_batch_norm" (all but the parameters and statistics of batch normalization: FedBN, Li et al. 2021, Algorithm
    1), or name patterns, where the last match decides and "!" excludes: ["*", "!head.*"], ["*lora_*"]. Raises
    ConfigError for a pattern that matches nothing, for "all_but_batch_norm" without batch normalization, if nothing is
    shared, for a trained parameter that is not in the state_dict, and for complex tensors.
    """
    tied = ties(module) if tied is None else tied
    norms = _in_batch_norm(module) if shared == "all_but_batch_norm" else set()
    found: list[Entry] = []
    patterns = [] if isinstance(shared, str) else list(shared)
    unused = set(patterns)
    names = set(module.state_dict(keep_vars=True))
    for slot in slots(module):
        name, tensor = slot.name, slot.tensor
        if name not in names and tensor.requires_grad:
            raise ConfigError(f"model: '{name}' is trained, but is not in the module's state_dict")
        if name not in names or name in tied:
            continue
        trainable = isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad
        chosen = trainable if shared == "trainable" else isinstance(shared, str) and id(tensor) not in norms
        for pattern in patterns:
            if fnmatchcase(name, pattern.removeprefix("!")):
                chosen = not pattern.startswith("!")
                unused.discard(pattern)
        if tensor.is_complex() or (trainable and not tensor.is_floating_point()):
            raise ConfigError(f"model: '{name}' is {tensor.dtype}; only real floating-point parameters can be averaged")
        if not tensor.is_floating_point():
            kind = "integers"
        elif chosen:
            kind = "shared"
        elif trainable or not isinstance(tensor, torch.nn.Parameter):
            kind = "personal"
        else:
            kind = "rest"
        buffer = not isinstance(tensor, torch.nn.Parameter)
        found.append(Entry(name, tuple(tensor.shape), tensor.dtype, trainable, kind, buffer))
    if unused:
        pattern = sorted(unused)[0]
        for name in (n for n in tied if fnmatchcase(n, pattern.removeprefix("!"))):
            raise ConfigError(
                f"exchange.parameters: '{pattern}': '{name}' lies in the memory of '{tied[name].owner}', and goes "
                "where that goes"
            )
        hint = did_you_mean(pattern, [entry.name for entry in found])
        raise ConfigError(f"exchange.parameters: '{pattern}' matches no parameter{hint}")
    if not any(entry.kind == "shared" and entry.num_elements for entry in found):
        none = "" if any(entry.trainable for entry in found) else ": it has no parameter that requires a gradient"
        raise ConfigError(f"exchange.parameters: nothing of the model is shared{none}")
    return found


def refuse_frozen(found: Sequence[Entry]) -> None:
    """Raise ConfigError if no parameter is trainable."""
    if not any(entry.trainable for entry in found):
        raise ConfigError("model: no parameter of it requires a gradient, so there is nothing to train")


def frozen_alone(found: Sequence[Entry]) -> set[str]:
    """The names of frozen parameters that are not shared; they never change, so all silos use the same ones."""
    return {entry.name for entry in found if entry.kind == "rest"}


def _in_batch_norm(module: torch.nn.Module) -> set[int]:
    """The `id` of every parameter and buffer of batch normalization. Raises ConfigError if there is none."""
    found = {id(slot.tensor) for m in module.modules() if isinstance(m, BATCH_NORM) for slot in slots(m)}
    if not found:
        raise ConfigError("exchange.parameters: all_but_batch_norm, but the model has no batch normalization")
    return found


def layout_of(found: Sequence[Entry], auxiliaries: Sequence[Auxiliary] = (), exact: Collection[str] = ()) -> Layout:
    """The layout of the exchanged vector [Q]: shared entries grouped by dtype [P], then the auxiliary vectors [P] each.
    Buffers, frozen parameters and the names in `exact` bypass the codecs."""
    beside: list[Segment] = []
    start = 0
    for dtype in dict.fromkeys(e.dtype for e in found if e.kind in ("shared", "personal")):
        for entry in (e for e in found if e.kind == "shared" and e.dtype == dtype):
            stop, named = start + entry.num_elements, entry.buffer or entry.name in exact
            if start < stop and (named or not entry.trainable):
                averaged, still = not entry.trainable, not named
                variance = entry.buffer and entry.name.endswith("running_var")  # the name in all of torch's layers
                part = Segment(entry.name, start, stop, "exact", averaged=averaged, still=still, non_negative=variance)
                beside.append(part)
            start = stop
    vectors = [Segment(DELTA, 0, start, "delta")]
    for aux in auxiliaries:
        there = len(vectors) * start
        vectors.append(
            Segment(aux.name, there, there + start, "auxiliary", aux.normaliser, decay=aux.decay, gain=aux.gain)
        )
    return Layout((*vectors, *beside))


def named_exact(found: Sequence[Entry], patterns: Sequence[str]) -> set[str]:
    """The names of shared entries that the patterns select; the last match decides, "!" excludes. Raises ConfigError
    for a pattern that matches nothing."""
    shared = [entry.name for entry in found if entry.kind == "shared"]
    chosen: set[str] = set()
    for pattern in patterns:
        names = {name for name in shared if fnmatchcase(name, pattern.removeprefix("!"))}
        if not names:
            raise ConfigError(
                f"exchange.exact: '{pattern}' matches nothing that is shared{did_you_mean(pattern, shared)}"
            )
        chosen = chosen - names if pattern.startswith("!") else chosen | names
    return chosen


def master_dtype(found: Sequence[Entry]) -> torch.dtype:
    """The dtype of `params_P`: float64 if any shared entry is float64, else float32."""
    return torch.float64 if any(e.dtype == torch.float64 and e.kind == "shared" for e in found) else torch.float32


def num_shared(found: Sequence[Entry]) -> int:
    """P, the number of elements of the shared entries."""
    return sum(entry.num_elements for entry in found if entry.kind == "shared")


def one_vector(found: Sequence[Entry]) -> bool:
    """Whether all shared entries have the dtype of `params_P`, so that one vector of the model can hold the delta."""
    return {e.dtype for e in found if e.kind == "shared"} == {master_dtype(found)}


def signature(found: Sequence[Entry]) -> dict[str, list[object]]:
    """Dtype, shape and kind of each entry except `rest`, by name: a checkpoint and the model must agree on them."""
    return {e.name: [str(e.dtype).removeprefix("torch."), list(e.shape), e.kind] for e in found if e.kind != "rest"}


def changed_entries(there: Mapping[str, object], found: Sequence[Entry]) -> list[str]:
    """The differences between a model and a stored `signature`, one text each; empty if there are none."""
    here = signature(found)
    return [
        f"the model's {name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


Allocate = Callable[[int, torch.dtype], torch.Tensor]

COMPILED = 1 << 22  # elements; for shorter vectors compiled passes do not pay for loading numba (a second)


# Modules that code outside fedmpi can write to. Global, because a run may build a new FlatModel over the same module.
_HANDED_OUT: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def compiled(vector_P: torch.Tensor) -> bool:
    """Whether compiled passes (kernels/vectors.py) support the vector and are faster for it."""
    plain = vector_P.device.type == "cpu" and vector_P.dtype == torch.float32 and vector_P.is_contiguous()
    return plain and len(vector_P) >= COMPILED


class FlatModel:
    """The model of a rank. The rank's silos use it in turn: load, train, take the delta.

    `shared` is that of `entries`. `allocate(num_elements, dtype)` gives the memory of a CPU model's shared vectors.
    `layout` is that of the vector sent; the default is the delta alone. Raises ConfigError as `entries` does.

    Attributes: module; entries; tied (tied tensors by name); dtype (of params_P); num_shared (P); layout; tensors (all
    parameters and buffers by name); lends; first_personal (what `personal` returned before any training).
    """

    def __init__(
        self,
        module: torch.nn.Module,
        shared: str | Sequence[str] = "all",
        device: torch.device | str = "cpu",
        allocate: Allocate | None = None,
        layout: Layout | None = None,
    ) -> None:
        self._chosen = shared
        self.tied = ties(module)  # before `to`, which separates tensors that share memory
        self.entries = entries(module, shared, self.tied)
        self.module = module.to(device)
        self.device = torch.device(device)
        self.dtype = master_dtype(self.entries)
        self.num_shared = num_shared(self.entries)
        self.layout = layout_of(self.entries) if layout is None else layout  # of the vector sent, [Q]
        self._behind = self.layout.size - self.num_shared  # elements of the auxiliary vectors, after the delta
        # Whether the model trains in the memory from which delta and auxiliary vectors are sent, [P + A P].
        self._in_place = one_vector(self.entries)
        if allocate is None or self.device.type != "cpu":
            allocate = lambda n, dtype: torch.zeros(n, dtype=dtype, device=self.device)  # noqa: E731
        tensors = {slot.name: slot.tensor for slot in slots(module)}
        self._shared: list[torch.Tensor] = []  # the shared slice of each dtype's vector
        self._personal: list[torch.Tensor] = []  # the personal slice
        for dtype in dict.fromkeys(e.dtype for e in self.entries if e.kind in ("shared", "personal")):
            kinds = [
                [e for e in self.entries if e.kind == kind and e.dtype == dtype] for kind in ("shared", "personal")
            ]
            sizes = [sum(e.num_elements for e in some) for some in kinds]
            # The personal slice always lies in private memory, because only the shared slice is sent.
            all_here = sizes[0] > 0 and self._in_place
            whole = allocate(sizes[0] + all_here * self._behind, dtype)
            if all_here:
                self._travels = whole
            vectors = [whole[: sizes[0]], torch.zeros(sizes[1], dtype=dtype, device=self.device)]
            for vector, some in zip(vectors, kinds, strict=True):
                start = 0
                for entry in some:
                    tensor, part = tensors[entry.name], vector[start : start + entry.num_elements]
                    part.copy_(tensor.detach().reshape(-1))
                    tensor.data = part.view(entry.shape)  # same object: ties and optimizers refer to it
                    start += entry.num_elements
            self._shared.append(vectors[0])
            self._personal.append(vectors[1])
        if not self._in_place:
            self._travels = torch.zeros(self.num_shared + self._behind, dtype=self.dtype, device=self.device)
        self._integers = [tensors[e.name] for e in self.entries if e.kind == "integers"]
        retie(module, self.tied)
        self.tensors = {slot.name: slot.tensor for slot in slots(module)}  # all names, also of tied tensors
        self._views = {n: tie for n, tie in self.tied.items() if self.tensors[n] is not self.tensors[tie.owner]}
        self._places = Places(module, self.tied)
        self._places.watch(frozen_alone(self.entries))
        self._trained = [(t, t.requires_grad) for t in self.tensors.values() if isinstance(t, torch.nn.Parameter)]
        self._counted = [self.tensors[e.name] for e in self.entries if e.kind == "shared"]
        self._has_buffers = any(e.kind == "shared" and e.buffer for e in self.entries)
        self._versions: list[int] = []
        self._loaded: torch.Tensor | None = None  # params_P of the model when `_versions` was taken
        self._held: tuple[torch.Tensor, int] | None = None  # params_P of `hold`, and its version then
        self.lends = False  # whether the exchange subtracts params_P itself; set every round
        self._lent: TrainedContribution | None = None  # contribution whose delta is not taken yet
        self.first_personal = self.personal()  # a silo starts from it in its first round

    def params(self) -> torch.Tensor:
        """A copy of the shared parameters, [P]."""
        self._places.settle()
        return torch.cat([part.to(self.dtype) for part in self._shared]) if self._shared else torch.zeros(0)

    def load(self, params_P: torch.Tensor) -> None:
        """Set the model's shared parameters to params_P, [P]. Skips the copy if `hold` noted that they are equal and
        neither was written since."""
        holds, self._held = self._holds(params_P), None
        self.take_back()
        if holds:
            return
        self._places.settle()
        start = 0
        with torch.no_grad():
            for part in self._shared:
                part.copy_(params_P[start : start + len(part)])
                start += len(part)
        self._versions, self._loaded = self._written(), params_P

    def hold(self, params_P: torch.Tensor, loaded: bool = False) -> None:
        """Note that a large model's shared parameters equal params_P, [P]: the next `load` of it skips the copy.

        Call `release` before params_P is written: torch's version counter misses writes by MPI, other processes and
        compiled passes. Has no effect after `hand_out`. `loaded`: params_P equals what was loaded last, so nothing is
        noted if the model was touched since."""
        large = self._in_place and compiled(params_P)
        if large and self.module not in _HANDED_OUT and not (loaded and self.touched):
            self._held = (params_P, params_P._version)
            self._versions, self._loaded = self._written(), params_P

    def release(self) -> None:
        """Forget what `hold` noted."""
        self._held = None

    def hand_out(self) -> torch.nn.Module:
        """The module, for code that may write to it at any time; from now on every `load` copies."""
        self._held = None
        _HANDED_OUT.add(self.module)
        return self.module

    def _holds(self, params_P: torch.Tensor) -> bool:
        """Whether `hold` noted this params_P and neither it nor the model was written since."""
        if self._held is None or self.touched:
            return False
        held_P, version = self._held
        same = held_P.data_ptr() == params_P.data_ptr() and len(held_P) == len(params_P)
        return same and held_P._version == params_P._version == version

    def _written(self) -> list[int]:
        """The version counter of each shared tensor."""
        return [tensor._version for tensor in self._counted]

    @property
    def touched(self) -> bool:
        """Whether a shared tensor was written since `load`. Compares buffers by value, because batch normalization
        writes them without raising their version counter."""
        if self._places.settle() or self._versions != self._written():
            return True
        if self._loaded is None or not self._has_buffers:
            return False
        buffers = [(self.tensors[entry.name], part) for entry, part in self._parts(self._loaded) if entry.buffer]
        return not all(torch.equal(tensor, part.to(tensor.dtype)) for tensor, part in buffers)

    def take_delta(self, params_P: torch.Tensor) -> torch.Tensor:
        """The delta [P], followed by room for the layout's auxiliary vectors, as one vector [Q].

        The delta is the trained parameters minus those that `load(params_P)` set. For half-precision tensors these are
        params_P rounded, so that without any step the delta is 0. The delta may overwrite the trained parameters; the
        next `load` or `take_delta` overwrites the delta.
        """
        self._held = None
        self._places.settle()
        with torch.no_grad():
            if not self._in_place:
                start = 0
                for part in self._shared:
                    self._travels[start : start + len(part)].copy_(part)
                    start += len(part)
            self._travels[: self.num_shared].sub_(self.as_loaded(params_P))
            return self._travels

    def give(self, contribution: Contribution, params_P: torch.Tensor) -> Contribution:
        """The contribution with its vector [Q]: the delta since `load(params_P)`, and room for auxiliary vectors.

        If the exchange subtracts params_P itself (`lends`), this only computes the delta's norm, and the model's memory
        keeps the trained parameters until somebody reads the vector.
        """
        if not (self.lends and self._in_place and not self._behind and compiled(params_P)):
            contribution.vector_Q = self.take_delta(params_P)
            return contribution
        from fedmpi.kernels import vectors  # imported here, because numba takes a second to load

        self._held = None
        self._places.settle()
        squares = vectors.distance(self._travels.numpy(), params_P.numpy())
        known = {field.name: getattr(contribution, field.name) for field in fields(contribution)}
        self._lent = TrainedContribution(**known | {"vector_Q": self._travels, "norm": math.sqrt(squares)})
        self._lent.take = functools.partial(self.take_delta, params_P)
        return self._lent

    def take_back(self) -> None:
        """Before the model's memory is written: a contribution that still relies on it can no longer take its delta."""
        if self._lent is not None:
            self._lent.take = None
            self._lent = None

    def as_loaded(self, params_P: torch.Tensor) -> torch.Tensor:
        """params_P, [P], rounded like the model's half-precision tensors. Read-only: it may be params_P itself."""
        if self._in_place or all(part.dtype == self.dtype for part in self._shared if len(part)):
            return params_P
        starts = [0, *itertools.accumulate(len(part) for part in self._shared)]
        return torch.cat(
            [
                params_P[start : start + len(part)].to(part.dtype).to(self.dtype)
                for start, part in zip(starts, self._shared, strict=False)
            ]
        )

    def pairs(self, vector_P: torch.Tensor) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Each trainable shared parameter with its part of the vector, as a view in the parameter's shape."""
        return [
            (cast(torch.nn.Parameter, self.tensors[entry.name]), part)
            for entry, part in self._parts(vector_P)
            if entry.trainable
        ]

    def shared(self, vector_P: torch.Tensor) -> dict[str, torch.Tensor]:
        """The vector's parts by name, in the module's shapes and dtypes, for torch.func.functional_call. Parts of the
        vector's own dtype are views."""
        return self.with_views({entry.name: part.to(entry.dtype) for entry, part in self._parts(vector_P)})

    def with_views(self, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`named` plus the tied tensors that are views of its tensors, as functional_call needs them."""
        views = {n: tie.of(named[tie.owner].detach()) for n, tie in self._views.items() if tie.owner in named}
        return named | views if views else named

    def _parts(self, vector_P: torch.Tensor) -> list[tuple[Entry, torch.Tensor]]:
        """Each shared entry with its part of the vector, as a view in the entry's shape."""
        found, start = [], 0
        for dtype in dict.fromkeys(e.dtype for e in self.entries if e.kind in ("shared", "personal")):
            for entry in self.entries:
                if entry.kind == "shared" and entry.dtype == dtype:
                    found.append((entry, vector_P[start : start + entry.num_elements].view(entry.shape)))
                    start += entry.num_elements
        return found

    def named(self, vector_P: torch.Tensor, kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Shared, personal and integer entries by name, in their shapes: views of the vector [P] and of the tensors
        that `personal` returned."""
        found: dict[str, torch.Tensor] = {}
        starts = {"shared": 0}
        for i, dtype in enumerate(dict.fromkeys(e.dtype for e in self.entries if e.kind in ("shared", "personal"))):
            starts["personal"] = 0
            for entry in (e for e in self.entries if e.kind in ("shared", "personal") and e.dtype == dtype):
                whole = vector_P if entry.kind == "shared" else kept[_personal(i)]
                found[entry.name] = _next(whole, entry, entry.kind, starts)
        for entry in (e for e in self.entries if e.kind == "integers"):
            name = _integers(entry.dtype)
            found[entry.name] = _next(kept[name], entry, name, starts)
        return found

    def personal(self) -> dict[str, torch.Tensor]:
        """A copy of the personal tensors and integer buffers, by key. Half precision becomes float32 (exact)."""
        self._places.settle()
        kept = {
            _personal(i): part.to(torch.float32 if part.dtype in HALF else part.dtype, copy=True)
            for i, part in enumerate(self._personal)
            if len(part)
        }
        for dtype in dict.fromkeys(t.dtype for t in self._integers):
            parts = [t.detach().reshape(-1) for t in self._integers if t.dtype == dtype]
            kept[_integers(dtype)] = torch.cat(parts)
        return kept

    @property
    def has_personal(self) -> bool:
        """Whether the model has personal parameters or floating-point buffers."""
        return any(len(part) for part in self._personal)

    def is_personal(self, kept: Mapping[str, torch.Tensor]) -> bool:
        """Whether a silo's kept state has personal parameters or buffers, as after its first round."""
        return any(_personal(i) in kept for i in range(len(self._personal)))

    def load_personal(self, kept: Mapping[str, torch.Tensor]) -> None:
        """Load what `personal` returned; for missing keys, the model's first values. Unsaved buffers and tensors in
        plain attributes also get their first values, so that nothing passes from one silo to another."""
        self._places.settle()
        self._places.reset()
        with torch.no_grad():
            for i, part in enumerate(self._personal):
                if len(part):
                    name = _personal(i)
                    part.copy_(kept[name] if name in kept else self.first_personal[name])
            starts: dict[str, int] = {}
            for tensor in self._integers:
                name = _integers(tensor.dtype)
                whole, start = kept[name] if name in kept else self.first_personal[name], starts.get(name, 0)
                tensor.copy_(whole[start : start + tensor.numel()].view(tensor.shape))
                starts[name] = start + tensor.numel()

    def settle(self) -> None:
        """Move tensors that a forward pass reassigned back into the vectors. Raises ConfigError if it cannot."""
        self._places.settle()

    def thaw(self) -> None:
        """Restore every parameter's first `requires_grad`, which a forward pass may have changed."""
        for tensor, trained in self._trained:
            if tensor.requires_grad is not trained:
                tensor.requires_grad_(trained)

    def twin(self) -> FlatModel:
        """A copy of the model in its own memory."""
        self._places.reset()  # so that the copy has the first values of what is not saved
        module = copy.deepcopy(self.module)
        retie(module, self.tied)
        found = FlatModel(module, self._chosen, self.device, layout=self.layout)
        found.first_personal = self.first_personal
        return found

    def leave(self) -> None:
        """Move the model into its own memory, because the exchange's memory is freed with the run."""
        self._held = self._loaded = None
        for number, vector in ((i, vector) for i, vector in enumerate(self._shared) if len(vector)):
            memory = vector.untyped_storage().data_ptr()
            whole = vector.new_zeros(len(vector) + self._in_place * self._behind)
            own = whole[: len(vector)].copy_(vector)
            self._shared[number] = own
            if self._in_place:
                self._travels = whole
            for tensor in {id(t): t for t in self.tensors.values()}.values():
                if tensor.untyped_storage().data_ptr() == memory:
                    offset = tensor.storage_offset() - vector.storage_offset()
                    tensor.data = own.as_strided(tensor.shape, tensor.stride(), offset)
            self._places.move(vector, own)


def _personal(number: int) -> str:
    """Key of a silo's personal parameters and buffers of one dtype."""
    return f"{RESERVED}personal_{number}"


def _integers(dtype: torch.dtype) -> str:
    """Key of a silo's integer buffers of one dtype."""
    return f"{RESERVED}integers_{str(dtype).removeprefix('torch.')}"


def _next(whole: torch.Tensor, entry: Entry, name: str, starts: dict[str, int]) -> torch.Tensor:
    """The entry's part of a vector, from `starts[name]` on, in its shape; advances `starts[name]`."""
    start = starts.get(name, 0)
    starts[name] = start + entry.num_elements
    return whole[start : start + entry.num_elements].view(entry.shape)


def sha256(params_P: torch.Tensor) -> str:
    """The SHA-256 of the vector's little-endian bytes; equal if and only if two vectors agree bit for bit."""
    return hashlib.sha256(params_P.detach().cpu().contiguous().numpy().data).hexdigest()
