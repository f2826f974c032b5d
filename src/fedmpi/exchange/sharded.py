"""Plan sharded: a pipelined two-shot. Every rank owns each n-th piece of the vector.

    up      all-to-all: a row of n pieces goes to its n owners, encoded
    there   the owner decodes and adds in float32, in the order of slots, divides, and takes the server's step
    down    all-gather: the row's n new pieces go to all, encoded; every rank, the owner too, decodes the same bytes

Several rows are under way at once, so that encoding, transfer and decoding overlap; where payloads are short a message
holds those of several rows, which is then a turn. Every value is quantized once on
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

from fedmpi.codecs import Bare, bare
from fedmpi.comm import Comm, Pending
from fedmpi.errors import ExchangeError
from fedmpi.exchange.base import MANY, Exchange, ExchangeContext, Kept, Lap
from fedmpi.exchange.chunks import Coder, Grid, RankResidual, rows_together
from fedmpi.exchange.config import ExchangeSection
from fedmpi.exchange.weights import LIMBS
from fedmpi.server import Server
from fedmpi.types import Contribution

PART = 1 << 13  # elements of every slot that are made float64 at a time, so that they stay in cache
AHEAD = 3  # turns on their way up while one is added up
COLUMNS = 3 + LIMBS  # of the table of slots: rank, wave, factor, and the share


class Slot(NamedTuple):
    """One vector of the round, as all ranks know of it."""

    rank: int
    wave: int  # which of its rank's vectors
    share: float  # of the weight; an integer in the ring
    factor: float  # what its values still have to be multiplied with in the sum


class Outgoing(NamedTuple):
    """One of this rank's vectors."""

    slot: int
    share: float
    factor: float
    vector_P: Bare | None  # to be encoded, or a tensor to be sent as it is; None: encoded already
    scale: float  # what it is multiplied with when it is encoded
    payloads: torch.Tensor | None  # of all pieces, each where `_place` says
    payloads_B: Bare  # the same, for codecs
    sizes: np.ndarray  # of the payloads, in bytes [pieces]


class Sharded(Exchange):
    """All-to-all of encoded pieces, step at their owners, all-gather."""

    def __init__(self, section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext) -> None:
        super().__init__(section, comm, params_P, facts)
        self.grid = grid = Grid(self.num_params, comm.size)
        self._lazily = section.up.codec.fixed  # is every payload's size known before it is encoded?
        self._index = {silo: i for i, silo in enumerate(facts.ids)}
        self._by_silo = section.scope == "silo"
        self._up = None if section.up.plain else Coder(section.up, grid, facts.seed, self.device, "up")
        self._down = None if section.down.plain else Coder(section.down, grid, facts.seed, self.device, "down")
        self._depth = rows_together(grid, section.up, section.down)
        self._turns = -(-grid.steps // self._depth)
        self._places = self._turns * self._depth * comm.size
        own = grid.num_owned(comm.rank)
        self._residual = RankResidual(section.up, params_P, facts)
        self._of_silos: dict[str, torch.Tensor] = {}  # what feedback keeps of each
        self._next: dict[str, torch.Tensor] = {}  # and will keep once this round's vectors have travelled
        self._spare: list[torch.Tensor] = []
        fed_back = section.down.feedback
        self._down_residual = torch.zeros(own, device=self.device) if fed_back else None
        self._lost_S = bare(self._down_residual) if self._down_residual is not None else None
        self._sum: torch.Tensor | None = None  # of several silos
        self._raw = torch.uint8 if self._up else self.sum_dtype
        self._stride = self._up.stride if self._up else grid.length
        self._total = torch.zeros(grid.length, dtype=self.sum_dtype, device=self.device) if self.ring else None
        self._decoded = torch.zeros(0, dtype=self.dtype, device=self.device)  # rows that an aggregator reads
        self._mean = torch.zeros(grid.length, dtype=self.dtype, device=self.device)
        self._nothing = torch.zeros(0, dtype=self._raw)
        self._arrived: list[torch.Tensor] = []  # for each turn under way: [waves, ranks, rows, stride]
        self._payloads: list[torch.Tensor] = []  # of this rank's vectors, reused
        self._arrived_B: list[Bare] = []  # the same memory, for codecs
        self._payloads_B: list[Bare] = []
        self._host_P = comm.allocate(self.num_params, self.sum_dtype, pinned=True) if self.on_device else None
        if self._down:
            self._sent_down = comm.allocate(self._places * self._down.stride, torch.uint8, pinned=self.on_device)
            self._down_B = bare(self._sent_down)
        elif self.on_device:
            self._new_P = comm.allocate(self.num_params, self.dtype, pinned=True)
        self._outgoing: list[Outgoing] = []

    # ------------------------------------------------------------ where things are kept

    def mine(self, vector_P: torch.Tensor) -> torch.Tensor:
        parts = [vector_P[self.grid.part(piece)] for piece in self.grid.owned(self.comm.rank)]
        return torch.cat(parts) if parts else vector_P[:0].clone()

    def whole(self, part: torch.Tensor, length: int | None = None) -> torch.Tensor:
        num = self.num_params if length is None else length
        grid, me, ranks, host = self.grid, self.comm.rank, self.comm.size, part.cpu()
        whole_P = torch.zeros(num if me == 0 else 0, dtype=part.dtype)
        for row in range(grid.steps):
            starts = [(row * ranks + rank) * grid.length for rank in range(ranks)]
            sizes = [max(0, min(grid.length, num - start)) for start in starts]
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

    def begin(self, round: int = 0, num_contributions: int = 2, near: float = 1.0) -> None:
        super().begin(round, num_contributions, near)
        self._outgoing.clear()
        self._spare.extend(self._next.values())
        self._next.clear()
        self._only = num_contributions == 1

    def add(self, contribution: Contribution) -> None:
        share, delta_P = self.share(contribution), contribution.vector_Q
        if self.exact is not None:
            self.exact.take(self._index[contribution.silo] if self._by_silo else self.comm.rank, share, delta_P)
        if self._by_silo:
            self._outgoing.append(self._of_silo(contribution.silo, share, delta_P))
            return
        rank = self.comm.rank
        if self._only and not self.ring:
            if self._up:
                self._outgoing.append(self._to_encode(rank, share, delta_P, share))
            else:
                self._outgoing.append(Outgoing(rank, share, share, delta_P, 1.0, None, None, _NONE))
            return
        if self._sum is None:
            self._sum = torch.zeros(self.num_params, dtype=self.sum_dtype, device=self.device)
        self.fold(self._sum, delta_P, share, empty=not self._outgoing)
        weight = self.weigh(share) + (self._outgoing.pop().share if self._outgoing else 0)
        if self._up:
            self._outgoing.append(self._to_encode(rank, weight, self._sum, 1.0))
        else:
            self._outgoing.append(Outgoing(rank, weight, 1.0, self._sum, 1.0, None, None, _NONE))

    def _to_encode(self, slot: int, share: float, vector_P: torch.Tensor, scale: float) -> Outgoing:
        assert self._up is not None
        return Outgoing(slot, share, 1.0, bare(vector_P), scale, *self._memory(), self._sizes(self._up))

    def _memory(self) -> tuple[torch.Tensor, Bare]:
        """For the payloads of one vector, as MPI takes it and bare; as many as the round has needed are kept."""
        wave = len(self._outgoing)
        if wave == len(self._payloads):
            num = self._places * self._stride if self._up else self.num_params
            self._payloads.append(self.comm.allocate(num, self._raw, pinned=self.on_device))
            self._payloads_B.append(bare(self._payloads[wave]))
        return self._payloads[wave], self._payloads_B[wave]

    def _sizes(self, coder: Coder) -> np.ndarray:
        return np.array([coder.num_bytes(piece) for piece in range(self.grid.num_pieces)], dtype=np.int64)

    def _of_silo(self, silo: str, share: float, delta_P: torch.Tensor) -> Outgoing:
        """A silo's delta as it will be sent, out of the model's memory."""
        (memory, memory_B), slot = self._memory(), self._index[silo]
        if not self._up:
            memory.copy_(delta_P)
            return Outgoing(slot, share, share, memory, 1.0, None, None, _NONE)
        residual_P = None
        if self._up.channel.feedback:
            residual_P = self._spare.pop() if self._spare else torch.zeros_like(delta_P)
            before = self._of_silos.get(silo)
            residual_P.copy_(before) if before is not None else residual_P.zero_()
            self._next[silo] = residual_P
        sizes = self._sizes(self._up)
        self._up.start(self.round, silo)
        self._failed = None
        vector_P, kept_P = bare(delta_P), None if residual_P is None else bare(residual_P)
        for piece, part in enumerate(self.grid):
            residual_N = None if kept_P is None else kept_P[part]
            sizes[piece] = self._encode_up(vector_P[part], memory_B, piece, 1.0, residual_N)
        self.raise_failed()  # nothing has travelled yet
        return Outgoing(slot, share, share, None, 1.0, memory, memory_B, sizes)

    def _encode_up(self, x_N: Bare, payloads: Bare, piece: int, scale: float, residual_N: Bare | None) -> int:
        assert self._up is not None
        return self._encode(self._up, x_N, self._up.slot(payloads, self._place(piece)), piece, scale, residual_N)

    def _encode(self, coder: Coder, x_N: Bare, slot_B: Bare, piece: int, scale: float, residual_N: Bare | None) -> int:
        try:
            return coder.encode(x_N, slot_B, piece, scale, residual_N)
        except ExchangeError as error:
            self._failed = self._failed or error
            slot_B[:] = 0
            return coder.num_bytes(piece) if coder.codec.fixed else 0

    def _add(self, coder: Coder, came_B: Bare, sum_N: Bare, piece: int, weight: float) -> None:
        try:
            coder.add(came_B, sum_N, piece, weight)
        except ExchangeError as error:
            self._failed = self._failed or error

    def _place(self, piece: int) -> int:
        """Where a piece's payload lies among those of all: by turns, in these by owners, with these by rows."""
        row, owner = divmod(piece, self.comm.size)
        turn, row = divmod(row, self._depth)
        return (turn * self.comm.size + owner) * self._depth + row

    def _pieces(self, turn: int, owner: int | None = None) -> range:
        """Those of a turn, or of these an owner's."""
        width = self._depth * self.comm.size
        stop = min((turn + 1) * width, self.grid.num_pieces)
        return range(turn * width, stop) if owner is None else range(turn * width + owner, stop, self.comm.size)

    # ------------------------------------------------------------ the exchange

    def finish(
        self, params_P: torch.Tensor, server: Server, state: Any, lap: Lap = lambda phase: None
    ) -> tuple[torch.Tensor, Any]:
        self._failed = None
        if self._sum is not None and self._outgoing and not self._by_silo:
            self.folded(self._sum)
        if self._up:
            self._up.start(self.round)
        if self._down:
            self._down.start(self.round)
        agreed, table = self.comm.ishare(self._table())
        if self._lazily and any(out.share for out in self._outgoing):
            self._prepare_turn(0)  # while others are waited for
        self.comm.wait(agreed)
        slots = self._slots(table)
        weight = sum(slot.share for slot in slots)
        if weight == 0.0:
            raise ExchangeError("no weight arrived: nothing to divide by")
        if self.exact is not None:
            order = np.flatnonzero([self.joined(row[3:]) for row in table.tolist()]).tolist()
            self.exact.mean(order, [slot.share for slot in slots], weight, self._by_silo)
            self.exact.step()
            still = self.exact.before(params_P)
        waves = max((slot.wave for slot in slots), default=-1) + 1
        self.gram = np.zeros((len(slots), len(slots))) if self.facts.gram else None
        sent = self._agree_sizes(slots, waves)
        ahead: deque[tuple[int, list[Pending]]] = deque()
        down: deque[tuple[int, Pending]] = deque()
        one_by_one = self._down is not None and not self._down.codec.fixed
        for turn in range(self._turns + AHEAD):
            if turn < self._turns:
                if turn and self._lazily:
                    self._prepare_turn(turn)
                ahead.append((turn, self._send(turn, waves, sent)))
            if turn >= AHEAD and ahead:
                done, requests = ahead.popleft()
                for request in requests:
                    self.comm.wait(request)
                sizes = [
                    self._own(piece, done, slots, weight, params_P, server, state, sent)
                    for piece in self._pieces(done, self.comm.rank)
                ]
                down.append((done, self._return(done, sizes, params_P)))
                while down and (one_by_one or down[0][1].Test()):
                    self._land(*down.popleft(), params_P)
        told = self._tell() if self.asks and (self._up or self._down) else None
        while down:
            self._land(*down.popleft(), params_P)
        if told is not None:
            self._hear(*told)
        if self.exact is not None and self._down:
            self.exact.land(params_P, still)
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

    def _tell(self) -> tuple[Pending, np.ndarray]:
        """Begin to say whether this rank has failed so far: it has encoded all, and what is left all decode alike."""
        codes = np.zeros(self.comm.size)
        codes[self.comm.rank] = self._failed is not None
        return self.comm.ishare(codes)

    def _hear(self, told: Pending, codes: np.ndarray) -> None:
        """Every rank raises what one has failed of."""
        self.comm.wait(told)
        if codes.any():
            self.ask()
        self.raise_failed()

    def _table(self) -> np.ndarray:
        """This rank's vectors, by slots."""
        table = np.zeros((len(self.facts.ids) if self._by_silo else self.comm.size, COLUMNS))
        for wave, out in enumerate(self._outgoing):
            table[out.slot] = (self.comm.rank, wave, out.factor, *self.cut(out.share))
        return table

    def _slots(self, table: np.ndarray) -> list[Slot]:
        """The round's vectors in the order of slots, the same on every rank."""
        return [
            Slot(int(rank), int(wave), share, factor)
            for rank, wave, factor, *limbs in table.tolist()
            if (share := self.joined(limbs))
        ]

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
            if piece == 0:
                self._up.start(self.round, f"rank {self.comm.rank}")
            out.sizes[piece] = self._encode_up(
                out.vector_P[part], out.payloads_B, piece, out.scale, self._residual.part(part)
            )
        elif self._host_P is not None and out.vector_P.device.type != "cpu":
            self._host_P[part].copy_(out.vector_P[part])

    def _prepare_turn(self, turn: int) -> None:
        for out in self._outgoing:
            for piece in self._pieces(turn):
                self._prepare(out, piece)
                self.comm.progress()

    def _send(self, turn: int, waves: int, sent: np.ndarray) -> list[Pending]:
        """Everybody's pieces of a turn on their way to the owners."""
        me, ranks = self.comm.rank, range(self.comm.size)
        room = self._depth * self._stride
        arrived = self._room(turn, waves)
        mine = self._pieces(turn, me)
        requests = []
        for wave in range(waves):
            send, to = self._nothing, [(0, 0)] * len(ranks)
            if wave < len(self._outgoing):
                send = self._travels(self._outgoing[wave])[turn * len(ranks) * room :]
                to = [
                    (rank * room, self._length(self._pieces(turn, rank), sent[me, wave], self._stride))
                    for rank in ranks
                ]
                to[me] = (0, 0)  # what is mine is read where it is
            come = [
                (rank * room, self._length(mine, sent[rank, wave], self._stride) if rank != me else 0) for rank in ranks
            ]
            requests.append(self.comm.alltoall(send, to, arrived[wave], come))
        return requests

    @staticmethod
    def _length(pieces: range, sizes: Any, stride: int) -> int:
        """Of the payloads of these pieces, one beside the other; of none where nothing is sent."""
        last = int(sizes[pieces[-1]]) if pieces else 0
        return (len(pieces) - 1) * stride + last if last else 0

    def _travels(self, out: Outgoing) -> torch.Tensor:
        """The memory that MPI reads."""
        if out.payloads is not None:
            return out.payloads
        assert out.vector_P is not None
        return out.vector_P if out.vector_P.device.type == "cpu" else self._host_P  # type: ignore[return-value]

    def _room(self, turn: int, waves: int) -> torch.Tensor:
        """Where a turn's pieces arrive: [waves, ranks * rows * stride]."""
        place, needed = turn % (AHEAD + 1), waves * self.comm.size * self._depth * self._stride
        while len(self._arrived) <= place:
            self._arrived.append(torch.zeros(0, dtype=self._raw))
            self._arrived_B.append(None)
        if len(self._arrived[place]) < needed:
            self._arrived[place] = self.comm.allocate(needed, self._raw, pinned=self.on_device)
            self._arrived_B[place] = bare(self._arrived[place])
        return self._arrived[place][:needed].view(waves, -1)

    def _own(
        self,
        piece: int,
        turn: int,
        slots: list[Slot],
        weight: float,
        params_P: torch.Tensor,
        server: Server,
        state: Any,
        sent: np.ndarray,
    ) -> int:
        """A piece of mine: added up in the order of slots, divided, stepped, and ready to travel. Bytes of it."""
        part, size = self.grid.part(piece), self.grid.size(piece)
        mean = self._mean[:size]
        came = [(slot, self._came(turn, piece, slot, int(sent[slot.rank, slot.wave, piece]))) for slot in slots]
        if self.facts.each is None:
            self._sum_up(came, weight, piece, mean)
        else:
            shares_K = torch.tensor([slot.share for slot in slots], device=self.device)
            mean.copy_(self.facts.each(self._rows(came, piece, size), shares_K))
        if self.gram is not None and part.start < self.facts.gram:
            rows_KS = self._rows(came, piece, size)[:, : self.facts.gram - part.start]
            self.gram += products(rows_KS)
        if self.exact is not None:
            self.exact.put(mean, part.start)
        kept = self.grid.kept(piece)
        new_S, _ = server.step(params_P[part], mean, type(state)(*(tensor[kept] for tensor in state)), part.start)
        if not self._down:
            params_P[part].copy_(new_S)
            if self.on_device:
                self._new_P[part].copy_(new_S)
            return size
        if self.exact is not None:
            self.exact.keep(new_S, part.start)
        step_S = new_S.sub_(params_P[part])
        if self.exact is not None:
            self.exact.blank(step_S, part.start)
        lost_S = None if self._lost_S is None else self._lost_S[kept]
        slot_B = self._down.slot(self._down_B, self._place(piece))
        return self._encode(self._down, bare(step_S), slot_B, piece, 1.0, lost_S)

    def _came(self, turn: int, piece: int, slot: Slot, length: int) -> Any:
        """What a slot sent of my piece, where it lies: bare if it is a payload."""
        if slot.rank == self.comm.rank:
            out, start = self._outgoing[slot.wave], self._place(piece) * self._stride
            return (out.payloads_B if self._up else self._travels(out))[start : start + length]
        sender = slot.wave * self.comm.size + slot.rank
        start = (sender * self._depth + self._place(piece) % self._depth) * self._stride
        return (self._arrived_B if self._up else self._arrived)[turn % (AHEAD + 1)][start : start + length]

    def _sum_up(self, came: list[tuple[Slot, Any]], weight: float, piece: int, mean: torch.Tensor) -> None:
        """The weighted mean, one slot after the other."""
        if self._total is not None:
            total = self._total[: len(mean)].zero_()
            for _, ring in came:
                total.add_(ring.to(self.device))
            self.divide(total, weight, mean)
        elif self._up:
            sum_N, wide = bare(mean.zero_()), None
            for number, (slot, payload) in enumerate(came):
                if number and not number % MANY:
                    wide = mean.double() if wide is None else wide.add_(mean)
                    mean.zero_()
                self._add(self._up, payload, sum_N, piece, slot.factor / weight)
            if wide is not None:
                mean.copy_(wide.add_(mean))
        elif len(came) > MANY:
            total = torch.zeros(len(mean), dtype=torch.float64, device=self.device)
            for slot, values in came:
                total.add_(values.to(self.device), alpha=slot.factor / weight)
            mean.copy_(total)
        else:
            torch.mul(came[0][1].to(self.device), came[0][0].factor / weight, out=mean)
            for slot, values in came[1:]:
                mean.add_(values.to(self.device), alpha=slot.factor / weight)

    def _rows(self, came: list[tuple[Slot, Any]], piece: int, size: int) -> torch.Tensor:
        """Every slot's values of my piece, decoded, [slots, size]."""
        needed = len(came) * size
        if len(self._decoded) < needed:
            self._decoded = torch.zeros(needed, dtype=self.dtype, device=self.device)
        rows_KS = self._decoded[:needed].view(len(came), size)
        for row_S, (_, values) in zip(rows_KS, came, strict=True):
            if self._up:
                self._add(self._up, values, bare(row_S.zero_()), piece, 1.0)
            else:
                row_S.copy_(values)
        return rows_KS

    def _return(self, turn: int, sizes: list[int], params_P: torch.Tensor) -> Pending:
        """My pieces of a turn, of these sizes, on their way to all, and theirs to me."""
        ranks, grid = range(self.comm.size), self.grid
        if self._down:
            stride, vector = self._down.stride, self._sent_down
            if not self._down.codec.fixed:
                mine = np.zeros(len(ranks))
                mine[self.comm.rank] = sum(sizes)  # of one piece
                self._came_down = self.comm.share(mine).astype(int).tolist()
                lengths = self._came_down
            else:
                each = [self._down.num_bytes(piece) for piece in range(grid.num_pieces)]
                lengths = [self._length(self._pieces(turn, rank), each, stride) for rank in ranks]
        else:
            stride, vector = grid.length, self._new_P if self.on_device else params_P
            lengths = [sum(grid.size(piece) for piece in self._pieces(turn, rank)) for rank in ranks]
        room = self._depth * stride
        first = turn * len(ranks) * room
        return self.comm.allgather(vector[first:], [(rank * room, length) for rank, length in enumerate(lengths)])

    def _land(self, turn: int, request: Pending, params_P: torch.Tensor) -> None:
        """A turn has come back: decode it where parameters are read."""
        self.comm.wait(request)
        pieces = self._pieces(turn)
        if self._down:
            fixed, payloads_B, new_P = self._down.codec.fixed, self._down_B, bare(params_P)
            for piece in pieces:
                length = self._down.num_bytes(piece) if fixed else self._came_down[piece - pieces.start]
                came = self._down.slot(payloads_B, self._place(piece))[:length]
                self._add(self._down, came, new_P[self.grid.part(piece)], piece, 1.0)
        elif self.on_device:
            for part in map(self.grid.part, pieces):
                params_P[part].copy_(self._new_P[part])


def products(rows_KS: torch.Tensor) -> np.ndarray:
    """Inner products of rows in float64, a part of them at a time, [K, K]."""
    found = torch.zeros(len(rows_KS), len(rows_KS), dtype=torch.float64, device=rows_KS.device)
    for start in range(0, rows_KS.shape[1], PART):
        exact_KB = rows_KS[:, start : start + PART].double()
        found.addmm_(exact_KB, exact_KB.T)
    return found.cpu().numpy()


_NONE = np.zeros(0, dtype=np.int64)
