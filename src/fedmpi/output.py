"""Lines for people, on standard output and standard error: one that cannot be written never ends the work it tells of.

A reader that went away (`| head -1`), a closed descriptor and a full disk behind `> log` are the log's trouble, not the
run's. A command whose output is its result, such as `fedmpi inspect`, flushes for itself and fails.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import sys


def open_streams() -> None:
    """Open what is closed of descriptors 0, 1 and 2: else a file opened later, such as a checkpoint, would get the
    number of standard output, and whatever a library prints would go into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    atexit.register(flush)  # what cannot be written must not become the exit code, as Python would have it


def say(text: str, error: bool = False) -> None:
    """Print a line and flush it; to standard error if `error`. Raises nothing."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    try:
        try:
            print(text, file=stream, flush=True)
        except UnicodeError:  # a silo's name where the locale is C
            print(text.encode("ascii", "backslashreplace").decode(), file=stream, flush=True)
    except (OSError, ValueError) as failed:
        if not isinstance(failed, OSError) or failed.errno in (errno.EPIPE, errno.EBADF):
            _mute(error)  # for good; a full disk may have room again later


def _mute(error: bool) -> None:
    """From now on the stream writes into nothing."""
    stream, number = (sys.stderr, 2) if error else (sys.stdout, 1)
    with contextlib.suppress(OSError, ValueError):
        if stream.fileno() == number:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)


def flush() -> None:
    """Write out what is in the buffers, as far as that can be done."""
    for stream, error in ((sys.stdout, False), (sys.stderr, True)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            _mute(error)
