"""Removing what is not needed any more, so that folders stay small.

A removal follows from the line alone, and from numbers that only grow. So it is right also when a server that was
superseded does it late: that one has seen a beginning of the line.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence

from fedmpi.errors import FolderError
from fedmpi.files import names
from fedmpi.files.claims import KEPT_CLAIMS
from fedmpi.files.folder import Folder
from fedmpi.files.line import NEVER, Commit, Line
from fedmpi.files.reading import of_silos

KEPT_COMMITS = 64  # commits that stay on the line
PART_S = 3600.0  # age at which a temporary file is removed; its writer, if it is alive, writes it again


class Tidy:
    """Removes files for the server of an epoch. `keep` versions keep their files."""

    def __init__(self, folder: Folder, epoch: int, keep: int, keep_updates: bool) -> None:
        self._folder, self._epoch, self._keep, self._keep_updates = folder, epoch, keep, keep_updates
        self._written: dict[str, list[int]] = defaultdict(list)  # by kind: numbers of this epoch's files
        self._first_seen_s: dict[str, float] = {}  # temporary files, on this process's clock

    def wrote(self, kind: str, number: int) -> None:
        """This server has written a file."""
        if number not in self._written[kind]:
            self._written[kind].append(number)

    def committed(self, commit: Commit, recent: Sequence[Commit]) -> None:
        """Remove what this commit has made superfluous, by name: no listing."""
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

    def everything(self, line: Line, recent: Sequence[Commit]) -> None:
        """Remove what earlier processes have left, too. Lists every folder."""
        head = line.head
        if head is not None:
            self._updates(line, head)
            self._notes(head, recent)
            for version in self._numbers(names.LINE, ""):
                if version <= head.version - KEPT_COMMITS:
                    self._uncommit(version)
        for number in self._numbers(names.EPOCHS, ""):
            if number <= self._epoch - KEPT_CLAIMS:
                self._folder.remove(names.path(names.EPOCHS, "", number))
        for where in (names.SILOS, names.BEATS):
            self._older(where)
        self._parts()

    def _numbers(self, where: str, who: str) -> list[int]:
        parsed = (names.parsed(name) for name in self._folder.listed(where))
        return [numbers[0] for name, numbers in filter(None, parsed) if name == who and len(numbers) == 1]

    def _updates(self, line: Line, head: Commit) -> None:
        counted = set()
        if self._keep_updates:
            counted = {entry[:3] for commit in line.retained() for entry in commit.entries if entry.counts}
        for row in of_silos(self._folder, names.UPDATE):
            if row[1] <= head.last.get(row[0], NEVER).number:
                self._answered(*row, counts=row in counted)
        newest = {silo: number for silo, number, _ in of_silos(self._folder, names.SCORE)}
        for silo, number, by in of_silos(self._folder, names.SCORE):
            if number < newest.get(silo, 0):
                self._folder.remove(names.path(names.OF_SILOS[names.SCORE], silo, number, by))

    def _notes(self, head: Commit, recent: Sequence[Commit]) -> None:
        named = {file[:3] for one in (*recent, head) for file in one.files.values()}
        for name in self._folder.listed(names.NOTES):
            match names.parsed(name):
                case (kind, (number, epoch)) if epoch <= self._epoch and (kind, number, epoch) not in named:
                    if epoch < self._epoch or number not in self._written[kind][-self._keep :]:
                        self._folder.remove(f"{names.NOTES}/{name}")

    def _older(self, where: str) -> None:
        """Remove all but the last two numbers of everyone."""
        found: dict[str, list[int]] = defaultdict(list)
        for name in self._folder.listed(where):
            match names.parsed(name):
                case (who, (number,)):
                    found[who].append(number)
        for who, numbers in found.items():
            for number in sorted(numbers)[:-2]:
                self._folder.remove(names.path(where, who, number))

    def _parts(self) -> None:
        now_s, there = self._folder.now(), set()
        for where in ("", *names.FOLDERS):
            try:
                listed = self._folder.listed(where)
            except FolderError:
                continue
            there |= {os.path.join(where, name) for name in listed if names.PART in name}
        self._first_seen_s = {path: self._first_seen_s.get(path, now_s) for path in there}
        for path, since_s in self._first_seen_s.items():
            if now_s - since_s > PART_S:
                self._folder.remove(path)
