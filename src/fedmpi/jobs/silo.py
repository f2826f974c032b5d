"""The job of one silo: `fedmpi silo CONFIG --id ID`.

It registers, waits for the server's word, trains from the newest committed parameters, and publishes its update. Its
data and its state stay on its side. It may end and start again at any point: what its last training left counts if and
only if a commit counts its update.
"""

from __future__ import annotations

import math
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmpi import device, rng, stopping
from fedmpi.assembly import Spec, build_federation, digest_of, open_alone, specify
from fedmpi.comm import SoloComm
from fedmpi.components import did_you_mean
from fedmpi.config import Config
from fedmpi.directory import save_model
from fedmpi.errors import ConfigError, SiloError, Stopped
from fedmpi.evaluate import load_own
from fedmpi.exchange.arrivals import Arrivals
from fedmpi.exchange.outbox import Outbox, Packed, as_bytes, from_bytes
from fedmpi.files import names
from fedmpi.files.line import NEVER, Commit
from fedmpi.files.names import quoted
from fedmpi.jobs.masking import SCORE, UPDATE, Parts, in_scores, serial_of
from fedmpi.jobs.messages import (
    Call,
    Registration,
    read_arrays,
    read_order,
    require_same,
    shown,
    told_order,
    told_row,
    unlike,
)
from fedmpi.jobs.post import UNREAD, SiloPost, files_of
from fedmpi.jobs.private import NOTHING, OTHER_DATA, Base, States
from fedmpi.local import LocalSilo, Order
from fedmpi.membership import Comms, Membership
from fedmpi.module import saved
from fedmpi.opening import CHECKSUMS, Opened, checksum
from fedmpi.output import say
from fedmpi.rounds import Federation, State
from fedmpi.rounds.due import drafted, judged, move_averaged, packed, trained
from fedmpi.rounds.evaluation import evaluate
from fedmpi.rounds.training import train_silos
from fedmpi.secure import numbers as figures
from fedmpi.stopping import READY, STOP, BrokenOff

MODEL = "model.safetensors"  # in the silo's folder, at the end


class SiloJob:
    """The job of one silo. `run` returns once the run is over.

    Raises ConfigError (also if the server's configuration is another one, or it refuses the silo), Stopped on a signal,
    Superseded if a newer job of the same silo has started, SiloError if training failed, ServerEnded if the server's
    job has ended with an error.
    """

    def __init__(self, config: Config, silo: str) -> None:
        files_of(config)
        self.config, self.silo = config, silo
        self.out = Path(config.out) / "silos" / quoted(silo)
        self.comm = SoloComm()
        self._fed: Federation | None = None
        self._epoch = -1  # of the membership
        self._orders: dict[str, list[Any]] = {}  # what its silos were told of how much to do when it was called
        self._base = NOTHING  # training whose state the silo has
        self._draft: tuple[Base, dict[str, LocalSilo]] | None = None  # state after a training that is not answered
        self._sent: dict[int, int] = {}  # rounds, or versions, of updates that are not answered, by number
        self._last_sent = -1  # round of the last update that this job has sent
        self._answered = -1  # number of the last update that is decided, by a commit or before it
        self._forgot = -1  # number of the last update whose states were looked through after a commit
        self._scored = -1  # newest version that this job has scored
        self._version = -1  # of the newest parameters that were fetched:
        self._params_Q, self._scored_P = torch.empty(0), torch.empty(0)  # to train from, and to score
        self._parts: Parts | None = None  # in sums under masks, with `secure`

    # ------------------------------------------------------------ the job

    def run(self) -> None:
        """Take part until the run is over."""
        stopping.listen()
        stopped = False
        try:
            stopping.mind_interrupts()
            device.set_threads(self.comm, self.config.exchange.reduction == "reproducible")
            with rng.borrowed():
                self._open()
                with SiloPost(self.config, self.silo, self._registration(), self._spec.watch) as self._post:
                    say(f"fedmpi: silo '{self.silo}', start {self._post.by}, {self._opened.num_train[0]} samples, "
                        f"out {self.out}")  # fmt: skip
                    self._sent = self._post.sent()
                    while not self._turn():
                        self._post.pause()
        except Stopped:
            stopped = True
            raise
        finally:
            stopping.forget(stopped)

    def _open(self) -> None:
        """Open the silo's data, and try them with the model."""
        self._spec: Spec = specify(self.config, self.comm, self.out)
        if self.silo not in self._spec.known:
            raise ConfigError(f"--id: no silo '{self.silo}'{did_you_mean(self.silo, self._spec.known)}")
        self._begins = digest_of(saved(self._spec.module)).hex()
        self._opened = open_alone(self._spec, self.silo, Comms.of(self.comm))
        self._states = States(self.out / "states", checksum(self._opened.facts_KF[0]))

    def _registration(self) -> Registration:
        source = self._spec.source
        return Registration(
            facts=self._told_facts().tolist(),
            known=self._spec.known,
            task=source.task,
            shape=list(source.shape),
            num_classes=source.num_classes,
            config=shown(self.config),
            begins=self._begins,
            host=socket.gethostname(),
        )

    def _told_facts(self) -> np.ndarray:
        """The facts of its data that others learn, [F]."""
        facts_F: np.ndarray = self._opened.facts_KF[0].copy()
        if self.config.hides_checksums:
            facts_F[CHECKSUMS] = 0.0
        return facts_F

    # ------------------------------------------------------------ one look

    def _turn(self) -> bool:
        """Do what there is to do; True once the run is over."""
        if self._spec.watch.look() != READY:
            raise self._stop()
        if self._sent and self._fed is not None and self._outbox is None:
            self._hear()  # before the look: the next training then starts from the version that took the last update
        commit, call = self._post.look()
        if call is not None and not (commit is not None and self._is_last(commit, call)):
            self._post.require(call)
        if commit is None or call is None or self.silo not in call.ids or self._goes_on_from(commit, call):
            self._post.waits("for the server")
            return False
        if self._fed is None and (changed := unlike(call.config, self.config)) and not self._post.speaks():
            self._post.waits(f"for the server to start again; the last one had {'; '.join(changed[:3])}")
            return False
        self._post.goes_on()
        if self._fed is None or call.epoch != self._epoch:
            self._join(call)
        assert self._fed is not None
        self._follow(commit)
        if self._parts is not None and self._parts.turn(serial_of(UPDATE, commit.version)):
            self._post.news()
        if UNREAD in self._sent.values():
            self._sent = self._post.sent() | {number: round for number, round in self._sent.items() if round != UNREAD}
        decided = max(self._answered, commit.last.get(self.silo, NEVER).number)
        if self._sent and self._post.lost(decided + 1):
            self._sent.clear()  # their numbers are free: the next training takes the first of them
            self._draft, self._last_sent = None, -1
        if self._fetch(commit) and commit.about["scores"] and self._scored < commit.version:
            self._score(commit)
        if self._version != commit.version:
            return False
        if self._is_last(commit, call) and self._is_closed(commit):
            self._finish(commit)
            return True
        if self._outbox is None:
            self._train_at_once(commit)
        elif not self._is_last(commit, call) and self._is_called(commit, call):
            self._train(commit, call)
        self._post.idle()
        return False

    def _is_last(self, commit: Commit, call: Call) -> bool:
        """Whether all rounds are done, or a metric has ended the run."""
        done = commit.ended and commit.version >= self.config.rounds
        return done or self._post.has_ended(call, commit.version, self.config)

    def _goes_on_from(self, commit: Commit, call: Call) -> bool:
        """Whether the run has ended and this job is of one that goes on, whose server has not called yet."""
        if commit.ended and commit.version < self.config.rounds:
            return call.round <= commit.version
        return call.final == commit.version and not self._is_last(commit, call)

    def _is_called(self, commit: Commit, call: Call) -> bool:
        """Whether the silo has to train for the call's round."""
        if call.round != commit.version + 1 or self.silo not in call.cohort:
            return False
        if self._parts is not None:  # an update that an earlier job has sent is under masks of keys that are lost
            decided = self._last_sent == call.round or self._parts.decided(names.MEMBERS, serial_of(UPDATE, call.round))
            return not decided
        return not {call.round, UNREAD} & {*self._sent.values()}

    def _is_closed(self, commit: Commit) -> bool:
        """Whether the server needs this job no more for the sums of the last version's scores."""
        if self._parts is None or not commit.about["scores"]:
            return True
        return self._parts.decided(names.CLOSED, serial_of(SCORE, commit.version))

    def _stop(self) -> Exception:
        if self._post.error is not None:
            return self._post.error
        return Stopped(f"silo '{self.silo}' stopped: {self._spec.watch.reason}; the same command goes on")

    def _join(self, call: Call) -> None:
        """Build the federation as this silo sees it: all members, of which it has only itself."""
        require_same(call.config, self.config)
        if call.begins != self._begins:
            raise ConfigError("the model's first parameters differ from the server's: other init, or torch")
        facts_KF, before = np.array(call.facts), self._fed
        if not np.array_equal(facts_KF[call.ids.index(self.silo)], self._told_facts()):
            raise ConfigError(OTHER_DATA.format(self.silo))
        members = Membership(call.epoch, {silo: (0 if silo == self.silo else 1,) for silo in call.ids})
        opened = Opened(members, self._opened.data, facts_KF)
        held = {} if before is None else before.silos
        sends = Arrivals if self.config.engine.arrivals else Outbox
        fed = build_federation(self._spec, opened, Comms.of(self.comm), held, sends=sends).federation
        if before is not None:
            own, was = fed.silos[self.silo], before.silos[self.silo]
            own.cursor, own.kept = was.cursor, was.kept
            fed.exchange.holders.restore([*before.exchange.holders.state()])
        self._fed, self._epoch, self._draft, self._orders = fed, call.epoch, None, call.orders
        if fed.secure is not None and self._parts is None:
            self._parts = self._post.parts(fed.secure.threshold)

    @property
    def _outbox(self) -> Outbox | None:
        """What packs updates of synchronous rounds."""
        assert self._fed is not None
        return self._fed.exchange if isinstance(self._fed.exchange, Outbox) else None

    def _follow(self, commit: Commit) -> None:
        """Take up the state that the commit says."""
        assert self._fed is not None
        last = commit.last.get(self.silo, NEVER)
        self._sent = {number: round for number, round in self._sent.items() if number > last.number}
        base = (last.counted, last.counted_by)
        if self._base[0] <= last.number:  # else a later training is in the server's buffer
            self._go_on(base)
        if last.number != self._forgot:
            self._states.forget(last.number, {base})
            self._forgot = last.number

    def _go_on(self, base: Base) -> None:
        """Take up the state after the last training that counts. It is an earlier one than before if the server has
        lost an update of its buffer."""
        assert self._fed is not None
        if self._base == base:
            return
        if self._base[0] > base[0]:
            say(f"update {self._base[0]} does not count after all; the silo goes on from before it")
        if base == NOTHING:
            own = self._fed.silos[self.silo]
            own.cursor, own.kept = 0, {}
        elif self._draft is not None and self._draft[0] == base:
            self._fed.silos.update(self._draft[1])
            if self._outbox is not None:
                self._outbox.taken()
        else:
            self._states.read(base, self._fed.silos[self.silo], self._outbox)
        self._base, self._draft = base, None

    def _fetch(self, commit: Commit) -> bool:
        """Fetch the parameters of the commit; False if a newer one has replaced them."""
        assert self._fed is not None
        if self._version != commit.version:
            layout, model = self._fed.layout, self._fed.model
            found = [self._post.fetch(commit, kind) for kind in ("params", "average") if kind in commit.files]
            payloads = [payload for payload in found if payload is not None]
            if len(payloads) < len(found):
                return False
            self._params_Q = from_bytes(payloads[0], layout.size, model.dtype).to(model.device)
            self._scored_P = layout.params(self._params_Q)
            if len(payloads) > 1:
                self._scored_P = from_bytes(payloads[1], layout.num_params, model.dtype).to(model.device)
            self._version = commit.version
        return True

    # ------------------------------------------------------------ its work

    def _score(self, commit: Commit) -> None:
        """Score the committed parameters on the silo's test data."""
        fed = self._fed
        assert fed is not None
        error = evaluate(fed, commit.version, self._scored_P)
        if error is not None:
            raise error
        self._scored = commit.version
        if self._parts is None:
            row = told_row(fed.done.row(fed.index[self.silo]))
            self._post.score(commit.version, {"row": row, "counts": fed.done.counts.tolist()})
        elif self.silo in in_scores(fed):
            numbers = [0, 1, *figures.told(fed.done.hidden())]
            keys = self._parts.begin(serial_of(SCORE, commit.version), np.empty(0, np.uint32), numbers)
            self._post.score(commit.version, {"keys": keys})

    def _train(self, commit: Commit, call: Call) -> None:
        """Train for the round of the call, and publish the update."""
        fed, silo, number = self._fed, self.silo, self._post.next_number(self._sent)
        assert fed is not None
        state = State(call.round - 1, self._params_Q, None, {}, updates=read_arrays(call.updates))
        of_cohort = (call.round, call.cohort, call.factors, call.near, call.stands_for, None)
        order = read_order(call.orders.get(silo))
        after, error = train_silos(state, fed, *of_cohort, orders={} if order is None else {silo: order})
        if error is not None:
            raise error if isinstance(error, (SiloError, ConfigError)) else SiloError(str(error))
        if fed.ready.rank("status")[0] >= STOP:
            raise self._stop()
        row = fed.ready.row(fed.index[silo])
        outbox = self._outbox
        sent = self._prepared(outbox, call.round) if outbox is not None and row["taken"] else None
        base = (number, self._post.by)
        if sent is not None:
            self._states.write(base, after[silo], outbox)
            self._draft = base, after
        head: dict[str, Any] = {"round": call.round}
        if self._parts is None:
            head |= {"row": told_row(row), "sizes": sent.sizes if isinstance(sent, Packed) else []}
        elif isinstance(sent, list):
            head |= {"keys": sent}
        self._post.send(number, head, sent.data if isinstance(sent, Packed) else b"")
        self._sent[number] = self._last_sent = call.round
        if self._parts is not None:
            say(f"round {call.round}: {'ready for the sum' if sent is not None else 'rejected'}")
            return
        loss = f"loss {row['loss']:.4f}" if math.isfinite(row["loss"]) else "loss not finite"
        say(f"round {call.round}: {int(row['steps'])} steps, {loss}{'' if sent is not None else ', rejected'}")

    def _prepared(self, outbox: Outbox, round: int) -> Packed | list[str] | None:
        """The update as it is sent; under masks the public keys of its sum."""
        if self._parts is None:
            return outbox.packed
        assert self._fed is not None and outbox.words is not None
        numbers = [outbox.words.weight, 1, *figures.told(self._fed.ready.hidden())]
        return self._parts.begin(serial_of(UPDATE, round), outbox.words.words, numbers)

    def _hear(self) -> None:
        """Learn whether the last update is in the server's buffer."""
        decided = self._post.decided()
        if decided is None or decided[0] < max(self._sent):
            return
        self._sent.clear()
        self._answered = max(self._answered, decided[0])
        self._post.news()
        self._go_on(decided[1])
        if decided[1][0] != decided[0]:
            self._states.drop((decided[0], self._post.by))

    def _train_at_once(self, commit: Commit) -> None:
        """Train from the newest parameters, if the last update is decided, and publish the update."""
        fed, silo = self._fed, self.silo
        assert fed is not None and isinstance(fed.exchange, Arrivals)
        if self._sent:
            return
        number = max(self._answered + 1, self._post.next_number({}))
        version, params_Q, draft = commit.version, self._params_Q, drafted(fed.silos[silo])
        order, began_s = self._order(commit), time.monotonic()
        try:
            update = trained(fed, fed.model, draft, version, number, params_Q, fed.watch.check, order)
        except BrokenOff:
            raise self._stop() from None
        work_s = time.monotonic() - began_s
        state = State(version, params_Q, None, {}, updates=fed.updates.init())
        rejected, norms = judged(state, fed, update, draft, number)
        message = torch.empty(0)
        if not rejected:
            move_averaged(fed, update.vector_Q, params_Q, 1)
            message = packed(fed.exchange, update, draft, number)
            base = (number, self._post.by)
            self._states.write(base, draft, None)
            self._draft = base, {silo: draft}
        row = {
            **{"weight": update.weight, "silo": draft.weight, "loss": update.loss, "norm": update.norm},
            **{"samples": update.num_samples, "steps": update.num_steps, "targets": update.counted},
            **{"normalizer": update.num_gradients, **norms, **({} if order is None else {"work_s": work_s})},
        }
        head = {"version": version, "rejected": rejected, "row": told_row(row), "base": self._base}
        head |= {} if order is None else {"order": told_order(order)}
        self._post.send(number, head, as_bytes(message))
        self._sent[number] = version
        say(f"from version {version}: {update.num_steps} steps, loss {update.loss:.4f}{', rejected' * bool(rejected)}")

    def _order(self, commit: Commit) -> Order | None:
        """What the silo is told of a training from this version. Of one that joined later the call says it."""
        return read_order(commit.about.get("orders", {}).get(self.silo) or self._orders.get(self.silo))

    def _finish(self, commit: Commit) -> None:
        """Write the silo's model at the end of the run."""
        fed = self._fed
        assert fed is not None
        own = fed.silos[self.silo]
        if fed.model.has_personal and self._base == NOTHING:
            say(f"silo '{self.silo}': the run is over, and it has not trained")
            return
        load_own(fed.rule, fed.model, own, self._scored_P, fed.tuning(own, commit.version))
        save_model(fed.model, self.out / MODEL, shared_only=False)
        say(f"silo '{self.silo}': the run is over after {commit.version} rounds; its model is {self.out / MODEL}")
