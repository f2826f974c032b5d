"""The server's part in secure sums: collect, decide, ask, unmask (jobs/masking.py has the silos' part).

Every phase ends once all have sent what it takes, or the others are gone: a newer job of the silo has registered, the
job has ended, or its heart beats have. What was decided holds for every later start of the server, which goes on from
there. Only the key that answers are sealed for is new: it is in this process's memory, and answers that come after a
sum was given up are for a key that is no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fedmpi.errors import ExchangeError
from fedmpi.files import names
from fedmpi.files.envelope import Envelope
from fedmpi.files.reading import Damaged
from fedmpi.files.sums import Decisions, make_folders
from fedmpi.jobs.masking import ASK, LEAVES, SEALED_BYTES, Member, members_of, title
from fedmpi.jobs.post import ServerPost
from fedmpi.output import say
from fedmpi.secure import numbers as figures
from fedmpi.secure.masks import add_stream
from fedmpi.secure.protocol import Answer, Collector, GivenUp
from fedmpi.secure.session import BROKEN

T = TypeVar("T")

LOOKS = 12  # at heart beats, in a lease
COUNT = 1  # place of the number of silos among the numbers; the weight is before it


@dataclass(frozen=True)
class Sum:
    """What came of a sum."""

    silos: Sequence[str]  # that are in it
    words: np.ndarray
    numbers: Sequence[int]  # weight, number of silos, figures
    why: str = ""  # it is given up, and nothing is revealed


def given_up(why: str) -> Sum:
    """A sum of which nothing is revealed."""
    return Sum([], np.empty(0, np.uint32), [], why)


class Sums:
    """Secure sums over the shared folder."""

    def __init__(self, post: ServerPost, threshold: int) -> None:
        self._post, self._files, self.threshold = post, post.files, threshold
        make_folders(self._files.folder)
        self._decisions = Decisions(self._files.folder, self._files.run)
        self._damaged = Damaged(self._files.folder)
        self._looked_s = -math.inf
        self._newest: dict[str, int] = {}  # by silo: the incarnation that registered last

    def decided(self, what: str, serial: int) -> Envelope | None:
        """What is decided about a sum. A listing, and a read."""
        return self._decisions.made(what, serial)

    def begin(self, serial: int, members: Sequence[Member], rejected: Collection[str] = ()) -> Envelope:
        """Decide who the members are; `rejected`: silos that take no part, as they say. Returns what holds."""
        return self._files.decide(
            names.MEMBERS, serial, {"members": [list(one) for one in members], "rejected": [*rejected]}
        )

    def close(self, serial: int) -> None:
        """The sum is done with: tell so, and remove its letters."""
        self._files.decide(names.CLOSED, serial, {})
        self._files.forget_sums(serial)

    def finish(
        self,
        serial: int,
        begun: Envelope,
        words_Q: np.ndarray,
        num_numbers: int,
        check: Callable[[], object],
        limit_s: float = math.inf,
    ) -> Sum:
        """The sum of the members that stay, from the members' decision on. `words_Q`: an array like those to be summed;
        `check` raises to leave; `limit_s`: seconds that a phase may take, if it is more than a lease."""
        members, begun_of = members_of(begun), begun.digest
        wait = _Waits(self, serial, members, check, max(limit_s, self._post.files.leases.lease_s))
        everybody, threshold = range(len(members)), self.threshold

        if (roster := self.decided(names.ROSTER, serial)) is None:
            shares = wait.letters(names.SHARE, everybody, begun_of)
            row_bytes = (len(members) - 1) * SEALED_BYTES
            shares = {i: one for i, one in shares.items() if len(one.payload) == row_bytes}
            why = _few(len(shares), "shared their keys", threshold)
            head = {"of": begun_of, "roster": sorted(shares), "why": why}
            roster = self._files.decide(names.ROSTER, serial, head, [shares[i].payload for i in sorted(shares)])
        if why := roster.head["why"]:
            return given_up(why)

        if (survivors := self.decided(names.SURVIVORS, serial)) is None:
            masked = wait.digests(names.MASKED, roster.head["roster"], roster.digest)
            why = _few(len(masked), "sent masked words", threshold)
            head = {"of": roster.digest, "survivors": sorted(masked) if not why else [], "why": why}
            survivors = self._files.decide(names.SURVIVORS, serial, head)
        if why := survivors.head["why"]:
            return given_up(why)

        there: list[int] = survivors.head["survivors"]
        collector = Collector(threshold, len(members) - 1)
        collector.gather({i: one.advert for i, one in enumerate(members)})
        collector.route({i: {} for i in roster.head["roster"]})
        self._files.put(ASK, serial, {"of": survivors.digest, "key": collector.public.hex()})
        answers = wait.answers(there, collector, begun_of, survivors.digest, threshold)
        try:
            keys = collector.left(0, there, answers)
        except GivenUp as error:
            return given_up(str(error))
        total_Q, numbers = np.zeros_like(words_Q), [0] * num_numbers
        for i in there:  # one at a time, since they are large
            masked_of_i = wait.letters(names.MASKED, [i], roster.digest, stays=True)
            if not masked_of_i:
                raise ExchangeError(f"{title(serial)}: masked words of the sum are damaged in the shared folder")
            _add(masked_of_i[i], members[i].silo, total_Q, numbers)
        for key, sign in keys:
            add_stream(key, -sign, total_Q)
            figures.add_masks(key, -sign, numbers)
        numbers = [figures.signed(number) for number in numbers]
        if numbers[COUNT] != len(there):
            raise ExchangeError(BROKEN)
        return Sum([members[i].silo for i in there], total_Q, numbers)

    # ------------------------------------------------------------ waiting

    def too_long(self, path: str) -> bool:
        """A letter is not whole; returns whether that has been so for too long."""
        return self._damaged.too_long(path)

    def gone(self, member: Member, since_s: float) -> bool:
        """Whether a member's job is there no more, as far as heart beats say. `since_s`: of the wait."""
        leases, now_s = self._files.leases, self._files.folder.now()
        if now_s - self._looked_s > leases.lease_s / LOOKS:
            self._looked_s = now_s
            leases.look()
            self._newest = {silo: by for silo, (by, _) in self._files.registrations().items()}
        newest = self._newest.get(member.silo, 0)
        pulse = leases.pulses.get(member.silo)
        if newest > member.by or (pulse is not None and pulse.by > member.by):
            return True
        if pulse is None or pulse.by < member.by:
            return now_s - since_s > leases.lease_s
        return not leases.alive(member.silo)


class _Waits:
    """The waits of one sum."""

    def __init__(
        self, sums: Sums, serial: int, members: Sequence[Member], check: Callable[[], object], limit_s: float
    ) -> None:
        self._sums, self._serial, self._members, self._check, self._limit_s = sums, serial, members, check, limit_s
        self._post, self._files = sums._post, sums._post.files

    def letters(self, kind: str, who: Collection[int], of: str, stays: bool = False) -> dict[int, Envelope]:
        """The members' letters of a kind, by index, that follow from a decision. `stays`: they are known to be there,
        whoever is gone by now."""
        return self._until(kind, who, lambda i, one: one if one.head["of"] == of else None, len(who), stays)

    def digests(self, kind: str, who: Collection[int], of: str) -> dict[int, str]:
        """The digests of such letters, as they come."""
        return self._until(kind, who, lambda i, one: one.digest if one.head["of"] == of else None, len(who))

    def answers(
        self, who: Collection[int], collector: Collector, about: str, of: str, enough: int
    ) -> Mapping[int, Answer]:
        """Enough answers that are sealed for this collector."""

        def opened(i: int, one: Envelope) -> Answer | None:
            if one.head["of"] != of or one.head["key"] != collector.public.hex():
                return None  # to an earlier start of the server
            try:
                return collector.hear(i, bytes(one.payload), bytes.fromhex(about))
            except ValueError as error:
                say(f"fedmpi: {title(self._serial)}: the answer of silo '{self._members[i].silo}': {error}", error=True)
                return None

        return self._until(names.ANSWER, who, opened, enough)

    def _until(
        self,
        kind: str,
        who: Collection[int],
        read: Callable[[int, Envelope], T | None],
        enough: int,
        stays: bool = False,
    ) -> dict[int, T]:
        """What the members have sent, once so many have, or all others are gone; with `stays`, are damaged."""
        found: dict[int, T] = {}
        lost: set[int] = set()
        began_s = self._files.folder.now()
        self._post.news()
        while True:
            there = {(silo, by) for silo, number, by in self._files.silo_files(kind) if number == self._serial}
            for i in {*who} - found.keys() - lost:
                silo, by = self._members[i].silo, self._members[i].by
                path = names.path(names.LETTERS[kind], silo, self._serial, by)
                letter = self._files.read_silo(kind, silo, self._serial, by) if (silo, by) in there else None
                if letter is None:
                    if ((silo, by) in there or stays) and self._sums.too_long(path):
                        lost.add(i)
                elif LEAVES in letter.head:
                    lost.add(i)
                elif (made := read(i, letter)) is not None:
                    found[i] = made
                    self._post.news()
            missing = [i for i in who if i not in found and i not in lost]
            if len(found) >= enough or not missing or (not stays and self._are_gone(missing, began_s)):
                return found
            self._check()
            waiting = ", ".join(self._members[i].silo for i in missing[:6])
            self._post.waits(f"for {names.LETTERS[kind]} of {title(self._serial)} from: {waiting}")
            self._post.pause()

    def _are_gone(self, missing: Collection[int], since_s: float) -> bool:
        """Whether nothing more comes from these members, or not in time."""
        late = self._files.folder.now() - since_s > self._limit_s
        return late or all(self._sums.gone(self._members[i], since_s) for i in missing)


def _few(num: int, what: str, threshold: int) -> str:
    """Why the sum is given up; empty if it goes on."""
    return f"{num} silos {what}, and secure.threshold is {threshold}" if num < threshold else ""


def _add(letter: Envelope, silo: str, total_Q: np.ndarray, numbers: list[int]) -> None:
    """Add a silo's masked words and numbers, in place."""
    if len(letter.payload) != total_Q.nbytes + figures.BYTES * len(numbers):
        raise ExchangeError(f"silo '{silo}' has sent {len(letter.payload)} bytes of masked words, which do not fit")
    total_Q += np.frombuffer(letter.payload[: total_Q.nbytes], total_Q.dtype)
    for place, number in enumerate(figures.unpacked(bytes(letter.payload[total_Q.nbytes :]))):
        numbers[place] += number
