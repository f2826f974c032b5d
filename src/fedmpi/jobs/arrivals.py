"""Asynchronous rounds of silos in jobs of their own: updates come from the shared folder as they are published.

The server takes updates in the order in which it reads them, as rank 0 does (rounds/realtime.py). It decides at once
whether an update counts or is too old, and tells its silo so in a heart beat; of an update that closes the round the
commit tells. A round that was committed before this start is computed again from the arrivals in its commit.

A silo goes on from the state after its last update that counts, and says with the next one which that was. If an update
that an earlier start has told its silo about cannot be read any more, it is dropped, and so are the silo's later ones
that were made from it; the silo then goes on from its state before them.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fedmpi.exchange.outbox import from_bytes
from fedmpi.files.envelope import Envelope
from fedmpi.files.line import NEVER, Commit
from fedmpi.files.server import Arrived
from fedmpi.jobs.messages import read_order, read_row, told_order
from fedmpi.jobs.post import Told
from fedmpi.jobs.private import Base
from fedmpi.output import say
from fedmpi.rounds.clocks import now
from fedmpi.rounds.delays import Delays
from fedmpi.rounds.due import Work, enter, enter_norms, refuse, sent_weight
from fedmpi.rounds.queue import Arrival, trainings
from fedmpi.rounds.realtime import Mail, RealTime
from fedmpi.stopping import BrokenOff
from fedmpi.types import Contribution

if TYPE_CHECKING:
    from fedmpi.jobs.remote import FilesRemote
    from fedmpi.rounds import State

Figures = dict[str, str]  # of an update, in its head
LOST = Envelope({"row": {}, "rejected": 0}, memoryview(b""), "")  # in place of an update that cannot be read any more


@dataclass(kw_only=True)
class FilesTime(RealTime):
    """The asynchronous rounds as the server's job takes part in them."""

    remote: FilesRemote
    before: FilesTime | None = None  # of the members before, in this start

    def __post_init__(self) -> None:
        self._trainer = None
        self._waiting = set()
        self._sent = {}
        self._out = []
        self._num_posted = self._num_read = 0
        self._training = trainings(self.state.policy, self.fed.ids)
        self._began_s, self._before_s = time.monotonic(), now(self.state.policy)
        self._came: deque[Arrived] = deque()  # by mail: the files
        self._pool: dict[tuple[str, int], tuple[Mail, Arrived]] = {}  # read, and not yet in `mail`
        self._first: deque[Told] = deque()  # updates that come before all others
        self._handed = {}
        self._unknown: set[str] | None = None  # silos whose work an earlier server handed out; None: before the rounds
        self._verdicts: dict[tuple[str, int], bool] = {}  # by silo and number: whether an update counts, as it was told
        self._figures: list[Figures] = []  # of the round's arrivals
        self._bases: dict[str, Base] = {}  # by silo: its last training that counts, if that is in this round
        if (before := self.before) is not None:
            self._inherit(before)
            self.before = None

    def _inherit(self, before: FilesTime) -> None:
        """Take over the updates that were read and not taken yet; silos have other numbers now."""
        ids = self.fed.index
        self._first, self._came = before._first, before._came
        self._handed, self._unknown, self._verdicts = before._handed, before._unknown, before._verdicts
        self.mail.extend(replace(mail, silo=ids[one.silo]) for mail, one in zip(before.mail, self._came, strict=True))
        self._pool = {key: (replace(mail, silo=ids[one.silo]), one) for key, (mail, one) in before._pool.items()}

    def round(self, state: State, work: Work) -> tuple[list[Arrival], float]:
        fed, remote = self.fed, self.remote
        self.state, self._arrivals, self.until_s = state, list[Arrival](), float("inf")
        self._figures, self._bases = [], {}
        remote.answers, remote.told = [], self._orders_of(Delays.of(state.policy, fed.rule, fed.ids))
        end_s, fresh = self.seconds, remote.post.files.head is None
        try:
            remote.begin(state, fed)
            if (commit := remote.committed(state.round + 1)) is not None:
                end_s = self._recall(commit)
            else:
                self._first += remote.post.open(state.round)
                remote.call_all(state, fed)
                self._hand_out(fresh)
                while not self._closed():
                    fed.watch.check()
                    self.read()
                    if self.mail:
                        remote.post.news()
                    else:
                        remote.post.waits(f"for {self._awaited}")
                        remote.post.pause(max(0.0, self.until_s - time.monotonic()))
                remote.post.goes_on()
                end_s = self.seconds
        except BrokenOff as broken:
            if remote.post.error is not None:
                raise remote.post.error from None
            work.status = broken.status
        arrivals = list(self._arrivals)
        self._enter(arrivals, work)
        delays = Delays.of(state.policy, fed.rule, fed.ids).hear(arrivals)
        told = {"arrivals": [asdict(one) for one in arrivals], "figures": self._figures, "end_s": end_s}
        remote.told = told | self._orders_of(delays)
        return arrivals, end_s

    def _orders_of(self, delays: Delays) -> dict[str, Any]:
        """What a commit says of how much silos do that train from its version."""
        orders = {silo: told_order(order) for silo, order in delays.orders().items()}
        return {"orders": orders} if orders else {}

    def _hand_out(self, fresh: bool) -> None:
        """Silos that wait for the version from which a round starts may train. `fresh`: no server was before."""
        if self._unknown is None:
            self._unknown = set() if fresh else set(self.fed.ids)
        for silo in self.fed.ids:
            if silo not in self._unknown:
                self._handed.setdefault(silo, (self.seconds, self.state.round))

    def _drops(self, mail: Mail, delay_s: float | None) -> bool:
        silo = self.fed.ids[mail.silo]
        told = self._verdicts.pop((silo, mail.training), None)
        made_from = self._taking.content.head.get("base")  # earlier versions did not say it
        if self._taking.content is LOST or (made_from is not None and tuple(made_from) != self._base(silo)):
            return True
        return super()._drops(mail, delay_s) if told is None else not told

    def _base(self, silo: str) -> Base:
        """The silo's last training that counts; (-1, 0) if there is none."""
        head = self.remote.post.files.head
        last = NEVER if head is None else head.last.get(silo, NEVER)
        return self._bases.get(silo, (last.counted, last.counted_by))

    @property
    def _awaited(self) -> str:
        """What comes next."""
        if not self._first:
            return "updates"
        silo, number, *_ = self._first[0]
        return f"update {number} of silo '{silo}', which an earlier start has read"

    def read(self) -> None:
        for one in self.remote.post.files.poll([told[:3] for told in self._first]):
            head = one.content.head
            vector = None if int(head["rejected"]) else self._vector(one.content)
            row = read_row(head["row"])
            made = (self.fed.index[one.silo], head["version"], one.number, row.get("weight", 0.0), vector)
            mail = Mail(*made, row.get("work_s", 0.0), read_order(head.get("order")))
            self._pool[one.silo, one.number] = mail, one
        lacks = self._first and self._first[0][:2] not in self._pool
        if lacks and self.remote.post.files.gives_up(*self._first[0][:3]):
            self._lose(self._first[0])
        while self._pool:
            following = self._first[0][:2] if self._first else next(iter(self._pool))
            if following not in self._pool:
                break
            mail, one = self._pool.pop(following)
            if self._first and (counts := self._first.popleft().counts) is not None:
                self._verdicts[one.silo, one.number] = counts
            self.mail.append(mail)
            self._came.append(one)

    def _lose(self, told: Told) -> None:
        """Drop an update that is in the buffer, as its silo was told, and cannot be read any more."""
        silo, number, by, _ = told
        say(f"fedmpi: update {number} of silo '{silo}' was damaged before its commit: it is dropped, and the silo goes "
            "on from before it", error=True)  # fmt: skip
        order = Delays.of(self.state.policy, self.fed.rule, self.fed.ids).orders().get(silo)
        mail = Mail(self.fed.index[silo], self.state.round, number, 0.0, torch.empty(0), order=order)
        self._pool[silo, number] = mail, Arrived(silo, number, by, LOST)

    def _take(self, mail: Mail) -> None:
        one = self._taking = self._came.popleft()
        promised = (one.silo, one.number) in self._verdicts
        if self._unknown is not None and not promised:
            self._unknown.discard(one.silo)
        super()._take(mail)
        if promised:  # the earlier server has handed out the silo's next work
            self._handed.pop(one.silo, None)
        arrival = self._arrivals[-1]
        self._figures.append({**one.content.head["row"], "rejected": str(one.content.head["rejected"])})
        self.remote.answers.append(one.entry(counts=arrival.counts))
        self.fed.comm.bytes_up += len(one.content.payload)
        if arrival.counts:
            self._bases[one.silo] = one.number, one.by
        if self.until_s == float("inf"):  # else the commit answers
            told = Told(one.silo, one.number, one.by, arrival.counts)
            self.remote.post.decide(told, self._base(one.silo))

    def _vector(self, content: Envelope) -> torch.Tensor:
        """The update of a file."""
        plain = self.exchange.section.up.plain
        dtype = self.fed.model.dtype if plain else torch.uint8
        message = from_bytes(content.payload, len(content.payload) // dtype.itemsize, dtype)
        return self.exchange.unpacked(message)

    def _recall(self, commit: Commit) -> float:
        """Take the updates of a commit again. Returns the time of its end."""
        remote = self.remote
        remote.answers = list(commit.entries)
        self._figures = list(commit.about["figures"])
        self._arrivals = [Arrival(**row) for row in commit.about["arrivals"]]
        for arrival, entry in zip(self._arrivals, commit.entries, strict=True):
            if not entry.counts:
                continue
            content = remote.post.update(commit, entry)
            weight = read_row(content.head["row"]).get("weight", 0.0)
            where = (self.fed.index[entry.silo], arrival.version, arrival.training, weight, self._vector(content))
            self.fold(Mail(*where), arrival.staleness)
        return float(commit.about["end_s"])

    def _enter(self, arrivals: list[Arrival], work: Work) -> None:
        """Enter the figures of the round's updates into `work`."""
        for one, figures in zip(arrivals, self._figures, strict=True):
            if one.dropped:
                continue
            row = work.rows.setdefault(one.silo, {})
            told = read_row({name: value for name, value in figures.items() if name != "rejected"})
            enter_norms(row, {name: value for name, value in told.items() if name.startswith("norm_")})
            if int(figures["rejected"]):
                refuse(row, int(figures["rejected"]))
                continue
            less = self.engine.staleness.weight(one.staleness)
            enter(row, _update(one, told, self.exchange, less), told.get("silo", 0.0), told.get("weight", 0.0))


def _update(one: Arrival, told: dict[str, float], exchange: Any, less: float) -> Contribution:
    """An update's figures, without its vector."""
    weight = sent_weight(exchange, told.get("weight", 0.0), less)
    return Contribution(
        *(one.silo, one.version + 1, weight, torch.empty(0), told.get("loss", 0.0), int(told.get("samples", 0))),
        int(told.get("steps", 0)),
        told.get("normalizer"),
        num_targets=told.get("targets", 0),
        norm=told.get("norm", 0.0),
    )
