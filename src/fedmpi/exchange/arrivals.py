"""Updates that reach rank 0 one by one, in an order that the engine gives, for engines whose silos do not wait for each
other (rounds/asynchronous.py).

    a silo's rank   keeps each update of the round, encoded by the codec of `up`, until the round commits; then it sends
                    them, in order
    rank 0          adds each update to the buffer as it arrives: one pass over the vector. When all have arrived, the
                    server steps, and the new parameters are broadcast

The sum is in the order of arrival, so it has the same bits for any number of ranks. A round of a single update under
server.optimizer fedavg is one pass in all: w + lr s delta.

A silo whose training began before the last step starts from older parameters. They are kept here, one vector per silo
and shared among silos of one version, and are part of its state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from fedmpi.comm import Comm, Pending
from fedmpi.errors import ExchangeError
from fedmpi.exchange.base import BLOCK, MANY, Exchange, ExchangeContext, Lap, Machine, without
from fedmpi.exchange.cost import Cost, Sizes, Traffic
from fedmpi.server import Server
from fedmpi.state import OfSilos
from fedmpi.types import Contribution

if TYPE_CHECKING:
    from fedmpi.exchange.config import ExchangeSection


class _Kept(NamedTuple):
    """One of this rank's updates. A share of 0 says that it was rejected, and no vector follows."""

    share: float
    vector: torch.Tensor | None


class Runtime(Protocol):
    """What an engine keeps from round to round besides its state: threads, messages under way."""

    def settle(self) -> None:
        """Receive all messages under way. Collective."""

    def end(self) -> None:
        """End all threads; not collective."""


class Arrivals(Exchange):
    """Point to point to rank 0, in the order of arrival; rank 0 alone keeps the server's state and steps."""

    runtime: Runtime | None = None  # the engine's, ended with the exchange

    def __init__(self, section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext) -> None:
        super().__init__(section, comm, params_P, facts)
        self._starts: dict[str, torch.Tensor] = {}  # by silo: the parameters that it trains from, if not the newest
        self.holders["start"] = OfSilos("params", self._starts, self.device)
        self._kept: deque[_Kept] = deque()
        self._ranks: list[int] = []  # of the round's updates, in the order of arrival
        self._versions: dict[str, int] = {}  # by silo of this rank: the version that it trains from after the round
        length = self.num_params if comm.rank == 0 else 0
        self._sum = torch.zeros(length, dtype=self.dtype, device=self.device)
        self._first_P = self._sum  # of the updates in the buffer
        self._came = comm.allocate(length, self.dtype, pinned=self.device.type != "cpu")
        self._head = torch.zeros(1, dtype=torch.float64)
        self._weight, self._num = 0.0, 0  # of the updates in the buffer

    @classmethod
    def supports(cls, section: ExchangeSection, machine: Machine) -> str:
        return without(section)

    @classmethod
    def cost(cls, section: ExchangeSection, sizes: Sizes) -> Cost:
        """The bytes of a round whose updates come from all silos alike."""
        others, away = sizes.num_ranks - 1, sum(sizes.vectors[1:]) / max(1, sum(sizes.vectors))
        up = round(sizes.arrivals * away) * (sizes.vector_bytes + 8)
        own = {"global parameters": sizes.vector_bytes, "older parameters": sizes.hosted * sizes.vector_bytes}
        own |= {"updates of a round": sizes.hosted * sizes.vector_bytes}
        if sizes.rank == 0:
            own |= {"buffer": sizes.vector_bytes, "received": sizes.vector_bytes, "server state": sizes.state_bytes}
        return Cost(Traffic(up, others * sizes.vector_bytes, 0, "Send to rank 0 + Bcast"), own)

    @classmethod
    def link_bytes(cls, up_R: Any, down_R: Any, vector_bytes: int) -> float:
        return float(max(up_R.sum(), vector_bytes if len(up_R) > 1 else 0))

    # ------------------------------------------------------------ memory and state, as in plan `root`

    def shard(self, vector_P: torch.Tensor) -> torch.Tensor:
        return vector_P if self.comm.rank == 0 else vector_P[:0]

    def scatter(self, whole_P: torch.Tensor | None, part: torch.Tensor) -> None:
        if whole_P is not None:
            part.copy_(whole_P)

    # ------------------------------------------------------------ a round

    def begin(self, round: int = 0, num_contributions: int = 2, near: float = 1.0) -> None:
        super().begin(round, num_contributions, near)
        self._many = False  # it is summed in float64 from the first update beyond MANY on, however many were planned
        self._kept.clear()
        self._ranks.clear()
        self._weight, self._num = 0.0, 0

    def older(self, silo: str) -> torch.Tensor:
        """The parameters before the last step or an earlier one, from which the silo trains."""
        if silo not in self._starts:
            raise ExchangeError(f"the parameters that silo '{silo}' fetched are not kept")
        return self._starts[silo]

    def add(self, contribution: Contribution) -> None:
        vector_P = contribution.vector_Q
        self._kept.append(_Kept(self.share(contribution), vector_P.to("cpu", copy=True)))

    def reject(self) -> None:
        """Say that this rank's next update in the order of arrival was rejected."""
        self._kept.append(_Kept(0.0, None))

    def expect(self, ranks: Sequence[int]) -> None:
        """Add to the ranks of the round's updates, in the order of arrival. The same on all ranks."""
        self._ranks += ranks

    def fetched(self, versions: Mapping[str, int]) -> None:
        """The version that each silo trains from after the round, which makes version `round`."""
        self._versions = {silo: versions[silo] for silo in self.facts.hosted}

    def fingerprint(self, cohort: Sequence[str]) -> float:
        return super().fingerprint([*cohort, *map(str, self._ranks)])

    def declared(self, cohort: Sequence[str]) -> dict[str, Any]:
        return super().declared(cohort) | {"ranks of the arrivals": list(self._ranks)}

    def finish(
        self, params_P: torch.Tensor, server: Server, state: Any, lap: Lap = lambda phase: None
    ) -> tuple[torch.Tensor, Any]:
        self._keep_starts(params_P)
        if self.comm.rank == 0:
            for rank in self._ranks:
                self.take(rank)
        else:
            self._send()
        lap("exchange")
        if self.comm.rank == 0:
            state = self._step(params_P, server, state)
        lap("step")
        self.comm.bcast(params_P)
        self.verify(params_P)
        lap("exchange")
        return params_P, state

    def _keep_starts(self, params_P: torch.Tensor) -> None:
        """Keep the parameters before the step for silos that still train from them; forget those of the others."""
        before, copied_P = self.round - 1, None
        for silo, version in self._versions.items():
            if version == before:
                copied_P = params_P.clone() if copied_P is None else copied_P
                self._starts[silo] = copied_P
            elif version > before:
                self._starts.pop(silo, None)

    def _send(self) -> None:
        """Send this rank's updates to rank 0."""
        pending: list[tuple[Pending, torch.Tensor]] = []  # requests, with what they send
        for share, vector in self._kept:
            for sent in (torch.tensor([share], dtype=torch.float64), *([] if vector is None else [vector])):
                pending.append((self.comm.isend(sent, 0), sent))
        for request, _ in pending:
            self.comm.wait(request)
        self._kept.clear()

    def take(self, rank: int) -> None:
        """Add the next update of a rank to the buffer, on rank 0."""
        if rank == 0:
            share, vector = self._kept.popleft()
        else:
            self.comm.wait(self.comm.irecv(self._head, rank))
            share, vector = float(self._head[0]), None
            if share:
                # The first one is read where it lies, so nothing may overwrite it.
                vector = self._sum if self._num == 0 and self.device.type == "cpu" else self._came
                self.comm.wait(self.comm.irecv(vector, rank))
        if vector is not None:
            self.fold_in(vector.to(self.device), share)

    def share_of(self, weight: float) -> float:
        """A weight as a share of the weight of all silos."""
        return weight / self.facts.total_weight

    def received(self, rank: int) -> torch.Tensor:
        """The next vector that a rank sends with `isend`, in host memory."""
        vector = self.comm.allocate(self.num_params, self.dtype)
        self.comm.wait(self.comm.irecv(vector, rank))
        return vector

    def settle(self) -> None:
        if self.runtime is not None:
            self.runtime.settle()

    def leave(self) -> None:
        if self.runtime is not None:
            self.runtime.end()
            self.runtime = None

    def fold_in(self, delta_P: torch.Tensor, share: float) -> None:
        """Add a delta to the buffer. The first is only remembered, and must stay unchanged until the round's step: if
        it stays alone, its factor is the step's."""
        if self._num == 0:
            self._first_P = delta_P
        else:
            if self._num == 1:
                self.fold(self._sum, self._first_P, self._weight, True)
            if self._num == MANY and self.dtype == torch.float32:
                if self._wide_P is None:
                    self._wide_P = torch.zeros(self.num_params, dtype=torch.float64, device=self.device)
                self._wide_P.copy_(self._sum)
                self._many = True
            self.fold(self._sum, delta_P, share, False)
        self._weight += share
        self._num += 1

    def _step(self, params_P: torch.Tensor, server: Server, state: Any) -> Any:
        """The server's step on the mean of the buffer, in place and block by block, so that a block stays in cache."""
        if self._num == 0:
            raise ExchangeError("no update arrived: nothing to step by")
        mean_P = self.folded(self._sum) if self._num > 1 else self._first_P
        if self._num == 1 and server.gain is not None:
            params_P.add_(mean_P, alpha=server.gain)
            return state
        for start in range(0, self.num_params, BLOCK):
            part = slice(start, min(start + BLOCK, self.num_params))
            if self._num > 1:
                mean_P[part].div_(self._weight)
            new, _ = server.step(params_P[part], mean_P[part], type(state)(*(v[part] for v in state)), start)
            params_P[part].copy_(new)
        return state
