"""One vector as one message: a codec's payloads, piece by piece, then the values that no codec touches (exact.py).

head       int64: sender and number of the vector, which key the codec's random bits; whether frozen parameters
           follow; bytes of each payload
payloads   each begins at a multiple of 4 bytes
exact      float32: statistics and what `exchange.exact` names, then frozen parameters if any has changed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedmpi.codecs import bare
from fedmpi.errors import ExchangeError
from fedmpi.exchange.chunks import Coder, Grid
from fedmpi.exchange.exact import Places
from fedmpi.layout import Layout

if TYPE_CHECKING:
    from fedmpi.exchange.config import Channel

_FIELDS = 3  # of the head before the lengths: sender, number, whether frozen parameters follow


class Wire:
    """Packs vectors into messages, and unpacks them. `names`: of the senders."""

    def __init__(
        self, channel: Channel, layout: Layout, names: Sequence[str], seed: int, device: torch.device, way: str
    ) -> None:
        self.grid, self.feedback = Grid(layout.size, 1), channel.feedback
        self.coder = Coder(channel, self.grid, seed, device, way)
        self._names, self._index = names, {name: i for i, name in enumerate(names)}
        self._parts, self._still = Places(layout.exact), Places(layout.still)
        self._payload_B = torch.zeros(self.coder.stride, dtype=torch.uint8)
        self._failed: ExchangeError | None = None

    @staticmethod
    def most_bytes(channel: Channel, num_elements: int, num_exact: int) -> int:
        """Bytes of the longest message."""
        grid = Grid(num_elements, 1)
        payloads = (channel.codec.max_bytes(grid.size(piece)) for piece in range(grid.num_pieces))
        words = sum(-(-num_bytes // 4) for num_bytes in payloads)
        return 8 * (_FIELDS + grid.num_pieces) + 4 * words + 4 * num_exact

    def pack(self, vector_Q: torch.Tensor, sender: str, number: int, residual_Q: torch.Tensor | None) -> torch.Tensor:
        """The message [bytes], in host memory. What no codec touches is 0 in `vector_Q` afterwards, and the residual
        becomes what encoding lost. Raises ExchangeError if the codec refuses a value."""
        exact = [self._parts.of(vector_Q), self._still.of(vector_Q)]
        moved = bool(exact[1].any())
        exact = [values.to("cpu", torch.float32, copy=True) for values in exact[: 1 + moved]]
        for part in (*self._parts.parts, *self._still.parts):
            vector_Q[part].zero_()
        self.coder.start(number, sender)
        values, kept = bare(vector_Q), None if residual_Q is None else bare(residual_Q)
        payloads, lengths = [], []
        for piece, part in enumerate(self.grid):
            residual_N = None if kept is None else kept[part]
            length = self.coder.encode(values[part], bare(self._payload_B), piece, 1.0, residual_N)
            payloads.append(self._payload_B[: -(-length // 4) * 4].clone())
            lengths.append(length)
        head = torch.tensor([self._index[sender], number, int(moved), *lengths], dtype=torch.int64)
        return torch.cat([head.view(torch.uint8), *payloads, *(values.view(torch.uint8) for values in exact)])

    def unpack(self, message: torch.Tensor, into_Q: torch.Tensor) -> None:
        """Write the vector of a message into `into_Q`. A payload that cannot be decoded counts as 0; `raise_failed`
        tells."""
        start = 8 * (_FIELDS + self.grid.num_pieces)
        sender, number, moved, *lengths = message[:start].view(torch.int64).tolist()
        self.coder.start(number, self._names[sender])
        found = bare(into_Q.zero_())
        for piece, (part, length) in enumerate(zip(self.grid, lengths, strict=True)):
            self.coder.add_or_note(bare(message[start : start + length]), found[part], piece, 1.0)
            start += -(-length // 4) * 4
        self._failed = self._failed or self.coder.failed
        values = torch.from_numpy(np.frombuffer(message[start:].numpy().tobytes(), dtype=np.float32).copy())
        for places in (self._parts, self._still)[: 1 + moved]:
            for part in places.parts:
                num = part.stop - part.start
                into_Q[part].copy_(values[:num])
                values = values[num:]

    def raise_failed(self) -> None:
        """Raise the first refusal of `unpack`, if any."""
        if self._failed is not None:
            raise self._failed
