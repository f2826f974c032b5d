"""Removing what is not needed any more, so that folders stay small.

A removal follows from the line alone, and from numbers that only grow. So it is right also when a server that was
superseded does it late: that one has seen a beginning of the line.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence

from fedmpi.errors import FolderError
from fedmpi.files import names
from fedmpi.files.claims import KEPT_CLAIMS
from fedmpi.files.folder import Folder
from fedmpi.files.line import NEVER, Commit, Line

KEPT_COMMITS = 64  # commits that stay on the line
EVERY = 64  # versions, after which everything is looked through
PART_S = 3600.0  # age at which a temporary file is removed; its writer, if it is alive, writes it again


class Tidy:
    """Removes files for the server of an epoch. `keep` versions keep their files."""

    def __init__(self, folder: Folder, epoch: int, keep: int, keep_updates: bool, line: Line) -> None:
        self._folder, self._epoch, self._keep, self._keep_updates = folder, epoch, keep, keep_updates
        self._line = line
        self._written: dict[str, list[int]] = defaultdict(list)  # by kind: numbers of this epoch's files
        self._first = True  # nothing was looked through yet
        self._first_seen_s: dict[str, float] = {}  # temporary files, on this process's clock

    def wrote(self, kind: str, number: int) -> None:
        """This server has written a file."""
        if number not in self._written[kind]:
            self._written[kind].append(number)

    def committed(self, commit: Commit, recent: Sequence[Commit]) -> None:
        """Remove what this commit has made superfluous, by name. Lists no folder, but every 64 versions."""
        for entry in commit.entries:
            self._answered(entry.silo, entry.number, entry.by, entry.counts)
        named = {file[:3] for one in recent for file in one.files.values()}
        for kind, numbers in self._written.items():
            for number in numbers[: -self._keep]:
                if (kind, number, self._epoch) not in named:
                    self._folder.remove(names.path(names.NOTES, kind, number, self._epoch))
                    numbers.remove(number)
        if commit.version >= KEPT_COMMITS:
            self._uncommit(commit.version - KEPT_COMMITS)
        if self._first or commit.version % EVERY == 0:
            self._first = False
            self.everything(commit, recent)

    def _answered(self, silo: str, number: int, by: int, counts: bool) -> None:
        path = names.path(names.OF_SILOS[names.UPDATE], silo, number, by)
        if self._keep_updates and counts:
            try:
                self._folder.rename(path, names.path(names.KEPT, silo, number, by))
            except OSError:
                return  # `everything` comes again
        else:
            self._folder.remove(path)

    def _uncommit(self, version: int) -> None:
        path = names.path(names.LINE, "", version)
        if self._keep_updates:
            try:
                self._folder.rename(path, names.path(names.KEPT, names.SERVER, version))
            except OSError:
                return
        else:
            self._folder.remove(path)

    def everything(self, head: Commit, recent: Sequence[Commit]) -> None:
        """Remove what earlier processes have left, too. Lists every folder; one that cannot be listed is left alone."""
        self._updates(head)
        self._notes(recent)
        for version in self._numbers(names.LINE):
            if version <= head.version - KEPT_COMMITS:
                self._uncommit(version)
        for number in self._numbers(names.EPOCHS):
            if number <= self._epoch - KEPT_CLAIMS:
                self._folder.remove(names.path(names.EPOCHS, "", number))
        claims = self._older(names.SILOS) | {"": self._epoch, names.SERVER: self._epoch}
        self._older(names.BEATS)
        self._parts(claims)

    def _listed(self, where: str) -> list[str]:
        with contextlib.suppress(OSError):
            return self._folder.listing(where)
        return []

    def _numbers(self, where: str) -> list[int]:
        return [int(name) for name in self._listed(where) if name.isdigit()]

    def _of_silos(self, kind: str) -> list[tuple[str, int, int]]:
        parsed = map(names.parsed, self._listed(names.OF_SILOS[kind]))
        return [(row[0], row[1][0], row[1][1]) for row in parsed if row is not None and len(row[1]) == 2]

    def _updates(self, head: Commit) -> None:
        old = [row for row in self._of_silos(names.UPDATE) if row[1] <= head.last.get(row[0], NEVER).number]
        counted: set[tuple[str, int, int]] = set()
        if old and self._keep_updates:  # a commit could not move them
            try:
                commits = self._line.retained()
            except FolderError:
                return
            counted = {entry[:3] for commit in commits for entry in commit.entries if entry.counts}
        for row in old:
            self._answered(*row, counts=row in counted)
        scores = self._of_silos(names.SCORE)
        newest = {silo: number for silo, number, _ in sorted(scores)}
        for silo, number, by in scores:
            if number < newest[silo]:
                self._folder.remove(names.path(names.OF_SILOS[names.SCORE], silo, number, by))

    def _notes(self, recent: Sequence[Commit]) -> None:
        named = {file[:3] for one in recent for file in one.files.values()}
        for name in self._listed(names.NOTES):
            match names.parsed(name):
                case (kind, (number, epoch)) if epoch <= self._epoch and (kind, number, epoch) not in named:
                    if epoch < self._epoch or number not in self._written[kind][-self._keep :]:
                        self._folder.remove(f"{names.NOTES}/{name}")

    def _older(self, where: str) -> dict[str, int]:
        """Remove all but everyone's last two numbers; returns the last ones."""
        numbers: dict[str, list[int]] = defaultdict(list)
        for name in self._listed(where):
            match names.parsed(name):
                case (who, (number,)):
                    numbers[who].append(number)
        for who, found in numbers.items():
            for number in sorted(found)[:-2]:
                self._folder.remove(names.path(where, who, number))
        return {who: max(found) for who, found in numbers.items()}

    def _parts(self, claims: Mapping[str, int]) -> None:
        """Remove temporary files: at once if the claim of their writer is not the newest, else by their age."""
        now_s, seen = self._folder.now(), self._first_seen_s
        self._first_seen_s = {}
        for where in ("", *names.FOLDERS):
            for name in self._listed(where):
                front, part, _ = name.partition(names.PART)
                path = os.path.join(where, name)
                if part and (self._is_old(where, front, claims) or now_s - seen.get(path, now_s) > PART_S):
                    self._folder.remove(path)
                elif part:
                    self._first_seen_s[path] = seen.get(path, now_s)

    def _is_old(self, where: str, front: str, claims: Mapping[str, int]) -> bool:
        if front == "probe":
            return True  # its owner tries again
        match names.parsed(front):
            case (who, (number,)) if where in (names.EPOCHS, names.SILOS):  # a claim of a number that is claimed
                return number <= claims.get(who, 0)
            case (who, (*_, by)) if where in (names.BEATS, *names.OF_SILOS.values()):
                return by < claims.get(who, 0)
            case (_, (_, epoch)) if where == names.NOTES:
                return epoch < self._epoch
        return False
