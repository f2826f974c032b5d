"""Plans root and replicated: whole vectors, summed by MPI.

    root         Reduce to rank 0, step there, Bcast of the parameters (the classic server)
    replicated   Allreduce, every rank takes the same step

The sum of weights follows the vector, split into limbs that MPI adds exactly (weights.py). MPI sums a linear codec's
payloads directly, because all ranks encode with one key (replicated).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from fedmpi.codecs import bare
from fedmpi.comm import Comm, blocks
from fedmpi.comm.base import BLOCK_BYTES
from fedmpi.errors import ExchangeError
from fedmpi.exchange import weights
from fedmpi.exchange.base import Exchange, ExchangeContext, Lap, Machine, without
from fedmpi.exchange.chunks import SHORTEST, Coder, Grid, RankResidual, stride
from fedmpi.exchange.cost import Cost, Sizes, Traffic, exact_bytes, limbs_bytes, word_bytes
from fedmpi.server import Server
from fedmpi.types import Contribution

if TYPE_CHECKING:
    from fedmpi.exchange.config import ExchangeSection


Transfer = Callable[[torch.Tensor, torch.Tensor], None]  # sums what ranks send into what they receive
STEP = 1 << 18  # elements at a time, under masks, from the sum to the new parameters


class Whole(Exchange):
    """Sums whole vectors, each followed by its weight, or the payloads of a linear codec."""

    sees: ClassVar[tuple[str, str]] = ("parts of {}", "parts of {}")

    def __init__(self, section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext) -> None:
        super().__init__(section, comm, params_P, facts)
        self._coder: Coder | None = None
        self._bits, self._limbs = weights.behind(comm.size, self.masked.sent if self.masked else self.sum_dtype)
        self._weight = 0  # of this rank's silos
        self._num = 0  # of them
        self._empty = True
        if self.masked is not None:
            length = next(blocks(self.num_params + self.num_params % 2, self.sum_dtype.itemsize)).stop
            self._send, self._recv = (comm.allocate(length, self.sum_dtype) for _ in range(2))
            self._sum, self._mean_P = torch.zeros(0, dtype=self.sum_dtype), params_P[:0]
            return
        length = self.num_params + self._limbs
        # Ranks fold their sums on the device where silos train.
        self._sum = torch.zeros(length, dtype=self.sum_dtype, device=self.device)
        if not section.up.plain:
            self._coder = Coder(section.up, Grid(self.num_params, comm.size), facts.seed, self.device, "up")
            self._residual = self.holders["up"] = RankResidual(section.up, params_P, facts)
            self.coders.append(self._coder)
            length = self._coder.grid.num_pieces * self._coder.stride // 4 + self._limbs
        apart = self._coder is not None
        self._send = comm.allocate(length, self.sum_dtype, self.device) if apart else self._sum
        self._recv = comm.allocate(length, self.sum_dtype, self.device)
        whole_mean = self.ring or apart
        self._mean_P = torch.zeros_like(params_P) if whole_mean else self._recv[: self.num_params]

    def begin(self, round: int = 0, num_contributions: int = 2, near: float = 1.0) -> None:
        super().begin(round, num_contributions, near)
        self._weight, self._num, self._empty = 0, 0, True

    def add(self, contribution: Contribution) -> None:
        share = self.share(contribution)
        if self.exact is not None:
            self.exact.take(self.comm.rank, share, contribution.vector_Q)
        if self.masked is None:
            self.fold(self._sum[: self.num_params], contribution.vector_Q, share, self._empty)
        else:
            if self.masked.folds and not len(self._sum):
                self._sum = self.comm.allocate(self.num_params + self.num_params % 2, self.sum_dtype)
            self.masked.fold(self._sum, contribution.silo, contribution.vector_Q, share, self._empty)
        self._weight += weights.counted(share)
        self._num += 1
        self._empty = False

    def _sent(self) -> torch.Tensor:
        """What this rank adds to the sum."""
        if self._empty:
            self._sum.zero_()
        else:
            self.folded(self._sum[: self.num_params])
        limbs = weights.cut(self._weight, self._bits, self._limbs)
        self._sum[self.num_params :] = torch.tensor(limbs, dtype=self.sum_dtype)
        if self._coder is not None:
            self._send.zero_()
            self._coder.start(self.round)  # one key for all ranks
            for piece, part in enumerate(self._coder.grid if not self._empty else ()):
                payload = self._coder.slot(self._send[: -self._limbs].view(torch.uint8), piece)
                self._coder.encode_or_note(bare(self._sum)[part], payload, piece, 1.0, self._residual.part(part))
            self._send[-self._limbs :] = self._sum[-self._limbs :]
        return self._send

    def _under_masks(self, transfer: Transfer, steps: bool, params_P: torch.Tensor, server: Server, state: Any) -> None:
        """Sum under masks and step, block by block, each in the cache from the silo's vector to the new parameters.

        The weight goes first, because a block's mean needs it. `steps`: whether this rank gets the sums. Collective."""
        masked = self.masked
        assert masked is not None
        masked.open()
        head = masked.head(self._weight, self._num, self._bits, self._limbs)
        heads = torch.zeros_like(head)
        transfer(head, heads)
        weight = 0
        if steps:
            masked.require_all(int(heads[-1]))
            weight = weights.whole(heads[: self._limbs].tolist(), self._bits)
            weight = weights.modulo(weight, self._bits, self._limbs)
            if not weight:
                raise ExchangeError("no weight arrived: nothing to divide by")
        whole = server.reads_norms and steps  # such a server sees the whole mean before its first step
        if len(self._mean_P) < (length := self.num_params if whole else len(self._recv) * steps):
            self._mean_P = torch.zeros(length, dtype=self.dtype)
        for part in blocks(self.num_params, self._send.itemsize):
            send = self._covered(part)
            recv = self._recv[: len(send)]
            transfer(send.view(masked.sent), recv.view(masked.sent))
            recv = recv[: part.stop - part.start]
            if steps and server.adds:
                masked.mean([recv], weight, params_P[part], adds=True)
            elif steps:
                mean_N = self._mean_P[part] if whole else self._mean_P[: len(recv)]
                for low in range(0, len(recv), STEP):
                    piece = slice(low, min(low + STEP, len(recv)))
                    masked.mean([recv[piece]], weight, mean_N[piece])
                    if not whole:
                        _step(server, params_P, mean_N[piece], state, part.start + low)
        if whole:
            server = server.knowing(server.look(self._mean_P))
            for low in range(0, self.num_params, STEP):
                _step(server, params_P, self._mean_P[low : low + STEP], state, low)

    def _covered(self, part: slice) -> torch.Tensor:
        """A block of this rank's sum under masks, of whole words."""
        assert self.masked is not None
        folded, length = self.masked.folds and not self._empty, part.stop - part.start
        length += length % self.masked.pair
        send = self._sum[part.start : part.start + length] if folded else self._send[:length]
        if self._empty:
            send.zero_()
        self.masked.cover(send, part.start)
        return send

    def _mean(self) -> torch.Tensor:
        limbs = self._recv[self.num_params :] if self._coder is None else self._recv[-self._limbs :]
        weight = weights.whole(limbs.tolist(), self._bits)
        if not weight:
            raise ExchangeError("no weight arrived: nothing to divide by")
        if self._coder is not None:
            for piece, part in enumerate(self._coder.grid):
                payload = self._coder.slot(self._recv[: -self._limbs].view(torch.uint8), piece)
                self._coder.decode(payload, self._mean_P[part], piece)
            self._mean_P.div_(weight / weights.GRAIN)
            if self.exact is not None:
                self.exact.mean((), weight / weights.GRAIN, one_by_one=False)
                self.exact.put(self._mean_P, 0)
            return self._mean_P
        summed = self._recv[: self.num_params]
        self.divide(summed, weight if self.ring else weight / weights.GRAIN, self._mean_P)
        return self._mean_P

    @classmethod
    def _held(cls, section: ExchangeSection, sizes: Sizes) -> dict[str, int]:
        """What both plans keep, besides the server's state."""
        vector, word = sizes.vector_bytes, word_bytes(section, sizes)
        own = {"global parameters": vector}
        if not section.up.plain:
            grid = Grid(sizes.num_elements, sizes.num_ranks)
            payload = grid.num_pieces * stride(section.up.codec, grid)
            own |= {"sum": vector, "payloads sent": payload, "payloads received": payload, "mean": vector}
            return own | ({"residual": vector} if section.up.feedback else {})
        if sizes.secure_bits:
            own |= {"blocks": 2 * min(BLOCK_BYTES, sizes.num_elements * word) + min(BLOCK_BYTES, vector)}
            return own | ({"sum": sizes.num_elements * word} if sizes.hosted > 1 else {})
        own |= {"sum": (sizes.num_elements + 1) * word, "received": (sizes.num_elements + 1) * word}
        return own | ({"mean": vector} if section.reduction == "reproducible" else {})


class Replicated(Whole):
    """Allreduce; every rank takes the same step."""

    masks: ClassVar[bool] = True

    @classmethod
    def supports(cls, section: ExchangeSection, machine: Machine) -> str:
        return without(section, up=not section.up.codec.linear)

    @classmethod
    def suits(cls, machine: Machine, num_elements: int) -> str:
        if machine.num_ranks == 1:
            return "one rank"
        return f"at most {SHORTEST:,} parameters" if num_elements <= SHORTEST else ""  # a vector of one piece

    @classmethod
    def cost(cls, section: ExchangeSection, sizes: Sizes) -> Cost:
        sums, control = sizes.num_elements * word_bytes(section, sizes), 0
        if not section.up.plain:
            grid = Grid(sizes.num_elements, sizes.num_ranks)
            sums, control = grid.num_pieces * stride(section.up.codec, grid), 2 * 8 * sizes.num_ranks**2
        sums = -(-sums // 4) * 4 if sizes.secure_bits else sums
        each_way = sizes.num_ranks * (sums + limbs_bytes(section, sizes)) + exact_bytes(section, sizes)
        memory = cls._held(section, sizes) | {"server state": sizes.state_bytes}
        return Cost(Traffic(each_way, each_way, control, "Allreduce"), memory)

    @classmethod
    def vectors_sent(cls, num_ranks: int) -> int:
        return num_ranks  # every rank's vector goes into the sum

    @classmethod
    def link_bytes(cls, up_R: np.ndarray, down_R: np.ndarray, vector_bytes: int) -> float:
        return 2 * (len(up_R) - 1) / len(up_R) * vector_bytes

    def finish(
        self, params_P: torch.Tensor, server: Server, state: Any, lap: Lap = lambda phase: None
    ) -> tuple[torch.Tensor, Any]:
        if self.masked is not None:
            self._under_masks(self.comm.allreduce, True, params_P, server, state)
        else:
            self.comm.allreduce(self._sent(), self._recv)
            if self._coder is not None:
                self.ask()
            lap("exchange")
            mean_P = self._mean()
            server = server.knowing(server.look(mean_P)) if server.reads_norms else server
            new_P, state = server.step(params_P, mean_P, state)
            params_P.copy_(new_P)
            lap("step")
        self.verify(params_P)
        lap("exchange")
        return params_P, state


class Root(Whole):
    """Reduce to rank 0, which alone keeps the server's state and steps; then Bcast."""

    one_way_at_a_time = True

    masks: ClassVar[bool] = True
    sees: ClassVar[tuple[str, str]] = ("{}", "sums on the way")

    @classmethod
    def supports(cls, section: ExchangeSection, machine: Machine) -> str:
        return without(section)

    @classmethod
    def cost(cls, section: ExchangeSection, sizes: Sizes) -> Cost:
        others = sizes.num_ranks - 1
        sums = sizes.num_elements * word_bytes(section, sizes)
        sums = -(-sums // 4) * 4 if sizes.secure_bits else sums
        up = others * (sums + limbs_bytes(section, sizes))
        memory = cls._held(section, sizes) | {"server state": sizes.state_bytes if sizes.rank == 0 else 0}
        return Cost(Traffic(up, others * sizes.vector_bytes, 0, "Reduce + Bcast"), memory)

    @classmethod
    def link_bytes(cls, up_R: np.ndarray, down_R: np.ndarray, vector_bytes: int) -> float:
        return float(vector_bytes if len(up_R) > 1 else 0)

    def shard(self, vector_P: torch.Tensor) -> torch.Tensor:
        return vector_P if self.comm.rank == 0 else vector_P[:0]

    def scatter(self, whole_P: torch.Tensor | None, part: torch.Tensor) -> None:
        if whole_P is not None:
            part.copy_(whole_P)

    def finish(
        self, params_P: torch.Tensor, server: Server, state: Any, lap: Lap = lambda phase: None
    ) -> tuple[torch.Tensor, Any]:
        if self.masked is not None:
            self._under_masks(self.comm.reduce, self.comm.rank == 0, params_P, server, state)
        else:
            self.comm.reduce(self._sent(), self._recv)
        lap("exchange")
        if self.masked is None and self.comm.rank == 0:
            mean_P = self._mean()
            server = server.knowing(server.look(mean_P)) if server.reads_norms else server
            new_P, state = server.step(params_P, mean_P, state)
            params_P.copy_(new_P)
        lap("step")
        self.comm.bcast(params_P)
        self.verify(params_P)
        lap("exchange")
        return params_P, state


def _step(server: Server, params_P: torch.Tensor, mean_S: torch.Tensor, state: Any, start: int) -> None:
    """The server's step on the elements from `start` on, in place."""
    there = slice(start, start + len(mean_S))
    new_S, _ = server.step(params_P[there], mean_S, type(state)(*(tensor[there] for tensor in state)), start)
    params_P[there].copy_(new_S)
