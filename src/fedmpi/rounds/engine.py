"""The engine runs rounds, one after another.

    prepared = engine.step(state, federation)   silos train and all ranks agree; nothing changes yet
    prepared.outcome                            the result of training
    state = prepared.commit(written)            the exchange, the server's step, evaluation

To drop a prepared round, do not commit it: its state and its silos are unchanged. No engine writes to disk.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Protocol

from fedmpi.outcome import RoundOutcome
from fedmpi.rounds.clocks import Clock, Real
from fedmpi.rounds.federation import Federation, State
from fedmpi.rounds.policies import Everybody, Policy

if TYPE_CHECKING:
    from fedmpi.config import Config


class PreparedRound(Protocol):
    """A round that is ready to be committed."""

    @property
    def outcome(self) -> RoundOutcome:
        """The result of training, equal on every rank."""
        ...

    def commit(self, written: int = -1) -> State:
        """The state after the round. Collective, called once. It overwrites the state that the round started from, even
        if it raises. `written` is the newest round whose checkpoint this rank has on disk; all ranks learn it."""
        ...


class Engine:
    """Runs rounds, one after another. Members define `step`, and override the rest as needed."""

    gives_orders: ClassVar[bool] = False  # whether it measures delays and tells silos how much to do (delays.py)

    @property
    def policy(self) -> Policy:
        """Decides when a round closes, and whether it goes on."""
        return Everybody()

    @property
    def clock(self) -> Clock:
        """How long training takes."""
        return Real()

    @property
    def arrivals(self) -> int:
        """Updates of a round, if each goes to rank 0 by itself (exchange/arrivals.py); 0: the plan's collectives."""
        return 0

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that it needs in the silos' table, besides those of its policy."""
        return ()

    def conflicts(self, config: Config) -> str | None:
        """Why it does not work with the rest of the configuration, in one line; None if it does."""
        return None

    @abstractmethod
    def step(self, state: State, federation: Federation) -> PreparedRound:
        """The next round, prepared: silos have trained and nothing has changed. Collective. Raises the same error on
        every rank, Stopped, Diverged, NoCohort or SiloError, and leaves the state unchanged."""
        ...
