"""Trains silos whose updates are due, each from the parameters that it fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedmpi.errors import FedmpiError
from fedmpi.exchange.arrivals import Arrivals
from fedmpi.exchange.base import LARGEST_NORM
from fedmpi.flat import RESERVED, FlatModel
from fedmpi.local import LocalSilo, Order, Round
from fedmpi.rounds.agreement import as_error
from fedmpi.rounds.federation import Federation, State
from fedmpi.rounds.queue import Arrival
from fedmpi.rounds.staleness import Staleness
from fedmpi.rounds.training import check_contribution
from fedmpi.stopping import FAILED, BrokenOff
from fedmpi.types import Contribution

# Columns of a silo's row, which may hold several updates: its weight, its weight without staleness, and how many of its
# updates were rejected and accepted.
COLUMNS = ("done", "plain", "refused", "accepted")
_NUM_NORMS = "norms"  # in a row, but in no table: how many of the silo's updates have norms
RESIDUAL = f"{RESERVED}residual"  # in a silo's kept state: what the codec of `up` has lost of its updates


@dataclass
class Work:
    """What this rank has done in a round that is not committed yet."""

    trained: dict[str, LocalSilo] = field(default_factory=dict)  # its silos after training
    rows: dict[str, dict[str, float]] = field(default_factory=dict)  # their rows of the silos' table
    error: FedmpiError | None = None
    status: int = 0

    def failed(self, fed: Federation, raised: BaseException, silo: str, number: int) -> None:
        """Note an error of this rank, and tell the others."""
        self.status, self.error = FAILED, as_error(raised, f"rank {fed.comm.rank}, silo '{silo}', round {number}")
        fed.watch.tell(FAILED, "")


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
            draft = drafted(work.trained.get(name, fed.silos[name]))
            fed.watch.begin(f"silo '{name}', round {state.round + 1}")
            start_P = exchange.older(name, one.version) if one.staleness else state.params_Q
            about = (one.version, one.training, start_P, fed.watch.check)
            update = trained(fed, fed.model, draft, *about, one.order)
            rejected, norms = judged(state, fed, update, draft, one.training)
            row = work.rows.setdefault(name, {})
            enter_norms(row, norms)
            if rejected:
                exchange.reject()
                refuse(row, rejected)
                continue
            plain, less = update.weight, staleness.weight(one.staleness)
            move_averaged(fed, update.vector_Q, start_P, 1)
            move_averaged(fed, update.vector_Q, state.params_Q, -1)
            exchange.bring(packed(exchange, update, draft, one.training), plain, less)
            update.weight = sent_weight(exchange, plain, less)
            work.trained[name] = draft
            enter(row, update, draft.weight, plain)
    except BrokenOff as broken:
        work.status = broken.status
    except (Exception, SystemExit) as raised:
        work.failed(fed, raised, name, state.round + 1)
    fed.watch.rest()


def drafted(silo: LocalSilo) -> LocalSilo:
    """A copy to train, because the round may still be dropped."""
    return replace(silo, kept=dict(silo.kept))


def trained(
    fed: Federation,
    model: FlatModel,
    silo: LocalSilo,
    version: int,
    training: int,
    start_Q: torch.Tensor,
    check: Callable[[], None],
    order: Order | None = None,
) -> Contribution:
    """The silo's update from `start_Q`, the parameters and auxiliary vectors of this version, in the model's memory.
    `training` counts the silo's trainings from 0. `order`: what the silo is told of it."""

    def begin(one: LocalSilo) -> tuple[torch.Tensor, Round]:
        criterion = fed.criterion(one)
        about = Round(version + 1, fed.rounds, fed.seed, criterion.loss, check, count=criterion.count)
        auxiliary = {segment.name: start_Q[segment.place] for segment in fed.layout.auxiliaries}
        return fed.layout.params(start_Q), replace(about, training=training + 1, auxiliary=auxiliary, order=order)

    (contribution,) = fed.runner.run(fed.rule, model, [silo], begin)
    return contribution


def judged(
    state: State, fed: Federation, update: Contribution, silo: LocalSilo, training: int
) -> tuple[int, dict[str, float]]:
    """Weigh and transform an update in place. Returns the number, from 1, of the transform that rejects it (0: none),
    and norms by column."""
    check_contribution(update, silo, fed)
    update.weight = silo.weight
    update.weight = fed.aggregator.weight(update)
    steps = fed.updates.steps(state.updates, fed.seed, training + 1, fed.layout)
    rejected, norms = steps.on_silo(update, LARGEST_NORM)
    if not rejected:
        for segment in fed.layout.auxiliaries:  # the weighted sum then gives their sum divided by the number of silos
            update[segment.name].mul_(fed.exchange.facts.total_weight / (update.weight * len(fed.ids)))
        if not fed.exchange.holds(update.vector_Q, 1.0):
            rejected = fed.updates.by_checks
    return rejected, norms


def move_averaged(fed: Federation, vector_Q: torch.Tensor, params_Q: torch.Tensor, sign: int) -> None:
    """Add the parameters, or subtract them, where the vector is a delta of averaged statistics. Plus its start an
    update holds the silo's values; minus the newest parameters it is a delta whose step gives the mean of the values. A
    delta from an older start would count again what the steps since then have moved."""
    for part in fed.layout.averaged:
        vector_Q[part].add_(params_Q[part].to(vector_Q.device), alpha=sign)


def packed(exchange: Arrivals, update: Contribution, silo: LocalSilo, training: int) -> torch.Tensor:
    """The message of an accepted update. What the codec loses is kept with the silo."""
    message, lost_Q = exchange.packed(update, training, silo.kept.get(RESIDUAL))
    if lost_Q is not None:
        silo.kept = {**silo.kept, RESIDUAL: lost_Q}
    return message


def sent_weight(exchange: Arrivals, plain: float, less: float) -> float:
    """The weight of an update whose staleness weight is `less`; an aggregator that reads each update has none."""
    return plain if exchange.reads_each else plain * less


def refuse(row: dict[str, float], rejected: int) -> None:
    """Note a rejected update in its silo's row."""
    row["refused"] = row.get("refused", 0) + 1
    row["rejected"] = 0 if row.get("taken") else rejected


def enter_norms(row: dict[str, float], norms: dict[str, float]) -> None:
    """Add an update's norms to its silo's row: means over the silo's updates of the round, also the rejected ones."""
    num = row.get(_NUM_NORMS, 0)
    row |= {name: (row.get(name, 0.0) * num + norm) / (num + 1) for name, norm in norms.items()}
    row[_NUM_NORMS] = num + 1


def share_rows(fed: Federation, work: Work, fingerprint: float) -> None:
    """Give every rank the rows of all silos. Collective."""
    fed.ready.clear()
    for silo, row in work.rows.items():
        fed.ready.set_silo(fed.index[silo], **{name: value for name, value in row.items() if name != _NUM_NORMS})
    fed.ready.set_rank(fed.comm.rank, status=work.status, fingerprint=fingerprint)
    fed.ready.share(lambda values: fed.comm.share(values, fed.watch.look))


def enter(row: dict[str, float], update: Contribution, weight: float, plain: float) -> None:
    """Add an accepted update to its silo's row: sums, and means over the silo's updates of the round."""
    num, targets = row.get("accepted", 0), row.get("targets", 0)
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
        "accepted": 1,
    }
    row |= {name: row.get(name, 0) + value for name, value in added.items()}
    row |= {"taken": 1, "rejected": 0, "loss": loss, "norm": norm, "normalizer": update.num_gradients}
