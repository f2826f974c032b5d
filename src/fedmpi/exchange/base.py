"""The base class of the plans. A round calls `begin`, then `add` for each contribution, then `finish`.

A rank folds its contributions into sum_k (w_k/W) delta_k and sends the sum of w_k/W with it (weights.py). The receiver
divides, so a late or rejected silo needs no second message. W is the weight of all silos of the run, divided by a power
of two that brings it close to the cohort's weight, so that a small cohort loses no precision.

    fast           sums in the vectors' dtype; the same bits for the same number of ranks
    reproducible   sums integers modulo 2^64, where order does not matter: the same bits for any number of ranks. Each
                   silo's weighted delta is rounded to multiples of 2^-44 (6e-14). Sums up to 2^18 fit; a delta with a
                   larger norm is rejected.
    under masks    the same with the ring of `secure` (secure/ring.py), to which masks are added before anything is sent

A rank that folds more than `MANY` silos in float32 sums in float64. Buffers are allocated once. Vectors live on the
rank's device.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch

from fedmpi.aggregate import Aggregator
from fedmpi.attacks import Edit
from fedmpi.codecs import CODECS
from fedmpi.comm import Comm
from fedmpi.components import to_dict
from fedmpi.errors import ConfigError, agreed
from fedmpi.exchange import weights
from fedmpi.exchange.cost import Cost, Sizes
from fedmpi.exchange.exact import Exact
from fedmpi.exchange.masked import Masked
from fedmpi.flat import sha256
from fedmpi.layout import Layout
from fedmpi.records.timer import Spent
from fedmpi.secure.ring import GROWS
from fedmpi.secure.session import Masking
from fedmpi.server import Server
from fedmpi.state import Holders, Placement, StateTensor
from fedmpi.types import Contribution

if TYPE_CHECKING:
    from fedmpi.exchange.chunks import Coder
    from fedmpi.exchange.config import ExchangeSection

UNIT = 2.0**44  # ring integers per 1.0
LARGEST_NORM = 2.0**18  # larger deltas are rejected: they are absurd, and do not fit into the ring
BLOCK = 1 << 18  # elements per step, so that scratch memory stays in cache
MANY = 64  # vectors; float32 sums of more of them lose precision


Lap = Callable[[str], None]
PARAMS = "params"  # key of the parameters in a checkpoint


class ExchangeContext(NamedTuple):
    """The facts of the run that a plan needs."""

    total_weight: float  # W, summed over all silos
    ids: Sequence[str] = ()  # all silos, in the federation's order
    hosted: Sequence[str] = ()  # silos of this rank
    seed: int = 0
    aggregator: Aggregator | None = None  # an aggregator that reads each delta; None: the weighted mean
    rounds: int = 0  # rounds of the whole run
    gram: int = 0  # number of leading elements for the inner products of silos' deltas; 0: none are computed
    states: int = 0  # vectors in the server optimizer's state
    layout: Layout | None = None  # layout of the vector; None: it holds only the delta
    edit: Edit | None = None  # how an attack changes silos' rows before anything reads them
    arrivals: bool = False  # whether updates arrive one by one (exchange/arrivals.py), in place of a plan's collectives
    secure: Masking | None = None  # masks between silos; None: vectors are summed as they are


class Machine(NamedTuple):
    """Where a run's ranks are."""

    num_ranks: int = 1
    one_node: bool = True  # whether all ranks share memory
    on_device: bool = False  # whether any rank keeps its vectors on a GPU

    @classmethod
    def of(cls, comm: Comm, device: torch.device) -> Machine:
        """The machine of these ranks; equal on every rank. Collective."""
        gpus = comm.share(np.array([float(device.type != "cpu")]))
        return cls(comm.size, comm.one_node(), bool(gpus[0]))


def without(section: ExchangeSection, *, scope: bool = True, up: bool = True, down: bool = True) -> str:
    """For `Exchange.supports`: why a plan without `scope: silo`, up codecs or down codecs cannot carry out the section.

    A plan passes False for what it has. Empty if it can."""
    if scope and section.scope == "silo":
        return "takes no scope: silo"
    for way, channel, refused in (("up", section.up, up), ("down", section.down, down)):
        if refused and not channel.plain:
            return f"takes no {way}.codec {CODECS.name_of(channel.codec)}"
    return ""


class Exchange:
    """Base class of the plans. A plan overrides `finish` and whatever else differs.

    Attributes: holders (state that the plan keeps between rounds, besides the parameters).
    """

    params_placement: Placement = "replicated"
    in_shared_memory: ClassVar[bool] = False  # whether silos train in memory that other ranks read
    rounds_held: int = 1  # rounds of a silo's progress in one vector that it sends
    subtracts: bool = False  # whether this round `add` takes trained parameters in place of a delta
    wrote_model: bool = False  # whether the last `finish` left the new parameters in this rank's model
    masks: ClassVar[bool] = False  # whether it masks sums under `secure`; not inherited, see `masks_itself`
    # What the server's rank and the other ranks see of what a rank sends ({}), in the table of `plan --privacy`.
    sees: ClassVar[tuple[str, str]] = ("{}", "{}")
    one_by_one: ClassVar[bool] = False  # whether an aggregator sees every silo's vector under `scope: silo`

    # ------------------------------------------------------------ what a plan declares

    @classmethod
    def supports(cls, section: ExchangeSection, machine: Machine) -> str:
        """Why this plan cannot carry out the section on this machine, as text that follows the plan's name: "needs all
        ranks on one node". Empty if it can."""
        return ""

    @classmethod
    def masks_itself(cls) -> bool:
        """Whether this class says `masks`. A subclass has to say it again: its `finish` may send sums as they are."""
        return bool(vars(cls).get("masks", False))

    @classmethod
    def suits(cls, machine: Machine, num_elements: int) -> str:
        """Why `plan: auto` chooses this plan for vectors of `num_elements`; empty if it does not. The first plan with a
        reason wins."""
        return ""

    @classmethod
    def cost(cls, section: ExchangeSection, sizes: Sizes) -> Cost:
        """Bytes that a round sends, and the vectors that the plan keeps: global parameters, server state, its own."""
        raise NotImplementedError

    @classmethod
    def shared_bytes(cls, section: ExchangeSection, params_P: torch.Tensor, states: int, first: bool) -> int:
        """Bytes of shared memory that a rank allocates. The `first` rank of a node also holds the server's `states`."""
        return 0

    @classmethod
    def vectors_sent(cls, num_ranks: int) -> int:
        """Vectors that cross the network each way in a round. A part that stays with its owner does not cross."""
        return num_ranks - 1

    one_way_at_a_time: ClassVar[bool] = False
    """whether a link carries the way up in one direction and the way down in the other, one after the other"""

    @classmethod
    def messages_in_turn(cls, num_ranks: int) -> int:
        """Messages of a round that follow each other: a tree up, and one down."""
        return 2 * math.ceil(math.log2(num_ranks))

    @classmethod
    def link_bytes(cls, up_R: np.ndarray, down_R: np.ndarray, vector_bytes: int) -> float:
        """The most bytes that any rank sends, or receives, in a round.

        A rank counts the bytes that it sends up and that it receives on the way down. What it received on the way up
        and sent down follows from the other ranks' counts, because each of them exchanges the same amount with it.
        """
        others = len(up_R) - 1
        if others == 0:
            return 0.0
        sends = up_R + down_R.sum() - others * down_R
        receives = down_R + up_R.sum() - others * up_R
        return float(max(sends.max(), receives.max()))

    # ------------------------------------------------------------

    def __init__(self, section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext) -> None:
        self.section = section
        self.comm = comm
        self.facts = facts
        self.holders = Holders()
        self.num_params = len(params_P)
        self.layout = Layout.whole(self.num_params) if facts.layout is None else facts.layout
        self.dtype, self.device = params_P.dtype, params_P.device
        if self.dtype != torch.float32 and not (section.up.plain and section.down.plain):
            raise agreed(ConfigError(f"codecs take float32, and the shared parameters are {self.dtype}"))
        # Single silos' vectors are added in the silos' order, which is as reproducible as a ring.
        self.secure = facts.secure
        self.ring = self.secure is not None or (section.reduction == "reproducible" and section.scope == "rank")
        self.sum_dtype = torch.int64 if self.ring else self.dtype
        self.largest_norm = LARGEST_NORM  # larger deltas are rejected
        self.most_growth = math.inf  # weight / base weight beyond which a delta is rejected
        self.masked: Masked | None = None
        if self.secure is not None:
            self.masked = Masked(self.secure, params_P, facts.hosted, facts.seed)
            self.sum_dtype, self.largest_norm = self.masked.dtype, self.secure.ring.largest
            if self.secure.ring.span < math.inf:
                self.most_growth = GROWS
        self.there: Sequence[str] = ()  # the silos in the sum, under masks
        self.round = 0
        self._near = 1.0  # factor of the round's shares
        self._many = False  # whether this rank folds too many silos for float32
        self._wide_P: torch.Tensor | None = None  # float64 sum for that case
        lossy = not (section.up.plain and section.down.plain) and (self.layout.exact or self.layout.still)
        self.exact = Exact(self.layout, comm) if lossy else None  # values that no codec touches
        self.gram: np.ndarray | None = None  # inner products of the last round's deltas, in the silos' order [K, K]
        self._largest = section.largest  # codecs can encode smaller values only
        self.asks = True  # whether `finish` shares a codec's refusal with all ranks; if not, its caller does
        self.coders: list[Coder] = []  # they record refusals, because other ranks wait for a payload
        self._declared = {**to_dict(section), "length": self.num_params, "dtype": str(self.dtype)}
        self._facts_text = repr(self._declared)
        if self.ring and self.masked is None:
            self.float_B = torch.zeros(BLOCK, dtype=torch.float64, device=self.device)
            self.int_B = torch.zeros(BLOCK, dtype=self.sum_dtype, device=self.device)

    # ------------------------------------------------------------ memory and state

    def shard(self, vector_P: torch.Tensor) -> torch.Tensor:
        """This rank's part of a server vector [P]: all of it, a slice, or nothing."""
        return vector_P

    def home(self, params_P: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        """Move parameters and server state into the plan's memory. Collective."""
        return params_P, state

    def delta(self) -> torch.Tensor:
        """Memory for the model's shared parameters, from which deltas are sent without a copy. Collective."""
        return self.comm.allocate(self.num_params, self.dtype, self.device)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """The whole vector on rank 0, from every rank's `shard` of it. Collective."""
        return part

    def scatter(self, whole_P: torch.Tensor | None, part: torch.Tensor) -> None:
        """Fill `part` with this rank's `shard` of rank 0's vector. Collective."""
        whole_P = torch.empty_like(part, device="cpu") if whole_P is None else whole_P
        self.comm.bcast(whole_P)
        part.copy_(whole_P)

    def set_params(self, params_P: torch.Tensor, new_P: torch.Tensor | None) -> None:
        """Overwrite the parameters with `new_P`, which every rank has, or only rank 0 if `params_placement` is root.
        Collective."""
        assert new_P is not None
        params_P.copy_(new_P)

    def state(self, params_P: torch.Tensor) -> Iterator[StateTensor]:
        """The state that the next round depends on (state.Holder), parameters included. Collective; no exchange may be
        in flight."""
        yield StateTensor((PARAMS,), params_P, self.params_placement)
        yield from self.holders.state()

    def restore(self, params_P: torch.Tensor, round: int, stored: Sequence[StateTensor]) -> None:
        """Restore the state of a round's checkpoint. Collective."""
        named = {one.key: one.tensor for one in stored if not one.silo}
        self.set_params(params_P, named.get((PARAMS,)))
        self.holders.restore([one for one in stored if one.key != (PARAMS,)])

    # ------------------------------------------------------------ for plans whose parameters arrive late or in parts

    def start(self, silo: str, params_P: torch.Tensor) -> torch.Tensor:
        """The parameters that the silo's training starts from; valid until the next silo starts."""
        return params_P

    def figures(self) -> dict[str, float]:
        """Seconds for the round's record that belong to no phase."""
        return {}

    def spent(self) -> Spent:
        """Seconds that the exchange has spent in this thread so far, by what it did."""
        return Spent.of(self.coders, self.comm.transferred_s())

    def tracks(self) -> dict[str, float]:
        """Numbers about the exchanges of another thread that arrived in this round, always as many (overlap.Track);
        none if there is no such thread."""
        return {}

    def leave(self) -> None:
        """Wait for the exchange in flight and ignore its errors; start no other."""

    def settle(self) -> None:
        """Wait for the exchange in flight and raise its error, if any."""

    # ------------------------------------------------------------ a round

    def begin(self, round: int = 0, num_contributions: int = 2, near: float = 1.0) -> None:
        """Start a round and forget the one before. A rank's only contribution keeps its delta unchanged until `finish`.
        `near` is the power of two that scales the cohort's weight up to that of all silos (weights.nearness); 1 with
        codecs, whose residuals and thresholds are in units of the total weight."""
        self.round, self._near = round, near
        if self.masked is not None:
            self.masked.begin(round, num_contributions, near / self.facts.total_weight)
        self._many = num_contributions > MANY and self.sum_dtype == torch.float32
        if self.exact is not None:
            self.exact.begin()

    def holds(self, delta_P: torch.Tensor, room: float) -> bool:
        """Whether all codecs can represent the delta, which the sum scales by up to `room`."""
        if self._largest == math.inf:
            return True
        largest = self._largest / (room if self.section.scope == "rank" else 1.0)
        if float(delta_P.abs().max()) < largest:
            return True
        sizes_P = delta_P.abs()
        for part in (*self.layout.exact, *self.layout.still):  # no codec sees them
            sizes_P[part] = 0.0
        return float(sizes_P.max()) < largest

    def add(self, contribution: Contribution) -> None:
        """Add one silo's contribution. Its memory may be reused afterwards."""
        raise NotImplementedError

    def meet(self, silos: Sequence[str]) -> None:
        """Under masks: say whose contributions are in the sum, once all ranks agree; before `finish`."""
        self.there = silos
        if self.masked is not None:
            self.masked.meet(silos)

    def fingerprint(self, cohort: Sequence[str]) -> float:
        """A 32-bit checksum of what ranks must agree on before vectors are sent; exact as a float64."""
        return float(zlib.crc32(repr((self.round, self._facts_text, list(cohort))).encode()))

    def declared(self, cohort: Sequence[str]) -> dict[str, Any]:
        """The values behind the fingerprint, by name."""
        return {"round": self.round, "cohort": list(cohort), **self._declared}

    def finish(
        self, params_P: torch.Tensor, server: Server, state: Any, lap: Lap = lambda phase: None
    ) -> tuple[torch.Tensor, Any]:
        """Sum, mean and server step. Overwrites params_P with the new parameters on every rank. Collective."""
        raise NotImplementedError

    def raise_failed(self) -> None:
        """Raise what a codec could not encode or decode on this rank in the last `finish`. It is raised only after all
        vectors were sent, because the other ranks wait for them."""
        for coder in self.coders:
            coder.raise_failed()

    def ask(self) -> None:
        """Raise on every rank what one rank's codec refused. Collective."""
        if self.asks:
            self.comm.collectively(self.raise_failed)

    def verify(self, params_P: torch.Tensor) -> None:
        """With `exchange.verify`: ExchangeError unless all ranks hold the same bits."""
        if self.section.verify:
            self.comm.require_equal("exchange.verify: the parameters", bytes.fromhex(sha256(params_P)))

    # ------------------------------------------------------------ folding

    def share(self, contribution: Contribution) -> float:
        """The contribution's share w_k/W, scaled by the round's `near`."""
        return contribution.weight / self.facts.total_weight * self._near

    def fold(self, sum_P: torch.Tensor, delta_P: torch.Tensor, share: float, empty: bool) -> None:
        """sum_P += share * delta_P, or sum_P = share * delta_P if `empty`; in integers if `reproducible`. Not under
        masks (Masked.fold)."""
        if self.ring:
            if empty:
                sum_P.zero_()
            for start in range(0, self.num_params, BLOCK):
                part = slice(start, min(start + BLOCK, self.num_params))
                exact, whole = self.float_B[: part.stop - start], self.int_B[: part.stop - start]
                exact.copy_(delta_P[part]).mul_(share * UNIT).round_()
                sum_P[part].add_(whole.copy_(exact))
        elif self._many:
            if self._wide_P is None:
                self._wide_P = torch.zeros(self.num_params, dtype=torch.float64, device=self.device)
            wide_P = self._wide_P.zero_() if empty else self._wide_P
            wide_P.add_(delta_P, alpha=share)
        elif empty:
            torch.mul(delta_P, share, out=sum_P)
        else:
            sum_P.add_(delta_P, alpha=share)

    def folded(self, sum_P: torch.Tensor) -> torch.Tensor:
        """The sum of all of this rank's silos."""
        if self._many and self._wide_P is not None:
            sum_P.copy_(self._wide_P)
        return sum_P

    def weigh(self, share: float) -> float:
        """A share as it is summed: an integer of any length if `reproducible`."""
        return weights.counted(share) if self.ring else share

    def cut(self, weight: float) -> list[float]:
        """A weight as the float64 numbers that are sent."""
        return [*weights.cut(int(weight))] if self.ring else [weight, *[0.0] * (weights.LIMBS - 1)]

    def joined(self, limbs: Sequence[float]) -> float:
        """The weight that `cut` split."""
        return weights.whole(limbs) if self.ring else limbs[0]

    def divide(self, sum_N: torch.Tensor, weight: float, mean_N: torch.Tensor) -> None:
        """mean_N = sum_N / weight, converted from integers if `reproducible`; `mean_N` may be `sum_N`."""
        if not self.ring:
            torch.div(sum_N, weight, out=mean_N)
            return
        weight = weight / (weights.GRAIN / UNIT)
        for start in range(0, len(sum_N), BLOCK):
            part = slice(start, min(start + BLOCK, len(sum_N)))
            mean_N[part].copy_(self.float_B[: part.stop - start].copy_(sum_N[part]).div_(weight))
