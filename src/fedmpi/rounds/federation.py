"""State, which a round changes, and Federation, which stays the same from round to round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedmpi.aggregate import Aggregator
from fedmpi.comm import Comm
from fedmpi.evaluate import Scores, Tuning
from fedmpi.exchange.base import Exchange
from fedmpi.flat import FlatModel
from fedmpi.local import LocalRule, LocalSilo, Round, SiloRunner
from fedmpi.membership import Comms, Membership
from fedmpi.objectives import Criterion, LossAndMetrics
from fedmpi.outcome import RoundOutcome
from fedmpi.privacy import Spending
from fedmpi.records import PHASES, Measurement, Record, StatusTable, Timer
from fedmpi.records.timer import PARTS, column
from fedmpi.rounds.closing import COLUMNS
from fedmpi.rounds.disclosure import Disclose, ready_pooling
from fedmpi.secure.session import Masking
from fedmpi.selection import Selector
from fedmpi.server import Average, ServerOptimizer
from fedmpi.stopping import Watch
from fedmpi.transforms import Updates

if TYPE_CHECKING:
    from fedmpi.rounds.remote import Remote

READY_RANK = ("status", "fingerprint")
READY_SILO = (
    *("taken", "rejected", "loss", "targets", "samples", "steps", "norm", "weight", "sent", "normalizer", "start_loss"),
)
PARTS_OF_RANK = tuple(column(*one) for one in PARTS)
DONE_RANK = ("status", "started_s", *PHASES, *PARTS_OF_RANK, "rss", "up", "down", "control", "written", "asked")


@dataclass(frozen=True)
class State:
    """The state of training between two rounds."""

    round: int  # rounds done
    # The global shared parameters [P] on the rank's device (with overlap, the newest that arrived), followed by the
    # local rule's auxiliary vectors, each [P].
    params_Q: torch.Tensor
    optimizer: Any  # the server optimizer's state
    selector: dict[str, np.ndarray]
    outcome: RoundOutcome | None = None  # of the last round
    record: Record | None = None  # its log line
    average_P: torch.Tensor | None = None  # average of the parameters over rounds, equal on every rank; None: not kept
    updates: Mapping[str, np.ndarray] = field(default_factory=dict)  # the state of `Federation.updates`
    policy: Mapping[str, np.ndarray] = field(default_factory=dict)  # the state of the engine, its policy and clock
    written: int = -1  # newest round whose checkpoint files are safe on every rank


@dataclass
class Federation:
    """The fixed part of a run: silos, rules and this rank's share of them."""

    membership: Membership
    comms: Comms
    facts_KF: np.ndarray  # sizes and checksums of each silo's data, which identify them (opening.py)
    silos: dict[str, LocalSilo]  # the silos that this rank hosts
    watch: Watch
    model: FlatModel
    objective: LossAndMetrics
    rule: LocalRule
    runner: SiloRunner
    selector: Selector
    aggregator: Aggregator
    optimizer: ServerOptimizer
    exchange: Exchange
    seed: int
    rounds: int
    evaluate_every: int
    evaluate_batch: int
    average: Average | None = None  # how parameters are averaged for evaluation; None: evaluated as they are
    measurements: Sequence[Measurement] = ()  # extra figures for each round's record
    disclose: Disclose = "silo"  # which figures of single silos leave their rank
    updates: Updates = field(default_factory=Updates)  # transforms of updates before the exchange
    finetune: LocalRule | None = None  # fine-tunes a personal model per silo after the last round
    private: Spending | None = None  # the account of differential privacy, if there is any
    told: Sequence[str] = ()  # columns of the silos' table that the engine needs
    secure: Masking | None = None  # masks between silos; None: sums are not masked
    experiment: str = ""  # label in the records of an experiment
    timer: Timer = field(default_factory=Timer)
    remote: Remote | None = None  # silos that are jobs of their own, in place of those that this rank trains

    def __post_init__(self) -> None:
        self.ids = self.membership.ids  # all silos, in the federation's order
        self.num_train = [int(n) for n in self.facts_KF[:, 0]]  # training samples of each
        self.comm: Comm = self.comms.control  # connects all ranks
        self.index = {silo: i for i, silo in enumerate(self.ids)}
        self.layout = self.exchange.layout  # of `State.params_Q` and of contributions
        rows = zip(self.ids, self.num_train, strict=True)
        self.weights_K = np.array([self.aggregator.base(silo, num) for silo, num in rows])  # base weights
        of_silo = (*READY_SILO, *self.updates.told, *self.told)
        served = () if self.secure is None or not self.secure.apart else ("rejected", *COLUMNS)
        shown = ready_pooling(self.disclose, self.secure is not None, [name for name in served if name in of_silo])
        num = len(self.ids)
        self.ready = StatusTable(self.comm.size, READY_RANK, num, of_silo, pooling=shown, cover=self.secure)
        pools = self.disclose != "silo"
        self.scores = Scores.of(self.objective, self.rule, self.finetune, self.model.has_personal, pools)
        columns, counts = self.scores.columns, self.scores.num_counts
        self._criteria: dict[str, Criterion] = {}
        ranks = (*DONE_RANK, *self.exchange.figures(), *self.exchange.tracks())
        self.timer.spent = self.exchange.spent
        self.timer.reset()
        self.done = StatusTable(self.comm.size, ranks, num, columns, counts, self.scores.pooling, self.secure)

    @property
    def facts(self) -> dict[str, np.ndarray]:
        """By silo, the figures that identify its data, [F]."""
        return dict(zip(self.ids, self.facts_KF, strict=True))

    @property
    def rejected_by(self) -> dict[str, str]:
        """By silo, the transform that rejected its update of this round; empty if `disclose` hides it."""
        if self.disclose == "pooled":
            return {}
        numbers = zip(self.ids, self.ready.silo("rejected").tolist(), strict=True)
        return {silo: self.updates.names[int(number) - 1] for silo, number in numbers if number}

    @property
    def training_told(self) -> bool:
        """Whether figures of training leave their rank. If sums get noise before anybody sees them, losses and norms,
        which carry none, would tell what it hides."""
        return self.secure is None or self.secure.noise is None

    def criterion(self, silo: LocalSilo) -> Criterion:
        """The training loss of a silo, made from its training targets at the first call."""
        if silo.id not in self._criteria:
            self._criteria[silo.id] = self.objective.criterion(silo.data.y_train)
        return self._criteria[silo.id]

    def tuning(self, silo: LocalSilo, number: int, check: Callable[[], None] = lambda: None) -> Tuning | None:
        """How to fine-tune the model for a silo after the last round; None if that is not due."""
        if self.finetune is None or number < self.rounds:
            return None
        criterion = self.criterion(silo)
        round = Round(number, self.rounds, self.seed, criterion.loss, check, count=criterion.count)
        return self.finetune, round
