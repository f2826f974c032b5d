"""Every file operation of the transport, and how a file is published.

What is relied on: a rename and a link happen or do not, also for other hosts; of several links to one name one is made;
a listing shows what exists. What is not: that an error means that nothing happened, that a name which is opened
before it exists is seen soon after, that clocks agree, that files have their content once they have a name.

So: names are looked up by listing their folder. A file is written under a temporary name, flushed and then renamed or
linked. After an error the listing or the content decides what has happened. Errors that may pass are tried again.
"""

from __future__ import annotations

import abc
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
from fedmpi.files.envelope import Buffer, Torn, digest_of, unpacked
from fedmpi.files.names import PART

FINAL = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP}  # waiting won't help
ATTEMPTS = 20  # at least, before an error is given up


class Pace:
    """Pauses between looks: from `first_s` on, each `growth` times the last, up to `most_s`."""

    def __init__(self, folder: Folder, first_s: float, most_s: float, growth: float = 1.5) -> None:
        self._folder, self._first_s, self._most_s, self._growth = folder, first_s, most_s, growth
        self._next_s, self._num_waits, self._begun_s = first_s, 0, folder.now()

    @classmethod
    def of_errors(cls, folder: Folder) -> Pace:
        """Pauses between attempts at something that fails, for as long as the folder's patience."""
        return cls(folder, min(0.05, folder.patience_s / ATTEMPTS), min(5.0, folder.patience_s / ATTEMPTS))

    def over(self) -> bool:
        """Whether the folder's patience is over: that many seconds, and ATTEMPTS pauses. So a process that was
        suspended for an hour still tries again."""
        return self._num_waits >= ATTEMPTS and self._folder.now() - self._begun_s >= self._folder.patience_s

    def wait(self, most_s: float | None = None) -> None:
        """The next pause; at most `most_s` seconds."""
        self._folder.wait(self._next_s if most_s is None else min(self._next_s, most_s))
        self._grow()

    def wait_while(self, ready: Callable[[], bool], most_s: float) -> None:
        """The next pause, in pieces of `first_s`; at most `most_s` seconds, and no longer than `ready` says so."""
        until_s = self._folder.now() + min(self._next_s, most_s)
        while (left_s := until_s - self._folder.now()) > 0 and ready():
            self._folder.wait(min(left_s, self._first_s))
        self._grow()

    def _grow(self) -> None:
        self._next_s = min(self._growth * self._next_s, self._most_s)
        self._num_waits += 1

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

    def publish(
        self, path: str, parts: Sequence[Buffer], beside: str = "", fence: Callable[[], None] | None = None
    ) -> None:
        """Give a file its content, atomically; replaces an older one. For names with one writer. `parts` come from
        envelope.packed; `beside` and `fence` as in `publish_first`. Three operations without errors: create, rename,
        sync."""
        folder, name = os.path.split(path)
        part = _Part(self, beside or path, parts)

        def attempt() -> bool:
            part.write()
            if fence is not None:
                fence()
            self.rename(part.path, path)
            return True

        def decide() -> bool:
            part_folder, part_name = os.path.split(part.path)
            if part_name in self.listing(part_folder):
                part.check()
                return False
            part.renew()
            return name in self.listing(folder) and unpacked(self.read(path)).digest == part.digest

        try:
            self._persist(f"write {path}", attempt, decide)
            self.tried(f"flush {folder}", lambda: self.sync(folder))
        except BaseException:
            part.remove()
            raise

    def publish_first(
        self, path: str, parts: Sequence[Buffer], beside: str = "", fence: Callable[[], None] | None = None
    ) -> bool:
        """Give a name to a file unless the name is taken. Returns whether this file has it.

        `parts` come from envelope.packed, and no other process writes the same content. The file is written first under
        a temporary name that starts with `beside`; `fence` is called between writing and linking, each time, and may
        raise. Four operations without errors: create, link, sync, unlink.
        """
        folder, name = os.path.split(path)
        part = _Part(self, beside or path, parts)
        won = True

        def attempt() -> bool:
            part.write()
            if fence is not None:
                fence()
            self.link(part.path, path)
            return True

        def decide() -> bool:
            # A lost reply makes a link fail that was made: the content tells whose it is.
            nonlocal won
            if name in self.listing(folder):
                won = unpacked(self.read(path)).digest == part.digest
                return True
            part_folder, part_name = os.path.split(part.path)
            if part_name in self.listing(part_folder):
                part.check()
            else:
                part.renew()
            return False

        try:
            self._persist(f"link {path}", attempt, decide)
            self.tried(f"flush {folder}", lambda: self.sync(folder))
        finally:
            part.remove()
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
        self.tried(f"list {folder}", lambda: names.extend(self.listing(folder)))
        return names

    def tried(self, what: str, action: Callable[[], None]) -> None:
        """Do something that may be done twice; try again on errors for `patience_s` seconds. Raises FolderError."""

        def attempt() -> bool:
            action()
            return True

        self._persist(what, attempt, lambda: False)

    def _persist(self, what: str, attempt: Callable[[], bool], decide: Callable[[], bool]) -> None:
        """Try until `attempt`, or `decide` after an error, says that it is done."""
        pace = Pace.of_errors(self)
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
                elif pace.over():
                    raise FolderError(f"{self.root}: cannot {what}: {error}") from None
            if pace.over():
                raise FolderError(f"{self.root}: cannot {what}: {last.strerror} for {self.patience_s:g} s") from None
            pace.wait()

    def _refuse(self, what: str, error: OSError) -> None:
        if error.errno in FINAL:
            self.refuse(what, error)

    def refuse(self, what: str, error: OSError) -> NoReturn:
        """Raise ConfigError: the user has to change something."""
        raise ConfigError(f"transport.root: cannot {what} in {self.root}: {error.strerror}") from None


class _Part:
    """A temporary file, written once under each of its names: an operation that was asked for and failed may still be
    done later, and must not meet another file."""

    def __init__(self, folder: Folder, front: str, parts: Sequence[Buffer]) -> None:
        self._folder, self._front, self._parts = folder, front, parts
        self.digest = digest_of(parts)
        self.renew()

    def renew(self) -> None:
        """Take another name."""
        self.path, self._written = f"{self._front}{PART}{self._folder.token()}", False

    def write(self) -> None:
        """Write the file unless it is written."""
        if not self._written:
            self._folder.create(self.path, self._parts)
            self._written = True

    def check(self) -> None:
        """The file is there. Take another name if it is not known to be whole."""
        if not self._written:
            self.remove()
            self.renew()

    def remove(self) -> None:
        """Remove the file if possible."""
        self._folder.remove(self.path)


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
