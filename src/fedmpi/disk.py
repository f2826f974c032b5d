"""Files that are there whole or not at all, and that nobody else's link leads astray.

A file is written beside its final name, as a new one; flushed, renamed, and the folder flushed too: after a power cut
it holds what it held before, or all of the new. What a run writes is its owner's alone to read: silos' state is in it.
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
    """A new file to write; when the block ends it takes the place of `path`, and goes if the block raises."""
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
    """Delete what processes that are gone have left half-written in the folder."""
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
    """A descriptor of a file that was not there; links are not followed."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def replace_text(path: Path, text: str) -> None:
    """The file holds `text`, whole, or what it held before."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """The file holds `content`, whole, or what it held before."""
    with replacing(path) as part:
        part.write_bytes(content)


def read_bytes(path: Path, most: int = 1 << 30) -> bytes:
    """What a regular file holds. OSError for a link, a pipe, a folder, or more than `most` bytes."""
    with open(open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(f"{path} is larger than {most} bytes")
        return file.read()


def open_regular(path: Path) -> int:
    """A descriptor to read a regular file. OSError for a link, a pipe or a folder, which are neither followed nor
    waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, f"{path} is a link" if path.is_symlink() else error.strerror, str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return descriptor


def make_folder(path: Path) -> None:
    """The folder is there, and where it is new its owner's alone."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=FOLDER_MODE, exist_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """What was written into the file, or which names the folder has, survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, line: str) -> None:
    """One more line at the end of a file; as good as the disk is: nobody waits for it, and what fails is left out."""
    with contextlib.suppress(OSError), open(path, "a") as file:
        file.write(line + "\n")
