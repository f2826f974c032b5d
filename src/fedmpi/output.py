"""Messages on standard output and standard error. A message that cannot be written never ends a run.

The causes are a reader that went away (`| head -1`), a closed descriptor, or a full disk behind `> log`. A command
whose output is its result, such as `fedmpi inspect`, flushes the output itself and fails.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import sys


def open_streams() -> None:
    """Open descriptors 0, 1 and 2 on /dev/null if they are closed. A file opened later, such as a checkpoint, would
    otherwise get the number of standard output, and a library's prints would go into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    atexit.register(flush)  # at exit Python turns a failed flush into exit code 120


def say(text: str, error: bool = False) -> None:
    """Print a line and flush it; to standard error if `error`. Raises nothing."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    try:
        try:
            print(text, file=stream, flush=True)
        except UnicodeError:  # a silo's name in the C locale
            print(text.encode("ascii", "backslashreplace").decode(), file=stream, flush=True)
    except (OSError, ValueError) as failed:
        if not isinstance(failed, OSError) or failed.errno in (errno.EPIPE, errno.EBADF):
            _mute(error)  # for good; not for a full disk, which may have room again


def _mute(error: bool) -> None:
    """Redirect the stream to /dev/null."""
    stream, number = (sys.stderr, 2) if error else (sys.stdout, 1)
    with contextlib.suppress(OSError, ValueError):
        if stream.fileno() == number:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)


def flush() -> None:
    """Flush both streams. Raises nothing."""
    for stream, error in ((sys.stdout, False), (sys.stderr, True)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            _mute(error)
