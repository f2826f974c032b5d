"""Evaluation of the new parameters, and of the silos' own models, on this rank's silos."""

from __future__ import annotations

import torch

from fedmpi import rng
from fedmpi.errors import FedmpiError
from fedmpi.evaluate import PERSONAL, evaluate_silo, evaluation_key, own_model, tell
from fedmpi.local import LocalSilo
from fedmpi.objectives import Tally
from fedmpi.rounds.agreement import as_error
from fedmpi.rounds.federation import Federation
from fedmpi.stopping import FAILED


def evaluate(fed: Federation, number: int, params_P: torch.Tensor) -> FedmpiError | None:
    """Evaluate the new parameters on my silos' test data, if it is due, and the silos' own models where they have any;
    what happened is in `done`."""
    fed.done.clear()
    error: FedmpiError | None = None
    name = ""
    try:
        if number % fed.evaluate_every == 0 or number == fed.rounds:
            fed.model.load(params_P)
            tallies: dict[str, Tally] = {}
            for name, silo in fed.silos.items():
                if fed.model.touched:  # by a module that counts in evaluation too
                    fed.model.load(params_P)
                # Between batches news is passed on, so that a stop is agreed in time; the round still commits.
                rng.set_all(evaluation_key(fed.seed, number, name))
                tallies[name] = evaluate_silo(fed.model, fed.objective, silo, fed.evaluate_batch, fed.watch.look)
                fed.scores.enter(fed.done, fed.index[name], tallies[name])
                tell(f"round {number}", name, tallies[name])
            for name, silo in fed.silos.items():
                own = _evaluate_personal(fed, number, silo, params_P, tallies[name])
                if own is not None:
                    fed.scores.enter(fed.done, fed.index[name], own, PERSONAL)
                    if own is not tallies[name]:
                        tell(f"round {number}", name, own)
    except (Exception, SystemExit) as raised:
        at = f", silo '{name}', after round {number}" if name else ""
        error = as_error(raised, f"rank {fed.comm.rank}{at}")
        fed.done.set_rank(fed.comm.rank, status=FAILED)
    return error


def _evaluate_personal(
    fed: Federation, number: int, silo: LocalSilo, params_P: torch.Tensor, tally: Tally
) -> Tally | None:
    """What the model came to that the silo would use for itself; None where that is the global one. `tally` is of the
    parameters with the silo's layers."""
    if not len(silo.data.x_test):
        return None
    look = fed.watch.look

    def check() -> None:  # a stop is passed on, and waits for the round
        look()

    found = own_model(fed.rule, fed.model, silo, params_P, fed.tuning(silo, number, check))
    if found is None:
        return None
    own_P, own = found
    if own is silo and own_P is params_P:
        return tally
    fed.model.load(own_P)
    rng.set_all(evaluation_key(fed.seed, number, silo.id))
    return evaluate_silo(fed.model, fed.objective, own, fed.evaluate_batch, look)
