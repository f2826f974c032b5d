"""Asynchronous rounds on the machine's clock: who sends what to whom.

    a silo's rank   trains its silos in turn, in a thread that gives way between batches (trainer.py). It posts to rank
                    0 that an update has come, and sends the vector. Rank 0 answers: go on, or the round is closed
    rank 0          takes updates in the order in which they reach it, and adds each to the buffer, in one pass. Once
                    enough have arrived, it closes the round: it posts that to all ranks

At a closed round all ranks meet between two batches, whatever their silos are doing: rank 0 tells the list of
arrivals, and the round is committed like any other. A silo whose training goes on through it keeps its start. An update
that is still under way when a round closes belongs to the next one.

What is under way is in no checkpoint: after a resume silos start anew from the newest parameters.
"""

from __future__ import annotations

import json
import struct
import time
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedmpi.comm import Pending
from fedmpi.exchange.arrivals import Arrivals
from fedmpi.local import LocalSilo, Order
from fedmpi.rounds.clocks import now
from fedmpi.rounds.delays import Delays, too_late
from fedmpi.rounds.due import (
    Work,
    drafted,
    enter,
    enter_norms,
    judged,
    move_averaged,
    packed,
    refuse,
    sent_weight,
    trained,
)
from fedmpi.rounds.federation import Federation, State
from fedmpi.rounds.queue import Arrival, trainings
from fedmpi.rounds.trainer import Trainer
from fedmpi.stopping import READY, BrokenOff
from fedmpi.types import Contribution

if TYPE_CHECKING:
    from fedmpi.rounds.asynchronous import Buffered

POLL_S = 0.05  # between two looks for a stop while a window is open
GO, DROPPED, CLOSED = range(3)  # rank 0's answers
_LOW = (1 << 32) - 1


@dataclass
class _Update:
    """An update of this rank until a round's list says what became of it."""

    silo: str
    version: int
    training: int
    before: LocalSilo  # the silo as it was
    after: LocalSilo
    update: Contribution  # without its vector, once that is sent
    rejected: int
    norms: dict[str, float]


@dataclass
class Mail:
    """An update as rank 0 gets it; no vector if its silo rejected it."""

    silo: int
    version: int
    training: int
    weight: float
    vector: torch.Tensor | None
    work_s: float = 0.0  # seconds of the training
    order: Order | None = None  # what the silo was told of it


class _Wait:
    """Over once there is mail, a notice, or no more time."""

    def __init__(self, real: RealTime) -> None:
        self._real = real

    def Test(self) -> bool:
        real = self._real
        real.read()
        return bool(real.mail or real.answers) or real.fed.watch.look() != READY or time.monotonic() >= real.until_s


@dataclass
class RealTime:
    """The asynchronous rounds of one federation, as one rank takes part in them."""

    engine: Buffered
    fed: Federation
    exchange: Arrivals
    state: State
    mail: deque[Mail] = field(default_factory=deque)  # rank 0: arrived, and not yet taken
    answers: deque[tuple[int, int, int]] = field(default_factory=deque)  # from rank 0: round, answer, silo
    until_s: float = float("inf")  # rank 0: when the round closes

    def __post_init__(self) -> None:
        fed = self.fed
        self._trainer: Trainer[Contribution] | None = Trainer(fed.model.device) if fed.silos else None
        self._model = fed.model.twin()
        self._silos = dict(fed.silos)  # as the next training of each finds it
        self._idle = deque(fed.silos)  # silos in turn
        self._waiting: set[str] = set()  # silos whose update is not answered yet
        self._running: tuple[str, int, LocalSilo] | None = None  # silo in training, its version, and it before
        self._sent: dict[str, deque[_Update]] = {silo: deque() for silo in fed.silos}
        self._out: list[tuple[Pending, torch.Tensor]] = []  # vectors under way
        self._num_posted = self._num_read = 0
        self._training = trainings(self.state.policy, fed.ids)  # by silo: number of its last training
        self._began_s, self._before_s = time.monotonic(), now(self.state.policy)
        self._start_P, self._start_version = torch.empty(0), -1
        self._work_s = 0.0  # of the training that runs
        self._orders: dict[
            int, dict[str, Order]
        ] = {}  # by version: what silos are told of trainings that begin from it
        # Rank 0: when each silo's work was handed out, and from which version on; none for one that waits for the step.
        self._handed: dict[str, tuple[float, int]] = {}

    @property
    def seconds(self) -> float:
        """Seconds that the run has trained so far."""
        return self._before_s + time.monotonic() - self._began_s

    # ------------------------------------------------------------ a round

    def round(self, state: State, work: Work) -> tuple[list[Arrival], float]:
        """The arrivals of one round, and its end in seconds; this rank's figures go to `work`. Collective."""
        fed, comm = self.fed, self.fed.comm
        self._open(state)
        name = "" if self._running is None else self._running[0]
        if name:
            fed.watch.begin(f"silo '{name}', round {state.round + 1}")
        try:
            while not self._closed():
                fed.watch.check()
                self.read()
                if self._begin_next() or (self._trainer is not None and self._trainer.busy):
                    assert self._trainer is not None and self._running is not None
                    name, began_s = self._running[0], time.monotonic()
                    update = self._trainer.turn()
                    self._work_s += time.monotonic() - began_s
                    fed.timer.lap("train")
                    if update is not None:
                        self._bring(update)
                elif comm.size == 1:
                    time.sleep(max(0.0, min(POLL_S, self.until_s - time.monotonic())))
                    fed.timer.lap("wait")
                else:
                    comm.wait(_Wait(self))
                    fed.timer.lap("wait")
        except BrokenOff as broken:
            work.status = broken.status
        except (Exception, SystemExit) as raised:
            work.failed(fed, raised, name, state.round + 1)
        fed.watch.rest()
        told = json.dumps({"at_s": self.seconds, "arrivals": [asdict(one) for one in self._arrivals]})
        told = json.loads(comm.broadcast_text(told, 0))
        arrivals = [Arrival(**one) for one in told["arrivals"]]
        self._confirm(arrivals, work)
        return arrivals, told["at_s"]

    def _open(self, state: State) -> None:
        """Begin a round: silos whose updates closed the one before may train."""
        self.state, self._arrivals, self.until_s = state, list[Arrival](), float("inf")
        for silo in self.fed.ids:
            self._handed.setdefault(silo, (self.seconds, state.round))
        oldest = state.round if self.fed.comm.rank else min(version for _, version in self._handed.values())
        self._orders = {version: orders for version, orders in self._orders.items() if version >= oldest}
        self._orders[state.round] = Delays.of(state.policy, self.fed.rule, self.fed.ids).orders()

    def _closed(self) -> bool:
        """Whether the round is over. Rank 0 takes what has arrived, and decides."""
        number = self.state.round + 1
        if self.fed.comm.rank:
            while self.answers:
                of_round, answer, silo = self.answers.popleft()
                if answer == CLOSED:
                    if of_round == number:
                        return True
                else:
                    self._answered(self.fed.ids[silo], dropped=answer == DROPPED)
            return False
        while self.mail and not self._enough():
            self._take(self.mail.popleft())
        if self._enough() and time.monotonic() >= self.until_s:
            for rank in range(1, self.fed.comm.size):
                self.fed.comm.post(rank, (number, CLOSED, 0))
            return True
        return False

    def _enough(self) -> bool:
        """Whether the round closes, now or after its window; then mail waits for the next round."""
        taken = [one for one in self._arrivals if one.counts]
        tried = {one.silo for one in self._arrivals if one.rejected}
        enough = len(taken) >= self.engine.size or (not taken and tried == set(self.fed.ids))
        if enough and self.until_s == float("inf"):
            self.until_s = time.monotonic() + (self.engine.window_s if taken else 0.0)
        return enough and time.monotonic() >= self.until_s

    def _take(self, mail: Mail) -> None:
        """Add an update to the buffer, on rank 0, and answer its silo."""
        silo, version = self.fed.ids[mail.silo], self.state.round
        rejected, at_s, staleness = mail.vector is None, self.seconds, version - mail.version
        handed_s = self._handed.pop(silo)[0] if silo in self._handed else None
        if handed_s is not None and mail.order is not None:
            # Others begin a round as soon as they have the parameters, which may be before rank 0 does.
            handed_s = min(handed_s, at_s - mail.work_s)
        drop = not rejected and self._drops(mail, None if handed_s is None else at_s - handed_s)
        told: dict[str, Any] = {}
        if mail.order is not None:
            told = {"amount": mail.order.amount, "scale": mail.order.scale}
            told |= {"handed_s": handed_s, "work_s": mail.work_s}
        one = Arrival(silo, at_s, mail.version, staleness, mail.training, dropped=drop, rejected=rejected, **told)
        if one.counts:
            self.fold(mail, staleness)
        self._arrivals.append(one)
        self._enough()
        if self.until_s == float("inf"):  # else the silo waits for the new parameters
            self._handed[silo] = self.seconds, version
            if silo in self.fed.silos:
                self._answered(silo, drop)
            else:
                self.fed.comm.post(self.fed.membership.rank(silo), (version + 1, DROPPED if drop else GO, mail.silo))

    def _drops(self, mail: Mail, delay_s: float | None) -> bool:
        """Whether an update is too old to count, or came too late; its delay is None if that is not known."""
        oldest = self.engine.max_staleness
        stale = oldest is not None and self.state.round - mail.version > oldest
        return stale or (mail.order is not None and delay_s is not None and too_late(delay_s, mail.order.latest_s))

    def fold(self, mail: Mail, staleness: int) -> None:
        """Add an update to the buffer."""
        assert mail.vector is not None
        less, silo = self.engine.staleness.weight(staleness), self.fed.ids[mail.silo]
        move_averaged(self.fed, mail.vector, self.state.params_Q, -1)
        factor = self.exchange.factor(mail.weight, less)
        self.exchange.fold_in(silo, mail.vector.to(self.exchange.device), factor, less)

    def read(self) -> None:
        """Read what other ranks have posted; on rank 0, also the vectors that follow."""
        comm = self.fed.comm
        for sender, (a, b, c) in comm.posted():
            if comm.rank:
                self.answers.append((a, b, c))
                continue
            silo, rejected = (a & _LOW) >> 1, bool(a & 1)
            work_s = struct.unpack("<f", struct.pack("<I", a >> 32))[0]
            vector = None if rejected else self.exchange.received(sender)
            weight = struct.unpack("<d", struct.pack("<q", c))[0]
            self._deliver(Mail(silo, b >> 32, b & _LOW, weight, vector, work_s))
            self._num_read += 1

    def _deliver(self, mail: Mail) -> None:
        """Put an update among those to take, with what its silo was told."""
        if self.fed.rule.by_delay is not None:
            mail.order = self._orders[mail.version][self.fed.ids[mail.silo]]
        self.mail.append(mail)

    # ------------------------------------------------------------ this rank's silos

    def _begin_next(self) -> bool:
        """Begin the training of the next silo in turn, if none runs and its last update was answered."""
        if self._trainer is None or self._trainer.busy or not self._idle or self._idle[0] in self._waiting:
            return False
        silo, version = self._idle[0], self.state.round
        self._idle.rotate(-1)
        if self._start_version != version:  # a copy, because a commit overwrites the parameters
            self._start_P, self._start_version = self.state.params_Q.clone(), version
        before, start_P, trainer = self._silos[silo], self._start_P, self._trainer
        draft = drafted(before)
        self._training[silo] += 1
        training = self._training[silo]
        self._running, self._draft, self._work_s = (silo, version, before), draft, 0.0
        self.fed.watch.begin(f"silo '{silo}', round {version + 1}")
        about = (version, training, start_P, trainer.pause, self._orders[version].get(silo))
        trainer.start(lambda: trained(self.fed, self._model, draft, *about))
        return True

    def _bring(self, update: Contribution) -> None:
        """Send an update that is complete to rank 0."""
        assert self._running is not None
        (silo, version, before), self._running = self._running, None
        fed, training = self.fed, self._training[silo]
        fed.watch.rest()  # no batch comes while it waits for an answer
        rejected, norms = judged(self.state, fed, update, self._draft, training)
        number, message = fed.index[silo], None
        if not rejected:
            move_averaged(fed, update.vector_Q, self._start_P, 1)  # rank 0 knows which parameters it meets
            message = packed(self.exchange, update, self._draft, training)
        update.vector_Q = torch.empty(0)
        self._sent[silo].append(_Update(silo, version, training, before, self._draft, update, rejected, norms))
        self._waiting.add(silo)
        if fed.comm.rank == 0:
            vector = None if message is None else self.exchange.unpacked(message)
            self._deliver(Mail(number, version, training, update.weight, vector, self._work_s))
            return
        bits = struct.unpack("<q", struct.pack("<d", update.weight))[0]
        work = struct.unpack("<I", struct.pack("<f", self._work_s))[0]
        fed.comm.post(0, (work << 32 | number << 1 | bool(rejected), version << 32 | training, bits))
        self._num_posted += 1
        self._out = [pair for pair in self._out if not pair[0].Test()]
        if message is not None:
            self._out += self.exchange.send(message)

    def _answered(self, silo: str, dropped: bool) -> None:
        """The silo may train again: from what its last training left, or as it was before if that does not count."""
        if silo in self._waiting:
            self._waiting.discard(silo)
            last = self._sent[silo][-1]
            self._silos[silo] = last.before if dropped or last.rejected else last.after

    def _confirm(self, arrivals: list[Arrival], work: Work) -> None:
        """Enter this rank's updates among the round's arrivals into `work`."""
        for one in arrivals:
            if one.silo not in self._sent:
                continue
            if len(self._sent[one.silo]) == 1:  # else the answer to a newer one is still to come
                self._answered(one.silo, one.dropped)
            sent = self._sent[one.silo].popleft()
            if one.dropped:
                continue
            row = work.rows.setdefault(one.silo, {})
            enter_norms(row, sent.norms)
            if sent.rejected:
                refuse(row, sent.rejected)
                continue
            plain = sent.update.weight
            less = self.engine.staleness.weight(one.staleness)
            update = replace(sent.update, weight=sent_weight(self.exchange, plain, less))
            enter(row, update, sent.after.weight, plain)
            work.trained[one.silo] = sent.after

    # ------------------------------------------------------------ the end

    def settle(self) -> None:
        """Let every update that is under way reach rank 0, where it waits for the next round. Collective."""
        comm = self.fed.comm
        total = int(comm.share(np.array([float(self._num_posted)]))[0])
        while comm.rank == 0 and self._num_read < total:
            self.read()
            comm.beat()
        for request, _ in self._out:
            comm.wait(request)
        self._out.clear()

    def end(self) -> None:
        """Give up what is in training."""
        if self._trainer is not None:
            self._trainer.end()
