"""Protocols of the engine, which runs rounds, one after another.

    prepared = engine.step(state, federation)   silos train and all ranks agree; nothing changes yet
    prepared.outcome                            the result of training
    state = prepared.commit(written)            the exchange, the server's step, evaluation

To drop a prepared round, do not commit it: its state and its silos are unchanged. No engine writes to disk.
"""

from __future__ import annotations

from typing import Protocol

from fedmpi.outcome import RoundOutcome
from fedmpi.rounds.federation import Federation, State


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


class Engine(Protocol):
    """Runs rounds, one after another."""

    def step(self, state: State, federation: Federation) -> PreparedRound:
        """The next round, prepared: silos have trained and nothing has changed. Collective. Raises the same error on
        every rank, Stopped, Diverged, NoCohort or SiloError, and leaves the state unchanged."""
        ...
