"""Protocols of the engine, which runs rounds, and of the policy, which decides whether a round may go on.

    prepared = engine.step(state, federation)   silos train and all ranks agree; nothing changes yet
    prepared.outcome                            the result of training
    state = prepared.commit(written)            the exchange, the server's step, evaluation

To drop a prepared round, do not commit it: its state and its silos are unchanged. No engine writes to disk.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Protocol

from fedmpi.components import Family, component
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


class Policy:
    """Decides whether a round may go on with the updates that arrived. A rank that failed or was asked to stop ends the
    round under every policy. Members define `objection` and `reads`."""

    reads: ClassVar[frozenset[str] | None] = None  # per-silo figures that it reads, as for a selector; None: unknown

    @abstractmethod
    def objection(self, outcome: RoundOutcome) -> str:
        """Why the round may not go on; empty if it may. Every rank asks with the same outcome."""
        ...


@component
class Everybody(Policy):
    """Waits for every rank. A round goes on if at least one update is usable, with all that are."""

    reads: ClassVar[frozenset[str]] = frozenset()

    def objection(self, outcome: RoundOutcome) -> str:
        return "" if outcome.num_taken else "every update was rejected"


POLICIES = Family("policy", {"all": Everybody}, Policy, defaults=True)
