"""State that outlives a round: one protocol for whatever has some, so that a checkpoint is a loop over holders.

    replicated   all ranks have the same; what rank 0 has is written
    sharded      every rank has its shard of a vector, as the exchange divides it: a part, all of it, or nothing
    root         rank 0 alone has it
    per_silo     it belongs to a silo, and the rank that hosts the silo has it

A checkpoint holds whole tensors, whatever their placement. So a run resumes with another plan, on other ranks, and
with silos on other ranks: a tensor is placed as the run that resumes places it. A holder is part of every checkpoint
once it is in `holders` (keeper.py), or in the `holders` of an exchange.
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

    key: Key  # any strings; a holder gives a key once, or once for each silo
    tensor: torch.Tensor  # what this rank has of it
    placement: Placement = "replicated"
    silo: str = ""  # whose it is, where the placement is per_silo
    grows: bool = False  # may its size change from round to round, and may it come and go? Not for per_silo, which may


class Holder(Protocol):
    """Something that keeps tensors from round to round."""

    def state(self) -> Iterable[StateTensor]:
        """What the next round depends on. A call of all ranks, with the same sharded tensors in the same order."""
        ...

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Go on from what `state` gave when the checkpoint was written: this rank's part of it, silos that it hosts.

        Tensors are in host memory and may be kept. A sharded one that `state` gives has been filled in place. A call of
        all ranks.
        """
        ...


class Sharding(Protocol):
    """How vectors of the server's state are divided among ranks (exchange/base.py)."""

    def shard(self, vector_P: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a vector."""
        ...

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """On rank 0 the vector of which every rank has its shard. A call of all ranks."""
        ...

    def scatter(self, whole_P: torch.Tensor | None, part: torch.Tensor) -> None:
        """`part` becomes this rank's shard of the vector that rank 0 has. A call of all ranks."""
        ...


# ---------------------------------------------------------------- holders


def under(name: str, tensors: Iterable[StateTensor]) -> Iterator[StateTensor]:
    """The tensors with a name in front of their keys."""
    return (found._replace(key=(name, *found.key)) for found in tensors)


def within(name: str, stored: Iterable[StateTensor]) -> list[StateTensor]:
    """Those with that name in front of their keys, without it."""
    return [found._replace(key=found.key[1:]) for found in stored if found.key[0] == name]


class Holders(dict[str, Holder]):
    """Holders by name, which are one holder together: the name stands in front of every key."""

    def state(self) -> Iterator[StateTensor]:
        """What all of them keep."""
        for name, holder in self.items():
            yield from under(name, holder.state())

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Each takes what is its own."""
        for found in stored:
            if found.key[0] not in self:
                raise ConfigError(f"the checkpoint's {'/'.join(found.key)} is not of this run")
        for name, holder in self.items():
            holder.restore(within(name, stored))


class Vectors:
    """Tensors by name, in memory that stays where it is."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], placement: Placement) -> None:
        self.tensors, self.placement = tensors, placement

    def state(self) -> Iterator[StateTensor]:
        """All of them."""
        return (StateTensor((name,), tensor, self.placement) for name, tensor in self.tensors.items())

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Into the same memory."""
        for (name,), tensor, *_ in stored:
            self.tensors[name].copy_(tensor)


class OfSilos:
    """One tensor for each of some silos, on a device; `rows` is the dict that its owner uses."""

    def __init__(self, name: str, rows: dict[str, torch.Tensor], device: torch.device) -> None:
        self.name, self.rows, self.device = name, rows, device

    def state(self) -> Iterator[StateTensor]:
        """Those of this rank's silos."""
        return (StateTensor((self.name,), tensor, "per_silo", silo) for silo, tensor in self.rows.items())

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Those of the silos that this rank hosts now."""
        self.rows.clear()
        self.rows.update({found.silo: found.tensor.to(self.device) for found in stored})


class Arrays:
    """Arrays by name, alike on all ranks, which may grow, come and go: what a selector keeps."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = dict(arrays)

    def state(self) -> Iterator[StateTensor]:
        """All of them. Raises CheckpointError for what is no number."""
        return (StateTensor((name,), _numbers(name, self.arrays[name]), grows=True) for name in sorted(self.arrays))

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Those of the checkpoint, whatever there was."""
        self.arrays = {name: tensor.numpy() for (name,), tensor, *_ in stored}


def _numbers(name: str, array: Any) -> torch.Tensor:
    try:
        return torch.from_numpy(np.asarray(array))
    except TypeError:
        raise CheckpointError(f"'{name}' is kept as {np.asarray(array).dtype}, which is no number") from None


# ---------------------------------------------------------------- from ranks to whole tensors, and back


def gathered(holder: Holder, sharding: Sharding, rank: int) -> list[StateTensor]:
    """What this rank writes into a checkpoint: its silos' tensors, and on rank 0 all others, whole. A call of all
    ranks."""
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
    """Of the whole tensors that rank 0 has read, what this rank has of them in this run. A call of all ranks.

    Raises ConfigError, alike on all ranks, where the checkpoint has other tensors than this run.
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
            part = here[key].tensor if key in here else torch.empty_like(sharding.shard(meta), device="cpu")
            sharding.scatter(tensor, part)
            tensor = part
        elif placement == "replicated":
            tensor = torch.empty_like(meta, device="cpu") if tensor is None else tensor
            comm.bcast(tensor.reshape(-1).view(torch.uint8))
        if tensor is not None:
            taken.append(StateTensor(key, tensor, placement))
    return taken


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def handed_over(orphans: Sequence[StateTensor], comm: Comm) -> list[StateTensor]:
    """On rank 0 the tensors of silos for which the ranks that host them have no use in this run, but rank 0 has. A call
    of all ranks."""
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
    """ConfigError unless these tensors are there, with what grows and no others. `first`: is this rank 0?"""
    for key, one in here.items():
        if one.grows:
            continue
        name, mine = "/".join(key), f"{one.tensor.dtype} of {list(one.tensor.shape)}"
        if (there := stored.get(key)) is None:
            raise ConfigError(f"the checkpoint's {name} is absent, this run's {mine}")
        # On the device `meta` a vector has a length and takes no memory.
        part = sharding.shard(there) if one.placement == "sharded" else there
        if (part.dtype, part.shape) != (one.tensor.dtype, one.tensor.shape):
            raise ConfigError(f"the checkpoint's {name} is {there.dtype} of {list(there.shape)}, this run's {mine}")
    for key in stored.keys() - here.keys() - optional if first else ():
        raise ConfigError(f"the checkpoint's {'/'.join(key)} is not of this run")
