"""The commits: one line of versions, each made by the first link to its number.

A commit names its parent's digest, the updates that it takes or drops, the files that belong to it, and for each silo
the last update that the line has answered. An update counts if and only if a commit of the line takes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedmpi.errors import FolderError
from fedmpi.files import names
from fedmpi.files.envelope import Torn, unpacked
from fedmpi.files.folder import Folder, Pace


class Entry(NamedTuple):
    """An update in a commit."""

    silo: str
    number: int  # of the silo's training, from 0
    by: int  # incarnation of the silo's job that wrote it
    digest: str
    counts: bool  # False: answered, but dropped


class Last(NamedTuple):
    """What the line says of a silo: its last answered update, and the last one that counted (-1, 0: none)."""

    number: int
    by: int
    counted: int
    counted_by: int


class File(NamedTuple):
    """A file of the server, as a commit names it."""

    kind: str
    number: int
    epoch: int
    digest: str


@dataclass(frozen=True)
class Commit:
    """A version of the line."""

    version: int
    epoch: int  # of the server that made it
    parent: str  # digest of the commit before; empty for the first one
    entries: tuple[Entry, ...]  # in order of arrival
    files: dict[str, File]  # by kind
    last: dict[str, Last]  # by silo, of all commits so far
    about: dict[str, Any]  # the engine's: record, cohort, ...
    ended: bool  # whether the run is over
    digest: str = field(compare=False)  # SHA-256 of this commit's file

    @classmethod
    def of(cls, head: Mapping[str, Any], digest: str) -> Commit:
        """The commit in a file."""
        return cls(
            head["number"],
            head["by"],
            head["parent"],
            tuple(Entry(*row) for row in head["entries"]),
            {row[0]: File(*row) for row in head["files"]},
            {silo: Last(*row) for silo, row in head["last"].items()},
            head["about"],
            head["ended"],
            digest,
        )


NEVER = Last(-1, 0, -1, 0)


def versions(names_there: Iterable[str]) -> list[int]:
    """The versions of the commits among these names of files, sorted."""
    return sorted(numbers[0] for _, numbers in filter(None, map(names.parsed, names_there)))


def newest(folder: Folder) -> Commit | None:
    """The newest commit of whatever run the folder holds, at one look; None if there is none, or it cannot be read.
    Raises OSError if the folder cannot be listed."""
    if not (there := versions(folder.listing(names.LINE))):
        return None
    try:
        content = unpacked(folder.read(names.path(names.LINE, "", there[-1])), kind="commit")
    except (OSError, Torn):
        return None
    return Commit.of(content.head, content.digest)


def answered(last: Mapping[str, Last], entries: Iterable[Entry]) -> dict[str, Last]:
    """`last` after a commit with these entries. Raises ValueError unless each silo's numbers follow one another, so
    that no update is answered twice.

    >>> answered({}, [Entry("a", 0, 1, "", True), Entry("a", 1, 1, "", False)])
    {'a': Last(number=1, by=1, counted=0, counted_by=1)}
    """
    after = dict(last)
    for entry in entries:
        before = after.get(entry.silo, NEVER)
        if entry.number != before.number + 1:
            raise ValueError(f"silo '{entry.silo}': update {entry.number} after {before.number}")
        counted = (entry.number, entry.by) if entry.counts else (before.counted, before.counted_by)
        after[entry.silo] = Last(entry.number, entry.by, *counted)
    return after


class Line:
    """The line as this process has seen it; what it has seen only grows."""

    def __init__(self, folder: Folder, run: str, news: Callable[[Commit], None] = lambda commit: None) -> None:
        self._folder, self._run, self._news = folder, run, news  # `news` is called for each commit that is followed
        self.head: Commit | None = None  # the newest commit seen

    def look(self) -> Commit | None:
        """The newest commit; None before the first. Operations: a listing, and a read for each new commit.

        Raises FolderError if a commit does not follow from the one before it, or cannot be read.
        """
        versions = self._versions()
        while versions and (self.head is None or versions[-1] > self.head.version):
            # Every version in between is read while it is there; an old reader jumps over those that were removed.
            known = -1 if self.head is None else self.head.version
            upcoming = versions[-1] if self.head is None or known + 1 not in versions else known + 1
            if (commit := self.read(upcoming)) is None:  # removed since
                versions = self._versions()
                continue
            self.follow(commit)
        return self.head

    def follow(self, commit: Commit) -> None:
        """Go on to a commit. Raises FolderError if it does not follow from the head."""
        head = self.head
        if head is not None and commit.version == head.version + 1 and commit.parent != head.digest:
            raise FolderError(f"{self._folder.root}: commit {commit.version} does not follow from {head.version}")
        self.head = commit
        self._news(commit)

    def _versions(self) -> list[int]:
        return versions(self._folder.listed(names.LINE))

    def read(self, version: int) -> Commit | None:
        """The commit of a version that was listed; None if it is there no more. Raises FolderError."""
        path = names.path(names.LINE, "", version)
        pace = Pace.of_errors(self._folder)
        while True:
            try:
                content = unpacked(self._folder.read(path), kind="commit", run=self._run, number=version)
                return Commit.of(content.head, content.digest)
            except FileNotFoundError as error:
                if version not in self._versions():
                    return None
                problem: Exception = error
            except (OSError, Torn) as error:
                problem = error
            if pace.over():
                raise FolderError(f"{self._folder.root}: cannot read commit {version}: {problem}")
            pace.wait()

    def retained(self) -> list[Commit]:
        """The commits that are there, oldest first; each but the first follows from the one before."""
        commits = [commit for version in self._versions() if (commit := self.read(version)) is not None]
        for before, after in itertools.pairwise(commits):
            if after.version == before.version + 1 and after.parent != before.digest:
                raise FolderError(f"{self._folder.root}: commit {after.version} does not follow from {before.version}")
        return commits
