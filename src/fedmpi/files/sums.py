"""Secure sums: what the server decides about them, once each and for all its starts.

    members     whose updates are ready: silo, update, incarnation, public keys; from now on nobody joins the sum
    roster      which members have shared their secrets, with all sealed shares
    survivors   which of the roster are in the sum, or why it is given up
    closed      the sum is done with, for sums that no commit ends

A decision is a file made by the first link to its name, by a server whose epoch is the highest, as a commit is. So a
sum has one set of members, one roster and one set of survivors, whichever starts of the server have asked for them. A
decision holds the digest of the one before it.
"""

from __future__ import annotations

from fedmpi.errors import FolderError
from fedmpi.files import names
from fedmpi.files.envelope import Envelope, Torn, unpacked
from fedmpi.files.folder import Folder, Pace
from fedmpi.files.reading import Damaged


class Decisions:
    """The decisions as a job sees them."""

    def __init__(self, folder: Folder, run: str) -> None:
        self._folder, self._run = folder, run
        self._listed: set[str] = set()
        self._damaged = Damaged(folder)

    def look(self) -> Decisions:
        """List them. One operation."""
        self._listed = {*self._folder.listed(names.SECURE)}
        return self

    def read(self, what: str, serial: int) -> Envelope | None:
        """A decision about a sum, if it was listed and is whole."""
        path = names.path(names.SECURE, what, serial)
        if path.rpartition("/")[2] not in self._listed:
            return None
        try:
            found = unpacked(self._folder.read(path), kind="decision", run=self._run, who=what, number=serial)
        except (OSError, Torn):
            self._damaged.too_long(path)  # from now on
            return None
        self._damaged.whole(path)
        return found

    def is_damaged(self, what: str, serial: int) -> bool:
        """Whether a decision is listed, and could not be read for DAMAGED_S. It never changes, so it stays so."""
        path = names.path(names.SECURE, what, serial)
        return path.rpartition("/")[2] in self._listed and self._damaged.too_long(path)

    def made(self, what: str, serial: int) -> Envelope | None:
        """A decision about a sum, if it is listed now. A listing, and a read. Raises FolderError."""
        listed = names.path(names.SECURE, what, serial).rpartition("/")[2] in self.look()._listed
        return self.wait(what, serial) if listed else None

    def wait(self, what: str, serial: int) -> Envelope:
        """A decision that is made. Raises FolderError if it cannot be read."""
        pace = Pace.of_errors(self._folder)
        while (found := self.look().read(what, serial)) is None:
            if pace.over():
                path = names.path(names.SECURE, what, serial)
                raise FolderError(f"{self._folder.root}: cannot read {path}")
            pace.wait()
        return found


def make_folders(folder: Folder) -> None:
    """Create the folders of secure sums if they do not exist."""
    there = folder.listed("")
    for name in names.SUM_FOLDERS:
        if name not in there:
            folder.tried(f"make {name}", lambda name=name: folder.make(name))  # type: ignore[misc]
