"""State that outlives a round. All its owners follow one protocol, so a checkpoint is a loop over holders.

    replicated   equal on all ranks; rank 0's copy is written
    sharded      each rank has its shard of a vector, as the exchange divides it: a part, all of it, or nothing
    root         on rank 0 only
    per_silo     belongs to a silo, on the rank that hosts the silo

A checkpoint holds whole tensors for every placement, so a run may resume with another plan, other ranks, or silos on
other ranks. A holder is part of every checkpoint once it is in `holders` (keeper.py), or in the `holders` of an
exchange.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch

from fedmpi.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from fedmpi.comm import Comm

Key = tuple[str, ...]
Placement = Literal["replicated", "sharded", "root", "per_silo"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


class StateTensor(NamedTuple):
    """One tensor that the next round depends on."""

    key: Key  # any strings, unique per holder (per_silo: per silo)
    tensor: torch.Tensor  # this rank's part
    placement: Placement = "replicated"
    silo: str = ""  # the owner, for per_silo
    grows: bool = False  # its size may change, and it may come and go; per_silo tensors always may


class Holder(Protocol):
    """Keeps tensors from round to round."""

    def state(self) -> Iterable[StateTensor]:
        """The tensors that the next round depends on. Collective: all ranks give the same sharded tensors, in the same
        order."""
        ...

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Continue from the tensors that `state` gave when the checkpoint was written: this rank's part, and its silos.

        Tensors are in host memory and may be kept. Sharded ones that `state` gives are already filled in place.
        Collective.
        """
        ...


class Sharding(Protocol):
    """Divides vectors of the server's state among ranks (exchange/base.py)."""

    def shard(self, vector_P: torch.Tensor) -> torch.Tensor:
        """This rank's shard of a vector."""
        ...

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """The whole vector, on rank 0, from every rank's shard. Collective."""
        ...

    def scatter(self, whole_P: torch.Tensor | None, part: torch.Tensor) -> None:
        """Write this rank's shard of rank 0's vector into `part`. Collective."""
        ...


# ---------------------------------------------------------------- holders


def under(name: str, tensors: Iterable[StateTensor]) -> Iterator[StateTensor]:
    """The tensors with `name` before their keys."""
    return (found._replace(key=(name, *found.key)) for found in tensors)


def within(name: str, stored: Iterable[StateTensor]) -> list[StateTensor]:
    """The tensors whose keys begin with `name`, without it."""
    return [found._replace(key=found.key[1:]) for found in stored if found.key[0] == name]


class Holders(dict[str, Holder]):
    """Holders by name, together one holder; the name is put before their keys."""

    def state(self) -> Iterator[StateTensor]:
        """The tensors of all holders."""
        for name, holder in self.items():
            yield from under(name, holder.state())

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Give each holder its tensors. Raises ConfigError for a tensor that no holder owns."""
        for found in stored:
            if found.key[0] not in self:
                raise ConfigError(f"the checkpoint's {'/'.join(found.key)} is not of this run")
        for name, holder in self.items():
            holder.restore(within(name, stored))


class Vectors:
    """A holder of tensors by name; `restore` copies into the same memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], placement: Placement) -> None:
        self.tensors, self.placement = tensors, placement

    def state(self) -> Iterator[StateTensor]:
        """All tensors."""
        return (StateTensor((name,), tensor, self.placement) for name, tensor in self.tensors.items())

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Copy the stored tensors into the same memory."""
        for (name,), tensor, *_ in stored:
            self.tensors[name].copy_(tensor)


class OfSilos:
    """A holder of one tensor per silo, on a device; `rows` is its owner's dict, by silo."""

    def __init__(self, name: str, rows: dict[str, torch.Tensor], device: torch.device) -> None:
        self.name, self.rows, self.device = name, rows, device

    def state(self) -> Iterator[StateTensor]:
        """The tensors of this rank's silos."""
        return (StateTensor((self.name,), tensor, "per_silo", silo) for silo, tensor in self.rows.items())

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Replace them by the tensors of the silos that this rank hosts now."""
        self.rows.clear()
        self.rows.update({found.silo: found.tensor.to(self.device) for found in stored})


class Arrays:
    """A holder of arrays by name, equal on all ranks, that may grow, come and go: a selector's state."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = dict(arrays)

    def state(self) -> Iterator[StateTensor]:
        """All arrays. Raises CheckpointError for an array that is not numeric."""
        return (StateTensor((name,), _numbers(name, self.arrays[name]), grows=True) for name in sorted(self.arrays))

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Replace all arrays by those of the checkpoint."""
        self.arrays = {name: tensor.numpy() for (name,), tensor, *_ in stored}


def _numbers(name: str, array: Any) -> torch.Tensor:
    try:
        return torch.from_numpy(np.asarray(array))
    except TypeError:
        raise CheckpointError(f"'{name}' is kept as {np.asarray(array).dtype}, which is not a number") from None


# ---------------------------------------------------------------- from ranks to whole tensors, and back


def gathered(holder: Holder, sharding: Sharding, rank: int) -> list[StateTensor]:
    """The tensors that this rank writes into a checkpoint: its silos', and on rank 0 all others, whole. Collective.
    Raises ValueError for a key given twice."""
    found = list(holder.state())
    for (key, silo), times in Counter((one.key, one.silo) for one in found).items():
        if times > 1:
            raise ValueError(f"{'/'.join(key)}{f' of silo {silo}' if silo else ''} is kept twice under one key")
    written = []
    for one in found:
        if one.placement == "sharded":
            one = one._replace(tensor=sharding.gather(one.tensor))
        if rank == 0 or one.placement == "per_silo":
            written.append(one)
    return written


def scattered(stored: Sequence[StateTensor], holder: Holder, sharding: Sharding, comm: Comm) -> list[StateTensor]:
    """This rank's part of the whole tensors that rank 0 has read. Collective.

    Raises ConfigError on every rank if the checkpoint has other tensors than this run.
    """
    here = {one.key: one for one in holder.state() if one.placement != "per_silo"}
    told: list[tuple[Key, str, list[int], Placement, bool]] = [
        (s.key, _name(s.tensor.dtype), [*s.tensor.shape], here.get(s.key, s).placement, s.grows) for s in stored
    ]
    told = json.loads(comm.broadcast_text(json.dumps(told), 0))
    shapes = {
        tuple(key): torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, dtype, shape, *_ in told
    }
    optional = {tuple(key) for key, *_, grows in told if grows}
    comm.collectively(lambda: _expect(shapes, optional, here, sharding, comm.rank == 0))
    taken = []
    for number, (key, _, _, placement, _) in enumerate(told):
        key, tensor = tuple(key), stored[number].tensor if comm.rank == 0 else None
        meta = shapes[key]
        if placement == "sharded":
            part = here[key].tensor if key in here else _on_cpu(sharding.shard(meta))
            sharding.scatter(tensor, part)
            tensor = part
        elif placement == "replicated":
            tensor = _on_cpu(meta) if tensor is None else tensor
            comm.bcast(tensor.reshape(-1).view(torch.uint8))
        if tensor is not None:
            taken.append(StateTensor(key, tensor, placement))
    return taken


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def handed_over(orphans: Sequence[StateTensor], comm: Comm) -> list[StateTensor]:
    """Move per-silo tensors that their ranks no longer need, the `orphans`, to rank 0, which does need them. Returns
    them on rank 0, else an empty list. Collective."""
    taken = [*orphans] if comm.rank == 0 else []
    for owner in np.flatnonzero(comm.gather_number(len(orphans))).tolist():
        if owner == 0:
            continue
        told = [(one.key, one.silo, _name(one.tensor.dtype), [*one.tensor.shape]) for one in orphans]
        for number, (key, silo, dtype, shape) in enumerate(json.loads(comm.broadcast_text(json.dumps(told), owner))):
            mine = comm.rank == owner
            tensor = orphans[number].tensor if mine else torch.empty(shape, dtype=getattr(torch, dtype))
            comm.bcast(tensor.reshape(-1).view(torch.uint8), owner)
            if comm.rank == 0:
                taken.append(StateTensor(tuple(key), tensor, "per_silo", silo))
    return taken


def _expect(
    stored: Mapping[Key, torch.Tensor],
    optional: set[Key],
    here: Mapping[Key, StateTensor],
    sharding: Sharding,
    first: bool,
) -> None:
    """Raise ConfigError unless the checkpoint has exactly this run's tensors; growing ones are optional. On other ranks
    than rank 0 (`first`) extra tensors are allowed."""
    for key, one in here.items():
        if one.grows:
            continue
        name, mine = "/".join(key), f"{one.tensor.dtype} of {list(one.tensor.shape)}"
        if (there := stored.get(key)) is None:
            raise ConfigError(f"the checkpoint's {name} is absent, this run's {mine}")
        # Tensors on the device `meta` take no memory.
        part = sharding.shard(there) if one.placement == "sharded" else there
        if (part.dtype, part.shape) != (one.tensor.dtype, one.tensor.shape):
            raise ConfigError(f"the checkpoint's {name} is {there.dtype} of {list(there.shape)}, this run's {mine}")
    for key in stored.keys() - here.keys() - optional if first else ():
        raise ConfigError(f"the checkpoint's {'/'.join(key)} is not of this run")


def _on_cpu(meta: torch.Tensor) -> torch.Tensor:
    """A tensor like one on the meta device. `empty_like` would import sympy, which takes a second."""
    return torch.empty(meta.shape, dtype=meta.dtype)
