"""Trains this rank's silos of the cohort and adds their contributions to the exchange."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

import torch

from fedmpi.errors import FedmpiError
from fedmpi.exchange.base import LARGEST_NORM
from fedmpi.local import LocalSilo, Order, Round
from fedmpi.outcome import BUFFERED, DROPPED, PARTIAL, VOID
from fedmpi.rounds.agreement import REFUSED, as_error
from fedmpi.rounds.buffered import Buffered, add_rows, without
from fedmpi.rounds.closing import Closing, Late
from fedmpi.rounds.cohort import start_loss
from fedmpi.rounds.federation import Federation, State
from fedmpi.stopping import FAILED, BrokenOff
from fedmpi.types import Contribution

NO_ORDERS: Mapping[str, Order] = {}


def train_silos(
    state: State,
    fed: Federation,
    number: int,
    cohort: Sequence[str],
    factors: Sequence[float] | None,
    near: float,
    stands_for: float,
    refused: FedmpiError | None,
    closing: Closing | None = None,
    orders: Mapping[str, Order] = NO_ORDERS,
) -> tuple[dict[str, LocalSilo], FedmpiError | None]:
    """Train this rank's silos of the cohort and add their contributions to the exchange. Returns the trained silos by
    id, and this rank's error, if any. `fed.ready` records the result of each silo. The cohort is empty if this
    rank's selector `refused`. `closing` may end the round before all silos have finished. `orders`:
    what silos are told of how much to do (rounds/delays.py)."""
    fed.ready.clear()
    mine = [(silo, factor) for silo, factor in zip(cohort, factors or repeat(1.0)) if silo in fed.silos]  # noqa: B905
    left_out = [pair for pair in mine if closing is not None and not closing.takes(pair[0])]
    mine = [pair for pair in mine if pair not in left_out] if left_out else mine
    buffers = closing is not None and closing.buffers
    waiting = [one for silo in fed.silos.values() if (one := Buffered.of(silo, fed.model.device))] if buffers else []
    entering = [one.entering(number) for one in waiting]
    stands_for *= 1 + buffers  # a silo may bring two updates
    fed.exchange.begin(number, len(mine) + len(entering), near)
    fed.model.lends = fed.exchange.subtracts
    steps = fed.updates.steps(state.updates, fed.seed, number, fed.layout)
    trained: dict[str, LocalSilo] = {}
    error: FedmpiError | None = None
    status, num_done, name = 0, 0, ""
    busy, began_s = False, 0.0  # whether a silo trains, and since when
    losses_before: dict[str, float] = {}

    def begin(silo: LocalSilo) -> tuple[torch.Tensor, Round]:
        nonlocal name, busy, began_s
        name = silo.id
        fed.watch.begin(f"silo '{name}', round {number}")
        if closing is not None:
            closing.begin(name)
        busy, began_s = True, time.monotonic()
        return _begin(state, fed, number, silo, losses_before, closing, orders.get(name))

    try:
        fed.watch.check()
        # Work on copies: the round may still be dropped, and silo state changes only when it commits.
        for one in entering:
            fed.exchange.add(one.contribution)
            trained[one.contribution.silo] = without(fed.silos[one.contribution.silo])
        drafts = [without(silo) for silo in (fed.silos[name] for name, _ in mine)]
        contributions = fed.runner.run(fed.rule, fed.model, drafts, begin)
        for (name, factor), silo, contribution in zip(mine, drafts, contributions, strict=True):
            num_done += 1
            busy, work_s = False, time.monotonic() - began_s
            check_contribution(contribution, silo, fed)
            if name in orders:
                fed.ready.set_silo(fed.index[name], work_s=work_s, units=orders[name].amount * contribution.part)
            contribution.start_loss = losses_before.get(name, 0.0)
            contribution.weight = silo.weight * factor
            contribution.weight = fed.aggregator.weight(contribution)
            if closing is not None:
                _normalise(contribution, fed, silo.weight * factor, closing)
            fed.ready.set_silo(
                fed.index[name],
                samples=contribution.num_samples,
                targets=contribution.counted if fed.training_told else 0,
                steps=contribution.num_steps,
                normalizer=contribution.num_gradients,
                start_loss=contribution.start_loss,
                weight=silo.weight * factor,
            )
            grown = _grown(contribution.weight, silo.weight * factor, stands_for) * fed.exchange.rounds_held
            most = min(LARGEST_NORM, fed.exchange.largest_norm / (grown if fed.exchange.ring else 1.0))
            if grown > fed.exchange.most_growth:
                most = 0.0
            rejected, norms = steps.on_silo(contribution, most, LARGEST_NORM if fed.secure is not None else None)
            fed.ready.set_silo(fed.index[name], **norms)
            if not rejected and not (
                _rescaled(contribution, fed, silo.weight * factor, near)
                and (contribution.untaken or fed.exchange.holds(contribution.vector_Q, grown))
            ):
                rejected = fed.updates.by_checks
            if rejected:
                fed.ready.set_silo(fed.index[name], rejected=rejected)
                if buffers and contribution.part < 1.0:
                    fed.ready.set_silo(fed.index[name], late=PARTIAL)  # rejected, so nothing is buffered
                continue
            trained[name] = silo
            if buffers and contribution.part < 1.0:
                _buffer(contribution, silo, fed)
                continue
            fed.exchange.add(contribution)
            fed.ready.set_silo(
                fed.index[name],
                taken=True,
                loss=contribution.loss if fed.training_told else 0.0,
                norm=contribution.norm if fed.training_told else math.nan,
                sent=contribution.weight,
            )
    except Late:
        pass
    except BrokenOff as broken:
        status = broken.status
    except (Exception, SystemExit) as raised:
        status, error = FAILED, as_error(raised, f"rank {fed.comm.rank}, silo '{name}', round {number}")
        fed.watch.tell(FAILED, "")
    fed.watch.rest()
    fed.model.lends = False
    if closing is not None:
        for name, _ in (*(pair for pair in left_out if not closing.in_time(pair[0])), *mine[num_done:]):
            late = VOID if closing.is_broken else DROPPED
            fed.ready.set_silo(fed.index[name], late=late, seconds=2 * closing.limit_s)
        if busy and not closing.is_broken and (name := mine[num_done][0]) in orders:
            # It was in training when the round closed, so its seconds are not known: as in `seconds`.
            fed.ready.set_silo(fed.index[name], work_s=2 * closing.limit_s, units=orders[name].amount)
    add_rows(fed.ready, ((fed.index[o.contribution.silo], number - o.contribution.round, o) for o in entering))
    if refused is not None:
        status, error = REFUSED, refused
        fed.watch.tell(FAILED, "")
    fingerprint = fed.exchange.fingerprint(cohort)
    fed.ready.set_rank(fed.comm.rank, status=status, fingerprint=fingerprint)
    return trained, error


def _normalise(contribution: Contribution, fed: Federation, stands_for: float, closing: Closing) -> None:
    """Divide the weight of a late silo's delta by the part of its work that it did (see closing.normalised)."""
    part = 1.0 if fed.aggregator.normalises else contribution.part
    row = {"done": stands_for * part, "plain": contribution.weight}
    contribution.weight /= part
    if contribution.part < 1.0:
        row |= {"late": BUFFERED if closing.buffers else PARTIAL, "seconds": 2 * closing.limit_s}
    else:
        row["seconds"] = closing.through()
    fed.ready.set_silo(fed.index[contribution.silo], **row)


def _buffer(contribution: Contribution, silo: LocalSilo, fed: Federation) -> None:
    """Keep a late silo's update for the next round. It has passed all checks."""
    weight, done, plain = (float(fed.ready.silo(n)[fed.index[silo.id]]) for n in ("weight", "done", "plain"))
    Buffered(contribution, weight, done, plain).keep(silo)


def _grown(weight: float, stands_for: float, all_stand_for: float) -> float:
    """Factor by which a delta grows in the weighted sum; 1 unless weights count steps or a selector scales them.

    The integer ring and codecs must have room for the grown delta. An aggregator's weight may be negative.
    """
    return max(1.0, abs(weight) / stands_for) * max(1.0, all_stand_for)


def _begin(
    state: State,
    fed: Federation,
    number: int,
    silo: LocalSilo,
    losses_before: dict[str, float],
    closing: Closing | None,
    order: Order | None,
) -> tuple[torch.Tensor, Round]:
    """The parameters that a silo starts from, [P], and the Round for its rule. Stores the loss before training in
    `losses_before` if the aggregator needs it."""
    start_Q = fed.exchange.start(silo.id, state.params_Q)
    params_P = fed.layout.params(start_Q)
    auxiliary = {segment.name: start_Q[segment.place] for segment in fed.layout.auxiliaries}
    if fed.aggregator.start_loss:
        fed.model.load(params_P)
        losses_before[silo.id] = start_loss(fed, number, silo, silo.data.x_train, silo.data.y_train)
    criterion = fed.criterion(silo)
    check, over = (fed.watch.check, None) if closing is None else (closing.check, closing.over)
    guard = None if fed.private is None else fed.private.guard(silo.id, number)
    known = (number, fed.rounds, fed.seed, criterion.loss, check, auxiliary, criterion.count, over)
    return params_P, Round(*known, guard=guard, order=order)


def _rescaled(contribution: Contribution, fed: Federation, stands_for: float, near: float) -> bool:
    """Scale auxiliary vectors in place, so that the weighted sum gives their own mean. False if one is not finite."""
    if not fed.layout.auxiliaries:
        return True
    weight = contribution.weight
    for segment in fed.layout.auxiliaries:
        if segment.normaliser == "population":
            contribution[segment.name].mul_(fed.exchange.facts.total_weight / near / (weight * len(fed.ids)))
        elif weight != stands_for:
            contribution[segment.name].mul_(stands_for / weight)
    return bool(torch.isfinite(torch.linalg.vector_norm(contribution.vector_Q[fed.layout.num_params :])))


def check_contribution(contribution: Any, silo: LocalSilo, fed: Federation) -> None:
    """Raise TypeError if a rule returned something that cannot be summed or kept."""
    rule, length = type(fed.rule).__name__, fed.layout.size
    if not isinstance(contribution, Contribution):
        raise TypeError(f"the rule {rule} returned {type(contribution).__name__} in place of a Contribution")
    if not contribution.untaken:
        delta = contribution.vector_Q
        if delta.shape != (length,) or delta.dtype != fed.model.dtype:
            wanted = f"{fed.model.dtype} of [{length}]"
            raise TypeError(
                f"the rule {rule} gave a delta that is {delta.dtype} of {list(delta.shape)} in place of {wanted}"
            )
    for name, kept in silo.kept.items():
        if not isinstance(kept, torch.Tensor):
            raise TypeError(f"the rule {rule} keeps '{name}' as {type(kept).__name__}; silos keep tensors")
