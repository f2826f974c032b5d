"""Plan shared_memory: each rank sums its own coordinates directly from the other ranks' memory; nothing is sent.

Each of the n ranks owns 1/n of the coordinates. It sums them, takes the server's step, and writes the result to memory
that all ranks read. The node holds one copy of the parameters and of the server state, for any number of ranks.

A rank with one silo trains it in shared memory, where the others read its delta. The owners of the coordinates write
the new parameters there too, while the delta is in the cache, so the next round need not load them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from fedmpi.comm import Comm
from fedmpi.errors import ExchangeError
from fedmpi.exchange import weights
from fedmpi.exchange.base import BLOCK, Exchange, ExchangeContext, Lap, Machine, without
from fedmpi.exchange.cost import Cost, Sizes, Traffic, word_bytes
from fedmpi.flat import compiled
from fedmpi.server import Server
from fedmpi.types import Contribution

if TYPE_CHECKING:
    from fedmpi.exchange.config import ExchangeSection


# What a rank contributes: nothing, the sum of its silos, its only silo's delta, or that silo's trained parameters.
NOTHING, SUM, DELTA, TRAINED = -1, 0, 1, 2


class SharedMemory(Exchange):
    """On one node, each rank sums its coordinates directly from the others' memory and steps them; nothing is sent."""

    in_shared_memory: ClassVar[bool] = True

    @classmethod
    def supports(cls, section: ExchangeSection, machine: Machine) -> str:
        if why := without(section):
            return why
        if section.regions is not None:
            return "takes no regions"
        if section.overlap:
            return "takes no overlap, since it writes the parameters that silos are reading"
        if machine.on_device:
            return "works in host memory"
        return "" if machine.one_node else "needs all ranks on one node"

    @classmethod
    def suits(cls, machine: Machine, num_elements: int) -> str:
        return "one node" if machine.one_node else ""

    @classmethod
    def cost(cls, section: ExchangeSection, sizes: Sizes) -> Cost:
        memory = {"sum": (sizes.num_elements + 1) * word_bytes(section, sizes)}
        if sizes.rank == 0:  # one copy per node
            memory |= {"global parameters": sizes.vector_bytes, "server state": sizes.state_bytes}
        return Cost(Traffic(0, 0, 0, "shared memory of one node"), memory)

    params_placement = "root"  # all ranks read what rank 0 writes

    def __init__(self, section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext) -> None:
        super().__init__(section, comm, params_P, facts)
        self._sums = comm.shared(self.num_params, self.sum_dtype)
        # Per rank: the kind of its contribution, and its weight.
        self._heads = comm.shared(1 + weights.LIMBS, torch.float64)
        self._weight: float = 0  # of this rank's silos
        if compiled(params_P):
            from fedmpi.kernels import vectors  # noqa: F401 (loaded at set-up: a rank whose numba is broken fails here)
        self._untaken: Contribution | None = None  # the only one, if its delta is not taken yet
        self._deltas: list[torch.Tensor] = []
        self._total_B = torch.zeros(BLOCK, dtype=self.sum_dtype)
        self._mean_B = torch.zeros(BLOCK, dtype=self.dtype)

    @classmethod
    def shared_bytes(cls, section: ExchangeSection, params_P: torch.Tensor, states: int, first: bool) -> int:
        """Bytes of shared memory that a rank allocates; the `first` also holds parameters and the server's `states`."""
        integers = section.reduction == "reproducible" and section.scope == "rank"
        sums = 8 if integers else params_P.itemsize
        own = len(params_P) * (sums + params_P.itemsize)
        return own + (len(params_P) * params_P.itemsize * (1 + states) if first else 0)

    def delta(self) -> torch.Tensor:
        """Shared memory [P] for the model, where the others read the delta of a rank with one contribution."""
        self._deltas = self.comm.shared(self.num_params, self.dtype)
        return self._deltas[self.comm.rank]

    def home(self, params_P: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        shared = [self._shared(tensor) for tensor in (params_P, *state)]
        self.comm.barrier()
        return shared[0], type(state)(*shared[1:])

    def _shared(self, tensor: torch.Tensor) -> torch.Tensor:
        """One copy for the node. Each rank writes its part first, so that its pages lie near the rank (NUMA)."""
        there = self.comm.shared(len(tensor), tensor.dtype, owner=0)[0]
        part = shard(len(tensor), self.comm.rank, self.comm.size)
        there[part].copy_(tensor[part])
        return there

    def scatter(self, whole_P: torch.Tensor | None, part: torch.Tensor) -> None:
        if self.comm.rank == 0 and whole_P is not None:  # all ranks read what it writes
            part.copy_(whole_P)
        self.comm.barrier()

    def set_params(self, params_P: torch.Tensor, new_P: torch.Tensor | None) -> None:
        self.scatter(new_P, params_P)

    def begin(self, round: int = 0, num_contributions: int = 2, near: float = 1.0) -> None:
        super().begin(round, num_contributions, near)
        self._heads[self.comm.rank].zero_()
        self.wrote_model = False
        self._weight = 0
        self._only = num_contributions == 1 and bool(self._deltas) and not self.ring
        self.subtracts, self._untaken = self._only, None

    def add(self, contribution: Contribution) -> None:
        share, kind = self.share(contribution), SUM
        if contribution.untaken and self.subtracts:
            kind, self._untaken = TRAINED, contribution
        else:
            delta_P = contribution.vector_Q
            if self._only and delta_P.data_ptr() == self._deltas[self.comm.rank].data_ptr():
                kind = DELTA
            else:
                self.fold(self._sums[self.comm.rank], delta_P, share, empty=not self._weight)
        self._weight += self.weigh(share)
        self._tell(kind)

    def _tell(self, kind: int) -> None:
        """Write this rank's kind and weight where all ranks read them."""
        head = torch.tensor((kind, *self.cut(self._weight)), dtype=torch.float64)
        self._heads[self.comm.rank].copy_(head)

    def finish(
        self, params_P: torch.Tensor, server: Server, state: Any, lap: Lap = lambda phase: None
    ) -> tuple[torch.Tensor, Any]:
        """Sum this rank's coordinates in rank order, divide, step and write them for all ranks, block by block."""
        if self._weight:
            self.folded(self._sums[self.comm.rank])
        fused = server.adds and compiled(params_P)
        if self._untaken is not None:
            if not fused:
                self._untaken.vector_Q  # noqa: B018 (takes the delta)
                self._tell(DELTA)
            self._untaken = None
        self.comm.barrier()
        given: list[tuple[torch.Tensor, float]] = []  # by rank; weight 0: contributes nothing
        kinds: list[int] = []
        weight: float = 0
        for rank, (told, *limbs) in enumerate(head.tolist() for head in self._heads):
            share = self.joined(limbs)
            kind = int(told) if share else NOTHING
            given.append((self._deltas[rank], share) if kind > SUM else (self._sums[rank], float(bool(share))))
            kinds.append(kind)
            self.wrote_model |= kind > SUM and rank == self.comm.rank
            weight += share
        if not weight:
            raise ExchangeError("no weight arrived: nothing to divide by")
        mine = shard(self.num_params, self.comm.rank, self.comm.size)
        if fused:
            self._step_fused(params_P, given, kinds, weight, mine)
        else:
            models = [row for (row, _), kind in zip(given, kinds, strict=True) if kind > SUM]
            given = [one for one, kind in zip(given, kinds, strict=True) if kind != NOTHING]
            self._step(params_P, server, state, given, models, weight, mine)
        lap("step")
        self.comm.barrier()
        self.verify(params_P)
        lap("exchange")
        return params_P, state

    def _step(
        self,
        params_P: torch.Tensor,
        server: Server,
        state: Any,
        given: Sequence[tuple[torch.Tensor, float]],
        models: Sequence[torch.Tensor],
        weight: float,
        mine: slice,
    ) -> None:
        """Step this rank's coordinates `mine`, block by block; also writes the new parameters into `models`."""
        parts = [slice(start, min(start + BLOCK, mine.stop)) for start in range(mine.start, mine.stop, BLOCK)]
        means: list[torch.Tensor] = []
        if server.reads_norms:  # norms of the whole mean are needed before any step
            means = [self._mean(given, weight, part).clone() for part in parts]
            square = sum(server.look(mean, part.start) for mean, part in zip(means, parts, strict=True))
            server = server.knowing(float(self.comm.gather_number(square).sum()))
        for number, part in enumerate(parts):
            mean = means[number] if means else self._mean(given, weight, part)
            new_S, _ = server.step(params_P[part], mean, type(state)(*(tensor[part] for tensor in state)), part.start)
            params_P[part].copy_(new_S)
            for model in models:
                model[part].copy_(new_S)

    def _step_fused(
        self,
        params_P: torch.Tensor,
        given: Sequence[tuple[torch.Tensor, float]],
        kinds: Sequence[int],
        weight: float,
        mine: slice,
    ) -> None:
        """`_step` with the same bits in one compiled pass, for a server step that only adds the mean."""
        from fedmpi.kernels import vectors  # imported here, because numba takes a second to load

        rows = tuple(row[mine].numpy() for row, _ in given)
        factors = np.array([share / weight for _, share in given], np.float32)
        vectors.step(rows, factors, np.array(kinds), params_P[mine].numpy())

    def _mean(self, given: Sequence[tuple[torch.Tensor, float]], weight: float, part: slice) -> torch.Tensor:
        """A block of the mean; valid until the next call."""
        (first, first_share), *others = given
        total, mean = self._total_B[: part.stop - part.start], self._mean_B[: part.stop - part.start]
        if self.ring:
            total.copy_(first[part])
            for sums, _ in others:
                total.add_(sums[part])
            self.divide(total, weight, mean)
        else:
            torch.mul(first[part], first_share / weight, out=mean)
            for sums, share in others:
                mean.add_(sums[part], alpha=share / weight)
        return mean


def shard(num_elements: int, rank: int, num_ranks: int) -> slice:
    """The coordinates that a rank owns: equal parts in multiples of 1024; the last rank also owns the remainder.

    >>> shard(10_000, 1, 2)
    slice(4096, 10000, None)
    """
    page = 1024
    cut = num_elements // num_ranks // page * page
    return slice(rank * cut, num_elements if rank == num_ranks - 1 else (rank + 1) * cut)
