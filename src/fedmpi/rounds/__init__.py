"""One federated round. Every rank runs the same lines in the same order.

    cohort        every rank selects the same silos: no message, or one small collective for the candidates' losses
    contributions this rank's silos of the cohort train; each contribution is added to the rank's sum at once
    ready         one small collective: who is ready, who stopped or failed, losses, weights
    exchange      the vectors, and the server's step
    agree         one small collective: evaluation, timings, bytes; gives the record, and commits the round

A round is a transaction: an engine prepares it up to `ready`, and nothing changes until it is committed (engine.py). A
rank that leaves early, because of a signal or an exception, says so in `ready`. Every rank enters `ready`, so all leave
together, with the state of the last round. No collective stands under `if rank`.

With `exchange.overlap` a round returns and evaluates the parameters of the round before: its own exchange runs during
the next round's training (exchange/overlap.py).
"""

from fedmpi.components import Family
from fedmpi.rounds.asynchronous import Buffered
from fedmpi.rounds.clocks import CLOCKS, TIMES
from fedmpi.rounds.engine import Engine, PreparedRound
from fedmpi.rounds.federation import DONE_RANK, READY_RANK, READY_SILO, Federation, State
from fedmpi.rounds.policies import POLICIES, Everybody, Policy
from fedmpi.rounds.staleness import STALENESS
from fedmpi.rounds.synchronous import Synchronous

ENGINES = Family(
    "engine",
    {"synchronous": Synchronous, "buffered": Buffered},
    Engine,
    defaults=True,
    implied="synchronous",
)

__all__ = [
    "CLOCKS",
    "DONE_RANK",
    "ENGINES",
    "POLICIES",
    "READY_RANK",
    "READY_SILO",
    "STALENESS",
    "TIMES",
    "Buffered",
    "Engine",
    "Everybody",
    "Federation",
    "Policy",
    "PreparedRound",
    "State",
    "Synchronous",
]
