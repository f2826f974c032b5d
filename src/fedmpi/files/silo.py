"""What a silo's job does with the folder: register, follow the line, publish updates, keep its own state.

A silo writes its state number N, then its update number N. The line says which update N counts, by number and
incarnation; the state of the same number and incarnation is the one to go on from. So a job that ends anywhere, is
submitted again, or still writes beside its successor, leaves a state for every update that may count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from fedmpi.files import names
from fedmpi.files.beats import Heart, Leases, Pulse
from fedmpi.files.claims import Claim
from fedmpi.files.envelope import Buffer, Envelope, packed
from fedmpi.files.folder import Folder
from fedmpi.files.line import NEVER, Commit, Entry, File, Last, Line
from fedmpi.files.reading import noted, notes, of_silos, read_of_silo
from fedmpi.files.root import open_run


class Position(NamedTuple):
    """Where a silo stands when its job starts."""

    last: Last  # what the line says; its state to go on from is (last.counted, last.counted_by), none if -1
    pending: list[tuple[int, int]]  # number and incarnation of updates that are published and not answered

    @property
    def upcoming(self) -> int:
        """Number of the silo's next training."""
        return max([self.last.number, *(number for number, _ in self.pending)]) + 1


class Silo:
    """The folder as a silo sees it; made by `start`. Raises Superseded when a newer job of the silo registers."""

    def __init__(self, folder: Folder, run: str, claim: Claim, lease_s: float) -> None:
        self.folder, self.run, self.silo, self.by = folder, run, claim.who, claim.number
        self.line = Line(folder, run, self._collect)
        self.leases = Leases(folder, lease_s)
        self._claim = claim
        self._heart = Heart(folder, run, claim.who, claim.number)
        self._answers: dict[int, Entry] = {}

    @classmethod
    def start(
        cls,
        folder: Folder,
        run_about: Mapping[str, Any],
        silo: str,
        about: Mapping[str, Any],
        *,
        lease_s: float = 60.0,
    ) -> Silo:
        """Register a silo's job; an earlier one of the same silo is superseded. `run_about` as in Server.start; `about`
        is what the server learns of the silo (JSON: sizes, fingerprints, host)."""
        names.quoted(silo)
        run = open_run(folder, run_about)
        return cls(folder, run, Claim.take(folder, run, names.SILOS, silo, about), lease_s)

    def _collect(self, commit: Commit) -> None:
        for entry in commit.entries:
            if entry.silo == self.silo:
                self._answers[entry.number] = entry

    # ------------------------------------------------------------ the server's files

    def look(self) -> Commit | None:
        """The newest commit; None before the first. Operations: a listing, and a read for each new commit."""
        return self.line.look()

    def fetch(self, file: File) -> Envelope | None:
        """A file that a commit names; None if it was removed since: look again."""
        return noted(self.folder, self.run, file)

    def newest_note(self, kind: str, known: File | None = None) -> tuple[File, Envelope] | None:
        """The server's file of a kind with the highest epoch, then the highest number; None if there is none, or none
        that is newer than the `known` one. Operations: a listing, and a read if there is a newer one."""
        for epoch, number in reversed(notes(self.folder, kind)):
            if known is not None and (epoch, number) <= (known.epoch, known.number):
                return None
            content = noted(self.folder, self.run, File(kind, number, epoch, ""))
            if content is not None:
                return File(kind, number, epoch, content.digest), content
        return None

    def server(self) -> Pulse | None:
        """The server's last beat; `leases.alive(names.SERVER)` says whether it is young. A listing and a read."""
        self.leases.look(names.SERVER)
        return self.leases.pulses.get(names.SERVER)

    # ------------------------------------------------------------ this silo's files

    def position(self) -> Position:
        """Where this silo stands. Operations: those of `look`, and a listing."""
        published = [(number, by) for who, number, by in of_silos(self.folder, names.UPDATE) if who == self.silo]
        last = self._last()
        return Position(last, [row for row in published if row[0] > last.number])

    def _last(self) -> Last:
        head = self.line.look()
        return NEVER if head is None else head.last.get(self.silo, NEVER)

    def publish(self, kind: str, number: int, about: Mapping[str, Any], payload: Sequence[Buffer] = ()) -> str:
        """Write this silo's file (names.UPDATE, SCORE, STATE, or a letter) and return its digest. Four operations.
        Updates are numbered 0, 1, 2, ..., and state N comes before update N. Raises Superseded, and ValueError for the
        number of an update that is answered."""
        self._claim.require_newest()
        head = self.line.head
        if kind == names.UPDATE and head is not None and number <= head.last.get(self.silo, NEVER).number:
            raise ValueError(f"update {number} of silo '{self.silo}' is answered; publish the next number")
        fixed = {"kind": kind, "run": self.run, "who": self.silo, "number": number, "by": self.by}
        parts, digest = packed({**about, **fixed}, payload)
        self.folder.publish(names.path(names.FOLDER_OF[kind], self.silo, number, self.by), parts)
        return digest

    def mine(self, kind: str) -> list[tuple[int, int]]:
        """Number and incarnation of this silo's files of a kind, of all its jobs."""
        return [(number, by) for who, number, by in of_silos(self.folder, kind) if who == self.silo]

    def read(self, kind: str, number: int, by: int) -> Envelope | None:
        """One of this silo's files; None if it is not whole or not there."""
        return read_of_silo(self.folder, self.run, kind, self.silo, number, by)

    def answer(self, number: int) -> Entry | None:
        """What the line says of this silo's update; None while it says nothing. `by` tells whose file was answered:
        another incarnation's if its old job wrote one, too. Operations: those of `look`."""
        last = self._last()
        if number > last.number:
            return None
        if number in self._answers:
            return self._answers[number]
        by = last.counted_by if last.counted == number else last.by
        return Entry(self.silo, number, by, "", last.counted == number)

    def taken(self, number: int) -> bool:
        """Whether the server says that it has read this job's update: then the silo may go on before the commit.
        Operations: a listing, a read."""
        pulse = self.server()
        row = None if pulse is None else pulse.about["taken"].get(self.silo)
        return row is not None and row[0] >= number and row[1] == self.by

    def lost(self, number: int) -> bool:
        """Whether an update that was published is gone without an answer, because it was damaged. Publish it again: the
        same bytes if this job made it, since the server may have read it; a new one if an earlier job did. Ask for the
        oldest update that is not answered. Operations: a listing, and those of `look`."""
        if any(number == published for published, _ in self.mine(names.UPDATE)):
            return False
        return number > self._last().number

    def withdraw(self, number: int) -> None:
        """Remove this silo's updates after one that is lost. The server has read none of them: it reads them in their
        order. Raises Superseded. A listing, and an operation each."""
        self._claim.require_newest()
        for later, by in reversed(self.mine(names.UPDATE)):
            if later > number:
                path = names.path(names.OF_SILOS[names.UPDATE], self.silo, later, by)
                self.folder.tried(f"remove {path}", partial(self._removed, path))

    def _removed(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.folder.unlink(path)

    def tidy(self) -> None:
        """Remove this silo's states that are not needed any more. One listing."""
        last = self._last()
        for number, by in self.mine(names.STATE):
            if number <= last.number and (number, by) != (last.counted, last.counted_by):
                self.folder.remove(names.path(names.OF_SILOS[names.STATE], self.silo, number, by))

    def beat(self, about: Mapping[str, Any], ended: bool = False) -> None:
        """Show that this job is alive, at least four times a lease. Raises Superseded. Safe in another thread."""
        self._claim.require_newest()
        self._heart.beat(about, ended)
