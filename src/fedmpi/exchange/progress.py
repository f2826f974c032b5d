"""Silos' own parameters, while global ones arrive late (overlap.py) or part by part (fragments.py).

Let w be the global parameters that have arrived, and a_k the distance of silo k from them. In every round

    training    starts from w + a_k; from w for a silo without an a_k
    sends       a_k after training, of the part that the round exchanges
    then        sets a_k to 0 in the part that arrives: this round's part, or with `overlap` the last round's

Every silo receives the part that arrives, even if it did not take part in the round or its update was rejected. A silo
that missed a part's turn loses its progress there since the last turn, so no a_k is older than one turn. Training that
is rejected or interrupted leaves a_k unchanged.

With overlap and one part, a_k is the last round's delta. When w_t arrives, the silo's starting point changes by
(w_t - w_{t-1}) - delta_{k,t}: the mean progress replaces its own. Continuing from w_{t-1} and adding what arrives would
count the same progress twice, and hardly converges when local training goes far (tests/exchange/test_overlap.py shows
both). Identical silos are exactly where they would be without overlap. With different silos, each silo's own part acts
one round longer, so convergence takes a few more rounds.

Evaluation uses w alone. Checks and transforms see the delta of one round, over all parts. A rule's global parameters
(the centre of a proximal term, for example) are those from which the silo's round started.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fedmpi.comm import Comm
from fedmpi.exchange.base import Exchange, ExchangeContext, Lap
from fedmpi.exchange.cost import Cost, Sizes
from fedmpi.exchange.fragments import Parts, parts, turn
from fedmpi.exchange.overlap import Behind
from fedmpi.records.timer import Spent
from fedmpi.server import Server
from fedmpi.state import OfSilos, StateTensor
from fedmpi.types import Contribution

if TYPE_CHECKING:
    from fedmpi.exchange.config import ExchangeSection

PENDING = "pending"  # key of the silos' progress in a checkpoint


class Progress(Exchange):
    """Keeps a_k for an exchange that works part by part, or behind the next round's training, or both."""

    @classmethod
    def cost(cls, section: ExchangeSection, sizes: Sizes) -> Cost:
        traffic, memory = Parts.cost(section, sizes)
        more = {"parameters that arrive": int(section.overlap), "start": 1, "progress of two rounds": 2 * sizes.hosted}
        return Cost(traffic, memory | {name: num * sizes.vector_bytes for name, num in more.items() if num})

    def __init__(self, section: ExchangeSection, comm: Comm, params_P: torch.Tensor, facts: ExchangeContext) -> None:
        super().__init__(section, comm, params_P, facts)
        self._late = section.overlap
        self._parts = parts(self.num_params, section.fragments)
        plan = Parts if section.fragments > 1 else section.member
        inner = plan(section, comm.dup() if self._late else comm, params_P, facts)
        self._inner = Behind(inner, comm, params_P) if self._late else inner
        self.params_placement, self.rounds_held = self._inner.params_placement, section.fragments
        self._start_P = torch.zeros_like(params_P)
        self._progress: dict[str, torch.Tensor] = {}  # a_k
        self.holders[PENDING] = OfSilos("delta", self._progress, self.device)
        self._next: dict[str, torch.Tensor] = {}  # a_k of the round in training
        self._spare: list[torch.Tensor] = []

    # ------------------------------------------------------------ a round

    def start(self, silo: str, params_P: torch.Tensor) -> torch.Tensor:
        progress_P = self._progress.get(silo)
        if progress_P is None:
            return params_P
        torch.add(params_P, progress_P, out=self._start_P)
        for part in self.layout.non_negative:
            self._start_P[part].clamp_(min=0.0)
        return self._start_P

    def begin(self, round: int = 0, num_contributions: int = 2, near: float = 1.0) -> None:
        super().begin(round, num_contributions, near)
        self._spare.extend(self._next.values())
        self._next.clear()
        self._inner.begin(round, num_contributions, near)

    def add(self, contribution: Contribution) -> None:
        new_P = self._spare.pop() if self._spare else torch.empty_like(contribution.vector_Q)
        new_P.copy_(contribution.vector_Q)
        old_P = self._progress.get(contribution.silo)
        if old_P is not None:
            arrives = self._part(self.round - 1)  # 0 in `old_P` by now, unless it arrives late
            for there in (slice(0, arrives.start), slice(arrives.stop, self.num_params)):
                new_P[there].add_(old_P[there])
        self._next[contribution.silo] = new_P
        self._inner.add(replace(contribution, vector_Q=new_P[self._part(self.round)]))

    def meet(self, silos: Sequence[str]) -> None:
        self._inner.meet(silos)

    def finish(
        self, params_P: torch.Tensor, server: Server, state: Any, lap: Lap = lambda phase: None
    ) -> tuple[torch.Tensor, Any]:
        params_P, state = self._inner.finish(params_P, server, state, lap)
        arrived = self._part(self.round - self._late)
        for silo in [*self._progress]:
            progress_P = self._progress[silo]
            if silo not in self._next:
                progress_P[arrived] = 0.0
            if silo in self._next or not progress_P.any():
                self._spare.append(self._progress.pop(silo))
        self._progress.update(self._next)
        if not self._late:
            for progress_P in self._next.values():
                progress_P[arrived] = 0.0
        self._next.clear()
        self.gram = self._inner.gram
        return params_P, state

    def _part(self, round: int) -> slice:
        """The part that a round exchanges."""
        return self._parts[turn(round, len(self._parts))]

    def figures(self) -> dict[str, float]:
        return self._inner.figures()

    def spent(self) -> Spent:
        return self._inner.spent()

    def tracks(self) -> dict[str, float]:
        return self._inner.tracks()

    def leave(self) -> None:
        self._inner.leave()

    def settle(self) -> None:
        self._inner.settle()

    # ------------------------------------------------------------ memory and state

    def state(self, params_P: torch.Tensor) -> Iterator[StateTensor]:
        """The inner exchange's state, and every a_k."""
        yield from self._inner.state(params_P)
        yield from self.holders.state()

    def restore(self, params_P: torch.Tensor, round: int, stored: Sequence[StateTensor]) -> None:
        self._inner.restore(params_P, round, [one for one in stored if one.key[0] != PENDING])
        self.holders.restore([one for one in stored if one.key[0] == PENDING])

    def home(self, params_P: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        return self._inner.home(params_P, state)

    def set_params(self, params_P: torch.Tensor, new_P: torch.Tensor | None) -> None:
        self._inner.set_params(params_P, new_P)

    def shard(self, vector_P: torch.Tensor) -> torch.Tensor:
        return self._inner.shard(vector_P)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return self._inner.gather(part)

    def scatter(self, whole_P: torch.Tensor | None, part: torch.Tensor) -> None:
        self._inner.scatter(whole_P, part)
