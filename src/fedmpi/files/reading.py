"""Reading files of the server and of silos, which may not be whole yet."""

from __future__ import annotations

from fedmpi.files import names
from fedmpi.files.envelope import Envelope, Torn, unpacked
from fedmpi.files.folder import Folder, Pace
from fedmpi.files.line import File

DAMAGED_S = 300.0  # after this time a file that is not whole is given up


def of_silos(folder: Folder, kind: str) -> list[tuple[str, int, int]]:
    """Silo, number and incarnation of the files of a kind, sorted by number. One listing."""
    found = []
    for name in folder.listed(names.FOLDER_OF[kind]):
        match names.parsed(name):
            case (silo, (number, by)):
                found.append((silo, number, by))
    return sorted(found, key=lambda row: row[1:])


def read_of_silo(folder: Folder, run: str, kind: str, silo: str, number: int, by: int) -> Envelope | None:
    """A silo's file; None while it is not whole or cannot be read."""
    try:
        content = folder.read(names.path(names.FOLDER_OF[kind], silo, number, by))
        return unpacked(content, kind=kind, run=run, who=silo, number=number, by=by)
    except (OSError, Torn):
        return None


def read_at(folder: Folder, path: str) -> Envelope | None:
    """A file that is listed. Tries again for `patience_s` seconds; then None."""
    pace, until_s = Pace(folder, 0.05, 5.0), folder.now() + folder.patience_s
    while True:
        try:
            return unpacked(folder.read(path))
        except (OSError, Torn):
            if folder.now() >= until_s:
                return None
        pace.wait()


def notes(folder: Folder, kind: str) -> list[tuple[int, int]]:
    """Epoch and number of the server's files of a kind, sorted. One listing."""
    found = []
    for name in folder.listed(names.NOTES):
        match names.parsed(name):
            case (who, (number, epoch)) if who == kind:
                found.append((epoch, number))
    return sorted(found)


def noted(folder: Folder, run: str, file: File) -> Envelope | None:
    """A file of the server; None if it is not there any more. Waits until it is whole. An empty digest matches all."""
    path = names.path(names.NOTES, file.kind, file.number, file.epoch)
    pace = Pace.of_errors(folder)
    while True:
        try:
            content = unpacked(folder.read(path), kind=file.kind, run=run, number=file.number, by=file.epoch)
            if file.digest in ("", content.digest):
                return content
        except FileNotFoundError:
            if (file.epoch, file.number) not in notes(folder, file.kind):
                return None
        except (OSError, Torn):
            pass
        if pace.over():
            return None
        pace.wait()


class Damaged:
    """Files that were not whole, and since when on this process's clock."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._since: dict[str, float] = {}

    def too_long(self, path: str) -> bool:
        """The file is not whole; returns whether that has been so for DAMAGED_S."""
        return self._folder.now() - self._since.setdefault(path, self._folder.now()) > DAMAGED_S

    def whole(self, path: str) -> None:
        """The file is whole."""
        self._since.pop(path, None)
