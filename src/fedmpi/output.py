"""Messages on standard output and standard error. A message that cannot be written never ends a run.

The causes are a reader that went away (`| head -1`), a closed descriptor, or a full disk behind `> log`. A command
whose output is its result, such as `fedmpi inspect`, flushes the output itself and fails.

`reserve` keeps standard output for `give`, so that a program can read it: all else then goes to standard error, also
what libraries and your own code print. `keep_log` writes all messages into a file as well.

`at_most` and `at_least` print bounds: rounded the other way, they would promise what does not hold.
"""

from __future__ import annotations

import atexit
import contextlib
import decimal
import errno
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import IO

_reserved: IO[str] | None = None  # standard output, if it is kept for `give`
_log: IO[str] | None = None


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


def reserve() -> None:
    """Keep standard output for `give`; whatever else this process prints goes to standard error from now on."""
    global _reserved
    if _reserved is None:
        flush()
        _reserved = open(os.dup(1), "w", encoding="utf-8")  # noqa: SIM115
        os.dup2(2, 1)


def give(line: str) -> None:
    """Write a line to the standard output that `reserve` kept, and flush it. Raises nothing."""
    global _reserved
    if _reserved is None:
        return
    try:
        print(line, file=_reserved, flush=True)
    except (OSError, ValueError) as failed:
        if not isinstance(failed, OSError) or failed.errno in (errno.EPIPE, errno.EBADF):
            _reserved = open(os.devnull, "w")  # noqa: SIM115


def keep_log(path: Path) -> None:
    """Append all messages and warnings from now on to a file too, each with its time. Raises OSError. Once it is
    open, further calls do nothing."""
    global _log
    if _log is not None:
        return
    _log = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    logging.getLogger("fedmpi").addHandler(_Kept())


class _Kept(logging.Handler):
    """Puts warnings into the log, and on standard error as without it."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())
        if not logging.getLogger().handlers and logging.lastResort is not None:
            logging.lastResort.handle(record)


def note(text: str) -> None:
    """Write a message into the log only, if there is one. Raises nothing."""
    if _log is not None:
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with contextlib.suppress(OSError, ValueError):
            print(f"{moment} {text.rstrip()}", file=_log, flush=True)


def say(text: str, error: bool = False) -> None:
    """Print a line and flush it; to standard error if `error`. Raises nothing."""
    note(text)
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


def at_most(value: float, digits: int = 4) -> str:
    """An upper bound as text, rounded up to so many significant digits.

    >>> at_most(3.99911), at_most(2.00001), at_most(0.83), at_most(math.inf)
    ('4', '2.001', '0.83', 'inf')
    """
    return _rounded(value, digits, decimal.ROUND_CEILING)


def at_least(value: float, digits: int = 4) -> str:
    """A lower bound as text, rounded down.

    >>> at_least(3.99911), at_least(2.00001), at_least(0.0)
    ('3.999', '2', '0')
    """
    return _rounded(value, digits, decimal.ROUND_FLOOR)


def _rounded(value: float, digits: int, rounding: str) -> str:
    if not math.isfinite(value):
        return f"{value}"
    # From the shortest text of the float: 0.83 stays 0.83, though its bits are a little less.
    found = decimal.Context(prec=digits, rounding=rounding).create_decimal(repr(float(value)))
    return f"{float(found):.{digits}g}"


def size(num_bytes: float) -> str:
    """Bytes as text.

    >>> size(3 << 20), size(512)
    ('3.0 MiB', '512 B')
    """
    if num_bytes < 1024:
        return f"{num_bytes:.0f} B"
    power = min(int(math.log(num_bytes, 1024)), 4)
    return f"{num_bytes / 1024**power:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"
