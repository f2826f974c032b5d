"""A torch model as views of one contiguous vector per dtype, so that a payload needs no packing.

What is shared is one vector, what is personal another. The federation's own copy of the shared parameters, `params_P`,
is one vector of float32 (float64 if the model has any float64): half-precision models move by less than half precision
resolves.

    shared     sent, averaged, stepped by the server
    personal   trained or updated by a silo and kept by it: parameters and floating buffers that are not shared
    integers   integer buffers (BatchNorm counts its batches): never sent, kept by the silo
    the rest   frozen parameters that are not shared, buffers that are not saved: left where they are
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
RESERVED = "fedmpi/"  # begins the names under which a silo keeps what is not its rule's: a rule's own may be any others
BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm  # of one, two and three dimensions, over ranks, your own


@dataclass(frozen=True)
class Entry:
    """One parameter or buffer of the model."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    kind: str  # shared, personal, integers or rest
    buffer: bool = False  # no parameter: statistics and the like

    @property
    def num_elements(self) -> int:
        return int(torch.Size(self.shape).numel())


def entries(
    module: torch.nn.Module, shared: str | Sequence[str] = "all", tied: Mapping[str, Tie] | None = None
) -> list[Entry]:
    """What the model saves, each memory once (tied weights under their first name), and whether it is shared.

    `shared` is "all" (parameters and floating buffers), "trainable" (parameters that require a gradient),
    "all_but_batch_norm" (all but the parameters and statistics of batch normalization: FedBN, Li et al. 2021, Algorithm
    1), or patterns of names of which the last match decides and "!" excludes: ["*", "!head.*"], ["*lora_*"]. Raises
    ConfigError for a pattern that matches nothing, where there is no batch normalization to leave out, and when
    nothing is shared.
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
    """ConfigError for a model of which nothing is trained."""
    if not any(entry.trainable for entry in found):
        raise ConfigError("model: no parameter of it requires a gradient, so there is nothing to train")


def frozen_alone(found: Sequence[Entry]) -> set[str]:
    """The frozen parameters that are not shared: all silos have them as they began."""
    return {entry.name for entry in found if entry.kind == "rest"}


def _in_batch_norm(module: torch.nn.Module) -> set[int]:
    """The ids of what batch normalization trains and counts. ConfigError if there is none."""
    found = {id(slot.tensor) for m in module.modules() if isinstance(m, BATCH_NORM) for slot in slots(m)}
    if not found:
        raise ConfigError("exchange.parameters: all_but_batch_norm, but the model has no batch normalization")
    return found


def layout_of(found: Sequence[Entry], auxiliaries: Sequence[Auxiliary] = (), exact: Collection[str] = ()) -> Layout:
    """Where what lies in the vector that is exchanged: the shared ones dtype by dtype, then auxiliary vectors. `exact`
    are the names that no codec touches besides statistics and frozen parameters."""
    beside: list[Segment] = []
    start = 0
    for dtype in dict.fromkeys(e.dtype for e in found if e.kind in ("shared", "personal")):
        for entry in (e for e in found if e.kind == "shared" and e.dtype == dtype):
            stop, named = start + entry.num_elements, entry.buffer or entry.name in exact
            if start < stop and (named or not entry.trainable):
                averaged, still = not entry.trainable, not named
                variance = entry.buffer and entry.name.endswith("running_var")  # as all of torch's normalizations say
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
    """The shared ones that patterns name, of which the last match decides and "!" excludes. ConfigError for one that
    matches none."""
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
    """The dtype of `params_P`: float64 if any shared entry is, else float32."""
    return torch.float64 if any(e.dtype == torch.float64 and e.kind == "shared" for e in found) else torch.float32


def num_shared(found: Sequence[Entry]) -> int:
    """P: how many parameters are sent."""
    return sum(entry.num_elements for entry in found if entry.kind == "shared")


def one_vector(found: Sequence[Entry]) -> bool:
    """Are all shared entries of one dtype, that of `params_P`, so that a delta is one vector of the model's own?"""
    return {e.dtype for e in found if e.kind == "shared"} == {master_dtype(found)}


def signature(found: Sequence[Entry]) -> dict[str, list[object]]:
    """What must agree between a checkpoint and a model: shared and personal entries by name."""
    return {e.name: [str(e.dtype).removeprefix("torch."), list(e.shape), e.kind] for e in found if e.kind != "rest"}


def changed_entries(there: Mapping[str, object], found: Sequence[Entry]) -> list[str]:
    """In what a model differs from the one whose `signature` was kept."""
    here = signature(found)
    return [
        f"the model's {name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


Allocate = Callable[[int, torch.dtype], torch.Tensor]

COMPILED = 1 << 22  # elements from which on compiled passes are worth the second that numba takes to load


# Modules that code outside fedmpi has in its hands; kept here because a run may make its FlatModel anew.
_HANDED_OUT: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def compiled(vector_P: torch.Tensor) -> bool:
    """Whether compiled passes (kernels/vectors.py) work on the vector, and are worth it."""
    plain = vector_P.device.type == "cpu" and vector_P.dtype == torch.float32 and vector_P.is_contiguous()
    return plain and len(vector_P) >= COMPILED


class FlatModel:
    """The model of a rank. Its silos take turns in it: load, train, take the delta."""

    def __init__(
        self,
        module: torch.nn.Module,
        shared: str | Sequence[str] = "all",
        device: torch.device | str = "cpu",
        allocate: Allocate | None = None,
        layout: Layout | None = None,
    ) -> None:
        self._chosen = shared
        self.tied = ties(module)  # before it is moved, which takes apart what shares memory
        self.entries = entries(module, shared, self.tied)
        self.module = module.to(device)
        self.device = torch.device(device)
        self.dtype = master_dtype(self.entries)
        self.num_shared = num_shared(self.entries)
        self.layout = layout_of(self.entries) if layout is None else layout  # of the vector that takes the delta along
        self._behind = self.layout.size - self.num_shared  # elements behind the delta, where auxiliary vectors lie
        # Is the model trained in the memory that its delta and they travel out of, [P + A P]?
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
            # What is personal lies in memory of this process alone, wherever the shared slice may lie.
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
                    tensor.data = part.view(entry.shape)  # the object stays: ties and optimizers hold on to it
                    start += entry.num_elements
            self._shared.append(vectors[0])
            self._personal.append(vectors[1])
        if not self._in_place:
            self._travels = torch.zeros(self.num_shared + self._behind, dtype=self.dtype, device=self.device)
        self._integers = [tensors[e.name] for e in self.entries if e.kind == "integers"]
        retie(module, self.tied)
        self.tensors = {slot.name: slot.tensor for slot in slots(module)}  # as the module holds them, by every name
        self._views = {n: tie for n, tie in self.tied.items() if self.tensors[n] is not self.tensors[tie.owner]}
        self._places = Places(module, self.tied)
        self._places.watch(frozen_alone(self.entries))
        self._trained = [(t, t.requires_grad) for t in self.tensors.values() if isinstance(t, torch.nn.Parameter)]
        self._counted = [self.tensors[e.name] for e in self.entries if e.kind == "shared"]
        self._has_buffers = any(e.kind == "shared" and e.buffer for e in self.entries)
        self._versions: list[int] = []
        self._loaded: torch.Tensor | None = None  # what the model held when `_versions` were counted
        self._held: tuple[torch.Tensor, int] | None = None  # what `hold` was told, and how often it had been written
        self.lends = False  # may the exchange subtract the global parameters itself? Said anew every round
        self._lent: TrainedContribution | None = None  # whose delta was not taken when training ended
        self.first_personal = self.personal()  # what a silo starts from at its first participation

    def params(self) -> torch.Tensor:
        """A copy of the shared parameters, [P]."""
        self._places.settle()
        return torch.cat([part.to(self.dtype) for part in self._shared]) if self._shared else torch.zeros(0)

    def load(self, params_P: torch.Tensor) -> None:
        """The model's shared parameters become params_P, [P]. Copies nothing where `hold` said that they are, and
        neither has been written since."""
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
        """Note that the shared parameters of a large model equal params_P, [P]: the next `load` of the same memory need
        not copy. `release` must be called before anybody writes params_P: torch does not count what MPI, other
        processes and compiled passes write. `load` copies all the same once the module was handed out. `loaded`: they
        equal what was loaded last, unless the model was touched since."""
        large = self._in_place and compiled(params_P)
        if large and self.module not in _HANDED_OUT and not (loaded and self.touched):
            self._held = (params_P, params_P._version)
            self._versions, self._loaded = self._written(), params_P

    def release(self) -> None:
        """Forget what `hold` noted."""
        self._held = None

    def hand_out(self) -> torch.nn.Module:
        """The module, for code that may write into it at any time: every `load` copies from now on."""
        self._held = None
        _HANDED_OUT.add(self.module)
        return self.module

    def _holds(self, params_P: torch.Tensor) -> bool:
        if self._held is None or self.touched:
            return False
        held_P, version = self._held
        same = held_P.data_ptr() == params_P.data_ptr() and len(held_P) == len(params_P)
        return same and held_P._version == params_P._version == version

    def _written(self) -> list[int]:
        """How often each shared tensor has been written, as torch counts it."""
        return [tensor._version for tensor in self._counted]

    @property
    def touched(self) -> bool:
        """Whether a shared tensor was written since `load`. Buffers are compared by value: torch does not count what
        batch normalization writes."""
        if self._places.settle() or self._versions != self._written():
            return True
        if self._loaded is None or not self._has_buffers:
            return False
        buffers = [(self.tensors[entry.name], part) for entry, part in self._parts(self._loaded) if entry.buffer]
        return not all(torch.equal(tensor, part.to(tensor.dtype)) for tensor, part in buffers)

    def take_delta(self, params_P: torch.Tensor) -> torch.Tensor:
        """What was trained minus what `load(params_P)` had put there, [P], and behind it room for the auxiliary vectors
        of the layout, [Q]; in memory that the next `load` or `take_delta` reuses: the model is spent.

        Where the model is of half precision that is params_P rounded, so that a step of nothing is a delta of 0.
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
        """The contribution with what was trained minus what `load(params_P)` had put there.

        If the exchange subtracts by itself (`lends`), only the norm of the delta is measured. The delta is not taken
        before somebody reads it: until then the model's memory stands for it.
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
        """The model's memory is about to be written: a contribution that it stands for can give no delta any more."""
        if self._lent is not None:
            self._lent.take = None
            self._lent = None

    def as_loaded(self, params_P: torch.Tensor) -> torch.Tensor:
        """params_P as the model holds them once they are loaded, [P]: rounded where it is of half precision. Read
        only: they may be the same tensor."""
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
        """Each shared parameter that is trained, and its part of a vector, in its shape."""
        return [
            (cast(torch.nn.Parameter, self.tensors[entry.name]), part)
            for entry, part in self._parts(vector_P)
            if entry.trainable
        ]

    def shared(self, vector_P: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the module's shared parameters and buffers would be with this vector, by name: views where dtypes are
        the same. For torch.func.functional_call."""
        return self.with_views({entry.name: part.to(entry.dtype) for entry, part in self._parts(vector_P)})

    def with_views(self, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same and, for functional_call, what else of the module lies in the memory of those that are named."""
        views = {n: tie.of(named[tie.owner].detach()) for n, tie in self._views.items() if tie.owner in named}
        return named | views if views else named

    def _parts(self, vector_P: torch.Tensor) -> list[tuple[Entry, torch.Tensor]]:
        """Each shared entry and its part of a vector, in its shape."""
        found, start = [], 0
        for dtype in dict.fromkeys(e.dtype for e in self.entries if e.kind in ("shared", "personal")):
            for entry in self.entries:
                if entry.kind == "shared" and entry.dtype == dtype:
                    found.append((entry, vector_P[start : start + entry.num_elements].view(entry.shape)))
                    start += entry.num_elements
        return found

    def named(self, vector_P: torch.Tensor, kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All that is shared, personal or an integer, by name and in its shape: views of a vector and of what
        `personal` gave."""
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
        """A copy of what a silo keeps to itself; empty for most models. Halves as float32, which holds them exactly."""
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
        """Does a silo keep parameters or floating buffers to itself?"""
        return any(len(part) for part in self._personal)

    def is_personal(self, kept: Mapping[str, torch.Tensor]) -> bool:
        """Are a silo's own parameters or floating buffers there, as after its first participation?"""
        return any(_personal(i) in kept for i in range(len(self._personal)))

    def load_personal(self, kept: Mapping[str, torch.Tensor]) -> None:
        """Put back what `personal` gave; without it, what the model started with. Buffers that are not saved, and
        tensors that are plain attributes, become what they were at first: they go from no silo to another."""
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
        """Bring back into the vectors what a forward pass has assigned anew. ConfigError for what cannot be."""
        self._places.settle()

    def thaw(self) -> None:
        """What is trained is what was at first: a forward pass may have frozen parameters, or thawed them."""
        for tensor, trained in self._trained:
            if tensor.requires_grad is not trained:
                tensor.requires_grad_(trained)

    def twin(self) -> FlatModel:
        """The same model in memory of its own."""
        self._places.reset()  # what is not saved is as it was at first there too
        module = copy.deepcopy(self.module)
        retie(module, self.tied)
        found = FlatModel(module, self._chosen, self.device)
        found.first_personal = self.first_personal
        return found

    def leave(self) -> None:
        """The model gets memory of its own: the exchange's goes with the run."""
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
    """What a silo keeps its personal parameters and buffers of one dtype under."""
    return f"{RESERVED}personal_{number}"


def _integers(dtype: torch.dtype) -> str:
    """What a silo keeps its integer buffers of a dtype under."""
    return f"{RESERVED}integers_{str(dtype).removeprefix('torch.')}"


def _next(whole: torch.Tensor, entry: Entry, name: str, starts: dict[str, int]) -> torch.Tensor:
    """The part of a vector where the next entry begins; the start that goes by the name moves on."""
    start = starts.get(name, 0)
    starts[name] = start + entry.num_elements
    return whole[start : start + entry.num_elements].view(entry.shape)


def sha256(params_P: torch.Tensor) -> str:
    """The SHA-256 of the vector's bytes, little-endian: two runs agree bit for bit when these agree."""
    return hashlib.sha256(params_P.detach().cpu().contiguous().numpy().data).hexdigest()
