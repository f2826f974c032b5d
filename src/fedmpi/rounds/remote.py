"""The seam for silos that are jobs of their own: their updates and figures come from elsewhere, in place of training
and evaluation on this rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fedmpi.errors import FedmpiError
from fedmpi.exchange.arrivals import Arrivals
from fedmpi.local import LocalSilo, Order
from fedmpi.rounds.closing import Closing
from fedmpi.rounds.federation import Federation, State
from fedmpi.rounds.training import NO_ORDERS

if TYPE_CHECKING:
    from fedmpi.membership import Membership
    from fedmpi.opening import Opened
    from fedmpi.rounds.realtime import RealTime


class Remote(Protocol):
    """Silos that train and evaluate in jobs of their own.

    Attributes: given_up (why the secure sum of the last `collect` is not revealed, so that the round changes nothing;
    empty: it is, or there is none).
    """

    given_up: str

    def collect(
        self,
        state: State,
        fed: Federation,
        number: int,
        cohort: Sequence[str],
        factors: Sequence[float] | None,
        near: float,
        stands_for: float,
        refused: FedmpiError | None,
        closing: Closing | None = None,
        orders: Mapping[str, Order] = NO_ORDERS,
    ) -> tuple[dict[str, LocalSilo], FedmpiError | None]:
        """As `training.train_silos`: add the cohort's contributions to the exchange, and fill in `fed.ready`. The
        silos' state is in their jobs, so the dict is empty."""
        ...

    def admitted(self, members: Membership) -> Opened:
        """As `rebuild.admitted`: the facts of the members' data. Raises ConfigError if members are refused."""
        ...

    def real_time(self, engine: Any, fed: Federation, exchange: Arrivals, state: State) -> RealTime:
        """For engine: buffered in real time, in place of `realtime.RealTime`: who brings the updates of a round."""
        ...

    def commit(self, fed: Federation, number: int, params_Q: torch.Tensor, scored_P: torch.Tensor) -> None:
        """Publish the parameters after this round [Q], and those to score [P]; from now on it counts."""
        ...

    def evaluate(self, fed: Federation, number: int, params_P: torch.Tensor) -> FedmpiError | None:
        """As `evaluation.evaluate`: fill in `fed.done` with the silos' figures, if it is due."""
        ...

    def scored(self, fed: Federation) -> dict[str, Any]:
        """What the round's record says of scores of earlier versions."""
        ...
