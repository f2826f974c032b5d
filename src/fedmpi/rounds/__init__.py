"""One federated round, the same lines on every rank in the same order.

    cohort        selected by every rank alike: no message, or one small collective for fresh losses of candidates
    contributions local training of my silos in the cohort, folded as they come
    ready         one small collective: who is ready, who stopped or failed, losses, weights
    exchange      the vectors, and the server's step
    agree         one small collective: evaluation, timings, bytes: the record; the round commits here

A round is a transaction: an engine prepares it, up to `ready`, and nothing changes before it is committed (engine.py).
Whoever leaves it early, because of a signal or because a silo raised, says so in `ready`, which every rank enters; then
all leave, and the state is still that of the last round. Nothing is under `if rank`.

With `exchange.overlap` the parameters that come out of a round, and that it evaluates, are those of the round before:
the exchange that it has begun goes on behind the next one's training (exchange/overlap.py).
"""

from fedmpi.components import Family
from fedmpi.rounds.engine import POLICIES, Engine, Policy, PreparedRound
from fedmpi.rounds.federation import DONE_RANK, READY_RANK, READY_SILO, Federation, State
from fedmpi.rounds.synchronous import Synchronous

ENGINES = Family("engine", {"synchronous": Synchronous}, Engine)

__all__ = [
    "DONE_RANK",
    "ENGINES",
    "POLICIES",
    "READY_RANK",
    "READY_SILO",
    "Engine",
    "Federation",
    "Policy",
    "PreparedRound",
    "State",
    "Synchronous",
]
