"""The way up: sends this rank's vectors to the owners of their pieces, and receives everybody's.

A vector is sent from where it lies, or encoded first: batch by batch while earlier batches travel, or completely before
the first batch if payload lengths are not known in advance. A silo's delta is encoded at once, because the next silo
reuses its memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from fedmpi.codecs import Bare, bare
from fedmpi.comm import Comm, Pending
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.chunks import Batches, Coder, Grid, RankResidual, SiloResiduals

if TYPE_CHECKING:
    from fedmpi.exchange.config import ExchangeSection

Mask = Callable[[torch.Tensor, int], None]  # changes the elements of a vector from a place on

AHEAD = 3  # batches on their way up while the owner sums one


class Sender(NamedTuple):
    """One vector of the round: a rank's sum, or a silo's delta. Equal on every rank."""

    number: int  # rank, or index of the silo in the federation
    rank: int
    vector: int  # index among its rank's vectors
    share: float  # share of the weight; an integer in the ring
    factor: float  # factor that its values still need in the sum


@dataclass(frozen=True)
class Outgoing:
    """One of this rank's vectors."""

    number: int
    share: float
    factor: float
    vector_P: Any  # sent as it is, or bare and still to encode; None: already encoded
    scale: float = 1.0  # factor that encoding applies
    payloads: torch.Tensor | None = None  # of all pieces, each at its offset
    payloads_B: Bare = None  # the same memory, for codecs
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # of the payloads [pieces]
    mask: Mask | None = None  # writes or masks a piece before it is sent
    in_turn: bool = False  # whether `vector_P` has room for the batches in flight only, which take turns


class Upload:
    """All-to-all of pieces, batch by batch."""

    def __init__(
        self,
        section: ExchangeSection,
        comm: Comm,
        params_P: torch.Tensor,
        facts: ExchangeContext,
        grid: Grid,
        batches: Batches,
        dtype: torch.dtype,
    ) -> None:
        self.comm, self.grid, self.batches, self.device = comm, grid, batches, params_P.device
        on_device = self._on_device = self.device.type != "cpu"
        self.coder = None if section.up.plain else Coder(section.up, grid, facts.seed, self.device, "up")
        by_silo = section.scope == "silo"
        self.residual = SiloResiduals(self.device) if by_silo else RankResidual(section.up, params_P, facts)
        self.outgoing: list[Outgoing] = []
        # An aggregator that needs all deltas for its weights reads each batch twice, so batches stay in memory.
        held = facts.aggregator is not None and facts.aggregator.needs == "gram"
        self._num_rooms = max(1, batches.num) if held else AHEAD + 1
        self._lazily = section.up.codec.fixed  # whether all payload sizes are known before encoding
        self._raw = torch.uint8 if self.coder else dtype
        self._stride = self.coder.stride if self.coder else grid.length
        self._payloads: list[tuple[torch.Tensor, Bare]] = []  # payload memory by vector, reused
        self._host_P = comm.allocate(len(params_P), dtype, pinned=True) if on_device else None
        self._nothing = torch.zeros(0, dtype=self._raw)
        self._arrived: list[
            tuple[torch.Tensor, Bare]
        ] = []  # by batch in flight or held: [vectors, ranks, depth, stride]
        self._sizes = np.zeros((0, 0, 0), dtype=np.int64)
        self._num_vectors = 0  # of the rank that sends the most

    # ------------------------------------------------------------ this rank's vectors

    def begin(self) -> None:
        """Forget the last round, or an interrupted one."""
        self.outgoing.clear()
        if isinstance(self.residual, SiloResiduals):
            self.residual.begin()

    def put(self, number: int, share: float, vector_P: torch.Tensor, factor: float, mask: Mask | None = None) -> None:
        """Add a vector that stays unchanged until it has been sent; the sum holds it `factor` times. `mask` is called
        for each piece before it is sent."""
        if self.coder is None:
            self.outgoing.append(Outgoing(number, share, factor, vector_P, mask=mask))
            return
        memory, sizes = self._memory(), self._full_sizes(self.coder)
        self.outgoing.append(Outgoing(number, share, 1.0, bare(vector_P), factor, *memory, sizes))

    def put_written(self, number: int, share: float, write: Mask) -> None:
        """Add a vector without a codec whose pieces `write` writes just before they are sent, into memory that stays in
        the cache."""
        if not self._payloads:
            memory = self.comm.allocate((AHEAD + 1) * self.batches.width * self._stride, self._raw)
            self._payloads.append((memory, None))
        memory, _ = self._payloads[0]
        self.outgoing.append(Outgoing(number, share, 1.0, memory, mask=write, in_turn=True))

    def put_silo(self, number: int, silo: str, round: int, share: float, delta_P: torch.Tensor) -> None:
        """Copy or encode a silo's delta at once, since the next silo overwrites the model's memory."""
        payloads, payloads_B = self._memory()
        if self.coder is None:
            self.outgoing.append(Outgoing(number, share, share, payloads.copy_(delta_P)))
            return
        assert isinstance(self.residual, SiloResiduals)
        residual_P = self.residual.draft(silo, delta_P) if self.coder.channel.feedback else None
        sizes = self._full_sizes(self.coder)
        self.coder.start(round, silo)
        vector_P, kept_P = bare(delta_P), None if residual_P is None else bare(residual_P)
        for piece, part in enumerate(self.grid):
            residual_N = None if kept_P is None else kept_P[part]
            sizes[piece] = self._encode(self.coder, vector_P[part], payloads_B, piece, 1.0, residual_N)
        self.coder.raise_failed()  # nothing has been sent yet
        self.outgoing.append(Outgoing(number, share, share, None, 1.0, payloads, payloads_B, sizes))

    def _memory(self) -> tuple[torch.Tensor, Bare]:
        """Payload memory for one more vector, as MPI takes it and bare; reused in later rounds."""
        index = len(self.outgoing)
        if index == len(self._payloads):
            num = self.batches.num_offsets * self._stride if self.coder else self.grid.num_elements
            payloads = self.comm.allocate(num, self._raw, pinned=self._on_device)
            self._payloads.append((payloads, bare(payloads)))
        return self._payloads[index]

    def _full_sizes(self, coder: Coder) -> np.ndarray:
        return np.array([coder.num_bytes(piece) for piece in range(self.grid.num_pieces)], dtype=np.int64)

    def _encode(
        self, coder: Coder, x_N: Bare, payloads_B: Bare, piece: int, scale: float, residual_N: Bare | None
    ) -> int:
        slot_B = coder.slot(payloads_B, self.batches.offset(piece))
        return coder.encode_or_note(x_N, slot_B, piece, scale, residual_N)

    # ------------------------------------------------------------ transfer

    def prepare_first(self) -> None:
        """Encode the first batch while it is still unknown who else sends."""
        if self._lazily and any(out.share for out in self.outgoing):
            self._prepare_batch(0)

    def agree(self, senders: Sequence[Sender]) -> None:
        """Agree how much each rank sends of each of its vectors, in elements sent [ranks, vectors, pieces]. Collective.

        Payloads of variable length are encoded here, before the first one is sent.
        """
        pieces = range(self.grid.num_pieces)
        self._num_vectors = max((sender.vector for sender in senders), default=-1) + 1
        self._sizes = np.zeros((self.comm.size, self._num_vectors, len(pieces)), dtype=np.int64)
        if self._lazily:
            full = [self.coder.num_bytes(piece) if self.coder else self.grid.size(piece) for piece in pieces]
            for sender in senders:
                self._sizes[sender.rank, sender.vector] = full
            return
        for index, out in enumerate(self.outgoing):
            for piece in pieces:
                self._prepare(out, piece)
            self._sizes[self.comm.rank, index] = out.sizes
        self._sizes = self.comm.share(self._sizes.reshape(-1)).reshape(self._sizes.shape).astype(np.int64)

    def arriving(self) -> Iterator[int]:
        """Yield each batch once it has arrived, while later ones are in flight."""
        under_way: deque[list[Pending]] = deque()
        for batch in range(self.batches.num + AHEAD):
            if batch < self.batches.num:
                if batch and self._lazily:
                    self._prepare_batch(batch)
                under_way.append(self._send(batch))
            if batch >= AHEAD:
                for request in under_way.popleft():
                    self.comm.wait(request)
                yield batch - AHEAD

    def came(self, piece: int, sender: Sender) -> Any:
        """What a sender sent for one of my pieces, without a copy; bare if it is a payload."""
        length = int(self._sizes[sender.rank, sender.vector, piece])
        offset = self.batches.offset(piece)
        if sender.rank == self.comm.rank:
            out = self.outgoing[sender.vector]
            start = self._place(out, offset)
            return (out.payloads_B if self.coder else self._travels(out))[start : start + length]
        batch, depth = offset // self.batches.width, self.batches.depth
        start = ((sender.vector * self.comm.size + sender.rank) * depth + offset % depth) * self._stride
        arrived, arrived_B = self._arrived[batch % self._num_rooms]
        return (arrived_B if self.coder else arrived)[start : start + length]

    def _prepare(self, out: Outgoing, piece: int) -> None:
        """Put the piece into host memory in the form that is sent."""
        if out.vector_P is None:
            return
        part = self.grid.part(piece)
        if out.mask is not None:
            start = self._place(out, self.batches.offset(piece))
            out.mask(out.vector_P[start : start + part.stop - part.start], part.start)
        if self.coder is not None:
            assert isinstance(self.residual, RankResidual)
            if piece == 0:
                self.coder.start(self.coder.round, f"rank {self.comm.rank}")
            residual_N = self.residual.part(part)
            out.sizes[piece] = self._encode(
                self.coder, out.vector_P[part], out.payloads_B, piece, out.scale, residual_N
            )
        elif self._host_P is not None and out.vector_P.device.type != "cpu":
            self._host_P[part].copy_(out.vector_P[part])

    def _prepare_batch(self, batch: int) -> None:
        for out in self.outgoing:
            for piece in self.batches.pieces(batch):
                self._prepare(out, piece)
                self.comm.progress()

    def _send(self, batch: int) -> list[Pending]:
        """Start sending every rank's pieces of a batch to their owners."""
        me, ranks, room = self.comm.rank, range(self.comm.size), self.batches.depth * self._stride
        arrived = self._room(batch)
        requests = []
        for number in range(self._num_vectors):
            send, to = self._nothing, [(0, 0)] * len(ranks)
            if number < len(self.outgoing):
                out = self.outgoing[number]
                send = self._travels(out)[self._place(out, batch * self.batches.width) :]
                to = [(rank * room, self._length(batch, rank, self._sizes[me, number])) for rank in ranks]
                to[me] = (0, 0)  # my own pieces are read in place
            come = [
                (rank * room, self._length(batch, me, self._sizes[rank, number]) if rank != me else 0) for rank in ranks
            ]
            requests.append(self.comm.alltoall(send, to, arrived[number], come))
        return requests

    def _length(self, batch: int, owner: int, sizes: np.ndarray) -> int:
        return self.batches.length(batch, owner, sizes, self._stride)

    def _place(self, out: Outgoing, offset: int) -> int:
        """Where the payload with this offset starts in the vector's memory."""
        return (offset % ((AHEAD + 1) * self.batches.width) if out.in_turn else offset) * self._stride

    def _travels(self, out: Outgoing) -> torch.Tensor:
        """The memory that MPI reads."""
        on_host = out.payloads if out.payloads is not None else out.vector_P
        return self._host_P if on_host.device.type != "cpu" and self._host_P is not None else on_host

    def _room(self, batch: int) -> torch.Tensor:
        """The memory where a batch's pieces arrive: [vectors, ranks * depth * stride]."""
        number, needed = batch % self._num_rooms, self._num_vectors * self.batches.width * self._stride
        while len(self._arrived) <= number:
            self._arrived.append((self._nothing, None))
        if len(self._arrived[number][0]) < needed:
            memory = self.comm.allocate(needed, self._raw, pinned=self._on_device)
            self._arrived[number] = (memory, bare(memory))
        return self._arrived[number][0][:needed].view(self._num_vectors, -1)
