"""Agreement on a round: all ranks go on, or all raise the same error."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Sequence

import numpy as np

from fedmpi.comm import ranks_text
from fedmpi.errors import ConfigError, Diverged, ExchangeError, FedmpiError, NoCohort, SiloError, Stopped, agreed
from fedmpi.exchange.base import LARGEST_NORM, UNIT
from fedmpi.outcome import RoundOutcome
from fedmpi.rounds.disclosure import heard
from fedmpi.rounds.federation import Federation
from fedmpi.rounds.policies import Policy
from fedmpi.stopping import FAILED, READY, STOP
from fedmpi.transforms import CHECKS

REFUSED = FAILED + 1  # status of a rank whose selector chose no cohort
WITHIN = 2e-7  # largest rounding error of the ring's mean, for deltas of norm 1
LEAST_SHARE = 1 / 16  # of a cohort's weight, with 16 bits under masks
WITHIN_CLIP = 2e-6  # the same under masks, in units of the norm that updates are clipped to


def agree_ready(
    fed: Federation,
    outcome: RoundOutcome,
    policy: Policy,
    error: FedmpiError | None,
    near: float = 1.0,
    num_updates: int | None = None,
) -> None:
    """Return on every rank, or raise the same error on every rank. If no rank failed or stops, the policy decides;
    a void round, which may be repeated, returns. Collective. `near` is the factor of `exchange.weights.nearness`.
    `num_updates`: how many the aggregator will read; None: one of each accepted silo.

    Raises SiloError or ConfigError (a rank failed), Stopped, NoCohort, Diverged (the policy objects), or ExchangeError
    (ranks prepared different exchanges, or the integer ring is too coarse for this round's weights).
    """
    number, cohort = outcome.round, outcome.cohort
    status = fed.ready.rank("status")
    if (status == REFUSED).all():
        raise agreed(NoCohort(str(error)))
    if error is not None and status[fed.comm.rank] == REFUSED:
        error = SiloError(f"rank {fed.comm.rank}: {error}")
    raise_failure(fed, status, error)
    if status.max() >= STOP:
        raise agreed(Stopped(f"stopped in round {number}: {stop_reason(fed, status)}"))
    fingerprint = fed.ready.rank("fingerprint")
    if (others := np.flatnonzero(fingerprint != fingerprint[0])).size:
        raise agreed(ExchangeError(_difference(fed, cohort, others.tolist())))
    if not cohort:
        raise agreed(NoCohort(f"round {number}: the selector chose no silo"))
    if outcome.is_void or outcome.given_up:
        return
    if why := policy.objection(outcome):
        if outcome.num_rejected:
            why += _why_rejected(fed)
        raise agreed(Diverged(f"round {number}: {why}"))
    if fed.secure is not None and (why := fed.secure.objection(taken := silos_taken(fed))):
        raise agreed(NoCohort(f"round {number}: {why}{_who_is_missing(cohort, taken)}"))
    if fed.exchange.ring and (fed.secure is None or fed.secure.noise is None):  # noise is wider than rounding
        _has_room(fed, outcome, near)
    try:
        fed.aggregator.suits(outcome.num_taken if num_updates is None else num_updates)
    except ConfigError as few:  # the round brought too few updates; the configuration is fine
        raise agreed(NoCohort(f"round {number}: {few}")) from None


def _why_rejected(fed: Federation) -> str:
    """Text for an error: which updates were rejected, by which transform, and what may help."""
    by = fed.rejected_by
    if others := sorted(set(by.values()) - {CHECKS}):
        return f" ({', '.join(f'{silo} by {name}' for silo, name in list(by.items())[:8])}); see updates: {others[0]}"
    names = f" ({', '.join(list(by)[:8])})" if by else ""
    return (
        f"{names}: not finite or its norm beyond {LARGEST_NORM:.0f}{_beyond(fed)}; a smaller "
        "local.lr or local.clip may help"
    )


def _who_is_missing(cohort: Sequence[str], taken: Sequence[str]) -> str:
    """Text for an error under masks: whose updates were rejected, which all ranks know, and what may help."""
    if not (missing := [silo for silo in cohort if silo not in taken]):
        return ""
    return (
        f"; rejected ({', '.join(missing[:8])}): not finite, or by `updates`; a smaller local.lr may help, or a "
        "new run with a smaller secure.threshold"
    )


def _beyond(fed: Federation) -> str:
    """Text for an error: the largest value that the codec can encode, if it has a limit."""
    largest = fed.exchange.section.largest
    return "" if largest == math.inf else f" or a value beyond the {largest:.5g} that a codec holds"


def _has_room(fed: Federation, outcome: RoundOutcome, near: float) -> None:
    """Raise ExchangeError if the accepted updates weigh so little that the ring's rounding would show in the mean."""
    share = float(heard(fed.ready).sent.sum()) / fed.exchange.facts.total_weight * near
    if fed.secure is not None:
        ring = fed.secure.ring
        coarse = ring.span < math.inf  # chosen by name, with the error that its ring has for a whole cohort
        if share < LEAST_SHARE if coarse else ring.error(outcome.num_taken, share) > WITHIN_CLIP * ring.bound:
            raise agreed(
                ExchangeError(
                    f"round {outcome.round}: secure has no room in {ring.bits} bits for updates that weigh {share:.1e} "
                    f"of their cohort, and only they were usable; take secure.bits: {32 if coarse else 64}, or weights "
                    "nearer to each other"
                )
            )
    elif share < outcome.num_taken**0.5 / UNIT / WITHIN:
        known = outcome.names(outcome.taken_K)[:8] if outcome.rejected_K is not None else [str(outcome.num_taken)]
        names = ", ".join(known)
        raise agreed(
            ExchangeError(
                f"round {outcome.round}: exchange.reduction: reproducible has no room for updates that weigh "
                f"{share:.1e} of their cohort, and only they were usable ({names}); take reduction: fast, or weights "
                "nearer to each other"
            )
        )


def may_uncover(fed: Federation) -> bool:
    """Whether the sums of the round's figures may be seen under masks: every rank is through, and the updates that are
    taken may be summed. If not, `agree_ready` raises; a repeated round must not show how two sums differ."""
    through = bool((fed.ready.rank("status") == READY).all())
    return through and (fed.secure is None or not fed.secure.objection(silos_taken(fed)))


def silos_taken(fed: Federation) -> list[str]:
    """The silos whose updates of the round in `fed.ready` are in its sum."""
    return [silo for silo, taken in zip(fed.ids, fed.ready.silo("taken").tolist(), strict=True) if taken > 0]


def as_error(raised: BaseException, where: str) -> FedmpiError:
    """An exception as an error that all ranks can raise: one line for a FedmpiError, the traceback for anything else.
    `where` names rank, silo and round."""
    if isinstance(raised, FedmpiError):
        return (ConfigError if isinstance(raised, ConfigError) else SiloError)(f"{where}: {raised}")
    return SiloError(f"{where}:\n{traceback.format_exc()}")


def raise_failure(fed: Federation, status: np.ndarray, error: FedmpiError | None) -> None:
    """Raise the error of the first rank that failed on every rank, as SiloError or ConfigError. Return if none failed.
    Collective. A rank that left because of another's notice passes `error` None."""
    if (status < FAILED).all():
        return
    told = fed.comm.gather_number(0 if error is None else error.exit_code)
    first = int(np.flatnonzero(told)[0]) if told.any() else 0
    text = fed.comm.broadcast_text("" if error is None else str(error), first)
    kind = ConfigError if told[first] == ConfigError.exit_code else SiloError
    raise agreed(kind(text or "a rank left the round because of an earlier failure"))


def _difference(fed: Federation, cohort: Sequence[str], others: list[int]) -> str:
    """Text for an error: how the exchange of the first of `others` differs from rank 0's. Collective."""
    mine = json.dumps(fed.exchange.declared(cohort))
    here, there = (json.loads(fed.comm.broadcast_text(mine, rank)) for rank in (0, others[0]))
    names = [name for name in here if here[name] != there[name]]
    texts = [f"{name} is {str(here[name])[:80]} there and {str(there[name])[:80]} here" for name in names]
    return f"the exchange differs between ranks, rank 0 (there) against {ranks_text(others)} (here): {'; '.join(texts)}"


def stop_reason(fed: Federation, status: np.ndarray) -> str:
    """Why the first rank that was asked to stop stops, with its number. Collective."""
    first = int(np.argmax(fed.comm.gather_number(bool(fed.watch.reason))))
    return f"{fed.comm.broadcast_text(fed.watch.reason, first)} (rank {first})"
