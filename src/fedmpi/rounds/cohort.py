"""Selection of a round's cohort, with a small collective if the selector asks for the candidates' losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedmpi import rng
from fedmpi.errors import FedmpiError, NoCohort, Stopped, agreed
from fedmpi.local import LocalSilo
from fedmpi.records import StatusTable
from fedmpi.rounds.agreement import as_error, raise_failure, stop_reason
from fedmpi.rounds.federation import Federation, State
from fedmpi.selection import Selection
from fedmpi.stopping import FAILED, STOP, BrokenOff
from fedmpi.types import Samples

PROBE_RANK, PROBE_SILO = ("status",), ("loss",)


def select_cohort(state: State, fed: Federation, number: int) -> tuple[Selection, set[str], FedmpiError | None]:
    """The round's selection, the candidates whose loss is not finite, and None. If the selector raises on this rank: an
    empty selection, an empty set and the error, which `ready` then tells all ranks. Errors that all ranks raise pass
    through."""
    try:
        return *_cohort(state, fed, number), None
    except FedmpiError as error:
        if error.agreed:
            raise
        return Selection([], state.selector), set(), error


def _cohort(state: State, fed: Federation, number: int) -> tuple[Selection, set[str]]:
    """The round's selection and the candidates whose loss is not finite.

    If the selector names candidates, their losses of the global parameters are shared in one small collective. A rank
    that stops or fails while it evaluates says so there; every rank enters it.
    """
    selector, draw = fed.selector, _draw(fed, number)
    own = selector.observe(fed.ids, state.selector, state.outcome)
    candidates = selector.candidates(fed.ids, own, state.outcome, draw)
    if not candidates:
        return _chosen(selector.select(fed.ids, own, state.outcome, draw), fed, number), set()
    probe, error = _probe(state, fed, number, candidates)
    status = probe.rank("status")
    raise_failure(fed, status, error)
    if status.max() >= STOP:
        raise agreed(Stopped(f"stopped in round {number}: {stop_reason(fed, status)}"))
    losses = dict(zip(fed.ids, probe.silo("loss").tolist(), strict=True))
    of_candidates = {silo: losses[silo] for silo in candidates}
    found = selector.select(fed.ids, own, state.outcome, draw, of_candidates)  # type: ignore[call-arg]
    return _chosen(found, fed, number), {silo for silo, loss in of_candidates.items() if not math.isfinite(loss)}


def _draw(fed: Federation, number: int) -> np.random.Generator:
    """The generator of the round's draw; a secret one if privacy counts on the draw."""
    if fed.private is not None and fed.private.draws:
        return fed.private.draw()
    return rng.generator(fed.seed, purpose="select", round=number)


def _chosen(found: Any, fed: Federation, number: int) -> Selection:
    """Check a selector's result: silos of the federation, each once, in its order, and a state. Raises NoCohort."""
    who = f"round {number}: the selector {type(fed.selector).__name__}"
    if not isinstance(found, tuple) or len(found) < 2 or not isinstance(found[1], Mapping):
        raise NoCohort(f"{who} must return a cohort and its new state (a dict of arrays), and returned {found!r:.80}")
    cohort = [found[0]] if isinstance(found[0], str) else list(found[0])
    chosen = set(cohort)
    if cohort != [silo for silo in fed.ids if silo in chosen]:
        others = [silo for silo in cohort if silo not in fed.index]
        why = f"'{others[0]}' is no silo" if others else "a silo twice, or not in the federation's order"
        raise NoCohort(f"{who} chose {cohort!r:.80}: {why}")
    return Selection(cohort, *found[1:])


def _probe(
    state: State, fed: Federation, number: int, candidates: Sequence[str]
) -> tuple[StatusTable, FedmpiError | None]:
    """Losses of the global parameters on the candidates' training samples, from all ranks; and this rank's error."""
    probe = StatusTable(fed.comm.size, PROBE_RANK, len(fed.ids), PROBE_SILO)
    error: FedmpiError | None = None
    status, name = 0, ""
    try:
        fed.watch.check()
        fed.model.load(fed.layout.params(state.params_Q))
        for name in (silo for silo in candidates if silo in fed.silos):
            if fed.model.touched:  # the module changes its own buffers even in evaluation
                fed.model.load(fed.layout.params(state.params_Q))
            silo, num = fed.silos[name], fed.selector.samples
            x, y = silo.data.x_train, silo.data.y_train
            if num is not None and num < len(x):
                drawn = rng.generator(fed.seed, purpose="probe", round=number, silo=name)
                rows = torch.from_numpy(np.sort(drawn.choice(len(x), size=num, replace=False))).to(x.device)
                x, y = x[rows], y[rows]
            probe.set_silo(fed.index[name], loss=start_loss(fed, number, silo, x, y))
    except BrokenOff as broken:
        status = broken.status
    except (Exception, SystemExit) as raised:
        status, error = FAILED, as_error(raised, f"rank {fed.comm.rank}, silo '{name}', before round {number}")
        fed.watch.tell(FAILED, "")
    probe.set_rank(fed.comm.rank, status=status)
    probe.share(lambda values: fed.comm.share(values, fed.watch.look))
    return probe, error


def start_loss(fed: Federation, number: int, silo: LocalSilo, x: Samples, y: torch.Tensor) -> float:
    """Mean loss on `x`, `y` of the parameters now loaded in the model, with the silo's personal layers."""
    rng.set_all(rng.key(fed.seed, purpose="loss", round=number, silo=silo.id))
    fed.model.load_personal(silo.kept)
    return fed.objective.mean_loss(fed.model.module, x, y, fed.evaluate_batch, fed.model.device, fed.watch.check)


def share_of_all(fed: Federation, cohort: Sequence[str], factors: Sequence[float] | None) -> float:
    """Weight of the cohort, times the selector's factors, as a share of the weight of all silos; 1 for all silos."""
    if len(cohort) == len(fed.ids) and factors is None:
        return 1.0
    weights = fed.weights_K[[fed.index[silo] for silo in cohort]]
    return float((weights if factors is None else weights * factors).sum()) / fed.exchange.facts.total_weight
