"""What the server job does with the folder: claim the epoch, read updates, commit versions, tidy up.

Two servers cannot both commit. A server writes its commit beside the claims of epochs, then looks for a higher claim,
then links the commit to its number on the line. A new server claims first, then removes what others have written beside
the claims, then reads the line. So either the old server finds the new claim, or its commit is on the line that the new
one reads, or it has nothing to link any more. No clock and no waiting is involved. Calls to silos and heart beats tell
them what a server has decided. They are published in the same way, so a new server reads all that an old one has said.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmpi.errors import ConfigError, Superseded
from fedmpi.files import claims, names
from fedmpi.files.beats import Heart, Leases, Pulse
from fedmpi.files.claims import Claim
from fedmpi.files.envelope import Buffer, Envelope, Torn, packed, unpacked
from fedmpi.files.folder import Folder
from fedmpi.files.line import NEVER, Commit, Entry, File, Line, answered
from fedmpi.files.reading import Damaged, noted, of_silos, read_at, read_of_silo
from fedmpi.files.root import open_run
from fedmpi.files.sums import Decisions
from fedmpi.files.tidy import Tidy


@dataclass(frozen=True)
class Arrived:
    """An update that is whole. `entry(counts)` is what a commit says of it."""

    silo: str
    number: int  # of the silo's training, from 0
    by: int  # incarnation of the silo's job
    content: Envelope

    def entry(self, counts: bool = True) -> Entry:
        """This update as an entry of a commit; `counts` False: it is dropped."""
        return Entry(self.silo, self.number, self.by, self.content.digest, counts)


class Server:
    """The folder as the server sees it; made by `start`. Raises Superseded when a newer server has taken over."""

    def __init__(self, folder: Folder, run: str, claim: Claim, lease_s: float, keep: int, keep_updates: bool) -> None:
        self.folder, self.run, self.epoch = folder, run, claim.number
        self.leases = Leases(folder, lease_s)
        self._claim = claim
        self._line = Line(folder, run)
        beside = names.path(names.EPOCHS, names.BEAT, claim.number, 0)
        self._heart = Heart(folder, run, names.SERVER, claim.number, beside, claim.require_newest)
        self._registered: dict[str, tuple[int, dict[str, Any]]] = {}
        self._taken: dict[str, tuple[int, int]] = {}  # by silo: last update read and its incarnation
        self._damaged = Damaged(folder)
        self._tidy = Tidy(folder, self.epoch, keep, keep_updates, self._line)
        claim.sweep()
        self._recent = deque((c for c in self._line.retained()), maxlen=keep)
        self._line.look()

    @classmethod
    def start(
        cls,
        folder: Folder,
        run_about: Mapping[str, Any],
        about: Mapping[str, Any],
        *,
        lease_s: float = 60.0,
        keep: int = 3,
        keep_updates: bool = False,
    ) -> Server:
        """Become the server of the run in this folder.

        `run_about` identifies the run (compared by all jobs), `about` this job (host, job id; for messages). Waits
        until the lease of an earlier server has ended; returns at once if that one said that it ended. `keep` versions
        keep their files; with `keep_updates` all committed updates are kept. Raises ConfigError if another server is
        alive.
        """
        run = open_run(folder, run_about)
        _wait_for_lease(folder, lease_s)
        claim = Claim.take(folder, run, names.EPOCHS, "", about)
        return cls(folder, run, claim, lease_s, keep, keep_updates)

    # ------------------------------------------------------------ the line

    @property
    def head(self) -> Commit | None:
        """The newest commit; None before the first. No operation: only this server commits."""
        return self._line.head

    def put(self, kind: str, number: int, head: Mapping[str, Any], payload: Sequence[Buffer] = ()) -> File:
        """Write a file for silos to read, and return what a commit says of it. `number` is a version, or counts up;
        the last few of a kind are kept, and those that the last commits name. Silos go by names.CALL at once: it raises
        Superseded if a newer server has taken over."""
        fixed = {"kind": kind, "run": self.run, "who": kind, "number": number, "by": self.epoch}
        parts, digest = packed({**head, **fixed}, payload)
        path, beside = names.path(names.NOTES, kind, number, self.epoch), ""
        if kind == names.CALL:
            beside = names.path(names.EPOCHS, kind, self.epoch, number)
        self.folder.publish(path, parts, beside, self._claim.require_newest if beside else None)
        self._tidy.wrote(kind, number)
        return File(kind, number, self.epoch, digest)

    def fetch(self, file: File) -> Envelope | None:
        """A file of the server that a commit names, to resume from it; None if it was removed."""
        return noted(self.folder, self.run, file)

    def is_whole(self, file: File) -> bool:
        """Whether a file that `put` has written can be read as it was written; True while the folder is away. A read,
        without waiting."""
        try:
            content = self.folder.read(names.path(names.NOTES, file.kind, file.number, file.epoch))
            return unpacked(content).digest == file.digest
        except (FileNotFoundError, Torn):
            return False
        except OSError:
            return True

    def mend(self, file: File, payload: Sequence[Buffer] = ()) -> bool:
        """Write a file of a commit again if it is not whole; it has this payload, and its head told nothing. Returns
        whether it is whole now. Raises Superseded."""
        if self.fetch(file) is not None:
            return True
        fixed = {"kind": file.kind, "run": self.run, "who": file.kind, "number": file.number, "by": file.epoch}
        parts, digest = packed(fixed, payload)
        if digest != file.digest:
            return False
        self._claim.require_newest()
        self.folder.publish(names.path(names.NOTES, file.kind, file.number, file.epoch), parts)
        return True

    def commit(
        self, entries: Sequence[Entry], files: Sequence[File], about: Mapping[str, Any], ended: bool = False
    ) -> Commit:
        """Commit the next version: it answers the updates of `entries`, and `files` belong to it. `about` is free JSON.

        Raises ValueError if an update was answered before, Superseded, and FolderError if it is not known whether the
        commit was made (a new start finds out).
        """
        parent = self._line.head
        version, digest = (0, "") if parent is None else (parent.version + 1, parent.digest)
        last = answered({} if parent is None else parent.last, entries)
        head = {
            **{"kind": "commit", "run": self.run, "number": version, "by": self.epoch, "parent": digest},
            **{"entries": [list(e) for e in entries], "files": [list(f) for f in files], "ended": ended},
            **{"last": {silo: list(row) for silo, row in last.items()}, "about": dict(about)},
        }
        parts, digest = packed(head)
        path, beside = names.path(names.LINE, "", version), names.path(names.EPOCHS, names.COMMIT, self.epoch, version)
        if not self.folder.publish_first(path, parts, beside, self._claim.require_newest):
            raise Superseded(f"version {version} was committed by another server than this one (epoch {self.epoch})")
        commit = Commit.of(head, digest)
        self._line.follow(commit)
        self._recent.append(commit)
        self._tidy.committed(commit, self._recent)
        return commit

    def recent(self) -> list[Commit]:
        """The last commits, oldest first; as many as keep their files."""
        return list(self._recent)

    # ------------------------------------------------------------ to compute committed versions again

    def commit_of(self, version: int) -> Commit | None:
        """The commit of a version, with `keep_updates` also after it left the line; None if it was removed."""
        commit, path = self._line.read(version), names.path(names.KEPT, names.SERVER, version)
        if commit is None and os.path.basename(path) in self.folder.listed(names.KEPT):
            content = read_at(self.folder, path)
            if content is not None and (content.head["kind"], content.head["run"]) == ("commit", self.run):
                commit = Commit.of(content.head, content.digest)
        return commit

    def kept(self, entry: Entry) -> Envelope | None:
        """The update of a commit, with `keep_updates`; None if it was removed."""
        for where in (names.KEPT, names.OF_SILOS[names.UPDATE]):
            path = names.path(where, entry.silo, entry.number, entry.by)
            if os.path.basename(path) in self.folder.listed(where):
                content = read_at(self.folder, path)
                if content is not None and content.digest == entry.digest:
                    return content
        return None

    def drop_kept(self, entry: Entry) -> None:
        """Remove a kept update."""
        self.folder.remove(names.path(names.KEPT, entry.silo, entry.number, entry.by))

    def forget(self, version: int) -> None:
        """Remove the kept files that no server needs which resumes from this version or a later one: commits before it,
        and updates of no commit after it. Operations: a listing, and a read of each later commit. Raises Superseded."""
        self._claim.require_newest()
        kept = [row for row in map(names.parsed, self.folder.listed(names.KEPT)) if row is not None]
        for who, (number, *_) in kept:
            if who == names.SERVER and number < version:
                self.folder.remove(names.path(names.KEPT, who, number))
        last = -1 if self.head is None else self.head.version
        later = [self.commit_of(number) for number in range(version + 1, last + 1)]
        if None in later:
            return  # what it needs is not known
        needed = {entry[:3] for commit in later if commit is not None for entry in commit.entries}
        for who, numbers in kept:
            if who != names.SERVER and (who, *numbers) not in needed:
                self.folder.remove(names.path(names.KEPT, who, *numbers))

    # ------------------------------------------------------------ silos

    def registrations(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """By silo: the incarnation that registered last, and what it says of itself. Operations: a listing, and a read
        for each new one."""
        for silo, number in claims.claimed(self.folder, names.SILOS).items():
            if self._registered.get(silo, (0, {}))[0] < number:
                head = claims.read(self.folder, names.SILOS, silo, number)
                if head is not None:  # else seen at the next call
                    self._registered[silo] = (number, head["about"])
        return dict(self._registered)

    def poll(self, promised: Collection[tuple[str, int, int]] = ()) -> list[Arrived]:
        """The updates that have become whole since the last call, each once, a silo's in their order. Operations: a
        listing, and a read for each new file.

        An update is returned again only by a later server, if no commit has answered it. Of two files with one number
        (a silo's old job that still wrote beside its new one) one is returned: that of `promised` (silo, number,
        incarnation), if it is there.
        """
        arrived, found = [], of_silos(self.folder, names.UPDATE)
        chosen = {row[:2]: row[2] for row in promised if row in found}
        for silo, number, by in found:
            if number != self._expected(silo) or by != chosen.get((silo, number), by):
                continue
            content = read_of_silo(self.folder, self.run, names.UPDATE, silo, number, by)
            path = names.path(names.OF_SILOS[names.UPDATE], silo, number, by)
            if content is None:
                if self._damaged.too_long(path):  # the silo finds it gone and writes it again
                    self._take_away(path)
                continue
            self._damaged.whole(path)
            self._taken[silo] = (number, by)
            arrived.append(Arrived(silo, number, by, content))
        return arrived

    def gives_up(self, silo: str, number: int, by: int) -> bool:
        """Whether an update that `poll` waits for could not be read for DAMAGED_S. Then it never returns it: the next
        commit has to drop it. Raises Superseded."""
        path = names.path(names.OF_SILOS[names.UPDATE], silo, number, by)
        if number != self._expected(silo) or not self._damaged.too_long(path):
            return False
        self._take_away(path)
        self._taken[silo] = (number, by)
        return True

    def _take_away(self, path: str) -> None:
        """Remove a damaged file of a silo. Not the one that the silo has written in its place, if this process was
        suspended after its look: that gets its name back. Raises Superseded."""
        self._claim.require_newest()
        aside = f"{path}{names.PART}{self.folder.token()}"
        with contextlib.suppress(OSError, Torn):
            self.folder.rename(path, aside)
            unpacked(self.folder.read(aside))
            self.folder.link(aside, path)
        self.folder.remove(aside)

    def _expected(self, silo: str) -> int:
        head = self._line.head
        last = NEVER if head is None else head.last.get(silo, NEVER)
        return max(last.number, self._taken.get(silo, (-1, 0))[0]) + 1

    def silo_files(self, kind: str) -> list[tuple[str, int, int]]:
        """Silo, number and incarnation of all files of a kind that are there."""
        return of_silos(self.folder, kind)

    def read_silo(self, kind: str, silo: str, number: int, by: int) -> Envelope | None:
        """A file or letter of a silo; None while it is not whole."""
        return read_of_silo(self.folder, self.run, kind, silo, number, by)

    def is_damaged(self, kind: str, silo: str, number: int, by: int) -> bool:
        """Whether a file of a silo, which is not whole, has been so for DAMAGED_S."""
        return self._damaged.too_long(names.path(names.OF_SILOS[kind], silo, number, by))

    def remove(self, kind: str, silo: str, number: int, by: int) -> None:
        """Remove a file of a silo that is not needed any more. Answered updates are removed by `commit`."""
        self.folder.remove(names.path(names.OF_SILOS[kind], silo, number, by))

    # ------------------------------------------------------------ secure sums

    def decide(self, what: str, serial: int, head: Mapping[str, Any], payload: Sequence[Buffer] = ()) -> Envelope:
        """Decide something about a sum (sums.py), unless it is decided. Returns what holds. Raises Superseded."""
        fixed = {"kind": "decision", "run": self.run, "who": what, "number": serial, "by": self.epoch}
        parts, _ = packed({**head, **fixed}, payload)
        path, beside = names.path(names.SECURE, what, serial), names.path(names.EPOCHS, what, self.epoch, serial)
        self.folder.publish_first(path, parts, beside, self._claim.require_newest)
        return Decisions(self.folder, self.run).wait(what, serial)

    def forget_sums(self, serial: int) -> None:
        """Remove the letters of sums up to this one, and the decisions about earlier ones. Raises Superseded."""
        self._claim.require_newest()
        for where in names.SUM_FOLDERS:
            for name in self.folder.listed(where):
                found = names.parsed(name.partition(names.PART)[0])
                if found is not None and found[1][0] <= serial - (where == names.SECURE):
                    self.folder.remove(f"{where}/{name}")

    # ------------------------------------------------------------ being there

    def require_newest(self) -> None:
        """Raise Superseded if a newer server has taken over. A listing."""
        self._claim.require_newest()

    def beat(self, about: Mapping[str, Any], ended: bool = False) -> None:
        """Show that the server is alive, at least four times a lease; also tells silos which updates it has read.
        Raises Superseded. Safe in another thread."""
        self._heart.beat({**about, "taken": {silo: list(last) for silo, last in self._taken.copy().items()}}, ended)


def _wait_for_lease(folder: Folder, lease_s: float) -> None:
    """Return when no other server is alive. Raises ConfigError if one is."""
    leases, epoch = Leases(folder, lease_s), claims.claimed(folder, names.EPOCHS).get("", 0)
    if epoch == 0:
        return
    first: Pulse | None = None
    until_s = folder.now() + lease_s
    while folder.now() <= until_s:
        leases.look(names.SERVER)
        pulse = leases.pulses.get(names.SERVER)
        newest = claims.claimed(folder, names.EPOCHS).get("", 0)
        if pulse is not None and pulse.ended and pulse.by == newest:
            return
        if newest > epoch or (first is not None and pulse is not first):
            owner = claims.read(folder, names.EPOCHS, "", newest)
            about = {} if owner is None else owner["about"]
            told = [f"{key} {value}" for key, value in about.items() if value != ""]
            who = f" ({', '.join(told)})" if told else ""
            raise ConfigError(f"transport.root: another server{who} of the run in {folder.root} is alive")
        if first is None and pulse is not None:
            first, until_s = pulse, folder.now() + lease_s
        folder.wait(lease_s / 16)
