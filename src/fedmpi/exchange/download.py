"""The way down: an owner sends its new values to all ranks, batch by batch.

Without a codec, new parameters arrive in the memory that the model reads. With one, the step (new minus old parameters)
is sent, and all ranks, also the owner, add its decoded value.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fedmpi.codecs import bare
from fedmpi.comm import Comm, Pending
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.chunks import Batches, Coder, Grid
from fedmpi.exchange.exact import Exact

if TYPE_CHECKING:
    from fedmpi.exchange.config import ExchangeSection


class Download:
    """All-gather of pieces."""

    def __init__(
        self,
        section: ExchangeSection,
        comm: Comm,
        params_P: torch.Tensor,
        facts: ExchangeContext,
        grid: Grid,
        batches: Batches,
    ) -> None:
        self.comm, self.grid, self.batches = comm, grid, batches
        device, on_device = params_P.device, params_P.device.type != "cpu"
        self.coder = None if section.down.plain else Coder(section.down, grid, facts.seed, device, "down")
        own = grid.num_owned(comm.rank)
        self.residual = torch.zeros(own, device=device) if section.down.feedback else None  # of my pieces
        self._residual_S = None if self.residual is None else bare(self.residual)
        self._new_P: torch.Tensor | None = None  # send buffer, where MPI cannot read the parameters themselves
        if self.coder is not None:
            self._payloads = comm.allocate(batches.num_offsets * self.coder.stride, torch.uint8, pinned=on_device)
            self._payloads_B = bare(self._payloads)
            self._full_sizes = [self.coder.num_bytes(piece) for piece in range(grid.num_pieces)]
        elif on_device:
            self._new_P = comm.allocate(grid.num_elements, params_P.dtype, pinned=True)
        self._put_bytes = 0  # bytes of my payloads in this batch, for codecs of variable length
        self._under_way: deque[tuple[int, Sequence[int], Pending]] = deque()  # batch, payload sizes, request

    def put(self, piece: int, new_S: torch.Tensor, params_P: torch.Tensor, exact: Exact | None) -> None:
        """Take the new values of one of my pieces, [S]. With a codec, `new_S` is overwritten."""
        part, start = self.grid.part(piece), self.grid.part(piece).start
        if self.coder is None:
            params_P[part].copy_(new_S)
            if self._new_P is not None:
                self._new_P[part].copy_(new_S)
            return
        if exact is not None:
            exact.keep(new_S, start)
        step_S = new_S.sub_(params_P[part])
        if exact is not None:
            exact.blank(step_S, start)
        residual_S = None if self._residual_S is None else self._residual_S[self.grid.kept(piece)]
        slot_B = self.coder.slot(self._payloads_B, self.batches.offset(piece))
        self._put_bytes += self.coder.encode_or_note(bare(step_S), slot_B, piece, 1.0, residual_S)

    def send(self, batch: int, params_P: torch.Tensor) -> None:
        """Start to send my pieces of a batch to all ranks and to receive theirs. Collective."""
        grid, batches, ranks, pieces = self.grid, self.batches, range(self.comm.size), self.batches.pieces(batch)
        sizes: Sequence[int] = ()  # of the batch's payloads
        if self.coder is None:
            stride, vector = grid.length, params_P if self._new_P is None else self._new_P
            lengths = [sum(grid.size(piece) for piece in batches.pieces(batch, rank)) for rank in ranks]
        elif self.coder.codec.fixed:
            stride, vector, sizes = self.coder.stride, self._payloads, self._full_sizes[pieces.start : pieces.stop]
            lengths = [batches.length(batch, rank, self._full_sizes, stride) for rank in ranks]
        else:  # here a batch is one stripe: one piece from each rank
            stride, vector = self.coder.stride, self._payloads
            sizes = lengths = self.comm.gather_number(self._put_bytes).astype(int).tolist()
        self._put_bytes = 0
        room = batches.depth * stride
        parts = [(rank * room, length) for rank, length in enumerate(lengths)]
        self._under_way.append((batch, sizes, self.comm.allgather(vector[batch * len(ranks) * room :], parts)))

    def land(self, params_P: torch.Tensor, wait: bool = False) -> None:
        """Put the batches that have arrived into the parameters; with `wait`, wait for all of them first."""
        while self._under_way and (wait or self._under_way[0][2].Test()):
            batch, sizes, request = self._under_way.popleft()
            self.comm.wait(request)
            pieces = self.batches.pieces(batch)
            if self.coder is not None:
                new_P = bare(params_P)
                for piece, size in zip(pieces, sizes, strict=False):
                    came_B = self.coder.slot(self._payloads_B, self.batches.offset(piece))[:size]
                    self.coder.add_or_note(came_B, new_P[self.grid.part(piece)], piece, 1.0)
            elif self._new_P is not None:
                for part in map(self.grid.part, pieces):
                    params_P[part].copy_(self._new_P[part])
