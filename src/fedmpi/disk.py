"""Atomic file writes that do not follow links.

A file is written under a temporary name beside its final one, flushed and renamed, and the folder is flushed too. After
a power cut it has either the old or the new content. Files are readable by their owner only: they contain silos' state.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

FILE_MODE, FOLDER_MODE = 0o600, 0o700


@contextlib.contextmanager
def replacing(path: Path, mode: int = FILE_MODE) -> Iterator[Path]:
    """Yields a new file to write. When the block ends it replaces `path`; if the block raises it is deleted."""
    make_folder(path.parent)
    part = path.with_name(f"{path.name}.part-{os.getpid()}-{secrets.token_hex(4)}")
    os.close(open_new(part, mode))
    try:
        yield part
        sync(part)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    sync(path.parent)


def remove_parts(folder: Path) -> None:
    """Deletes temporary files that ended processes have left in the folder."""
    for part in folder.glob("*.part-*"):
        written = re.fullmatch(r".+\.part-(\d+)-[0-9a-f]{8}", part.name)
        if written and not _runs(int(written[1])):
            part.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def open_new(path: Path, mode: int = FILE_MODE) -> int:
    """Creates a file and returns its descriptor; fails if it exists, and does not follow links."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def replace_text(path: Path, text: str) -> None:
    """Replaces the content of a file by `text`, atomically."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Replaces the content of a file by `content`, atomically."""
    with replacing(path) as part:
        part.write_bytes(content)


def read_bytes(path: Path, most: int = 1 << 30) -> bytes:
    """The content of a regular file. Raises OSError for a link, a pipe, a folder, or more than `most` bytes."""
    with open(open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(f"{path} is larger than {most} bytes")
        return file.read()


def open_regular(path: Path) -> int:
    """Opens a regular file for reading and returns its descriptor. Raises OSError for a link, a pipe or a folder,
    without following or waiting."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, f"{path} is a link" if path.is_symlink() else error.strerror, str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return descriptor


def make_folder(path: Path) -> None:
    """Creates the folder if it does not exist; a new one is accessible to its owner only."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=FOLDER_MODE, exist_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file. Best effort: errors are ignored, and nothing is flushed."""
    with contextlib.suppress(OSError), open(path, "a") as file:
        file.write(line + "\n")
