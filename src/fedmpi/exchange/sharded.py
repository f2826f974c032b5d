"""Plan sharded: a pipelined two-shot allreduce. Every rank owns each n-th piece of the vector.

        one sender's vector   |0 1 2|3 4 5|6 7 8|9 10 .|    3 ranks: stripes of 3 pieces, one for each owner
                                stripe stripe ...

        upload       piece 4 of every sender  --all-to-all-->  rank 1, its owner           (upload.py)
        accumulator  rank 1 sums what arrived, in the order of senders                     (accumulator.py)
        server       rank 1 takes its step on piece 4
        download     piece 4 of the parameters  --all-gather-->  every rank                (download.py)

A batch is one message to each owner: one stripe, or several if payloads are short. Three batches are on their way up
while the owner sums one and earlier ones are on their way down, so encoding, transfer and decoding overlap. Every value
is quantized once in each direction, for any number of ranks. Without codecs, deltas are sent from the memory where they
were trained, and new parameters arrive in the memory that the model reads. Owners hold the server's state, exactly.

A sender is what is encoded together: a rank's weighted sum (`scope: rank`), or a silo's unweighted delta, whose weight
is applied by the owner (`scope: silo`). Senders have one order on all ranks: that of ranks, or of the federation's
silos. So under `scope: silo` the sum has the same bits for any number of ranks.

One thread makes all MPI calls, and progresses them between pieces: a second thread would compete with the kernels that
it should overlap with. `overlap` runs the whole exchange in a thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from fedmpi.comm import Comm, Pending
from fedmpi.comm.base import summable
from fedmpi.errors import ExchangeError
from fedmpi.exchange import weights
from fedmpi.exchange.accumulator import Accumulator, num_learned
from fedmpi.exchange.base import MANY, Exchange, ExchangeContext, Lap, Machine
from fedmpi.exchange.chunks import Batches, Grid, SiloResiduals, stride, stripes_per_batch
from fedmpi.exchange.cost import Cost, Sizes, Traffic, exact_bytes, word_bytes
from fedmpi.exchange.download import Download
from fedmpi.exchange.masked import covered
from fedmpi.exchange.upload import AHEAD, Sender, Upload
from fedmpi.exchange.weights import LIMBS
from fedmpi.secure.session import WEIGHT, Masking
from fedmpi.server import Server
from fedmpi.state import Vectors
from fedmpi.types import Contribution

if TYPE_CHECKING:
    from fedmpi.exchange.config import ExchangeSection

COLUMNS = 3 + LIMBS  # of the table of senders: rank, index, factor, and the share


class Sharded(Exchange):
    """All-to-all of encoded pieces, step at their owners, all-gather."""

    one_by_one: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    sees: ClassVar[tuple[str, str]] = ("pieces of {}", "pieces of {}")

    @classmethod
    def messages_in_turn(cls, num_ranks: int) -> int:
        """All ranks send to all at once: one up, one down."""
        return 2

    @classmethod
    def suits(cls, machine: Machine, num_elements: int) -> str:
        return "one node" if machine.one_node else "several nodes"

    @classmethod
    def cost(cls, section: ExchangeSection, sizes: Sizes) -> Cost:
        num_ranks, up, down = sizes.num_ranks, section.up, section.down
        grid, word = Grid(sizes.num_elements, num_ranks), word_bytes(section, sizes)
        pieces = [grid.size(piece) for piece in range(grid.num_pieces)]
        payloads_up = [size * word if up.plain else up.codec.max_bytes(size) for size in pieces]
        payloads_down = [size * sizes.element_bytes if down.plain else down.codec.max_bytes(size) for size in pieces]
        sent = sum(
            count * sum(size for piece, size in enumerate(payloads_up) if piece % num_ranks != rank)
            for rank, count in enumerate(sizes.vectors or [1] * num_ranks)
        )
        table = COLUMNS * (sizes.num_silos if section.scope == "silo" else num_ranks)
        if not up.codec.fixed:
            table += num_ranks * sizes.most_vectors * grid.num_pieces
        if not down.codec.fixed:
            table += grid.num_stripes * num_ranks
        if section.lossy:
            table += num_ranks
        if sizes.aggregator is not None:
            table += num_learned(sizes.aggregator, sizes.num_silos, grid.num_pieces)
        beside = exact_bytes(section, sizes) + 8 * num_ranks * (LIMBS + 1) * bool(sizes.secure_bits)
        traffic = Traffic(
            sent + beside,
            (num_ranks - 1) * sum(payloads_down) + beside,
            2 * 8 * table * num_ranks,
            "Ialltoallv + Iallgatherv",
        )
        return Cost(traffic, cls._held(section, sizes, grid, word))

    @classmethod
    def _held(cls, section: ExchangeSection, sizes: Sizes, grid: Grid, word: int) -> dict[str, int]:
        by_silo, up, down, vector = section.scope == "silo", section.up, section.down, sizes.vector_bytes
        num_ranks = sizes.num_ranks
        own = sizes.hosted if by_silo else min(1, sizes.hosted)
        depth = stripes_per_batch(grid, up, down)
        offsets = Batches(grid, depth).num_offsets
        payload = grid.length * word if up.plain else stride(up.codec, grid)
        memory = {"global parameters": vector, "server state": round(sizes.state_bytes / sizes.num_ranks)}
        if sizes.secure_bits and sizes.hosted == 1:
            memory["written in turn"] = (AHEAD + 1) * num_ranks * grid.length * word
        elif not by_silo and (sizes.hosted > 1 or word != sizes.element_bytes):
            memory["sum"] = sizes.num_elements * word
            memory["sum in float64"] = 8 * sizes.num_elements * (sizes.hosted > MANY and word == 4)
        learns = sizes.aggregator is not None and sizes.aggregator.needs == "gram"
        rooms = Batches(grid, depth).num if learns else AHEAD + 1
        memory["received"] = rooms * sizes.most_vectors * sizes.num_ranks * depth * payload
        memory["payloads up"] = 0 if up.plain and not by_silo else own * offsets * payload
        memory["payloads down"] = 0 if down.plain else offsets * stride(down.codec, grid)
        memory["residuals up"] = own * (1 + by_silo) * vector * up.feedback
        memory["residuals down"] = vector // sizes.num_ranks * down.feedback
        if sizes.aggregator is not None:
            rows = max(1, sizes.num_silos) + sizes.aggregator.centre
            memory["rows of a piece"] = rows * grid.length * sizes.element_bytes
            memory["centre"] = vector // sizes.num_ranks * sizes.aggregator.centre
        return memory

    def __init__(self, section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext) -> None:
        super().__init__(section, comm, params_P, facts)
        self.grid = Grid(self.num_params, comm.size)
        self._batches = Batches(self.grid, stripes_per_batch(self.grid, section.up, section.down))
        about = (section, comm, params_P, facts, self.grid, self._batches)
        self._upload = Upload(*about, self.sum_dtype)
        self._download = Download(*about)
        self._total_S = torch.zeros(self.grid.length if self.ring else 0, dtype=self.sum_dtype, device=self.device)
        divide = None if not self.ring else self._divide if self.masked is None else self.masked.mean
        about_sum = (self._upload.coder, params_P, facts, divide)
        self._accumulator = Accumulator(self.grid, comm.rank, *about_sum)
        self.holders["up"] = self._upload.residual
        if self._download.residual is not None:
            self.holders["down"] = Vectors({"feedback": self._download.residual}, "sharded")
        if self._accumulator.centre is not None:
            self.holders["centre"] = Vectors({"result": self._accumulator.centre}, "sharded")
        self.holders["aggregator"] = self._accumulator.state
        self.coders += [way.coder for way in (self._upload, self._download) if way.coder is not None]
        self._index = {silo: i for i, silo in enumerate(facts.ids)}
        self._by_silo = section.scope == "silo"
        self._sum: torch.Tensor | None = None  # of several silos
        self._nothing = torch.zeros(0, dtype=self.sum_dtype)
        self._folded: float | None = None  # their weight; None: none added yet
        self._num = 0  # of them

    # ------------------------------------------------------------ memory and state

    def shard(self, vector_P: torch.Tensor) -> torch.Tensor:
        parts = [vector_P[self.grid.part(piece)] for piece in self.grid.owned(self.comm.rank)]
        return torch.cat(parts) if parts else vector_P[:0].clone()

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        host = part.cpu()
        num = self._length_of_all(host)
        whole_P = torch.zeros(num if self.comm.rank == 0 else 0, dtype=part.dtype)
        self._stripes_and_root(host, whole_P, num, gathers=True)
        return whole_P

    def scatter(self, whole_P: torch.Tensor | None, part: torch.Tensor) -> None:
        host = torch.empty_like(part, device="cpu")
        whole_P = host[:0] if whole_P is None else whole_P
        self._stripes_and_root(host, whole_P, self._length_of_all(host), gathers=False)
        part.copy_(host)

    def _length_of_all(self, part: torch.Tensor) -> int:
        """Length of the whole vector of these shards; it may be shorter than what is exchanged. Collective."""
        return int(self.comm.gather_number(len(part)).sum())

    def _stripes_and_root(self, part: torch.Tensor, whole_P: torch.Tensor, num: int, gathers: bool) -> None:
        """Copy all owners' pieces of a vector of `num` elements to rank 0, or back, stripe by stripe. Collective.

        This needs no memory beyond the vectors themselves.
        """
        grid, me, ranks = self.grid, self.comm.rank, self.comm.size
        nothing = [(0, 0)] * ranks
        for stripe in range(grid.num_stripes):
            starts = [(stripe * ranks + rank) * grid.length for rank in range(ranks)]
            sizes = [max(0, min(grid.length, num - start)) for start in starts]
            own, there = part[stripe * grid.length :], whole_P[stripe * ranks * grid.length :]
            of_root, of_owner = nothing, [(0, sizes[me]), *nothing[1:]]
            if me == 0:
                source, target = (own, there) if gathers else (there, own)
                target[: sizes[0]] = source[: sizes[0]]
                of_root, of_owner = [(rank * grid.length, size) for rank, size in enumerate(sizes)], nothing
                of_root[0] = (0, 0)
            if gathers:
                self.comm.wait(self.comm.alltoall(own, of_owner, there, of_root))
            else:
                self.comm.wait(self.comm.alltoall(there, of_root, own, of_owner))

    # ------------------------------------------------------------ this rank's vectors

    def begin(self, round: int = 0, num_contributions: int = 2, near: float = 1.0) -> None:
        super().begin(round, num_contributions, near)
        self._upload.begin()
        self._only = num_contributions == 1
        self._folded, self._num = None, 0

    def add(self, contribution: Contribution) -> None:
        share, delta_P, silo, rank = self.share(contribution), contribution.vector_Q, contribution.silo, self.comm.rank
        if self.exact is not None:
            self.exact.take(self._index[silo] if self._by_silo else rank, share, delta_P)
        if self._by_silo:
            self._upload.put_silo(self._index[silo], silo, self.round, share, delta_P)
        elif self._only and not self.ring:
            self._upload.put(rank, share, delta_P, share)
        else:
            writes = self.masked is not None and not self.masked.folds  # pieces are written where they are sent
            if self._sum is None and not writes:
                self._sum = torch.zeros(self.num_params, dtype=self.sum_dtype, device=self.device)
            sum_P = self._nothing if self._sum is None else self._sum
            if self.masked is None:
                self.fold(sum_P, delta_P, share, empty=self._folded is None)
            else:
                self.masked.fold(sum_P, silo, delta_P, share, empty=self._folded is None)
            self._folded = self.weigh(share) + (self._folded or 0)
            self._num += 1

    # ------------------------------------------------------------ the exchange

    def finish(
        self, params_P: torch.Tensor, server: Server, state: Any, lap: Lap = lambda phase: None
    ) -> tuple[torch.Tensor, Any]:
        if self.masked is not None:
            self.masked.open()
        if self._folded is not None:
            # Under masks the table of senders says only that there is a sum; its weight follows under masks.
            if self.masked is None or self.masked.folds:
                assert self._sum is not None
                share, mask = (self._folded, None) if self.masked is None else (1.0, self.masked.cover)
                self._upload.put(self.comm.rank, share, self.folded(self._sum), 1.0, mask)
            else:
                self._upload.put_written(self.comm.rank, 1.0, self.masked.cover)
        for coder in self.coders:
            coder.start(self.round)
        senders = self._senders()
        batches = self._weighed(senders)
        if self.exact is not None:
            self.exact.step(params_P)
        means_S = None
        if server.reads_norms:
            means_S, server = self._look(server, senders, batches)
            batches = range(self._batches.num)
        for batch in batches:
            for piece in self._batches.pieces(batch, self.comm.rank):
                mean_S = self._mean(piece, senders) if means_S is None else means_S[self.grid.kept(piece)]
                self._step(piece, mean_S, params_P, server, state)
            self._download.send(batch, params_P)
            self._download.land(params_P)
        told = self._tell() if self.asks and self.coders else None
        self._download.land(params_P, wait=True)
        if told is not None:
            self._hear(*told)
        if self.exact is not None and self._download.coder is not None:
            self.exact.land(params_P)
        self.gram = self._accumulator.shared_gram(self.comm)
        if isinstance(self._upload.residual, SiloResiduals):
            self._upload.residual.commit()
        lap("exchange")
        self.verify(params_P)
        lap("exchange")
        return params_P, state

    def _senders(self) -> list[Sender]:
        """The round's vectors in the order of senders, equal on every rank. Collective."""
        table = np.zeros((len(self.facts.ids) if self._by_silo else self.comm.size, COLUMNS))
        for index, out in enumerate(self._upload.outgoing):
            table[out.number] = (self.comm.rank, index, out.factor, *self.cut(out.share))
        agreed, table = self.comm.ishare(table)
        self._upload.prepare_first()  # while waiting for the others
        self.comm.wait(agreed)
        senders = [
            Sender(number, int(rank), int(index), share, factor)
            for number, (rank, index, factor, *limbs) in enumerate(table.tolist())
            if (share := self.joined(limbs))
        ]
        weight = sum(sender.share for sender in senders) if self.secure is None else self._masked_weight(self.secure)
        if weight == 0.0:
            raise ExchangeError("no weight arrived: nothing to divide by")
        if self.exact is not None:
            numbers, shares = [sender.number for sender in senders], [sender.share for sender in senders]
            if self.facts.aggregator is None:
                self.exact.mean(numbers, weight, self._by_silo)
            else:
                self.exact.gather(numbers, shares, self._accumulator.parts_of_centre(self.comm.rank))
        self._accumulator.begin(senders, weight, self.round)
        self._upload.agree(senders)
        return senders

    def _masked_weight(self, secure: Masking) -> float:
        """The weight of all ranks' silos, summed under masks. Collective."""
        masks = secure.masks(WEIGHT, self.there, 64)
        limbs = covered(int(self._folded or 0), masks, 0, weights.BITS, weights.LIMBS)
        mine = torch.tensor([*limbs, self._num], dtype=torch.int64)
        masks.add(summable(mine[weights.LIMBS :]), weights.LIMBS)
        total = torch.zeros_like(mine)
        self.comm.allreduce(mine, total)
        *limbs, num = total.tolist()
        assert self.masked is not None
        self.masked.require_all(num)
        return weights.modulo(weights.whole(limbs))

    def _weighed(self, senders: list[Sender]) -> Iterable[int]:
        """The batches as they arrive, once the weights of their rows are known. Collective.

        An aggregator that needs all deltas for its weights reads each batch twice; batches then stay in memory.
        """
        batches: Iterable[int] = self._upload.arriving()
        if self.facts.aggregator is None:
            return batches
        if self._accumulator.learns:
            for batch in batches:
                for piece in self._batches.pieces(batch, self.comm.rank):
                    self._accumulator.learn(piece, self._came(piece, senders), self.exact)
            batches = range(self._batches.num)
        self._accumulator.weigh(self.comm, self.exact)
        if self.exact is not None:
            self.exact.combine(self._accumulator.combine)
        return batches

    def _came(self, piece: int, senders: list[Sender]) -> list[tuple[Sender, Any]]:
        """What arrived for one of my pieces, by sender."""
        return [(sender, self._upload.came(piece, sender)) for sender in senders]

    def _divide(self, rows_S: Sequence[torch.Tensor], weight: float, mean_S: torch.Tensor) -> None:
        """The mean of integer rows."""
        total_S = self._total_S[: len(mean_S)].copy_(rows_S[0])
        for row_S in rows_S[1:]:
            total_S.add_(row_S.to(self.device))
        self.divide(total_S, weight, mean_S)

    def _look(self, server: Server, senders: list[Sender], batches: Iterable[int]) -> tuple[torch.Tensor, Server]:
        """The means of my pieces, and the server that knows the norm of the whole mean. Collective."""
        means_S = torch.zeros(self.grid.num_owned(self.comm.rank), dtype=self.dtype, device=self.device)
        square = 0.0
        for batch in batches:
            for piece in self._batches.pieces(batch, self.comm.rank):
                mean_S = means_S[self.grid.kept(piece)].copy_(self._mean(piece, senders))
                square += server.look(mean_S, self.grid.part(piece).start)
        return means_S, server.knowing(float(self.comm.gather_number(square).sum()))

    def _mean(self, piece: int, senders: list[Sender]) -> torch.Tensor:
        """The mean of one of my pieces, [S]; valid until the next call."""
        return self._accumulator.mean(piece, self._came(piece, senders), self.exact)

    def _step(self, piece: int, mean_S: torch.Tensor, params_P: torch.Tensor, server: Server, state: Any) -> None:
        """Step one of my pieces and prepare it for sending."""
        part, kept = self.grid.part(piece), self.grid.kept(piece)
        new_S, _ = server.step(params_P[part], mean_S, type(state)(*(tensor[kept] for tensor in state)), part.start)
        self._download.put(piece, new_S, params_P, self.exact)

    def _tell(self) -> tuple[Pending, np.ndarray]:
        """Start to share whether a codec failed on this rank. All encoding is done; what is left decodes alike on all
        ranks."""
        codes = np.zeros(self.comm.size)
        codes[self.comm.rank] = any(coder.failed is not None for coder in self.coders)
        return self.comm.ishare(codes)

    def _hear(self, told: Pending, codes: np.ndarray) -> None:
        """Raise on every rank if a codec failed on any."""
        self.comm.wait(told)
        if codes.any():
            self.ask()
        self.raise_failed()
