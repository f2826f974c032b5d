"""Plan sharded: a pipelined two-shot. Every rank owns each n-th piece of the vector.

    up      all-to-all: a row of n pieces goes to its n owners, encoded
    there   the owner decodes and adds in float32, in the order of slots, divides, and takes the server's step
    down    all-gather: the row's n new pieces go to all, encoded; every rank, the owner too, decodes the same bytes

Several rows are under way at once, so that encoding, transfer and decoding overlap. Every value is quantized once on
each way, whatever the number of ranks. Without codecs the deltas travel out of the memory they were trained in, and new
parameters arrive in the memory they are read from. With a codec on the way down it is the step (new minus old
parameters) that travels, and all ranks add what decodes; the server's state is the owners' and is exact.

A slot is what is encoded together: a rank's sum, weighted (`scope: rank`), or a silo's delta, not weighted, whose
weight is applied where it is added (`scope: silo`). Slots have one order on all ranks, that of ranks or of the
federation's silos, so under `scope: silo` the sum has the same bits for any number of ranks. What feedback keeps of a
silo changes when the round's vectors travel, and not before.

MPI's calls are all made here, one after the other, and moved along between pieces: a thread for them would take turns
with the very kernels it is to overlap with. `overlap` runs the whole exchange in a thread.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch

from fedmpi.comm import Pending, Solo
from fedmpi.errors import ConfigError, ExchangeError
from fedmpi.exchange.base import Exchange, Facts, Kept, Lap
from fedmpi.exchange.pieces import Coder, Grid, RankResidual
from fedmpi.exchange.section import ExchangeSection
from fedmpi.server import Server
from fedmpi.types import Contribution

PART = 1 << 13  # elements of every slot that are made float64 at a time, so that they stay in cache
AHEAD = 3  # rows on their way up while one is added up


class Slot(NamedTuple):
    """One vector of the round, as all ranks know of it."""

    rank: int
    wave: int  # which of its rank's vectors
    share: float  # of all weight
    factor: float  # what its values still have to be multiplied with in the sum


class Outgoing(NamedTuple):
    """One of this rank's vectors."""

    slot: int
    share: float
    factor: float
    vector_P: torch.Tensor | None  # to be encoded, or sent as it is; None: encoded already
    scale: float  # what it is multiplied with when it is encoded
    payloads: torch.Tensor | None  # of all pieces
    sizes: np.ndarray  # of the payloads, in bytes [pieces]


class Sharded(Exchange):
    """All-to-all of encoded pieces, step at their owners, all-gather."""

    def __init__(self, section: ExchangeSection, comm: Solo, params_P: torch.Tensor, facts: Facts) -> None:
        super().__init__(section, comm, params_P, facts)
        self.grid = grid = Grid(self.num_params, comm.size)
        self._lazily = section.up.codec.fixed  # is every payload's size known before it is encoded?
        self._index = {silo: i for i, silo in enumerate(facts.ids)}
        self._by_silo = section.scope == "silo"
        self._up = None if section.up.plain else Coder(section.up, grid, facts.seed, self.device, "up")
        self._down = None if section.down.plain else Coder(section.down, grid, facts.seed, self.device, "down")
        if (self._up or self._down) and self.dtype != torch.float32:
            raise ConfigError(f"codecs take float32, and the shared parameters are {self.dtype}")
        own = grid.num_owned(comm.rank)
        self._residual = RankResidual(section.up, params_P, facts)
        self._of_silos: dict[str, torch.Tensor] = {}  # what feedback keeps of each
        self._next: dict[str, torch.Tensor] = {}  # and will keep once this round's vectors have travelled
        self._spare: list[torch.Tensor] = []
        fed_back = section.down.feedback
        self._down_residual = torch.zeros(own, device=self.device) if fed_back else None
        self._sum: torch.Tensor | None = None  # of several silos
        self._raw = torch.uint8 if self._up else self.sum_dtype
        self._stride = self._up.stride if self._up else grid.length
        self._total = torch.zeros(grid.length, dtype=self.sum_dtype, device=self.device) if self.ring else None
        self._decoded = torch.zeros(0, dtype=self.dtype, device=self.device)  # rows that an aggregator reads
        self._mean = torch.zeros(grid.length, dtype=self.dtype, device=self.device)
        self._nothing = torch.zeros(0, dtype=self._raw)
        self._arrived: list[torch.Tensor] = []  # for each row under way: [waves, ranks, stride]
        self._payloads: list[torch.Tensor] = []  # of this rank's vectors, reused
        self._host_P = comm.allocate(self.num_params, self.sum_dtype, pinned=True) if self.on_device else None
        if self._down:
            self._sent_down = comm.allocate(grid.num_pieces * self._down.stride, torch.uint8, pinned=self.on_device)
        elif self.on_device:
            self._new_P = comm.allocate(self.num_params, self.dtype, pinned=True)
        self._encoded = torch.zeros(
            max(self._stride if self._up else 0, self._down.stride if self._down else 0),
            dtype=torch.uint8,
            device=self.device,
        )
        self._outgoing: list[Outgoing] = []
        self._failed: ExchangeError | None = None

    # ------------------------------------------------------------ where things are kept

    def mine(self, vector_P: torch.Tensor) -> torch.Tensor:
        parts = [vector_P[self.grid.part(piece)] for piece in self.grid.owned(self.comm.rank)]
        return torch.cat(parts) if parts else vector_P[:0].clone()

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        grid, me, ranks, host = self.grid, self.comm.rank, self.comm.size, part.cpu()
        whole_P = torch.zeros(self.num_params if me == 0 else 0, dtype=part.dtype)
        for row in range(grid.steps):
            sizes = [grid.size(row * ranks + rank) for rank in range(ranks)]
            mine = host[row * grid.length :]
            there = whole_P[row * ranks * grid.length :]
            nothing = [(0, 0)] * ranks
            come = [(rank * grid.length, size) for rank, size in enumerate(sizes)] if me == 0 else nothing
            if me == 0:
                there[: sizes[0]] = mine[: sizes[0]]
                come[0] = (0, 0)
            to = [(0, sizes[me] if me else 0), *nothing[1:]]
            self.comm.wait(self.comm.alltoall(mine, to, there, come))
        return whole_P

    def kept(self, params_P: torch.Tensor) -> Kept:
        if self._by_silo:
            return {silo: {"feedback": tensor} for silo, tensor in self._of_silos.items()}
        return self._residual.kept()

    def take(self, round: int, params_P: torch.Tensor, kept: Kept) -> None:
        if self._by_silo:
            self._of_silos = {silo: tensors["feedback"].to(self.device) for silo, tensors in kept.items()}
        else:
            self._residual.take(kept)

    def server_tensors(self) -> dict[str, torch.Tensor]:
        return {} if self._down_residual is None else {"feedback": self._down_residual}

    # ------------------------------------------------------------ this rank's vectors

    def begin(self, round: int = 0, num_contributions: int = 2) -> None:
        super().begin(round, num_contributions)
        self._outgoing.clear()
        self._spare.extend(self._next.values())
        self._next.clear()
        self._only = num_contributions == 1

    def add(self, contribution: Contribution) -> None:
        share, delta_P = contribution.weight / self.facts.total_weight, contribution.delta_P
        if self._by_silo:
            self._outgoing.append(self._of_silo(contribution.silo, share, delta_P))
            return
        rank = self.comm.rank
        if self._only and not self.ring:
            if self._up:
                self._outgoing.append(self._to_encode(rank, share, delta_P, share))
            else:
                self._outgoing.append(Outgoing(rank, share, share, delta_P, 1.0, None, _NONE))
            return
        if self._sum is None:
            self._sum = torch.zeros(self.num_params, dtype=self.sum_dtype, device=self.device)
        self.fold(self._sum, delta_P, share, empty=not self._outgoing)
        weight = self.weigh(share) + (self._outgoing.pop().share if self._outgoing else 0.0)
        if self._up:
            self._outgoing.append(self._to_encode(rank, weight, self._sum, 1.0))
        else:
            self._outgoing.append(Outgoing(rank, weight, 1.0, self._sum, 1.0, None, _NONE))

    def _to_encode(self, slot: int, share: float, vector_P: torch.Tensor, scale: float) -> Outgoing:
        assert self._up is not None
        return Outgoing(slot, share, 1.0, vector_P, scale, self._memory(), self._sizes(self._up))

    def _memory(self) -> torch.Tensor:
        """For the payloads of one vector; as many as the round has needed are kept."""
        wave = len(self._outgoing)
        if wave == len(self._payloads):
            num = self.grid.num_pieces * self._stride if self._up else self.num_params
            self._payloads.append(self.comm.allocate(num, self._raw, pinned=self.on_device))
        return self._payloads[wave]

    def _sizes(self, coder: Coder) -> np.ndarray:
        return np.array([coder.num_bytes(piece) for piece in range(self.grid.num_pieces)], dtype=np.int64)

    def _of_silo(self, silo: str, share: float, delta_P: torch.Tensor) -> Outgoing:
        """A silo's delta as it will be sent, out of the model's memory."""
        memory, slot = self._memory(), self._index[silo]
        if not self._up:
            memory.copy_(delta_P)
            return Outgoing(slot, share, share, memory, 1.0, None, _NONE)
        residual_P = None
        if self._up.channel.feedback:
            residual_P = self._spare.pop() if self._spare else torch.zeros_like(delta_P)
            before = self._of_silos.get(silo)
            residual_P.copy_(before) if before is not None else residual_P.zero_()
            self._next[silo] = residual_P
        sizes = self._sizes(self._up)
        self._up.start(self.round, silo)
        self._failed = None
        for piece, part in enumerate(self.grid):
            residual_N = None if residual_P is None else residual_P[part]
            sizes[piece] = self._encode_up(delta_P[part], memory, piece, 1.0, residual_N)
        self._raise_failed()  # nothing has travelled yet
        return Outgoing(slot, share, share, None, 1.0, memory, sizes)

    def _encode_up(
        self, x_N: torch.Tensor, payloads: torch.Tensor, piece: int, scale: float, residual_N: torch.Tensor | None
    ) -> int:
        assert self._up is not None
        return self._encode(self._up, x_N, self._up.slot(payloads, piece), piece, scale, residual_N)

    def _encode(
        self, coder: Coder, x_N: torch.Tensor, slot_B: torch.Tensor, piece: int, scale: float, residual_N: Any
    ) -> int:
        """Into host memory, from wherever the values live."""
        try:
            if not self.on_device:
                return coder.encode(x_N, slot_B, piece, scale, residual_N)
            num_bytes = coder.encode(x_N, self._encoded[: coder.stride], piece, scale, residual_N)
            slot_B[:num_bytes].copy_(self._encoded[:num_bytes])
            return num_bytes
        except ExchangeError as error:
            # The others wait for something; when all has travelled everybody raises this.
            self._failed = self._failed or error
            slot_B.zero_()
            return coder.num_bytes(piece) if coder.codec.fixed else 0

    def _add(self, coder: Coder, came_B: torch.Tensor, sum_N: torch.Tensor, piece: int, weight: float) -> None:
        """Out of host memory, to wherever the sum lives."""
        try:
            if self.on_device:
                came_B = self._encoded[: len(came_B)].copy_(came_B)
            coder.add(came_B, sum_N, piece, weight)
        except ExchangeError as error:
            self._failed = self._failed or error

    # ------------------------------------------------------------ the exchange

    def finish(
        self, params_P: torch.Tensor, server: Server, state: Any, lap: Lap = lambda phase: None
    ) -> tuple[torch.Tensor, Any]:
        self._failed = None
        slots = self._agree()
        weight = sum(slot.share for slot in slots)
        if weight == 0.0:
            raise ExchangeError("no weight arrived: nothing to divide by")
        waves = max((slot.wave for slot in slots), default=-1) + 1
        self.gram = np.zeros((len(slots), len(slots))) if self.facts.gram else None
        sent = self._agree_sizes(slots, waves)
        if self._up:
            self._up.start(self.round)
        if self._down:
            self._down.start(self.round)
        ahead: deque[tuple[int, list[Pending]]] = deque()
        down: deque[tuple[int, Pending]] = deque()
        one_by_one = self._down is not None and not self._down.codec.fixed
        for row in range(self.grid.steps + AHEAD):
            if row < self.grid.steps:
                ahead.append((row, self._send_row(row, waves, sent)))
            if row >= AHEAD and ahead:
                done, requests = ahead.popleft()
                for request in requests:
                    self.comm.wait(request)
                size = self._own_row(done, slots, weight, params_P, server, state, sent)
                down.append((done, self._return_row(done, size, params_P)))
                while down and (one_by_one or down[0][1].Test()):
                    self._land(*down.popleft(), params_P)
        while down:
            self._land(*down.popleft(), params_P)
        if self._up or self._down:
            self.comm.together(self._raise_failed)
        if self.gram is not None:
            self.gram = self.comm.share(self.gram.reshape(-1)).reshape(self.gram.shape)
        for silo, residual_P in self._next.items():
            if silo in self._of_silos:
                self._spare.append(self._of_silos[silo])
            self._of_silos[silo] = residual_P
        self._next = {}
        lap("exchange")
        self.verify(params_P)
        lap("exchange")
        return params_P, state

    def _raise_failed(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _agree(self) -> list[Slot]:
        """The round's vectors in the order of slots, the same on every rank."""
        num_slots = len(self.facts.ids) if self._by_silo else self.comm.size
        table = np.zeros((num_slots, 4))
        for wave, out in enumerate(self._outgoing):
            table[out.slot] = (self.comm.rank, wave, out.share, out.factor)
        table = self.comm.share(table.reshape(-1)).reshape(table.shape)
        return [Slot(int(rank), int(wave), share, factor) for rank, wave, share, factor in table.tolist() if share]

    def _agree_sizes(self, slots: list[Slot], waves: int) -> np.ndarray:
        """What each rank sends in each wave of each piece, [ranks, waves, pieces], in elements of what travels.

        Where payloads may be shorter than their longest they are encoded before the first one travels.
        """
        pieces = range(self.grid.num_pieces)
        sizes = np.zeros((self.comm.size, waves, len(pieces)), dtype=np.int64)
        if self._lazily:
            each = [self._up.num_bytes(piece) if self._up else self.grid.size(piece) for piece in pieces]
            for slot in slots:
                sizes[slot.rank, slot.wave] = each
            return sizes
        for wave, out in enumerate(self._outgoing):
            for piece in pieces:
                self._prepare(out, piece)
            sizes[self.comm.rank, wave] = out.sizes
        return self.comm.share(sizes.reshape(-1)).reshape(sizes.shape).astype(np.int64)

    def _prepare(self, out: Outgoing, piece: int) -> None:
        """The piece is in host memory as it will travel."""
        if out.vector_P is None:
            return
        part = self.grid.part(piece)
        if self._up:
            assert out.payloads is not None
            if piece == 0:
                self._up.start(self.round, f"rank {self.comm.rank}")
            out.sizes[piece] = self._encode_up(
                out.vector_P[part], out.payloads, piece, out.scale, self._residual.part(part)
            )
        elif self._host_P is not None and out.vector_P.device.type != "cpu":
            self._host_P[part].copy_(out.vector_P[part])

    def _send_row(self, row: int, waves: int, sent: np.ndarray) -> list[Pending]:
        """Everybody's pieces of a row on their way to the owners."""
        grid, me, ranks = self.grid, self.comm.rank, self.comm.size
        first = row * ranks
        pieces = range(first, min(first + ranks, grid.num_pieces))
        arrived = self._room(row, waves)
        requests = []
        for wave in range(waves):
            send, to = self._nothing, [(0, 0)] * ranks
            if wave < len(self._outgoing):
                out = self._outgoing[wave]
                for piece in pieces if self._lazily else ():
                    self._prepare(out, piece)
                    self.comm.progress()
                send = self._travels(out)[first * self._stride :]
                to = [(i * self._stride, int(sent[me, wave, first + i])) for i in range(len(pieces))]
                to += [(0, 0)] * (ranks - len(to))
                to[me] = (0, 0)  # what is mine is read where it is
            mine = first + me
            come = [
                (rank * self._stride, int(sent[rank, wave, mine]) if mine < grid.num_pieces and rank != me else 0)
                for rank in range(ranks)
            ]
            requests.append(self.comm.alltoall(send, to, arrived[wave], come))
        return requests

    def _travels(self, out: Outgoing) -> torch.Tensor:
        """The memory that MPI reads."""
        if out.payloads is not None:
            return out.payloads
        assert out.vector_P is not None
        return out.vector_P if out.vector_P.device.type == "cpu" else self._host_P  # type: ignore[return-value]

    def _room(self, row: int, waves: int) -> torch.Tensor:
        """Where a row's pieces arrive: [waves, ranks * stride]."""
        place, needed = row % (AHEAD + 1), waves * self.comm.size * self._stride
        while len(self._arrived) <= place:
            self._arrived.append(torch.zeros(0, dtype=self._raw))
        if len(self._arrived[place]) < needed:
            self._arrived[place] = self.comm.allocate(needed, self._raw, pinned=self.on_device)
        return self._arrived[place][:needed].view(waves, -1)

    def _own_row(
        self,
        row: int,
        slots: list[Slot],
        weight: float,
        params_P: torch.Tensor,
        server: Server,
        state: Any,
        sent: np.ndarray,
    ) -> int:
        """My piece of a row: added up in the order of slots, divided, stepped, and ready to travel. Bytes of it."""
        piece = row * self.comm.size + self.comm.rank
        if piece >= self.grid.num_pieces:
            return 0
        part, size = self.grid.part(piece), self.grid.size(piece)
        mean = self._mean[:size]
        came = [(slot, self._came(row, piece, slot, int(sent[slot.rank, slot.wave, piece]))) for slot in slots]
        if self.facts.each is None:
            self._sum_up(came, weight, piece, mean)
        else:
            mean.copy_(self.facts.each(self._rows(came, piece, size), torch.tensor([slot.share for slot in slots])))
        if self.gram is not None and part.start < self.facts.gram:
            rows_KS = self._rows(came, piece, size)[:, : self.facts.gram - part.start]
            self.gram += products(rows_KS)
        kept = self.grid.kept(piece)
        new_S, _ = server.step(params_P[part], mean, type(state)(*(tensor[kept] for tensor in state)), part.start)
        if not self._down:
            params_P[part].copy_(new_S)
            if self.on_device:
                self._new_P[part].copy_(new_S)
            return size
        step_S = new_S.sub_(params_P[part])
        residual_S = None if self._down_residual is None else self._down_residual[kept]
        slot_B = self._down.slot(self._sent_down, piece)
        return self._encode(self._down, step_S, slot_B, piece, 1.0, residual_S)

    def _came(self, row: int, piece: int, slot: Slot, length: int) -> torch.Tensor:
        """What a slot sent of my piece, where it lies."""
        if slot.rank == self.comm.rank:
            return self._travels(self._outgoing[slot.wave])[piece * self._stride :][:length]
        start = (slot.wave * self.comm.size + slot.rank) * self._stride
        return self._arrived[row % (AHEAD + 1)][start : start + length]

    def _sum_up(self, came: list[tuple[Slot, torch.Tensor]], weight: float, piece: int, mean: torch.Tensor) -> None:
        """The weighted mean, one slot after the other."""
        if self._total is not None:
            total = self._total[: len(mean)].zero_()
            for _, ring in came:
                total.add_(ring.to(self.device))
            self.divide(total, weight, mean)
        elif self._up:
            mean.zero_()
            for slot, payload in came:
                self._add(self._up, payload, mean, piece, slot.factor / weight)
        else:
            torch.mul(came[0][1].to(self.device), came[0][0].factor / weight, out=mean)
            for slot, values in came[1:]:
                mean.add_(values.to(self.device), alpha=slot.factor / weight)

    def _rows(self, came: list[tuple[Slot, torch.Tensor]], piece: int, size: int) -> torch.Tensor:
        """Every slot's values of my piece, decoded, [slots, size]."""
        needed = len(came) * size
        if len(self._decoded) < needed:
            self._decoded = torch.zeros(needed, dtype=self.dtype, device=self.device)
        rows_KS = self._decoded[:needed].view(len(came), size)
        for row_S, (_, values) in zip(rows_KS, came, strict=True):
            if self._up:
                self._add(self._up, values, row_S.zero_(), piece, 1.0)
            else:
                row_S.copy_(values)
        return rows_KS

    def _return_row(self, row: int, size: int, params_P: torch.Tensor) -> Pending:
        """My piece of a row on its way to all, and theirs to me."""
        ranks, grid = self.comm.size, self.grid
        first = row * ranks
        if self._down:
            stride, vector = self._down.stride, self._sent_down
            if self._down.codec.fixed:
                sizes = [self._down.num_bytes(first + r) for r in range(ranks)]
            else:
                mine = np.zeros(ranks)
                mine[self.comm.rank] = size
                sizes = self.comm.share(mine).astype(int).tolist()
            self._came_down = sizes
        else:
            stride, vector = grid.length, self._new_P if self.on_device else params_P
            sizes = [grid.size(first + r) for r in range(ranks)]
        return self.comm.allgather(vector[first * stride :], [(rank * stride, size) for rank, size in enumerate(sizes)])

    def _land(self, row: int, request: Pending, params_P: torch.Tensor) -> None:
        """A row has come back: decode it where parameters are read."""
        self.comm.wait(request)
        first = row * self.comm.size
        for rank, piece in enumerate(range(first, min(first + self.comm.size, self.grid.num_pieces))):
            part = self.grid.part(piece)
            if self._down:
                fixed = self._down.codec.fixed
                length = self._down.num_bytes(piece) if fixed else self._came_down[rank]
                came = self._down.slot(self._sent_down, piece)[:length]
                self._add(self._down, came, params_P[part], piece, 1.0)
            elif self.on_device:
                params_P[part].copy_(self._new_P[part])


def products(rows_KS: torch.Tensor) -> np.ndarray:
    """Inner products of rows in float64, a part of them at a time, [K, K]."""
    found = torch.zeros(len(rows_KS), len(rows_KS), dtype=torch.float64, device=rows_KS.device)
    for start in range(0, rows_KS.shape[1], PART):
        exact_KB = rows_KS[:, start : start + PART].double()
        found.addmm_(exact_KB, exact_KB.T)
    return found.cpu().numpy()


_NONE = np.zeros(0, dtype=np.int64)
