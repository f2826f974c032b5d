"""The silos of a server's job under `secure`: only sums reach it (jobs/sums.py).

A round waits for its cohort as any round does, until all have said that their update is ready, or the policy closes it.
Those are the members of the sum. The sum is stored in OUT/sums before the commit, for a start that computes the round
again; its letters in the shared folder are removed after it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedmpi import disk
from fedmpi.errors import CheckpointError, FedmpiError
from fedmpi.exchange.outbox import Summed
from fedmpi.files import names
from fedmpi.files.envelope import Envelope, Torn, packed, unpacked
from fedmpi.files.line import Commit, Entry
from fedmpi.files.server import Arrived
from fedmpi.jobs.masking import SCORE, UPDATE, Member, in_scores, members_of, serial_of
from fedmpi.jobs.remote import FilesRemote
from fedmpi.jobs.sums import COUNT, Sum, Sums, given_up
from fedmpi.local import Order
from fedmpi.outcome import DROPPED, VOID
from fedmpi.output import say
from fedmpi.rounds import Federation, State
from fedmpi.rounds.closing import Closing
from fedmpi.secure import numbers as figures
from fedmpi.secure.apart import Apart
from fedmpi.stopping import READY, BrokenOff


class MaskedRemote(FilesRemote):
    """Silos behind the shared folder, of which only sums are seen."""

    _sums: Sums | None = None
    _told_scores: Mapping[str, Any] | None = None  # of the last round, who is in the sums of scores

    # ------------------------------------------------------------ a round

    def _wait(
        self,
        fed: Federation,
        number: int,
        cohort: Sequence[str],
        closing: Closing | None,
        orders: Mapping[str, Order],
    ) -> None:
        """Wait for the cohort's updates, or until the round closes; take their sum."""
        sums, serial = self._sums_of(fed), serial_of(UPDATE, number)
        self.answers, self.given_up = [], ""
        seconds: dict[str, float] = {}
        if (begun := sums.decided(names.MEMBERS, serial)) is None:
            ready, seconds, _ = self._gather(fed, number, cohort, closing)
            begun = sums.decided(names.MEMBERS, serial) if self._took_over else None
        if begun is None:
            if closing is not None and closing.is_broken:
                self._close(fed, number, cohort, (), [*ready], closing, seconds)
                return
            takes = {silo: one for silo, one in ready.items() if "keys" in one.content.head}
            if len(takes) < sums.threshold:
                why = f"{len(takes)} updates are usable, and secure.threshold is {sums.threshold}"
                self._take_sum(given_up(why), fed, number, cohort, [*ready.keys() - takes.keys()], closing, seconds)
                return
            members = [_member(takes[silo]) for silo in cohort if silo in takes]
            begun = sums.begin(serial, members, [silo for silo in ready if silo not in takes])
        num = 2 + 2 * fed.ready.num_hidden
        summed = self._stored(serial)
        if summed is None:
            limit_s = math.inf if closing is None else closing.limit_s
            summed = sums.finish(serial, begun, self._words(fed), num, fed.watch.check, limit_s)
            self._store(serial, summed)
        self._read_all(fed, number, members_of(begun))
        rejected, self._took_over = begun.head["rejected"], False
        self._take_sum(summed, fed, number, cohort, rejected, closing, seconds, members_of(begun))

    def _of_round(self, number: int, cohort: Sequence[str]) -> dict[str, Arrived]:
        """What the silos' newest jobs say: keys of earlier ones are lost."""
        newest = {silo: by for silo, (by, _) in self.post.files.registrations().items()}
        return {
            one.silo: one
            for one in sorted(self._came.values(), key=lambda one: one.number)
            if one.content.head["round"] == number and one.silo in cohort and one.by == newest.get(one.silo)
        }

    def _is_decided(self, fed: Federation, number: int) -> bool:
        """Whether an earlier start has decided about the members, which was not listed before."""
        return self._took_over and self._sums_of(fed).decided(names.MEMBERS, serial_of(UPDATE, number)) is not None

    def _read_all(self, fed: Federation, number: int, members: Sequence[Member]) -> None:
        """Read the members' files, which the commit has to answer; an earlier start may have read them first. One that
        cannot be read any more is answered as well: the members' decision says all that it did."""
        promised = [(one.silo, one.number, one.by) for one in members]
        while True:
            self._poll(promised)
            for member, row in zip(members, promised, strict=True):
                if row[:2] not in self._came and self.post.files.gives_up(*row):
                    content = Envelope({"round": number}, memoryview(b""), member.digest)
                    self._came[row[:2]] = Arrived(*row, content)
            if all(row[:2] in self._came for row in promised):
                return
            fed.watch.check()
            self.post.pause()

    def _take_sum(
        self,
        summed: Sum,
        fed: Federation,
        number: int,
        cohort: Sequence[str],
        rejected: Sequence[str],
        closing: Closing | None,
        seconds: Mapping[str, float],
        members: Sequence[Member] = (),
    ) -> None:
        """Enter a sum into the round's table, the exchange and the next commit."""
        self.given_up = summed.why
        if summed.why:
            say(f"fedmpi: round {number} is given up, and nothing of it is revealed: {summed.why}", error=True)
        there = [one for one in members if one.silo in summed.silos]
        for one in sorted(self._came.values(), key=lambda one: one.number):
            self._heard(one)
            counts = (one.silo, one.number, one.by) in [row[:3] for row in there]
            if one.content.head["round"] < number or any(row[:2] == (one.silo, one.number) for row in members):
                self.answers.append(one.entry(counts=counts))
            elif one.content.head["round"] == number:  # of a job that has ended, or says that it takes no part
                self.answers.append(one.entry(counts=False))
        self.answers = _in_order(self.answers, self.post.files.head)
        self._close(fed, number, cohort, summed.silos, rejected, closing, seconds)
        self._put(summed, fed)

    def _close(
        self,
        fed: Federation,
        number: int,
        cohort: Sequence[str],
        there: Sequence[str],
        rejected: Sequence[str],
        closing: Closing | None,
        seconds: Mapping[str, float],
    ) -> None:
        """Enter who is in the sum, and who is not."""
        late = VOID if closing is not None and closing.is_broken else DROPPED
        for silo in cohort:
            row: dict[str, float] = {"seconds": seconds.get(silo, 0.0)}
            if silo in there:
                row["taken"] = 1
            elif silo in rejected and late == DROPPED:
                row["rejected"] = 1
            elif silo not in rejected:
                row["late"] = late
                if silo not in seconds and closing is not None:
                    row["seconds"] = 2 * closing.limit_s
                    self._behind[silo] = number
            fed.ready.set_silo(fed.index[silo], **row)

    def _put(self, summed: Sum, fed: Federation) -> None:
        """Pass a sum on to the exchange and the table's cover."""
        if summed.why:
            return
        assert isinstance(fed.exchange, Summed) and isinstance(fed.secure, Apart)
        weight, num, *told = summed.numbers
        fed.exchange.put(summed.words, weight, num)
        fed.secure.figures = figures.heard(told)
        fed.comm.bytes_up += len(summed.silos) * (summed.words.nbytes + figures.BYTES * len(summed.numbers))

    def _recall(self, commit: Commit, fed: Federation) -> None:
        """Take the sum of a committed round."""
        self._recall_table(commit, fed)
        self.given_up = commit.about["given_up"]
        if self.given_up:
            return
        if (summed := self._stored(serial_of(UPDATE, commit.version))) is None:
            raise CheckpointError(f"version {commit.version} was committed, and its sum is not in {self._out / 'sums'}")
        self._put(summed, fed)

    def commit(self, fed: Federation, number: int, params_Q: torch.Tensor, scored_P: torch.Tensor) -> None:
        self.told = {"given_up": self.given_up}
        made = self.committed(number) is not None
        super().commit(fed, number, params_Q, scored_P)
        if not made:
            self.post.files.forget_sums(serial_of(UPDATE, number))

    def begin(self, state: State, fed: Federation) -> None:
        super().begin(state, fed)
        for path in (self._out / "sums").glob("*"):
            if path.name.isdigit() and int(path.name) <= serial_of(UPDATE, state.written):
                path.unlink(missing_ok=True)

    # ------------------------------------------------------------ sums on disk

    def _sums_of(self, fed: Federation) -> Sums:
        if self._sums is None:
            assert fed.secure is not None
            self._sums = Sums(self.post, fed.secure.threshold)
        return self._sums

    def _words(self, fed: Federation) -> np.ndarray:
        """Words as silos send them."""
        assert fed.secure is not None
        return np.zeros(fed.exchange.num_params, dtype=f"u{fed.secure.ring.bits // 8}")

    def _store(self, serial: int, summed: Sum) -> None:
        """Keep the sum of a round until a checkpoint holds the round."""
        if summed.why:
            return
        numbers = [str(number) for number in summed.numbers]
        head = {
            "run": self.post.files.run,
            "silos": [*summed.silos],
            "numbers": numbers,
            "dtype": str(summed.words.dtype),
        }
        parts, _ = packed(head, [summed.words.tobytes()])
        path = self._out / "sums" / str(serial)
        try:
            disk.make_folder(path.parent)
            disk.replace_bytes(path, b"".join(parts))
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None

    def _stored(self, serial: int) -> Sum | None:
        """The sum that `_store` has kept; None if it is not here."""
        with contextlib.suppress(OSError, Torn):
            found = unpacked(disk.read_bytes(self._out / "sums" / str(serial), 1 << 40), run=self.post.files.run)
            words = np.frombuffer(found.payload, found.head["dtype"]).copy()
            return Sum(found.head["silos"], words, [int(number) for number in found.head["numbers"]])
        return None

    # ------------------------------------------------------------ scores

    def evaluate(self, fed: Federation, number: int, params_P: torch.Tensor) -> FedmpiError | None:
        """The sums of the scores of the silos that are there."""
        fed.done.clear()
        self._told_scores = None
        if number % fed.evaluate_every and number != fed.rounds:
            return None
        assert isinstance(fed.secure, Apart)
        if (told := self._scores.read(number)) is None:
            told = self._sum_scores(fed, number)
            self._scores.write(number, told)
        if (head := self.post.files.head) is not None and head.version == number:
            self._sums_of(fed).close(serial_of(SCORE, number))
        self._told_scores = told
        fed.secure.figures = figures.heard([int(one) for one in told["numbers"]]) if told["numbers"] else None
        return None

    def scored(self, fed: Federation) -> dict[str, Any]:
        """Who is in the sums of scores."""
        if (told := self._told_scores) is None:
            return {}
        return {"scored_by": told["silos"], **({"scores_given_up": told["why"]} if told["why"] else {})}

    def _sum_scores(self, fed: Federation, number: int) -> dict[str, Any]:
        sums, serial = self._sums_of(fed), serial_of(SCORE, number)
        summed = given_up("the server's job stopped")
        if (head := self.post.files.head) is not None and head.version > number:
            return _told(given_up("they are not in the run directory"))
        try:
            if (begun := sums.decided(names.MEMBERS, serial)) is None:
                members = self._score_members(fed, number)
                few = len(members) < sums.threshold
                why = f"{len(members)} silos have scored, and secure.threshold is {sums.threshold}"
                begun = None if few else sums.begin(serial, members)
                summed = given_up(why) if few else summed
            if begun is not None:
                num = 2 + 2 * fed.done.num_hidden
                summed = sums.finish(serial, begun, np.empty(0, np.uint32), num, fed.watch.check)
        except BrokenOff:
            if self.post.error is not None:
                raise self.post.error from None
        if summed.why:
            say(f"fedmpi: round {number} has no scores, and nothing is revealed: {summed.why}", error=True)
        return _told(summed)

    def _score_members(self, fed: Federation, number: int) -> list[Member]:
        """The silos that have scored a version, once all have that are there."""
        self.post.news()
        found: dict[str, Member] = {}
        damaged, wanted = set[tuple[str, int]](), in_scores(fed)
        while True:
            newest = {silo: by for silo, (by, _) in self.post.files.registrations().items()}
            for silo, version, by in self.post.files.silo_files(names.SCORE):
                new = by == newest.get(silo) and (silo not in found or found[silo].by != by)
                if version != number or silo not in wanted or not new or (silo, by) in damaged:
                    continue
                content = self.post.files.read_silo(names.SCORE, silo, version, by)
                if content is not None:
                    found[silo] = Member(silo, version, by, content.digest, *content.head["keys"])
                    self.post.news()
                elif self._gives_up_score(silo, version, by):
                    damaged.add((silo, by))
            found = {silo: one for silo, one in found.items() if one.by == newest[silo]}
            self._hear_late()
            done = {*found, *self._behind, *(silo for silo, by in damaged if by == newest[silo])}
            missing = [silo for silo in wanted if silo not in done]
            if not missing or not self.post.present().intersection(missing):
                break
            if fed.watch.look() != READY:
                fed.watch.check()
            self.post.waits(f"for scores of round {number}: {', '.join(missing[:6])}")
            self.post.pause()
        self.post.goes_on()
        return [found[silo] for silo in fed.ids if silo in found]


def _told(summed: Sum) -> dict[str, Any]:
    """A sum of scores as JSON values."""
    numbers = [str(one) for one in summed.numbers[COUNT + 1 :]]
    return {"silos": [*summed.silos], "numbers": numbers, "why": summed.why}


def _member(one: Arrived) -> Member:
    """The member whose file says that its update is ready."""
    return Member(one.silo, one.number, one.by, one.content.digest, *one.content.head["keys"])


def _in_order(entries: Sequence[Entry], head: Commit | None) -> list[Entry]:
    """The entries of each silo whose numbers follow one another; the others are answered by a later commit."""
    following = {} if head is None else {silo: last.number + 1 for silo, last in head.last.items()}
    found = []
    for entry in sorted(entries, key=lambda entry: entry.number):
        if entry.number == following.get(entry.silo, 0):
            following[entry.silo] = entry.number + 1
            found.append(entry)
    return found
