"""A silo's part in secure sums: the phases of secure/protocol.py as files (docs/secure-files.md).

    the silo                                          the server
    its update is ready: public keys          ->
                                              <-      members
    shares of its secrets, sealed             ->
                                              <-      roster, with all sealed shares
    vector and figures under masks            ->
                                              <-      survivors; a public key to answer to
    shares of others' secrets, sealed         ->

All secrets are in the memory of this job, so the next job of the silo has other ones, and is not among the members of
a sum whose members are decided. For one sum a job answers about one set of survivors: a server that starts again gets
the same answer, sealed for its own key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedmpi.errors import ExchangeError
from fedmpi.files import names
from fedmpi.files.envelope import Envelope
from fedmpi.files.line import File
from fedmpi.files.silo import Silo
from fedmpi.files.sums import Decisions, make_folders
from fedmpi.output import say
from fedmpi.secure import numbers as figures
from fedmpi.secure import shamir
from fedmpi.secure.protocol import Advert, Answer, GivenUp, Party

if TYPE_CHECKING:
    from fedmpi.rounds import Federation

UPDATE, SCORE = range(2)  # kinds of sums
LETTER_AFTER = {names.MEMBERS: names.SHARE, names.ROSTER: names.MASKED, names.SURVIVORS: names.ANSWER}  # a decision
ASK = "ask"  # the server's file with the key to answer to
LEAVES = "leaves"  # in the head of a letter: the silo takes no further part
TAG_BYTES = 16  # that sealing adds
SEALED_BYTES = 2 * shamir.SHARE_BYTES + TAG_BYTES  # a letter from a member to another one


def serial_of(kind: int, number: int) -> int:
    """The serial number of the sum of a round's updates, or of the scores of a version.

    >>> serial_of(UPDATE, 3), serial_of(SCORE, 3), serial_of(UPDATE, 4)
    (6, 7, 8)
    """
    return 2 * number + kind


def title(serial: int) -> str:
    """What a sum is of, as text.

    >>> title(serial_of(SCORE, 3))
    'scores of version 3'
    """
    number, kind = divmod(serial, 2)
    return f"scores of version {number}" if kind == SCORE else f"updates of round {number}"


def in_scores(fed: Federation) -> list[str]:
    """The silos that take part in sums of scores: those with test data, so that a sum has `threshold` of these; all if
    none has."""
    return [silo for silo in fed.ids if fed.facts[silo][1] > 0] or [*fed.ids]


class Member(NamedTuple):
    """A silo whose contribution to a sum is ready."""

    silo: str
    number: int  # of the file that says so
    by: int  # incarnation of the silo's job
    digest: str  # of that file
    channel: str  # public keys, in hexadecimal
    mask: str

    @property
    def advert(self) -> Advert:
        """Its public keys."""
        return Advert(bytes.fromhex(self.channel), [bytes.fromhex(self.mask)])


def members_of(decided: Envelope) -> list[Member]:
    """The members in a decision."""
    return [Member(*row) for row in decided.head["members"]]


def letter_of(letters: memoryview, place: int, num: int, sender: int, receiver: int) -> bytes:
    """A letter in the roster: of the silo at `place` there, one of `num` members. Silos by their index."""
    at = (place * (num - 1) + receiver - (receiver > sender)) * SEALED_BYTES
    return bytes(letters[at : at + SEALED_BYTES])


class Part:
    """This silo's part in one sum."""

    def __init__(self, silo: str, threshold: int, serial: int, words: np.ndarray, numbers: Sequence[int]) -> None:
        self.silo, self.serial, self._threshold = silo, serial, threshold
        self.party: Party | None = Party(-1, threshold)  # None: the silo's part is over
        advert = self.party.advertise()
        self.keys = [advert.channel.hex(), advert.masks[0].hex()]
        self._words, self._numbers = words, [*numbers]
        self._next = names.MEMBERS  # the decision that it waits for
        self._decided = ""  # digest of the last one
        self._num, self._roster, self._survivors = 0, list[int](), list[int]()
        self._answer: Answer | None = None
        self._asked: File | None = None  # the last question that it has answered

    def over(self, why: str) -> None:
        """Take no further part, and forget all secrets."""
        say(f"{title(self.serial)}: without this silo: {why}")
        self.party, self._answer, self._words, self._numbers = None, None, np.empty(0, np.uint32), []

    def _leave(self, files: Silo, kind: str) -> None:
        """Tell the server not to wait for this letter."""
        files.publish(kind, self.serial, {"of": self._decided, LEAVES: True})

    def turn(self, files: Silo, decisions: Decisions) -> bool:
        """Go on as far as the server's decisions allow. Returns whether something was done."""
        if self.party is None:
            return False
        if self._next == ASK:
            return self._tell(self.party, files)
        if (decided := decisions.read(self._next, self.serial)) is None:
            if not decisions.is_damaged(self._next, self.serial):
                return False
            self._leave(files, LETTER_AFTER[self._next])
            self.over(f"its {self._next} are damaged in the shared folder")
            return True
        if decided.head.get("of", "") != self._decided:
            raise ExchangeError(f"{title(self.serial)}: {self._next} do not follow from what this silo knows")
        self._decided, what = decided.digest, self._next
        if why := decided.head.get("why", ""):
            self.over(f"the sum is given up: {why}")
        elif what == names.MEMBERS:
            self._share(self.party, files, members_of(decided))
        elif what == names.ROSTER:
            self._mask(self.party, files, decided)
        else:
            self._survive(self.party, decided.head["survivors"])
        return True

    def _share(self, party: Party, files: Silo, members: Sequence[Member]) -> None:
        mine = [i for i, one in enumerate(members) if [one.channel, one.mask] == self.keys and one.silo == self.silo]
        if not mine:
            if any(one.silo == self.silo and one.by == files.by for one in members):  # with keys that it has replaced
                self._leave(files, names.SHARE)
            return self.over("its members were decided before this job was ready")
        party.index, self._num = mine[0], len(members)
        adverts = {i: one.advert for i, one in enumerate(members)}
        try:
            sealed = party.share(adverts, len(members) - 1, bytes.fromhex(self._decided))
        except GivenUp as error:
            self._leave(files, names.SHARE)
            return self.over(str(error))
        self._next = names.ROSTER
        files.publish(names.SHARE, self.serial, {"of": self._decided}, [sealed[i] for i in sorted(sealed)])

    def _mask(self, party: Party, files: Silo, decided: Envelope) -> None:
        self._roster = decided.head["roster"]
        if party.index not in self._roster:
            return self.over("its shares came too late")
        letters = {
            other: letter_of(decided.payload, place, self._num, other, party.index)
            for place, other in enumerate(self._roster)
            if other != party.index
        }
        try:
            party.receive(letters)
        except (GivenUp, ValueError) as error:
            self._leave(files, names.MASKED)
            return self.over(str(error))
        words, told = self._words.copy(), [*self._numbers]
        party.mask(0, words, told)
        self._words, self._numbers = np.empty(0, words.dtype), []
        self._next = names.SURVIVORS
        payload = [words.tobytes(), figures.packed(told)]
        files.publish(names.MASKED, self.serial, {"of": self._decided}, payload)

    def _survive(self, party: Party, survivors: list[int]) -> None:
        if party.index not in survivors:
            return self.over("its masked words came too late")
        if len(survivors) < self._threshold or not {*survivors} <= {*self._roster}:
            raise ExchangeError(f"{title(self.serial)}: survivors {survivors}, roster {self._roster}: nothing is told")
        self._survivors, self._next = survivors, ASK
        self._answer = party.answer(0, survivors)

    def _tell(self, party: Party, files: Silo) -> bool:
        """Answer the server that asks now, if it has not got the answer yet."""
        if (found := files.newest_note(ASK, self._asked)) is None:
            return False
        file, asked = found
        if file.number != self.serial:
            return False
        if asked.head["of"] != self._decided:
            raise ExchangeError(f"{title(self.serial)}: the server asks about other survivors: nothing is told of them")
        assert self._answer is not None
        sealed = party.seal_answer(self._answer, bytes.fromhex(asked.head["key"]))
        self._asked = file
        files.publish(names.ANSWER, self.serial, {"of": self._decided, "key": asked.head["key"]}, [sealed])
        return True


class Parts:
    """This silo's parts in the sums that are not over."""

    def __init__(self, files: Silo, threshold: int) -> None:
        make_folders(files.folder)
        self._files, self._threshold = files, threshold
        self._decisions = Decisions(files.folder, files.run)
        self._open: dict[int, Part] = {}

    def begin(self, serial: int, words: np.ndarray, numbers: Sequence[int]) -> list[str]:
        """Bring words of the ring and numbers into a sum. Returns the public keys to publish with what says that they
        are ready. Repeated, it begins anew with other keys."""
        self._open[serial] = Part(self._files.silo, self._threshold, serial, words, numbers)
        return self._open[serial].keys

    def turn(self, over: int) -> bool:
        """Go on with all sums; forget those up to the serial number `over`. Returns whether something was done. A
        listing if there are any."""
        for serial in [*self._open]:
            if serial <= over:
                del self._open[serial]
        if not self._open:
            return False
        self._decisions.look()
        return any([part.turn(self._files, self._decisions) for part in self._open.values()])

    def decided(self, what: str, serial: int) -> bool:
        """Whether something is decided about a sum. A listing, and a read."""
        return self._decisions.look().read(what, serial) is not None
