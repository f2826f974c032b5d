"""The exchange: the one place where contributions cross ranks.

    root         Reduce to rank 0, step there, Bcast of the parameters (the classic server)
    replicated   Allreduce, every rank takes the same step
    window       ranks of one node: every rank owns 1/n of the coordinates, adds them up straight out of the others'
                 shared memory, steps them, and writes where all read. Parameters and server state are there once per
                 node, whatever the number of ranks; nothing is sent

A rank folds its silos into one weighted partial sum before anything is sent, so the cost depends on ranks, not on
silos. What is sent is sum_k (w_k/W) delta_k, W the weight of all silos of the run, with sum_k w_k/W as one more
element, and the receiver divides: a silo that is late or left out needs no second message.

    fast           the sum in the vectors' own dtype; same bits for the same number of ranks
    reproducible   the sum in the ring of integers modulo 2^64, where order does not matter: same bits for any number
                   of ranks. A silo's weighted delta is encoded by itself, in units of 2^-44, on a scale that depends
                   on nothing: room for sums up to 2^18 (norms of single deltas beyond it are rejected), 6e-14 apart.

Vectors live on the rank's device; where that is a GPU they pass through page-locked host memory, whole.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
import torch

from fedmpi.comm import Solo
from fedmpi.components import component
from fedmpi.errors import ExchangeError
from fedmpi.flat import sha256
from fedmpi.server import ServerOptimizer
from fedmpi.types import Contribution

UNIT = 2.0**44  # ring integers per 1.0
LARGEST_NORM = 2.0**18  # a delta beyond this is absurd, and more than the ring has room for
_BLOCK = 1 << 18  # elements encoded at a time, so that scratch stays in cache

PlanName = Literal["root", "replicated", "window"]


@component
class ExchangeSection:
    """How updates cross ranks."""

    plan: PlanName = "replicated"  # root: rank 0 steps; replicated: all step; window: one node's shared memory
    reduction: Literal["fast", "reproducible"] = "fast"  # reproducible: same bits for any number of ranks
    parameters: Annotated[str | list[str], pydantic.Field(union_mode="left_to_right")] = (
        "all"  # all, trainable or patterns
    )
    scope: Literal["rank"] = "rank"  # the silos of a rank are folded into one sum before anything is sent
    verify: bool = False  # compare the parameters' SHA-256 across ranks after every round

    @pydantic.model_validator(mode="after")
    def _known_word(self) -> ExchangeSection:
        if isinstance(self.parameters, str) and self.parameters not in ("all", "trainable"):
            raise ValueError(f"exchange.parameters is all, trainable or a list of patterns, got '{self.parameters}'")
        return self


@dataclass(frozen=True)
class Traffic:
    """Vector payload of one round, in bytes over all ranks."""

    up: int
    down: int
    collectives: str


def traffic(section: ExchangeSection, num_params: int, param_bytes: int, num_ranks: int) -> Traffic:
    """What a round of this plan sends. A buffer that stays on its rank is not traffic.

    >>> traffic(ExchangeSection(plan="root"), 1000, 4, 4)
    Traffic(up=12012, down=12000, collectives='Reduce + Bcast')
    """
    sums = (num_params + 1) * (8 if section.reduction == "reproducible" else param_bytes)
    if num_ranks == 1:
        return Traffic(0, 0, "none")
    if section.plan == "window":
        return Traffic(0, 0, "shared memory of one node")
    if section.plan == "root":
        others = num_ranks - 1
        return Traffic(others * sums, others * num_params * param_bytes, "Reduce + Bcast")
    return Traffic(num_ranks * sums, num_ranks * sums, "Allreduce")


def vectors_in_memory(section: ExchangeSection, num_params: int, param_bytes: int) -> int:
    """Bytes of the exchange's own buffers on a rank: what it sends, what it receives, and the mean out of a ring."""
    if section.plan == "window":
        return (num_params + 1) * (8 if section.reduction == "reproducible" else param_bytes)
    if section.reduction == "reproducible":
        return 2 * (num_params + 1) * 8 + num_params * param_bytes
    return 2 * (num_params + 1) * param_bytes


class Exchange:
    """One round's sums, from `begin` over `add` to `finish`; buffers are allocated once."""

    def __init__(self, section: ExchangeSection, comm: Solo, params_P: torch.Tensor, total_weight: float) -> None:
        self.section = section
        self.comm = comm
        self.total_weight = total_weight
        self.num_params = len(params_P)
        self.dtype, device = params_P.dtype, params_P.device
        self.ring = section.reduction == "reproducible"
        sum_dtype = torch.int64 if self.ring else self.dtype
        self._on_device = device.type != "cpu"
        self.window = section.plan == "window"
        if self.window:
            self._sums = comm.shared(self.num_params + 1, sum_dtype)
            self._send = self._sums[comm.rank]
            self._heads = comm.shared(2, torch.float64)  # of each rank: weight, and is its delta to be read in place?
            self._deltas: list[torch.Tensor] = []
            self._part_sum = torch.zeros(_BLOCK, dtype=sum_dtype)
            self._recv = self._part_mean = torch.zeros(_BLOCK, dtype=self.dtype)
        else:
            self._recv = comm.allocate(self.num_params + 1, sum_dtype, pinned=self._on_device)
            self._send = comm.allocate(self.num_params + 1, sum_dtype, pinned=self._on_device)
        # Sums are folded where silos train.
        self._sum = torch.zeros_like(self._send, device=device) if self._on_device else self._send
        self._host_P = comm.allocate(self.num_params, self.dtype, pinned=True) if self._on_device else None
        whole_mean = (self.ring or self._on_device) and not self.window
        self._mean_P = torch.zeros_like(params_P) if whole_mean else self._recv[: self.num_params]
        if self.ring:
            self._float = torch.zeros(_BLOCK, dtype=torch.float64, device=device)
            self._int = torch.zeros(_BLOCK, dtype=torch.int64, device=device)
        self._empty = True

    def lend(self, deltas: list[torch.Tensor]) -> None:
        """Shared vectors, one per rank, in which deltas come: where a rank has but one, the others read it there."""
        self._deltas = deltas

    def begin(self, num_contributions: int = 2) -> None:
        """Forget the last round. Of a rank's only contribution the delta stays as it is until `finish`."""
        self._empty = True
        if self.window:
            self._heads[self.comm.rank].zero_()
            self._in_place = num_contributions == 1 and bool(self._deltas) and not self.ring

    def add(self, contribution: Contribution) -> None:
        """Fold one silo's delta into this rank's sum; its memory is free afterwards."""
        share = contribution.weight / self.total_weight
        sum_P, delta_P = self._sum[: self.num_params], contribution.delta_P
        if self.window:
            in_place = self._in_place and delta_P.data_ptr() == self._deltas[self.comm.rank].data_ptr()
            head = self._heads[self.comm.rank]
            head[0] += share
            head[1] = in_place
            if in_place:
                self._empty = False
                return
        if self.ring:
            if self._empty:
                self._sum.zero_()
            for start in range(0, self.num_params, _BLOCK):
                part = slice(start, min(start + _BLOCK, self.num_params))
                exact, whole = self._float[: part.stop - start], self._int[: part.stop - start]
                exact.copy_(delta_P[part]).mul_(share * UNIT).round_()
                sum_P[part].add_(whole.copy_(exact))
            self._sum[self.num_params] += round(share * UNIT)
        elif self._empty:
            torch.mul(delta_P, share, out=sum_P)
            self._sum[self.num_params] = share
        else:
            sum_P.add_(delta_P, alpha=share)
            self._sum[self.num_params] += share
        self._empty = False

    @property
    def steps_here(self) -> bool:
        """Does this rank hold the server optimizer's state?"""
        return self.section.plan != "root" or self.comm.rank == 0

    def home(self, params_P: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        """Parameters and server state in the memory where the plan keeps them. A call of all ranks."""
        if not self.window:
            return params_P, state
        shared = [self._shared(tensor) for tensor in (params_P, *state)]
        self.comm.meet()
        return shared[0], type(state)(*shared[1:])

    def _shared(self, tensor: torch.Tensor) -> torch.Tensor:
        """One copy for the node; every rank touches its part first, so that it lies near the rank that will step it."""
        there = self.comm.shared(len(tensor), tensor.dtype, owner=0)[0]
        part = shard(len(tensor), self.comm.rank, self.comm.size)
        there[part].copy_(tensor[part])
        return there

    def fingerprint(self, round: int, cohort: list[str]) -> float:
        """32 bits over what ranks must agree on before vectors travel; exact as a float64."""
        facts = (round, self.section.plan, self.section.reduction, self.num_params, str(self.dtype), cohort)
        return float(zlib.crc32(repr(facts).encode()))

    def finish(
        self, params_P: torch.Tensor, optimizer: ServerOptimizer, state: Any, lap: Any = lambda phase: None
    ) -> tuple[torch.Tensor, Any]:
        """All ranks together: sum, mean, server step. params_P is overwritten with the new parameters on every rank."""
        if self.window:
            return self._finish_in_window(params_P, optimizer, state, lap)
        if self._empty:
            self._sum.zero_()
        if self._on_device:
            self._send.copy_(self._sum)
        if self.section.plan == "replicated":
            self.comm.allreduce(self._send, self._recv)
        else:
            self.comm.reduce(self._send, self._recv)
        lap("exchange")
        if self.steps_here:
            new_P, state = optimizer.step(params_P, self._mean(), state)
            params_P.copy_(new_P)
        lap("step")
        if self.section.plan == "root":
            host_P = params_P if self._host_P is None else self._host_P
            if self._host_P is not None and self.steps_here:
                host_P.copy_(params_P)
            self.comm.bcast(host_P)
            if host_P is not params_P:
                params_P.copy_(host_P)
            lap("exchange")
        if self.section.verify:
            self._verify(params_P)
            lap("exchange")
        return params_P, state

    def _finish_in_window(
        self, params_P: torch.Tensor, optimizer: ServerOptimizer, state: Any, lap: Any
    ) -> tuple[torch.Tensor, Any]:
        """My coordinates: added up in rank order, divided, stepped, written where everybody reads; block by block."""
        self.comm.meet()
        given: list[tuple[torch.Tensor, float]] = []
        weight = 0.0
        for rank, (share, in_place) in enumerate(head.tolist() for head in self._heads):
            if share:
                given.append((self._deltas[rank], share) if in_place else (self._sums[rank], 1.0))
                weight += share
        if self.ring:
            weight = float(sum(sums[self.num_params] for sums, _ in given))
        mine = shard(self.num_params, self.comm.rank, self.comm.size)
        for start in range(mine.start, mine.stop, _BLOCK):
            part = slice(start, min(start + _BLOCK, mine.stop))
            total, mean = self._part_sum[: part.stop - start], self._part_mean[: part.stop - start]
            if self.ring:
                total.copy_(given[0][0][part])
                for sums, _ in given[1:]:
                    total.add_(sums[part])
                mean.copy_(self._float[: part.stop - start].copy_(total).div_(weight))
            else:
                torch.mul(given[0][0][part], given[0][1] / weight, out=mean)
                for sums, share in given[1:]:
                    mean.add_(sums[part], alpha=share / weight)
            new_S, _ = optimizer.step(params_P[part], mean, type(state)(*(tensor[part] for tensor in state)))
            params_P[part].copy_(new_S)
        lap("step")
        self.comm.meet()
        lap("exchange")
        if self.section.verify:
            self._verify(params_P)
        return params_P, state

    def _mean(self) -> torch.Tensor:
        weight = float(self._recv[self.num_params])
        if weight == 0.0:
            raise ExchangeError("no weight arrived: nothing to divide by")
        if not self.ring:
            if self._on_device:
                self._mean_P.copy_(self._recv[: self.num_params])
            return self._mean_P.div_(weight)
        for start in range(0, self.num_params, _BLOCK):
            part = slice(start, min(start + _BLOCK, self.num_params))
            exact = self._float[: part.stop - start]
            self._mean_P[part].copy_(exact.copy_(self._recv[part]).div_(weight))
        return self._mean_P

    def _verify(self, params_P: torch.Tensor) -> None:
        self.comm.same("exchange.verify: the parameters", bytes.fromhex(sha256(params_P)))


def shard(num_elements: int, rank: int, num_ranks: int) -> slice:
    """The coordinates that a rank owns: equal parts of whole pages, the last one what is left.

    >>> shard(10_000, 1, 2)
    slice(4096, 10000, None)
    """
    page = 1024
    cut = num_elements // num_ranks // page * page
    return slice(rank * cut, num_elements if rank == num_ranks - 1 else (rank + 1) * cut)
