"""Every file operation of the transport, and how a file is published.

What is relied on: a rename and a link happen or do not, also for other hosts; of several links to one name one is made;
a listing shows what exists. What is not: that an error means that nothing happened, that a name which is opened
before it exists is seen soon after, that clocks agree, that files have their content once they have a name.

So: names are looked up by listing their folder. A file is written under a temporary name, flushed and then renamed or
linked. After an error the listing or the content decides what has happened. Errors that may pass are tried again.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from fedmpi import disk
from fedmpi.errors import ConfigError, FolderError
from fedmpi.files.envelope import Buffer, Torn, unpacked
from fedmpi.files.names import PART

FINAL = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP}  # waiting won't help


class Pace:
    """Pauses between looks: from `first_s` on, each longer than the last by half, up to `most_s`."""

    def __init__(self, folder: Folder, first_s: float, most_s: float) -> None:
        self._folder, self._first_s, self._most_s = folder, first_s, most_s
        self._next_s = first_s

    def wait(self, most_s: float | None = None) -> None:
        """The next pause; at most `most_s` seconds."""
        self._folder.wait(self._next_s if most_s is None else min(self._next_s, most_s))
        self._next_s = min(1.5 * self._next_s, self._most_s)

    def reset(self) -> None:
        """Something has happened: look often again."""
        self._next_s = self._first_s


class Folder(abc.ABC):
    """A shared folder. Paths are relative to its root, `folder/name`. Single operations raise OSError as the operating
    system does; what is composed of them raises FolderError after `patience_s` seconds of errors."""

    def __init__(self, patience_s: float = 120.0) -> None:
        self.patience_s = patience_s
        self.counts: Counter[str] = Counter()  # operations by name

    # ------------------------------------------------------------ single operations

    @property
    @abc.abstractmethod
    def root(self) -> str:
        """The root, for messages."""

    @abc.abstractmethod
    def make(self, folder: str) -> None:
        """Create a folder of the root if it does not exist."""

    @abc.abstractmethod
    def listing(self, folder: str) -> list[str]:
        """The names in a folder, sorted. An empty string is the root."""

    @abc.abstractmethod
    def read(self, path: str) -> Buffer:
        """A file's content."""

    @abc.abstractmethod
    def create(self, path: str, parts: Sequence[Buffer]) -> None:
        """Write a new file and flush it. Raises FileExistsError."""

    @abc.abstractmethod
    def rename(self, old: str, new: str) -> None:
        """Rename a file; replaces what has the new name."""

    @abc.abstractmethod
    def link(self, old: str, new: str) -> None:
        """Give a file a second name. Raises FileExistsError."""

    @abc.abstractmethod
    def unlink(self, path: str) -> None:
        """Remove a name."""

    @abc.abstractmethod
    def sync(self, folder: str) -> None:
        """Flush the names in a folder."""

    @abc.abstractmethod
    def now(self) -> float:
        """Seconds on this process's monotonic clock."""

    @abc.abstractmethod
    def wait(self, seconds: float) -> None:
        """Sleep."""

    @abc.abstractmethod
    def token(self) -> str:
        """A random text that no other process has."""

    # ------------------------------------------------------------ composed of them

    def publish(self, path: str, parts: Sequence[Buffer]) -> None:
        """Give a file its content, atomically; replaces an older one. For names with one writer. `parts` come from
        envelope.packed. Three operations without errors: create, rename, sync."""
        folder, name = os.path.split(path)
        part = f"{path}{PART}{self.token()}"
        written = False

        def attempt() -> bool:
            nonlocal written
            if not written:
                self.create(part, parts)
                written = True
            self.rename(part, path)
            return True

        def decide() -> bool:
            nonlocal written
            names = self.listing(folder)
            if os.path.basename(part) in names:
                if not written:  # an attempt to write it that failed
                    self.unlink(part)
                return False
            written = False
            return name in names and unpacked(self.read(path)).digest == unpacked(b"".join(parts)).digest

        try:
            self._persist(f"write {path}", attempt, decide)
            self._tried(lambda: self.sync(folder))
        except BaseException:
            self.remove(part)
            raise

    def publish_first(
        self, path: str, parts: Sequence[Buffer], part: str = "", fence: Callable[[], None] | None = None
    ) -> bool:
        """Give a name to a file unless the name is taken. Returns whether this file has it.

        `parts` come from envelope.packed, and no other process writes the same content. `part` is where the file is
        written first; `fence` is called between writing and linking, each time, and may raise. Four operations without
        errors: create, link, sync, unlink.
        """
        folder, name = os.path.split(path)
        part = part or f"{path}{PART}{self.token()}"
        part_folder, part_name = os.path.split(part)
        mine = unpacked(b"".join(parts)).digest
        written, won = False, True

        def attempt() -> bool:
            nonlocal written
            if not written:
                self.create(part, parts)
                written = True
            if fence is not None:
                fence()
            self.link(part, path)
            return True

        def decide() -> bool:
            # A lost reply makes a link fail that was made: the content tells whose it is.
            nonlocal written, won
            if name in self.listing(folder):
                won = unpacked(self.read(path)).digest == mine
                return True
            if not written:
                with contextlib.suppress(FileNotFoundError):
                    self.unlink(part)
            elif part_name not in self.listing(part_folder):
                written = False
            return False

        try:
            self._persist(f"link {path}", attempt, decide)
            self._tried(lambda: self.sync(folder))
        finally:
            self.remove(part)
        return won

    def remove(self, path: str) -> bool:
        """Remove a name if possible; returns whether it is gone. Errors are not raised: who tidies comes again."""
        try:
            self.unlink(path)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def listed(self, folder: str) -> list[str]:
        """`listing`, tried again on errors for `patience_s` seconds. Raises FolderError."""
        names: list[str] = []

        def attempt() -> bool:
            names[:] = self.listing(folder)
            return True

        self._persist(f"list {folder}", attempt, lambda: False)
        return names

    def _tried(self, action: Callable[[], None]) -> None:
        def attempt() -> bool:
            action()
            return True

        self._persist("flush names", attempt, lambda: False)

    def _persist(self, what: str, attempt: Callable[[], bool], decide: Callable[[], bool]) -> None:
        """Try until `attempt`, or `decide` after an error, says that it is done."""
        pace, until_s = Pace(self, 0.05, 5.0), self.now() + self.patience_s
        while True:
            try:
                if attempt():
                    return
            except OSError as error:
                last = error
                self._refuse(what, error)
            try:
                if decide():
                    return
            except (OSError, Torn) as error:
                if isinstance(error, OSError):
                    self._refuse(what, error)
                elif self.now() >= until_s:
                    raise FolderError(f"{self.root}: cannot {what}: {error}") from None
            if self.now() >= until_s:
                raise FolderError(f"{self.root}: cannot {what}: {last.strerror} for {self.patience_s:g} s") from None
            pace.wait()

    def _refuse(self, what: str, error: OSError) -> None:
        if error.errno in FINAL:
            self.refuse(what, error)

    def refuse(self, what: str, error: OSError) -> NoReturn:
        """Raise ConfigError: the user has to change something."""
        raise ConfigError(f"transport.root: cannot {what} in {self.root}: {error.strerror}") from None


class Disk(Folder):
    """A folder on a file system."""

    def __init__(self, root: Path, patience_s: float = 120.0, mode: int = disk.FILE_MODE) -> None:
        super().__init__(patience_s)
        self.path, self.mode = root, mode

    @property
    def root(self) -> str:
        return str(self.path)

    def make(self, folder: str) -> None:
        self.counts["make"] += 1
        (self.path / folder).mkdir(mode=self.mode | (self.mode & 0o444) >> 2, exist_ok=True)

    def listing(self, folder: str) -> list[str]:
        self.counts["list"] += 1
        return sorted(os.listdir(self.path / folder))

    def read(self, path: str) -> Buffer:
        self.counts["read"] += 1
        with open(disk.open_regular(self.path / path), "rb", buffering=0) as file:
            content = bytearray(os.fstat(file.fileno()).st_size)
            view, at = memoryview(content), 0
            while at < len(view) and (count := file.readinto(view[at:])):
                at += count
        return view[:at]

    def create(self, path: str, parts: Sequence[Buffer]) -> None:
        self.counts["create"] += 1
        with open(disk.open_new(self.path / path, self.mode), "wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())

    def rename(self, old: str, new: str) -> None:
        self.counts["rename"] += 1
        os.replace(self.path / old, self.path / new)

    def link(self, old: str, new: str) -> None:
        self.counts["link"] += 1
        os.link(self.path / old, self.path / new)

    def unlink(self, path: str) -> None:
        self.counts["unlink"] += 1
        os.unlink(self.path / path)

    def sync(self, folder: str) -> None:
        self.counts["sync"] += 1
        disk.sync(self.path / folder)

    def now(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def token(self) -> str:
        return secrets.token_hex(6)
