"""A folder on a real disk as an NFS client shows it: names seen late, listings and contents from a cache."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

from fedmpi.files.envelope import Buffer
from fedmpi.files.folder import Disk


class LateDisk(Disk):
    """A name that was opened before it existed is not seen for `late_s` seconds, unless its folder is listed. A file
    that was replaced shows its old content, and a folder its old listing, for a tenth of that; own changes show at
    once."""

    def __init__(self, root: Path, late_s: float) -> None:
        super().__init__(root, patience_s=20.0)
        self.late_s = late_s
        self._missing: dict[str, float] = {}
        self._contents: dict[str, tuple[float, Buffer]] = {}
        self._listings: dict[str, tuple[float, list[str]]] = {}

    def _changed(self, path: str) -> None:
        self._missing.pop(path, None)
        self._contents.pop(path, None)
        self._listings.pop(path.rpartition("/")[0], None)

    def listing(self, folder: str) -> list[str]:
        at_s, names = self._listings.get(folder, (-1e9, []))
        if self.now() - at_s > self.late_s / 10:
            names = super().listing(folder)
            self._listings[folder] = self.now(), names
            for name in names:
                self._missing.pop(f"{folder}/{name}" if folder else name, None)
        return list(names)

    def read(self, path: str) -> Buffer:
        if self._missing.get(path, -1e9) > self.now():
            raise FileNotFoundError(errno.ENOENT, "not seen yet", path)
        at_s, content = self._contents.get(path, (-1e9, b""))
        if self.now() - at_s > self.late_s / 10:
            try:
                content = super().read(path)
            except FileNotFoundError:
                self._missing[path] = self.now() + self.late_s
                raise
            self._contents[path] = self.now(), content
        return content

    def create(self, path: str, parts: Sequence[Buffer]) -> None:
        self._changed(path)
        super().create(path, parts)

    def rename(self, old: str, new: str) -> None:
        self._changed(old)
        self._changed(new)
        super().rename(old, new)

    def link(self, old: str, new: str) -> None:
        self._changed(new)
        super().link(old, new)

    def unlink(self, path: str) -> None:
        self._changed(path)
        super().unlink(path)
