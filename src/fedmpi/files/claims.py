"""Who may write: numbers that only grow, each for one process. The highest one rules.

The server claims an epoch, a silo's job an incarnation. A claim is a file made by link, so each number has one owner.
A process that finds a higher number than its own raises Superseded and ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedmpi.errors import FolderError, Superseded
from fedmpi.files import names
from fedmpi.files.envelope import Torn, packed, unpacked
from fedmpi.files.folder import Folder, Pace

KEPT_CLAIMS = 16  # older claims of the same name are removed


def claimed(folder: Folder, where: str) -> dict[str, int]:
    """The highest number claimed, by name ('' for the server's epochs)."""
    highest: dict[str, int] = {}
    for name in folder.listed(where):
        match names.parsed(name):
            case (who, (number,)):
                highest[who] = max(number, highest.get(who, 0))
    return highest


def read(folder: Folder, where: str, who: str, number: int) -> dict[str, Any] | None:
    """What a claim says of its owner; None if it cannot be read now."""
    try:
        return unpacked(folder.read(names.path(where, who, number)), kind="claim", who=who).head
    except (OSError, Torn):
        return None


@dataclass(frozen=True)
class Claim:
    """A number that this process owns: `where` is the folder, `who` the silo, empty for the server."""

    folder: Folder
    where: str
    who: str
    number: int

    @classmethod
    def take(cls, folder: Folder, run: str, where: str, who: str, about: Mapping[str, Any]) -> Claim:
        """Claim the next number. Raises FolderError."""
        head = {"kind": "claim", "run": run, "who": who, "token": folder.token(), "about": dict(about)}
        while True:
            number = claimed(folder, where).get(who, 0) + 1
            parts, _ = packed(head | {"number": number})
            if folder.publish_first(names.path(where, who, number), parts):
                return cls(folder, where, who, number)

    def require_newest(self) -> None:
        """Raise Superseded if a higher number is claimed."""
        newest = claimed(self.folder, self.where).get(self.who, 0)
        if newest > self.number:
            name = f"silo '{self.who}'" if self.who else "server"
            raise Superseded(
                f"this start ({self.number}) of the {name} is superseded by a newer one ({newest}); it writes no more"
            )

    def sweep(self) -> None:
        """Make sure that no owner of a lower number gives a name to a file that it has written into this folder of
        claims: a commit, its word to all silos, a heart beat.

        It writes the file first, then looks for higher claims, then links or renames. This call comes after the claim,
        and removes such files: either the other finds the claim, or its file is gone. Raises FolderError if one cannot
        be removed.
        """
        pace = Pace.of_errors(self.folder)
        while old := [name for name in self.folder.listed(self.where) if self._is_older(name)]:
            gone = [self.folder.remove(f"{self.where}/{name}") for name in old]
            if not all(gone):
                if pace.over():
                    stays = old[gone.index(False)]
                    raise FolderError(f"{self.folder.root}: cannot remove {self.where}/{stays}; remove it by hand")
                pace.wait()

    def _is_older(self, name: str) -> bool:
        front, dot, _ = name.partition(names.PART)
        match names.parsed(front) if dot else None:
            case (who, (number, _)) if who:
                return number < self.number
        return False
