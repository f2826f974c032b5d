"""Evaluation of the new parameters, and of personal models, on this rank's silos."""

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
    """Evaluate the new parameters, and any personal models, on the test data of this rank's silos, if it is due.
    Results go to `fed.done`. Returns this rank's error, or None."""
    fed.done.clear()
    error: FedmpiError | None = None
    name = ""
    try:
        if number % fed.evaluate_every == 0 or number == fed.rounds:
            fed.model.load(params_P)
            tallies: dict[str, Tally] = {}
            for name, silo in fed.silos.items():
                if fed.model.touched:  # the module changes its own buffers even in evaluation
                    fed.model.load(params_P)
                # `look` passes a stop on between batches, so that all ranks learn of it soon; the round still commits.
                rng.set_all(evaluation_key(fed.seed, number, name))
                tallies[name] = evaluate_silo(fed.model, fed.objective, silo, fed.evaluate_batch, fed.watch.look)
                fed.scores.enter(fed.done, fed.index[name], tallies[name])
                tell(f"round {number}", name, tallies[name])
            fed.model.hold(params_P, loaded=True)  # training, which starts from these, need not load them again
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
    """Results of the silo's personal model; None if it has none. `tally` holds the results of the global parameters
    with the silo's personal layers."""
    if not len(silo.data.x_test):
        return None
    look = fed.watch.look

    def check() -> None:  # passes a stop on without leaving the round
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
