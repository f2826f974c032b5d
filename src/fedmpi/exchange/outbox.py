"""The contribution of a silo that is a job of its own, as bytes: encoded by the codec of `up`, with feedback.

    the silo's job   outbox.begin(round); outbox.add(contribution); packed = outbox.packed
    the server's     vector_Q = Inbox(section, ...).vector(packed, round, silo)

Exact values (exact.py) follow the payloads as they are. Without a codec the vector itself is sent. Under `secure` it
becomes words of the ring; the job masks them (jobs/masking.py), and the server's exchange is a Summed, which takes the
sum of all silos' words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from fedmpi.codecs import bare
from fedmpi.comm import Comm
from fedmpi.comm.base import summable
from fedmpi.errors import ExchangeError
from fedmpi.exchange import weights
from fedmpi.exchange.base import Exchange, ExchangeContext, Lap
from fedmpi.exchange.chunks import Coder, Grid, SiloResiduals
from fedmpi.exchange.dense import Replicated
from fedmpi.exchange.exact import Places
from fedmpi.layout import Layout
from fedmpi.secure.masks import CHUNK
from fedmpi.server import Server
from fedmpi.state import StateTensor, under
from fedmpi.types import Contribution

if TYPE_CHECKING:
    from fedmpi.exchange.config import Channel, ExchangeSection


@dataclass(frozen=True)
class Packed:
    """A vector as bytes."""

    sizes: list[int]  # bytes of each piece's payload; empty: the vector is sent as it is
    data: bytes


@dataclass(frozen=True)
class Words:
    """A weighted vector as words of the ring, before masks."""

    words: np.ndarray  # unsigned, of as many bits as the ring, [Q]
    weight: int  # in grains (weights.py)


def _channel(channel: Channel, num: int, seed: int, device: torch.device) -> Coder | None:
    return None if channel.plain else Coder(channel, Grid(num, 1), seed, device, "up")


def _exact(layout: Layout) -> Places:
    return Places([*layout.exact, *layout.still])


def as_bytes(vector: torch.Tensor) -> bytes:
    """A vector's memory."""
    return vector.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def from_bytes(data: Any, num: int, dtype: torch.dtype) -> torch.Tensor:
    """A vector of `num` elements from its memory. Raises ExchangeError for another length."""
    if len(data) != num * dtype.itemsize:
        raise ExchangeError(f"a vector of {len(data)} bytes, and {num} values of {dtype} are expected")
    return torch.frombuffer(bytearray(data), dtype=dtype) if num else torch.empty(0, dtype=dtype)


class Outbox(Exchange):
    """Packs the contribution of this process's silo."""

    def __init__(self, section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext) -> None:
        super().__init__(section, comm, params_P, facts)
        self._coder = _channel(section.up, self.num_params, facts.seed, self.device)
        self._exact = _exact(self.layout)
        self._residuals = SiloResiduals(self.device)
        if section.up.feedback:
            self.holders["up"] = self._residuals
        self.packed: Packed | None = None  # of this round
        self.words: Words | None = None  # of this round, under `secure`

    def begin(self, round: int = 0, num_contributions: int = 2, near: float = 1.0) -> None:
        super().begin(round, num_contributions, near)
        self.packed = self.words = None
        self._residuals.begin()

    def add(self, contribution: Contribution) -> None:
        vector_Q = contribution.vector_Q
        if self.masked is not None:
            self.words = self._words(contribution)
            return
        if (coder := self._coder) is None:
            self.packed = Packed([], as_bytes(vector_Q))
            return
        vector_Q = vector_Q.clone()
        exact = as_bytes(self._exact.of(vector_Q))
        for part in self._exact.parts:
            vector_Q[part].zero_()
        residual_Q = self._residuals.draft(contribution.silo, vector_Q) if coder.channel.feedback else None
        payload, sizes, parts = torch.zeros(coder.stride, dtype=torch.uint8), [], []
        coder.start(self.round, contribution.silo)
        for piece, part in enumerate(coder.grid):
            residual_N = None if residual_Q is None else bare(residual_Q)[part]
            size = coder.encode_or_note(bare(vector_Q)[part], bare(payload), piece, 1.0, residual_N)
            sizes.append(int(size))
            parts.append(payload[:size].numpy().tobytes())
        coder.raise_failed()
        self.packed = Packed(sizes, b"".join([*parts, exact]))

    def _words(self, contribution: Contribution) -> Words:
        """The contribution as words of the ring: those of the same silo in a run on ranks."""
        assert self.masked is not None and self.secure is not None
        share, vector_Q = self.share(contribution), contribution.vector_Q
        words_Q = torch.empty(self.num_params, dtype=self.masked.dtype)
        for start in range(0, self.num_params, CHUNK):
            part = slice(start, min(start + CHUNK, self.num_params))
            factor = share * self.secure.ring.unit
            self.masked.encode(contribution.silo, vector_Q[part], factor, start, words_Q[part])
        return Words(summable(words_Q), weights.counted(share))

    def drafted(self) -> Iterator[StateTensor]:
        """The state of `holders` once the contribution counts."""
        return under("up", self._residuals.drafted()) if "up" in self.holders else iter(())

    def taken(self) -> None:
        """The contribution counts: what the codec lost is added to the next one."""
        self._residuals.commit()

    def finish(
        self, params_P: torch.Tensor, server: Server, state: Any, lap: Lap = lambda phase: None
    ) -> tuple[torch.Tensor, Any]:
        raise ExchangeError("the server's job steps, not a silo's")


class Inbox:
    """Unpacks contributions on the server."""

    def __init__(self, channel: Channel, layout: Layout, dtype: torch.dtype, seed: int) -> None:
        self._layout, self._dtype = layout, dtype
        self._coder = _channel(channel, layout.size, seed, torch.device("cpu"))
        self._exact = _exact(layout)

    def vector(self, packed: Packed, round: int, silo: str) -> torch.Tensor:
        """The silo's vector [Q], in host memory. Raises ExchangeError for bytes that do not fit."""
        if (coder := self._coder) is None:
            return from_bytes(packed.data, self._layout.size, self._dtype)
        vector_Q, start = torch.zeros(self._layout.size, dtype=self._dtype), 0
        if len(packed.sizes) != coder.grid.num_pieces:
            raise ExchangeError(f"{len(packed.sizes)} payloads, and {coder.grid.num_pieces} are expected")
        coder.start(round, silo)
        slot_B = torch.zeros(coder.stride, dtype=torch.uint8)
        for piece, size in enumerate(packed.sizes):
            if not 0 <= size <= coder.num_bytes(piece):
                raise ExchangeError(f"a payload of {size} bytes")
            data = np.frombuffer(packed.data, np.uint8, size, start)
            slot_B[:size] = torch.from_numpy(data.copy())
            coder.decode(bare(slot_B[:size]), bare(vector_Q)[coder.grid.part(piece)], piece)
            start += size
        exact = from_bytes(packed.data[start:], len(self._exact), self._dtype)
        for here, there in self._exact.within(0, self._layout.size):
            vector_Q[here] = exact[there]
        return vector_Q


class Summed(Replicated):
    """The server's exchange under `secure`: takes the sum of the silos' words, and steps as one rank would that has
    added them up itself."""

    masks: ClassVar[bool] = True

    def put(self, words_Q: np.ndarray, weight: int, num_silos: int) -> None:
        """Take the sum of the round: words of the ring, weight in grains, and how many silos are in it."""
        assert self.masked is not None
        if len(self._sum) < self.num_params:
            self._sum = torch.zeros(self.num_params + self.num_params % 2, dtype=self.sum_dtype)
        summable(self._sum)[: self.num_params] = words_Q
        self._weight, self._num, self._empty = weight, num_silos, False

    def add(self, contribution: Contribution) -> None:
        raise ExchangeError("only sums reach the server")
