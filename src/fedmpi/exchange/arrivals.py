"""Updates that reach rank 0 one by one, in an order that the engine gives, for engines whose silos do not wait for each
other (rounds/asynchronous.py).

    a silo's rank   keeps each update of the round, encoded by the codec of `up`, until the round commits; then it sends
                    them, in order
    rank 0          adds each update to the buffer as it arrives: one pass over the vector. When all have arrived, the
                    server steps, and the new parameters are broadcast, or the codec's step from the old ones

The sum is in the order of arrival, so it has the same bits for any number of ranks. A round of a single update under
server.optimizer fedavg is one pass in all: w + lr s delta. For an aggregator that reads each update, rank 0 keeps them
side by side (rows.py), each multiplied by its staleness weight.

What a codec loses of an update is part of its silo's state, which the engine keeps.

A silo whose training began before the last step starts from older parameters. They are kept here, by silo and version,
and are part of the silo's state; silos of one version share a vector. Under a virtual clock a silo has one such start.
A replay may need more: a silo of the earlier run may have trained from older parameters than its last update met.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from fedmpi.comm import Comm, Pending
from fedmpi.errors import ExchangeError
from fedmpi.exchange.base import BLOCK, MANY, Exchange, ExchangeContext, Lap, Machine, without
from fedmpi.exchange.cost import Cost, Sizes, Traffic
from fedmpi.exchange.rows import Rows
from fedmpi.exchange.wire import Wire
from fedmpi.records.timer import Spent
from fedmpi.server import Server
from fedmpi.state import StateTensor, Vectors
from fedmpi.types import Contribution

if TYPE_CHECKING:
    from fedmpi.exchange.config import ExchangeSection


class _Kept(NamedTuple):
    """One of this rank's updates. A share of 0 says that it was rejected, and no message follows."""

    share: float
    less: float  # its staleness weight
    message: torch.Tensor | None


class Starts:
    """A holder of the parameters that silos train from, if those are not the newest: by silo and version."""

    def __init__(self, device: torch.device) -> None:
        self.rows: dict[str, dict[int, torch.Tensor]] = {}
        self._device = device

    def keep(self, before: int, params_P: torch.Tensor, needed: Mapping[str, Collection[int]]) -> None:
        """The server steps from version `before`, these parameters: keep those that silos will train from, by silo."""
        copied_P = None
        for silo, versions in needed.items():
            rows = {version: start_P for version, start_P in self.rows.get(silo, {}).items() if version in versions}
            if before in versions:
                copied_P = params_P.clone() if copied_P is None else copied_P
                rows[before] = copied_P
            self.rows[silo] = rows

    def state(self) -> Iterator[StateTensor]:
        """The tensors of this rank's silos."""
        for silo, rows in self.rows.items():
            for version, start_P in rows.items():
                yield StateTensor(("params", str(version)), start_P, "per_silo", silo)

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Replace them by the tensors of the silos that this rank hosts now."""
        self.rows.clear()
        for (_, version), tensor, _, silo, _ in stored:
            self.rows.setdefault(silo, {})[int(version)] = tensor.to(self._device)


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
        self._starts = self.holders["start"] = Starts(self.device)
        self._kept: deque[_Kept] = deque()
        self._expected: list[tuple[str, int]] = []  # silo and rank of the round's updates, in the order of arrival
        self._versions: dict[str, Collection[int]] = {}  # by silo of this rank: versions that it trains from later on
        length = self.num_params if comm.rank == 0 else 0
        self._sum = torch.zeros(length, dtype=self.dtype, device=self.device)
        self._first_P = self._sum  # of the updates in the buffer
        self._came = comm.allocate(length, self.dtype, pinned=self.device.type != "cpu")
        self._head = torch.zeros(3, dtype=torch.float64)  # share, staleness weight and length of a message
        self._weight, self._num = 0.0, 0  # of the updates in the buffer
        self._up, self._down = (
            None if channel.plain else Wire(channel, self.layout, facts.ids, facts.seed, self.device, way)
            for way, channel in (("up", section.up), ("down", section.down))
        )
        self._wires = [way for way in (self._up, self._down) if way is not None]
        self._lost_P: torch.Tensor | None = None  # what the codec of `down` has lost so far, on rank 0
        if section.down.feedback:
            self._lost_P = torch.zeros(length, dtype=self.dtype, device=self.device)
            self.holders["down"] = Vectors({"feedback": self._lost_P}, "sharded")
        self._rows: Rows | None = None
        if facts.aggregator is not None:
            self._rows = Rows(facts.aggregator, length, self.dtype, self.device)
            self.holders["rows"] = self._rows.holders

    @property
    def reads_each(self) -> bool:
        """Whether an aggregator reads each update. Then all count the same, whatever their weight."""
        return self._rows is not None

    @classmethod
    def supports(cls, section: ExchangeSection, machine: Machine) -> str:
        return without(section, scope=False, up=False, down=False)

    @classmethod
    def cost(cls, section: ExchangeSection, sizes: Sizes) -> Cost:
        """The bytes of a round whose updates come from all silos alike."""
        others, away = sizes.num_ranks - 1, sum(sizes.vectors[1:]) / max(1, sum(sizes.vectors))
        vector = sizes.vector_bytes
        up_bytes, down_bytes = (
            vector if channel.plain else Wire.most_bytes(channel, sizes.num_elements, sizes.num_exact or 0)
            for channel in (section.up, section.down)
        )
        up = round(sizes.arrivals * away) * up_bytes
        own = {"global parameters": vector, "older parameters": sizes.hosted * vector}
        own |= {
            "updates of a round": sizes.hosted * up_bytes,
            "residuals up": sizes.hosted * vector * section.up.feedback,
        }
        if sizes.rank == 0:
            own |= {"buffer": vector, "received": vector, "server state": sizes.state_bytes}
            own |= {"residual down": vector * section.down.feedback}
            if sizes.aggregator is not None:
                own |= {"rows": (sizes.arrivals + sizes.aggregator.centre) * vector}
        down = others * (down_bytes + 8 * (not section.down.plain))
        return Cost(Traffic(up, down, 0, "Send to rank 0 + Bcast"), {name: held for name, held in own.items() if held})

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

    def spent(self) -> Spent:
        return Spent.of([wire.coder for wire in self._wires], self.comm.transferred_s())

    def begin(self, round: int = 0, num_contributions: int = 2, near: float = 1.0) -> None:
        super().begin(round, num_contributions, near)
        self._many = False  # it is summed in float64 from the first update beyond MANY on, however many were planned
        self._kept.clear()
        self._expected.clear()
        self._weight, self._num = 0.0, 0
        if self._rows is not None:
            self._rows.begin()

    def older(self, silo: str, version: int) -> torch.Tensor:
        """The parameters of an older version than the newest, from which the silo trains."""
        start_P = self._starts.rows.get(silo, {}).get(version)
        if start_P is None:
            raise ExchangeError(f"the parameters of version {version}, which silo '{silo}' fetched, are not kept")
        return start_P

    def packed(
        self, update: Contribution, training: int, before_Q: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The message of a silo's update, in host memory, and what the codec has lost so far of the silo's updates;
        None without feedback. `before_Q`: before this one; None: nothing. Overwrites parts of the update."""
        if self._up is None:
            return update.vector_Q.to("cpu", copy=True), None
        lost_Q = None
        if self._up.feedback:
            lost_Q = torch.zeros_like(update.vector_Q) if before_Q is None else before_Q.to(self.device, copy=True)
        return self._up.pack(update.vector_Q, update.silo, training, lost_Q), lost_Q

    def unpacked(self, message: torch.Tensor, into_P: torch.Tensor | None = None) -> torch.Tensor:
        """The update of a message; in a new vector if `into_P` is None."""
        if self._up is None:
            return message
        into_P = torch.empty(self.num_params, dtype=self.dtype, device=self.device) if into_P is None else into_P
        self._up.unpack(message, into_P)
        return into_P

    def factor(self, weight: float, less: float) -> float:
        """The factor in the buffer of an update with this weight and staleness weight."""
        return less if self.reads_each else weight * less / self.facts.total_weight

    def bring(self, message: torch.Tensor, weight: float, less: float) -> None:
        """Keep this rank's next update in the order of arrival until the round commits: its message, its weight and its
        staleness weight."""
        self._kept.append(_Kept(self.factor(weight, less), less, message))

    def reject(self) -> None:
        """Say that this rank's next update in the order of arrival was rejected."""
        self._kept.append(_Kept(0.0, 1.0, None))

    def expect(self, silos: Sequence[str], ranks: Sequence[int]) -> None:
        """Add to the round's updates, in the order of arrival: silos and their ranks. The same on all ranks."""
        self._expected += zip(silos, ranks, strict=True)

    def fetched(self, versions: Mapping[str, Collection[int]]) -> None:
        """The versions, up to that which the round makes, that each silo trains from after the round."""
        self._versions = {silo: versions[silo] for silo in self.facts.hosted}

    def fingerprint(self, cohort: Sequence[str]) -> float:
        return super().fingerprint([*cohort, *(str(rank) for _, rank in self._expected)])

    def declared(self, cohort: Sequence[str]) -> dict[str, Any]:
        return super().declared(cohort) | {"ranks of the arrivals": [rank for _, rank in self._expected]}

    def finish(
        self, params_P: torch.Tensor, server: Server, state: Any, lap: Lap = lambda phase: None
    ) -> tuple[torch.Tensor, Any]:
        self._starts.keep(self.round - 1, params_P, self._versions)
        if self.comm.rank == 0:
            for silo, rank in self._expected:
                self.take(silo, rank)
        else:
            self._send()
        if self._up is not None:
            self.ask()
        lap("exchange")
        before_P = params_P.clone() if self._down is not None and self.comm.rank == 0 else params_P
        if self.comm.rank == 0:
            state = self._step(params_P, server, state)
        if self._rows is not None:
            self._rows.share_state(self.comm)
        lap("step")
        if self._down is None:
            self.comm.bcast(params_P)
        else:
            self._step_down(self._down, params_P, before_P)
        self.verify(params_P)
        lap("exchange")
        return params_P, state

    def _send(self) -> None:
        """Send this rank's updates to rank 0."""
        pending: list[tuple[Pending, torch.Tensor]] = []  # requests, with what they send
        for share, less, message in self._kept:
            head = torch.tensor([share, less, 0 if message is None else len(message)], dtype=torch.float64)
            for sent in (head, *([] if message is None else [message])):
                pending.append((self.comm.isend(sent, 0), sent))
        for request, _ in pending:
            self.comm.wait(request)
        self._kept.clear()

    def take(self, silo: str, rank: int) -> None:
        """Add the next update of a rank, which is this silo's, to the buffer, on rank 0."""
        # The first one is read where it lies, so nothing may overwrite it.
        room = self._sum if self._num == 0 and self.device.type == "cpu" else self._came
        if rank == 0:
            share, less, message = self._kept.popleft()
        else:
            self.comm.wait(self.comm.irecv(self._head, rank))
            (share, less, length), message = self._head.tolist(), None
            if share:
                message = room if self._up is None else torch.empty(int(length), dtype=torch.uint8)
                self.comm.wait(self.comm.irecv(message, rank))
        if message is not None:
            vector = self.unpacked(message, room if self.device.type == "cpu" else None)
            self.fold_in(silo, vector.to(self.device), share, less)

    def send(self, message: torch.Tensor) -> list[tuple[Pending, torch.Tensor]]:
        """Start to send an update's message to rank 0. The requests, with the memory that must stay unchanged."""
        length = [] if self._up is None else [torch.tensor([len(message)])]
        return [(self.comm.isend(vector, 0), vector) for vector in (*length, message)]

    def received(self, rank: int) -> torch.Tensor:
        """The update that a rank sends next with `send`."""
        if self._up is None:
            message = self.comm.allocate(self.num_params, self.dtype)
        else:
            self.comm.wait(self.comm.irecv(length := torch.zeros(1, dtype=torch.int64), rank))
            message = torch.empty(int(length), dtype=torch.uint8)
        self.comm.wait(self.comm.irecv(message, rank))
        return self.unpacked(message)

    def settle(self) -> None:
        if self.runtime is not None:
            self.runtime.settle()

    def leave(self) -> None:
        if self.runtime is not None:
            self.runtime.end()
            self.runtime = None

    def fold_in(self, silo: str, delta_P: torch.Tensor, share: float, less: float) -> None:
        """Add a delta to the buffer, `share` times, of which `less` is its staleness weight. The first is only
        remembered, and must stay unchanged until the round's step: if it stays alone, its factor is the step's.

        Auxiliary vectors count in full: the server's control variate stays the mean of the silos' ones only if each
        change is added once, however late it comes."""
        if less != 1.0:
            for segment in self.layout.auxiliaries:
                delta_P[segment.place].mul_(1 / less)
        if self._rows is not None:
            row_P = self._rows.add(silo, delta_P, share)
            for part in self.layout.averaged:  # the silo's values, which its staleness does not make smaller
                row_P[part].copy_(delta_P[part])
        elif self._num == 0:
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
        whole = self._num > 1 and self._rows is None  # whether the weights are still to be divided by
        if self._rows is not None:
            self._rows.combine(mean_P := self._sum, self.round, self.facts.seed)
        else:
            mean_P = self.folded(self._sum) if self._num > 1 else self._first_P
        if self._num == 1 and self._rows is None and server.gain is not None:
            params_P.add_(mean_P, alpha=server.gain)
            return state
        for start in range(0, self.num_params, BLOCK):
            part = slice(start, min(start + BLOCK, self.num_params))
            if whole:
                mean_P[part].div_(self._weight)
            new, _ = server.step(params_P[part], mean_P[part], type(state)(*(v[part] for v in state)), start)
            params_P[part].copy_(new)
        return state

    def _step_down(self, wire: Wire, params_P: torch.Tensor, before_P: torch.Tensor) -> None:
        """Give all ranks the step that the codec makes of rank 0's, from `before_P` to `params_P`. Collective."""
        first = self.comm.rank == 0

        def packed() -> torch.Tensor | None:
            return wire.pack(params_P.sub_(before_P), self.facts.ids[0], self.round, self._lost_P) if first else None

        message = self.comm.collectively(packed)
        length = torch.tensor([0 if message is None else len(message)])
        self.comm.bcast(length)
        message = torch.empty(int(length), dtype=torch.uint8) if message is None else message
        self.comm.bcast(message)
        step_P = torch.empty_like(before_P)
        wire.unpack(message, step_P)
        torch.add(before_P, step_P, out=params_P)
        self.ask()

    def raise_failed(self) -> None:
        for wire in (self._up, self._down):
            if wire is not None:
                wire.raise_failed()
