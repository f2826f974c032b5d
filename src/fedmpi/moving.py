"""Moves the state of silos between ranks over the communicator when the membership changes, without a disk.

A silo that leaves takes its state with it. State that is stored under one silo for all of its rank (the residual of the
rank's sum, `scope: rank`) stays in the federation: it goes to the first remaining silo of the same rank, or else to the
first member.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from fedmpi.comm import Comm
from fedmpi.exchange.chunks import OF_RANK
from fedmpi.membership import Membership
from fedmpi.state import StateTensor

CHUNK_BYTES = 64 << 20  # bytes that a rank sends at a time


def heirs(before: Membership, after: Membership) -> dict[str, str]:
    """For every silo that leaves, the member that inherits what it stored for its rank.

    >>> before = Membership(0, {"a": (0,), "b": (1,), "c": (1,)})
    >>> heirs(before, before.without("a")), heirs(before, before.without("b"))
    ({'a': 'b'}, {'b': 'c'})
    """
    beside: dict[tuple[int, ...], str] = {}  # the first remaining silo of each team
    for silo, team in before.teams.items():
        if silo in after.teams:
            beside.setdefault(team, silo)
    gone = {silo: team for silo, team in before.teams.items() if silo not in after.teams}
    return {silo: beside.get(team, after.ids[0]) for silo, team in gone.items()}


def remaining(tensors: Iterable[StateTensor], before: Membership, heir_of: Mapping[str, str]) -> list[StateTensor]:
    """The tensors without those of silos that left, in the order of the silos before.

    What a silo that left had stored for its rank remains. The order makes sums of it reproducible.
    """
    number = {silo: i for i, silo in enumerate(before.ids)}
    stays = (one for one in tensors if one.silo not in heir_of or (one.key[0] == "exchange" and OF_RANK in one.key))
    return sorted(stays, key=lambda one: number[one.silo])


def moved(
    tensors: Iterable[StateTensor], after: Membership, heir_of: Mapping[str, str], comm: Comm
) -> list[StateTensor]:
    """The tensors of the silos that this rank hosts in `after`, from those that it hosted before. Collective."""
    going: list[list[StateTensor]] = [[] for _ in range(comm.size)]
    for one in tensors:
        going[after.rank(heir_of.get(one.silo, one.silo))].append(one)
    staying, going[comm.rank] = going[comm.rank], []
    return staying + [one for packed in exchanged([*map(packed, going)], comm) for one in unpacked(packed)]


def exchanged(packed: Sequence[torch.Tensor], comm: Comm) -> list[torch.Tensor]:
    """The bytes that every rank packed for this one; `packed` holds one uint8 tensor per receiver. Collective."""
    lengths_RR = np.zeros((comm.size, comm.size))  # bytes from rank to rank
    lengths_RR[comm.rank] = [len(bytes_B) for bytes_B in packed]
    lengths_RR = comm.share(lengths_RR.reshape(-1)).reshape(lengths_RR.shape).astype(np.int64)
    arrived = [torch.empty(int(length), dtype=torch.uint8) for length in lengths_RR[:, comm.rank]]
    step = max(1, CHUNK_BYTES // comm.size)
    for start in range(0, int(lengths_RR.max(initial=0)), step):
        out, into = ([bytes_B[start : start + step] for bytes_B in some] for some in (packed, arrived))
        send, recv = torch.cat(out), torch.empty(sum(map(len, into)), dtype=torch.uint8)
        received = _side_by_side(into)
        comm.wait(comm.alltoall(send, _side_by_side(out), recv, received))
        for part, (first, length) in zip(into, received, strict=True):
            part.copy_(recv[first : first + length])
    return arrived


def _side_by_side(parts: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Start and length of each part, if they are concatenated."""
    lengths = [len(part) for part in parts]
    return [(sum(lengths[:i]), length) for i, length in enumerate(lengths)]


def packed(tensors: Sequence[StateTensor]) -> torch.Tensor:
    """Tensors as one uint8 tensor [B]: the length of a JSON list of keys, dtypes and shapes; the list; the data."""
    if not tensors:
        return torch.empty(0, dtype=torch.uint8)
    told = [
        (t.key, t.silo, t.placement, str(t.tensor.dtype).removeprefix("torch."), [*t.tensor.shape]) for t in tensors
    ]
    text = json.dumps(told).encode()
    head = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
    return torch.cat([head, *(one.tensor.detach().cpu().reshape(-1).view(torch.uint8) for one in tensors)])


def unpacked(bytes_B: torch.Tensor) -> list[StateTensor]:
    """The tensors that `packed` turned into bytes."""
    if not len(bytes_B):
        return []
    end = 8 + int.from_bytes(bytes_B[:8].numpy().tobytes(), "little")
    found = []
    for key, silo, placement, name, shape in json.loads(bytes_B[8:end].numpy().tobytes()):
        dtype: torch.dtype = getattr(torch, name)
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        tensor = bytes_B[start:end].clone().view(dtype).reshape(shape)  # the clone is aligned for any dtype
        found.append(StateTensor(tuple(key), tensor, placement, silo))
    return found
