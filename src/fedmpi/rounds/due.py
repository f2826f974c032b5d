"""Trains silos whose updates are due, each from the parameters that it fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from fedmpi.errors import FedmpiError
from fedmpi.exchange.arrivals import Arrivals
from fedmpi.exchange.base import LARGEST_NORM
from fedmpi.local import LocalSilo, Round
from fedmpi.rounds.agreement import as_error
from fedmpi.rounds.federation import Federation, State
from fedmpi.rounds.queue import Arrival
from fedmpi.rounds.staleness import Staleness
from fedmpi.rounds.training import check_contribution
from fedmpi.stopping import FAILED, BrokenOff
from fedmpi.types import Contribution

# Columns of a silo's row, which may hold several updates: its weight, its weight without staleness, and how many of its
# updates were rejected.
COLUMNS = ("done", "plain", "refused")


@dataclass
class Work:
    """What this rank has done in a round that is not committed yet."""

    trained: dict[str, LocalSilo] = field(default_factory=dict)  # its silos after training
    rows: dict[str, dict[str, float]] = field(default_factory=dict)  # their rows of the silos' table
    error: FedmpiError | None = None
    status: int = 0


def train_due(
    state: State, fed: Federation, exchange: Arrivals, due: Sequence[Arrival], staleness: Staleness, work: Work
) -> None:
    """Train this rank's silos among `due`, in order; their updates go to the exchange, and their figures to `work`."""
    name = ""
    fed.model.lends = False
    try:
        fed.watch.check()
        for one in due:
            if one.dropped or one.silo not in fed.silos:
                continue
            name = one.silo
            before = work.trained.get(name, fed.silos[name])
            draft = replace(before, kept=dict(before.kept))  # the round may still be dropped

            def begin(silo: LocalSilo, one: Arrival = one) -> tuple[torch.Tensor, Round]:
                fed.watch.begin(f"silo '{one.silo}', round {state.round + 1}")
                start_P = exchange.older(one.silo) if one.staleness else state.params_Q
                criterion = fed.criterion(silo)
                number, check = one.version + 1, fed.watch.check
                return start_P, Round(number, fed.rounds, fed.seed, criterion.loss, check, count=criterion.count)

            (contribution,) = fed.runner.run(fed.rule, fed.model, [draft], begin)
            check_contribution(contribution, draft, fed)
            contribution.weight = draft.weight
            plain = contribution.weight = fed.aggregator.weight(contribution)
            contribution.weight *= staleness.weight(one.staleness)
            steps = fed.updates.steps(state.updates, fed.seed, one.training + 1, fed.layout)
            rejected, norms = steps.on_silo(contribution, LARGEST_NORM)
            row = work.rows.setdefault(name, {})
            row |= norms
            if rejected:
                exchange.reject()
                row["refused"] = row.get("refused", 0) + 1
                row["rejected"] = 0 if row.get("taken") else rejected
            else:
                exchange.add(contribution)
                work.trained[name] = draft
                _enter(row, contribution, draft.weight, plain)
    except BrokenOff as broken:
        work.status = broken.status
    except (Exception, SystemExit) as raised:
        work.status = FAILED
        work.error = as_error(raised, f"rank {fed.comm.rank}, silo '{name}', round {state.round + 1}")
        fed.watch.tell(FAILED, "")
    fed.watch.rest()


def _enter(row: dict[str, float], update: Contribution, weight: float, plain: float) -> None:
    """Add an accepted update to its silo's row: sums, and means over the silo's updates of the round."""
    num, targets = row.get("taken_updates", 0), row.get("targets", 0)
    both = targets + update.counted
    loss = (row.get("loss", 0.0) * targets + update.loss * update.counted) / both if both else update.loss
    norm = (row.get("norm", 0.0) * num + update.norm) / (num + 1)
    added = {
        "samples": update.num_samples,
        "targets": update.counted,
        "steps": update.num_steps,
        "weight": weight,
        "done": weight,
        "plain": plain,
        "sent": update.weight,
        "taken_updates": 1,
    }
    row |= {name: row.get(name, 0) + value for name, value in added.items()}
    row |= {"taken": 1, "rejected": 0, "loss": loss, "norm": norm, "normalizer": update.num_gradients}
