"""What an engine is: how rounds follow one another, and who decides that one may go on.

    prepared = engine.step(state, federation)   silos have trained and all ranks agree; nothing has changed yet
    prepared.outcome                            what training has come to
    state = prepared.commit(written)            the exchange, the server's step, evaluation

A prepared round that is not committed is dropped by forgetting it: the state that it was made from is whole, and so are
the silos. No engine writes anything to disk.
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
        """What training has come to, the same on every rank."""
        ...

    def commit(self, written: int = -1) -> State:
        """The state after the round. A call of all ranks, once; the state that the round was made from is spent, even
        where this raises. `written`: the newest round whose checkpoint this rank has on disk, for all to know."""
        ...


class Engine(Protocol):
    """How rounds follow one another."""

    def step(self, state: State, federation: Federation) -> PreparedRound:
        """The round after this state, up to where it would change anything. A call of all ranks. Raises alike on every
        one: Stopped, Diverged, NoCohort or SiloError; the state is whole all the same."""
        ...


class Policy:
    """Who decides that a round may go on with the silos that were heard. A rank that failed or was asked to stop ends
    the round under every policy. Members say `objection`, and what they read."""

    reads: ClassVar[frozenset[str] | None] = None  # arrays of the outcome, as a selector has them; None: not said

    @abstractmethod
    def objection(self, outcome: RoundOutcome) -> str:
        """Why those that were heard are not enough, or nothing. Every rank asks, and all know the same."""
        ...


@component
class Everybody(Policy):
    """Every rank is waited for; a round goes on with all updates that are usable, one at least."""

    reads: ClassVar[frozenset[str]] = frozenset()  # of single silos

    def objection(self, outcome: RoundOutcome) -> str:
        return "" if outcome.num_taken else "every update was rejected"


POLICIES = Family("policy", {"all": Everybody}, Policy, defaults=True)
